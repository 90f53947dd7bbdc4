//! Whom to ask: the agent of this node, or the broker of its cluster.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use shaper_core::id::TaskId;
use tonic::Code;

use crate::{
    client::{Broker, Client, ConnectError},
    cluster::ClusterTask,
    error::Error,
};

/// Where the agent listens, unless told otherwise.
const AGENT: &str = "/run/shaper/agent.sock";
/// Where the broker listens, unless told otherwise.
const BROKER: &str = "/run/shaper/broker.sock";

/// Where a broker is, as `--broker` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BrokerAddress {
    /// There is none.
    Nowhere,
    /// At this socket.
    Socket(PathBuf),
}

/// Why an address was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the address of a Unix socket: write its path, or unix:PATH")]
pub(crate) struct NotASocket(String);

impl FromStr for BrokerAddress {
    type Err = NotASocket;

    fn from_str(text: &str) -> Result<BrokerAddress, NotASocket> {
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
        let has_scheme = path.contains("://") || (path.contains(':') && !path.contains('/'));
        match path {
            "" if text.is_empty() => Ok(BrokerAddress::Nowhere),
            path if path.is_empty() || has_scheme => Err(NotASocket(text.to_owned())),
            path => Ok(BrokerAddress::Socket(path.into())),
        }
    }
}

/// The two that can be asked.
pub(crate) struct Servers {
    agent: PathBuf,
    /// The broker that answers for tasks, where there is one.
    broker: Option<PathBuf>,
}

/// A task, and who knows it.
pub(crate) enum Found {
    /// A task of the cluster.
    Cluster(Broker, Box<ClusterTask>),
    /// A task of this node alone; whether there is one is not known yet.
    Node(Client),
}

impl Servers {
    /// A broker at the usual place counts only for those who named neither a broker nor an agent.
    pub(crate) fn new(agent: Option<PathBuf>, broker: Option<BrokerAddress>) -> Servers {
        let broker = match broker {
            Some(BrokerAddress::Socket(path)) => Some(path),
            Some(BrokerAddress::Nowhere) => None,
            None => Some(PathBuf::from(BROKER)).filter(|path| agent.is_none() && path.exists()),
        };
        Servers { agent: agent.unwrap_or_else(|| AGENT.into()), broker }
    }

    /// The agent of this node.
    pub(crate) async fn agent(&self) -> Result<Client, ConnectError> {
        Client::connect(&self.agent).await
    }

    /// The broker, for what only a broker can do.
    pub(crate) async fn broker(&self) -> Result<Broker, ConnectError> {
        Broker::connect(self.broker.as_deref().unwrap_or(Path::new(BROKER))).await
    }

    /// The broker, where there is one.
    pub(crate) async fn broker_if_any(&self) -> Result<Option<Broker>, ConnectError> {
        match &self.broker {
            Some(socket) => Broker::connect(socket).await.map(Some),
            None => Ok(None),
        }
    }

    /// Who knows a task: the broker, or else the agent, which has tasks that no broker knows.
    pub(crate) async fn find(&self, id: &TaskId) -> Result<Found, Error> {
        let Some(broker) = self.broker_if_any().await? else { return Ok(Found::Node(self.agent().await?)) };
        match broker.get_task(id).await {
            Ok(task) => Ok(Found::Cluster(broker, Box::new(task))),
            Err(unknown) if unknown.code() == Some(Code::NotFound) => match self.agent().await {
                Ok(agent) if agent.get_task(id).await.is_ok() => Ok(Found::Node(agent)),
                _ => Err(unknown.into()),
            },
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_a_socket_or_none() {
        let at = |path: &str| Ok(BrokerAddress::Socket(path.into()));
        assert_eq!("/run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("unix:/run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("unix:///run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("b.sock".parse(), at("b.sock"));
        assert_eq!("".parse(), Ok(BrokerAddress::Nowhere));
        for bad in ["unix:", "http://localhost:80", "localhost:7070"] {
            assert!(bad.parse::<BrokerAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn who_names_an_agent_or_no_broker_means_it() {
        let named = Servers::new(Some("/a.sock".into()), None);
        assert_eq!((named.agent, named.broker), ("/a.sock".into(), None));
        let none = Servers::new(None, Some(BrokerAddress::Nowhere));
        assert_eq!((none.agent, none.broker), (AGENT.into(), None));
        let both = Servers::new(Some("/a.sock".into()), Some(BrokerAddress::Socket("/b.sock".into())));
        assert_eq!(both.broker, Some("/b.sock".into()));
    }
}
