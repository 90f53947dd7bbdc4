//! Nodes that are asked for and given back.

use shaper_core::{
    place::NOTHING,
    scale::{Group, Observed, Order, OrderKind, Provider, Scaling},
    spec::{Capacity, DecisionKind, Priority},
    task::{ExitStatus, Phase as RunPhase},
    units::{Bytes, Millicores},
};

use super::{
    tests::{Broker, GIB, OPERATOR, SECOND, hello, id, policy, spec, status},
    *,
};

fn group(name: &str, nodes: &str, cpu: u64) -> Group {
    Group {
        name: name.into(),
        nodes: nodes.parse().unwrap(),
        capacity: Some(Capacity { cpu: Millicores(cpu), memory: Bytes(64 * GIB), ..NOTHING }),
        min: 0,
        max: 4,
        cooldown: 30 * SECOND,
        provision: 300 * SECOND,
        idle: Some(60 * SECOND),
        timeout: SECOND,
        provider: Provider::Keda,
    }
}

fn broker(groups: Vec<Group>) -> Broker {
    let mut broker = Broker::new();
    broker.state.scale.scaling = Scaling { settle: 10 * SECOND, groups };
    broker
}

/// So many seconds pass; what was asked.
fn pass(broker: &mut Broker, seconds: u64) -> Vec<(String, Order)> {
    let mut asked = Vec::new();
    for _ in 0..seconds {
        broker.now += SECOND;
        asked.extend(orders(broker.on(Event::Scale(ScaleEvent::Look))));
    }
    asked
}

fn orders(effects: Vec<Effect>) -> Vec<(String, Order)> {
    let orders = effects.into_iter().filter_map(|effect| match effect {
        Effect::Scale { group, order } => Some((group, *order)),
        _ => None,
    });
    orders.collect()
}

fn done(broker: &mut Broker, group: &str, number: u64, outcome: Result<Option<u32>, &str>) {
    let (group, outcome) = (group.to_owned(), outcome.map_err(str::to_owned));
    broker.on(Event::Scale(ScaleEvent::Done { group, number, outcome }));
}

fn why(broker: &Broker, task: &str) -> String {
    let decisions = query::explain(&broker.state, &OPERATOR, &id(task), broker.now).unwrap();
    let last = decisions.last().unwrap();
    assert_eq!(last.kind, DecisionKind::ScaleOut);
    last.reason.clone()
}

fn end(broker: &mut Broker, session: SessionId, task: &str) {
    let phase = RunPhase::Ended { status: ExitStatus::Code(0), at: broker.now };
    let report = NodeTask {
        status: status(task, 1, phase),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    };
    broker.on(Event::TaskReport { session, report: Box::new(report) });
}

