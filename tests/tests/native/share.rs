//! What a node sends, divided among its tasks: guarantees, weights and ceilings.

use std::{net::SocketAddr, net::UdpSocket, time::Duration};

use shaper_tests::{
    agent::{Agent, Options, Used},
    assert_close,
    net::NetPair,
    sink::Sink,
    statistics::median,
    time::Window,
};

/// Less than any of the tasks would send.
const CAPACITY: &str = "cpu=2,memory=1Gi,network=60mbit";
/// Until all have what they should, and what a start has brought along is gone.
const SETTLED: Duration = Duration::from_secs(2);
/// So often a rate is measured, for so long each time: the median is not that of a moment in which the machine was away.
const TIMES: usize = 5;
const LONG: Duration = Duration::from_secs(1);

/// Somewhere at the far end for every task.
struct Ends {
    sinks: Vec<Sink>,
    ports: Vec<UdpSocket>,
}

impl Ends {
    fn new() -> Ends {
        Ends { sinks: Vec::new(), ports: Vec::new() }
    }

    /// A task that sends datagrams, 82 Mbit/s on the wire: more than there is, and no CPU's whole time.
    fn flood(&mut self, network: &NetPair, agent: &Agent<'_>, id: &str, limits: &[&str]) {
        let port = network.far.within(|| UdpSocket::bind((NetPair::FAR_V4, 0))).expect("a free port");
        let address: SocketAddr = port.local_addr().expect("it is bound");
        agent.run(id, limits, &["flood", &address.to_string(), "1400", "10000000"]);
        self.ports.push(port);
    }

    /// A task that sends as much as it can by so many connections.
    fn send(&mut self, network: &NetPair, agent: &Agent<'_>, id: &str, limits: &[&str], connections: usize) {
        let sink = Sink::listen(&network.far, NetPair::FAR_V4);
        agent.run(id, limits, &["send", &sink.address(), &connections.to_string()]);
        sink.wait_for_flows(connections);
        self.sinks.push(sink);
    }
}

/// Mbit/s that each of the tasks sends on the wire: the median.
fn rates(agent: &Agent<'_>, ids: &[&str]) -> Vec<f64> {
    let usage = || ids.iter().map(|id| agent.shaper().get(id).usage).collect::<Vec<_>>();
    let mut rates = vec![Vec::with_capacity(TIMES); ids.len()];
    let mut before = usage();
    for _ in 0..TIMES {
        Window::pass(LONG);
        let after = usage();
        for (rates, (before, after)) in rates.iter_mut().zip(before.iter().zip(&after)) {
            rates.push(Used::between(before, after).egress / 1e6);
        }
        before = after;
    }
    rates.iter().map(|rates| median(rates)).collect()
}

#[track_caller]
fn assert_rates(agent: &Agent<'_>, expected: &[(&str, f64)], percent: f64) {
    Window::pass(SETTLED);
    let ids: Vec<&str> = expected.iter().map(|(id, _)| *id).collect();
    let found = rates(agent, &ids);
    println!("{expected:?}: {found:.2?}");
    for ((id, expected), found) in expected.iter().zip(found) {
        assert_close(id, found, *expected, percent);
    }
}

#[test]
fn the_network_is_divided_by_weight_whatever_tasks_send() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).with(&["--capacity", CAPACITY]).start();
    let mut ends = Ends::new();
    ends.flood(&network, &agent, "heavy", &["--net-weight", "300"]);
    assert_rates(&agent, &[("heavy", 60.0)], 2.0);
    ends.flood(&network, &agent, "light", &[]);
    assert_rates(&agent, &[("heavy", 45.0), ("light", 15.0)], 3.0);
    agent.shaper().set("light", &["--net-weight", "300"]);
    assert_rates(&agent, &[("heavy", 30.0), ("light", 30.0)], 3.0);
    // Eight connections have no more than one flood. (Nor as much as they could where their acknowledgements come late.)
    ends.send(&network, &agent, "many", &["--net-weight", "300"], 8);
    assert_rates(&agent, &[("heavy", 20.0), ("light", 20.0), ("many", 20.0)], 7.0);
    agent.shaper().ok(&["cancel", "heavy"]);
    assert_rates(&agent, &[("light", 30.0), ("many", 30.0)], 7.0);
}

#[test]
fn a_guarantee_and_a_ceiling_hold_beside_weights() {
    let network = NetPair::new();
    let mut agent = Options::default().on(&network).with(&["--capacity", CAPACITY]).start();
    let mut ends = Ends::new();
    ends.send(&network, &agent, "promised", &["--net-guarantee", "30mbit"], 1);
    ends.send(&network, &agent, "capped", &["--net", "5mbit"], 2);
    ends.send(&network, &agent, "rest", &["--net-weight", "400"], 4);
    // Beyond what is promised and the ceiling 25 are left, of which the first has a fifth.
    let expected = [("promised", 35.0), ("capped", 5.0), ("rest", 20.0)];
    assert_rates(&agent, &expected, 7.0);

    let refused = agent.shaper().refused(&["set", "rest", "--net-guarantee", "40mbit"]);
    assert!(
        refused.contains(
            "40 Mbit/s do not fit: of 60 Mbit/s 30 Mbit/s are promised to other tasks and 30 Mbit/s are left"
        ),
        "{refused}"
    );
    let status = agent.shaper().get("promised");
    let granted = status.usage.egress_granted_bps.expect("the network is divided") as f64;
    assert_close("what is said to be granted", granted / 1e6, 35.0, 7.0);

    // It is divided by the kernel: nobody else is needed, and the next agent finds it as it is.
    agent.kill9();
    let before = ends.sinks[2].rate(Window::pass(LONG * 4));
    assert_close("without an agent", before / 1e6, 20.0, 7.0);
    agent.restart();
    assert_rates(&agent, &expected, 7.0);
    agent.shaper().set("promised", &["--net-guarantee", "0"]);
    assert_rates(&agent, &[("promised", 11.0), ("capped", 5.0), ("rest", 44.0)], 7.0);
}

#[test]
fn what_one_does_not_use_others_have() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).with(&["--capacity", CAPACITY]).start();
    let mut ends = Ends::new();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    // A megabyte a second of payload.
    let load = ["send", &sink.address(), "1", "1000000"];
    agent.run("thrifty", &["--net-guarantee", "30mbit"], &load);
    sink.wait_for_flows(1);
    ends.flood(&network, &agent, "greedy", &[]);
    let thrifty = 8.0 * 1514.0 / 1448.0;
    assert_rates(&agent, &[("thrifty", thrifty), ("greedy", 60.0 - thrifty)], 3.0);
}

#[test]
fn without_a_capacity_there_is_nothing_to_divide() {
    let agent = Agent::start();
    agent.run("alone", &[], &["spin"]);
    let refused = agent.shaper().refused(&["set", "alone", "--net-weight", "200"]);
    assert!(refused.contains("--capacity network=RATE"), "{refused}");
    assert_eq!(agent.shaper().get("alone").usage.egress_granted_bps, None);
}
