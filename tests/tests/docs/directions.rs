//! What there is to say of particular commands, page by page, in their order.

use crate::{
    elsewhere::{gate, with_containers},
    page::{Direction, Stage, on},
};

const BUILDS: &str = "it builds everything, and runs this";

/// Four workers, each in a task of its own.
const WORKERS: &str = r#"timeout 25 sh -c 'until [ "$(shaper get tasks --broker= -o name | wc -l)" -ge 4 ]; do sleep 0.1; done'"#;

/// What `shaper pki` makes, as a reader has it who comes from the README.
const CERTIFICATES: &str = "shaper pki init --ca-dir ca
    shaper pki issue --ca-dir ca --host broker.lan --host broker1 --host broker2 --host broker3 \\
        spiffe://cluster.local/broker/b broker
    shaper pki issue --ca-dir ca spiffe://cluster.local/node/n1 n1
    shaper pki issue --ca-dir ca spiffe://cluster.local/operator/ann ann";

/// A task for which there is room everywhere.
const SMALL: &str = r#"echo '{"task_id": "small", "priority": "low", "resource_demand": {"cpu_cores": 0.1, "memory_gb": 0.1}}' \
    > small.json"#;

/// One of three on one machine.
macro_rules! broker {
    ($number:literal) => {
        concat!(
            "shaper-broker --store etcd --state-dir /var/lib/b",
            $number,
            " --listen /run/shaper/b",
            $number,
            ".sock",
            " --listen tcp://127.0.0.",
            $number,
            ":7070 --tls-dir broker --advertise https://broker",
            $number,
            ":7070 &"
        )
    };
}

/// What `shaper ui` prints opens the page, behind a tunnel as well.
const OPENS: &str = r#"address=$(shaper ui | grep -om1 'http://127\.0\.0\.1:9780/[^ ]*') &&
    curl --fail --silent --show-error --location --cookie-jar jar "$address" | grep -q 'shaper</title>'"#;

pub(crate) fn readme() -> Vec<Direction> {
    let in_test = || gate(BUILDS, "stage \"tests\" ./x test");
    let once = |command| on(command).only_in(Stage::Commands);
    let bench =
        |command, subject, quick| on(command).only_in(Stage::Benches).reads(subject, quick).has_figures();
    // Of each a little: in full it takes an hour and more.
    let soak = |command, name, fraction| on(command).only_in(Stage::Soaks).reads(name, fraction);
    vec![
        on("./x demo").elsewhere(gate(BUILDS, "./x demo --json")),
        on("./x test").elsewhere(in_test()),
        on("shaper top").until("train-1"),
        on("shaper set web-1 --io-latency 5ms").first("shaper run -d --user nobody --id web-1 -- ./train"),
        on("shaper logs -f train-1").until("epoch 1"),
        on("shaper run --image docker.io/library/redis:7 --memory 512Mi")
            .elsewhere(with_containers("docker_runs_tasks_in_slices_of_systemd")),
        // The one that runs is replaced, as by an operator who changes its options.
        on("shaper-agent --adopt /etc/shaper/adopt.yaml")
            .first("kill %1; wait %1")
            .first("echo 'rules: [{name: batch, select: {cgroup: batch.slice/*}}]' > /etc/shaper/adopt.yaml"),
        on("shaper-broker &").fresh().file("policy.yaml", "yaml", 0).file("profile.json", "json", 0),
        // As large as the task that comes.
        on("shaper-agent --broker /run/shaper/broker.sock &")
            .reads(".sock", ".sock --capacity cpu=8,memory=16Gi,network=1gbit"),
        on("shaper get tasks --watch").until("Running"),
        on("shaper get events --watch").until("placed"),
        on("shaper profile get train").first(SMALL)
            .first("shaper submit --wait --user nobody --name train small.json -- /bin/true"),
        on("shaper pki init --ca-dir ca").fresh(),
        on("shaper-broker --scale scale.yaml …").fresh().first(
            "echo 'groups: [{name: workers, nodes: \"worker-*\", capacity: {cpu_cores: 8, memory_gb: 32}, max: 10, \
                provider: {exec: {command: [/bin/true]}}}]' > scale.yaml",
        ),
        on("shaper node drain --dry-run n1").first("shaper-agent --broker /run/shaper/broker.sock &"),
        on("shaper-broker --web tcp://127.0.0.1:9780 …").fresh(),
        on("shaper-agent  --metrics tcp://127.0.0.1:9750 --metrics-token-file /etc/shaper/metrics.token …")
            .fresh()
            .first("(umask 077; openssl rand -hex 32 > /etc/shaper/metrics.token)"),
        once("cargo xtask build-ebpf"),
        on("cargo xtask test").elsewhere(in_test()),
        once("cargo xtask vm --kernel 6.1 -- pace"),
        // One test is enough to see that it starts any; the stage `systemd` runs all.
        once("cargo xtask vm --profile systemd")
            .reads("systemd", "systemd -- hardened::the_broker_needs_no_capability"),
        soak("cargo xtask soak kills", "kills", "kills --fraction 1/200"),
        soak("cargo xtask soak broker", "broker", "broker --fraction 1/200"),
        on("cargo xtask soak fuzz").elsewhere(gate("it takes hours", "./x soak fuzz --fraction 1/20")),
        soak("cargo xtask soak properties", "properties", "properties --fraction 1/100"),
        soak("cargo xtask soak shrink", "shrink", "shrink --fraction 1/200"),
        bench("cargo xtask bench scale", "scale", "scale --quick --json"),
        bench("cargo xtask bench actuators", "actuators", "actuators --quick --json"),
        bench("cargo xtask bench shape", "shape", "shape --quick --json"),
        bench("cargo xtask bench net", "net", "net --quick --json"),
        bench("cargo xtask bench broker", "broker", "broker --quick --json"),
        bench("cargo xtask bench place", "place", "place --quick --json"),
        bench("cargo xtask bench rightsize", "rightsize", "rightsize --quick --json"),
        bench("cargo xtask bench measure", "measure", "measure --quick --json"),
        bench("cargo xtask bench web", "web", "web --quick --json"),
        bench("cargo xtask bench containers", "containers", "containers --quick --json"),
        once("cargo xtask deb").after("for package in target/debian/*.deb; do dpkg-deb --info $package; done"),
        once("cargo xtask image"),
        once("cargo xtask dashboards")
            .first("sha256sum deploy/grafana/* > target/dashboards.sha256")
            .after("sha256sum --check --quiet target/dashboards.sha256"),
        on("cargo xtask tidy").elsewhere(gate(BUILDS, "stage \"tidy\" ./x tidy")),
    ]
}

