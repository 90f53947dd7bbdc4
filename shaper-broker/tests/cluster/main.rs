//! The broker process over its socket, with agents that keep the contract. Needs uid 0, for only that
//! gets a session.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod agent;
mod broker;
#[path = "../etcd_process/mod.rs"]
mod etcd_process;
#[cfg(feature = "failpoints")]
mod failpoints;
mod silent;
mod standby;
mod streams;
mod upkeep;

use std::{env, os::unix::process::CommandExt, process::Command};

use shaper_proto::v1::{
    self, agent_message, broker_client::BrokerClient, cluster_task::Phase, directive, exit,
};
use tonic::{Code, Status, Streaming, transport::Channel};

use agent::{Agent, Session};
use broker::{Broker, NOBODY, PATIENCE};

fn spec(task: &str, cpu_millicores: u64) -> v1::TaskSpec {
    let demand = v1::ResourceDemand { cpu_millicores, memory_bytes: 1 << 30, ..Default::default() };
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: task.into(),
            demand: Some(demand),
            priority: v1::Priority::Medium.into(),
            estimated_runtime_seconds: None,
        }),
        command: vec!["sleep".into(), "1".into()],
        cwd: "/".into(),
        name: "sleep".into(),
        namespace: "default".into(),
        retries: 1,
        ..Default::default()
    }
}

async fn submit(client: &mut BrokerClient<Channel>, spec: v1::TaskSpec) -> Result<v1::ClusterTask, Status> {
    Ok(client.submit_task(v1::SubmitTaskRequest { spec: Some(spec) }).await?.into_inner())
}

async fn watch(client: &mut BrokerClient<Channel>, task: &str) -> Streaming<v1::ClusterTask> {
    let request = v1::WatchClusterTasksRequest { task_id: task.into(), from: None };
    client.watch_cluster_tasks(request).await.unwrap().into_inner()
}

/// Waits until the task is as `wanted`.
async fn until(
    client: &mut BrokerClient<Channel>,
    task: &str,
    wanted: impl Fn(&v1::ClusterTask) -> bool,
) -> v1::ClusterTask {
    let mut changes = watch(client, task).await;
    let waited = async {
        while let Some(task) = changes.message().await.unwrap() {
            if wanted(&task) {
                return task;
            }
        }
        panic!("the watch has ended");
    };
    tokio::time::timeout(PATIENCE, waited)
        .await
        .unwrap_or_else(|_| panic!("{task} does not become what it should"))
}

fn ended_with(code: i32) -> impl Fn(&v1::ClusterTask) -> bool {
    move |task| matches!(&task.phase, Some(Phase::Ended(end)) if end.status == Some(exit::Status::Code(code)))
}

fn runs_on(node: &str) -> impl Fn(&v1::ClusterTask) -> bool {
    move |task| task.phase == Some(Phase::RunningOn(node.into()))
}

async fn attach(agent: &mut Agent, broker: &Broker) -> Session {
    agent.attach(broker.channel().await).await.expect("a session (which needs uid 0)")
}

async fn kinds(client: &mut BrokerClient<Channel>, task: &str) -> Vec<String> {
    let request = v1::ExplainTaskRequest { task_id: task.into() };
    let decisions = client.explain_task(request).await.unwrap().into_inner().decisions;
    decisions.into_iter().map(|decision| decision.kind).collect()
}

#[tokio::test]
async fn a_task_from_submission_to_its_end() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    let task = submit(&mut client, spec("t", 1000)).await.unwrap();
    assert!(matches!(&task.phase, Some(Phase::Pending(pending)) if pending.reason == "no node is connected"));
    let mut agent = Agent::new("n1", 4000);
    let mut session = attach(&mut agent, &broker).await;
    let start = session.directive().await;
    assert_eq!((start.task_id.as_str(), start.attempt, start.generation), ("t", 1, 1));
    assert_eq!(start.epoch, agent.highest_epoch);
    session.accept(&start).await;
    session.report(agent.start(&start)).await;
    let task = until(&mut client, "t", runs_on("n1")).await;
    assert_eq!((task.node.as_str(), task.attempt), ("n1", 1));
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    assert!(nodes[0].connected && nodes[0].reserved.unwrap().cpu_millicores == 1000, "{nodes:?}");

    session.report(agent.end("t", 1, 7)).await;
    until(&mut client, "t", ended_with(7)).await;
    agent.forget(&session.directive().await);
    assert!(agent.inventory.is_empty());
    assert_eq!(kinds(&mut client, "t").await, ["pending", "scale_out", "placed", "ended"]);
    let profile = v1::GetProfileRequest { name: "sleep".into(), namespace: "default".into(), priority: 0 };
    let profile = client.get_profile(profile).await.unwrap().into_inner();
    assert_eq!(profile.executions, 1);
    assert_eq!(profile.profile.unwrap().demand.unwrap().cpu_millicores, 1150);
}

