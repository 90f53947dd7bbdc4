//! What a task asks for, and what policies say: the domain types behind the profile JSON, the task spec
//! and the policy YAML. (How those documents are read is `crate::document`.)

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    gpu::CardRequest,
    id::TaskId,
    limits::Limits,
    policy::{PolicyFloors, PolicyLimits, Selector},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// Priority of a task. Ordered: `Low < Medium < High`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Batch: the first to be shrunk and evicted.
    Low,
    /// In between.
    Medium,
    /// Services: served first.
    High,
}

impl Priority {
    /// `priority_value` of the seed formula, in thousandths: 1, 0.5 and 0.
    pub const fn value_permille(self) -> u64 {
        match self {
            Priority::Low => 0,
            Priority::Medium => 500,
            Priority::High => 1000,
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Priority::Low => "low",
            Priority::Medium => "medium",
            Priority::High => "high",
        })
    }
}

/// A request: reserved at placement, guaranteed on the node. `None`: not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demand {
    /// CPU.
    pub cpu: Millicores,
    /// Memory.
    pub memory: Bytes,
    /// Memory of one GPU card; of each, if it asks for more.
    pub gpu_memory: Option<Bytes>,
    /// On the wire, for each direction.
    pub network: Option<BitsPerSec>,
    /// Reads plus writes a second, over all devices.
    pub storage_io: Option<Iops>,
}

/// A profile: what a task needs (the JSON of the same name).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The task.
    pub task_id: TaskId,
    /// Its request.
    pub demand: Demand,
    /// Its priority.
    pub priority: Priority,
    /// How long it may run, in seconds, if anybody knows.
    pub estimated_runtime_seconds: Option<u64>,
}

/// Whom a task runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A task to be placed and run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// What it needs.
    pub profile: Profile,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its whole environment.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// The history key; by default the command's basename.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Explicit ceilings. `Unlimited` here means that none was given: then CPU and network may grow to
    /// the node's free capacity, and memory is limited to the request.
    pub limits: Limits,
    /// Whom it runs as; `None`: its submitter.
    pub run_as: Option<Credentials>,
    /// How often it is placed again after it could not be started or its node was lost for good.
    pub retries: u32,
    /// What becomes of it when its node does not answer.
    #[serde(default)]
    pub on_node_lost: OnNodeLost,
    /// GPU cards that it is to have to itself, besides the memory of one that it may ask for in its profile.
    #[serde(default)]
    pub gpus: CardRequest,
}

/// What becomes of a task when its node does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNodeLost {
    /// It is placed again when the node is back without it, or when an operator says that the node is dead.
    #[default]
    Wait,
    /// It is ended on the node once the broker was not heard of there for the broker's task lease, and placed again half as
    /// long after that.
    Rerun,
}

impl OnNodeLost {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            OnNodeLost::Wait => "wait",
            OnNodeLost::Rerun => "rerun",
        }
    }
}

/// The namespace of whoever names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What a node has, or what of it is reserved. `None`: not known, and not filtered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// CPU.
    pub cpu: Millicores,
    /// Memory.
    pub memory: Bytes,
    /// Memory of each of its GPU cards; `None`: it offers none.
    pub gpu_memory: Option<Bytes>,
    /// Of the uplink.
    pub network: Option<BitsPerSec>,
    /// Of all devices.
    pub storage_io: Option<Iops>,
}

/// A policy: for the tasks of its priority in its namespace that its selector selects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its name.
    pub policy_name: String,
    /// Which tasks it covers.
    pub priority: Priority,
    /// In which namespace.
    pub namespace: String,
    /// Their demand where they state none.
    pub demand: Option<Demand>,
    /// Node CPU utilisation, in thousandths, that arms the policy; `None`: it never shrinks or evicts others.
    pub eviction_threshold_permille: Option<u32>,
    /// Whether tasks that it covers may take the place of lower ones: on their node, and where they fit on none.
    pub preemption_enabled: bool,
    /// Over which utilisation is averaged, and how long a remedy has before the next, in milliseconds.
    pub window_millis: u64,
    /// Which of the tasks of its priority and namespace.
    #[serde(default)]
    pub selector: Selector,
    /// What they are granted at most.
    #[serde(default)]
    pub limits: PolicyLimits,
    /// How far down what is reserved for them may come.
    #[serde(default)]
    pub floors: PolicyFloors,
}

/// The window of a policy that names none: 10 s.
pub const DEFAULT_WINDOW_MILLIS: u64 = 10_000;

/// One decision about a task, as it is explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// When.
    pub at: crate::task::UnixNanos,
    /// `broker`, or the name of a node.
    pub by: String,
    /// What.
    pub kind: DecisionKind,
    /// Why, for people, with numbers.
    pub reason: String,
    /// The nodes that were considered.
    pub nodes: Vec<NodeVerdict>,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecisionKind {
    /// Put on a node.
    Placed,
    /// No node fits now.
    Pending,
    /// More nodes were asked for.
    ScaleOut,
    /// May use more than before.
    Grew,
    /// May use less than before.
    Shrunk,
    /// Memory that it did not use was taken away.
    Reclaimed,
    /// Ended, to make room.
    Evicted,
    /// Could not be started.
    Refused,
    /// Over.
    Ended,
    /// Its node does not answer.
    Lost,
    /// Ended by request.
    Cancelled,
}

impl DecisionKind {
    /// All of them, in their order.
    pub const ALL: [DecisionKind; 11] = [
        DecisionKind::Placed,
        DecisionKind::Pending,
        DecisionKind::ScaleOut,
        DecisionKind::Grew,
        DecisionKind::Shrunk,
        DecisionKind::Reclaimed,
        DecisionKind::Evicted,
        DecisionKind::Refused,
        DecisionKind::Ended,
        DecisionKind::Lost,
        DecisionKind::Cancelled,
    ];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            DecisionKind::Placed => "placed",
            DecisionKind::Pending => "pending",
            DecisionKind::ScaleOut => "scale_out",
            DecisionKind::Grew => "grew",
            DecisionKind::Shrunk => "shrunk",
            DecisionKind::Reclaimed => "reclaimed",
            DecisionKind::Evicted => "evicted",
            DecisionKind::Refused => "refused",
            DecisionKind::Ended => "ended",
            DecisionKind::Lost => "lost",
            DecisionKind::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for DecisionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a node was judged for a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeVerdict {
    /// The node.
    pub node: String,
    /// Score of the seed formula, for display only; `None`: not feasible.
    pub score: Option<f64>,
    /// What did not fit, with numbers.
    pub lacking: Vec<String>,
    /// Resources whose capacity the node does not know.
    pub not_checked: Vec<String>,
}
