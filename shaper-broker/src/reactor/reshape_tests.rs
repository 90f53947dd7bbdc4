//! What is reserved comes down, so that another task has room.

use shaper_core::{
    limits::Limit,
    policy::PolicyFloors,
    spec::{DecisionKind, Demand, Policy, Priority},
    task::{ExitStatus, Phase as RunPhase, Usage},
    units::{Bytes, Millicores},
};

use super::{
    state::{Asked, Setback},
    tests::{Broker, GIB, OPERATOR, SECOND, directives, hello, id, policy, spec, status},
    *,
};

/// A node of four cores with `a` (1 core, low), `b` (2 cores, low) and `c` (1 core, medium), each with a GiB.
fn full() -> (Broker, SessionId) {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    for (task, cpu, priority) in
        [("a", 1000, Priority::Low), ("b", 2000, Priority::Low), ("c", 1000, Priority::Medium)]
    {
        broker.submit(spec(task, cpu, priority, 0));
        broker.report(n1, task, 1, RunPhase::Running);
    }
    (broker, n1)
}

fn floors(priority: Priority, cpu: Option<u64>, memory: Option<u64>) -> Policy {
    let floors = PolicyFloors { cpu: cpu.map(Millicores), memory: memory.map(Bytes) };
    let eviction_threshold_permille = None;
    Policy { floors, eviction_threshold_permille, ..policy(&format!("{priority}-floors"), priority, false) }
}

fn apply(broker: &mut Broker, policy: Policy) -> Vec<Effect> {
    let (caller, within) = (OPERATOR, Vec::new());
    broker.on(Event::ApplyPolicy { caller, within, policy: Box::new(policy) })
}

/// The node tells for 20 seconds that a task uses so much, with a request that is what is booked.
fn uses(broker: &mut Broker, session: SessionId, task: &str, millicores: u64, memory: u64) {
    let request = *broker.task(task).request();
    let (from, generation) = (broker.now / SECOND, broker.task(task).generation);
    for second in from..=from + 20 {
        tell(broker, session, task, second, millicores, memory, request, generation);
    }
}

#[allow(clippy::too_many_arguments, reason = "what a report says")]
fn tell(
    broker: &mut Broker,
    session: SessionId,
    task: &str,
    second: u64,
    millicores: u64,
    memory: u64,
    request: Demand,
    generation: u64,
) -> Vec<Effect> {
    let usage = Usage {
        at_monotonic_ns: second * SECOND,
        cpu_time_ns: second * millicores * 1_000_000,
        memory_bytes: Some(memory),
        ..Usage::default()
    };
    let status = TaskStatus { usage, ..status(task, 1, RunPhase::Running) };
    let request = Some(request);
    let report = NodeTask { status, generation, evicted: false, lease_over: false, request };
    broker.on(Event::TaskReport { session, report: Box::new(report) })
}

/// The node has done what it was asked for.
fn does(broker: &mut Broker, session: SessionId, task: &str) -> Vec<Effect> {
    let Some(Asked { request, generation, .. }) =
        broker.task(task).resized.as_ref().and_then(|it| it.asked.clone())
    else {
        panic!("nothing was asked of `{task}`");
    };
    let status = status(task, 1, RunPhase::Running);
    let report = NodeTask { status, generation, evicted: false, lease_over: false, request: Some(request) };
    let execution = ExecutionId { task: id(task), attempt: 1 };
    let outcome = DirectiveOutcome::Settled(Box::new(report));
    broker.on(Event::DirectiveResult { session, result: DirectiveResult { execution, generation, outcome } })
}

fn refuses(broker: &mut Broker, session: SessionId, task: &str) -> Vec<Effect> {
    let generation = broker.task(task).resized.as_ref().and_then(|it| it.asked.as_ref()).unwrap().generation;
    let execution = ExecutionId { task: id(task), attempt: 1 };
    let outcome = DirectiveOutcome::Refused("it uses 3.0 GiB".into());
    broker.on(Event::DirectiveResult { session, result: DirectiveResult { execution, generation, outcome } })
}

