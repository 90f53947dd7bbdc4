//! Joining by a token, and renewing: over real connections, to the authority's program.

use std::{fs, path::PathBuf, process::Command, sync::Arc};

use shaper_identity::{
    Role,
    name::Holder,
    pki,
    table::{Asker, CALLS, Verdict},
    tls::{self, ClientConfig, Material},
    token::Token,
};
use shaper_proto::v1::{self, enrolment_client::EnrolmentClient};
use tonic::{Code, Status, transport::Channel};

use crate::{
    attach,
    harness::{Broker, Daemon, call, connect_to, identity},
};

/// The authority of a broker's directory, as a program.
struct Authority(Daemon);

impl Authority {
    fn start(broker: &Broker) -> Authority {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-authority"));
        command.args(["--listen", "tcp://127.0.0.1:0", "--trust-domain", "lab", "--ca-dir"]);
        command.arg(broker.path("ca"));
        Authority(Daemon::start(command))
    }

    async fn channel(&self, config: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
        connect_to(&self.0.address, config).await
    }

    async fn as_holder(&self, material: &Material) -> EnrolmentClient<Channel> {
        let config = material.client(&[Role::Authority]).unwrap();
        EnrolmentClient::new(self.channel(config).await.unwrap())
    }

    async fn as_stranger(&self, token: &Token) -> EnrolmentClient<Channel> {
        let config = tls::stranger(&token.authority).unwrap();
        EnrolmentClient::new(self.channel(config).await.unwrap())
    }
}

async fn token_for(
    operator: &mut EnrolmentClient<Channel>,
    identity: &str,
    valid_seconds: u64,
) -> Result<Token, Status> {
    let request = v1::CreateTokenRequest { identity: identity.into(), valid_seconds };
    let token = operator.create_token(request).await?.into_inner().token;
    Ok(token.parse().unwrap())
}

fn join(token: &Token) -> (String, v1::JoinRequest) {
    let (key, request_pem) = pki::request().unwrap();
    let (token_id, secret) = (token.id.clone(), token.secret.clone());
    (key, v1::JoinRequest { token_id, secret, request_pem, hosts: Vec::new() })
}

