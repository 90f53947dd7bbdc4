//! What was done to a task: who changed what, why, and what came of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    id::ExecutionId,
    task::{Owner, UnixNanos},
};

/// Who wanted a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// The caller of a request, as the kernel named it.
    User(u32),
    /// The broker, in this epoch.
    Broker(u64),
    /// A policy.
    Policy(String),
    /// The agent itself: one of its loops, or its start.
    Agent(String),
    /// A process that is not shaper's.
    Process {
        /// Its pid; 0: nobody saw it.
        pid: u32,
        /// Its name (`/proc/PID/comm`); empty: it had ended before anybody could look.
        name: String,
    },
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::User(uid) => f.pad(&format!("uid {uid}")),
            Actor::Broker(epoch) => f.pad(&format!("broker, epoch {epoch}")),
            Actor::Policy(name) => f.pad(&format!("policy {name}")),
            Actor::Agent(part) => f.pad(&format!("agent, {part}")),
            Actor::Process { pid: 0, .. } => f.pad("a process that nobody saw"),
            Actor::Process { pid, name } if name.is_empty() => f.pad(&format!("pid {pid}, which has ended")),
            Actor::Process { pid, name } => f.pad(&format!("{name} (pid {pid})")),
        }
    }
}

/// Who wanted a change, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Who.
    pub actor: Actor,
    /// Why, in words.
    pub reason: String,
}

impl Cause {
    /// A cause.
    pub fn new(actor: Actor, reason: impl Into<String>) -> Cause {
        Cause { actor, reason: reason.into() }
    }

    /// Of a part of the agent.
    pub fn agent(part: &str, reason: impl Into<String>) -> Cause {
        Cause::new(Actor::Agent(part.to_owned()), reason)
    }
}

/// What kind of entry it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A change that stands until the next, over restarts of the agent.
    Standing,
    /// A change that goes with the agent that made it.
    Transient,
    /// The baseline was put back.
    Release,
    /// Somebody else turned a knob that shaper holds.
    SecondWriter,
    /// Older entries are gone; this is what stood then, and what was there before anything was turned.
    Summary,
}

/// One knob of a change, in the kernel's terms for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnobChange {
    /// What was turned.
    pub knob: String,
    /// What it held.
    pub before: String,
    /// What it was to hold.
    pub after: String,
}

/// What came of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is in force.
    Done,
    /// It failed, and everything is as it was before.
    RolledBack(String),
    /// It failed, and not everything could be put back.
    Failed(String),
    /// The agent died before it could say; what it found when it came back is another entry.
    Unknown,
}

/// An entry of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number on this node.
    pub number: u64,
    /// When.
    pub at: UnixNanos,
    /// Of which run of which task.
    pub execution: ExecutionId,
    /// Whose.
    pub owner: Owner,
    /// What kind it is.
    pub kind: Kind,
    /// Who, and why.
    pub cause: Cause,
    /// What was turned.
    pub changes: Vec<KnobChange>,
    /// What came of it.
    pub outcome: Outcome,
}
