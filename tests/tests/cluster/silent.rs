//! A node does not answer. What may run elsewhere is ended there first, by whoever is left to do it, and nothing else is.

use shaper_core::spec::DecisionKind;
use shaper_tests::{
    broker::{Broker, ClusterTask},
    checker::{Expect, Watch, check_settled, wait_until_began},
    cluster::{Cluster, Load, networks},
    net::Netns,
    process::Process,
};

/// The shortest that there is, in seconds.
const LEASE: &str = "5";
/// Roomier for the first tasks, which are to be there.
const CAPACITIES: [&str; 2] = ["cpu=2,memory=1Gi", "cpu=1,memory=1Gi"];

/// Two nodes, and on the first a task that is run again when the node is lost, and one that waits for it.
fn cluster(networks: &[Netns]) -> (Cluster<'_>, [Process; 2]) {
    let broker = Broker::start_with(&["--task-lease-seconds", LEASE]);
    let cluster = Cluster::start_of(broker, networks, &CAPACITIES);
    let spec = cluster.spec("again", 0.3, "medium", Load::Until(3));
    let mut spec: serde_json::Value = serde_json::from_str(&spec).expect("it is JSON");
    spec["on_node_lost"] = "rerun".into();
    cluster.submit_spec("again", &spec.to_string());
    // More than the second node has.
    cluster.submit("waits", 1.2, "medium", Load::Until(4));
    let processes = ["again", "waits"].map(|id| {
        assert_eq!(cluster.wait_until_runs(id).node.as_deref(), Some("n1"));
        wait_until_began(&cluster, id);
        cluster.agents[0].process(&cluster.agents[0].shaper().get(id))
    });
    (cluster, processes)
}

/// Waits until the first task is elsewhere, which must not be before it has ended where it was.
fn wait_until_moved(cluster: &Cluster, [again, waits]: &[Process; 2]) {
    let is_moved = |task: &ClusterTask| {
        let is_placed_again = task.attempt == 2;
        assert!(!is_placed_again || !again.is_alive(), "it is placed again, and runs: {task:?}");
        is_placed_again && task.runs()
    };
    let moved = cluster.broker.wait_until("again", "on n2", is_moved);
    assert_eq!(moved.node.as_deref(), Some("n2"));
    assert!(waits.is_alive() && cluster.broker.task("waits").attempt == 1, "it waits for its node");
    use DecisionKind::{Lost, Placed};
    assert_eq!(cluster.broker.kinds("again"), [Placed, Lost, Lost, Placed]);
    let text = cluster.broker.shaper().ok(&["explain", "again"]);
    assert!(text.contains("it ends the task 5 s after it last heard of the broker"), "{text}");
    assert!(text.contains("one and a half times the lease of 5 s"), "{text}");
}

/// The node answers again: what ended there is no news.
fn settle(cluster: &Cluster) {
    cluster.broker.wait_for_node("n1", true);
    for id in ["again", "waits"] {
        cluster.let_end(id);
        cluster.broker.wait_until(id, "over", |task| task.ended().is_some());
    }
    check_settled(cluster, &[("again", Expect::Ended(3)), ("waits", Expect::Ended(4))]);
}

#[test]
fn the_agent_is_stopped() {
    let networks = networks(2);
    let (cluster, tasks) = cluster(&networks);
    let watch = Watch::begin(&cluster);
    cluster.agents[0].freeze(true);
    wait_until_moved(&cluster, &tasks);
    cluster.agents[0].freeze(false);
    settle(&cluster);
    watch.end();
}

#[test]
fn the_agent_is_killed_and_the_node_cut_off() {
    let networks = networks(2);
    let (mut cluster, tasks) = cluster(&networks);
    let watch = Watch::begin(&cluster);
    cluster.cuts[0].cut();
    cluster.agents[0].kill9();
    wait_until_moved(&cluster, &tasks);
    cluster.cuts[0].mend();
    cluster.agents[0].restart();
    settle(&cluster);
    watch.end();
}

#[test]
fn the_node_is_cut_off_and_nobody_supervises_its_task() {
    let networks = networks(2);
    let (cluster, tasks) = cluster(&networks);
    let watch = Watch::begin(&cluster);
    tasks[0].parent().kill();
    cluster.cuts[0].cut();
    wait_until_moved(&cluster, &tasks);
    cluster.cuts[0].mend();
    settle(&cluster);
    watch.end();
}

#[test]
fn a_broker_that_is_away_for_less_than_a_lease_changes_nothing() {
    let networks = networks(2);
    let (mut cluster, [again, _]) = cluster(&networks);
    let watch = Watch::begin(&cluster);
    cluster.broker.kill9();
    cluster.broker.restart();
    settle(&cluster);
    again.wait_for_end();
    assert_eq!(cluster.broker.task("again").attempt, 1);
    watch.end();
}
