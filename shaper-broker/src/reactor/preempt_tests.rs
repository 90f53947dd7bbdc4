//! Room that is made for a task.

use shaper_core::{
    spec::{DecisionKind, Policy, Priority},
    task::{ExitStatus, Phase as RunPhase},
};

use super::{
    state::Setback,
    tests::{Broker, OPERATOR, SECOND, USER, directives, hello, id, policy, spec, status},
    *,
};

/// A broker with one node of four cores, which low tasks use whole, and a policy for high ones.
fn full(preemption_enabled: bool) -> (Broker, SessionId) {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    for (task, cpu) in [("a", 1000), ("b", 2000), ("c", 1000)] {
        broker.submit(spec(task, cpu, Priority::Low, 0));
        broker.report(n1, task, 1, RunPhase::Running);
    }
    apply(&mut broker, policy("services", Priority::High, preemption_enabled));
    (broker, n1)
}

fn apply(broker: &mut Broker, policy: Policy) -> Vec<Effect> {
    let (caller, within) = (OPERATOR, Vec::new());
    broker.on(Event::ApplyPolicy { caller, within, policy: Box::new(policy) })
}

/// The node says that a task has ended, and which directive it has carried out for it.
fn ended(
    broker: &mut Broker,
    session: SessionId,
    task: &str,
    generation: u64,
    exit: ExitStatus,
) -> Vec<Effect> {
    let status = status(task, 1, RunPhase::Ended { status: exit, at: SECOND });
    broker.on(Event::TaskReport {
        session,
        report: Box::new(NodeTask { status, generation, evicted: false, lease_over: false, request: None }),
    })
}

fn nominated(node: &str) -> Phase {
    Phase::Nominated { node: node.into() }
}

fn starting(node: &str) -> Phase {
    Phase::Starting { node: node.into() }
}

#[test]
fn the_fewest_lower_tasks_end_and_their_place_is_kept() {
    let (mut broker, n1) = full(true);
    let effects = broker.submit(spec("web", 2000, Priority::High, 0));
    assert_eq!(directives(&effects), [("stop", "b.1".into(), 2)]);
    assert_eq!(broker.task("web").phase, nominated("n1"));
    assert_eq!(broker.kinds("b"), [DecisionKind::Placed, DecisionKind::Evicted]);
    let reason = |broker: &Broker, task: &str| {
        broker.state.tasks[&id(task)].decisions.back().map(|decision| decision.reason.clone()).unwrap()
    };
    assert_eq!(reason(&broker, "web"), "n1 is cleared for it by policy `services`: asked to end `b`");
    assert_eq!(
        reason(&broker, "b"),
        "to make room for `web` of priority high, by policy `services`: asked n1 to end it"
    );

    // Its place is nobody else's, also when something becomes free.
    let effects = ended(&mut broker, n1, "a", 1, ExitStatus::Code(0));
    assert_eq!(directives(&effects), [("forget", "a.1".into(), 2)], "b is still there");
    let effects = broker.submit(spec("small", 1000, Priority::Low, 0));
    assert_eq!(directives(&effects), [], "the node has promised more than it has");
    let effects = ended(&mut broker, n1, "b", 2, ExitStatus::Signal(15));
    let started = [("forget", "b.1".into(), 3), ("start", "web.1".into(), 1), ("start", "small.1".into(), 1)];
    assert_eq!(directives(&effects), started);
    assert_eq!(broker.task("web").phase, starting("n1"));
    assert_eq!(reason(&broker, "web"), "attempt 1 on n1, which was cleared for it");

    // The victim waits again, and has used no retry.
    let victim = broker.task("b");
    assert!(matches!(victim.phase, Phase::Pending { .. }), "{:?}", victim.phase);
    assert_eq!((victim.preempted, victim.retries_used), (None, 0));
    assert_eq!(victim.avoid.iter().map(|it| it.why).collect::<Vec<_>>(), [Setback::Evicted]);
}

#[test]
fn without_a_policy_that_says_so_nobody_ends() {
    let (mut broker, _) = full(false);
    let effects = broker.submit(spec("web", 2000, Priority::High, 0));
    assert_eq!(directives(&effects), []);
    assert!(matches!(&broker.task("web").phase, Phase::Pending { reason, .. } if reason.contains("no room")
        || reason.contains("has room")));
    // From when it is said, those that wait count as well.
    let effects = apply(&mut broker, policy("services", Priority::High, true));
    assert_eq!(directives(&effects), [("stop", "b.1".into(), 2)]);
    // Of its own priority nobody ends.
    let effects = broker.submit(spec("other", 4000, Priority::High, 0));
    assert_eq!(directives(&effects), []);
    let effects = broker.submit(spec("low", 1000, Priority::Low, 0));
    assert_eq!(directives(&effects), []);
}

