//! The connections to the agent and to the broker, and the calls on them. Wire types become domain
//! types here.
//!
//! A restart of either does not end a task, so whoever waits for a task or follows its log outlives it
//! too: such calls are made again until it is back (see [`Outage`]). Calls that change something are
//! made once, except those that can be repeated without harm.

mod agent;
mod authority;
mod broker;

use std::{
    error::Error as StdError,
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use shaper_identity::{
    Role,
    tls::{self, ClientConfig, Material, TlsError},
};
use shaper_proto::convert::WireError;
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

pub(crate) use self::{
    agent::{Client, LogReader},
    authority::{Authority, Signed},
    broker::{Broker, Door},
};
use crate::{output, users};

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Agent,
    Broker,
    Authority,
}

impl Peer {
    /// How its socket is named on the command line.
    fn option(self) -> &'static str {
        match self {
            Peer::Agent => "--socket",
            Peer::Broker => "--broker",
            Peer::Authority => "--authority",
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Peer::Agent => "agent",
            Peer::Broker => "broker",
            Peer::Authority => "authority",
        })
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// No such socket.
    #[error(
        "there is no {peer} at `{}`: start `shaper-{peer}`, or name its socket with {}",
        .socket.display(), .peer.option()
    )]
    Absent {
        /// Who is not there.
        peer: Peer,
        /// The socket.
        socket: PathBuf,
    },
    /// A socket that its server has left.
    #[error(
        "nothing listens at `{}`: start `shaper-{peer}`, or name its socket with {}",
        .socket.display(), .peer.option()
    )]
    Deserted {
        /// Who is not there.
        peer: Peer,
        /// The socket.
        socket: PathBuf,
    },
    /// The socket is not for everybody.
    #[error("you may not use the {peer} at `{}`: {remedy}", .socket.display())]
    Denied {
        /// Who is there.
        peer: Peer,
        /// The socket.
        socket: PathBuf,
        /// How to get access.
        remedy: String,
    },
    /// Several brokers, and none that serves.
    #[error("none of the brokers leads: {0}; if one was just lost, another does in a few seconds")]
    NoLeader(String),
    /// Nobody would know who we are.
    #[error(
        "`{0}` knows people by their certificates: name the directory of yours with --tls-dir or \
         SHAPER_TLS_DIR; an operator makes one with `shaper pki issue`"
    )]
    NoCertificate(String),
    /// One that does not do.
    #[error(transparent)]
    Certificate(Box<TlsError>),
    /// TLS itself.
    #[error("TLS cannot be used: {0}")]
    Tls(String),
    /// Anything else.
    #[error("cannot connect to the {peer} at `{}`: {reason}", .socket.display())]
    Failed {
        /// Who was to be there.
        peer: Peer,
        /// The socket.
        socket: PathBuf,
        /// What the transport ran into, without its own wrapping.
        reason: String,
    },
}

impl ConnectError {
    fn new(peer: Peer, socket: &Path, error: &tonic::transport::Error) -> ConnectError {
        let socket = socket.to_owned();
        let io = causes(error).find_map(|cause| cause.downcast_ref::<io::Error>());
        match io.map(io::Error::kind) {
            Some(io::ErrorKind::NotFound) => ConnectError::Absent { peer, socket },
            Some(io::ErrorKind::ConnectionRefused) => ConnectError::Deserted { peer, socket },
            Some(io::ErrorKind::PermissionDenied) => {
                let remedy = remedy(owning_group(&socket));
                ConnectError::Denied { peer, socket, remedy }
            }
            _ => {
                let reason = causes(error).last().map(ToString::to_string).unwrap_or_default();
                ConnectError::Failed { peer, socket, reason }
            }
        }
    }
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source())
}

/// The group of the socket, or of the directory that hides it.
fn owning_group(socket: &Path) -> Option<u32> {
    socket.ancestors().find_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.gid())
}

fn remedy(group: Option<u32>) -> String {
    match group {
        None | Some(0) => "only root may, so use sudo".into(),
        Some(gid) => {
            let group = users::group_name(gid).unwrap_or_else(|| gid.to_string());
            format!(
                "it belongs to group `{group}`, so become a member (`sudo usermod -aG {group} \"$USER\"`, then \
                 log in again), or use sudo"
            )
        }
    }
}

