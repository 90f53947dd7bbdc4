//! Nodes that take no tasks, give theirs away, and go.

use shaper_core::{
    spec::{DecisionKind, Priority, TaskSpec},
    task::{ExitStatus, Phase as RunPhase},
};

use super::{
    tests::{Broker, OPERATOR, SECOND, USER, directives, hello, id, policy, spec, status},
    *,
};

fn wish(broker: &mut Broker, node: &str, wish: NodeWish) -> Result<Answer, Refusal> {
    answer(&broker.on(Event::CordonNode { caller: OPERATOR, node: node.into(), wish }))
}

fn answer(effects: &[Effect]) -> Result<Answer, Refusal> {
    let mut answers = effects.iter().filter_map(|effect| match effect {
        Effect::Answer(answer) => Some(answer.clone()),
        _ => None,
    });
    answers.next_back().expect("who asks is answered")
}

fn remove(broker: &mut Broker, node: &str) -> Result<Answer, Refusal> {
    answer(&broker.on(Event::RemoveNode { caller: OPERATOR, node: node.into() }))
}

/// Two nodes of four cores; on the first a task of a high and one of a low priority.
fn two() -> (Broker, SessionId, SessionId) {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    for (task, priority) in [("low", Priority::Low), ("high", Priority::High)] {
        broker.submit(spec(task, 2000, priority, 0));
        broker.report(n1, task, 1, RunPhase::Running);
    }
    let n2 = broker.node("n2", 3000);
    (broker, n1, n2)
}

#[test]
fn a_cordoned_node_keeps_what_it_has_and_takes_nothing() {
    let (mut broker, _, _) = two();
    wish(&mut broker, "n2", NodeWish::Cordoned).unwrap();
    let effects = broker.submit(spec("third", 1000, Priority::Low, 0));
    assert_eq!(directives(&effects), []);
    let verdicts = query::explain(&broker.state, &OPERATOR, &id("third"), 0).unwrap();
    let n2 = verdicts.iter().rfind(|it| it.kind == DecisionKind::Pending).unwrap().nodes[1].clone();
    assert_eq!((n2.score, &n2.lacking[..]), (None, &["it takes no tasks: cordoned by uid 0".to_owned()][..]));
    // It stays so when its agent comes back, and when the broker does.
    broker.connect(hello("n2", "boot", 3000, Vec::new()));
    assert!(!broker.state.nodes["n2"].takes_work());
    let effects = broker.on(Event::CordonNode { caller: OPERATOR, node: "n2".into(), wish: NodeWish::Open });
    assert_eq!(directives(&effects), [("start", "third.1".into(), 1)]);
}

#[test]
fn containers_are_placed_and_make_room_only_where_they_are_run() {
    let runs_them =
        |node: &str| Box::new(Hello { containers: true, ..*hello(node, "boot", 2000, Vec::new()) });
    let image =
        |task: &str, priority| TaskSpec { image: "redis:7".parse().ok(), ..spec(task, 2000, priority, 0) };
    let mut broker = Broker::new();
    // The better node, and the only one on which somebody of a low priority could end.
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("batch", 3000, Priority::Low, 0));
    broker.report(n1, "batch", 1, RunPhase::Running);
    let policy = Box::new(policy("services", Priority::High, true));
    broker.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
    let effects = broker.submit(image("first", Priority::High));
    assert_eq!(directives(&effects), []);
    let explained = query::explain(&broker.state, &OPERATOR, &id("first"), 0).unwrap();
    let n1 = explained.iter().rfind(|it| it.kind == DecisionKind::Pending).unwrap().nodes[0].clone();
    assert!(n1.lacking.iter().any(|it| it.starts_with("containers: ")), "{n1:?}");

    let (_, effects) = broker.connect(runs_them("n2"));
    assert_eq!(directives(&effects), [("start", "first.1".into(), 1)]);
    assert_eq!(broker.state.tasks[&id("first")].task.phase.node(), Some("n2"));
    // A node says so anew with each session.
    let effects = broker.submit(image("second", Priority::Low));
    assert_eq!(directives(&effects), []);
    broker.connect(hello("n3", "boot", 2000, Vec::new()));
    assert_eq!(broker.state.tasks[&id("second")].task.phase.node(), None);
    let (_, effects) = broker.connect(runs_them("n3"));
    assert_eq!(directives(&effects), [("start", "second.1".into(), 1)]);
}