fn asked(effects: &[Effect]) -> Vec<(String, u64, u64)> {
    let asked = effects.iter().filter_map(|effect| match effect {
        Effect::Direct(_, directive) => match &directive.kind {
            DirectiveKind::Resize { request, .. } => {
                Some((directive.execution.to_string(), request.cpu.0, request.memory.0 / (GIB / 1024)))
            }
            _ => None,
        },
        _ => None,
    });
    asked.collect()
}

fn last(broker: &Broker, task: &str) -> (DecisionKind, String) {
    let decision = broker.state.tasks[&id(task)].decisions.back().unwrap();
    (decision.kind, decision.reason.clone())
}

fn reserved(broker: &Broker, node: &str) -> u64 {
    broker.state.nodes[node].reserved.cpu.0
}

#[test]
fn what_is_reserved_comes_down_and_nobody_ends_and_it_goes_back() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(500), None));
    // Who preempts would find victims, too.
    apply(&mut broker, policy("services", Priority::High, true));
    uses(&mut broker, n1, "a", 900, GIB / 2);
    uses(&mut broker, n1, "b", 1900, GIB / 2);
    let effects = broker.submit(spec("web", 1200, Priority::High, 0));
    // Of a lower priority also what it uses; `b` alone is enough.
    assert_eq!(asked(&effects), [("b.1".into(), 800, 1024)]);
    assert_eq!(directives(&effects), [("resize", "b.1".into(), 2)], "nobody ends");
    assert_eq!(broker.task("web").phase, Phase::Nominated { node: "n1".into() });
    let (_, reason) = last(&broker, "web");
    assert_eq!(reason, "n1 was asked to reserve less for `b` (2 → 0.8 cores, by policy `low-floors`)");
    assert_eq!(reserved(&broker, "n1"), 5200, "what the node has not confirmed is not free");
    // What it says meanwhile of the time before changes nothing.
    let before = *broker.task("b").demand();
    assert_eq!(directives(&tell(&mut broker, n1, "b", 22, 1900, GIB / 2, before, 1)), []);

    let effects = does(&mut broker, n1, "b");
    assert_eq!(directives(&effects), [("start", "web.1".into(), 1)]);
    assert_eq!(reserved(&broker, "n1"), 4000);
    assert_eq!(broker.task("b").request().cpu, Millicores(800));
    let (kind, reason) = last(&broker, "b");
    assert_eq!(kind, DecisionKind::Shrunk);
    assert_eq!(
        reason,
        "less is reserved for it (2 → 0.8 cores) to make room for `web` of priority high, by policy `low-floors`"
    );
    broker.report(n1, "web", 1, RunPhase::Running);

    // When there is room again it has what it asked for.
    let at = broker.now;
    let effects = broker.report(n1, "web", 1, RunPhase::Ended { status: ExitStatus::Code(0), at });
    assert_eq!(asked(&effects), [("b.1".into(), 2000, 1024)]);
    assert_eq!(reserved(&broker, "n1"), 4000, "booked before the node has it");
    does(&mut broker, n1, "b");
    assert_eq!(broker.task("b").resized, None);
    assert_eq!(last(&broker, "b").0, DecisionKind::Grew);
    assert_eq!(broker.state.tally.preemptions, 0);
}

#[test]
fn without_floors_or_of_a_higher_priority_nothing_comes_down() {
    let (mut broker, n1) = full();
    for task in ["a", "b", "c"] {
        uses(&mut broker, n1, task, 10, GIB / 16);
    }
    assert_eq!(directives(&broker.submit(spec("web", 500, Priority::High, 0))), []);
    // Those that wait are looked at when policies change.
    let effects = apply(&mut broker, floors(Priority::Medium, Some(100), None));
    assert_eq!(asked(&effects), [("c.1".into(), 500, 1024)]);
    does(&mut broker, n1, "c");
    assert_eq!(directives(&broker.submit(spec("low", 300, Priority::Low, 0))), [], "`c` is of a higher one");
}

