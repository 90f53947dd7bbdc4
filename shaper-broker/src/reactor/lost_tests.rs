//! Nodes that do not answer.

use shaper_core::{
    spec::{DecisionKind, Priority},
    task::Phase as RunPhase,
};

use super::{
    tests::{Broker, OPERATOR, USER, directives, hello, id, spec, status},
    *,
};

/// The answer to an operator.
fn fence(broker: &mut Broker, node: &str) -> Result<Answer, Refusal> {
    let effects = broker.on(Event::FenceNode { caller: OPERATOR, node: node.into() });
    let answer = effects.into_iter().find_map(|effect| match effect {
        Effect::Answer(answer) => Some(answer),
        _ => None,
    });
    answer.unwrap()
}

/// A task that runs on n1, which is then silent.
fn lost() -> Broker {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.report(n1, "t", 1, RunPhase::Running);
    broker.on(Event::AgentGone { session: n1 });
    broker
}

#[test]
fn a_task_waits_for_its_node_until_that_is_said_to_be_dead() {
    let mut broker = lost();
    let n2 = broker.node("n2", 4000);
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
    let still = NodeTask { status: status("t", 1, RunPhase::Running), generation: 1, evicted: false };
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
