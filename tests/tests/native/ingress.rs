//! The limit on what a task receives.

use std::{
    fs::{self, File, Permissions},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use shaper_tests::{
    agent::{Agent, Options},
    bins::binary,
    leftovers::Leftovers,
    net::{DEVICE, NetPair, Netns},
    shaper::in_force,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);
const MBIT: f64 = 1e6;
/// Of what was configured.
const GOAL: std::ops::RangeInclusive<f64> = 0.97..=1.01;
/// Of four seconds each: whether a limit holds in one of them.
const WINDOWS: usize = 3;

/// A child that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_in(namespace: &Netns, load: &[&str]) -> Ended {
    let mut command = Command::new(binary("test-load"));
    command.args(load);
    Ended(namespace.within(|| command.spawn()).expect("test-load can be started"))
}

/// A task that receives, and the count that it keeps.
struct Receiver {
    address: SocketAddr,
    count: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Tcp,
    /// In datagrams of so many bytes.
    Udp(u64),
}

impl Receiver {
    /// Starts it with these limits at that address, and waits until it listens.
    #[track_caller]
    fn start(agent: &Agent, id: &str, limits: &[&str], address: SocketAddr) -> Receiver {
        let count = agent.directory().join(format!("count-{id}"));
        File::create(&count).expect("a file can be made");
        fs::set_permissions(&count, Permissions::from_mode(0o666)).expect("it is ours");
        agent.run(id, limits, &["receive", &address.to_string(), &count.display().to_string()]);
        eventually("it listens", || fs::metadata(&count).is_ok_and(|file| file.len() == 16));
        Receiver { address, count }
    }

    /// Payload so far.
    fn payload(&self, by: By) -> u64 {
        let mut bytes = [0; 8];
        let count = File::open(&self.count).expect("it was made");
        count.read_exact_at(&mut bytes, if by == By::Tcp { 0 } else { 8 }).expect("it has two numbers");
        u64::from_ne_bytes(bytes)
    }

    /// Bits a second on the wire that come to the process while `time` passes.
    fn rate(&self, by: By, time: Duration) -> f64 {
        let before = self.payload(by);
        let window = Window::pass(time);
        let payload = self.payload(by) - before;
        self.on_the_wire(by, payload) * 8.0 / window.seconds()
    }

    /// Bytes on the wire of so many to the process.
    fn on_the_wire(&self, by: By, payload: u64) -> f64 {
        let header = if self.address.is_ipv4() { 20.0 } else { 40.0 };
        let wire_per_payload = match by {
            By::Tcp => 1514.0 / (1514.0 - 14.0 - header - 32.0),
            By::Udp(bytes) => (bytes as f64 + 8.0 + header + 14.0) / bytes as f64,
        };
        payload as f64 * wire_per_payload
    }

    /// Has the far end send it all it can.
    fn feed(&self, network: &NetPair, by: By, flows: usize) -> Ended {
        let (address, flows) = (self.address.to_string(), flows.to_string());
        match by {
            By::Tcp => start_in(&network.far, &["send", &address, &flows]),
            By::Udp(bytes) => start_in(&network.far, &["flood", &address, &bytes.to_string()]),
        }
    }
}

/// What holds what the task `download` receives, and how.
#[track_caller]
fn shown(agent: &Agent) -> (String, String) {
    let task = agent.shaper().get("download");
    let (mechanism, in_force) = in_force(&task, "net_ingress");
    (mechanism.to_owned(), in_force.to_owned())
}

/// The device in which it waits.
#[track_caller]
fn device_of(agent: &Agent) -> String {
    let (_, shown) = shown(agent);
    let device = shown.split_whitespace().find(|word| word.starts_with("shaper-"));
    device.unwrap_or_else(|| panic!("no device is shown: {shown}")).trim_end_matches(':').to_owned()
}

#[track_caller]
fn assert_in_goal(what: &str, rate: f64, limit: f64) {
    let part = rate / limit;
    println!("{what}: {part:.4} of {limit:.3e}");
    assert!(GOAL.contains(&part), "{what}: {part:.4} of the limit is not in {GOAL:?}");
}

/// Bits a second on the wire that come to the sockets of a task while `time` passes, as the kernel programs count them. (What
/// comes to the process lags behind after a change: TCP puts in order what arrived before.)
fn counted(agent: &Agent, id: &str, time: Duration) -> f64 {
    let before = agent.shaper().get(id).usage;
    Window::pass(time);
    let after = agent.shaper().get(id).usage;
    let seconds = (after.at_monotonic_ns - before.at_monotonic_ns) as f64 / 1e9;
    (after.ingress.bytes - before.ingress.bytes) as f64 * 8.0 / seconds
}

