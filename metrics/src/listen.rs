//! Where metrics are fetched: HTTP/1.1 over a Unix socket, or over TCP with a token, and with the daemon's certificate if it
//! has one. Whoever may fetch them sees all tasks of all users.
//!
//! One request, one connection: a scraper comes a few times a minute, and nobody can hold one open. What Host a request
//! names is not looked at: a page of another origin, whose name was made to point here, does not know the token.

mod options;
mod token;

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Body, Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use shaper_identity::serve::Certificate;
use shaper_proto::peer::{self, Admission};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

pub use self::options::{Address, Config, Options, OptionsError};
use self::token::Token;
use crate::{Exposition, Format, Value, table};

/// The path.
const PATH: &str = "/metrics";
/// Connections at once, …
const CONNECTIONS: usize = 64;
/// … and from one address, if it is not this machine's own.
const CONNECTIONS_EACH: usize = 16;
/// Answers that are made at once: one of a node with 1,000 tasks has some megabytes.
const ANSWERS: usize = 2;
/// How long the other end may take to show what it wants, handshake included, …
const PATIENCE: Duration = Duration::from_secs(5);
/// … and how long all of a connection may last.
const LONGEST: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const LONGEST_HEAD: usize = 16 << 10;
/// Headers of a request.
const MOST_HEADERS: usize = 64;
/// How long to wait after a connection could not be accepted: the next may do better.
const RETRY: Duration = Duration::from_millis(10);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A Unix socket.
    #[error(transparent)]
    Socket(#[from] peer::BindError),
    /// TCP.
    #[error("--metrics: cannot listen on {address}")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The token.
    #[error(transparent)]
    Token(#[from] token::TokenError),
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] shaper_identity::tls::TlsError),
}

enum Bound {
    Socket(UnixListener, PathBuf),
    Tcp { listener: TcpListener, token: Arc<Token>, certificate: Option<Arc<Certificate>> },
}

/// A listener that nobody has connected to yet.
pub struct Listener(Bound);

impl Listener {
    /// Binds the address. Of a Unix socket it changes the umask for a moment (see [`peer::bind`]).
    pub async fn bind(config: &Config) -> Result<Listener, ListenError> {
        Ok(Listener(match &config.address {
            Address::Socket { path, group } => Bound::Socket(peer::bind(path, *group)?, path.clone()),
            Address::Tcp { address, token_file, tls_dir } => {
                let token = Arc::new(Token::load(token_file)?);
                let certificate = tls_dir.as_deref().map(Certificate::load).transpose()?.map(Arc::new);
                let failed = |source| ListenError::Tcp { address: *address, source };
                let listener = TcpListener::bind(*address).await.map_err(failed)?;
                let at = listener.local_addr().map_err(failed)?;
                tracing::info!(address = %at, tls = certificate.is_some(), "serving metrics");
                Bound::Tcp { listener, token, certificate }
            }
        }))
    }

    /// Serves what `scrape` says, for ever. It says nothing while the daemon cannot.
    pub async fn serve<F, S>(self, scrape: S)
    where
        F: Future<Output = Option<Exposition>> + Send + 'static,
        S: Fn() -> F + Send + Sync + 'static,
    {
        let service = Arc::new(Service {
            scrape,
            answers: Semaphore::new(ANSWERS),
            refusals: Refusals::default(),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            sources: Admission::new(CONNECTIONS_EACH),
        });
        match self.0 {
            Bound::Socket(listener, path) => {
                let _removed_in_the_end = Remove(path);
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => service.clone().welcome(None, None, move || async { Ok(stream) }),
                        Err(error) => not_accepted(&error).await,
                    }
                }
            }
            Bound::Tcp { listener, token, certificate } => loop {
                match listener.accept().await {
                    Ok((stream, from)) => {
                        let source = Some(from.ip()).filter(|ip| !ip.to_canonical().is_loopback());
                        match certificate.clone() {
                            None => service
                                .clone()
                                .welcome(Some(token.clone()), source, move || async { Ok(stream) }),
                            Some(certificate) => {
                                let handshake = move || async move {
                                    TlsAcceptor::from(certificate.current().await).accept(stream).await
                                };
                                service.clone().welcome(Some(token.clone()), source, handshake);
                            }
                        }
                    }
                    Err(error) => not_accepted(&error).await,
                }
            },
        }
    }
}

async fn not_accepted(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection for metrics");
    tokio::time::sleep(RETRY).await;
}