#[test]
fn the_tasks_of_a_drained_node_end_and_go_elsewhere() {
    let (mut broker, n1, _) = two();
    let Ok(Answer::Leaves(leaves)) = wish(&mut broker, "n1", NodeWish::Drained) else {
        panic!("it is drained")
    };
    let told: Vec<_> = leaves.iter().map(|it| (it.task.to_string(), it.goes_to.as_deref())).collect();
    assert_eq!(told, [("high".to_owned(), Some("n2")), ("low".to_owned(), None)], "n2 has three cores");
    assert_eq!(broker.kinds("high"), [DecisionKind::Placed, DecisionKind::Evicted]);
    let mut ended = |task: &str| {
        let status = status(task, 1, RunPhase::Ended { status: ExitStatus::Signal(15), at: SECOND });
        let report =
            Box::new(NodeTask { status, generation: 2, evicted: false, lease_over: false, request: None });
        directives(&broker.on(Event::TaskReport { session: n1, report }))
    };
    assert_eq!(ended("high"), [("forget", "high.1".into(), 3), ("start", "high.2".into(), 4)]);
    assert_eq!(ended("low"), [("forget", "low.1".into(), 3)]);
    assert_eq!((broker.task("high").node.as_deref(), broker.task("low").retries_used), (Some("n2"), 0));
}

#[test]
fn what_was_to_be_drained_while_it_was_away_is_drained_when_it_is_back() {
    let (mut broker, n1, n2) = two();
    broker.on(Event::AgentGone { session: n2 });
    broker.on(Event::AgentGone { session: n1 });
    wish(&mut broker, "n1", NodeWish::Drained).unwrap();
    let inventory = ["low", "high"].map(|task| NodeTask {
        status: status(task, 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    });
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, inventory.into()));
    let mut told = directives(&effects);
    told.sort();
    assert_eq!(told, [("stop", "high.1".into(), 2), ("stop", "low.1".into(), 2)]);
}

#[test]
fn only_the_operator_says_so_and_only_what_is_gone_is_removed() {
    let (mut broker, n1, _) = two();
    let denied = broker.on(Event::RemoveNode { caller: USER, node: "n1".into() });
    assert_eq!(answer(&denied), Err(Refusal::Denied(Denied::Nodes)));
    let wish = NodeWish::Cordoned;
    let denied = broker.on(Event::CordonNode { caller: USER, node: "n1".into(), wish });
    assert_eq!(answer(&denied), Err(Refusal::Denied(Denied::Nodes)));
    assert_eq!(remove(&mut broker, "n9"), Err(Refusal::NoSuchNode("n9".into())));
    let why = |refused: Result<Answer, Refusal>| refused.unwrap_err().to_string();
    assert!(why(remove(&mut broker, "n1")).contains("answers: stop its agent first"));
    broker.on(Event::AgentGone { session: n1 });
    assert!(why(remove(&mut broker, "n1")).contains("still has 2 tasks"));
    broker.on(Event::FenceNode { caller: OPERATOR, node: "n1".into() });
    remove(&mut broker, "n1").unwrap();
    assert!(!broker.state.nodes.contains_key("n1"));
}

#[test]
fn gaps_in_the_order_are_filled_and_do_not_pile_up() {
    let mut broker = Broker::new();
    let order = |broker: &Broker, node: &str| broker.state.nodes[node].row.order;
    let nodes: Vec<_> = (0..100).map(|number| format!("n{number}")).collect();
    let sessions: Vec<_> = nodes.iter().map(|node| broker.node(node, 1000)).collect();
    for (node, session) in nodes.iter().zip(&sessions).take(3) {
        broker.on(Event::AgentGone { session: *session });
        remove(&mut broker, node).unwrap();
    }
    broker.submit(spec("a", 1000, Priority::Low, 0));
    assert_eq!(broker.task("a").node.as_deref(), Some("n3"), "the first that is there");
    broker.node("new", 1000);
    assert_eq!(order(&broker, "new"), 0);
    broker.submit(spec("b", 1000, Priority::Low, 0));
    assert_eq!(broker.task("b").node.as_deref(), Some("new"));
    check_rows(&broker);
    for (node, session) in nodes.iter().zip(&sessions).skip(4).take(95) {
        broker.on(Event::AgentGone { session: *session });
        remove(&mut broker, node).unwrap();
    }
    let moved_up = order(&broker, "n99");
    assert!(broker.state.nodes.len() == 3 && moved_up < nodes::most_places(3) as u64, "{moved_up}");
    check_rows(&broker);
    broker.submit(spec("c", 1000, Priority::Low, 0));
    assert_eq!(broker.task("c").node.as_deref(), Some("n99"));
}

/// The rows make the same order.
fn check_rows(broker: &Broker) {
    let state = &broker.state;
    let nodes = state.nodes.keys().map(|name| state.row(&Row::Node(name.clone())));
    let rows: Vec<_> = nodes.map(|row| (row.key, row.value.unwrap())).collect();
    let again = State::load(rows.iter().map(|(key, value)| (key.as_bytes(), &value[..]))).unwrap();
    assert_eq!(again.registered, state.registered);
}
