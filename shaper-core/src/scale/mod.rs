//! How many nodes more are asked for, of which group, and which are given back. Pure, as all of this crate.
//!
//! A [`Group`] is a kind of nodes that a [`Provider`] starts and ends. Tasks that fit nowhere, and for which no room can be
//! made, [`pack`] into the nodes that are coming already, and into as few more as it takes: *exactly the right ones* is a
//! packing problem, which is solved greedily, in the order in which the tasks would be placed. [`Standing`] is what is
//! known of a group: what its provider was told, what came of it, and until when it is left alone after a failure. It yields
//! one [`Order`] at a time, which names the size that the group is to have, not a difference: to carry it out twice is to
//! carry it out once.
//!
//! A provider may fail, be slow or lie. An order that fails, nodes that do not come in time, and a size that is not what was
//! asked for are failures, after which the group is left alone for 30 s, 60 s and so on up to half an hour (the figures of
//! the Kubernetes Cluster Autoscaler are 5 and 30 minutes); others are asked instead. A group never grows beyond its `max`.
//! A node that turns out smaller than its group says makes the group's nodes as small for the next packing, or nodes that
//! nothing fits on would be asked for without end.

mod pack;
mod standing;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use self::{
    pack::{Fate, Obstacle, Packing, Room, pack},
    standing::{Facts, NOTES, Note, Observed, Order, OrderKind, Outcome, Standing, WANTS, Wanted},
};
use crate::{
    policy::NamePattern,
    spec::Capacity,
    units::{Bytes, Millicores},
};

/// A span of time, in nanoseconds.
pub type Nanos = u64;

/// All that is scaled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scaling {
    /// How long a task has fitted nowhere before nodes are asked for.
    pub settle: Nanos,
    /// In the order in which they are asked: the first that can help does.
    pub groups: Vec<Group>,
}

/// Nodes of one kind that a provider starts and ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// What its nodes are called. A node that two groups match is of the first.
    pub nodes: NamePattern,
    /// What a new node of it has. Network and block IO that are absent are not compared; GPU memory that is absent is none.
    /// `None`: its provider says it.
    pub capacity: Option<Capacity>,
    /// It is never smaller, if its provider can help it.
    pub min: u32,
    /// It is never made larger.
    pub max: u32,
    /// Between two enlargements.
    pub cooldown: Nanos,
    /// How long a node may take to come.
    pub provision: Nanos,
    /// A node without tasks is given back after so long; `None`: never.
    pub idle: Option<Nanos>,
    /// How long its provider may take to answer.
    pub timeout: Nanos,
    /// Who starts and ends its nodes.
    pub provider: Provider,
}

/// Who starts and ends nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provider {
    /// A server of the Cluster Autoscaler's `externalgrpc` protocol, which is called.
    ExternalGrpc {
        /// `http://HOST:PORT` or `https://HOST:PORT`.
        address: String,
        /// What it calls the group.
        group: String,
        /// Whom it is signed by, a file of PEM; with `https`.
        ca: Option<String>,
        /// The broker's certificate and key there, files of PEM.
        identity: Option<(String, String)>,
    },
    /// An HTTP server that is sent a CloudEvent.
    Webhook {
        /// `http://…` or `https://…`.
        url: String,
        /// A file with the secret by which what is sent is signed.
        secret_file: String,
        /// Whom it is signed by, a file of PEM; `None`: as the system says.
        ca: Option<String>,
    },
    /// A program that is run.
    Exec {
        /// It and its arguments; no shell.
        command: Vec<String>,
    },
    /// KEDA, which asks by itself.
    Keda,
}

impl Provider {
    /// As documents call it.
    pub fn kind(&self) -> &'static str {
        match self {
            Provider::ExternalGrpc { .. } => "externalgrpc",
            Provider::Webhook { .. } => "webhook",
            Provider::Exec { .. } => "exec",
            Provider::Keda => "keda",
        }
    }

    /// Whether it can be asked how large the group is.
    pub fn tells(&self) -> bool {
        matches!(self, Provider::ExternalGrpc { .. })
    }
}

/// What a node has of each resource, as [`pack`] compares it. What is not known never runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Amounts([u64; 5]);

impl Amounts {
    fn of(capacity: &Capacity) -> Amounts {
        let Capacity { cpu, memory, gpu_memory, network, storage_io } = *capacity;
        let known = |amount: Option<u64>| amount.unwrap_or(u64::MAX);
        Amounts([
            cpu.0,
            memory.0,
            gpu_memory.map_or(0, |it| it.0),
            known(network.map(|it| it.0)),
            known(storage_io.map(|it| it.0)),
        ])
    }
}

/// What a new node of a group has: as it is said to be, and no more than what nodes of it turned out to have.
pub fn template(said: &Capacity, members: impl IntoIterator<Item = Capacity>) -> Capacity {
    members.into_iter().fold(*said, |least, node| {
        let lower = |said: Option<u64>, real: Option<u64>| match (said, real) {
            (Some(said), Some(real)) => Some(said.min(real)),
            (said, _) => said,
        };
        Capacity {
            cpu: Millicores(least.cpu.0.min(node.cpu.0)),
            memory: Bytes(least.memory.0.min(node.memory.0)),
            gpu_memory: lower(least.gpu_memory.map(|it| it.0), node.gpu_memory.map(|it| it.0)).map(Bytes),
            network: lower(least.network.map(|it| it.0), node.network.map(|it| it.0))
                .map(crate::units::BitsPerSec),
            storage_io: lower(least.storage_io.map(|it| it.0), node.storage_io.map(|it| it.0))
                .map(crate::units::Iops),
        }
    })
}