#[test]
fn what_fits_nowhere_for_long_has_exactly_the_nodes_asked_for_that_it_takes() {
    let mut broker = broker(vec![group("workers", "w*", 4000)]);
    broker.node("fixed", 1000);
    for number in 0..5 {
        broker.submit(spec(&format!("t{number}"), 2000, Priority::Medium, 0));
    }
    assert_eq!(why(&broker, "t0"), "nodes are asked for once it has fitted nowhere for 10 s");
    assert_eq!(pass(&mut broker, 10), []);
    let asked = pass(&mut broker, 1);
    let [(name, order)] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!((name.as_str(), order.number, order.target), ("workers", 1, 3));
    let OrderKind::Grow { by: 3, wants } = &order.kind else { panic!("{order:?}") };
    assert_eq!((wants[0].tasks, wants[0].first.len(), wants[0].demand.cpu.0), (5, 5, 2000));
    assert_eq!(
        why(&broker, "t4"),
        "of 5 tasks that ask for this, 5 would fit on more nodes of `workers`, of which 3 are wanted"
    );
    assert_eq!(pass(&mut broker, 100), [], "it was asked");
    done(&mut broker, "workers", 1, Ok(None));
    pass(&mut broker, 1);
    assert_eq!(
        why(&broker, "t4"),
        "of 5 tasks that ask for this, 5 fit on nodes of `workers` that are coming"
    );
    let nodes: Vec<_> = ["w1", "w2", "w3"].map(|node| broker.node(node, 4000)).into();
    assert!((0..5).all(|number| matches!(broker.task(&format!("t{number}")).phase, Phase::Starting { .. })));
    assert_eq!(pass(&mut broker, 40), []);

    // A minute after the last has ended they go, one after the other, and are forgotten.
    for number in 0..5 {
        let (task, node) = (format!("t{number}"), broker.task(&format!("t{number}")).node.clone().unwrap());
        let session = nodes[node[1..].parse::<usize>().unwrap() - 1];
        broker.report(session, &task, 1, RunPhase::Running);
        end(&mut broker, session, &task);
    }
    let mut gone = Vec::new();
    while broker.state.nodes.len() > 1 {
        let asked = pass(&mut broker, 1);
        let Some((_, Order { number, kind: OrderKind::Remove { node }, .. })) = asked.first() else {
            assert!(broker.now < 1000 * SECOND, "{:?}", broker.state.scale.standings);
            continue;
        };
        assert!(!broker.state.nodes[node].takes_work());
        done(&mut broker, "workers", *number, Ok(None));
        let session = broker.state.nodes[node].session.unwrap();
        broker.on(Event::AgentGone { session });
        gone.push(node.clone());
    }
    gone.sort();
    assert_eq!(gone, ["w1", "w2", "w3"]);
    let standing = &broker.state.scale.standings["workers"];
    assert_eq!((standing.target, standing.leaving.len()), (Some(0), 0));
    assert_eq!(broker.state.registered, [Some("fixed".to_owned())]);
}

#[test]
fn what_room_can_be_made_for_adds_no_node() {
    let mut broker = broker(vec![group("workers", "w*", 4000)]);
    let w1 = broker.node("w1", 4000);
    broker.submit(spec("batch", 4000, Priority::Low, 0));
    broker.report(w1, "batch", 1, RunPhase::Running);
    let policy = Box::new(policy("services", Priority::High, true));
    broker.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
    broker.submit(spec("web", 2000, Priority::High, 0));
    assert!(matches!(broker.task("web").phase, Phase::Nominated { .. }));
    assert_eq!(pass(&mut broker, 60), [], "nobody waits for a node");
    // Who had to go for it does, and has one.
    let phase = RunPhase::Ended { status: ExitStatus::Signal(15), at: broker.now };
    let report = NodeTask {
        status: status("batch", 1, phase),
        generation: 2,
        evicted: false,
        lease_over: false,
        request: None,
    };
    broker.on(Event::TaskReport { session: w1, report: Box::new(report) });
    let asked = loop {
        broker.on(Event::Tick);
        let asked = pass(&mut broker, 1);
        if !asked.is_empty() {
            break asked;
        }
    };
    assert_eq!(asked[0].1.target, 2);
}

#[test]
fn where_one_group_fails_another_is_asked_and_all_say_why() {
    let big = Group {
        capacity: Some(Capacity { cpu: Millicores(16_000), memory: Bytes(64 * GIB), ..NOTHING }),
        ..group("big", "b*", 0)
    };
    let mut broker = broker(vec![group("small", "s*", 1000), group("workers", "w*", 4000), big]);
    broker.submit(spec("t", 4000, Priority::Medium, 0));
    let asked = pass(&mut broker, 12);
    assert_eq!((asked.len(), asked[0].0.as_str()), (1, "workers"));
    done(&mut broker, "workers", 1, Err("no quota"));
    let asked = pass(&mut broker, 1);
    assert_eq!((asked.len(), asked[0].0.as_str()), (1, "big"));
    done(&mut broker, "big", 1, Err("no quota there either"));
    pass(&mut broker, 1);
    assert_eq!(
        why(&broker, "t"),
        "of 1 tasks that ask for this, 1 fit on no node that could be asked for (`small`: its nodes are too small: cpu: \
         4 cores wanted, 1 of 1 free; `workers`: it is left alone for a while after a failure; `big`: it is left alone \
         for a while after a failure)"
    );
}

