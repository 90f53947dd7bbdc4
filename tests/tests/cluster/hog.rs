//! A task takes what is free, and gives it back to those who come first.

use std::time::{Duration, Instant};

use shaper_core::{
    spec::{Decision, DecisionKind},
    task::ExitStatus,
};
use shaper_tests::{
    broker::ClusterPhase,
    cgroup::cpu_time,
    checker::{Expect, Watch, check, check_settled, wait_until_began},
    cluster::{Cluster, Load, networks},
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

/// Less than the machine has, so that it is the node's capacity that is shared out.
const NODE: &str = "cpu=1,memory=1Gi";

const POLICY: &str = r#"policy_name: services
priority: high
behavior: {eviction_threshold: 0.5, preemption_enabled: true, window_seconds: 1}
"#;

/// The CPU limit that its node has put on a task, cores.
fn granted(cluster: &Cluster, id: &str) -> f64 {
    let task = cluster.agents[0].shaper().get(id);
    task.limits.cpu.at().expect("every task of a broker has a CPU limit").0 as f64 / 1000.0
}

/// Cores that a task used over a second, by the kernel's own count.
fn used(cluster: &Cluster, id: &str) -> f64 {
    let cgroup = cluster.agents[0].shaper().get(id).cgroup;
    let before = cpu_time(&cgroup);
    let window = Window::pass(SECOND);
    (cpu_time(&cgroup) - before).as_secs_f64() / window.seconds()
}

fn first(decisions: &[Decision], kind: DecisionKind) -> &Decision {
    let found = decisions.iter().find(|decision| decision.kind == kind);
    found.unwrap_or_else(|| panic!("nothing was {kind}: {decisions:#?}"))
}

fn has_numbers(decision: &Decision) -> bool {
    decision.reason.contains(|letter: char| letter.is_ascii_digit())
}

#[test]
fn a_lone_hog_is_never_evicted_however_busy_it_keeps_its_node() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &[NODE]);
    cluster.broker.apply(POLICY);
    cluster.submit("hog", 0.4, "low", Load::Spin);
    cluster.wait_until_counts("hog");
    eventually("the hog has grown to the whole node", || granted(&cluster, "hog") > 0.9);
    // Five windows of the policy, in each of which the node is busier than its threshold.
    for _ in 0..5 {
        let cores = used(&cluster, "hog");
        assert!(cores > 0.6, "the hog uses {cores} cores only");
        let task = cluster.broker.task("hog");
        assert!(task.runs() && task.attempt == 1, "{task:?}");
    }
    let kinds = cluster.broker.kinds("hog");
    assert!(!kinds.contains(&DecisionKind::Evicted) && !kinds.contains(&DecisionKind::Shrunk), "{kinds:?}");
    check_settled(&cluster, &[("hog", Expect::Running)]);
}

