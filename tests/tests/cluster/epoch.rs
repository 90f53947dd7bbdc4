//! Each start of a broker is an epoch; an agent obeys none that is over.

use std::{fs, path::Path, pin::Pin, process::Command};

use serde::Deserialize;
use shaper_proto::v1::{
    self,
    agent_session_server::{AgentSession, AgentSessionServer},
    broker_message, directive,
};
use shaper_tests::{
    agent::Agent,
    broker::Broker,
    checker::{Expect, check_settled},
    cluster::{Cluster, Load, networks},
    time::eventually,
};
use tokio::net::UnixListener;
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// The epochs in which a broker has been, oldest first.
fn epochs(broker: &Broker) -> Vec<u64> {
    let said = broker.said();
    let starts = said.lines().filter(|line| line.contains("took over the store"));
    let epoch = |line: &str| line.split("epoch=").nth(1)?.split(' ').next()?.parse().ok();
    starts.map(|line| epoch(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// The highest epoch that an agent has obeyed, by its own record.
fn obeyed(agent: &Agent) -> u64 {
    #[derive(Deserialize)]
    struct HighestEpoch {
        epoch: u64,
    }
    let text = fs::read(agent.state_dir().join("epoch.json")).unwrap_or_default();
    serde_json::from_slice::<HighestEpoch>(&text).map_or(0, |highest| highest.epoch)
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.is_ok_and(|status| status.success()), "cannot copy {}", from.display());
}

#[test]
fn an_old_state_does_not_make_an_old_epoch_and_what_runs_is_left_alone() {
    let networks = networks(1);
    let mut cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi"]);
    cluster.broker.kill9();
    let (state, old) = (cluster.broker.state_dir(), cluster.broker.directory().join("old"));
    copy(&state, &old);
    for _ in 0..2 {
        cluster.broker.restart();
        cluster.broker.wait_for_node("n1", true);
        cluster.broker.kill9();
    }
    cluster.broker.restart();
    cluster.broker.wait_for_node("n1", true);
    assert_eq!(epochs(&cluster.broker), [1, 2, 3, 4]);
    eventually("the agent obeys the fourth", || obeyed(&cluster.agents[0]) == 4);
    cluster.submit("t", 0.2, "low", Load::Until(0));
    cluster.wait_until_runs("t");
    let process = cluster.agents[0].process(&cluster.agents[0].shaper().get("t"));

    // A broker on what the first one left: it knows no task, and would be in epoch 2.
    cluster.broker.kill9();
    let newest = cluster.broker.directory().join("newest");
    fs::rename(&state, &newest).unwrap();
    fs::rename(&old, &state).unwrap();
    cluster.broker.restart();
    cluster.broker.wait_for_node("n1", true);
    assert_eq!(epochs(&cluster.broker).last(), Some(&2));
    assert!(cluster.broker.said().contains("going on above it"), "it does not say so");
    assert!(cluster.broker.tasks().is_empty());
    eventually("the agent obeys what is above the fourth", || obeyed(&cluster.agents[0]) == 5);
    assert!(process.is_alive(), "a task that a broker does not know is not its to end");

    // The right broker is back. It is not below what the agent has obeyed meanwhile, either.
    cluster.broker.kill9();
    fs::remove_dir_all(&state).unwrap();
    fs::rename(&newest, &state).unwrap();
    cluster.broker.restart();
    cluster.broker.wait_for_node("n1", true);
    assert!(cluster.broker.task("t").runs());
    cluster.let_end("t");
    cluster.broker.wait_until("t", "over", |task| task.ended().is_some());
    check_settled(&cluster, &[("t", Expect::Ended(0))]);
    assert!(obeyed(&cluster.agents[0]) >= 5);
}

/// A broker that knows no better than to be in an epoch that is over.
struct Stale {
    says: Vec<v1::BrokerMessage>,
}

#[tonic::async_trait]
impl AgentSession for Stale {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::BrokerMessage, Status>> + Send>>;

    async fn attach(
        &self,
        _request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let says = tokio_stream::iter(self.says.clone()).map(Ok);
        Ok(Response::new(Box::pin(says.chain(tokio_stream::pending()))))
    }
}

#[test]
fn an_agent_refuses_to_obey_an_epoch_that_is_over() {
    let networks = networks(1);
    let mut cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi"]);
    for _ in 0..2 {
        cluster.broker.kill9();
        cluster.broker.restart();
        cluster.broker.wait_for_node("n1", true);
    }
    eventually("the agent obeys the third", || obeyed(&cluster.agents[0]) == 3);
    cluster.broker.kill9();

    let spec: v1::TaskSpec = v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: "stale".into(),
            demand: Some(v1::ResourceDemand {
                cpu_millicores: 100,
                memory_bytes: 1 << 26,
                ..Default::default()
            }),
            priority: v1::Priority::Low.into(),
            ..Default::default()
        }),
        command: vec!["/bin/sleep".into(), "60".into()],
        cwd: "/".into(),
        name: "stale".into(),
        namespace: "default".into(),
        ..Default::default()
    };
    let owner = v1::Credentials { uid: 65534, gid: 65534, groups: Vec::new() };
    let start = directive::Kind::Start(v1::Start { spec: Some(spec), owner: Some(owner), gpu_cards: None });
    let start =
        v1::Directive { task_id: "stale".into(), attempt: 1, generation: 1, epoch: 2, kind: Some(start) };
    let message = |kind| v1::BrokerMessage { kind: Some(kind) };
    // Once with a Welcome, which ends the session, and once without.
    for says in [
        vec![
            message(broker_message::Kind::Welcome(v1::Welcome { epoch: 2 })),
            message(broker_message::Kind::Directive(start.clone())),
        ],
        vec![message(broker_message::Kind::Directive(start))],
    ] {
        let before = refusals(&cluster.agents[0]);
        let socket = cluster.broker.socket();
        let _ = fs::remove_file(&socket);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(async { UnixListener::bind(&socket).unwrap() });
        let server = Server::builder().add_service(AgentSessionServer::new(Stale { says }));
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        eventually("the agent has refused", || refusals(&cluster.agents[0]) > before);
        runtime.shutdown_background();
    }
    assert!(cluster.agents[0].shaper().tasks().is_empty(), "a stale directive was carried out");
    assert_eq!(obeyed(&cluster.agents[0]), 3);
    let _ = fs::remove_file(cluster.broker.socket());
    cluster.broker.restart();
    cluster.broker.wait_for_node("n1", true);
    eventually("the agent obeys the fourth", || obeyed(&cluster.agents[0]) == 4);
}

/// How often the agent has said that an epoch is over.
fn refusals(agent: &Agent) -> usize {
    agent.said().matches("epoch 2 is over: this node has obeyed epoch 3").count()
}