#[track_caller]
fn assert_a_limit_holds(address: IpAddr, by: By, flows: usize, mbits: u32) {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let limit = f64::from(mbits) * MBIT;
    let limits = ["--net-in", &format!("{mbits}mbit")];
    let receiver = Receiver::start(&agent, "download", &limits, SocketAddr::new(address, 7000));
    let shown = shown(&agent);
    assert_eq!(shown.0, "ifb-htb", "{shown:?}");
    assert!(shown.1.starts_with(&format!("{mbits} Mbit/s in a queue of shaper-")), "{shown:?}");
    let _load = receiver.feed(&network, by, flows);
    eventually("it arrives", || receiver.payload(by) > 100_000);
    Window::pass(3 * SECOND / 2);
    // A machine that is shared stands still now and then: what no window of these shows is not so.
    let mut windows = (0..WINDOWS).map(|_| {
        let before = agent.shaper().get("download").usage;
        let rate = receiver.rate(by, 4 * SECOND);
        let after = agent.shaper().get("download").usage;
        let seconds = (after.at_monotonic_ns - before.at_monotonic_ns) as f64 / 1e9;
        (rate, (after.ingress.bytes - before.ingress.bytes) as f64 * 8.0 / seconds, after.ingress.bytes)
    });
    let in_goal = |rate: f64| GOAL.contains(&(rate / limit));
    let mut last = (0.0, 0.0, 0);
    let found = windows.find(|window| {
        last = *window;
        println!("received {:.4}, counted {:.4} of {limit:.3e}", window.0 / limit, window.1 / limit);
        in_goal(window.1) && (by == By::Tcp || in_goal(window.0))
    });
    let (rate, counted, all) = found.unwrap_or(last);
    // TCP hands over in order: a gap from the first second, when it was filled, brings along all that came behind it.
    if by == By::Tcp {
        let part = receiver.on_the_wire(by, receiver.payload(by)) / all as f64;
        println!("what has come to the process, by what has arrived: {part:.4}");
        assert!((0.8..=1.05).contains(&part), "{part}");
    } else {
        assert_in_goal("what it receives", rate, limit);
    }
    assert_in_goal("what is counted", counted, limit);
}

#[test]
fn one_connection_keeps_its_limit() {
    assert_a_limit_holds(NetPair::NEAR_V4, By::Tcp, 1, 20);
    assert_a_limit_holds(NetPair::NEAR_V4, By::Tcp, 1, 100);
}

#[test]
fn eight_connections_keep_their_limit_together() {
    assert_a_limit_holds(NetPair::NEAR_V4, By::Tcp, 8, 20);
    assert_a_limit_holds(NetPair::NEAR_V4, By::Tcp, 8, 100);
}

#[test]
fn connections_by_ipv6_keep_their_limit() {
    assert_a_limit_holds(NetPair::NEAR_V6, By::Tcp, 1, 20);
    assert_a_limit_holds(NetPair::NEAR_V6, By::Tcp, 8, 20);
}

#[test]
fn datagrams_keep_their_limit() {
    assert_a_limit_holds(NetPair::NEAR_V4, By::Udp(1400), 1, 20);
    assert_a_limit_holds(NetPair::NEAR_V4, By::Udp(1400), 1, 100);
    assert_a_limit_holds(NetPair::NEAR_V6, By::Udp(1400), 1, 20);
}

/// A socket that takes what is for any address is found by another look-up.
#[test]
fn a_socket_for_any_address_keeps_its_limit() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let any = "[::]:7000".parse().unwrap();
    let mut receiver = Receiver::start(&agent, "download", &["--net-in", "20mbit"], any);
    for (address, by) in
        [(NetPair::NEAR_V4, By::Tcp), (NetPair::NEAR_V4, By::Udp(1400)), (NetPair::NEAR_V6, By::Udp(1400))]
    {
        receiver.address = SocketAddr::new(address, 7000);
        let _load = receiver.feed(&network, by, 1);
        Window::pass(3 * SECOND / 2);
        assert_in_goal("what it receives", counted(&agent, "download", 4 * SECOND), 20.0 * MBIT);
    }
}

#[test]
fn each_task_has_its_own_limit_and_others_have_none() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let start = |id, limits: &[&str], port| {
        Receiver::start(&agent, id, limits, SocketAddr::new(NetPair::NEAR_V4, port))
    };
    let slow = start("slow", &["--net-in", "20mbit"], 7001);
    let faster = start("faster", &["--net-in", "60mbit"], 7002);
    let open = start("open", &[], 7003);
    let _loads =
        [slow.feed(&network, By::Tcp, 2), faster.feed(&network, By::Tcp, 2), open.feed(&network, By::Tcp, 2)];
    Window::pass(2 * SECOND);
    assert_in_goal("the slow one", counted(&agent, "slow", 4 * SECOND), 20.0 * MBIT);
    assert_in_goal("the faster one", counted(&agent, "faster", 4 * SECOND), 60.0 * MBIT);
    let rate = open.rate(By::Tcp, SECOND);
    assert!(rate > 500.0 * MBIT, "{rate:.0} bit/s without a limit");
}

