//! GPU cards, booked one by one.

use shaper_core::{
    gpu::{CardOffer, CardRequest, CardSet},
    spec::{DecisionKind, Priority, TaskSpec},
    task::{ExitStatus, Phase as RunPhase},
    units::Bytes,
};

use super::{
    tests::{Broker, GIB, OPERATOR, SECOND, USER, hello, id, policy, spec, status},
    *,
};

fn cards(numbers: &str) -> CardSet {
    numbers.parse().unwrap()
}

/// A node of 16 cores with these cards of 80 GiB.
fn with_cards(node: &str, model: &str, numbers: &str) -> Box<Hello> {
    let mut hello = hello(node, "boot", 16_000, Vec::new());
    hello.capacity.gpu_memory = Some(Bytes(80 * GIB));
    hello.gpus = CardOffer { model: model.into(), cards: cards(numbers) };
    hello
}

/// A task that shares a card.
fn share(task: &str, gib: u64, priority: Priority) -> TaskSpec {
    let mut spec = spec(task, 500, priority, 0);
    spec.profile.demand.gpu_memory = Some(Bytes(gib * GIB));
    spec
}

/// A task that has cards to itself.
fn whole(task: &str, count: u32, model: &str, priority: Priority) -> TaskSpec {
    let gpus = CardRequest { count, model: model.into() };
    TaskSpec { gpus, ..spec(task, 500, priority, 0) }
}

/// The tasks that nodes are told to start, and their cards.
fn starts(effects: &[Effect]) -> Vec<(String, String)> {
    let starts = effects.iter().filter_map(|effect| match effect {
        Effect::Direct(_, directive) => match &directive.kind {
            DirectiveKind::Start(_, cards) => Some((directive.execution.to_string(), cards.to_string())),
            _ => None,
        },
        _ => None,
    });
    starts.collect()
}

fn start(execution: &str, cards: &str) -> Vec<(String, String)> {
    vec![(execution.into(), cards.into())]
}

/// What a node lacks for a task that waits.
fn lacks(broker: &Broker, task: &str, node: &str) -> Vec<String> {
    let decisions = query::explain(&broker.state, &OPERATOR, &id(task), broker.now).unwrap();
    let latest = decisions.iter().rfind(|decision| decision.kind == DecisionKind::Pending).unwrap();
    latest.nodes.iter().find(|verdict| verdict.node == node).unwrap().lacking.clone()
}

fn reason(broker: &Broker, task: &str) -> String {
    broker.state.tasks[&id(task)].decisions.back().map(|decision| decision.reason.clone()).unwrap()
}

fn ended(broker: &mut Broker, session: SessionId, task: &str, generation: u64) -> Vec<Effect> {
    let status = status(task, 1, RunPhase::Ended { status: ExitStatus::Code(0), at: SECOND });
    broker.on(Event::TaskReport {
        session,
        report: Box::new(NodeTask { status, generation, evicted: false, lease_over: false, request: None }),
    })
}

