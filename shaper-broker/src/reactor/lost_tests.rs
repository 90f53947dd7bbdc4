//! Nodes that do not answer.

use shaper_core::{
    spec::{DecisionKind, OnNodeLost, Priority},
    task::{ExitStatus, Phase as RunPhase},
};

use super::{
    tests::{Broker, OPERATOR, SECOND, USER, directives, hello, id, spec, status},
    *,
};

fn rerun(task: &str) -> TaskSpec {
    TaskSpec { on_node_lost: OnNodeLost::Rerun, ..spec(task, 1000, Priority::Low, 0) }
}

/// The answer to an operator.
fn fence(broker: &mut Broker, node: &str) -> Result<Answer, Refusal> {
    let effects = broker.on(Event::FenceNode { caller: OPERATOR, node: node.into() });
    let answer = effects.into_iter().find_map(|effect| match effect {
        Effect::Answer(answer) => Some(answer),
        _ => None,
    });
    answer.unwrap()
}

/// A task that runs on n1, which asks for the last time after 10 s, and is silent after 12 s.
fn lost_with(spec: TaskSpec) -> Broker {
    let mut broker = Broker::new();
    broker.state.bounds.task_lease_seconds = 60;
    let n1 = broker.node("n1", 4000);
    broker.submit(spec);
    broker.report(n1, "t", 1, RunPhase::Running);
    broker.state.uptime = 10 * SECOND;
    broker.on(Event::Contact { session: n1, number: 1 });
    broker.state.uptime = 12 * SECOND;
    broker.on(Event::AgentGone { session: n1 });
    broker
}

fn lost() -> Broker {
    lost_with(spec("t", 1000, Priority::Low, 0))
}

/// So many seconds after its start.
fn at(broker: &mut Broker, seconds: u64) -> Vec<Effect> {
    broker.state.uptime = seconds * SECOND;
    broker.on(Event::Tick)
}

#[test]
fn a_task_waits_for_its_node_until_that_is_said_to_be_dead() {
    let mut broker = lost();
    let n2 = broker.node("n2", 4000);
    assert_eq!(next_rerun(&broker.state), None);
    at(&mut broker, 1_000_000);
    assert!(matches!(&broker.task("t").phase, Phase::Running { node } if node == "n1"));
    let reason = &broker.state.tasks[&id("t")].decisions.back().unwrap().reason;
    assert!(reason.contains("`shaper node fence n1`"), "{reason}");

    let effects = broker.on(Event::FenceNode { caller: USER, node: "n1".into() });
    assert!(effects.contains(&Effect::Answer(Err(Refusal::Denied(Denied::Fence)))));
    assert_eq!(fence(&mut broker, "n3"), Err(Refusal::NoSuchNode("n3".into())));
    assert_eq!(fence(&mut broker, "n2"), Err(Refusal::NodeAnswers("n2".into())));
    assert_eq!(fence(&mut broker, "n1"), Ok(Answer::Fenced(vec![id("t")])));
    let task = broker.task("t");
    assert!(matches!(&task.phase, Phase::Starting { node } if node == "n2"), "{:?}", task.phase);
    assert_eq!((task.attempt, task.retries_used), (2, 0));
    use DecisionKind::{Lost, Placed};
    assert_eq!(broker.kinds("t"), [Placed, Lost, Lost, Placed]);
    assert_eq!(fence(&mut broker, "n1"), Ok(Answer::Fenced(Vec::new())), "twice is once");

    // The operator was wrong: it is back, in the same boot, and still has it.
    broker.report(n2, "t", 2, RunPhase::Running);
    let still = NodeTask {
        status: status("t", 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    };
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, vec![still]));
    let directives = directives(&effects);
    assert!(matches!(&directives[..], [("stop", execution, _)] if execution == "t.1"), "{directives:?}");
    // It takes new work.
    broker.submit(spec("u", 4000, Priority::Low, 0));
    assert!(matches!(&broker.task("u").phase, Phase::Starting { node } if node == "n1"));
}

#[test]
fn what_was_to_end_on_a_dead_node_has_ended() {
    let mut broker = lost();
    broker.on(Event::Cancel { caller: USER, task: id("t"), grace_millis: 0 });
    fence(&mut broker, "n1").unwrap();
    assert_eq!(broker.task("t").phase, Phase::Cancelled);
}

#[test]
fn a_task_that_is_run_again_is_so_a_lease_and_a_half_after_the_last_question() {
    let mut broker = lost_with(rerun("t"));
    broker.node("n2", 4000);
    for seconds in [90, 99] {
        assert_eq!(directives(&at(&mut broker, seconds)), []);
        assert_eq!(next_rerun(&broker.state), Some(100 * SECOND));
    }
    assert!(matches!(&broker.task("t").phase, Phase::Running { node } if node == "n1"));
    let effects = at(&mut broker, 100);
    assert_eq!(directives(&effects), [("start", "t.2".into(), 2)]);
    assert_eq!(broker.task("t").retries_used, 0);
    let decisions = &broker.state.tasks[&id("t")].decisions;
    let reasons: Vec<_> = decisions.iter().map(|decision| decision.reason.as_str()).collect();
    assert!(reasons[1].contains("it ends the task 60 s after"), "{reasons:?}");
    assert!(reasons[2].contains("one and a half times the lease of 60 s"), "{reasons:?}");
    use DecisionKind::{Lost, Placed};
    assert_eq!(broker.kinds("t"), [Placed, Lost, Lost, Placed]);
    assert_eq!(next_rerun(&broker.state), Some(190 * SECOND), "on n2 it has a lease, too");
}