#[tokio::test]
async fn a_broker_that_is_killed_at_any_stage_goes_on_where_it_was() {
    let mut broker = Broker::start();
    let mut agent = Agent::new("n1", 4000);
    let mut client = broker.client().await;
    submit(&mut client, spec("t", 1000)).await.unwrap();
    // Its start is lost with the broker.
    let mut session = attach(&mut agent, &broker).await;
    let first = session.directive().await;
    broker.kill();
    broker.start_again(&[]);
    let mut client = broker.client().await;
    let before = agent.highest_epoch;
    let mut session = attach(&mut agent, &broker).await;
    assert!(agent.highest_epoch > before, "each start of the broker is an epoch");
    let second = session.directive().await;
    assert_eq!((second.attempt, second.generation), (first.attempt, first.generation));
    session.accept(&second).await;
    session.report(agent.start(&second)).await;
    until(&mut client, "t", runs_on("n1")).await;

    // The task ends while there is no broker.
    broker.kill();
    agent.end("t", 1, 3);
    broker.start_again(&[]);
    let mut client = broker.client().await;
    let task = until(&mut client, "t", runs_on("n1")).await;
    assert!(task.on_node.is_none(), "how it is there its node has yet to say");
    let mut session = attach(&mut agent, &broker).await;
    until(&mut client, "t", ended_with(3)).await;
    let forget = session.directive().await;

    // The agent is not told to forget, for the broker is killed.
    broker.kill();
    broker.start_again(&[]);
    let mut client = broker.client().await;
    let mut session = attach(&mut agent, &broker).await;
    let again = session.directive().await;
    assert_eq!((again.attempt, again.generation), (forget.attempt, forget.generation));
    agent.forget(&again);
    until(&mut client, "t", ended_with(3)).await;
    assert_eq!(agent.starts, [("t".to_owned(), 1)]);
    assert_eq!(submit(&mut client, spec("t", 1000)).await.unwrap().attempt, 1, "the same task still");
}

#[tokio::test]
async fn two_nodes_share_the_work() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    let (mut one, mut two) = (Agent::new("n1", 2000), Agent::new("n2", 2000));
    let mut session1 = attach(&mut one, &broker).await;
    let mut session2 = attach(&mut two, &broker).await;
    submit(&mut client, spec("a", 1500)).await.unwrap();
    submit(&mut client, spec("b", 1000)).await.unwrap();
    let (a, b) = (session1.directive().await, session2.directive().await);
    assert_eq!((a.task_id.as_str(), b.task_id.as_str()), ("a", "b"), "the first on a tie, then the emptier");
    session2.accept(&b).await;
    session2.report(two.start(&b)).await;
    until(&mut client, "b", runs_on("n2")).await;

    // n1 refuses; n2 has no room; so it waits for n1, and goes there again.
    session1.refuse(&a, "the disk is full").await;
    let again = session1.directive().await;
    assert_eq!((again.task_id.as_str(), again.attempt), ("a", 2));
    assert!(again.generation > a.generation);
    let kinds = kinds(&mut client, "a").await;
    assert_eq!(kinds, ["placed", "refused", "pending", "placed"]);

    // n2 ends its task, n1 refuses for the second time: that was the last retry.
    session2.report(two.end("b", 1, 0)).await;
    two.forget(&session2.directive().await);
    session1.refuse(&again, "the disk is full").await;
    let task = until(&mut client, "a", |task| matches!(task.phase, Some(Phase::Ended(_)))).await;
    let Some(Phase::Ended(v1::Exit { status: Some(exit::Status::NotStarted(why)), .. })) = task.phase else {
        panic!("{task:?}");
    };
    assert_eq!(why.error, "the disk is full");
}

#[tokio::test]
async fn a_running_task_is_cancelled_when_its_node_says_so() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    let mut agent = Agent::new("n1", 2000);
    let mut session = attach(&mut agent, &broker).await;
    submit(&mut client, spec("t", 1000)).await.unwrap();
    let start = session.directive().await;
    session.accept(&start).await;
    session.report(agent.start(&start)).await;
    until(&mut client, "t", runs_on("n1")).await;
    let request = v1::CancelClusterTaskRequest { task_id: "t".into(), grace_millis: 1234 };
    let task = client.cancel_cluster_task(request).await.unwrap().into_inner();
    assert!(task.cancel_requested && runs_on("n1")(&task));
    let stop = session.directive().await;
    assert!(
        matches!(stop.kind, Some(directive::Kind::Stop(v1::Stop { grace_millis: 1234, .. }))),
        "{stop:?}"
    );
    session.report(agent.end("t", 1, 0)).await;
    until(&mut client, "t", |task| task.phase == Some(Phase::Cancelled(true))).await;
    agent.forget(&session.directive().await);
}

