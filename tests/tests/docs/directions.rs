//! What there is to say of particular commands, page by page, in their order.

use crate::{
    elsewhere::{Elsewhere, by_hand, gate, test},
    page::{Direction, on},
};

const BUILDS: &str = "it builds everything, and runs this";
const FRAMEWORKS: &str = "it takes Ray and Dask, from PyPI";
const FRAMEWORKS_TEST: &str = "tests/tests/frameworks/main.rs";

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

/// Measured, not asserted.
fn measured(words: &'static str) -> Elsewhere {
    by_hand("it measures, for minutes and more", "docs/benchmarks.md", words)
}

pub(crate) fn readme() -> Vec<Direction> {
    let in_test = || gate(BUILDS, "stage \"tests\" ./x test");
    let vm = |function| test("it boots a VM", "tests/tests/vm/systemd/hardened.rs", function);
    vec![
        on("./x demo").elsewhere(gate(BUILDS, "./x demo --json")),
        on("./x test").elsewhere(in_test()),
        on("shaper top").until("train-1"),
        on("shaper set web-1 --io-latency 5ms").first("shaper run -d --user nobody --id web-1 -- ./train"),
        on("shaper logs -f train-1").until("epoch 1"),
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
        on("cargo xtask build-ebpf").elsewhere(in_test()),
        on("cargo xtask test").elsewhere(in_test()),
        on("cargo xtask vm --kernel 6.1 -- pace").elsewhere(in_test()),
        on("cargo xtask vm --profile systemd").elsewhere(vm("the_broker_needs_no_capability")),
        on("cargo xtask soak kills").elsewhere(test(
            "it takes an hour",
            "tests/tests/native/kills.rs",
            "wherever_the_agent_dies_nothing_is_lost_and_nothing_is_left",
        )),
        on("cargo xtask soak broker").elsewhere(test(
            "it takes an hour",
            "tests/tests/faults/main.rs",
            "with_real_agents_nothing_is_lost_doubled_or_overcommitted",
        )),
        on("cargo xtask soak fuzz").elsewhere(gate("it takes hours", "./x soak fuzz --fraction 1/20")),
        on("cargo xtask soak properties").elsewhere(in_test()),
        on("cargo xtask soak shrink").elsewhere(measured("soak shrink")),
        on("cargo xtask bench scale").elsewhere(measured("bench scale")),
        on("cargo xtask bench actuators").elsewhere(measured("bench actuators")),
        on("cargo xtask bench shape").elsewhere(measured("bench shape")),
        on("cargo xtask bench net").elsewhere(measured("bench net")),
        on("cargo xtask bench broker").elsewhere(measured("bench broker")),
        on("cargo xtask bench place").elsewhere(measured("bench place")),
        on("cargo xtask bench rightsize").elsewhere(measured("bench rightsize")),
        on("cargo xtask bench measure").elsewhere(measured("bench measure")),
        on("cargo xtask bench web").elsewhere(measured("bench web")),
        on("cargo xtask deb").elsewhere(test(
            "it builds everything as it is shipped",
            "tests/tests/vm/systemd/packages.rs",
            "an_upgrade_leaves_no_gap_and_a_purge_leaves_nothing",
        )),
        on("cargo xtask image").elsewhere(test("it builds everything as it is shipped", "xtask/src/image/layout.rs", "the_layout_leads_from_the_index_to_the_files")),
        on("cargo xtask dashboards").elsewhere(test(
            "it writes into the tree",
            "xtask/src/dashboards/queries.rs",
            "the_files_are_as_written_here",
        )),
        on("cargo xtask tidy").elsewhere(gate(BUILDS, "stage \"tidy\" ./x tidy")),
    ]
}

pub(crate) fn containers() -> Vec<Direction> {
    vec![
        on("shaper-agent --adopt /etc/shaper/adopt.yaml")
            .file("adopt.yaml", "yaml", 0)
            .first("cp adopt.yaml /etc/shaper/adopt.yaml"),
    ]
}

pub(crate) fn frameworks() -> Vec<Direction> {
    let ray = || test(FRAMEWORKS, FRAMEWORKS_TEST, "ray");
    let dask = || test(FRAMEWORKS, FRAMEWORKS_TEST, "dask");
    vec![
        on("shaper exec --cpu 1 --memory 2Gi --name etl.load --label framework=airflow -- python3 load.py")
            .first("shaper-agent &"),
        on("RAY_RUNTIME_ENV_PLUGINS='[{\"class\": \"shaper.ray.ShaperPlugin\"}]' ray start --head").elsewhere(ray()),
        on("dask scheduler --preload shaper.dask").elsewhere(dask()),
        on("DASK_SHAPER__WORKER__CPU=1 DASK_SHAPER__WORKER__MEMORY=2Gi \\\n    dask worker tcp://scheduler:8786 \
            --preload-nanny shaper.dask --nthreads 1 --nworkers 4")
            .elsewhere(dask()),
        on("shaper exec --cpu 1 -- dask worker tcp://scheduler:8786 --no-nanny --nthreads 1").elsewhere(dask()),
    ]
}

