//! What is reserved for running tasks comes down before anybody ends and before a node is asked for: a real broker, a real agent,
//! and a provider of nodes that speaks the published protocol.

use serde_json::{Value, json};
use shaper_core::{
    limits::Limit,
    spec::DecisionKind,
    units::{Bytes, Millicores},
};
use shaper_tests::{
    broker::{Broker, ClusterTask},
    checker::{Watch, check, wait_until_began},
    cluster::{Cluster, Load, networks},
    provider::{Provider, Wish},
    time::eventually,
};

const NODE: &str = "cpu=1,memory=1Gi";
const GIB: u64 = 1 << 30;
/// So much use is to be known of a task before what it does not use is taken: see `reactor/recent.rs`.
const KNOWN: u64 = 11_000_000_000;

const POLICIES: [&str; 2] = [
    "policy_name: batch\npriority: low\nfloors: {cpu: 0.1, memory_gb: 0.03}\n",
    // Who may have others ended, too, has less reserved for them first.
    "policy_name: services\npriority: high\nbehavior: {preemption_enabled: true}\n",
];

/// The spec of a task of nobody's with so much memory, GiB.
fn spec(cluster: &Cluster<'_>, id: &str, cores: f64, memory_gb: f64, priority: &str) -> String {
    let spec = cluster.spec(id, cores, priority, Load::Until(0));
    let mut spec: Value = serde_json::from_str(&spec).expect("it is JSON");
    spec["profile"]["resource_demand"]["memory_gb"] = json!(memory_gb);
    spec.to_string()
}

fn reserved(task: &ClusterTask) -> Option<(Millicores, Bytes)> {
    task.reserved.map(|reserved| (reserved.cpu, reserved.memory))
}

#[test]
fn a_burst_that_fits_when_less_is_reserved_ends_nobody_and_adds_no_node() {
    let networks = networks(1);
    let provider = Provider::start(&["n1"]);
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let file = directory.path().join("scale.yaml");
    let fields = "capacity: {cpu_cores: 1, memory_gb: 1}\n  min: 1\n  max: 3";
    std::fs::write(&file, provider.document(fields)).expect("a file can be made");
    let broker = Broker::start_with(&["--scale", file.to_str().expect("it is text")]);
    let mut cluster = Cluster::start_of(broker, &networks, &[NODE]);
    POLICIES.iter().for_each(|policy| cluster.broker.apply(policy));
    let watch = Watch::begin(&cluster);
    cluster.submit_spec("batch", &spec(&cluster, "batch", 0.8, 0.5, "low"));
    let began = cluster.wait_until_runs("batch").on_node.expect("it is there").usage.at_monotonic_ns;
    wait_until_began(&cluster, "batch");
    cluster.broker.wait_until("batch", "known", |task| {
        task.on_node.as_ref().is_some_and(|status| status.usage.at_monotonic_ns >= began + KNOWN)
    });

    cluster.submit_spec("service", &spec(&cluster, "service", 0.6, 0.625, "high"));
    cluster.wait_until_runs("service");
    wait_until_began(&cluster, "service");
    check(&cluster);
    // It has not waited for anything but the node's word.
    assert_eq!(cluster.broker.kinds("service"), [DecisionKind::Pending, DecisionKind::Placed]);
    assert_eq!((provider.unheard(), provider.target()), (Vec::new(), 1), "no node was asked for");
    let batch = cluster.broker.task("batch");
    assert!(batch.runs() && batch.attempt == 1, "{batch:?}");
    let lowered = (Millicores(400), Bytes(3 * GIB / 8));
    assert_eq!(reserved(&batch), Some(lowered));
    let shrunk = cluster.broker.decisions("batch").into_iter().rfind(|it| it.by == "broker");
    let shrunk = shrunk.expect("something was decided");
    assert_eq!(
        (shrunk.kind, shrunk.reason.as_str()),
        (
            DecisionKind::Shrunk,
            "less is reserved for it (0.8 → 0.4 cores and 512 MiB → 384 MiB of memory) to make room for `service` of \
             priority high, by policy `batch`"
        )
    );
    let limit = |cluster: &Cluster<'_>| cluster.agent("n1").shaper().get("batch").limits.memory;
    assert_eq!(limit(&cluster), Limit::At(lowered.1), "the node holds it to that");
    let told = cluster.broker.shaper().ok(&["describe", "batch"]);
    assert!(told.contains("0.4 cores and 384 MiB, for others need the room"), "{told}");

    // A new agent knows it, and a new broker does.
    cluster.agents[0].kill9();
    cluster.broker.wait_for_node("n1", false);
    cluster.agents[0].restart();
    cluster.broker.wait_for_node("n1", true);
    cluster.broker.kill9();
    cluster.broker.restart();
    cluster.broker.wait_for_node("n1", true);
    cluster.broker.wait_until("batch", "as before", |task| task.runs() && task.on_node.is_some());
    assert_eq!(
        (reserved(&cluster.broker.task("batch")), limit(&cluster)),
        (Some(lowered), Limit::At(lowered.1))
    );

    // With room again it has what it asked for.
    cluster.let_end("service");
    let batch = cluster.broker.wait_until("batch", "whole again", |task| task.reserved.is_none());
    assert!(batch.runs() && batch.attempt == 1, "{batch:?}");
    eventually("its memory limit is what it asked for", || {
        limit(&cluster).at().is_some_and(|limit| limit >= Bytes(GIB / 2))
    });

    // What would not fit even then has nodes asked for: as many as it takes.
    cluster.submit_spec("large", &spec(&cluster, "large", 0.95, 0.1, "medium"));
    assert_eq!(provider.wish(), Wish::Start(1));
    assert_eq!(reserved(&cluster.broker.task("batch")), None, "nothing is taken in vain");
    watch.end();
}
