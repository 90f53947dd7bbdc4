//! What the real daemons send to an OpenTelemetry collector.

use shaper_tests::{
    agent::Options,
    broker::Broker,
    cluster::{Cluster, Load, networks},
    collector::{Collector, attribute},
};

#[test]
fn a_broker_sends_requests_and_the_lives_of_tasks() {
    let collector = Collector::start();
    let broker = Broker::start_with(&["--otlp", &collector.url()]);
    let networks = networks(1);
    let cluster = Cluster::start_of(broker, &networks, &["cpu=1,memory=512Mi"]);
    cluster.submit("first", 0.75, "medium", Load::Until(3));
    cluster.wait_until_runs("first");
    cluster.submit("second", 0.75, "low", Load::Until(0));
    cluster.broker.wait_until("second", "waiting", |task| task.is_pending());
    cluster.let_end("first");
    cluster.wait_until_runs("second");
    cluster.let_end("second");

    let life = |id: &str| {
        collector.span(&format!("the life of {id} comes"), |span| {
            span.name == "task" && attribute(&span.attributes, "shaper.task.id") == Some(id)
        })
    };
    let (first, second) = (life("first"), life("second"));
    assert_eq!(first.status.as_ref().map(|status| status.message.as_str()), Some("exit code 3"));
    assert_eq!(second.status.as_ref().map(|status| status.message.as_str()), Some(""));
    let parts = collector.parts(&second);
    let names: Vec<_> = parts.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(names, ["waits", "on a node"]);
    assert_eq!(attribute(&parts[1].attributes, "shaper.node"), Some("n1"));
    assert_eq!(parts[0].start_time_unix_nano, second.start_time_unix_nano);
    assert_eq!(parts[0].end_time_unix_nano, parts[1].start_time_unix_nano);
    assert!(parts[0].end_time_unix_nano >= first.end_time_unix_nano, "it waited for the first to end");
    let decided: Vec<_> = second.events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(decided, ["pending", "scale_out", "placed", "ended"]);
    let why = attribute(&second.events[0].attributes, "shaper.decision.reason");
    assert!(why.is_some_and(|why| why.contains("no connected node has room")), "{why:?}");

    let asked = collector.span("a request comes", |span| span.name == "shaper.v1.Broker/SubmitTask");
    assert_eq!(attribute(&asked.attributes, "rpc.method"), Some("SubmitTask"));
}

#[test]
fn an_agent_sends_each_change_of_a_limit() {
    let collector = Collector::start();
    let agent = Options::default().with(&["--otlp", &collector.url()]).start();
    agent.run("busy", &["--cpu", "0.5"], &["tick", "600", "0"]);
    agent.shaper().set("busy", &["--cpu", "0.25"]);
    let change = collector.span("the change comes", |span| {
        let by = attribute(&span.attributes, "shaper.change.by");
        span.name == "change" && by == Some("uid 0") && span.start_time_unix_nano < span.end_time_unix_nano
    });
    assert_eq!(attribute(&change.attributes, "shaper.task.id"), Some("busy"));
    assert_eq!(attribute(&change.attributes, "shaper.change.kind"), Some("standing"));
    assert!(attribute(&change.attributes, "shaper.change.knobs").is_some_and(|knobs| !knobs.is_empty()));
    collector.span("a request comes", |span| span.name == "shaper.v1.Agent/SetLimits");
}
