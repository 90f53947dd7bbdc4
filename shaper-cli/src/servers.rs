//! Whom to ask: the agent of this node, or the broker of its cluster.

use std::{
    path::{self, Path, PathBuf},
    str::FromStr,
};

use shaper_core::id::TaskId;
use shaper_identity::address::{Address, InvalidAddress};
use tonic::Code;

use crate::{
    client::{Broker, Client, ConnectError},
    cluster::ClusterTask,
    contexts::Context,
    error::Error,
};

/// Where the agent listens, unless told otherwise.
const AGENT: &str = "/run/shaper/agent.sock";
/// Where the broker listens, unless told otherwise.
const BROKER: &str = "/run/shaper/broker.sock";

/// Where a broker is, or those of a cluster are, as `--broker` names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BrokerAddress {
    /// There is none.
    Nowhere,
    /// There: of several, one leads.
    At(Vec<Address>),
}

impl FromStr for BrokerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<BrokerAddress, InvalidAddress> {
        if text.is_empty() {
            return Ok(BrokerAddress::Nowhere);
        }
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(BrokerAddress::At)
    }
}

/// What options name, to be found from any directory.
pub(crate) fn said(
    agent: Option<PathBuf>,
    broker: Option<BrokerAddress>,
    tls_dir: Option<PathBuf>,
) -> Result<Context, Error> {
    let absolute = |path: PathBuf| path::absolute(path).map_err(Error::CurrentDirectory);
    let broker = broker.map(|broker| match broker {
        BrokerAddress::Nowhere => String::new(),
        BrokerAddress::At(all) => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    });
    Ok(Context {
        broker,
        socket: agent.map(absolute).transpose()?,
        tls_dir: tls_dir.map(absolute).transpose()?,
    })
}

/// The two that can be asked.
pub(crate) struct Servers {
    agent: PathBuf,
    /// The broker that answers for tasks, where there is one, or those of which one does.
    brokers: Vec<Address>,
    /// Our certificate, for a broker over TCP.
    tls_dir: Option<PathBuf>,
}

/// A task, and who knows it.
pub(crate) enum Found {
    /// A task of the cluster.
    Cluster(Broker, Box<ClusterTask>),
    /// A task of this node alone; whether there is one is not known yet.
    Node(Client),
}

impl Servers {
    /// The directory of our certificate.
    pub(crate) fn tls_dir(&self) -> Option<&Path> {
        self.tls_dir.as_deref()
    }

    /// What is not said is the context's, and else where it usually is. The broker of a context, and one at the usual place,
    /// count only for those who named neither a broker nor an agent.
    pub(crate) fn new(
        agent: Option<PathBuf>,
        mut broker: Option<BrokerAddress>,
        tls_dir: Option<PathBuf>,
        context: Option<&Context>,
    ) -> Result<Servers, Error> {
        let mut known = context.cloned().unwrap_or_default();
        if broker.is_none()
            && agent.is_none()
            && let Some(text) = &known.broker
        {
            broker = Some(text.parse().map_err(|error| Error::ContextBroker(text.clone(), error))?);
        }
        let (agent, tls_dir) = (agent.or(known.socket.take()), tls_dir.or(known.tls_dir.take()));
        let brokers = match broker {
            Some(BrokerAddress::At(addresses)) => addresses,
            Some(BrokerAddress::Nowhere) => Vec::new(),
            None => Some(PathBuf::from(BROKER))
                .filter(|path| agent.is_none() && path.exists())
                .map(Address::Socket)
                .into_iter()
                .collect(),
        };
        Ok(Servers { agent: agent.unwrap_or_else(|| AGENT.into()), brokers, tls_dir })
    }

    /// The agent of this node.
    pub(crate) async fn agent(&self) -> Result<Client, ConnectError> {
        Client::connect(&self.agent).await
    }

    /// The broker, for what only a broker can do.
    pub(crate) async fn broker(&self) -> Result<Broker, ConnectError> {
        match self.broker_if_any().await? {
            Some(broker) => Ok(broker),
            None => Broker::connect(&Address::Socket(BROKER.into()), None).await,
        }
    }

    /// The broker, where there is one.
    pub(crate) async fn broker_if_any(&self) -> Result<Option<Broker>, ConnectError> {
        let tls_dir = self.tls_dir.as_deref();
        match self.brokers.as_slice() {
            [] => Ok(None),
            // It says itself if it does not serve.
            [address] => Broker::connect(address, tls_dir).await.map(Some),
            addresses => Broker::connect_to_leader(addresses, tls_dir).await.map(Some),
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
    fn a_broker_is_an_address_or_none() {
        let at = |path: &str| Ok(BrokerAddress::At(vec![Address::Socket(path.into())]));
        assert_eq!("/run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("unix:/run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("unix:///run/b.sock".parse(), at("/run/b.sock"));
        assert_eq!("b.sock".parse(), at("b.sock"));
        assert_eq!("".parse(), Ok(BrokerAddress::Nowhere));
        let tls = |at: &str| Address::Tls(at.into());
        assert_eq!("https://b:1".parse(), Ok(BrokerAddress::At(vec![tls("b:1")])));
        assert_eq!("https://b:1,https://c:2".parse(), Ok(BrokerAddress::At(vec![tls("b:1"), tls("c:2")])));
        for bad in ["https://b:1,", ",", "unix:", "http://localhost:80", "localhost:7070"] {
            assert!(bad.parse::<BrokerAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn who_names_an_agent_or_no_broker_means_it() {
        let servers =
            |agent: Option<&str>, broker| Servers::new(agent.map(Into::into), broker, None, None).unwrap();
        let named = servers(Some("/a.sock"), None);
        assert_eq!((named.agent, named.brokers), ("/a.sock".into(), vec![]));
        let none = servers(None, Some(BrokerAddress::Nowhere));
        assert_eq!((none.agent, none.brokers), (AGENT.into(), vec![]));
        let socket = Address::Socket("/b.sock".into());
        let both = servers(Some("/a.sock"), Some(BrokerAddress::At(vec![socket.clone()])));
        assert_eq!(both.brokers, [socket]);
    }

    #[test]
    fn what_is_not_said_is_the_contexts() {
        let context = said(Some("/c.sock".into()), Some("https://b:1".parse().unwrap()), Some("/tls".into()));
        let context = context.unwrap();
        let servers = |agent: Option<&str>, broker| {
            Servers::new(agent.map(Into::into), broker, None, Some(&context)).unwrap()
        };
        let all = servers(None, None);
        assert_eq!((all.agent, all.brokers), ("/c.sock".into(), vec![Address::Tls("b:1".into())]));
        assert_eq!(all.tls_dir, Some("/tls".into()));
        // As without a context: who names an agent means it.
        let agent = servers(Some("/a.sock"), None);
        assert_eq!((agent.agent, agent.brokers), ("/a.sock".into(), vec![]));
        let none = servers(None, Some(BrokerAddress::Nowhere));
        assert_eq!((none.agent, none.brokers), ("/c.sock".into(), vec![]));
        let wrong = Context { broker: Some("http://b".into()), ..Context::default() };
        assert!(Servers::new(None, None, None, Some(&wrong)).is_err());
    }
}