/// A call that was not fulfilled.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub(crate) struct CallError {
    operation: String,
    #[source]
    pub(crate) failure: Failure,
}

impl CallError {
    /// Whether the connection ended before an answer.
    fn is_loss(&self) -> bool {
        matches!(self.failure, Failure::Lost(_))
    }

    /// The kind of reason that was given for a refusal.
    pub(crate) fn code(&self) -> Option<Code> {
        match &self.failure {
            Failure::Answered { code, .. } => Some(*code),
            Failure::Lost(_) | Failure::Gone(_) | Failure::Malformed { .. } => None,
        }
    }
}

/// Why it was not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The peer said why.
    #[error("{message}")]
    Answered {
        /// What kind of reason.
        code: Code,
        /// The reason.
        message: String,
    },
    /// The connection ended before an answer.
    #[error("the {0} went away before it answered; whether it still acted on this is not known")]
    Lost(Peer),
    /// It went away and did not come back.
    #[error(
        "the {0} went away and did not come back within {patience} s; tasks go on without it: start \
         `shaper-{0}` and ask again", patience = Outage::PATIENCE.as_secs()
    )]
    Gone(Peer),
    /// An answer that is none; the two are of different versions.
    #[error("the {peer}'s answer was not understood")]
    Malformed {
        /// Who gave it.
        peer: Peer,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
}

impl Failure {
    fn new(peer: Peer, status: &Status) -> Failure {
        // A status with a source was made on this side, of a transport that failed. `Unknown` stands
        // for a stream that was cut off: no peer uses it. `Unavailable` they use when they end.
        if status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Unknown) {
            return Failure::Lost(peer);
        }
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        Failure::Answered { code: status.code(), message }
    }
}

/// The time in which a peer is away: how long to wait before each attempt to reach it again.
#[derive(Debug, Default)]
struct Outage {
    waited: Duration,
    attempts: u32,
}

impl Outage {
    const FIRST_DELAY: Duration = Duration::from_millis(100);
    const LONGEST_DELAY: Duration = Duration::from_secs(2);
    const PATIENCE: Duration = Duration::from_secs(120);

    /// The next delay; `None` once all patience is spent.
    fn delay(&mut self) -> Option<Duration> {
        let delay = Self::FIRST_DELAY.saturating_mul(1 << self.attempts.min(8)).min(Self::LONGEST_DELAY);
        self.waited += delay;
        self.attempts += 1;
        (self.waited <= Self::PATIENCE).then_some(delay)
    }
}

/// A connection. Clones share it; it connects again by itself when it is next used.
#[derive(Clone)]
struct Link {
    peer: Peer,
    channel: Channel,
    /// Whether it was said that the peer is away, so that those who share this say it once.
    away: Arc<AtomicBool>,
}

impl Link {
    async fn connect(peer: Peer, socket: &Path) -> Result<Link, ConnectError> {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address goes into a header that nobody reads.
        let channel = Endpoint::from_static("http://shaper")
            .connect_with_connector(connector)
            .await
            .map_err(|error| ConnectError::new(peer, socket, &error))?;
        Ok(Link { peer, channel, away: Arc::default() })
    }

    /// Over TCP, to a broker of our authority.
    async fn connect_with_certificate(
        peer: Peer,
        address: &str,
        directory: &Path,
    ) -> Result<Link, ConnectError> {
        let config = Material::load(directory).and_then(|material| material.client(&[Role::Broker]));
        let config = config.map_err(|error| ConnectError::Certificate(Box::new(error)))?;
        Link::connect_over_tls(peer, address, config).await
    }

    async fn connect_over_tls(
        peer: Peer,
        address: &str,
        config: Arc<ClientConfig>,
    ) -> Result<Link, ConnectError> {
        let at = address.to_owned();
        let connector = tower::service_fn(move |_| {
            let (at, config) = (at.clone(), Arc::clone(&config));
            async move { tls::connect(&at, config).await }
        });
        let channel = Endpoint::from_static("http://shaper")
            .connect_timeout(Duration::from_secs(10))
            .connect_with_connector(connector)
            .await
            .map_err(|error| ConnectError::new(peer, Path::new(&format!("https://{address}")), &error))?;
        Ok(Link { peer, channel, away: Arc::default() })
    }