#[test]
fn a_broker_that_takes_over_asks_again_and_nobody_is_asked_twice_for_more() {
    let mut broker = broker(vec![group("workers", "w*", 4000)]);
    broker.submit(spec("t", 4000, Priority::Medium, 0));
    let asked = pass(&mut broker, 12);
    let rows: Vec<_> = broker.state.scale.row("workers").into_iter().collect();
    assert_eq!(rows[0].standing.order.as_ref(), Some(&asked[0].1));
    let row = broker.state.row(&Row::Scale("workers".into()));
    let again = State::load([(row.key.as_bytes(), &row.value.unwrap()[..])]).unwrap();
    let mut later = self::broker(vec![group("workers", "w*", 4000)]);
    later.state.scale.standings = again.scale.standings;
    later.now = broker.now;
    assert_eq!(pass(&mut later, 5), asked, "the same order, once");
    // A row of a group that is not configured any more does nothing.
    later.state.scale.scaling.groups.clear();
    assert_eq!(pass(&mut later, 5), []);
    done(&mut later, "workers", 1, Ok(None));
    assert!(later.state.scale.standings["workers"].order.is_some());
}

#[test]
fn a_broker_that_has_just_begun_asks_for_those_that_it_found_waiting() {
    let mut before = broker(vec![group("workers", "w*", 4000)]);
    before.submit(spec("t", 4000, Priority::Medium, 0));
    let task = Row::Submission { sequence: 0, task: id("t") };
    let rows = [task, Row::Run { sequence: 0, task: id("t") }].map(|row| before.state.row(&row));
    let rows = rows.iter().map(|row| (row.key.as_bytes(), row.value.as_deref().unwrap()));
    let mut later = broker(vec![group("workers", "w*", 4000)]);
    let scaling = later.state.scale.scaling.clone();
    later.state = State::load(rows).unwrap();
    later.state.scale.scaling = scaling;
    assert_eq!(pass(&mut later, 13).len(), 1, "without a node that connects");
}

#[test]
fn nodes_smaller_than_was_said_do_not_come_without_end() {
    let mut broker = broker(vec![group("workers", "w*", 4000)]);
    broker.submit(spec("t", 4000, Priority::Medium, 0));
    let asked = pass(&mut broker, 12);
    assert_eq!(asked.len(), 1);
    done(&mut broker, "workers", 1, Ok(None));
    broker.connect(hello("w1", "boot", 2000, Vec::new()));
    assert!(matches!(broker.task("t").phase, Phase::Pending { .. }));
    let asked = pass(&mut broker, 50);
    assert_eq!(asked, [], "one more would be as small");
    assert!(
        why(&broker, "t").contains("its nodes are too small: cpu: 4 cores wanted, 2 of 2 free"),
        "{}",
        why(&broker, "t")
    );
}