#[test]
fn for_their_own_priority_tasks_give_what_they_do_not_use() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(100), None));
    assert_eq!(
        directives(&broker.submit(spec("early", 100, Priority::Low, 0))),
        [],
        "nothing is known of their use"
    );
    broker.on(Event::Cancel { caller: OPERATOR, task: id("early"), grace_millis: 0 });
    uses(&mut broker, n1, "a", 950, GIB / 2);
    uses(&mut broker, n1, "b", 700, GIB / 2);
    // 0.7 and a seventh is 0.8.
    assert_eq!(directives(&broker.submit(spec("more", 1210, Priority::Low, 0))), []);
    broker.on(Event::Cancel { caller: OPERATOR, task: id("more"), grace_millis: 0 });
    assert_eq!(asked(&broker.submit(spec("most", 1200, Priority::Low, 0))), [("b.1".into(), 800, 1024)]);
}

#[test]
fn memory_comes_down_to_what_is_used_and_not_where_its_owner_limits_it() {
    let mut broker = Broker::new();
    let (n1, _) = broker.connect(hello("n1", "boot", 8000, Vec::new()));
    let large = |task: &str, limited: bool| {
        let mut spec = spec(task, 1000, Priority::Low, 0);
        spec.profile.demand.memory = Bytes(32 * GIB);
        if limited {
            spec.limits.memory = Limit::At(Bytes(40 * GIB));
        }
        spec
    };
    for (task, limited) in [("a", false), ("b", true)] {
        broker.submit(large(task, limited));
        broker.report(n1, task, 1, RunPhase::Running);
        uses(&mut broker, n1, task, 500, 8 * GIB);
    }
    apply(&mut broker, floors(Priority::Low, None, Some(GIB)));
    let mut high = spec("high", 1000, Priority::High, 0);
    high.profile.demand.memory = Bytes(23 * GIB + 1);
    // 8 GiB and an eighth stay, whatever the floor.
    assert_eq!(directives(&broker.submit(high.clone())), []);
    broker.on(Event::Cancel { caller: OPERATOR, task: id("high"), grace_millis: 0 });
    high.profile.task_id = id("fits");
    high.profile.demand.memory = Bytes(23 * GIB);
    assert_eq!(asked(&broker.submit(high)), [("a.1".into(), 1000, 9 * 1024)]);
}

#[test]
fn a_node_that_will_not_is_left_alone_and_then_asked_again() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(500), None));
    uses(&mut broker, n1, "b", 300, GIB / 2);
    broker.submit(spec("web", 1200, Priority::High, 0));
    let effects = refuses(&mut broker, n1, "b");
    assert_eq!(directives(&effects), []);
    assert!(matches!(broker.task("web").phase, Phase::Pending { .. }));
    assert_eq!(broker.task("web").avoid.iter().map(|it| it.why).collect::<Vec<_>>(), [Setback::Refused]);
    let decisions = &broker.state.tasks[&id("web")].decisions;
    let told = "n1 did not change what is reserved for `b`: it uses 3.0 GiB";
    assert!(decisions.iter().any(|decision| decision.reason == told), "{decisions:?}");
    assert_eq!((reserved(&broker, "n1"), broker.task("b").request().cpu.0), (4000, 2000));
    broker.now += 61 * SECOND;
    assert_eq!(asked(&broker.on(Event::Tick)), [("b.1".into(), 800, 1024)]);
}

#[test]
fn use_that_falls_is_noticed_within_seconds() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(100), None));
    uses(&mut broker, n1, "b", 1900, GIB / 2);
    assert_eq!(next_wakeup(&broker.state), None, "nobody waits");
    broker.submit(spec("next", 1000, Priority::Low, 0));
    assert!(next_wakeup(&broker.state).is_some());
    broker.now += 200 * SECOND;
    for second in 200..=340 {
        let request = *broker.task("b").demand();
        tell(&mut broker, n1, "b", second, 200, GIB / 2, request, 1);
    }
    assert_eq!(asked(&broker.on(Event::Tick)), [("b.1".into(), 1000, 1024)]);
}

