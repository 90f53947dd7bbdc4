//! The broker over TCP: whoever is at the other end of a real connection with certificates may do what the table says, and
//! no more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use shaper_identity::{
    Identity, Role,
    pki::Authority,
    table::{Asker, CALLS, Verdict},
    tls::{self, Material},
};
use shaper_proto::v1::{
    self, agent_message, agent_session_client::AgentSessionClient, broker_client::BrokerClient,
};
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

const PATIENCE: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A broker with an authority, a Unix socket and a port of its own.
struct Broker {
    directory: TempDir,
    authority: Authority,
    child: Child,
    address: String,
    log: watch::Receiver<String>,
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn identity(role: Role, name: &str) -> Identity {
    Identity::new("lab", role, name).unwrap()
}

impl Broker {
    fn start() -> Broker {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = Authority::create(&at("ca"), "lab").unwrap();
        authority.issue(&at("tls"), &identity(Role::Broker, "b"), &["localhost".into()], DAY).unwrap();
        let etl = "identities:\n  - id: spiffe://lab/submitter/etl\n    uid: 1500\n    gid: 1500\n    namespaces: [etl]\n    \
                   max_priority: medium\n";
        fs::write(at("identities.yaml"), etl).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_shaper-broker"))
            .args(["--listen", "tcp://127.0.0.1:0", "--store", "memory"])
            .arg("--listen")
            .arg(at("b.sock"))
            .arg("--state-dir")
            .arg(at("state"))
            .arg("--tls-dir")
            .arg(at("tls"))
            .arg("--identities")
            .arg(at("identities.yaml"))
            .env("RUST_LOG", "info")
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut address = None;
        for line in lines.by_ref() {
            if let Some((_, rest)) = line.split_once("who have a certificate address=") {
                address = Some(rest.trim().to_owned());
            }
            if line.contains(" ready ") {
                break;
            }
        }
        let (kept, log) = watch::channel(String::new());
        std::thread::spawn(move || {
            for line in lines {
                kept.send_modify(|log| {
                    log.push_str(&line);
                    log.push('\n');
                });
            }
        });
        let address = address.expect("the broker says where it listens");
        Broker { directory, authority, child, address, log }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn material(&self, role: Role, name: &str) -> Material {
        let at = self.path(&format!("{role}-{name}"));
        self.authority.issue(&at, &identity(role, name), &[], DAY).unwrap();
        Material::load(&at).unwrap()
    }

    async fn connect_with(&self, material: &Material) -> Result<Channel, tonic::transport::Error> {
        let config = material.client(&[Role::Broker]).unwrap();
        let address = self.address.clone();
        let connector = tower::service_fn(move |_| {
            let (address, config) = (address.clone(), Arc::clone(&config));
            async move { tls::connect(&address, config).await }
        });
        Endpoint::from_static("http://broker").connect_with_connector(connector).await
    }

    async fn connect(&self, role: Role, name: &str) -> Channel {
        self.connect_with(&self.material(role, name)).await.unwrap()
    }

    async fn connect_locally(&self) -> Channel {
        let path = self.path("b.sock");
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://broker").connect_with_connector(connector).await.unwrap()
    }

    /// Waits for a line of the log.
    async fn says(&self, wanted: &[&str]) {
        let said = |log: &String| log.lines().any(|line| wanted.iter().all(|wanted| line.contains(wanted)));
        let mut log = self.log.clone();
        let is_said = tokio::time::timeout(PATIENCE, log.wait_for(said)).await.is_ok_and(|said| said.is_ok());
        assert!(is_said, "no line has {wanted:?}:\n{}", *self.log.borrow());
    }
}

/// Makes a call with an empty message, and says how it was answered.
async fn call(channel: &Channel, path: &'static str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let messages = Request::new(tokio_stream::once(()));
    let answer = client.streaming(messages, PathAndQuery::from_static(path), codec).await?;
    // A refusal may also come at the end of an answer that has begun.
    let mut answer = answer.into_inner();
    match tokio::time::timeout(Duration::from_millis(200), answer.message()).await {
        Ok(message) => message.map(|_| ()),
        Err(_) => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_may_make_the_calls_that_the_table_says() {
    let broker = Broker::start();
    let mut askers = vec![(Asker::Root, broker.connect_locally().await, "uid 0".to_owned())];
    for role in Role::ALL {
        let name = if role == Role::Submitter { "etl" } else { "x" };
        let channel = broker.connect(role, name).await;
        askers.push((Asker::Role(role), channel, identity(role, name).to_string()));
    }
    let calls = CALLS.iter().filter(|call| !call.path.starts_with("/shaper.v1.Agent/"));
    let mut refusals = 0;
    for of in calls {
        for (asker, channel, who) in &askers {
            let answer = call(channel, of.path).await;
            let code = answer.as_ref().map_or_else(Status::code, |()| Code::Ok);
            assert!(
                !matches!(code, Code::Unavailable | Code::Unauthenticated),
                "{who} {}: {answer:?}",
                of.path
            );
            let by_table = |status: &Status| status.message().contains("may not call");
            let is_refused = code == Code::PermissionDenied && answer.as_ref().is_err_and(by_table);
            let verdict = of.verdict(*asker);
            assert_eq!(is_refused, verdict == Verdict::Refused, "{who} {}: {answer:?}", of.path);
            // What is not theirs the service refuses: an empty message names nothing of theirs.
            assert!(
                verdict != Verdict::Allowed || code != Code::PermissionDenied,
                "{who} {}: {answer:?}",
                of.path
            );
            if let Err(status) = answer.as_ref()
                && is_refused
            {
                refusals += 1;
                let text = status.message();
                assert!(text.contains(who.as_str()) && text.contains(&of.who_may()), "{text}");
                broker.says(&["audit", "refused", who, of.path]).await;
            }
        }
    }
    assert!(refusals > 20, "{refusals}");
    let nowhere = call(&askers[0].1, "/shaper.v1.Broker/NoSuchCall").await.unwrap_err();
    assert_eq!(nowhere.code(), Code::PermissionDenied);
}

fn spec(task: &str, namespace: &str, priority: v1::Priority) -> v1::TaskSpec {
    let demand = v1::ResourceDemand { cpu_millicores: 100, memory_bytes: 1 << 20, ..Default::default() };
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: task.into(),
            demand: Some(demand),
            priority: priority.into(),
            estimated_runtime_seconds: None,
        }),
        command: vec!["true".into()],
        cwd: "/".into(),
        name: "true".into(),
        namespace: namespace.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitter_stays_within_its_bounds() {
    let broker = Broker::start();
    let mut etl = BrokerClient::new(broker.connect(Role::Submitter, "etl").await);
    let mut submit = async |spec| etl.submit_task(v1::SubmitTaskRequest { spec: Some(spec) }).await;
    let own = submit(spec("t", "etl", v1::Priority::Medium)).await.unwrap().into_inner();
    assert_eq!(own.owner.map(|owner| owner.uid), Some(1500));
    let as_root = v1::TaskSpec {
        run_as: Some(v1::Credentials { uid: 0, gid: 0, groups: Vec::new() }),
        ..spec("r", "etl", v1::Priority::Low)
    };
    for (spec, told) in [
        (spec("n", "default", v1::Priority::Low), "namespace `default`"),
        (spec("n", "etl.b", v1::Priority::Low), "namespace `etl.b`"),
        (spec("p", "etl", v1::Priority::High), "priority high is above medium"),
        (as_root, "uid 0 is not the uid of this identity"),
    ] {
        let status = submit(spec).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert!(status.message().contains(told), "{status:?}");
        broker.says(&["audit", "refused", "spiffe://lab/submitter/etl", told]).await;
    }
    // What root has submitted, in that namespace too, is not theirs.
    let mut root = BrokerClient::new(broker.connect_locally().await);
    let request = v1::SubmitTaskRequest { spec: Some(spec("of-root", "etl", v1::Priority::Low)) };
    root.submit_task(request).await.unwrap();
    let tasks = etl.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner().tasks;
    let ids: Vec<_> = tasks.iter().filter_map(|task| task.spec.as_ref()?.profile.as_ref()).collect();
    assert_eq!(ids.iter().map(|profile| profile.task_id.as_str()).collect::<Vec<_>>(), ["t"]);
    let cancel = |task: &str| v1::CancelClusterTaskRequest { task_id: task.into(), grace_millis: 0 };
    assert_eq!(etl.cancel_cluster_task(cancel("of-root")).await.unwrap_err().code(), Code::NotFound);
    etl.cancel_cluster_task(cancel("t")).await.unwrap();
    // A submitter that nobody has configured.
    let other = broker.connect(Role::Submitter, "etl2").await;
    let status = call(&other, "/shaper.v1.Broker/ListNodes").await.unwrap_err();
    assert!(
        status.code() == Code::PermissionDenied && status.message().contains("--identities"),
        "{status:?}"
    );
}

async fn attach(channel: Channel, node: &str) -> Result<(), Status> {
    let hello = v1::Hello {
        node: node.into(),
        boot_id: "boot".into(),
        capacity: Some(v1::Capacity { cpu_millicores: 1000, memory_bytes: 1 << 30, ..Default::default() }),
        ..Default::default()
    };
    let hello = v1::AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) };
    let messages = tokio_stream::StreamExt::chain(tokio_stream::once(hello), tokio_stream::pending());
    let mut answer = AgentSessionClient::new(channel).attach(messages).await?.into_inner();
    match tokio::time::timeout(PATIENCE, answer.message()).await.unwrap()?.and_then(|message| message.kind) {
        Some(v1::broker_message::Kind::Welcome(_)) => Ok(()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_the_one_that_its_certificate_names() {
    let broker = Broker::start();
    let n1 = broker.connect(Role::Node, "n1").await;
    let status = attach(n1.clone(), "n2").await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("certificate is of node `n1`"), "{status:?}");
    broker.says(&["audit", "refused", "spiffe://lab/node/n1", "Attach"]).await;
    attach(n1, "n1").await.unwrap();
}

async fn is_cut_off(broker: &Broker, material: &Material) {
    let answer = match broker.connect_with(material).await {
        Ok(channel) => call(&channel, "/grpc.health.v1.Health/Check").await,
        Err(error) => Err(Status::unavailable(error.to_string())),
    };
    let status = answer.unwrap_err();
    assert_ne!(
        status.code(),
        Code::PermissionDenied,
        "there is no connection on which to say that: {status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_of_another_authority_or_trust_domain_gets_no_connection() {
    let broker = Broker::start();
    let other = Authority::create(&broker.path("other-ca"), "lab").unwrap();
    let forged = broker.path("forged");
    other.issue(&forged, &identity(Role::Operator, "x"), &[], DAY).unwrap();
    // It believes the broker, which does not believe it.
    fs::copy(broker.path("ca/ca.pem"), forged.join("ca.pem")).unwrap();
    is_cut_off(&broker, &Material::load(&forged).unwrap()).await;
    let elsewhere = broker.path("elsewhere");
    let operator = Identity::new("elsewhere", Role::Operator, "x").unwrap();
    broker.authority.issue(&elsewhere, &operator, &[], DAY).unwrap();
    is_cut_off(&broker, &Material::load(&elsewhere).unwrap()).await;
}

/// Watches, and waits for the end of it.
async fn watch_ends(channel: Channel, meanwhile: impl FnOnce()) {
    let request = v1::WatchClusterTasksRequest::default();
    let mut changes = BrokerClient::new(channel).watch_cluster_tasks(request).await.unwrap().into_inner();
    meanwhile();
    let end = tokio::time::timeout(PATIENCE, changes.message()).await.expect("the stream ends");
    assert!(!matches!(end, Ok(Some(_))), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_belief_in_its_reader() {
    let broker = Broker::start();
    let reader = broker.material(Role::Reader, "r");
    let channel = broker.connect_with(&reader).await.unwrap();
    let revoke = || fs::write(broker.path("identities.yaml"), "revoked: [spiffe://lab/reader/r]\n").unwrap();
    watch_ends(channel, revoke).await;
    broker.says(&["audit", "broke off", "spiffe://lab/reader/r", "revoked"]).await;
    is_cut_off(&broker, &reader).await;
    // And with its certificate.
    let brief = broker.path("brief");
    let who = identity(Role::Reader, "brief");
    broker.authority.issue(&brief, &who, &[], Duration::from_secs(3)).unwrap();
    let channel = broker.connect_with(&Material::load(&brief).unwrap()).await.unwrap();
    watch_ends(channel, || {}).await;
    broker.says(&["audit", "broke off", "spiffe://lab/reader/brief", "expired"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_certificates_are_taken_into_use_without_a_restart() {
    let broker = Broker::start();
    let operator = broker.material(Role::Operator, "o");
    let before = broker.connect_with(&operator).await.unwrap();
    broker.authority.issue(&broker.path("tls"), &identity(Role::Broker, "b"), &[], DAY).unwrap();
    let after = broker.connect_with(&operator).await.unwrap();
    for channel in [before, after] {
        call(&channel, "/shaper.v1.Broker/ListNodes").await.unwrap();
    }
    broker.says(&["audit", "other certificates are in use"]).await;
    // Somebody else's certificate is not.
    broker.authority.issue(&broker.path("tls"), &identity(Role::Node, "n"), &[], DAY).unwrap();
    let channel = broker.connect_with(&operator).await.unwrap();
    call(&channel, "/shaper.v1.Broker/ListNodes").await.unwrap();
}

#[test]
fn tcp_without_certificates_or_with_those_of_another_role_is_not_served() {
    let directory = TempDir::new().unwrap();
    let start = |tls: Option<&Path>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-broker"));
        command.args(["--listen", "tcp://127.0.0.1:0", "--store", "memory", "--state-dir"]);
        command.arg(directory.path().join("state"));
        if let Some(tls) = tls {
            command.arg("--tls-dir").arg(tls);
        }
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = start(None);
    assert!(said.contains("--tls-dir") && said.contains("shaper pki init"), "{said}");
    let authority = Authority::create(&directory.path().join("ca"), "lab").unwrap();
    let node = directory.path().join("n1");
    authority.issue(&node, &identity(Role::Node, "n1"), &[], DAY).unwrap();
    let said = start(Some(&node));
    assert!(said.contains("spiffe://lab/node/n1"), "{said}");
}