pub(crate) fn containers() -> Vec<Direction> {
    vec![
        on("shaper-agent --adopt /etc/shaper/adopt.yaml")
            .file("adopt.yaml", "yaml", 0)
            .first("cp adopt.yaml /etc/shaper/adopt.yaml"),
        on("shaper-agent --containers docker").fresh(),
        on("shaper submit --image docker.io/library/redis:7 redis.json")
            .elsewhere(with_containers("containers_are_placed_on_three_nodes_grown_preempted_and_run_again")),
        on("shaper run --image docker.io/library/python:3.13 --cpu 1 --memory 512Mi -- python3 -c 'print(6 * 7)'")
            .elsewhere(with_containers("docker_runs_tasks_in_slices_of_systemd")),
    ]
}

pub(crate) fn frameworks() -> Vec<Direction> {
    let once = |command| on(command).only_in(Stage::Frameworks);
    vec![
        on("shaper exec --cpu 1 --memory 2Gi --name etl.load --label framework=airflow -- python3 load.py")
            .first("shaper-agent &"),
        once("RAY_RUNTIME_ENV_PLUGINS='[{\"class\": \"shaper.ray.ShaperPlugin\"}]' ray start --head")
            .first("shaper-agent &")
            .first(include_str!("stages/frameworks.sh"))
            .after("ray status && ray stop"),
        once("dask scheduler --preload shaper.dask").reads("shaper.dask", "shaper.dask &"),
        once(
            "DASK_SHAPER__WORKER__CPU=1 DASK_SHAPER__WORKER__MEMORY=2Gi \\\n    dask worker tcp://scheduler:8786 \
                --preload-nanny shaper.dask --nthreads 1 --nworkers 4",
        )
        .reads("--nworkers 4", "--nworkers 4 &")
        .after(WORKERS),
        once("shaper exec --cpu 1 -- dask worker tcp://scheduler:8786 --no-nanny --nthreads 1")
            .reads("--nthreads 1", "--nthreads 1 &"),
    ]
}

