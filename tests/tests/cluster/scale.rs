//! Nodes that are asked for, come, and are given back: a real broker and real agents, and a provider that speaks the published
//! protocol.

use shaper_core::{spec::DecisionKind, task::ExitStatus};
use shaper_tests::{
    broker::Broker,
    checker::{Watch, check, wait_until_began},
    cluster::{Cluster, Load, networks},
    provider::{Manner, Provider, Wish},
    time::eventually,
};
use tempfile::TempDir;

const NODE: &str = "cpu=1,memory=1Gi";

/// A broker that has the nodes of that provider started and ended, and where it is told so.
fn broker(provider: &Provider, fields: &str) -> (Broker, TempDir) {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let file = directory.path().join("scale.yaml");
    std::fs::write(&file, provider.document(fields)).expect("a file can be made");
    (Broker::start_with(&["--scale", file.to_str().expect("it is text")]), directory)
}

fn scale(broker: &Broker) -> serde_json::Value {
    let text = broker.shaper().ok(&["get", "scale", "--output", "json"]);
    let scale: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    scale["groups"][0].clone()
}

/// The latest word about a task that waits.
fn why(broker: &Broker, task: &str) -> String {
    let last = broker.decisions(task).pop().expect("something was decided");
    assert_eq!(last.kind, DecisionKind::ScaleOut);
    last.reason
}

#[test]
fn a_burst_has_exactly_the_nodes_started_that_it_takes_and_they_go_when_nothing_runs_there() {
    let networks = networks(3);
    let provider = Provider::start(&["n1"]);
    let fields = "capacity: {cpu_cores: 1, memory_gb: 1}\n  min: 1\n  max: 5\n  idle_seconds: 2";
    let (broker, _directory) = broker(&provider, fields);
    let mut cluster = Cluster::start_of(broker, &networks[..1], &[NODE]);
    let watch = Watch::begin(&cluster);
    cluster.submit("stays", 0.6, "medium", Load::Until(0));
    cluster.wait_until_runs("stays");
    // What fits beside it asks for nothing.
    cluster.submit("small", 0.4, "medium", Load::Until(0));
    cluster.wait_until_runs("small");
    // Of these, two fit on a node.
    for id in ["b1", "b2", "b3"] {
        cluster.submit(id, 0.5, "medium", Load::Until(0));
    }
    assert_eq!(provider.wish(), Wish::Start(2));
    eventually("it is known that two are coming", || scale(&cluster.broker)["coming"] == 2);
    eventually("it is told to who waits", || {
        why(&cluster.broker, "b3")
            == "of 3 tasks that ask for this, 3 fit on nodes of `workers` that are coming"
    });
    for network in &networks[1..] {
        cluster.join(network, NODE);
        provider.started(&format!("n{}", cluster.agents.len()));
    }
    for id in ["b1", "b2", "b3"] {
        cluster.wait_until_runs(id);
        wait_until_began(&cluster, id);
    }
    check(&cluster);
    assert_eq!((provider.unheard(), provider.target()), (Vec::new(), 3));

    for id in ["b1", "b2", "b3", "small"] {
        cluster.let_end(id);
        cluster.broker.wait_until(id, "over", |task| task.ended().is_some());
    }
    for _ in 0..2 {
        let Wish::End(node) = provider.wish() else { panic!("a node is given back") };
        assert_ne!(node, "n1", "a task runs there");
        let position = node[1..].parse::<usize>().expect("n and a number") - 1;
        cluster.agents[position].kill9();
        eventually("the node is forgotten", || cluster.broker.nodes().iter().all(|it| it.name != node));
    }
    eventually("the group is as small as before", || scale(&cluster.broker)["target"] == 1);
    assert_eq!(provider.target(), 1);
    let nodes: Vec<_> =
        cluster.broker.nodes().into_iter().map(|node| (node.name, node.cordoned_by)).collect();
    assert_eq!(nodes, [("n1".to_owned(), None)]);
    // The agents of the nodes that went cannot be asked any more.
    let stays = cluster.broker.task("stays");
    assert!(stays.runs() && stays.attempt == 1, "{stays:?}");
    for id in ["b1", "b2", "b3", "small"] {
        assert_eq!(cluster.broker.task(id).ended(), Some(&ExitStatus::Code(0)), "{id}");
    }
    watch.end();
}