pub(crate) fn kubernetes() -> Vec<Direction> {
    let validated = || {
        test(
            "no API server can be had here; its manifests are validated by the stage `kubernetes` of ./x test --all",
            "xtask/src/kubernetes.rs",
            "test",
        )
    };
    let image = || {
        test(
            "it builds everything as it is shipped",
            "xtask/src/image/layout.rs",
            "the_layout_leads_from_the_index_to_the_files",
        )
    };
    let by_runtimes = || {
        by_hand(
            "it takes a registry or a container runtime",
            "docs/kubernetes.md",
            "skopeo 1.9 and umoci 0.4 read the image",
        )
    };
    let cluster = |command: &'static str| on(command).elsewhere(validated());
    vec![
        on("cargo xtask image").elsewhere(image()),
        on("skopeo copy oci-archive:target/shaper-image.tar docker://registry.example/shaper:0.1.0")
            .elsewhere(by_runtimes()),
        on("ctr -n k8s.io images import --base-name registry.example/shaper target/shaper-image.tar")
            .elsewhere(by_runtimes()),
        on("podman load -i target/shaper-image.tar").elsewhere(by_runtimes()),
        cluster("kubectl create namespace shaper"),
        cluster(
            "kubectl -n shaper create secret generic shaper-broker-tls   --from-file=broker/identity.pem --from-file=broker/ca.pem",
        ),
        cluster(
            "kubectl -n shaper create secret generic shaper-operator-tls --from-file=ann/identity.pem --from-file=ann/ca.pem",
        ),
        cluster("kubectl apply -k deploy/kubernetes"),
        cluster("kubectl -n shaper port-forward svc/shaper-broker 7070 &"),
        // As it would be behind that.
        on("shaper --broker https://localhost:7070 --tls-dir ann get nodes")
            .first("shaper-broker --listen tcp://127.0.0.1:7070 --tls-dir broker &"),
        cluster("kubectl -n shaper create secret generic shaper-metrics --from-file=token"),
        cluster(
            "for node in $(kubectl get nodes -o name | cut -d/ -f2); do\n    shaper pki token --authority \
                https://authority.example:7071 --tls-dir ann spiffe://cluster.local/node/$node > tokens/$node\ndone",
        ),
        cluster("kubectl -n shaper create secret generic shaper-join --from-file=tokens"),
        cluster(
            "for node in $(ls tokens); do sed \"s/node-1/$node/g\" deploy/kubernetes/metrics/join.yaml | \
                kubectl apply -f -; done",
        ),
        cluster("kubectl -n shaper delete secret shaper-join"),
        cluster("kubectl apply -k deploy/kubernetes/metrics"),
        cluster(
            "kubectl -n shaper patch configmap shaper-adopt --type merge -p \
                '{\"data\":{\"adopt.yaml\":\"rules: []\\n\"}}'",
        ),
        cluster("sleep 150"),
        cluster(
            "for pod in $(kubectl -n shaper get pods -l app.kubernetes.io/component=agent -o name); do\n    kubectl \
                -n shaper exec $pod -c agent -- shaper release --all --broker= || echo \"not released: $pod\"\ndone",
        ),
        cluster("kubectl delete -k deploy/kubernetes"),
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
        on("shaper ui").fresh().first("shaper-broker --web tcp://127.0.0.1:9780 &"),
        on("ssh -L 9780:127.0.0.1:9780 broker.example").elsewhere(test(
            "it takes another machine; behind the tunnel there is the same page",
            "tests/tests/browser/main.rs",
            "the_page_works_in_a_browser",
        )),
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
    let built = || gate(BUILDS, "stage \"tests\" ./x test");
    vec![
        on("cargo xtask build-ebpf").elsewhere(built()),
        on("cargo build --workspace --bins").elsewhere(built()),
        // Here the programs are elsewhere.
        on("export PATH=$PWD/target/debug:$PATH SHAPER_BPF_OBJECT=$PWD/target/bpf/shaper.bpf.o")
            .elsewhere(built()),
        on("shaper-agent 2> agent.log &"),
        // The one that was killed is gone, as it is when a reader has typed this.
        on("shaper-agent 2> agent.log &").first("wait %1 || true"),
        on("sh -c 'echo $$ > /sys/fs/cgroup/mine/cgroup.procs; exec sleep 600' &").no_daemon(),
    ]
}

pub(crate) fn tutorial_three_nodes() -> Vec<Direction> {
    vec![
        on("sh agent.sh n2 2> n2.log &"),
        // As on one node.
        on("sh agent.sh n2 2> n2.log &").first("wait %3 || true"),
    ]
}