pub(crate) fn kubernetes() -> Vec<Direction> {
    let once = |command| on(command).only_in(Stage::Commands);
    let both = |command| on(command).also_in(Stage::Commands);
    vec![
        once("cargo xtask image"),
        once("skopeo copy oci-archive:target/shaper-image.tar docker://registry.example/shaper:0.1.0")
            .first(include_str!("stages/installed.sh"))
            .first(include_str!("stages/registry.sh"))
            .first("docker-registry serve registry.yaml &")
            .after("skopeo inspect docker://registry.example/shaper:0.1.0"),
        once("ctr -n k8s.io images import --base-name registry.example/shaper target/shaper-image.tar")
            .first("containerd --config containerd.toml &")
            .after("ctr -n k8s.io images list --quiet | grep -Fx registry.example/shaper:0.1.0"),
        once("podman load -i target/shaper-image.tar")
            // With limits that nobody has to be allowed to raise.
            .after("podman run --rm --network none --cgroups disabled --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 \
                    localhost/0.1.0 /usr/bin/shaper --version"),
        both("shaper pki init --ca-dir ca"),
        both(
            "shaper pki issue --ca-dir ca --host shaper-broker.shaper.svc --host localhost \
                spiffe://cluster.local/broker/b broker",
        ),
        both("shaper pki issue --ca-dir ca spiffe://cluster.local/operator/ann ann"),
        once("kubectl create namespace shaper")
            .first(
                "\"$SHAPER_KUBERNETES/python\" \"$REPOSITORY/tests/kubernetes/apiserver.py\" --port 8001 --node n1 \
                    --pod-address 127.0.0.2 &",
            )
            .first(
                "kubectl config set-cluster test --server http://127.0.0.1:8001
                kubectl config set-context test --cluster test
                kubectl config use-context test",
            )
            // The others that the page's first table has.
            .first("kubectl apply -k deploy/kubernetes/agent && kubectl delete -k deploy/kubernetes/agent")
            .first("kubectl apply -k deploy/kubernetes/etcd && kubectl delete -k deploy/kubernetes/etcd"),
        once(
            "kubectl -n shaper create secret generic shaper-broker-tls   --from-file=broker/identity.pem --from-file=broker/ca.pem",
        ),
        once(
            "kubectl -n shaper create secret generic shaper-operator-tls --from-file=ann/identity.pem --from-file=ann/ca.pem",
        ),
        once("kubectl apply -k deploy/kubernetes"),
        // The fake API server starts nothing.
        once("kubectl -n shaper port-forward svc/shaper-broker 7070 &")
            .first("shaper-broker --listen tcp://127.0.0.2:7070 --tls-dir broker &"),
        once("shaper --broker https://localhost:7070 --tls-dir ann get nodes"),
        both("(umask 077; openssl rand -hex 32 > token)"),
        once("kubectl -n shaper create secret generic shaper-metrics --from-file=token"),
        both("mkdir -m 700 tokens"),
        once(
            "for node in $(kubectl get nodes -o name | cut -d/ -f2); do\n    shaper pki token --authority \
                https://authority.example:7071 --tls-dir ann spiffe://cluster.local/node/$node > tokens/$node\ndone",
        )
        .first("shaper-authority --ca-dir ca --listen tcp://127.0.0.1:7071 &")
        .after("test -s tokens/n1"),
        once("kubectl -n shaper create secret generic shaper-join --from-file=tokens"),
        once(
            "for node in $(ls tokens); do sed \"s/node-1/$node/g\" deploy/kubernetes/metrics/join.yaml | \
                kubectl apply -f -; done",
        )
        .after("kubectl -n shaper get job shaper-join-n1"),
        once("kubectl -n shaper delete secret shaper-join"),
        once("kubectl apply -k deploy/kubernetes/metrics").after(
            "kubectl -n shaper get ds shaper-agent -o jsonpath='{.spec.template.spec.containers[0].args}' | grep -q metrics",
        ),
        once(
            "kubectl -n shaper patch configmap shaper-adopt --type merge -p \
                '{\"data\":{\"adopt.yaml\":\"rules: []\\n\"}}'",
        )
        .after("kubectl -n shaper get configmap shaper-adopt -o jsonpath='{.data.adopt\\.yaml}' | grep -Fx 'rules: []'"),
        // No kubelet brings it.
        once("sleep 150").reads("150", "0"),
        once(
            "for pod in $(kubectl -n shaper get pods -l app.kubernetes.io/component=agent -o name); do\n    kubectl \
                -n shaper exec $pod -c agent -- shaper release --all --broker= || echo \"not released: $pod\"\ndone",
        )
        .first("shaper-agent &")
        .first("shaper adopt /sys/fs/cgroup/system.slice/nginx.service --id nginx --net 200mbit")
        .first("find /sys/fs/bpf/shaper -type f | grep .")
        .after("! find /sys/fs/bpf/shaper -type f | grep ."),
        once("kubectl delete -k deploy/kubernetes").after("left=$(kubectl get ds,sts,jobs,pods -A -o name) && test -z \"$left\""),
    ]
}