#[test]
fn who_is_connected_and_asks_no_more_is_silent_as_well() {
    let mut broker = Broker::new();
    broker.state.bounds.task_lease_seconds = 60;
    let n1 = broker.node("n1", 4000);
    broker.submit(rerun("t"));
    broker.report(n1, "t", 1, RunPhase::Running);
    broker.state.uptime = 50 * SECOND;
    broker.on(Event::Contact { session: n1, number: 1 });
    assert_eq!(
        at(&mut broker, 90),
        [],
        "from its placement a lease and a half are over, and it has asked since"
    );
    broker.node("n2", 4000);
    let effects = at(&mut broker, 140);
    assert!(matches!(&effects[0], Effect::Close(session, _) if *session == n1), "{effects:?}");
    assert_eq!(directives(&effects), [("start", "t.2".into(), 2)]);
    assert_eq!(broker.on(Event::Contact { session: n1, number: 2 }), [], "nobody counts on that any more");
}

#[test]
fn a_broker_that_begins_counts_from_its_start() {
    let mut broker = lost_with(rerun("t"));
    let State { nodes, tasks, .. } = &broker.state;
    let of_tasks = tasks.values().flat_map(|row| {
        let (sequence, task) = (row.task.sequence(), row.task.id().clone());
        [Row::Submission { sequence, task: task.clone() }, Row::Run { sequence, task }]
    });
    let rows: Vec<_> = nodes.keys().cloned().map(Row::Node).chain(of_tasks).collect();
    let rows: Vec<_> = rows.iter().map(|row| broker.state.row(row)).collect();
    let rows = rows.iter().map(|row| (row.key.as_bytes(), row.value.as_deref().unwrap()));
    broker.state = State::load(rows).unwrap();
    assert_eq!(next_rerun(&broker.state), Some(90 * SECOND));
    at(&mut broker, 89);
    assert!(broker.task("t").phase.node().is_some());
    at(&mut broker, 90);
    assert!(matches!(broker.task("t").phase, Phase::Pending { .. }));
}

#[test]
fn the_lease_of_a_task_is_what_it_was_when_that_was_submitted() {
    let mut broker = lost_with(rerun("t"));
    broker.state.bounds.task_lease_seconds = 10;
    at(&mut broker, 90);
    assert!(broker.task("t").phase.node().is_some());
    assert_eq!(next_rerun(&broker.state), Some(100 * SECOND));
}

#[test]
fn a_node_that_is_back_in_time_keeps_its_task_and_says_if_it_had_to_end_it() {
    let report = |phase, lease_over| NodeTask {
        status: status("t", 1, phase),
        generation: 1,
        evicted: false,
        lease_over,
        request: None,
    };
    let mut broker = lost_with(rerun("t"));
    broker.state.uptime = 90 * SECOND;
    let running = report(RunPhase::Running, false);
    let (n1, _) = broker.connect(hello("n1", "boot", 4000, vec![running]));
    at(&mut broker, 100);
    assert_eq!(broker.task("t").attempt, 1);

    let ended = RunPhase::Ended { status: ExitStatus::Signal(9), at: SECOND };
    let report = Box::new(report(ended, true));
    let effects = broker.on(Event::TaskReport { session: n1, report });
    let mut done = directives(&effects);
    done.sort();
    assert_eq!(done, [("forget", "t.1".into(), 2), ("start", "t.2".into(), 3)]);
    assert_eq!(broker.task("t").retries_used, 0);
}

#[test]
fn a_task_that_is_run_again_is_so_without_a_retry_if_its_node_was_started_anew() {
    let mut broker = lost_with(rerun("t"));
    let (_, effects) = broker.connect(hello("n1", "another boot", 4000, Vec::new()));
    assert_eq!(directives(&effects), [("start", "t.2".into(), 2)]);
}

#[test]
fn a_task_that_was_to_end_has_when_its_lease_is_over() {
    let mut broker = lost_with(rerun("t"));
    broker.on(Event::Cancel { caller: USER, task: id("t"), grace_millis: 0 });
    at(&mut broker, 100);
    assert_eq!(broker.task("t").phase, Phase::Cancelled);
    assert_eq!(next_rerun(&broker.state), None);
}

#[test]
fn the_broker_is_there_for_those_with_a_session() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    let ask = |session| Event::Contact { session, number: 7 };
    assert_eq!(broker.on(ask(n1)), [Effect::Contact(n1, 7)]);
    broker.on(Event::AgentGone { session: n1 });
    assert_eq!(broker.on(ask(n1)), []);
    let (again, _) = broker.connect(hello("n1", "boot", 4000, Vec::new()));
    assert_eq!(broker.on(ask(n1)), [], "the session before");
    assert_eq!(broker.on(ask(again)), [Effect::Contact(again, 7)]);
}
