//! An HTTP server that is sent what a group is to become: a CloudEvent (CloudEvents 1.0, structured mode, JSON), signed as
//! Standard Webhooks says (`webhook-id`, `webhook-timestamp`, `webhook-signature`: HMAC-SHA256 over id, time and body).
//!
//! An event that was not answered is sent again with the same id, so whoever keeps the ids of those that it carried out does
//! nothing twice. And as it names a size, nothing is lost by doing it twice.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use ring::hmac;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use shaper_core::scale::{Group, Order, OrderKind};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::sleep,
};
use tokio_rustls::TlsConnector;

use super::{chain, words};
use crate::reactor::scale::order_text;

/// Whom the system believes.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Of an answer no more is read.
const MOST_ANSWER: usize = 4096;
/// Before the second attempt; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A secret is at least so long.
const LEAST_SECRET: usize = 16;
const MOST_SECRET: u64 = 4096;

/// The server.
pub(super) struct Webhook {
    url: String,
    secret_file: String,
    ca: Option<String>,
}

/// What did not work, and whether to try again.
struct Failure {
    why: String,
    is_final: bool,
}

fn passing(why: impl Into<String>) -> Failure {
    Failure { why: why.into(), is_final: false }
}

fn lasting(why: impl Into<String>) -> Failure {
    Failure { why: why.into(), is_final: true }
}

/// What an order says, for programs.
pub(super) fn data(group: &Group, order: &Order) -> Value {
    let (action, node) = match &order.kind {
        OrderKind::Grow { .. } => ("grow", None),
        OrderKind::Withdraw { .. } => ("withdraw", None),
        OrderKind::Remove { node } => ("remove", Some(node)),
    };
    let wants = match &order.kind {
        OrderKind::Grow { wants, .. } => wants.as_slice(),
        OrderKind::Withdraw { .. } | OrderKind::Remove { .. } => &[],
    };
    let wants = wants.iter().map(|want| {
        let demand = json!({
            "cpu_cores": want.demand.cpu.0 as f64 / 1e3,
            "memory_bytes": want.demand.memory.0,
            "gpu_memory_bytes": want.demand.gpu_memory.map(|it| it.0),
            "network_bps": want.demand.network.map(|it| it.0),
            "storage_iops": want.demand.storage_io.map(|it| it.0),
        });
        json!({"tasks": want.tasks, "demand": demand, "first": want.first})
    });
    json!({
        "group": group.name,
        "number": order.number,
        "action": action,
        "target": order.target,
        "node": node,
        "reason": order_text(order),
        "wants": wants.collect::<Vec<_>>(),
    })
}

impl Webhook {
    pub(super) fn new(url: &str, secret_file: &str, ca: Option<&str>) -> Webhook {
        Webhook { url: url.to_owned(), secret_file: secret_file.to_owned(), ca: ca.map(str::to_owned) }
    }

    /// Sends it until somebody takes or refuses it; whoever waits for this says how long.
    pub(super) async fn carry_out(&self, group: &Group, order: &Order) -> Result<(), String> {
        let secret = self.secret()?;
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(order.at))
            .unwrap_or(OffsetDateTime::UNIX_EPOCH);
        // The broker that gave it may have ended, and its numbers with its store: the time makes the id one of its own.
        let id = format!("{}-{}-{}", group.name, order.number, order.at);
        let event = json!({
            "specversion": "1.0",
            "id": id,
            "source": "shaper-broker",
            "type": "dev.shaper.scale.v1",
            "subject": group.name,
            "time": at.format(&Rfc3339).unwrap_or_default(),
            "datacontenttype": "application/json",
            "data": data(group, order),
        });
        let (body, mut pause) = (event.to_string(), FIRST_PAUSE);
        loop {
            match self.send(&id, &body, &secret).await {
                Ok(()) => return Ok(()),
                Err(failure) if failure.is_final => return Err(failure.why),
                Err(failure) => {
                    tracing::info!(url = self.url, why = failure.why, "an event was not taken; sent again")
                }
            }
            sleep(pause).await;
            pause *= 2;
        }
    }

    pub(super) fn secret(&self) -> Result<hmac::Key, String> {
        let text = shaper_identity::files::read_secret(self.secret_file.as_ref(), MOST_SECRET)
            .map_err(|error| chain(&error))?;
        let text = text.trim();
        // As Standard Webhooks writes secrets; anything else is taken as it is.
        let bytes = match text.strip_prefix("whsec_") {
            Some(encoded) => STANDARD
                .decode(encoded)
                .map_err(|_| format!("{}: what follows whsec_ is not base64", self.secret_file))?,
            None => text.as_bytes().to_vec(),
        };
        if bytes.len() < LEAST_SECRET {
            return Err(format!(
                "{}: the secret has {} bytes; make it at least {LEAST_SECRET}",
                self.secret_file,
                bytes.len()
            ));
        }
        Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
    }

    async fn send(&self, id: &str, body: &str, secret: &hmac::Key) -> Result<(), Failure> {
        let uri: Uri = self.url.parse().map_err(|error| lasting(format!("{}: {error}", self.url)))?;
        let host = uri.host().ok_or_else(|| lasting(format!("{}: no host", self.url)))?.to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((bare, port)).await;
        let tcp = tcp.map_err(|error| passing(format!("{host}:{port}: {error}")))?;
        let timestamp = OffsetDateTime::now_utc().unix_timestamp();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::post(path)
            .header(header::HOST, uri.authority().map_or(host.as_str(), |authority| authority.as_str()))
            .header(header::CONTENT_TYPE, "application/cloudevents+json")
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signature(secret, id, timestamp, body))
            .body(Full::new(Bytes::from(body.to_owned())))
            .map_err(|error| lasting(format!("{}: {error}", self.url)))?;
        if !is_tls {
            return exchange(tcp, request).await;
        }
        let name =
            ServerName::try_from(bare.to_owned()).map_err(|error| lasting(format!("{host}: {error}")))?;
        let config = self.tls().map_err(lasting)?;
        let tls = TlsConnector::from(config).connect(name, tcp).await;
        exchange(tls.map_err(|error| passing(format!("{host}:{port}: {error}")))?, request).await
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        let file = self.ca.as_deref().unwrap_or(SYSTEM_CA);
        let certificates = CertificateDer::pem_file_iter(file).map_err(|error| format!("{file}: {error}"))?;
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates.filter_map(Result::ok));
        if added == 0 {
            return Err(format!("{file} has no certificate of an authority; name one with `ca`"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
    }
}

/// What `webhook-signature` says.
pub(super) fn signature(secret: &hmac::Key, id: &str, timestamp: i64, body: &str) -> String {
    let signed = hmac::sign(secret, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(signed))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(), Failure> {
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| passing(chain(&error)))?;
    let answered = async {
        let response = sender.send_request(request).await.map_err(|error| passing(chain(&error)))?;
        let status = response.status();
        let text = Limited::new(response.into_body(), MOST_ANSWER).collect().await;
        let text = text.map(|it| String::from_utf8_lossy(&it.to_bytes()).into_owned()).unwrap_or_default();
        Ok((status, text))
    };
    let (status, text) = tokio::select! {
        biased;
        answered = answered => answered?,
        _ = connection => return Err(passing("the server hung up")),
    };
    let why = || format!("the server answered {status}: {}", words(&text));
    match status {
        status if status.is_success() => Ok(()),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(passing(why())),
        status if status.is_server_error() => Err(passing(why())),
        _ => Err(lasting(why())),
    }
}