pub(crate) fn operating() -> Vec<Direction> {
    vec![
        on("shaper-agent --broker https://broker1:7070,https://broker2:7070,https://broker3:7070 --tls-dir DIR …")
            .first(CERTIFICATES)
            .first(
                "etcd --data-dir etcd --listen-client-urls http://127.0.0.1:2379 \
                    --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 &",
            )
            .first(broker!("1"))
            .first(broker!("2"))
            .first(broker!("3"))
            .reads("DIR", "n1"),
        on("shaper       --broker https://broker1:7070,https://broker2:7070,https://broker3:7070 --tls-dir DIR …")
            .reads("DIR …", "ann get nodes"),
        on("shaper ui").fresh().first("shaper-broker --web tcp://127.0.0.1:9780 &").after(OPENS),
        on("ssh -L 9780:127.0.0.1:9780 broker.example")
            .only_in(Stage::Commands)
            .first(include_str!("stages/installed.sh"))
            .first(include_str!("stages/broker-example.sh"))
            .first("nsenter --net=/run/netns/broker.example /usr/sbin/sshd -D -e -f /run/ssh/sshd_config &")
            .first("nsenter --net=/run/netns/broker.example shaper-broker --web tcp://127.0.0.1:9780 &")
            .reads("broker.example", "broker.example &")
            .after(OPENS),
    ]
}

pub(crate) fn policies() -> Vec<Direction> {
    vec![
        on("shaper apply --dry-run=server -f gold.yaml")
            .file("gold.yaml", "yaml", 1)
            .first("shaper-broker &"),
        on("shaper policy rollback 7").reads("7", "1"),
    ]
}

pub(crate) fn scaling() -> Vec<Direction> {
    let node = |command: &'static str| on(command).reads("NODE", "n1");
    vec![
        on("shaper-broker --scale /etc/shaper/scale.yaml …").file("scale.yaml", "yaml", 0).first(
            "cp scale.yaml /etc/shaper/scale.yaml
            shaper pki init --ca-dir ca && cp ca/ca.pem /etc/shaper/provider-ca.pem",
        ),
        on("shaper explain TASK")
            .first("shaper-agent --broker /run/shaper/broker.sock &")
            .first(SMALL)
            .first("shaper submit --user nobody small.json -- ./train")
            .reads("TASK", "small"),
        node("shaper node cordon NODE"),
        node("shaper node drain --dry-run NODE"),
        node("shaper node drain NODE"),
        node("shaper node uncordon NODE"),
        // One that is there is not forgotten.
        node("shaper node remove NODE").first("shaper cancel small --now").first("kill %2; wait %2"),
    ]
}

pub(crate) fn tutorial_one_node() -> Vec<Direction> {
    vec![
        on("cargo xtask build-ebpf").only_in(Stage::Commands),
        on("cargo build --workspace --bins").only_in(Stage::Commands),
        // Here the programs are elsewhere.
        on("export PATH=$PWD/target/debug:$PATH SHAPER_BPF_OBJECT=$PWD/target/bpf/shaper.bpf.o")
            .reads("$PWD/target/debug", "/run/bin")
            .reads("$PWD/target/bpf", "/run/bin"),
        on("shaper-agent 2> agent.log &"),
        // The one that was killed is gone, as it is when a reader has typed this.
        on("shaper-agent 2> agent.log &").first("wait %1 || true"),
        on("sh -c 'echo $$ > /sys/fs/cgroup/mine/cgroup.procs; exec sleep 600' &").no_daemon(),
    ]
}

pub(crate) fn tutorial_three_nodes() -> Vec<Direction> {
    vec![
        // As on machines without a GPU.
        on("sh agent.sh n1 2> n1.log &").first("unset SHAPER_FAKE_NVML"),
        on("sh agent.sh n2 2> n2.log &"),
        // As on one node.
        on("sh agent.sh n2 2> n2.log &").first("wait %3 || true"),
    ]
}
