//! What the broker tells of a cluster, in domain types: the shape in which `-o json` shows it.

use serde::{Deserialize, Serialize};
use shaper_core::{
    spec::{Capacity, Policy, Profile, TaskSpec},
    task::{ExitStatus, Owner, Phase, TaskStatus, UnixNanos},
};
use shaper_proto::{convert::WireError, v1};

/// A task of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClusterTask {
    /// What was submitted.
    pub(crate) spec: TaskSpec,
    /// Who submitted it.
    pub(crate) owner: Owner,
    /// The latest run of it, from 1; 0 before the first.
    pub(crate) attempt: u32,
    /// Where it is in its life.
    pub(crate) phase: ClusterPhase,
    /// Node of the latest run.
    pub(crate) node: Option<String>,
    /// When it was submitted.
    pub(crate) submitted_at: UnixNanos,
    /// Grows with every change of the task.
    pub(crate) revision: u64,
    /// Whether it is to end.
    pub(crate) cancel_requested: bool,
    /// As its node last reported it.
    pub(crate) on_node: Option<TaskStatus>,
}

/// Where a task of the cluster is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ClusterPhase {
    /// On no node.
    Pending {
        /// Why.
        reason: String,
    },
    /// On a node, which has not said yet that it runs.
    Starting {
        /// The node.
        node: String,
    },
    /// It runs.
    Running {
        /// The node.
        node: String,
    },
    /// Its main process has ended.
    Ended {
        /// How.
        status: ExitStatus,
        /// When.
        at: UnixNanos,
    },
    /// Ended by request.
    Cancelled,
}

impl ClusterTask {
    /// Whether nothing more happens to it.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase, ClusterPhase::Ended { .. } | ClusterPhase::Cancelled)
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeStatus {
    /// Its name.
    pub(crate) name: String,
    /// Whether its agent is connected to the broker.
    pub(crate) connected: bool,
    /// What it has.
    pub(crate) capacity: Capacity,
    /// What is reserved of it.
    pub(crate) reserved: Capacity,
    /// CPU utilisation, in thousandths.
    pub(crate) cpu_utilisation_permille: u32,
    /// Socket of its agent, for clients on the same machine.
    pub(crate) agent_socket: Option<String>,
    /// Which boot of the machine it is.
    pub(crate) boot_id: String,
}

/// A policy in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyStatus {
    /// What it says.
    pub(crate) policy: Policy,
    /// Grows with every change of policies.
    pub(crate) revision: u64,
}

/// What finished tasks of a name have used.
#[derive(Clone, Debug)]
pub(crate) struct MeasuredProfile {
    pub(crate) profile: Profile,
    /// Finished runs behind it.
    pub(crate) executions: u64,
    /// What was learnt how.
    pub(crate) notes: Vec<String>,
}

fn named(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl TryFrom<v1::ClusterTask> for ClusterTask {
    type Error = WireError;

    fn try_from(wire: v1::ClusterTask) -> Result<ClusterTask, WireError> {
        use v1::cluster_task::Phase as Wire;
        let v1::ClusterTask {
            spec,
            owner,
            attempt,
            phase,
            submitted_unix_nanos,
            revision,
            on_node,
            cancel_requested,
            node,
            epoch: _,
        } = wire;
        let v1::Credentials { uid, gid, groups: _ } = owner.ok_or(WireError::Missing("owner"))?;
        let phase = match phase.ok_or(WireError::Missing("phase"))? {
            Wire::Pending(v1::cluster_task::Pending { reason }) => ClusterPhase::Pending { reason },
            Wire::StartingOn(node) => ClusterPhase::Starting { node },
            Wire::RunningOn(node) => ClusterPhase::Running { node },
            Wire::Ended(exit) => match Phase::try_from(exit)? {
                Phase::Ended { status, at } => ClusterPhase::Ended { status, at },
                Phase::Running => return Err(WireError::Missing("exit.status")),
            },
            Wire::Cancelled(_) => ClusterPhase::Cancelled,
        };
        Ok(ClusterTask {
            spec: spec.ok_or(WireError::Missing("spec"))?.try_into()?,
            owner: Owner { uid, gid },
            attempt,
            phase,
            node: named(node),
            submitted_at: submitted_unix_nanos,
            revision,
            cancel_requested,
            on_node: on_node.map(TaskStatus::try_from).transpose()?,
        })
    }
}

impl TryFrom<v1::NodeStatus> for NodeStatus {
    type Error = WireError;

    fn try_from(wire: v1::NodeStatus) -> Result<NodeStatus, WireError> {
        let v1::NodeStatus {
            name,
            connected,
            capacity,
            reserved,
            cpu_utilisation_permille,
            agent_socket,
            boot_id,
        } = wire;
        Ok(NodeStatus {
            name,
            connected,
            capacity: capacity.ok_or(WireError::Missing("capacity"))?.try_into()?,
            reserved: reserved.ok_or(WireError::Missing("reserved"))?.try_into()?,
            cpu_utilisation_permille,
            agent_socket: named(agent_socket),
            boot_id,
        })
    }
}

impl TryFrom<v1::PolicyStatus> for PolicyStatus {
    type Error = WireError;

    fn try_from(wire: v1::PolicyStatus) -> Result<PolicyStatus, WireError> {
        let v1::PolicyStatus { policy, revision } = wire;
        Ok(PolicyStatus { policy: policy.ok_or(WireError::Missing("policy"))?.try_into()?, revision })
    }
}

impl TryFrom<v1::GetProfileResponse> for MeasuredProfile {
    type Error = WireError;

    fn try_from(wire: v1::GetProfileResponse) -> Result<MeasuredProfile, WireError> {
        let v1::GetProfileResponse { profile, executions, notes } = wire;
        let profile = profile.ok_or(WireError::Missing("profile"))?.try_into()?;
        Ok(MeasuredProfile { profile, executions, notes })
    }
}