#[test]
fn a_limit_is_changed_lifted_and_set_again_while_it_receives() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let qdiscs = || network.near.tc(&["qdisc", "show", "dev", DEVICE]);
    let before = qdiscs();
    let receiver = Receiver::start(&agent, "download", &[], SocketAddr::new(NetPair::NEAR_V4, 7000));
    let _load = receiver.feed(&network, By::Tcp, 4);
    eventually("it arrives", || receiver.payload(By::Tcp) > 100_000);
    for (limit, rate) in [("20mbit", 20.0), ("60mbit", 60.0), ("10mbit", 10.0)] {
        agent.shaper().set("download", &["--net-in", limit]);
        // What is on its way at the rate before is there, or lost, by then.
        Window::pass(2 * SECOND);
        assert_in_goal(limit, counted(&agent, "download", 4 * SECOND), rate * MBIT);
    }
    agent.shaper().set("download", &["--net-in", "max"]);
    assert_eq!(qdiscs(), before, "nothing is left of it at the uplink");
    Window::pass(SECOND);
    let rate = receiver.rate(By::Tcp, SECOND);
    assert!(rate > 500.0 * MBIT, "{rate:.0} bit/s after the limit was lifted");
}

fn devices(namespace: &Netns) -> String {
    namespace.within(|| fs::read_to_string("/proc/thread-self/net/dev")).expect("every process has it")
}

#[test]
fn a_release_restores_every_qdisc_and_leaves_no_device() {
    let network = NetPair::new();
    // Somebody else has this qdisc, with a filter of his: it stays.
    network.near.tc(&["qdisc", "add", "dev", DEVICE, "clsact"]);
    let own = ["filter", "add", "dev", DEVICE, "ingress", "pref", "7", "bpf", "bytecode", "1,6 0 0 0"];
    network.near.tc(&own);
    let at_the_device = || {
        let filters = network.near.tc(&["filter", "show", "dev", DEVICE, "ingress"]);
        network.near.tc(&["qdisc", "show", "dev", DEVICE]) + &filters
    };
    let before = at_the_device();
    let agent = Options::default().on(&network).start();
    let receiver =
        Receiver::start(&agent, "download", &["--net-in", "20mbit"], SocketAddr::new(NetPair::NEAR_V4, 7000));
    assert_ne!(at_the_device(), before);
    assert!(devices(&network.near).contains("shaper-"));
    let process = agent.process(&agent.shaper().get("download"));
    let said = agent.shaper().ok(&["release", "--all"]);
    assert!(said.contains("net_ingress is `max` again"), "{said}");
    assert_eq!(at_the_device(), before);
    assert!(!devices(&network.near).contains("shaper-"), "{}", devices(&network.near));
    let _load = receiver.feed(&network, By::Tcp, 1);
    Window::pass(SECOND);
    let rate = receiver.rate(By::Tcp, SECOND);
    assert!(rate > 500.0 * MBIT, "{rate:.0} bit/s after the release");
    assert!(process.is_alive());
}

#[test]
fn a_limit_holds_without_an_agent_and_the_next_one_adopts_it() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let receiver =
        Receiver::start(&agent, "download", &["--net-in", "20mbit"], SocketAddr::new(NetPair::NEAR_V4, 7000));
    let _load = receiver.feed(&network, By::Tcp, 2);
    let holds = |what| {
        Window::pass(SECOND);
        assert_in_goal(what, receiver.rate(By::Tcp, 4 * SECOND), 20.0 * MBIT);
    };
    holds("with the agent");
    agent.kill9();
    holds("without an agent");
    let filters = || network.near.tc(&["filter", "show", "dev", DEVICE, "ingress"]);
    let before = filters();
    agent.restart();
    assert_ne!(filters(), before, "the program is the new agent's");
    assert!(shown(&agent).1.starts_with("20 Mbit/s"));
    holds("with the next agent");
    let leftovers = Leftovers::of(&agent, Some(&network));
    agent.kill9();
    let released = agent.release_offline();
    assert!(released.status.success(), "{}", String::from_utf8_lossy(&released.stderr));
    leftovers.assert_none();
    assert!(!devices(&network.near).contains("shaper-"), "{}", devices(&network.near));
}