fn running(broker: &Broker, task: &str) -> NodeTask {
    NodeTask {
        status: status(task, 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: Some(*broker.task(task).demand()),
    }
}

#[test]
fn memory_is_that_of_one_card() {
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(with_cards("n1", "A100", "0,1"));
    assert_eq!(starts(&broker.submit(share("a", 40, Priority::Low))), start("a.1", "0"));
    assert_eq!(starts(&broker.submit(share("b", 40, Priority::Low))), start("b.1", "0"));
    assert_eq!(starts(&broker.submit(share("c", 40, Priority::Low))), start("c.1", "1"));
    assert_eq!(reason(&broker, "c"), "attempt 1 on n1, card 1");
    assert_eq!(broker.state.nodes["n1"].reserved_in_all().gpu_memory, Some(Bytes(120 * GIB)));
    // There are 60 GiB, but not on one card.
    broker.submit(share("d", 60, Priority::Low));
    assert!(matches!(&broker.task("d").phase, Phase::Pending { reason, .. } if reason.contains("room")));
    assert_eq!(lacks(&broker, "d", "n1"), ["gpu_memory: 60 GiB wanted, 40 GiB of 80 GiB free on one card"]);
    assert_eq!(starts(&ended(&mut broker, n1, "a", 1)), []);
    assert_eq!(starts(&ended(&mut broker, n1, "b", 1)), start("d.1", "0"));
    assert_eq!(broker.task("a").cards, CardSet::NONE);
    // No card has so much.
    broker.submit(share("e", 81, Priority::Low));
    assert!(matches!(&broker.task("e").phase, Phase::Pending { reason, .. } if reason.contains("empty")));
    assert_eq!(lacks(&broker, "e", "n1"), ["gpu_memory: 81 GiB wanted, a card has 80 GiB"]);
}

#[test]
fn a_card_is_shared_or_somebodys_own() {
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(with_cards("n1", "A100", "0,1,2"));
    assert_eq!(starts(&broker.submit(share("s", 10, Priority::Low))), start("s.1", "0"));
    assert_eq!(starts(&broker.submit(whole("w", 2, "", Priority::Low))), start("w.1", "1,2"));
    assert_eq!(reason(&broker, "w"), "attempt 1 on n1, cards 1,2");
    assert_eq!(broker.state.nodes["n1"].reserved_in_all().gpu_memory, Some(Bytes(170 * GIB)));
    broker.submit(whole("x", 1, "", Priority::Low));
    assert_eq!(lacks(&broker, "x", "n1"), ["gpus: 1 wanted, 0 of 3 free"]);
    assert_eq!(starts(&broker.submit(share("t", 10, Priority::Low))), start("t.1", "0"));
    broker.submit(share("u", 75, Priority::Low));
    assert_eq!(lacks(&broker, "u", "n1"), ["gpu_memory: 75 GiB wanted, 60 GiB of 80 GiB free on one card"]);
    // Memory of cards of its own is what they have in all.
    let mut large = whole("large", 1, "", Priority::Low);
    large.profile.demand.gpu_memory = Some(Bytes(81 * GIB));
    broker.submit(large);
    assert_eq!(lacks(&broker, "large", "n1")[0], "gpu_memory: 81 GiB wanted, a card has 80 GiB");
    let effects = ended(&mut broker, n1, "w", 1);
    assert_eq!(starts(&effects), [start("x.1", "1"), start("u.1", "2")].concat());
    // Who asks for no card has none.
    assert_eq!(starts(&broker.submit(spec("plain", 500, Priority::Low, 0))), start("plain.1", "none"));
}

#[test]
fn a_model_is_part_of_a_name() {
    let mut broker = Broker::new();
    broker.connect(with_cards("n1", "NVIDIA A100-SXM4-80GB", "0"));
    // It says how much memory a card has, and offers none.
    let mut silent = hello("n0", "boot", 16_000, Vec::new());
    silent.capacity.gpu_memory = Some(Bytes(80 * GIB));
    broker.connect(silent);
    broker.submit(whole("w", 1, "H100", Priority::Low));
    let of_model = |task: &str| {
        let mut spec = share(task, 10, Priority::Low);
        spec.gpus.model = "H100".into();
        spec
    };
    broker.submit(of_model("s"));
    assert_eq!(
        lacks(&broker, "w", "n1"),
        ["gpu model: `H100` wanted, this node has `NVIDIA A100-SXM4-80GB`"]
    );
    assert_eq!(lacks(&broker, "w", "n0"), ["gpus: 1 wanted, none here"]);
    assert_eq!(lacks(&broker, "s", "n0"), ["gpu_memory: 10 GiB wanted, none here"]);
    assert_eq!(starts(&broker.submit(whole("a", 1, "A100", Priority::Low))), start("a.1", "0"));
    let (_, effects) = broker.connect(with_cards("n2", "NVIDIA H100 80GB HBM3", "0,1"));
    assert_eq!(starts(&effects), [start("w.1", "0"), start("s.1", "1")].concat());
    assert_eq!(broker.task("s").phase.node(), Some("n2"));
    // Whoever wants no card minds no model.
    let mut plain = spec("plain", 500, Priority::Low, 0);
    plain.gpus.model = "H200".into();
    assert_eq!(starts(&broker.submit(plain)), start("plain.1", "none"));
    let mut plain = spec("large", 16_000, Priority::High, 0);
    plain.gpus.model = "H200".into();
    let policy = Box::new(policy("services", Priority::High, true));
    broker.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
    broker.submit(plain);
    assert!(matches!(broker.task("large").phase, Phase::Nominated { .. }));
}

#[test]
fn a_new_broker_has_the_same_books_and_says_the_same() {
    let mut broker = Broker::new();
    broker.connect(with_cards("n1", "A100", "0,1,2,3"));
    for spec in [share("a", 50, Priority::Low), share("b", 50, Priority::Low)] {
        broker.submit(spec);
    }
    broker.submit(whole("w", 2, "", Priority::Low));
    let mut rows = vec![Row::Node("n1".into())];
    for task in ["a", "b", "w"] {
        let sequence = broker.task(task).sequence();
        rows.extend([Row::Submission { sequence, task: id(task) }, Row::Run { sequence, task: id(task) }]);
    }
    let rows: Vec<_> = rows.iter().map(|row| broker.state.row(row)).collect();
    let again =
        State::load(rows.iter().map(|row| (row.key.as_bytes(), row.value.as_deref().unwrap()))).unwrap();
    assert_eq!(again.nodes["n1"].cards, broker.state.nodes["n1"].cards);
    assert_eq!(again.nodes["n1"].row, broker.state.nodes["n1"].row);

    let mut later = Broker::new();
    later.state = again;
    begin(&mut later.state);
    let (_, effects) = later.connect(with_cards("n1", "A100", "0,1,2,3"));
    let same = [start("a.1", "0"), start("b.1", "1"), start("w.1", "2,3")].concat();
    assert_eq!(starts(&effects), same);
    later.submit(whole("x", 1, "", Priority::Low));
    assert_eq!(lacks(&later, "x", "n1"), ["gpus: 1 wanted, 0 of 4 free"]);
}

#[test]
fn the_card_of_a_victim_is_kept_for_whom_it_ends() {
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(with_cards("n1", "A100", "0,1"));
    let apply = |broker: &mut Broker| {
        let policy = Box::new(policy("services", Priority::High, true));
        broker.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
    };
    apply(&mut broker);
    // Without a card, it would free none.
    broker.submit(spec("idle", 500, Priority::Low, 0));
    broker.submit(share("a", 60, Priority::Low));
    broker.submit(share("b", 60, Priority::Medium));
    for task in ["idle", "a", "b"] {
        broker.report(n1, task, 1, RunPhase::Running);
    }
    assert_eq!((broker.task("a").cards, broker.task("b").cards), (cards("0"), cards("1")));
    broker.submit(share("web", 30, Priority::High));
    assert_eq!(broker.task("web").phase, Phase::Nominated { node: "n1".into() });
    assert_eq!((broker.task("a").preempted, broker.task("web").cards), (Some(2), cards("0")));
    // Nobody else takes that card meanwhile, and what ends beside it is not what was promised.
    broker.submit(share("small", 40, Priority::Low));
    assert_eq!(
        lacks(&broker, "small", "n1"),
        ["gpu_memory: 40 GiB wanted, 20 GiB of 80 GiB free on one card"]
    );
    assert_eq!(starts(&ended(&mut broker, n1, "b", 1)), start("small.1", "1"));
    assert_eq!(starts(&ended(&mut broker, n1, "a", 2)), start("web.1", "0"));
    assert_eq!(reason(&broker, "web"), "attempt 1 on n1, card 0, which was cleared for it");

    // Both cards whole: all who share one go.
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(with_cards("n1", "A100", "0,1"));
    apply(&mut broker);
    for (task, gib) in [("a", 60), ("b", 20), ("c", 60)] {
        broker.submit(share(task, gib, Priority::Low));
        broker.report(n1, task, 1, RunPhase::Running);
    }
    broker.submit(whole("web", 1, "H100", Priority::High));
    assert!(matches!(broker.task("web").phase, Phase::Pending { .. }), "nobody ends for another model");
    broker.on(Event::Cancel { caller: USER, task: id("web"), grace_millis: 0 });
    broker.submit(whole("both", 2, "A100", Priority::High));
    assert_eq!(broker.task("both").cards, cards("0,1"));
    ended(&mut broker, n1, "a", 2);
    ended(&mut broker, n1, "c", 2);
    assert!(matches!(broker.task("both").phase, Phase::Nominated { .. }), "b is still there");
    assert_eq!(starts(&ended(&mut broker, n1, "b", 2))[..1], start("both.1", "0,1"));
}

#[test]
fn a_card_that_is_not_offered_any_more_takes_nobody() {
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(with_cards("n1", "A100", "0,1"));
    broker.submit(share("a", 20, Priority::Low));
    broker.report(n1, "a", 1, RunPhase::Running);
    broker.submit(share("b", 70, Priority::Low));
    broker.report(n1, "b", 1, RunPhase::Running);
    // It was told to start, and never did.
    broker.submit(share("lost", 60, Priority::Low));
    assert_eq!(broker.task("lost").cards, cards("0"));
    broker.on(Event::AgentGone { session: n1 });
    let inventory = vec![running(&broker, "a"), running(&broker, "b")];
    let hello = |numbers: &str| {
        Box::new(Hello { inventory: inventory.clone(), ..*with_cards("n1", "A100", numbers) })
    };

    let (n1, effects) = broker.connect(hello("1"));
    assert_eq!(starts(&effects), [], "card 0 is gone");
    assert_eq!(
        (broker.task("a").cards, broker.task("b").cards),
        (cards("0"), cards("1")),
        "who runs keeps it"
    );
    assert!(matches!(broker.task("lost").phase, Phase::Pending { .. }));
    assert_eq!(broker.task("lost").retries_used, 0);
    assert_eq!(
        lacks(&broker, "lost", "n1"),
        ["gpu_memory: 60 GiB wanted, 10 GiB of 80 GiB free on one card"]
    );
    assert_eq!(starts(&broker.submit(share("small", 10, Priority::Low))), start("small.1", "1"));
    broker.report(n1, "small", 1, RunPhase::Running);
    broker.on(Event::AgentGone { session: n1 });

    // It is back, and one more with it; numbers that placement does not know are not used.
    let mut more = hello("0,1,3,16,40");
    more.inventory.push(running(&broker, "small"));
    let (n1, effects) = broker.connect(more);
    assert_eq!(starts(&effects), start("lost.2", "0"));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Warn(why) if why.contains("below 16"))));
    assert_eq!(broker.state.nodes["n1"].row.gpus.cards, cards("0,1,3"));
    assert_eq!(starts(&broker.submit(whole("w", 1, "", Priority::Low))), start("w.1", "3"), "2 is not there");
    broker.submit(whole("x", 1, "", Priority::Low));
    assert_eq!(lacks(&broker, "x", "n1"), ["gpus: 1 wanted, 0 of 3 free"]);
    // What was on the card is off the books with its end, also if it was away meanwhile.
    assert_eq!(starts(&ended(&mut broker, n1, "a", 1)), []);
    let taken = broker.state.nodes["n1"].cards.of(0);
    assert_eq!((taken.shares, taken.memory), (1, Bytes(60 * GIB)));
}