#[test]
fn what_was_asked_is_asked_again_of_a_node_that_was_away_and_by_a_new_broker() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(500), None));
    uses(&mut broker, n1, "b", 300, GIB / 2);
    broker.submit(spec("web", 1200, Priority::High, 0));
    broker.on(Event::AgentGone { session: n1 });
    assert!(matches!(broker.task("web").phase, Phase::Pending { .. }));
    let sequence = broker.task("b").sequence();
    let rows = [
        Row::Submission { sequence, task: id("b") },
        Row::Run { sequence, task: id("b") },
        Row::Node("n1".into()),
    ];
    let rows = rows.map(|row| broker.state.row(&row));
    let again =
        State::load(rows.iter().map(|row| (row.key.as_bytes(), row.value.as_deref().unwrap()))).unwrap();
    assert_eq!(again.tasks[&id("b")].task.resized, broker.task("b").resized);
    assert_eq!(again.nodes["n1"].reserved.cpu, Millicores(2000));

    let inventory = ["a", "b", "c"].map(|task| {
        let request = Some(*broker.task(task).demand());
        let status = status(task, 1, RunPhase::Running);
        NodeTask { status, generation: 1, evicted: false, lease_over: false, request }
    });
    let (n1, effects) = broker.connect(hello("n1", "boot", 4000, inventory.into()));
    assert_eq!(directives(&effects), [("resize", "b.1".into(), 2)], "with the same numbers");
    assert_eq!(directives(&does(&mut broker, n1, "b")), [("start", "web.1".into(), 1)]);
    // Another attempt has what it asks for.
    let at = broker.now;
    broker.report(n1, "web", 1, RunPhase::Running);
    broker.report(n1, "b", 1, RunPhase::Ended { status: ExitStatus::Signal(9), at });
    assert_eq!(broker.task("b").resized, None);
}

#[test]
fn a_node_whose_books_differ_is_told_what_is_in_ours() {
    let (mut broker, n1) = full();
    let other = Demand { cpu: Millicores(300), ..*broker.task("b").demand() };
    assert_eq!(
        directives(&tell(&mut broker, n1, "b", 1, 100, GIB, other, 0)),
        [],
        "said before it was started"
    );
    assert_eq!(asked(&tell(&mut broker, n1, "b", 2, 100, GIB, other, 1)), [("b.1".into(), 2000, 1024)]);
    does(&mut broker, n1, "b");
    assert_eq!(broker.task("b").resized, None);
}

#[test]
fn what_a_node_would_not_give_back_it_is_asked_for_again() {
    let (mut broker, n1) = full();
    apply(&mut broker, floors(Priority::Low, Some(500), None));
    uses(&mut broker, n1, "b", 300, GIB / 2);
    broker.submit(spec("web", 1200, Priority::High, 0));
    does(&mut broker, n1, "b");
    let at = broker.now;
    let lowered = *broker.task("b").request();
    broker.report(n1, "web", 1, RunPhase::Ended { status: ExitStatus::Code(0), at });
    let generation = broker.task("b").generation;
    refuses(&mut broker, n1, "b");
    assert_eq!(directives(&tell(&mut broker, n1, "b", 30, 300, GIB / 2, lowered, generation - 1)), []);
    broker.now += 61 * SECOND;
    let effects = tell(&mut broker, n1, "b", 91, 300, GIB / 2, lowered, generation - 1);
    assert_eq!(asked(&effects), [("b.1".into(), 2000, 1024)]);
    does(&mut broker, n1, "b");
    assert_eq!((broker.task("b").resized.as_ref(), broker.state.nodes["n1"].lowered), (None, 0));
}

#[test]
fn use_that_falls_is_noticed_for_those_who_may_preempt_too() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("a", 4000, Priority::High, 0));
    broker.report(n1, "a", 1, RunPhase::Running);
    apply(&mut broker, floors(Priority::High, Some(100), None));
    apply(&mut broker, policy("services", Priority::High, true));
    uses(&mut broker, n1, "a", 3900, GIB / 2);
    assert_eq!(directives(&broker.submit(spec("web", 2000, Priority::High, 0))), []);
    assert!(next_wakeup(&broker.state).is_some());
    broker.now += 200 * SECOND;
    for second in 500..=640 {
        let request = *broker.task("a").demand();
        tell(&mut broker, n1, "a", second, 200, GIB / 2, request, 1);
    }
    assert_eq!(asked(&broker.on(Event::Tick)), [("a.1".into(), 2000, 1024)]);
}