#[test]
fn what_somebody_takes_away_is_put_back() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let receiver =
        Receiver::start(&agent, "download", &["--net-in", "20mbit"], SocketAddr::new(NetPair::NEAR_V4, 7000));
    let shown = || shown(&agent).1;
    network.near.ip(&["link", "delete", &device_of(&agent)]);
    assert_eq!(shown(), "max");
    eventually("the device is there again", || shown().starts_with("20 Mbit/s"));
    network.near.tc(&["qdisc", "delete", "dev", DEVICE, "clsact"]);
    assert_eq!(shown(), "max");
    eventually("the filter is there again", || shown().starts_with("20 Mbit/s"));
    let _load = receiver.feed(&network, By::Tcp, 1);
    Window::pass(SECOND);
    assert_in_goal("what it receives then", counted(&agent, "download", 4 * SECOND), 20.0 * MBIT);
    let ledger = agent.shaper().ok(&["ledger", "download"]);
    assert!(ledger.contains("net_ingress: 20 Mbit/s → max"), "{ledger}");
}

#[test]
fn the_end_of_a_task_takes_its_limit_along() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let before = devices(&network.near).lines().count();
    let task = agent.run("short", &["--net-in", "20mbit"], &["spin"]);
    assert_eq!(devices(&network.near).lines().count(), before + 1);
    agent.process(&task).kill();
    eventually("the device is gone", || devices(&network.near).lines().count() == before);
}

#[test]
fn what_is_only_forwarded_and_the_loopback_are_left_alone() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    // The near namespace forwards to a third one, in which somebody has the port that the limited task has.
    let third = Netns::new();
    network.near.connect("down0", &third, DEVICE);
    for (namespace, device, address) in
        [(&network.near, "down0", "10.98.0.1/24"), (&third, DEVICE, "10.98.0.2/24")]
    {
        namespace.ip(&["address", "add", address, "dev", device]);
        namespace.ip(&["link", "set", device, "up"]);
    }
    network.near.within(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1")).expect("root may");
    network.far.ip(&["route", "add", "10.98.0.0/24", "via", "10.99.0.1"]);
    third.ip(&["route", "add", "10.99.0.0/24", "via", "10.98.0.1"]);
    let any = "0.0.0.0:7000".parse().unwrap();
    let mut receiver = Receiver::start(&agent, "download", &["--net-in", "5mbit"], any);
    let flood = start_in(&network.far, &["flood", "10.98.0.2:7000", "1400"]);
    eventually("it arrives behind", || third.received(DEVICE) > 100_000);
    let before = third.received(DEVICE);
    let window = Window::pass(2 * SECOND);
    let forwarded = (third.received(DEVICE) - before) as f64 * 8.0 / window.seconds();
    assert!(forwarded > 50.0 * MBIT, "{forwarded:.0} bit/s are forwarded beside a limit of 5 Mbit/s");
    assert_eq!(receiver.payload(By::Udp(1400)), 0);
    drop(flood);

    // What is for the task is held, also while its node forwards.
    receiver.address = SocketAddr::new(NetPair::NEAR_V4, 7000);
    let flood = receiver.feed(&network, By::Udp(1400), 1);
    Window::pass(SECOND);
    assert_in_goal("what it receives", receiver.rate(By::Udp(1400), 2 * SECOND), 5.0 * MBIT);
    drop(flood);

    let _inside = start_in(&network.near, &["send", "127.0.0.1:7000", "1"]);
    Window::pass(SECOND);
    let rate = receiver.rate(By::Tcp, SECOND);
    assert!(rate > 500.0 * MBIT, "{rate:.0} bit/s by the loopback");
}

#[test]
fn without_an_uplink_it_is_refused_with_the_remedy_and_nothing_is_left() {
    let network = NetPair::new();
    let agent = Options::default().within(&network.near).start();
    let before = devices(&network.near).lines().count();
    agent.run("download", &[], &["spin"]);
    let refused = agent.shaper().refused(&["set", "download", "--net-in", "20mbit"]);
    assert!(refused.contains("Start its agent with --uplink DEVICE"), "{refused}");
    assert_eq!(devices(&network.near).lines().count(), before);
}

#[test]
fn a_device_of_somebody_elses_with_our_name_is_refused_and_left_alone() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    agent.run("download", &["--net-in", "20mbit"], &["spin"]);
    let device = &device_of(&agent);
    agent.shaper().set("download", &["--net-in", "max"]);
    network.near.ip(&["link", "add", device, "type", "veth", "peer", "name", "other0"]);
    let refused = agent.shaper().refused(&["set", "download", "--net-in", "20mbit"]);
    assert!(refused.contains("rename it"), "{refused}");
    agent.shaper().ok(&["release", "--all"]);
    assert!(devices(&network.near).contains(device));
}
