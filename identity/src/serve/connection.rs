//! A connection of somebody who is known, for as long as they are believed.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use shaper_proto::peer::{LocalPeer, PeerStream, Permit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, watch},
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::{access::Access, name::Holder, tls::now};

/// Clocks are set: what ends later is looked at again by then.
const LONGEST_LOOK: u64 = 60;
/// How long somebody without a certificate may stay.
const STAY: Duration = Duration::from_secs(10);

/// What a connection holds of what there is for all, and of what there is for whoever is at its other end.
pub(super) type Permits = (OwnedSemaphorePermit, Permit<String>);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Peer {
    /// As the kernel says.
    Local(LocalPeer),
    /// As a certificate says.
    Certified(Arc<Holder>),
    /// Nobody says, where those may come who want a certificate.
    Stranger(IpAddr),
}

/// A connection, on whichever listener.
pub enum Connection {
    /// On a Unix socket.
    Local(PeerStream),
    /// Over TCP.
    Certified(Box<Certified>),
    /// Over TCP, without a certificate.
    Stranger(Box<Stranger>),
}

/// A connection of somebody who has no certificate yet. It lasts no longer than it takes to come by one.
pub struct Stranger {
    stream: TlsStream<TcpStream>,
    from: IpAddr,
    end: Pin<Box<Sleep>>,
    _permits: Permits,
}

impl Stranger {
    pub(super) fn new(stream: TlsStream<TcpStream>, from: IpAddr, permits: Permits) -> Stranger {
        Stranger { stream, from, end: Box::pin(sleep(STAY)), _permits: permits }
    }
}

/// A connection of the holder of a certificate. It breaks off, and with it every call and stream, when the certificate
/// expires or is revoked.
pub struct Certified {
    stream: TlsStream<TcpStream>,
    holder: Arc<Holder>,
    /// `None`: not believed any more.
    distrusted: Option<Pin<Box<dyn Future<Output = &'static str> + Send>>>,
    _permits: Permits,
}

async fn distrusted(holder: Arc<Holder>, mut access: watch::Receiver<Arc<Access>>) -> &'static str {
    loop {
        let now = now();
        if let Some(why) = access.borrow_and_update().distrust(&holder, now) {
            return why;
        }
        let left = u64::try_from(holder.not_after - now).unwrap_or_default().clamp(1, LONGEST_LOOK);
        // An end of the configuration's follower changes nothing: what it read last holds.
        let _ = tokio::time::timeout(Duration::from_secs(left), async {
            if access.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
        .await;
    }
}

impl Certified {
    pub(super) fn new(
        stream: TlsStream<TcpStream>,
        holder: Arc<Holder>,
        access: watch::Receiver<Arc<Access>>,
        permits: Permits,
    ) -> Certified {
        let distrusted = Some(Box::pin(distrusted(Arc::clone(&holder), access)) as Pin<Box<_>>);
        Certified { stream, holder, distrusted, _permits: permits }
    }

    /// Fails once the other end is not believed any more. Polled at each read, which a server always waits for.
    fn poll_trust(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(distrusted) = &mut self.distrusted else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        match distrusted.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(reason) => {
                let who = &self.holder.identity;
                tracing::warn!(target: "audit", %who, reason, "broke off a connection");
                self.distrusted = None;
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason))
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match self {
            Connection::Local(stream) => Peer::Local(stream.connect_info()),
            Connection::Certified(certified) => Peer::Certified(Arc::clone(&certified.holder)),
            Connection::Stranger(stranger) => Peer::Stranger(stranger.from),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Local(stream) => Pin::new(stream).poll_read(context, buffer),
            Connection::Certified(certified) => {
                if let Err(error) = certified.poll_trust(context) {
                    return Poll::Ready(Err(error));
                }
                Pin::new(&mut certified.stream).poll_read(context, buffer)
            }
            Connection::Stranger(stranger) => {
                if stranger.end.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                Pin::new(&mut stranger.stream).poll_read(context, buffer)
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Local(stream) => Pin::new(stream).poll_write(context, data),
            Connection::Certified(certified) => Pin::new(&mut certified.stream).poll_write(context, data),
            Connection::Stranger(stranger) => Pin::new(&mut stranger.stream).poll_write(context, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Local(stream) => Pin::new(stream).poll_flush(context),
            Connection::Certified(certified) => Pin::new(&mut certified.stream).poll_flush(context),
            Connection::Stranger(stranger) => Pin::new(&mut stranger.stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Local(stream) => Pin::new(stream).poll_shutdown(context),
            Connection::Certified(certified) => Pin::new(&mut certified.stream).poll_shutdown(context),
            Connection::Stranger(stranger) => Pin::new(&mut stranger.stream).poll_shutdown(context),
        }
    }
}