/// What somebody who has joined has on disk.
fn keep(broker: &Broker, name: &str, key: &str, signed: &v1::CertificateResponse) -> PathBuf {
    let directory = broker.path(name);
    pki::write_identity(&directory, key, &signed.certificate_pem, &signed.authorities_pem).unwrap();
    directory
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_makes_a_node_once_and_also_after_a_restart() {
    let broker = Broker::start();
    let operator = broker.material(Role::Operator, "o");
    let authority = Authority::start(&broker);
    let mut client = authority.as_holder(&operator).await;
    let token = token_for(&mut client, "spiffe://lab/node/n1", 60).await.unwrap();
    let spare = token_for(&mut client, "spiffe://lab/node/n2", 60).await.unwrap();
    drop(authority);

    let authority = Authority::start(&broker);
    let mut stranger = authority.as_stranger(&token).await;
    // What is no request, or a wrong secret, uses nothing up.
    let (_, request) = join(&token);
    let broken = v1::JoinRequest { request_pem: "none".into(), ..request.clone() };
    assert_eq!(stranger.join(broken).await.unwrap_err().code(), Code::InvalidArgument);
    let guessed = v1::JoinRequest { secret: spare.secret.clone(), ..request };
    assert_eq!(stranger.join(guessed).await.unwrap_err().code(), Code::PermissionDenied);
    let (key, request) = join(&token);
    let signed = stranger.join(request).await.unwrap().into_inner();
    let n1 = Material::load(&keep(&broker, "n1", &key, &signed)).unwrap();
    assert_eq!(n1.holder.identity, identity(Role::Node, "n1"));
    attach(broker.connect_with(&n1).await.unwrap(), "n1").await.unwrap();

    let (_, again) = join(&token);
    assert_eq!(stranger.join(again.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    drop(authority);
    let authority = Authority::start(&broker);
    let mut stranger = authority.as_stranger(&token).await;
    assert_eq!(
        stranger.join(again).await.unwrap_err().code(),
        Code::PermissionDenied,
        "used before the restart"
    );
    let (_, other) = join(&spare);
    stranger.join(other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_for_the_same_identity_alone() {
    let broker = Broker::start();
    let authority = Authority::start(&broker);
    let n1 = broker.material(Role::Node, "n1");
    let mut client = authority.as_holder(&n1).await;
    let (key, request_pem) = pki::request().unwrap();
    let renewed =
        client.renew(v1::RenewRequest { request_pem, hosts: Vec::new() }).await.unwrap().into_inner();
    let holder = Holder::of(&pki::certificates(&renewed.certificate_pem)[0]).unwrap();
    assert_eq!(holder.identity, n1.holder.identity);
    assert_ne!(holder.serial, n1.holder.serial);
    let again = Material::load(&keep(&broker, "renewed", &key, &renewed)).unwrap();
    attach(broker.connect_with(&again).await.unwrap(), "n1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authority_is_asked_as_the_table_says_and_not_too_often() {
    let broker = Broker::start();
    let authority = Authority::start(&broker);
    let operator = broker.material(Role::Operator, "o");
    let mut client = authority.as_holder(&operator).await;
    for (identity, valid, told) in [
        ("spiffe://elsewhere/node/n1", 60, "trust domain lab"),
        ("spiffe://lab/authority/a", 60, "signs its own"),
        ("n1", 60, "spiffe://"),
        ("spiffe://lab/node/n1", 0, "valid_seconds"),
        ("spiffe://lab/node/n1", 8 * 24 * 60 * 60, "valid_seconds"),
    ] {
        let status = token_for(&mut client, identity, valid).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(told), "{status:?}");
    }
    let token = token_for(&mut client, "spiffe://lab/node/n1", 60).await.unwrap();

    let calls = CALLS.iter().filter(|call| call.path.starts_with("/shaper.v1.Enrolment/"));
    for of in calls {
        for asker in Asker::ALL {
            let config = match asker {
                Asker::Root | Asker::User => continue,
                Asker::Stranger => tls::stranger(&token.authority).unwrap(),
                Asker::Role(role) => {
                    let name = if role == Role::Submitter { "etl" } else { "x" };
                    broker.material(role, name).client(&[Role::Authority]).unwrap()
                }
            };
            let channel = authority.channel(config).await.unwrap();
            let answer = call(&channel, of.path).await;
            let by_table = answer.as_ref().is_err_and(|status| status.message().contains("may not call"));
            // Without a configuration of identities no submitter is known to this authority.
            let is_unknown = answer.as_ref().is_err_and(|status| status.message().contains("has no entry"));
            let verdict = of.verdict(asker);
            assert_eq!(
                by_table || is_unknown,
                verdict == Verdict::Refused || is_unknown,
                "{asker} {}: {answer:?}",
                of.path
            );
            assert_eq!(is_unknown, asker == Asker::Role(Role::Submitter), "{asker} {}: {answer:?}", of.path);
        }
    }

    // Whoever believes another authority is not served, nor is what is of no authority at all.
    let mut wrong = token.clone();
    wrong.authority = "0".repeat(64);
    assert!(authority.channel(tls::stranger(&wrong.authority).unwrap()).await.is_err());
    // A broker is no authority, whoever signed its certificate.
    assert!(connect_to(&broker.address, tls::stranger(&token.authority).unwrap()).await.is_err());

    // Guessing is slow.
    let mut stranger = authority.as_stranger(&token).await;
    let mut answers = Vec::new();
    for _ in 0..30 {
        let (_, mut request) = join(&token);
        request.secret = "0".repeat(64);
        answers.push(stranger.join(request).await.unwrap_err().code());
    }
    assert!(answers.contains(&Code::ResourceExhausted), "{answers:?}");
    assert!(answers.iter().all(|code| [Code::ResourceExhausted, Code::PermissionDenied].contains(code)));
    assert!(fs::read_to_string(broker.path("ca/tokens.json")).unwrap().len() < 1000);
}
