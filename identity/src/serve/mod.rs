//! Listeners that know who is at the other end: the kernel says so of a Unix socket, a certificate over TCP. Behind the
//! feature `server`.

mod connection;
mod guard;

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use rustls::ServerConfig;
use shaper_proto::peer;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};

use self::connection::Certified;
pub use self::{
    connection::{Connection, Peer},
    guard::{Asking, Guard, Guarded},
};
use crate::{
    Role,
    access::{Access, AccessError},
    name::{Holder, InvalidIdentity},
    tls::{self, Material, TlsError},
};

/// Connections over TCP, those included that have not shown a certificate yet.
const CONNECTIONS: usize = 1024;
/// How long the other end may take to show one.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a connection could not be accepted: the next may do better.
const RETRY: Duration = Duration::from_millis(10);
/// How often the configuration of identities is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Connections as they come.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>;

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Somebody else's.
    #[error("the certificate in {} is {found}, and a {wanted} serves with one of the role {wanted}", directory.display())]
    Role {
        /// Where.
        directory: PathBuf,
        /// Whose it is.
        found: Box<crate::Identity>,
        /// Whose it should be.
        wanted: Role,
    },
    /// The address.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("it did not show a certificate within {} s", PATIENCE.as_secs())]
    Slow,
    #[error("there was no handshake")]
    Handshake(#[source] io::Error),
    #[error("it has no certificate")]
    Stranger,
    #[error("its certificate names nobody")]
    Nameless(#[source] InvalidIdentity),
    #[error("it is {0}, of another trust domain")]
    Elsewhere(Box<crate::Identity>),
    #[error("{0}: {1}")]
    Distrusted(Box<crate::Identity>, &'static str),
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Who is granted what, as it was read last.
pub type Granted = watch::Receiver<Arc<Access>>;

/// The configuration of identities, read again when it changes. Without a file nobody is granted anything.
pub fn follow_access(path: Option<&Path>) -> Result<(Granted, Option<JoinHandle<()>>), AccessError> {
    let Some(path) = path.map(Path::to_owned) else {
        return Ok((watch::channel(Arc::default()).1, None));
    };
    let (sender, receiver) = watch::channel(Arc::new(Access::load(&path)?));
    let follower = tokio::spawn(async move {
        let mut looks = tokio::time::interval(LOOK);
        let mut told = None;
        loop {
            looks.tick().await;
            let path = path.clone();
            let Ok(loaded) = tokio::task::spawn_blocking(move || Access::load(&path)).await else { return };
            match loaded {
                Ok(access) => {
                    told = None;
                    let is_new = sender.send_if_modified(|known| {
                        let is_new = **known != access;
                        if is_new {
                            *known = Arc::new(access);
                        }
                        is_new
                    });
                    if is_new {
                        tracing::info!(target: "audit", "the configuration of identities was read anew");
                    }
                }
                // What was read before stays in force.
                Err(error) => {
                    let error = chain(&error);
                    if told.as_ref() != Some(&error) {
                        tracing::error!(error, "the configuration of identities cannot be read anew");
                        told = Some(error);
                    }
                }
            }
        }
    });
    Ok((receiver, Some(follower)))
}

/// The connections of a Unix socket, and the task that accepts them.
pub fn local(listener: UnixListener) -> (Incoming, JoinHandle<()>) {
    let (incoming, accept) = peer::incoming(listener);
    (Box::pin(incoming.map(|stream| stream.map(Connection::Local))), accept)
}

/// A listener over TCP.
pub struct Tcp {
    listener: TcpListener,
    directory: PathBuf,
    material: Material,
    config: Arc<ServerConfig>,
    access: watch::Receiver<Arc<Access>>,
}

impl Tcp {
    /// Listens, with the certificate of a directory, which must be of `role`.
    pub async fn bind(
        address: std::net::SocketAddr,
        directory: &Path,
        role: Role,
        access: watch::Receiver<Arc<Access>>,
    ) -> Result<Tcp, ServeError> {
        let material = Material::load(directory)?;
        let found = &material.holder.identity;
        if found.role() != role {
            let (directory, found) = (directory.to_owned(), Box::new(found.clone()));
            return Err(ServeError::Role { directory, found, wanted: role });
        }
        let config = material.server(false)?;
        let failed = |source| ServeError::Listen { address: address.to_string(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        Ok(Tcp { listener, directory: directory.to_owned(), material, config, access })
    }

    /// Where, with the port that the kernel chose if none was asked for.
    pub fn address(&self) -> io::Result<std::net::SocketAddr> {
        self.listener.local_addr()
    }

    /// The connections of those who have shown a certificate, and the task that accepts them.
    pub fn incoming(mut self) -> (Incoming, JoinHandle<()>) {
        let (connections, incoming) = mpsc::channel(16);
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        let accept = tokio::spawn(async move {
            loop {
                let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
                let (stream, from) = match self.listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                };
                self.reload();
                let acceptor = TlsAcceptor::from(Arc::clone(&self.config));
                let trust_domain = self.material.holder.identity.trust_domain().to_owned();
                let (access, connections) = (self.access.clone(), connections.clone());
                tokio::spawn(async move {
                    match welcome(stream, &acceptor, &trust_domain, access, permit).await {
                        Ok(certified) => {
                            // Without a server there is nobody to be connected to.
                            let _ = connections.send(Ok(Connection::Certified(Box::new(certified)))).await;
                        }
                        Err(error) => {
                            tracing::warn!(target: "audit", %from, reason = chain(&error), "refused a connection");
                        }
                    }
                });
            }
        });
        (Box::pin(ReceiverStream::new(incoming)), accept)
    }

    /// Takes other certificates into use, if there are any. Those that do not do change nothing.
    fn reload(&mut self) {
        let is_same = tls::fingerprint_of(&self.directory).is_ok_and(|now| now == self.material.fingerprint);
        if is_same {
            return;
        }
        let reloaded = Material::load(&self.directory).and_then(|material| {
            let config = material.server(false)?;
            Ok((material, config))
        });
        match reloaded {
            Ok((material, config)) if material.holder.identity == self.material.holder.identity => {
                tracing::info!(target: "audit", serial = material.holder.serial, "other certificates are in use");
                (self.material, self.config) = (material, config);
            }
            Ok((material, _)) => {
                let other = material.holder.identity.to_string();
                tracing::error!(other, "the certificate was replaced by somebody else's, and is not used");
            }
            Err(error) => tracing::error!(error = chain(&error), "the certificates cannot be read anew"),
        }
    }
}

/// Finds out who is at the other end.
async fn welcome(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    trust_domain: &str,
    access: watch::Receiver<Arc<Access>>,
    permit: OwnedSemaphorePermit,
) -> Result<Certified, Unfit> {
    stream.set_nodelay(true).map_err(Unfit::Handshake)?;
    let stream = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await.map_err(|_| Unfit::Slow)?;
    let stream = stream.map_err(Unfit::Handshake)?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let holder = Holder::of(shown.ok_or(Unfit::Stranger)?).map_err(Unfit::Nameless)?;
    let identity = || Box::new(holder.identity.clone());
    if holder.identity.trust_domain() != trust_domain {
        return Err(Unfit::Elsewhere(identity()));
    }
    let distrust = access.borrow().distrust(&holder, tls::now());
    if let Some(why) = distrust {
        return Err(Unfit::Distrusted(identity(), why));
    }
    Ok(Certified::new(stream, Arc::new(holder), access, permit))
}