    fn failed(&self, operation: impl Into<String>, status: &Status) -> CallError {
        CallError { operation: operation.into(), failure: Failure::new(self.peer, status) }
    }

    fn answer<W>(
        &self,
        operation: impl Into<String>,
        response: Result<Response<W>, Status>,
    ) -> Result<W, CallError> {
        response.map(Response::into_inner).map_err(|status| self.failed(operation, &status))
    }

    /// What the answer means.
    fn domain<W, D: TryFrom<W, Error = WireError>>(
        &self,
        operation: impl Into<String>,
        wire: W,
    ) -> Result<D, CallError> {
        wire.try_into().map_err(|source| CallError {
            operation: operation.into(),
            failure: Failure::Malformed { peer: self.peer, source },
        })
    }

    /// What the answer to a call means.
    fn read<W, D: TryFrom<W, Error = WireError>>(
        &self,
        operation: &str,
        response: Result<Response<W>, Status>,
    ) -> Result<D, CallError> {
        self.answer(operation, response).and_then(|wire| self.domain(operation, wire))
    }

    /// Makes a call again until it meets no outage.
    async fn insist<W, D, F>(&self, operation: String, call: impl Fn(Channel) -> F) -> Result<D, CallError>
    where
        D: TryFrom<W, Error = WireError>,
        F: Future<Output = Result<Response<W>, Status>>,
    {
        let mut outage = Outage::default();
        loop {
            match self.read(&operation, call(self.channel.clone()).await) {
                Err(error) if error.is_loss() => self.sit_out(&mut outage, error).await?,
                outcome => {
                    self.is_back();
                    return outcome;
                }
            }
        }
    }

    /// Waits a while, because the peer was lost; fails when it has been away for too long.
    async fn sit_out(&self, outage: &mut Outage, lost: CallError) -> Result<(), CallError> {
        if !self.away.swap(true, Ordering::Relaxed) {
            output::warn(&format!("the {} went away; waiting for it to come back", self.peer));
        }
        let delay = outage.delay().ok_or(CallError { failure: Failure::Gone(self.peer), ..lost })?;
        tokio::time::sleep(delay).await;
        Ok(())
    }

    fn is_back(&self) {
        self.away.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_met_with_growing_patience_that_ends() {
        let mut outage = Outage::default();
        let delays: Vec<u128> =
            std::iter::from_fn(|| outage.delay()).map(|delay| delay.as_millis()).collect();
        assert_eq!(delays[..7], [100, 200, 400, 800, 1600, 2000, 2000]);
        let total: u128 = delays.iter().sum();
        assert!((118_000..=120_000).contains(&total), "{total}");
    }

    #[test]
    fn who_may_not_connect_is_told_how_to() {
        let denied = |gid| {
            let socket = "/run/shaper/agent.sock".into();
            ConnectError::Denied { peer: Peer::Agent, socket, remedy: remedy(gid) }.to_string()
        };
        let root = "you may not use the agent at `/run/shaper/agent.sock`: only root may, so use sudo";
        assert_eq!(denied(Some(0)), root);
        assert_eq!(denied(None), root);
        assert_eq!(
            denied(Some(3_999_999_999)),
            "you may not use the agent at `/run/shaper/agent.sock`: it belongs to group `3999999999`, so become a \
             member (`sudo usermod -aG 3999999999 \"$USER\"`, then log in again), or use sudo"
        );
    }

    #[test]
    fn a_refusal_is_told_from_a_lost_agent() {
        let failure = |status: Status| Failure::new(Peer::Agent, &status);
        let refused = failure(Status::not_found("no such task"));
        assert_eq!(refused.to_string(), "no such task");
        let wordless = failure(Status::new(Code::PermissionDenied, ""));
        assert!(matches!(wordless, Failure::Answered { code: Code::PermissionDenied, .. }));
        assert!(!wordless.to_string().is_empty());
        assert!(matches!(failure(Status::unavailable("ends")), Failure::Lost(Peer::Agent)));
        let broken = Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert!(matches!(failure(broken), Failure::Lost(Peer::Agent)));
    }
}
