//! Tasks with an image: their containers are born within limits, and are shaped, ended and run again as any task is.

use std::{fs, path::Path};

use serde_json::json;
use shaper_core::{spec::DecisionKind, task::Phase};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    broker::ClusterPhase,
    cgroup::{mounts, read},
    cluster::{Cluster, networks},
    runtimes::{Docker, Podman},
    shaper::in_force,
    time::{eventually, happens},
};

const SLEEP: &str = "exec /bin/busybox sleep 6000";

/// The processes in a task's containers: what is in its cgroup, but for the client that waits for them.
fn processes(task: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    let mut left = vec![task.to_owned()];
    while let Some(group) = left.pop() {
        let below = fs::read_dir(&group).into_iter().flatten().flatten().map(|entry| entry.path());
        left.extend(below.filter(|path| path.is_dir() && path.file_name() != Some("client".as_ref())));
        let here = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(here.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    found.retain(|pid| read(format!("/proc/{pid}"), "comm") == "busybox");
    found
}

/// The process in a task's container.
#[track_caller]
fn process(task: &Path) -> u32 {
    let is_one = || processes(task).len() == 1;
    assert!((0..4).any(|_| happens(is_one)), "{}: {:?}", task.display(), processes(task));
    processes(task)[0]
}

fn status(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// When a process began, in Unix nanoseconds: proc(5), field 22 of `stat` in ticks of 10 ms since `btime`, to a second.
fn began_at(pid: u32) -> u64 {
    let stat = read(format!("/proc/{pid}"), "stat");
    let (_, fields) = stat.rsplit_once(") ").expect("it has a name");
    let ticks: u64 =
        fields.split(' ').nth(19).and_then(|field| field.parse().ok()).expect("it has a field 22");
    let stat = read("/proc", "stat");
    let btime =
        stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<u64>().ok()).expect("it has btime");
    (btime * 100 + ticks) * 10_000_000
}

/// An agent that runs containers, once it knows how.
fn agent(options: &[String]) -> Agent<'static> {
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    // Nothing lent: files have what was decided.
    Options::default().with(&[&options[..], &["--cpu-burst-pool", "off"]].concat()).start()
}

fn run(agent: &Agent<'_>, image: &str, options: &[&str], script: &str) -> (i32, String) {
    let user = NOBODY.to_string();
    let fixed = ["run", "--user", &user, "--image", image];
    let command = ["--", "/bin/busybox", "sh", "-c", script];
    let answer = agent.shaper().call(&[&fixed[..], options, &command].concat());
    (answer.code, answer.stdout + &answer.stderr)
}

/// A container is a task in every way; `left` says which containers there are.
fn is_a_task(mut agent: Agent<'_>, image: &str, left: impl Fn() -> String) {
    // It has an exit code and output, the image's environment and its own, and nothing of whoever started it.
    let script = "/bin/busybox echo \"<$A>\"; /bin/busybox ls /proc/self/fd; exit 7";
    let said = run(&agent, image, &["--env", "A=b  c \"d\" #e"], script);
    assert_eq!(said.0, 7, "{}", said.1);
    assert!(said.1.contains("<b  c \"d\" #e>"), "{}", said.1);
    let open: Vec<u32> = said.1.lines().filter_map(|line| line.parse().ok()).collect();
    // The last is that of the directory that is listed.
    assert_eq!(open, [0, 1, 2, 3], "{}", said.1);
    eventually("nothing of it is left", || left().is_empty());

    let limits =
        ["--id", "web", "--detach", "--cpu", "0.5", "--memory", "200Mi", "--net", "20mbit", "--io", "500"];
    let said = run(&agent, image, &limits, SLEEP);
    assert_eq!(said.0, 0, "{}", said.1);
    let task = agent.shaper().get("web");
    let group = Path::new(&task.cgroup).to_owned();
    let files = || ["cpu.max", "memory.max"].map(|file| read(&group, file));
    assert_eq!(files(), ["50000 100000", "209715200"]);
    assert!(in_force(&task, "net_egress").1.starts_with("20 Mbit/s"), "{task:?}");
    let pid = process(&group);
    // Decided, and carried out, before there was a process of its own.
    let ledger = agent.shaper().ledger("web");
    let decided = ledger.iter().map(|entry| entry.at).min().expect("its limits are in the ledger");
    assert!(decided < began_at(pid), "{decided} {}", began_at(pid));
    assert_eq!(
        ["Uid", "CapEff", "CapBnd", "NoNewPrivs"].map(|name| status(pid, name)),
        ["65534 65534 65534 65534", "0000000000000000", "0000000000000000", "1",]
    );

    // An agent that was killed finds it again, and shapes it as it runs.
    agent.kill9();
    agent.restart();
    assert_eq!((files(), process(&group)), (["50000 100000", "209715200"].map(String::from), pid));
    let changed = agent.shaper().set("web", &["--cpu", "0.25", "--memory", "100Mi", "--net", "5mbit"]);
    assert_eq!(files(), ["25000 100000", "104857600"]);
    assert!(in_force(&changed, "net_egress").1.starts_with("5 Mbit/s"), "{changed:?}");
    let described = agent.shaper().ok(&["describe", "web"]);
    assert!(described.contains(&format!("{image} /bin/busybox sh -c")), "{described}");

    agent.shaper().ok(&["cancel", "web", "--now"]);
    eventually("it has ended", || matches!(agent.shaper().get("web").phase, Phase::Ended { .. }));
    eventually("its cgroup is gone", || !group.exists());
    let is_gone = || left().is_empty();
    assert!((0..4).any(|_| happens(is_gone)), "{}", left());
}

#[test]
fn docker_runs_tasks_in_slices_of_systemd() {
    let docker = Docker::start();
    let agent = agent(&docker.options());
    // It has to be asked first.
    eventually("Docker has said how it makes cgroups", || {
        !run(&agent, "idle", &[], "exit 0").1.contains("can run no container now")
    });
    is_a_task(agent, "idle", || docker.containers());
}

#[test]
fn podman_runs_tasks() {
    let podman = Podman::with_image();
    is_a_task(agent(&podman.options()), "localhost/idle", || podman.containers());
}

#[test]
fn what_cannot_be_run_is_said() {
    let none = Options::default().start();
    let said = run(&none, "idle", &[], "exit 0");
    assert!(said.0 != 0 && said.1.contains("start its agent with --containers"), "{said:?}");
    let podman = Podman::with_image();
    let agent = agent(&podman.options());
    // Its client says what is wrong, in the task's log.
    let said = run(&agent, "localhost/nobody-has-it", &[], "exit 0");
    assert_eq!(said.0, 125, "{}", said.1);
    assert!(said.1.contains("nobody-has-it"), "{}", said.1);
    let said = run(&agent, "localhost/idle", &["--env", "A=b\nC=d"], "exit 0");
    assert!(said.0 != 0 && said.1.contains("one line"), "{said:?}");
    for (options, why) in [(["--gpus", "1"], "no GPU cards"), (["--cwd", "/proc/self/fd/7"], "below /proc")] {
        let said = run(&agent, "localhost/idle", &options, "exit 0");
        assert!(said.0 != 0 && said.1.contains(why), "{said:?}");
    }
    let root = agent.shaper().call(&["run", "--user", "0", "--image", "localhost/idle"]);
    assert!(root.code != 0 && root.stderr.contains("--allow-root-tasks"), "{}", root.stderr);
    for wrong in ["--privileged", "-v", "UPPER", "a b"] {
        let image = format!("--image={wrong}");
        let said = agent.shaper().call(&["run", "--user", "nobody", &image]);
        assert!(said.code == 2 && said.stderr.contains("not a reference to an image"), "{}", said.stderr);
    }
}

const POLICY: &str = "policy_name: services\npriority: high\nbehavior: {preemption_enabled: true}\n";

fn submit(cluster: &Cluster<'_>, id: &str, cores: f64, priority: &str, script: &str) {
    let profile = json!({
        "task_id": id,
        "resource_demand": {"cpu_cores": cores, "memory_gb": 0.0625},
        "priority": priority,
    });
    let user = NOBODY.to_string();
    // An emulated systemd may take longer to answer than an agent waits.
    let fixed = ["submit", "--image", "localhost/idle", "--user", &user, "--retries", "5", "-"];
    let command = ["--", "/bin/busybox", "sh", "-c", script];
    let answer =
        cluster.broker.shaper().call_with(&[&fixed[..], &command].concat(), profile.to_string().as_bytes());
    assert_eq!(answer.code, 0, "{}", answer.stderr);
}

/// The cgroup of a task that runs.
#[track_caller]
fn cgroup(cluster: &Cluster<'_>, id: &str) -> std::path::PathBuf {
    let task = cluster.wait_until_runs(id);
    let agent = cluster.agent(task.node.as_deref().expect("what runs is on a node"));
    let cgroup = agent.shaper().get(id).cgroup;
    assert!(Path::new(&cgroup).starts_with(mounts().0), "{cgroup}");
    cgroup.into()
}

#[test]
fn containers_are_placed_on_three_nodes_grown_preempted_and_run_again() {
    let podman = Podman::with_image();
    let networks = networks(3);
    let options = podman.options();
    let options = [options[0].as_str(), "--tasks-in", "cgroup-root"];
    let cluster = Cluster::start_with(&networks, &["cpu=1,memory=512Mi"; 3], &options);

    // With its client, 60 MiB are more than the 64 that it asked for.
    let fill = "for i in $(/bin/busybox seq 0 59); do \
                /bin/busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=1 seek=$i conv=notrunc 2>/dev/null; \
                /bin/busybox sleep 0.2; done; /bin/busybox echo filled; ";
    let batch = ["b1", "b2", "b3"];
    for id in batch {
        submit(&cluster, id, 0.6, "low", &format!("{fill}{SLEEP}"));
    }
    let mut nodes: Vec<_> = batch.iter().map(|id| cluster.wait_until_runs(id).node).collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 3, "{nodes:?}");
    for id in batch {
        let group = cgroup(&cluster, id);
        let agent = cluster.agent(cluster.broker.task(id).node.as_deref().expect("it runs")).shaper();
        let is_over = || cluster.broker.task(id).ended().is_some();
        assert!(!is_over(), "{id}: {}", agent.call(&["logs", id]).stdout);
        let has_grown = || read(&group, "memory.max").parse::<u64>().is_ok_and(|max| max > 64 << 20);
        assert!((0..8).any(|_| happens(has_grown)), "{id}: {}", read(&group, "memory.max"));
        let is_filled = || agent.call(&["logs", id]).stdout.contains("filled");
        assert!((0..8).any(|_| happens(is_filled)), "{id}");
        assert!(cluster.broker.kinds(id).contains(&DecisionKind::Grew), "{:?}", cluster.broker.kinds(id));
    }

    cluster.broker.apply(POLICY);
    submit(&cluster, "service", 0.8, "high", SLEEP);
    cluster.wait_until_runs("service");
    process(&cgroup(&cluster, "service"));
    let victims: Vec<_> = batch.iter().filter(|id| !cluster.broker.task(id).runs()).collect();
    let [victim] = victims[..] else { panic!("{victims:?} do not run") };
    assert!(cluster.broker.kinds(victim).contains(&DecisionKind::Evicted));
    // Two of the batch, and the service.
    let is_left = || podman.containers().lines().count() == 3;
    assert!((0..4).any(|_| happens(is_left)), "{}", podman.containers());

    cluster.broker.shaper().ok(&["cancel", "service"]);
    let again = cluster.wait_until_runs(victim);
    assert!(again.attempt >= 2, "{again:?}");
    process(&cgroup(&cluster, victim));
    for id in batch {
        cluster.broker.shaper().ok(&["cancel", id, "--now"]);
        cluster.broker.wait_until(id, "over", |task| task.phase == ClusterPhase::Cancelled);
    }
    let is_gone = || podman.containers().is_empty();
    assert!((0..4).any(|_| happens(is_gone)), "{}", podman.containers());
}
