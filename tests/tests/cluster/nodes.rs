//! Three nodes: who goes where, and what becomes of tasks whose agent dies or is cut off.

use shaper_core::spec::DecisionKind;
use shaper_tests::{
    broker::{Broker, ClusterPhase},
    checker::{Expect, Watch, check, check_settled, wait_until_began},
    cluster::{Cluster, Load, MEMORY_GB, networks},
    time::eventually,
};

/// What a node has and what of it is reserved: cores, GiB.
struct Node {
    name: &'static str,
    total: (f64, f64),
    reserved: (f64, f64),
}

impl Node {
    fn free(&self) -> (f64, f64) {
        (self.total.0 - self.reserved.0, self.total.1 - self.reserved.1)
    }

    /// The seed formula for a task of medium priority; `None`: it does not fit.
    fn score(&self, cores: f64) -> Option<f64> {
        let (cpu, memory) = self.free();
        let score = 0.5 * 0.5 + cpu / self.total.0 * 0.3 + memory / self.total.1 * 0.2;
        (cores <= cpu + 1e-9 && MEMORY_GB <= memory + 1e-9).then_some(score)
    }
}

/// Asserts that the broker judged the nodes by the formula, and took the best of them.
#[track_caller]
fn assert_placed_by_score(broker: &Broker, id: &str, cores: f64, nodes: &mut [Node]) -> &'static str {
    let decisions = broker.decisions(id);
    let placed = decisions.iter().find(|it| it.kind == DecisionKind::Placed).expect("it was placed");
    for node in nodes.iter() {
        let verdict = placed.nodes.iter().find(|verdict| verdict.node == node.name).expect("it was judged");
        match (verdict.score, node.score(cores)) {
            (Some(score), Some(expected)) => {
                assert!((score - expected).abs() < 1e-9, "{}: {score}, not {expected}", node.name);
            }
            (score, expected) => assert_eq!(score, expected, "{} for {id}", node.name),
        }
    }
    let by_score = |a: &&mut Node, b: &&mut Node| {
        a.score(cores).partial_cmp(&b.score(cores)).expect("a score is a number")
    };
    // The first on a tie: `max_by` takes the last.
    let best = nodes.iter_mut().rev().max_by(by_score).expect("there are nodes");
    assert_eq!(broker.task(id).node.as_deref(), Some(best.name), "{id}: {decisions:#?}");
    best.reserved.0 += cores;
    best.reserved.1 += MEMORY_GB;
    best.name
}

