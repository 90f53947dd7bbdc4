//! Letting go: nothing is left behind, and nothing that ran is harmed.

use std::time::Duration;

use shaper_tests::{
    agent::{Agent, Options},
    cgroup::read,
    leftovers::Leftovers,
    net::{DEVICE, NetPair},
    pins::held_by,
    process::Process,
    shaper::in_force,
    sink::Sink,
    time::Window,
};

const CPU_LIMIT: f64 = 0.1;
const NET_LIMIT: f64 = 20e6;

/// Two tasks at their limits.
struct Tasks {
    hog: Process,
    sender: Process,
    sink: Sink,
}

impl Tasks {
    fn start(agent: &Agent, network: &NetPair) -> Tasks {
        let sink = Sink::listen(&network.far, NetPair::FAR_V4);
        let hog = agent.process(&agent.run("hog", &["--cpu", "0.1", "--memory", "256Mi"], &["spin"]));
        let limits = ["--cpu-weight", "50", "--net", "20mbit"];
        let sender = agent.process(&agent.run("upload", &limits, &["send", &sink.address(), "2"]));
        sink.wait_for_flows(2);
        Tasks { hog, sender, sink }
    }

    /// Cores and bits a second, over two seconds.
    fn rates(&self) -> (f64, f64) {
        let before = self.hog.cpu_time();
        let window = Window::pass(Duration::from_secs(2));
        let cpu = (self.hog.cpu_time() - before).as_secs_f64() / window.seconds();
        (cpu, self.sink.rate(window))
    }

    #[track_caller]
    fn assert_limited(&self) {
        let (cpu, net) = self.rates();
        assert!(cpu < 1.2 * CPU_LIMIT && net < 1.1 * NET_LIMIT, "{cpu:.2} cores, {net:.0} bit/s");
    }

    #[track_caller]
    fn assert_unlimited(&self, agent: &Agent) {
        for process in [&self.hog, &self.sender] {
            assert!(process.is_alive());
            let groups = process.cgroups();
            assert!(!groups.contains(agent.name()), "{groups}");
        }
        let (cpu, net) = self.rates();
        // More than the limits allow, on a machine that has other work as well.
        assert!(cpu > 2.0 * CPU_LIMIT && net > 5.0 * NET_LIMIT, "{cpu:.2} cores, {net:.0} bit/s");
    }
}

#[test]
fn release_all_leaves_nothing_and_the_processes_run_on_unlimited() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let tasks = Tasks::start(&agent, &network);
    let leftovers = Leftovers::of(&agent, Some(&network));
    tasks.assert_limited();

    agent.shaper().ok(&["release", "--all"]);
    leftovers.assert_none();
    assert!(held_by(agent.pid()).is_empty(), "the agent holds {:?}", held_by(agent.pid()));
    tasks.assert_unlimited(&agent);
    let groups = Process::open(agent.pid()).cgroups();
    assert!(!groups.contains(agent.name()), "the agent is still in {groups}");
    assert!(agent.shaper().tasks().is_empty());

    // And it can begin again.
    let task = agent.run("again", &["--cpu", "0.5", "--net", "10mbit"], &["spin"]);
    assert_eq!(in_force(&task, "cpu").1, "0.5 cores");
}

#[test]
fn release_all_without_an_agent_leaves_nothing_and_the_processes_run_on_unlimited() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let tasks = Tasks::start(&agent, &network);
    let leftovers = Leftovers::of(&agent, Some(&network));
    agent.kill9();
    tasks.assert_limited();

    let released = agent.release_offline();
    assert!(released.status.success(), "{}", String::from_utf8_lossy(&released.stderr));
    leftovers.assert_none();
    tasks.assert_unlimited(&agent);
}

#[test]
fn an_agent_that_releases_on_exit_leaves_nothing_at_sigterm() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).with(&["--on-exit", "release"]).start();
    let tasks = Tasks::start(&agent, &network);
    let leftovers = Leftovers::of(&agent, Some(&network));

    agent.stop();
    leftovers.assert_none();
    tasks.assert_unlimited(&agent);
}

#[test]
fn an_agent_that_keeps_on_exit_leaves_the_limits_in_force_at_sigterm() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let tasks = Tasks::start(&agent, &network);

    agent.stop();
    tasks.assert_limited();
    agent.restart();
    assert_eq!(agent.shaper().tasks().len(), 2);
    tasks.assert_limited();
}

#[test]
fn an_agent_without_tasks_holds_nothing_in_the_kernel() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    assert!(held_by(agent.pid()).is_empty());
    assert!(!agent.cgroup_root().exists() && !agent.bpffs_dir().exists());
    assert!(agent.shaper().ok(&["release", "--all"]).contains("nothing was held"));
}

#[test]
fn releasing_one_task_leaves_the_others_limited() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let tasks = Tasks::start(&agent, &network);
    let hog = agent.shaper().get("hog");

    agent.shaper().ok(&["release", "upload"]);
    assert_eq!(agent.shaper().tasks().len(), 1);
    let (cpu, net) = tasks.rates();
    assert!(cpu < 1.2 * CPU_LIMIT && net > 5.0 * NET_LIMIT, "{cpu:.2} cores, {net:.0} bit/s");
    assert!(read(&hog.cgroup, "cgroup.procs").contains(&tasks.hog.pid().to_string()));
}

/// A device can go while nobody looks; what the agent made elsewhere must not stay for it.
#[test]
fn release_all_without_an_agent_does_its_work_when_the_uplink_is_gone() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    agent.run("hog", &["--cpu", "0.1"], &["spin"]);
    let leftovers = Leftovers::of(&agent, None);
    agent.kill9();
    network.near.ip(&["link", "delete", DEVICE]);

    let released = agent.release_offline();
    assert!(released.status.success(), "{}", String::from_utf8_lossy(&released.stderr));
    leftovers.assert_none();
}
