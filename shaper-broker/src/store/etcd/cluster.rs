//! The members of an etcd cluster, one of which is talked to at a time.
//!
//! The library balances over the endpoints that it is given and fails with whichever it picks, so it is given one. A call
//! that the member does not answer in time goes to the next, until one answers or patience is over. So every call must be
//! one that may happen twice: the transactions of [`super`] are made so that the second time finds the first.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::store::StoreError;

/// A member that has not answered by then is asked no more. An election among the members takes one to two seconds.
pub(super) const CALL: Duration = Duration::from_secs(2);
/// A member that takes no connection by then is passed over.
const CONNECT: Duration = Duration::from_millis(500);
/// A member that is stopped, not dead, is noticed by pings while a stream is open. Who pings more often than each five seconds
/// is hung up on by etcd.
const PING: Duration = Duration::from_secs(6);
/// After no member has answered.
const PAUSE: Duration = Duration::from_millis(100);
/// The largest answer that is read: a page of rows.
const MAX_ANSWER: usize = 1 << 30;

/// Where the rows are, and how etcd is spoken to. Nothing in it has been tried yet.
#[derive(Clone)]
pub struct Place {
    endpoints: Vec<String>,
    prefix: String,
    options: ConnectOptions,
    /// The member that those who begin ask first: the one to which somebody else in this process went last.
    first: Arc<AtomicUsize>,
}

impl fmt::Debug for Place {
    // The options have a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { endpoints, prefix, options: _, first: _ } = self;
        f.debug_struct("Place").field("endpoints", endpoints).field("prefix", prefix).finish_non_exhaustive()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of etcd at {}", self.prefix, self.endpoints.join(","))
    }
}

/// What [`Place::check`] is told.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// `http://` or `https://`, one for each member.
    pub endpoints: Vec<String>,
    /// Of all keys.
    pub prefix: String,
    /// Whether what is written may be read and changed on the way to another machine.
    pub insecure: bool,
    /// Whom to believe; else nobody is asked over TLS.
    pub ca: Option<PathBuf>,
    /// A certificate to show, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A user of etcd's, and the file with the password.
    pub user: Option<(String, PathBuf)>,
}

/// Why etcd cannot be used with these options.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Not an address.
    #[error(
        "--etcd-endpoints {0}: say http://HOST:PORT or https://HOST:PORT, several of them separated by commas"
    )]
    Endpoint(String),
    /// In clear.
    #[error(
        "--etcd-endpoints {0}: over plain http anybody on the way reads and changes the cluster's state; use https:// with \
         --etcd-cacert (and --etcd-cert, --etcd-key), or say --etcd-insecure"
    )]
    Clear(String),
    /// TLS without knowing whom to believe.
    #[error("--etcd-endpoints {0} needs --etcd-cacert FILE: the authority that signed etcd's certificates")]
    NoAuthority(String),
    /// Some endpoints in clear, and some not.
    #[error("--etcd-endpoints: either all of them are https://, or none is")]
    Mixed,
    /// Keys would be mixed with those of others.
    #[error("--etcd-prefix {0}: a prefix begins and ends with a slash, such as /shaper/")]
    Prefix(String),
    /// A file that an option names.
    #[error("{option} {}", path.display())]
    File {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Place {
    /// Checks all of it, and reads the files.
    pub fn check(access: Access) -> Result<Place, PlaceError> {
        let Access { endpoints, prefix, insecure, ca, identity, user } = access;
        let uris = endpoints.iter().map(|endpoint| {
            let uri: Option<http::Uri> = endpoint.parse().ok();
            let uri = uri.filter(|uri| uri.port().is_some() && uri.host().is_some());
            uri.ok_or_else(|| PlaceError::Endpoint(endpoint.clone()))
        });
        let uris = uris.collect::<Result<Vec<_>, _>>()?;
        let mut encrypted = 0;
        for (uri, endpoint) in uris.iter().zip(&endpoints) {
            match uri.scheme_str() {
                Some("http") if insecure || is_loopback(uri) => {}
                Some("http") => return Err(PlaceError::Clear(endpoint.clone())),
                Some("https") if ca.is_some() => encrypted += 1,
                Some("https") => return Err(PlaceError::NoAuthority(endpoint.clone())),
                _ => return Err(PlaceError::Endpoint(endpoint.clone())),
            }
        }
        if encrypted != 0 && encrypted != endpoints.len() {
            return Err(PlaceError::Mixed);
        }
        if endpoints.is_empty() {
            return Err(PlaceError::Endpoint(String::new()));
        }
        if !prefix.starts_with('/') || !prefix.ends_with('/') {
            return Err(PlaceError::Prefix(prefix));
        }
        let read = |option, path: PathBuf| {
            fs::read_to_string(&path).map_err(|source| PlaceError::File { option, path, source })
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING, CALL)
            .with_require_leader(true);
        if encrypted != 0 {
            let mut tls = TlsOptions::new();
            if let Some(ca) = ca {
                tls = tls.ca_certificate(Certificate::from_pem(read("--etcd-cacert", ca)?));
            }
            if let Some((certificate, key)) = identity {
                let (certificate, key) = (read("--etcd-cert", certificate)?, read("--etcd-key", key)?);
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        if let Some((name, password)) = user {
            let password = read("--etcd-password-file", password)?;
            options = options.with_user(name, password.trim_end()).with_auto_token_refresh(true);
        }
        Ok(Place { endpoints, prefix, options, first: Arc::default() })
    }

    /// A key of ours in etcd.
    pub(super) fn key(&self, name: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), name.as_bytes()].concat()
    }
}

fn is_loopback(uri: &http::Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A cluster, through one member.
pub(super) struct Cluster {
    pub(super) place: Place,
    at: usize,
    client: Option<Client>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("endpoint", &self.endpoint()).finish_non_exhaustive()
    }
}

impl Cluster {
    pub(super) fn new(place: Place) -> Cluster {
        Cluster { at: place.first.load(Ordering::Relaxed), place, client: None }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.place.endpoints[self.at]
    }

    /// A client of the present member.
    pub(super) async fn client(&mut self) -> Result<Client, Error> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let client = Client::connect([self.endpoint()], Some(self.place.options.clone())).await?;
        Ok(self.client.insert(client).clone())
    }

    /// Talks to another member from here on.
    pub(super) fn pass_over(&mut self) {
        self.client = None;
        self.at = (self.at + 1) % self.place.endpoints.len();
        self.place.first.store(self.at, Ordering::Relaxed);
    }

    /// One call, which may happen twice, to whichever member answers.
    pub(super) async fn call<T, F: Future<Output = Result<T, Error>>>(
        &mut self,
        patience: Duration,
        mut request: impl FnMut(Client) -> F,
    ) -> Result<T, StoreError> {
        let until = Instant::now() + patience;
        let members = self.place.endpoints.len();
        let mut failures = 0;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // One that does not answer leaves time for the others.
            let limit = CALL.min(if failures + 1 < members { left / 2 } else { left });
            let answered = timeout(limit, async { request(self.client().await?).await }).await;
            let error = match answered {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => {
                    Error::GRpcStatus(tonic::Status::deadline_exceeded(format!("no answer in {limit:?}")))
                }
            };
            if !another_may_do(&error) {
                return Err(StoreError::Etcd { endpoint: self.endpoint().to_owned(), source: error.into() });
            }
            failures += 1;
            tracing::warn!(endpoint = self.endpoint(), %error, "no answer from a member of etcd");
            self.pass_over();
            if Instant::now() >= until {
                let endpoints = self.place.endpoints.join(", ");
                return Err(StoreError::Unreachable { endpoints, source: error.into() });
            }
            if failures % members == 0 {
                sleep(PAUSE).await;
            }
        }
    }

    /// A client whose answers may be large.
    pub(super) fn of_large_answers(client: &Client) -> etcd_client::KvClient {
        client.kv_client().max_decoding_message_size(MAX_ANSWER)
    }
}