/// Removes a socket when it is dropped.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Why a request was refused. The reasons are the labels of one metric.
#[derive(Clone, Copy)]
enum Refusal {
    Token,
    Path,
    Method,
    Body,
    Connections,
}

const REFUSALS: [(Refusal, &[&str]); 5] = [
    (Refusal::Token, &["token"]),
    (Refusal::Path, &["path"]),
    (Refusal::Method, &["method"]),
    (Refusal::Body, &["body"]),
    (Refusal::Connections, &["connections"]),
];

#[derive(Default)]
struct Refusals([AtomicU64; REFUSALS.len()]);

impl Refusals {
    fn count(&self, refusal: Refusal) {
        self.0[refusal as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn add_to(&self, exposition: &mut Exposition) {
        for (refusal, reason) in REFUSALS {
            let count = self.0[refusal as usize].load(Ordering::Relaxed);
            exposition.add(&table::REFUSED, &[], reason, Value::Count(count));
        }
    }
}

struct Service<S> {
    scrape: S,
    answers: Semaphore,
    refusals: Refusals,
    connections: Arc<Semaphore>,
    sources: Admission<IpAddr>,
}

impl<S, F> Service<S>
where
    F: Future<Output = Option<Exposition>> + Send + 'static,
    S: Fn() -> F + Send + Sync + 'static,
{
    /// Serves a connection, unless there are as many as may be: then without a word, and without a line in the log.
    fn welcome<C, T>(
        self: Arc<Self>,
        token: Option<Arc<Token>>,
        source: Option<IpAddr>,
        connect: impl FnOnce() -> C + Send + 'static,
    ) where
        C: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let one_of_all = Arc::clone(&self.connections).try_acquire_owned().ok();
        let one_of_source = source.map(|source| self.sources.admit(source));
        let (Some(one_of_all), None | Some(Some(_))) = (one_of_all, &one_of_source) else {
            return self.refusals.count(Refusal::Connections);
        };
        tokio::spawn(async move {
            let _admitted = (one_of_all, one_of_source);
            let serve = async move {
                let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, connect()).await else { return };
                let service = service_fn(|request| {
                    let (service, token) = (Arc::clone(&self), token.clone());
                    async move { Ok::<_, Infallible>(service.answer(&request, token.as_deref()).await) }
                });
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_headers(MOST_HEADERS);
                builder.max_buf_size(LONGEST_HEAD).keep_alive(false);
                // Whoever hangs up has what it wanted.
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            };
            let _ = tokio::time::timeout(LONGEST, serve).await;
        });
    }

    fn refuse(&self, why: Refusal, status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
        self.refusals.count(why);
        let mut response = plain(status, text);
        if status == StatusCode::UNAUTHORIZED {
            let bearer = header::HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
        }
        response
    }

    async fn answer(&self, request: &Request<Incoming>, token: Option<&Token>) -> Response<Full<Bytes>> {
        if let Some(token) = token
            && !token.is_in(request.headers()).await
        {
            return self.refuse(
                Refusal::Token,
                StatusCode::UNAUTHORIZED,
                "metrics are for those who show the token of --metrics-token-file: Authorization: Bearer TOKEN\n",
            );
        }
        if request.uri().path() != PATH {
            return self.refuse(
                Refusal::Path,
                StatusCode::NOT_FOUND,
                "there is /metrics here, and nothing else\n",
            );
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return self.refuse(Refusal::Method, StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        }
        if !request.body().is_end_stream() {
            return self.refuse(Refusal::Body, StatusCode::PAYLOAD_TOO_LARGE, "no body is read here\n");
        }
        let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
        let format = Format::preferred(accept.unwrap_or_default());
        let Ok(_one_of_answers) = self.answers.acquire().await else { return not_now() };
        let Some(mut exposition) = (self.scrape)().await else { return not_now() };
        self.refusals.add_to(&mut exposition);
        // Some megabytes of text are no work for a thread that serves others.
        match tokio::task::spawn_blocking(move || exposition.encode(format)).await {
            Ok(Ok(text)) => {
                let mut response = Response::new(Full::new(Bytes::from(text)));
                let content_type = header::HeaderValue::from_static(format.content_type());
                response.headers_mut().insert(header::CONTENT_TYPE, content_type);
                response
            }
            failed => {
                tracing::error!(?failed, "metrics cannot be written");
                plain(StatusCode::INTERNAL_SERVER_ERROR, "see the log of the daemon\n")
            }
        }
    }
}

fn not_now() -> Response<Full<Bytes>> {
    plain(StatusCode::SERVICE_UNAVAILABLE, "the daemon is busy or ending; try again\n")
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests;
