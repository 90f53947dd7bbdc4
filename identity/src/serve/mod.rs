//! Listeners that know who is at the other end: the kernel says so of a Unix socket, a certificate over TCP. Behind the
//! feature `server`.

mod certificate;
mod connection;
mod guard;
mod limits;

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use rustls::ServerConfig;
use shaper_proto::peer::{self, Admission, Permit};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};

use self::connection::{Certified, Stranger};
pub use self::{
    certificate::Certificate,
    connection::{Connection, Peer},
    guard::{Asking, Guard, Guarded},
    limits::{Excess, Limits},
};
use crate::{
    Role,
    access::{Access, AccessError},
    name::{Holder, InvalidIdentity},
    tls::{self, Material, TlsError},
};

/// Connections over TCP of those who have shown who they are.
const CONNECTIONS: usize = 16_384;
/// Of those, of one identity.
const CONNECTIONS_EACH: usize = 64;
/// Connections over TCP that have not shown a certificate yet.
const HANDSHAKES: usize = 512;
/// Of those, from one address.
const HANDSHAKES_EACH: usize = 32;
/// How long the other end may take to show one.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a connection could not be accepted: the next may do better.
const RETRY: Duration = Duration::from_millis(10);
/// How often the configuration of identities and the certificates are looked at.
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
    #[error("{0} has {CONNECTIONS_EACH} connections already")]
    TooMany(String),
    #[error("there are {CONNECTIONS} connections already")]
    Full,
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
    admits_strangers: bool,
    material: Material,
    config: Arc<ServerConfig>,
    access: watch::Receiver<Arc<Access>>,
    /// The last error about the certificates.
    told: Option<String>,
}

/// Whose a connection is before anybody has said so. Of IPv6 the network: whoever has one address has all of them.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Tcp {
    /// Listens, with the certificate of a directory, which must be of `role`. An authority admits strangers: who wants a
    /// certificate has none.
    pub async fn bind(
        address: SocketAddr,
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
        let admits_strangers = role == Role::Authority;
        let config = material.server(admits_strangers)?;
        let failed = |source| ServeError::Listen { address: address.to_string(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let directory = directory.to_owned();
        Ok(Tcp { listener, directory, admits_strangers, material, config, access, told: None })
    }

    /// Where, with the port that the kernel chose if none was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The connections of those who have shown a certificate, and the task that accepts them.
    pub fn incoming(mut self) -> (Incoming, JoinHandle<()>) {
        let (connections, incoming) = mpsc::channel(16);
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let sources = Admission::new(HANDSHAKES_EACH);
        let room = Room {
            all: Arc::new(Semaphore::new(CONNECTIONS)),
            each: Arc::new(Admission::new(CONNECTIONS_EACH)),
        };
        let accept = tokio::spawn(async move {
            let mut looks = tokio::time::interval(LOOK);
            loop {
                let Ok(handshake) = Arc::clone(&handshakes).acquire_owned().await else { return };
                let accepted = loop {
                    tokio::select! {
                        accepted = self.listener.accept() => break accepted,
                        _ = looks.tick() => self.reload().await,
                    }
                };
                let (stream, from) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                };
                // Without a word, and without a line in the log: it would be as long as whoever does this likes.
                let Some(one_of_source) = sources.admit(source(from.ip())) else { continue };
                let welcome = Welcome {
                    acceptor: TlsAcceptor::from(Arc::clone(&self.config)),
                    trust_domain: self.material.holder.identity.trust_domain().to_owned(),
                    admits_strangers: self.admits_strangers,
                    access: self.access.clone(),
                    room: room.clone(),
                };
                let connections = connections.clone();
                tokio::spawn(async move {
                    let welcomed = welcome.welcome(stream, from.ip()).await;
                    drop::<(OwnedSemaphorePermit, Permit<IpAddr>)>((handshake, one_of_source));
                    match welcomed {
                        Ok(connection) => {
                            // Without a server there is nobody to be connected to.
                            let _ = connections.send(Ok(connection)).await;
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
    async fn reload(&mut self) {
        let (directory, known) = (self.directory.clone(), self.material.fingerprint.clone());
        let admits_strangers = self.admits_strangers;
        let load = move || {
            if tls::fingerprint_of(&directory).is_ok_and(|now| now == known) {
                return Ok(None);
            }
            let material = Material::load(&directory)?;
            let config = material.server(admits_strangers)?;
            Ok::<_, TlsError>(Some((material, config)))
        };
        let Ok(reloaded) = tokio::task::spawn_blocking(load).await else { return };
        match reloaded {
            Ok(None) => self.told = None,
            Ok(Some((material, config))) if material.holder.identity == self.material.holder.identity => {
                tracing::info!(target: "audit", serial = material.holder.serial, "other certificates are in use");
                (self.material, self.config, self.told) = (material, config, None);
            }
            Ok(Some((material, _))) => {
                let other = material.holder.identity;
                self.tell(format!("the certificate was replaced by that of {other}, and is not used"));
            }
            Err(error) => self.tell(format!("the certificates cannot be read anew: {}", chain(&error))),
        }
    }

    /// Says it once.
    fn tell(&mut self, text: String) {
        if self.told.as_ref() != Some(&text) {
            tracing::error!("{text}");
            self.told = Some(text);
        }
    }
}

/// What there is of connections.
#[derive(Clone)]
struct Room {
    all: Arc<Semaphore>,
    each: Arc<Admission<String>>,
}

impl Room {
    fn take(&self, whose: String) -> Result<connection::Permits, Unfit> {
        let each = self.each.admit(whose.clone()).ok_or(Unfit::TooMany(whose))?;
        let one_of_all = Arc::clone(&self.all).try_acquire_owned().map_err(|_| Unfit::Full)?;
        Ok((one_of_all, each))
    }
}

/// Finds out who is at the other end.
struct Welcome {
    acceptor: TlsAcceptor,
    trust_domain: String,
    admits_strangers: bool,
    access: watch::Receiver<Arc<Access>>,
    room: Room,
}

impl Welcome {
    async fn welcome(self, stream: TcpStream, from: IpAddr) -> Result<Connection, Unfit> {
        stream.set_nodelay(true).map_err(Unfit::Handshake)?;
        let stream = tokio::time::timeout(PATIENCE, self.acceptor.accept(stream)).await;
        let stream = stream.map_err(|_| Unfit::Slow)?.map_err(Unfit::Handshake)?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let Some(shown) = shown else {
            if !self.admits_strangers {
                return Err(Unfit::Stranger);
            }
            let permits = self.room.take(source(from).to_string())?;
            return Ok(Connection::Stranger(Box::new(Stranger::new(stream, from, permits))));
        };
        let holder = Holder::of(shown).map_err(Unfit::Nameless)?;
        let identity = || Box::new(holder.identity.clone());
        if holder.identity.trust_domain() != self.trust_domain {
            return Err(Unfit::Elsewhere(identity()));
        }
        let distrust = self.access.borrow().distrust(&holder, tls::now());
        if let Some(why) = distrust {
            return Err(Unfit::Distrusted(identity(), why));
        }
        let permits = self.room.take(holder.identity.to_string())?;
        Ok(Connection::Certified(Box::new(Certified::new(stream, Arc::new(holder), self.access, permits))))
    }
}