/// Whether it is this member, or the moment, that is at fault, and not what was asked.
fn another_may_do(error: &Error) -> bool {
    match error {
        Error::TransportError(_) | Error::IoError(_) | Error::WatchError(_) => true,
        Error::GRpcStatus(status) => match status.code() {
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::Aborted => true,
            Code::ResourceExhausted => status.message().contains("too many requests"),
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(endpoint: &str, change: impl FnOnce(&mut Access)) -> Result<Place, PlaceError> {
        let endpoints = endpoint.split(',').map(str::to_owned).collect();
        let mut access = Access { endpoints, prefix: "/shaper/".into(), ..Access::default() };
        change(&mut access);
        Place::check(access)
    }

    #[test]
    fn in_clear_only_on_this_machine_or_when_it_is_said() {
        for local in ["http://127.0.0.1:2379", "http://[::1]:2379", "http://localhost:2379"] {
            check(local, |_| {}).unwrap();
        }
        let error = check("http://192.0.2.1:2379", |_| {}).unwrap_err().to_string();
        assert!(error.contains("--etcd-insecure") && error.contains("--etcd-cacert"), "{error}");
        check("http://192.0.2.1:2379", |access| access.insecure = true).unwrap();
        let error = check("https://192.0.2.1:2379", |_| {}).unwrap_err();
        assert!(matches!(error, PlaceError::NoAuthority(_)), "{error}");
        let ca = tempfile::NamedTempFile::new().unwrap();
        let with_ca = |access: &mut Access| access.ca = Some(ca.path().to_owned());
        let error = check("https://192.0.2.1:2379,http://127.0.0.1:2379", with_ca).unwrap_err();
        assert!(matches!(error, PlaceError::Mixed), "{error}");
    }

    #[test]
    fn what_is_no_endpoint_or_prefix_is_refused() {
        for bad in ["", "127.0.0.1:2379", "http://127.0.0.1", "ftp://127.0.0.1:1", "http://a:1,"] {
            let error = check(bad, |access| access.insecure = true).unwrap_err();
            assert!(matches!(error, PlaceError::Endpoint(_)), "{bad}: {error}");
        }
        for bad in ["", "shaper/", "/shaper"] {
            let error = check("http://127.0.0.1:1", |access| access.prefix = bad.into()).unwrap_err();
            assert!(matches!(error, PlaceError::Prefix(_)), "{bad}: {error}");
        }
    }

    #[test]
    fn the_password_is_not_shown() {
        use std::io::Write;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "open sesame").unwrap();
        let user = Some(("root".to_owned(), file.path().to_owned()));
        let place = check("http://127.0.0.1:2379", |access| access.user = user).unwrap();
        assert!(!format!("{place:?}").contains("sesame"));
    }
}