#[test]
fn a_policy_of_a_user_ends_tasks_of_its_own_namespace() {
    let (mut broker, _) = full(false);
    let within = vec!["etl".to_owned()];
    let theirs = Policy { namespace: "etl".into(), ..policy("theirs", Priority::High, true) };
    broker.on(Event::ApplyPolicy { caller: USER, within, policy: Box::new(theirs) });
    let of = |task: &str, priority| TaskSpec { namespace: "etl".into(), ..spec(task, 1000, priority, 0) };
    let effects = broker.submit(of("high", Priority::High));
    assert_eq!(directives(&effects), [], "all who run are of another namespace");
    let n2 = broker.node("n2", 1000);
    assert_eq!(broker.task("high").phase, starting("n2"));
    broker.report(n2, "high", 1, RunPhase::Running);

    let mut broker = Broker::new();
    broker.node("n1", 1000);
    broker.submit(of("low", Priority::Low));
    let theirs = Policy { namespace: "etl".into(), ..policy("theirs", Priority::High, true) };
    let (caller, within) = (USER, vec!["etl".to_owned()]);
    broker.on(Event::ApplyPolicy { caller, within, policy: Box::new(theirs) });
    let effects = broker.submit(of("high", Priority::High));
    assert_eq!(directives(&effects), [("stop", "low.1".into(), 2)]);
}

#[test]
fn who_ends_by_itself_meanwhile_is_over() {
    let (mut broker, n1) = full(true);
    broker.submit(spec("web", 2000, Priority::High, 0));
    // Its node had not been asked when it ended.
    ended(&mut broker, n1, "b", 1, ExitStatus::Code(0));
    assert!(matches!(broker.task("b").phase, Phase::Ended { status: ExitStatus::Code(0), .. }));
    assert_eq!(broker.task("web").phase, starting("n1"));
}

#[test]
fn who_waits_for_a_place_may_be_cancelled() {
    let (mut broker, n1) = full(true);
    broker.submit(spec("web", 2000, Priority::High, 0));
    broker.on(Event::Cancel { caller: USER, task: id("web"), grace_millis: 0 });
    assert_eq!(broker.task("web").phase, Phase::Cancelled);
    ended(&mut broker, n1, "b", 2, ExitStatus::Signal(15));
    assert!(matches!(broker.task("b").phase, Phase::Pending { .. }));
    // It does not go back at once, but others may have the place.
    let effects = broker.submit(spec("next", 2000, Priority::Low, 0));
    assert_eq!(directives(&effects), [("start", "next.1".into(), 1)]);
}

#[test]
fn a_promise_ends_with_its_node_and_is_kept_over_sessions_of_the_victims() {
    let (mut broker, n1) = full(true);
    broker.submit(spec("web", 2000, Priority::High, 0));
    broker.on(Event::AgentGone { session: n1 });
    assert!(matches!(broker.task("web").phase, Phase::Pending { .. }));
    let n2 = broker.node("n2", 4000);
    assert_eq!(broker.task("web").phase, starting("n2"));
    broker.report(n2, "web", 1, RunPhase::Running);

    // The node of the victims is back: what it was asked for is asked again.
    let inventory = ["a", "b", "c"].map(|task| {
        let status = status(task, 1, RunPhase::Running);
        NodeTask { status, generation: 1, evicted: false, lease_over: false, request: None }
    });
    let (n1, effects) = broker.connect(hello("n1", "boot", 4000, inventory.into()));
    assert_eq!(directives(&effects), [("stop", "b.1".into(), 2)]);
    ended(&mut broker, n1, "b", 2, ExitStatus::Signal(15));
    assert_eq!(broker.task("b").phase, starting("n2"), "n1 is avoided for a while");
}

#[test]
fn a_new_broker_promises_anew() {
    let (mut broker, _) = full(true);
    broker.submit(spec("web", 2000, Priority::High, 0));
    let ids = ["a", "b", "c", "web"].map(id);
    let rows: Vec<_> = ids
        .into_iter()
        .flat_map(|task| {
            let sequence = broker.state.tasks[&task].task.sequence();
            [Row::Submission { sequence, task: task.clone() }, Row::Run { sequence, task }]
        })
        .chain([Row::Epoch, Row::Node("n1".into()), Row::Policy("services".into())])
        .map(|row| broker.state.row(&row))
        .collect();
    let bytes = rows.iter().map(|row| (row.key.as_bytes(), row.value.as_deref().unwrap()));
    let mut state = State::load(bytes).unwrap();
    assert_eq!(state.tasks[&id("web")].task.phase, nominated("n1"));
    let begun = begin(&mut state);
    assert_eq!(begun.rows.len(), 2, "the epoch and who is nominated");
    let phase = &state.tasks[&id("web")].task.phase;
    assert!(matches!(phase, Phase::Pending { reason, .. } if reason == "no node is connected"), "{phase:?}");
    assert_eq!(state.tasks[&id("b")].task.preempted, Some(2));
}

#[test]
fn a_node_that_will_not_end_a_victim_is_left_alone() {
    let (mut broker, n1) = full(true);
    broker.submit(spec("web", 2000, Priority::High, 0));
    let execution = ExecutionId { task: id("b"), attempt: 1 };
    let outcome = DirectiveOutcome::Refused("no".into());
    let result = DirectiveResult { execution, generation: 2, outcome };
    let effects = broker.on(Event::DirectiveResult { session: n1, result });
    assert_eq!(directives(&effects), []);
    assert!(matches!(broker.task("web").phase, Phase::Pending { .. }));
    assert_eq!(broker.task("b").preempted, None);
    let n2 = broker.node("n2", 4000);
    assert_eq!(broker.task("web").phase, starting("n2"));
    broker.report(n2, "web", 1, RunPhase::Running);
}
