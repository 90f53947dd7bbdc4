//! The listener: HTTP/1.1, with TLS elsewhere than on loopback; bounded in connections and in what is read of each.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use shaper_identity::{serve::Certificate, tls::TlsError};
use shaper_proto::peer::Admission;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::Config;

/// Connections at once, …
const CONNECTIONS: usize = 256;
/// … and from one address, if it is not this machine's own.
const CONNECTIONS_EACH: usize = 32;
/// How long the other end may take to show what it wants, handshake included.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the other end may take nothing of what it is sent: a page is not kept for whoever does not read it.
const UNREAD: Duration = Duration::from_secs(20);
/// How long all of a connection may last: a browser makes another.
const LONGEST: Duration = Duration::from_secs(10 * 60);
/// Bytes of a request's head.
const LONGEST_HEAD: usize = 32 << 10;
/// Headers of a request.
const MOST_HEADERS: usize = 64;
/// How long to wait after a connection could not be accepted: the next may do better.
const RETRY: Duration = Duration::from_millis(10);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address.
    #[error("--web: cannot listen on {address}")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A listener that nobody has connected to yet.
pub struct Listener {
    listener: TcpListener,
    certificate: Option<Arc<Certificate>>,
    address: SocketAddr,
    names: Vec<String>,
}

impl Listener {
    /// Binds the address.
    pub async fn bind(config: &Config) -> Result<Listener, ListenError> {
        let failed = |source| ListenError::Tcp { address: config.address, source };
        let certificate = config.tls_dir.as_deref().map(Certificate::load).transpose()?.map(Arc::new);
        let listener = TcpListener::bind(config.address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, tls = certificate.is_some(), "serving the web page");
        Ok(Listener { listener, certificate, address, names: config.hosts.clone() })
    }

    /// Under which names it is found.
    pub fn hosts(&self) -> Vec<String> {
        let ip = self.address.ip();
        let own = (!ip.is_unspecified()).then(|| match ip {
            std::net::IpAddr::V4(ip) => ip.to_string(),
            std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        });
        own.into_iter().chain(["localhost".to_owned()]).chain(self.names.iter().cloned()).collect()
    }

    /// Where a browser finds it: on loopback at its address, for other names are those of a proxy, whose port nobody knows here.
    pub fn origin(&self) -> String {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        match self.names.first().filter(|_| self.certificate.is_some()) {
            Some(name) => format!("{scheme}://{name}:{}", self.address.port()),
            None => format!("{scheme}://{}", self.address),
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Serves it, for ever.
    pub async fn serve(self, router: Router) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let sources = Admission::new(CONNECTIONS_EACH);
        loop {
            let (stream, from) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for the web page");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let source = Some(from.ip()).filter(|ip| !ip.to_canonical().is_loopback());
            let one_of_all = Arc::clone(&connections).try_acquire_owned().ok();
            let one_of_source = source.map(|source| sources.admit(source));
            // Without a word, and without a line in the log, where there are as many as may be.
            let (Some(one_of_all), None | Some(Some(_))) = (one_of_all, &one_of_source) else { continue };
            let (certificate, router) = (self.certificate.clone(), router.clone());
            tokio::spawn(async move {
                let _admitted = (one_of_all, one_of_source);
                match certificate {
                    None => connection(stream, router).await,
                    Some(certificate) => {
                        let acceptor = TlsAcceptor::from(certificate.current().await);
                        if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await
                        {
                            connection(stream, router).await;
                        }
                    }
                }
            });
        }
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service =
        service_fn(|request: http::Request<Incoming>| router.clone().oneshot(request.map(Body::new)));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_headers(MOST_HEADERS);
    builder.max_buf_size(LONGEST_HEAD);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(UNREAD));
    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), service);
    // Whoever hangs up has what it wanted.
    let _ = tokio::time::timeout(LONGEST, connection).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::Instant,
    };

    use super::*;

    fn router() -> Router {
        Router::new().route("/", get(|| async { "x".repeat(1 << 20) }))
    }

    #[tokio::test(start_paused = true)]
    async fn web_a_page_is_not_kept_for_whoever_does_not_read_it() {
        let (ours, mut theirs) = duplex(4096);
        theirs.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let begun = Instant::now();
        connection(ours, router()).await;
        let took = begun.elapsed();
        assert!(took >= UNREAD && took < UNREAD + PATIENCE, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn web_a_page_may_be_read_slowly() {
        let (ours, mut theirs) = duplex(4096);
        let served = tokio::spawn(connection(ours, router()));
        theirs.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let (mut all, mut some) = (0, vec![0; 64 << 10]);
        loop {
            tokio::time::sleep(UNREAD / 50).await;
            match theirs.read(&mut some).await.unwrap() {
                0 => break,
                read => all += read,
            }
        }
        assert!(all > 1 << 20, "{all}");
        served.await.unwrap();
    }
}
