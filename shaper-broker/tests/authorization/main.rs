//! The broker over TCP: whoever is at the other end of a real connection with certificates may do what the table says, and
//! no more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bounds;
mod enrolment;
mod harness;
mod limits;

use std::{fs, path::Path, process::Command, time::Duration};

use shaper_identity::{
    Identity, Role,
    pki::Authority,
    table::{Asker, CALLS, Verdict},
    tls::Material,
};
use shaper_proto::v1::{
    self, agent_message, agent_session_client::AgentSessionClient, broker_client::BrokerClient,
};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};

use self::harness::{Broker, DAY, PATIENCE, call, identity};

#[tokio::test(flavor = "multi_thread")]
async fn every_role_may_make_the_calls_that_the_table_says() {
    let broker = Broker::start();
    let mut askers = vec![
        (Asker::Root, broker.connect_locally().await, "uid 0".to_owned()),
        (Asker::User, broker.connect_as(65534).await, "uid 65534".to_owned()),
    ];
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

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_is_not_served() {
    let broker = Broker::start();
    let mut operator = BrokerClient::new(broker.connect(Role::Operator, "o").await);
    let mut root = BrokerClient::new(broker.connect_locally().await);
    for client in [&mut operator, &mut root] {
        let mut request = tonic::Request::new(v1::ListNodesRequest {});
        request.metadata_mut().insert("origin", "https://evil.example".parse().unwrap());
        let status = client.list_nodes(request).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        client.list_nodes(v1::ListNodesRequest {}).await.unwrap();
    }
    broker.says(&["audit", "refused", "a browser", "ListNodes"]).await;
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
    broker.says(&["audit", "other certificates are in use"]).await;
    let after = broker.connect_with(&operator).await.unwrap();
    for channel in [before, after] {
        call(&channel, "/shaper.v1.Broker/ListNodes").await.unwrap();
    }
    // Somebody else's certificate is not.
    broker.authority.issue(&broker.path("tls"), &identity(Role::Node, "n"), &[], DAY).unwrap();
    broker.says(&["spiffe://lab/node/n", "is not used"]).await;
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
