//! Containers that `shaper-runtime` starts: what their rule gives is in force when they begin.

use std::{fs, path::Path, process::Output, time::Duration};

use serde_json::{Value, json};
use shaper_core::{
    ledger::Actor,
    task::{Phase, TaskStatus},
};
use shaper_tests::{
    agent::{Agent, Options},
    cgroup::{mounts, read},
    runtimes::{Bundle, Containerd, Docker, Driver, Podman, Shim},
    second_writer::of_others,
    shaper::in_force,
    time::eventually,
};
use tempfile::TempDir;

/// What a container reads as the first thing that it does.
const READS: [&str; 4] = ["/bin/busybox", "cat", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/memory.max"];
const IDLE: [&str; 3] = ["/bin/busybox", "sleep", "6000"];
/// What every rule here gives, as files have it …
const GIVEN: [&str; 2] = ["50000 100000", "209715200"];
/// … and as rules have it.
const LIMITS: &str = "{limits: {cpu: 0.5, memory: 200Mi, net: 20mbit, io: 500}}";
const FILES: [&str; 2] = ["cpu.max", "memory.max"];

/// An agent with rules.
struct Node {
    /// First: it is released while its rules are there.
    agent: Agent<'static>,
    _rules: TempDir,
}

impl Node {
    /// With a rule for each of what is selected.
    fn with_rules(select: &[&str], options: &[&str]) -> Node {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let file = directory.path().join("rules.yaml");
        fs::write(&file, rules(select)).expect("it is ours");
        let path = file.display().to_string();
        // Nothing lent: files have what was decided.
        let fixed = ["--adopt", &path, "--cpu-burst-pool", "off"];
        let agent = Options::default().with(&[&fixed[..], options].concat()).start();
        Node { agent, _rules: directory }
    }

    /// What became of a cgroup last.
    #[track_caller]
    fn task_of(&self, cgroup: &Path) -> TaskStatus {
        let path = mounts().0.join(cgroup).display().to_string();
        let mut tasks = self.agent.shaper().tasks();
        tasks.retain(|task| task.cgroup == path);
        tasks.pop().unwrap_or_else(|| panic!("{path} is no task"))
    }

    /// A container that runs is as its rule has it; it is shaped anew while it runs, and released.
    #[track_caller]
    fn shapes(&self, cgroup: &Path, own: [&str; 2]) {
        let group = mounts().0.join(cgroup);
        let files = || FILES.map(|file| read(&group, file));
        let task = self.task_of(cgroup);
        let id = task.task_id.as_str();
        assert_eq!((files(), &task.phase), (GIVEN.map(String::from), &Phase::Running));
        assert!(in_force(&task, "net_egress").1.starts_with("20 Mbit/s"), "{task:?}");
        assert!(
            read(&group, "io.max").contains("riops=") || in_force(&task, "storage_io").1.starts_with("500"),
            "{task:?}"
        );
        let limits = ["--cpu", "0.25", "--memory", "300Mi", "--net", "5mbit"];
        let changed = self.agent.shaper().set(id, &limits);
        assert_eq!(files(), ["25000 100000", "314572800"]);
        assert!(in_force(&changed, "net_egress").1.starts_with("5 Mbit/s"), "{changed:?}");
        self.agent.shaper().ok(&["release", id]);
        assert_eq!(files(), own);
    }
}

fn rules(select: &[&str]) -> String {
    let rule = |(number, select)| format!("- {{name: born-{number}, select: {select}, task: {LIMITS}}}\n");
    format!("rules:\n{}", select.iter().enumerate().map(rule).collect::<String>())
}

/// What was read, a line for each file.
fn lines(said: &str) -> Vec<&str> {
    said.lines().map(str::trim).collect()
}

/// What reads its own cgroup's files, in the hierarchy of the host: crun puts what it runs into a cgroup below.
fn reading(bundle: Bundle) -> Bundle {
    let at = Path::new("/hierarchy").join(bundle.cgroup());
    let [cpu, memory] = FILES.map(|file| at.join(file).display().to_string());
    let source = mounts().0;
    let mount =
        json!({ "type": "bind", "source": source, "destination": "/hierarchy", "options": ["rbind", "ro"] });
    let with_mount = |config: &mut Value| config["mounts"].as_array_mut().expect("it has mounts").push(mount);
    bundle.running(&["/bin/busybox", "cat", &cpu, &memory]).changed(with_mount)
}

fn is_born_shaped(program: &str, driver: Driver) {
    let own = json!({ "memory": { "limit": 500 << 20 }, "cpu": { "quota": 80_000, "period": 100_000 } });
    let bundle = || Bundle::new(driver).with_resources(&own);
    let (reads, asks_less, idle) = (reading(bundle()), reading(bundle()), bundle());
    let select =
        [&reads, &asks_less, &idle].map(|bundle| format!("{{cgroup: {}}}", bundle.cgroup().display()));
    let node = Node::with_rules(&select.each_ref().map(String::as_str), &[]);
    let shim = Shim::new(program, &node.agent.socket(), "closed");
    let cgroup = reads.cgroup();
    assert_eq!(printed(&reads.output(&shim.oci())), GIVEN);
    assert_eq!(node.task_of(&cgroup).adopted_by, "born-0".parse().ok());
    let annotations = json!({ "shaper/limit.cpu": "250m", "shaper/limit.memory": "1Gi" });
    let asks_less = asks_less.annotated(&annotations);
    assert_eq!(printed(&asks_less.output(&shim.oci())), ["25000 100000", GIVEN[1]]);
    let container = idle.run(&shim.oci());
    node.shapes(&container.cgroup(), own_of(program, driver));
}

/// What the cgroup has that a rule takes of a container with 0.8 CPUs and 500 MiB: below systemd crun limits one inside it.
fn own_of(program: &str, driver: Driver) -> [&'static str; 2] {
    match (program, driver) {
        ("crun", Driver::Systemd) => ["max 100000", "max"],
        _ => ["80000 100000", "524288000"],
    }
}

#[track_caller]
fn printed(output: &Output) -> Vec<String> {
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{wrong}");
    lines(&String::from_utf8_lossy(&output.stdout)).into_iter().map(str::to_owned).collect()
}

#[test]
fn a_container_of_runc_is_born_shaped() {
    is_born_shaped("runc", Driver::Cgroupfs);
    is_born_shaped("runc", Driver::Systemd);
}

#[test]
fn a_container_of_crun_is_born_shaped() {
    is_born_shaped("crun", Driver::Cgroupfs);
    is_born_shaped("crun", Driver::Systemd);
}

#[test]
fn a_container_of_docker_is_born_shaped_and_again_when_it_is_restarted() {
    // The agent asks Docker, which is therefore there before it.
    let shim = Shim::new("runc", Path::new("/run/none.sock"), "closed");
    let docker = Docker::start_before(&shim);
    let socket = docker.socket().display().to_string();
    let refused =
        docker.refused(&["run", "--rm", "--network", "none", "--runtime", "shaper", "idle", IDLE[0], "true"]);
    assert!(refused.contains("the agent is not there"), "{refused}");

    let select = "{container: {runtime: docker, labels: {tier: web}}}";
    let node = Node::with_rules(&[select], &["--docker", &socket]);
    shim.asks(&node.agent.socket(), "closed");
    let options = ["--rm", "--network", "none", "--runtime", "shaper"];
    let with_label = [&["run"], &options[..], &["--label", "tier=web", "idle"], &READS].concat();
    assert_eq!(lines(&docker.ok(&with_label)), GIVEN);
    // No rule takes it: it is as Docker has it.
    let without = [&["run"], &options[..], &["--memory", "300m", "idle"], &READS].concat();
    assert_eq!(lines(&docker.ok(&without)), ["max 100000", "314572800"]);

    let own = [
        "--runtime",
        "shaper",
        "--label",
        "tier=web",
        "--cpus",
        "0.8",
        "--memory",
        "500m",
        "--memory-swap",
        "1g",
    ];
    let id = docker.run(&own);
    let cgroup = docker.cgroup(&id);
    let group = mounts().0.join(&cgroup);
    let files = || FILES.map(|file| read(&group, file));
    assert_eq!(files(), GIVEN);
    // Who writes what Docker knows is turned back, and what was asked for last is the container's own.
    docker.ok(&["update", "--cpus", "0.9", &id]);
    eventually("what was decided is in force", || files() == GIVEN);
    docker.ok(&["restart", "--time", "0", &id]);
    let task = node.task_of(&cgroup);
    assert_eq!((files(), task.attempt), (GIVEN.map(String::from), 2));
    node.shapes(&cgroup, ["90000 100000", "524288000"]);

    // While the agent is away a container is started or not, as the settings say; then it is adopted.
    let mut node = node;
    node.agent.kill9();
    let refused = docker.refused(&[&["run"], &options[..], &["idle", IDLE[0], "true"]].concat());
    assert!(refused.contains("the agent is not there"), "{refused}");
    shim.asks(&node.agent.socket(), "open");
    let id = docker.run(&["--runtime", "shaper", "--label", "tier=web"]);
    let group = mounts().0.join(docker.cgroup(&id));
    assert_eq!(read(&group, "memory.max"), "max");
    node.agent.restart();
    eventually("it is adopted", || FILES.map(|file| read(&group, file)) == GIVEN);
}

#[test]
fn a_container_of_podman_is_born_shaped() {
    let node = Node::with_rules(&["{container: {runtime: podman}}"], &[]);
    let shim = Shim::new("crun", &node.agent.socket(), "closed");
    let podman = Podman::before(&shim);
    // What crun runs is in a cgroup below its scope.
    let script = "read line < /proc/self/cgroup; at=/sys/fs/cgroup${line#0::}; at=${at%/container}; \
                  exec /bin/busybox cat $at/cpu.max $at/memory.max";
    let reads = ["/bin/busybox", "sh", "-c", script];
    let options = ["--rm", "--cgroupns", "host"];
    assert_eq!(lines(&podman.run(&options, &reads)), GIVEN);
    let asking = |cpu| [&options[..], &["--annotation", cpu]].concat();
    assert_eq!(lines(&podman.run(&asking("shaper/limit.cpu=100m"), &reads)), ["10000 100000", GIVEN[1]]);
    podman.refused(&asking("shaper/limit.cpu=most"), &reads);
    assert!(node.agent.said().contains("annotation shaper/limit.cpu: "), "{}", node.agent.said());
    let id = podman.run(&["--detach", "--cpus", "0.8", "--memory", "500m"], &IDLE);
    node.shapes(&podman.cgroup(&id), own_of("crun", Driver::Systemd));
}

#[test]
fn a_container_of_containerd_is_born_shaped() {
    let node = Node::with_rules(&["{cgroup: default/*}"], &[]);
    let shim = Shim::new("runc", &node.agent.socket(), "closed");
    let containerd = Containerd::before(&shim);
    // `ctr` gives a container neither the hierarchy nor a namespace of its own for it.
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let files = FILES.map(|file| format!("/sys/fs/cgroup/default/reads/{file}"));
    let reads = ["/bin/busybox", "cat", &files[0], &files[1]];
    assert_eq!(lines(&containerd.run("reads", &["--rm", "--mount", mount], &reads)), GIVEN);
    containerd.run("idle", &["--detach", "--memory-limit", "524288000"], &IDLE);
    node.shapes(&containerd.cgroup("idle"), ["max 100000", "524288000"]);
}

#[test]
fn a_container_that_wants_more_than_it_is_given_has_what_it_is_given() {
    let bundles =
        [Bundle::new(Driver::Cgroupfs), Bundle::new(Driver::Cgroupfs), Bundle::new(Driver::Systemd)];
    let select = bundles.each_ref().map(|bundle| format!("{{cgroup: {}}}", bundle.cgroup().display()));
    let node = Node::with_rules(&select.each_ref().map(String::as_str), &[]);
    let shim = Shim::new("runc", &node.agent.socket(), "closed");
    let [unprivileged, privileged, bomb] = bundles;

    // As runtimes have it, it neither writes to its cgroup nor leaves it.
    let script = "cd /sys/fs/cgroup && { echo max > cpu.max; echo max > memory.max; mkdir below; echo $$ > ../cgroup.procs; }; \
                  exec /bin/busybox cat cpu.max memory.max";
    let output = unprivileged.running(&["/bin/busybox", "sh", "-c", script]).output(&shim.oci());
    assert_eq!(printed(&output), GIVEN);
    let refused = String::from_utf8_lossy(&output.stderr).matches("Read-only file system").count();
    assert!(refused >= 3, "{output:?}");

    // One that was given the hierarchy to write is turned back, and told of.
    let path = Path::new("/hierarchy").join(privileged.cgroup());
    let script = format!(
        "cd {} && while :; do echo max > cpu.max; echo max > memory.max; done 2> /dev/null",
        path.display()
    );
    let source = mounts().0;
    let mount =
        json!({ "type": "bind", "source": source, "destination": "/hierarchy", "options": ["rbind", "rw"] });
    let container = privileged
        .running(&["/bin/busybox", "sh", "-c", &script])
        .changed(|config| {
            config["mounts"].as_array_mut().expect("it has mounts").push(mount);
            // From a namespace the kernel lets nobody write to the cgroup at its root (`nsdelegate`).
            let namespaces = config["linux"]["namespaces"].as_array_mut().expect("it has namespaces");
            namespaces.retain(|namespace| namespace["type"] != "cgroup");
        })
        .run(&shim.oci());
    let group = mounts().0.join(container.cgroup());
    let id = node.task_of(&container.cgroup()).task_id;
    let of_it = || of_others(&node.agent.shaper(), id.as_str());
    eventually("the ledger has who writes", || !of_it().is_empty());
    let Actor::Process { name, .. } = &of_it()[0].cause.actor else { panic!("{:?}", of_it()) };
    assert!(["sh", "busybox"].contains(&name.as_str()), "{name}");
    drop(container);
    assert!(!group.exists());

    // One that forks without end takes its share, and the agent answers.
    let script = "bomb() { bomb | bomb & }; bomb; while :; do :; done";
    let limits = json!({ "pids": { "limit": 200 } });
    let container =
        bomb.running(&["/bin/busybox", "sh", "-c", script]).with_resources(&limits).run(&shim.oci());
    let id = node.task_of(&container.cgroup()).task_id;
    eventually("it forks", || {
        read(mounts().0.join(container.cgroup()), "pids.current").parse().is_ok_and(|pids: u64| pids > 50)
    });
    let cores = node.agent.measure(id.as_str(), Duration::from_secs(4)).cores;
    assert!(cores < 0.55, "{cores} cores, of 0.5");
    let changed = node.agent.shaper().set(id.as_str(), &["--cpu", "0.25"]);
    assert_eq!(in_force(&changed, "cpu"), ("cpu.max", "0.25 cores"));
}