#[test]
fn tasks_go_to_the_best_node_and_outlive_a_killed_agent_and_a_cut_cable() {
    let networks = networks(3);
    let capacities = ["cpu=2,memory=1Gi", "cpu=1,memory=2Gi", "cpu=1.5,memory=512Mi"];
    let mut cluster = Cluster::start(&networks, &capacities);
    let watch = Watch::begin(&cluster);
    let node = |name, total| Node { name, total, reserved: (0.0, 0.0) };
    let mut nodes = [node("n1", (2.0, 1.0)), node("n2", (1.0, 2.0)), node("n3", (1.5, 0.5))];

    let mut homes = Vec::new();
    let tasks = [("a", 0.3), ("b", 0.5), ("c", 0.2), ("d", 0.4), ("e", 0.3), ("f", 0.35)];
    for (id, cores) in tasks {
        cluster.submit(id, cores, "medium", Load::Until(3));
        cluster.wait_until_runs(id);
        homes.push((id, assert_placed_by_score(&cluster.broker, id, cores, &mut nodes)));
        check(&cluster);
    }
    for node in &nodes {
        assert!(node.reserved.0 > 0.0, "the tasks are to be on all of the nodes: {homes:?}");
        let told = cluster.broker.nodes().into_iter().find(|told| told.name == node.name).unwrap();
        let reserved = told.reserved.cpu.0 as f64 / 1000.0;
        assert!((reserved - node.reserved.0).abs() < 1e-9, "{told:?}");
    }
    let of = |name: &str| homes.iter().find(|(_, home)| *home == name).unwrap().0;

    // One that wants more grows where it is.
    cluster.submit("grower", 0.1, "medium", Load::Spin);
    let grower = cluster.wait_until_counts("grower");
    let home = assert_placed_by_score(&cluster.broker, "grower", 0.1, &mut nodes);
    let agent = cluster.agent(home).shaper();
    eventually("the grower has grown", || agent.get("grower").limits.cpu.at().unwrap().0 > 200);
    assert_eq!(cluster.broker.task("grower").attempt, grower.attempt);

    // A killed agent leaves its tasks alone, and finds them when it is back.
    let survivor = of("n1");
    let before = cluster.agents[0].shaper().get(survivor);
    let process = cluster.agents[0].process(&before);
    cluster.agents[0].kill9();
    cluster.broker.wait_for_node("n1", false);
    assert!(process.is_alive() && cluster.broker.task(survivor).runs());
    check(&cluster);
    cluster.agents[0].restart();
    cluster.broker.wait_for_node("n1", true);
    assert_eq!(cluster.agents[0].shaper().get(survivor).pid, before.pid);

    // A task ends while its node is cut off: that is heard when the cable is whole again.
    let unheard = of("n2");
    let process = cluster.agents[1].process(&cluster.agents[1].shaper().get(unheard));
    cluster.cuts[1].cut();
    cluster.broker.wait_for_node("n2", false);
    cluster.let_end(unheard);
    process.wait_for_end();
    assert!(cluster.broker.task(unheard).runs(), "nobody can have told the broker");
    check(&cluster);
    cluster.cuts[1].mend();
    cluster.broker.wait_until(unheard, "over", |task| task.ended().is_some());

    let mut expected: Vec<(&str, Expect)> = tasks.iter().map(|(id, _)| (*id, Expect::Running)).collect();
    expected.push(("grower", Expect::Running));
    for (id, expect) in &mut expected {
        if *id == unheard {
            *expect = Expect::Ended(3);
        }
    }
    check_settled(&cluster, &expected);
    watch.end();
}

#[test]
fn a_task_that_fits_nowhere_waits_with_the_reason_and_runs_when_room_comes() {
    let networks = networks(2);
    let cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi", "cpu=1.5,memory=1Gi"]);
    let watch = Watch::begin(&cluster);
    cluster.submit("small", 0.4, "medium", Load::Until(0));
    cluster.submit("other", 0.5, "medium", Load::Until(0));
    let small = cluster.wait_until_runs("small");
    let other = cluster.wait_until_runs("other");
    assert_ne!(small.node, other.node);

    cluster.submit("big", 1.2, "high", Load::Until(5));
    let big = cluster.broker.wait_until("big", "pending", |task| task.is_pending());
    let ClusterPhase::Pending { reason } = &big.phase else { unreachable!("it was waited for") };
    assert!(reason.contains("room"), "{reason}");
    assert!(cluster.broker.kinds("big").contains(&DecisionKind::ScaleOut));
    let text = cluster.broker.shaper().ok(&["explain", "big"]);
    assert!(text.contains("scale_out") && text.contains("cpu: 1.2 cores wanted, "), "{text}");
    assert!(text.contains(" of 1 free") && text.contains(" of 1.5 free"), "{text}");
    check(&cluster);

    let in_the_way = if small.node.as_deref() == Some("n2") { "small" } else { "other" };
    let stays = if in_the_way == "small" { "other" } else { "small" };
    cluster.let_end(in_the_way);
    let big = cluster.wait_until_runs("big");
    assert_eq!(big.node.as_deref(), Some("n2"));
    wait_until_began(&cluster, "big");
    cluster.let_end("big");
    cluster.broker.wait_until("big", "over", |task| task.ended().is_some());
    check_settled(
        &cluster,
        &[(in_the_way, Expect::Ended(0)), (stays, Expect::Running), ("big", Expect::Ended(5))],
    );
    watch.end();
}
