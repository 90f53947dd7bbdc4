//! The ceiling on what a task sends, for what no socket paces, and against a task that does not want to be paced.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    process::Child,
    time::Duration,
};

use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::TestCgroup,
    net::{DEVICE, NetPair},
    sink::Sink,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

/// A port at the far end that takes datagrams, and does nothing with them.
fn far_port(network: &NetPair, address: IpAddr) -> (UdpSocket, SocketAddr) {
    let socket = network.far.within(|| UdpSocket::bind((address, 0))).expect("a free port");
    let address = socket.local_addr().expect("it is bound");
    (socket, address)
}

/// Bits a second that arrive at the far end while `time` passes.
fn arriving(network: &NetPair, time: Duration) -> f64 {
    let before = network.far.received(DEVICE);
    let window = Window::pass(time);
    (network.far.received(DEVICE) - before) as f64 * 8.0 / window.seconds()
}

#[track_caller]
fn assert_datagrams_keep_a_limit(to: IpAddr, bytes: &str) {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let (_port, address) = far_port(&network, to);
    let task = agent.run("flood", &["--net", "20mbit"], &["flood", &address.to_string(), bytes]);
    // At first nobody knows the neighbour.
    eventually("datagrams arrive", || network.far.received(DEVICE) > 100_000);
    // The credit of a task that was silent is spent by then.
    Window::pass(SECOND / 2);
    let before = agent.shaper().get("flood").usage;
    let arrived = arriving(&network, 4 * SECOND);
    assert_close("what arrives", arrived, 20e6, 1.5);
    let after = agent.shaper().get("flood").usage;
    let seconds = (after.at_monotonic_ns - before.at_monotonic_ns) as f64 / 1e9;
    let sent = (after.egress.bytes - before.egress.bytes) as f64 * 8.0 / seconds;
    assert_close("what is said to be sent", sent, 20e6, 1.5);
    eventually("what is held back is told", || {
        agent.shaper().usage_of("flood").network.datagrams_held.packets > 0
    });
    // It was told of no error: it goes on.
    assert!(agent.process(&task).is_alive());

    agent.shaper().set("flood", &["--net", "5mbit"]);
    Window::pass(SECOND / 2);
    assert_close("what arrives below a lower limit", arriving(&network, 2 * SECOND), 5e6, 3.0);
    agent.shaper().set("flood", &["--net", "max"]);
    let open = arriving(&network, SECOND);
    assert!(open > 5.0 * 20e6, "{open:.0} bit/s after the limit was lifted");
}

#[test]
fn datagrams_keep_their_limit() {
    assert_datagrams_keep_a_limit(NetPair::FAR_V4, "1400");
}

#[test]
fn small_datagrams_by_ipv6_keep_their_limit() {
    assert_datagrams_keep_a_limit(NetPair::FAR_V6, "200");
}

#[test]
fn datagrams_that_can_carry_a_mark_have_one_before_others_are_dropped() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let (_port, address) = far_port(&network, NetPair::FAR_V4);
    // ECT(0), and none of it.
    for (id, service, is_marked) in [("able", "2", true), ("unable", "0", false)] {
        let load = ["datagrams", &address.to_string(), "50000", "1400", service];
        agent.run(id, &["--net", "20mbit"], &load);
        let network = || agent.shaper().usage_of(id).network;
        eventually("it is beyond its limit", || network().datagrams_held.packets > 1_000);
        assert_eq!(network().egress.congestion_marks > 0, is_marked, "{id}");
    }
}

/// A process in an adopted cgroup with that limit: as root, with every capability.
fn start_in<'a>(network: &'a NetPair, group: &TestCgroup, limit: &str, load: &[&str]) -> (Agent<'a>, Ended) {
    let agent = Options::default().on(network).start();
    agent.adopt("wild", group.path(), &["--net", limit]);
    (agent, Ended(TestCgroup::run(group.path(), Some(&network.near), load)))
}

/// A child that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn frames_of_a_packet_socket_keep_the_limit_of_their_task() {
    let (network, group) = (NetPair::new(), TestCgroup::new());
    let (_agent, _flood) = start_in(&network, &group, "20mbit", &["frames", DEVICE, "1514"]);
    Window::pass(SECOND / 2);
    assert_close("what arrives", arriving(&network, 3 * SECOND), 20e6, 2.0);
}

#[test]
fn connections_that_unset_their_pacing_do_not_get_past_the_limit() {
    let (network, group) = (NetPair::new(), TestCgroup::new());
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let (_agent, _greedy) = start_in(&network, &group, "20mbit", &["send", &sink.address(), "8", "greedy"]);
    sink.wait_for_flows(8);
    // What TCP may be ahead of its clock is used up by then: 0.4 s' worth at 20 Mbit/s, in which it has 1.016.
    Window::pass(3 * SECOND);
    let arrived = arriving(&network, 4 * SECOND);
    assert!(arrived <= 1.02 * 20e6, "{arrived:.0} bit/s of 20 Mbit/s");
}

#[test]
fn tcp_and_datagrams_of_one_task_share_its_limit() {
    let (network, group) = (NetPair::new(), TestCgroup::new());
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let (_port, address) = far_port(&network, NetPair::FAR_V4);
    let (agent, _stream) = start_in(&network, &group, "40mbit", &["send", &sink.address(), "2"]);
    sink.wait_for_flows(2);
    let flood = ["flood", &address.to_string(), "1400"];
    let flood = Ended(TestCgroup::run(group.path(), Some(&network.near), &flood));
    eventually("both send", || agent.shaper().usage_of("wild").network.datagrams_held.packets > 0);
    Window::pass(2 * SECOND);
    let before = network.far.received(DEVICE);
    let window = Window::pass(4 * SECOND);
    let all = (network.far.received(DEVICE) - before) as f64 * 8.0 / window.seconds();
    let streams = sink.rate(window);
    println!("{all:.0} bit/s in all, of which TCP has {streams:.0}");
    assert_close("both together", all, 40e6, 4.0);
    assert_close("TCP's half", streams, 20e6, 15.0);
    drop(flood);
    Window::pass(2 * SECOND);
    assert_close("TCP alone again", sink.rate(Window::pass(3 * SECOND)), 40e6, 4.0);
}

#[test]
fn a_pacing_rate_of_its_own_holds_where_it_is_lower_and_comes_back() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    // 1.25 MB/s of payload: 10.5 Mbit/s on the wire.
    let load = ["send", &sink.address(), "1", "1250000"];
    let task = agent.run("paced", &["--net", "50mbit"], &load);
    sink.wait_for_flows(1);
    let own = 10e6 * 1514.0 / 1448.0;
    let rate = |what: &str, expected: f64| {
        Window::pass(SECOND);
        assert_close(what, sink.rate(Window::pass(3 * SECOND)), expected, 6.0);
    };
    rate("its own, below the limit", own);
    agent.shaper().set("paced", &["--net", "5mbit"]);
    rate("the limit, below its own", 5e6);
    agent.kill9();
    agent.restart();
    rate("the limit, after another agent has taken over", 5e6);
    agent.shaper().set("paced", &["--net", "max"]);
    rate("its own, without a limit", own);
    agent.shaper().set("paced", &["--net", "5mbit"]);
    rate("the limit again", 5e6);
    let process = agent.process(&task);
    agent.shaper().ok(&["release", "paced"]);
    rate("its own, after the release", own);
    process.kill();
}