#[tokio::test]
async fn an_agent_that_goes_away_keeps_its_tasks() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    let mut agent = Agent::new("n1", 2000);
    let mut session = attach(&mut agent, &broker).await;
    submit(&mut client, spec("t", 1000)).await.unwrap();
    let start = session.directive().await;
    session.report(agent.start(&start)).await;
    let revision = until(&mut client, "t", runs_on("n1")).await.revision;
    drop(session);
    let task = until(&mut client, "t", |task| task.revision > revision).await;
    assert!(runs_on("n1")(&task));
    assert_eq!(kinds(&mut client, "t").await, ["placed", "lost"]);
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    assert!(!nodes[0].connected);

    // Two sessions of one node: the later is the agent.
    let mut old = attach(&mut agent, &broker).await;
    let _new = attach(&mut agent, &broker).await;
    let status = old.next().await.unwrap_err();
    assert!(status.message().contains("has connected again"), "{status:?}");
}

#[tokio::test]
async fn what_is_no_message_ends_the_session_with_the_reason() {
    let broker = Broker::start();
    let mut agent = Agent::new("no/node", 2000);
    let error = agent.attach(broker.channel().await).await.err().unwrap();
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains("node"), "{error:?}");
    let mut agent = Agent::new("n1", 2000);
    let mut session = attach(&mut agent, &broker).await;
    session.say(agent_message::Kind::Task(v1::NodeTask::default())).await;
    let error = session.next().await.unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::Aborted, "field `task` is missing"));
}

#[tokio::test]
async fn a_message_has_a_limit() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    let huge = v1::TaskSpec { command: vec!["x".repeat(2 << 20)], ..spec("huge", 1000) };
    assert_eq!(submit(&mut client, huge).await.unwrap_err().code(), Code::OutOfRange, "1 MiB a message");
}

#[tokio::test]
async fn one_broker_one_state_and_no_tcp() {
    let mut broker = Broker::start();
    let second = broker.command().output().unwrap();
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && text.contains("belongs to another broker"), "{text}");
    let tcp =
        Command::new(env!("CARGO_BIN_EXE_shaper-broker")).args(["--listen", "127.0.0.1:1"]).output().unwrap();
    let text = String::from_utf8_lossy(&tcp.stderr).into_owned();
    assert!(!tcp.status.success() && text.contains("is not the path of a Unix socket"), "{text}");
    assert!(broker.terminate().success(), "SIGTERM is a clean end");
    assert!(!broker.socket().exists());
    broker.start_again(&[]);
    broker.client().await;
}

/// Not a test of its own: what the test below runs as nobody.
#[tokio::test]
async fn as_nobody() {
    let Some(socket) = env::var_os("SHAPER_TEST_SOCKET") else { return };
    let channel = broker::connect(socket.into()).await;
    let mut client = BrokerClient::new(channel.clone());
    let error = Agent::new("n1", 2000).attach(channel).await.err().unwrap();
    assert_eq!(error.code(), Code::PermissionDenied, "{error:?}");
    let policy = v1::Policy {
        policy_name: "p".into(),
        namespace: "default".into(),
        priority: v1::Priority::High.into(),
        window_millis: 10_000,
        ..Default::default()
    };
    let error = client.apply_policy(v1::ApplyPolicyRequest { policy: Some(policy) }).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error:?}");
    let get = v1::GetClusterTaskRequest { task_id: "roots".into() };
    assert_eq!(client.get_cluster_task(get).await.unwrap_err().code(), Code::NotFound);
    let root = Some(v1::Credentials { uid: 0, gid: 0, groups: Vec::new() });
    let error = submit(&mut client, v1::TaskSpec { run_as: root, ..spec("mine", 1000) }).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error:?}");
    assert_eq!(submit(&mut client, spec("roots", 1000)).await.unwrap_err().code(), Code::AlreadyExists);
    let task = submit(&mut client, spec("mine", 1000)).await.unwrap();
    assert_eq!(task.owner.unwrap().uid, NOBODY);
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    assert_eq!(list.tasks.len(), 1);
}

#[tokio::test]
async fn the_kernel_names_the_caller() {
    let broker = Broker::start();
    let mut client = broker.client().await;
    submit(&mut client, spec("roots", 1000)).await.unwrap();
    let test = Command::new(env::current_exe().unwrap())
        .args(["--exact", "as_nobody"])
        .env("SHAPER_TEST_SOCKET", broker.socket())
        .current_dir("/")
        .gid(NOBODY)
        .uid(NOBODY)
        .output()
        .unwrap();
    assert!(test.status.success(), "{}", String::from_utf8_lossy(&test.stdout));
    let list = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner();
    assert_eq!(list.tasks.len(), 2, "the operator sees all");
}

#[tokio::test]
async fn it_tells_what_it_serves_and_how_it_is() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let broker = Broker::start();
    let channel = broker.channel().await;
    let check = HealthCheckRequest { service: "shaper.v1.Broker".into() };
    let health = HealthClient::new(channel.clone()).check(check).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::once(list)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    for name in ["shaper.v1.Broker", "shaper.v1.AgentSession"] {
        assert!(names.iter().any(|it| it == name), "{name} in {names:?}");
    }
}