#[test]
fn a_provider_that_tells_is_believed_and_what_it_would_not_end_takes_tasks_again() {
    let address = "http://x".into();
    let provider = Provider::ExternalGrpc { address, group: "g".into(), ca: None, identity: None };
    let mut broker = broker(vec![Group { provider, capacity: None, ..group("workers", "w*", 4000) }]);
    broker.submit(spec("t", 4000, Priority::Medium, 0));
    assert_eq!(pass(&mut broker, 12), [], "nobody knows how large it is, nor what its nodes have");
    assert!(why(&broker, "t").contains("what its nodes have is not known"), "{}", why(&broker, "t"));
    let name = || "workers".to_owned();
    let capacity = Capacity { cpu: Millicores(4000), memory: Bytes(8 * GIB), ..NOTHING };
    broker.on(Event::Scale(ScaleEvent::Template { group: name(), capacity }));
    let observed = Ok(Observed { target: 1, errors: Vec::new() });
    broker.on(Event::Scale(ScaleEvent::Observed { group: name(), observed }));
    assert_eq!(pass(&mut broker, 2), [], "one is coming already");
    broker.node("w1", 4000);
    let session = broker.state.nodes["w1"].session.unwrap();
    broker.report(session, "t", 1, RunPhase::Running);
    end(&mut broker, session, "t");
    let asked = pass(&mut broker, 70);
    let [(_, Order { number, kind: OrderKind::Remove { .. }, .. })] = asked[..] else { panic!("{asked:?}") };
    done(&mut broker, "workers", number, Err("it is protected"));
    assert!(!broker.state.nodes["w1"].takes_work());
    pass(&mut broker, 1);
    assert!(broker.state.nodes["w1"].takes_work());
}

#[test]
fn a_node_whose_tasks_fit_elsewhere_is_named_and_what_is_drained_is_given_back() {
    let mut broker = broker(vec![group("workers", "w*", 4000)]);
    let sessions: Vec<_> = ["w1", "w2"].map(|node| broker.node(node, 4000)).into();
    for (task, cpu) in [("a", 1000), ("b", 2000)] {
        broker.submit(spec(task, cpu, Priority::Medium, 0));
        let node = broker.task(task).node.clone().unwrap();
        let session = sessions[if node == "w1" { 0 } else { 1 }];
        broker.report(session, task, 1, RunPhase::Running);
    }
    let (of_a, of_b) = (broker.task("a").node.clone().unwrap(), broker.task("b").node.clone().unwrap());
    assert_ne!(of_a, of_b);
    pass(&mut broker, 1);
    let emptiable = |broker: &Broker| {
        let group = broker.state.scale_groups().next();
        group.and_then(|group| broker.state.emptiable(&group))
    };
    let named = emptiable(&broker).unwrap();
    assert_eq!((&named.node, named.tasks), (&of_a, 1), "of equals that with the least reserved");
    assert_eq!(named.goes_to.iter().collect::<Vec<_>>(), [&of_b]);
    broker.submit(spec("waits", 4000, Priority::Medium, 0));
    assert_eq!(emptiable(&broker), None, "not while somebody waits");
    broker.on(Event::Cancel { caller: OPERATOR, task: id("waits"), grace_millis: 0 });

    // Cordoned it is kept, drained it goes.
    let cordon = |wish| Event::CordonNode { caller: OPERATOR, node: of_a.clone(), wish };
    broker.on(cordon(NodeWish::Drained));
    let session = sessions[if of_a == "w1" { 0 } else { 1 }];
    let phase = RunPhase::Ended { status: ExitStatus::Signal(15), at: broker.now };
    let report = NodeTask {
        status: status("a", 1, phase),
        generation: 2,
        evicted: false,
        lease_over: false,
        request: None,
    };
    broker.on(Event::TaskReport { session, report: Box::new(report) });
    assert_eq!(broker.task("a").node.as_ref(), Some(&of_b));
    broker.on(cordon(NodeWish::Cordoned));
    assert_eq!(pass(&mut broker, 120), []);
    broker.on(cordon(NodeWish::Drained));
    let asked = pass(&mut broker, 62);
    let [(_, order)] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(order.kind, OrderKind::Remove { node: of_a.clone() });
    let cordon = broker.state.nodes[&of_a].row.cordon.as_ref().map(|cordon| cordon.by.as_str());
    assert_eq!(cordon, Some("uid 0"), "whoever drained it has said so");
    let wish = NodeWish::Open;
    let effects = broker.on(Event::CordonNode { caller: OPERATOR, node: of_a.clone(), wish });
    assert!(
        matches!(&effects[..], [Effect::Answer(Err(Refusal::NodeInUse { .. }))]),
        "it is about to end: {effects:?}"
    );
}