#[test]
fn a_provider_that_hangs_refuses_or_brings_nothing_is_told_and_nothing_is_asked_twice() {
    let networks = networks(2);
    let provider = Provider::start(&[]);
    let fields =
        "capacity: {cpu_cores: 1, memory_gb: 1}\n  max: 2\n  timeout_seconds: 20\n  provision_seconds: 3";
    let (broker, _directory) = broker(&provider, fields);
    let mut cluster = Cluster::start_of(broker, &[], &[]);
    // It does what it is asked and does not say so, and then the broker dies.
    provider.behave(Manner { hangs: true, ..Manner::default() });
    cluster.submit("first", 1.0, "medium", Load::Until(0));
    assert_eq!(provider.wish(), Wish::Start(1));
    cluster.broker.kill9();
    provider.behave(Manner::default());
    cluster.broker.restart();
    eventually("the broker knows that it is coming", || scale(&cluster.broker)["coming"] == 1);
    assert_eq!((provider.unheard(), provider.target()), (Vec::new(), 1), "it was asked once");

    // It does not come in time: it is not waited for, and another is asked for after a rest.
    assert_eq!(provider.wish(), Wish::Withdraw(1));
    eventually("it is told what is wrong", || {
        scale(&cluster.broker)["problem"] == "1 of the nodes that were asked for did not come within 3 s"
    });
    eventually("it is told to who waits", || {
        why(&cluster.broker, "first").contains("`workers`: it is left alone for a while after a failure")
    });
    let table = cluster.broker.shaper().ok(&["get", "scale"]);
    assert!(table.contains("Resting for") && table.contains("1 task wait for 1 cores"), "{table}");

    // When it comes all the same, the task runs, and what was wrong is forgotten.
    cluster.join(&networks[0], NODE);
    provider.started("n1");
    cluster.wait_until_runs("first");
    wait_until_began(&cluster, "first");
    eventually("nothing is wrong", || scale(&cluster.broker)["problem"].is_null());

    provider.behave(Manner { refuses: Some("out of quota".into()), ..Manner::default() });
    cluster.submit("second", 1.0, "medium", Load::Until(0));
    eventually("it is told that it refuses", || {
        let problem = scale(&cluster.broker)["problem"].as_str().unwrap_or_default().to_owned();
        problem.contains("NodeGroupIncreaseSize: out of quota (ResourceExhausted)")
    });
    // What could never be is told with the numbers.
    cluster.submit("large", 4.0, "medium", Load::Until(0));
    eventually("it is told that no node would do", || {
        why(&cluster.broker, "large").contains("its nodes are too small: cpu: 4 cores wanted, 1 of 1 free")
    });
    check(&cluster);
    cluster.let_end("first");
    cluster.wait_until_runs("second");
    wait_until_began(&cluster, "second");
    check(&cluster);
    assert_eq!(provider.unheard(), []);
}

#[test]
fn a_node_is_drained_as_was_said_before_and_removed() {
    let networks = networks(2);
    let mut cluster = Cluster::start(&networks, &[NODE; 2]);
    for id in ["a", "b"] {
        cluster.submit(id, 0.4, "medium", Load::Until(0));
        cluster.wait_until_runs(id);
        wait_until_began(&cluster, id);
    }
    let shaper = cluster.broker.shaper();
    let node = cluster.broker.task("a").node.expect("it runs");
    let other = if node == "n1" { "n2" } else { "n1" };
    let said = shaper.ok(&["node", "drain", "--dry-run", &node]);
    assert!(
        said.contains(other) && said.contains("would be drained of 1 task, 0 of which fit nowhere else"),
        "{said}"
    );
    assert!(cluster.broker.task("a").node.as_ref() == Some(&node));
    shaper.ok(&["node", "drain", &node]);
    let moved = cluster
        .broker
        .wait_until("a", "elsewhere", |task| task.runs() && task.node.as_deref() == Some(other));
    assert_eq!(moved.attempt, 2);
    wait_until_began(&cluster, "a");
    check(&cluster);
    cluster.submit("c", 0.4, "medium", Load::Until(0));
    assert!(cluster.broker.task("c").is_pending());
    let position = node[1..].parse::<usize>().expect("n and a number") - 1;
    let refused = shaper.call(&["node", "remove", &node]);
    assert!(refused.code == 2 && refused.stderr.contains("answers: stop its agent first"), "{refused:?}");
    shaper.ok(&["node", "uncordon", &node]);
    cluster.wait_until_runs("c");
    shaper.ok(&["node", "drain", &node]);
    cluster.broker.wait_until("c", "nowhere", |task| task.is_pending());
    cluster.agents[position].kill9();
    cluster.broker.wait_for_node(&node, false);
    shaper.ok(&["node", "remove", &node]);
    assert_eq!(cluster.broker.nodes().len(), 1);
}
