//! Room is made for a task of a high priority, and who made room has it again when a node comes.

use shaper_core::spec::{Decision, DecisionKind};
use shaper_tests::{
    checker::{Expect, Watch, check, check_settled, wait_until_began},
    cluster::{Cluster, Load, networks},
    time::eventually,
};

const NODE: &str = "cpu=1,memory=1Gi";

const POLICY: &str = "policy_name: services\npriority: high\nbehavior: {preemption_enabled: true}\n";

fn last(decisions: Vec<Decision>, kind: DecisionKind) -> Decision {
    let found = decisions.iter().rfind(|decision| decision.kind == kind).cloned();
    found.unwrap_or_else(|| panic!("nothing was {kind}: {decisions:#?}"))
}

#[test]
fn of_three_full_nodes_one_is_cleared_and_a_fourth_takes_who_made_room() {
    let networks = networks(4);
    let mut cluster = Cluster::start(&networks[..3], &[NODE; 3]);
    let watch = Watch::begin(&cluster);
    let batch = ["b1", "b2", "b3"];
    for id in batch {
        cluster.submit(id, 0.6, "low", Load::Until(3));
        cluster.wait_until_runs(id);
        wait_until_began(&cluster, id);
    }
    // Without a policy it waits, and more nodes are asked for.
    cluster.submit("service", 0.8, "high", Load::Until(4));
    let kinds = cluster.broker.kinds("service");
    assert_eq!(kinds, [DecisionKind::Pending, DecisionKind::ScaleOut]);
    assert!(batch.iter().all(|id| cluster.broker.task(id).runs()));

    cluster.broker.apply(POLICY);
    let service = cluster.wait_until_runs("service");
    wait_until_began(&cluster, "service");
    check(&cluster);
    let node = service.node.expect("what runs is on a node");
    let victims: Vec<_> = batch.iter().filter(|id| !cluster.broker.task(id).runs()).collect();
    let [victim] = victims[..] else { panic!("{victims:?} do not run") };
    let cleared = last(cluster.broker.decisions("service"), DecisionKind::Pending).reason;
    assert_eq!(cleared, format!("{node} is cleared for it by policy `services`: asked to end `{victim}`"));
    let why = last(cluster.broker.decisions(victim), DecisionKind::Evicted);
    assert_eq!(
        (why.by.as_str(), why.reason),
        (
            "broker",
            format!(
                "to make room for `service` of priority high, by policy `services`: asked {node} to end it"
            )
        )
    );
    // It waits again, and through no fault of its own: no retry was used, and there are none.
    let waits = cluster.broker.task(victim);
    assert!(waits.is_pending() && waits.attempt == 1, "{waits:?}");

    // It grows where it is while the others wait for a fourth node.
    let agent = cluster.agent(&node).shaper();
    eventually("the service has more than it asked for, or all that it wants", || {
        agent.get("service").limits.cpu.at().is_none_or(|limit| limit.0 >= 800)
    });
    cluster.join(&networks[3], NODE);
    let again = cluster.wait_until_runs(victim);
    assert_eq!((again.node.as_deref(), again.attempt), (Some("n4"), 2));
    wait_until_began(&cluster, victim);
    check(&cluster);
    for id in batch {
        cluster.let_end(id);
        cluster.broker.wait_until(id, "over", |task| task.ended().is_some());
    }
    let ended = |id| (id, Expect::Ended(3));
    check_settled(&cluster, &[ended("b1"), ended("b2"), ended("b3"), ("service", Expect::Running)]);
    watch.end();
}

#[test]
fn a_place_is_kept_while_a_victim_takes_its_time_to_end() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &[NODE]);
    cluster.broker.apply(POLICY);
    cluster.submit("batch", 0.6, "low", Load::Spin);
    cluster.wait_until_runs("batch");
    wait_until_began(&cluster, "batch");
    // Its agent is away in the moment in which room is to be made.
    cluster.agents[0].freeze(true);
    cluster.submit("service", 0.8, "high", Load::Until(4));
    let waits = cluster.broker.wait_until("service", "promised a place", |task| task.is_pending());
    assert!(format!("{:?}", waits.phase).contains("n1 is being cleared for it"), "{:?}", waits.phase);
    // What would fit now would be in the way later.
    cluster.submit("small", 0.3, "low", Load::Until(3));
    assert!(cluster.broker.task("small").is_pending());
    cluster.agents[0].freeze(false);
    cluster.wait_until_runs("service");
    wait_until_began(&cluster, "service");
    check(&cluster);
    assert!(cluster.broker.task("small").is_pending() && cluster.broker.task("batch").is_pending());
    cluster.let_end("service");
    let small = cluster.wait_until_runs("small");
    assert_eq!(small.attempt, 1);
    wait_until_began(&cluster, "small");
    check(&cluster);
}