#[test]
fn a_hog_beside_one_with_priority_is_shrunk_then_evicted_and_waits_and_both_are_told_why() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &[NODE]);
    let watch = Watch::begin(&cluster);
    cluster.broker.apply(POLICY);
    cluster.submit("hog", 0.4, "low", Load::Spin);
    cluster.wait_until_counts("hog");
    eventually("the hog has grown", || granted(&cluster, "hog") > 0.9);
    // It asks for half of the node, and wants all of it: more than the hog's request leaves.
    cluster.submit("service", 0.5, "high", Load::Spin);
    let waits = cluster.broker.wait_until(
        "hog",
        "evicted and pending",
        |task| matches!(&task.phase, ClusterPhase::Pending { reason } if reason.contains("evicted it")),
    );
    let ClusterPhase::Pending { reason } = &waits.phase else { unreachable!("it was waited for") };
    assert!(reason.contains("n1 evicted it") && reason.contains("for 1 s"), "{reason}");
    check(&cluster);
    let service = cluster.broker.task("service");
    assert!(service.runs() && service.attempt == 1, "{service:?}");

    let story = cluster.broker.decisions("hog");
    let (shrunk, evicted) = (first(&story, DecisionKind::Shrunk), first(&story, DecisionKind::Evicted));
    assert!(shrunk.at < evicted.at, "{story:#?}");
    assert!(shrunk.by == "n1" && evicted.by == "n1", "{story:#?}");
    let placed = first(&cluster.broker.decisions("service"), DecisionKind::Placed).at;
    let waited = Duration::from_nanos(evicted.at - placed);
    assert!(waited >= SECOND, "evicted {waited:?} after the service came: the press had no window");
    assert!(evicted.reason.contains("services") && evicted.reason.contains("`service.1`"), "{story:#?}");
    let pressed =
        story.iter().any(|it| it.kind == DecisionKind::Shrunk && it.reason.contains("threshold 50 %"));
    assert!(pressed, "nothing was shrunk for the policy: {story:#?}");
    for kind in [DecisionKind::Grew, DecisionKind::Shrunk, DecisionKind::Evicted] {
        assert!(has_numbers(first(&story, kind)), "{story:#?}");
    }
    let text = cluster.broker.shaper().ok(&["explain", "hog"]);
    for word in ["placed", "grew", "shrunk", "evicted", "pending", "cores"] {
        assert!(text.contains(word), "no {word} in:\n{text}");
    }

    eventually("the service has grown", || granted(&cluster, "service") > 0.55);
    let story = cluster.broker.decisions("service");
    assert!(has_numbers(first(&story, DecisionKind::Grew)), "{story:#?}");
    assert!(cluster.broker.shaper().ok(&["explain", "service"]).contains("grew"));

    // After its backoff it has a second attempt, on the same node, which is the only one.
    let again = cluster.broker.wait_until("hog", "placed again", |task| task.attempt == 2);
    assert_eq!(again.node.as_deref(), Some("n1"));
    let backoff = cluster.broker.decisions("hog");
    let placed =
        backoff.iter().filter(|it| it.kind == DecisionKind::Placed).nth(1).expect("a second attempt");
    let pending = first(&backoff, DecisionKind::Pending);
    let waited = Duration::from_nanos(placed.at - pending.at);
    assert!(waited >= SECOND * 9 / 10, "placed again after {waited:?}");
    for id in ["hog", "service"] {
        cluster.broker.shaper().ok(&["cancel", id, "--now"]);
    }
    check_settled(&cluster, &[("hog", Expect::Cancelled), ("service", Expect::Cancelled)]);
    watch.end();
}

#[test]
fn a_task_grows_within_three_seconds_and_gives_back_when_one_with_priority_comes() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &[NODE]);
    cluster.submit("batch", 0.2, "low", Load::Spin);
    let began = Instant::now();
    cluster.wait_until_counts("batch");
    eventually("batch has grown", || granted(&cluster, "batch") >= 0.5);
    let took = began.elapsed();
    assert!(took < 3 * SECOND, "it took {took:?} to grow from 0.2 to 0.5 cores");
    eventually("batch has all", || granted(&cluster, "batch") > 0.9);
    let alone = used(&cluster, "batch");
    assert!(alone > 0.6, "{alone} cores alone");

    cluster.submit("service", 0.6, "high", Load::Spin);
    wait_until_began(&cluster, "service");
    eventually("batch has given back", || granted(&cluster, "batch") <= 0.41);
    eventually("the service has its request", || granted(&cluster, "service") >= 0.6);
    let (batch, service) = (used(&cluster, "batch"), used(&cluster, "service"));
    assert!(batch < 0.45 && service > 0.5, "batch uses {batch} cores, the service {service}");
    let sum = granted(&cluster, "batch") + granted(&cluster, "service");
    assert!(sum <= 1.001, "{sum} cores are granted of 1");
    let story = cluster.broker.decisions("batch");
    assert!(has_numbers(first(&story, DecisionKind::Grew)), "{story:#?}");
    assert!(has_numbers(first(&story, DecisionKind::Shrunk)), "{story:#?}");
    check_settled(&cluster, &[("batch", Expect::Running), ("service", Expect::Running)]);
}

#[test]
fn a_task_that_is_evicted_while_its_node_is_cut_off_is_not_lost() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &[NODE]);
    cluster.broker.apply(POLICY);
    cluster.submit("hog", 0.4, "low", Load::Spin);
    cluster.wait_until_counts("hog");
    let hog = cluster.agents[0].process(&cluster.agents[0].shaper().get("hog"));
    cluster.submit("service", 0.5, "high", Load::Spin);
    cluster.wait_until_runs("service");
    cluster.cuts[0].cut();
    hog.wait_for_end();
    eventually("the agent says that it evicted the hog", || {
        cluster.agents[0].said().contains("kind=evicted")
    });
    cluster.cuts[0].mend();
    let task = cluster.broker.wait_until("hog", "waiting or placed again", |task| {
        task.attempt == 2 || task.is_pending() || task.ended().is_some()
    });
    assert_ne!(task.ended(), Some(&ExitStatus::Signal(15)), "{:#?}", cluster.broker.decisions("hog"));
}
