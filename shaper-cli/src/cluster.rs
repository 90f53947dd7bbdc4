//! What the broker tells of a cluster, in domain types: the shape in which `-o json` shows it.

use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::{CardOffer, CardSet},
    id::TaskId,
    spec::{Capacity, Decision, Demand, Policy, Profile, TaskSpec},
    task::{ExitStatus, Owner, Phase, TaskStatus, UnixNanos},
};
use shaper_proto::{
    convert::{WireError, gpu},
    v1,
};

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
    /// What is reserved for it now, where that is not what it asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reserved: Option<Demand>,
    /// The GPU cards that it has on its node.
    #[serde(default, skip_serializing_if = "is_none")]
    pub(crate) gpu_cards: CardSet,
}

fn is_none(cards: &CardSet) -> bool {
    cards.is_empty()
}

/// A decision about some task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// Of all decisions since the broker began to lead, from 1.
    pub(crate) number: u64,
    /// About which task.
    pub(crate) task_id: TaskId,
    /// What, and why; without the nodes that were considered.
    pub(crate) decision: Decision,
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
    /// Who said that it takes no tasks; `None`: it does.
    pub(crate) cordoned_by: Option<String>,
    /// Those that it has are to go elsewhere.
    pub(crate) drains: bool,
    /// The GPU cards that it offers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gpus: Option<CardOffer>,
    /// Those of which tasks have a part, or all.
    #[serde(default, skip_serializing_if = "is_none")]
    pub(crate) gpu_cards_taken: CardSet,
}

/// The groups of nodes that are started and ended, and who waits for them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Scale {
    /// In the order in which they are asked.
    pub(crate) groups: Vec<ScaleGroup>,
    /// By what they ask for.
    pub(crate) waits: Vec<ScaleWait>,
}

/// A kind of nodes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ScaleGroup {
    pub(crate) name: String,
    pub(crate) provider: String,
    /// Names of its nodes, as a pattern.
    pub(crate) nodes: String,
    /// Of a new node, as far as is known.
    pub(crate) capacity: Option<Capacity>,
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// What its provider works towards, if that is known.
    pub(crate) target: Option<u32>,
    pub(crate) registered: u32,
    pub(crate) coming: u32,
    pub(crate) leaving: Vec<String>,
    /// What is asked of its provider now.
    pub(crate) order: Option<ScaleOrder>,
    pub(crate) rests_until: Option<UnixNanos>,
    pub(crate) failures: u32,
    pub(crate) problem: Option<String>,
    pub(crate) notes: Vec<ScaleNote>,
    pub(crate) idle: Vec<IdleNode>,
    /// A node that would be given back if it was drained.
    pub(crate) emptiable: Option<EmptiableNode>,
}

/// A node whose tasks have room elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct EmptiableNode {
    pub(crate) node: String,
    pub(crate) tasks: u32,
    /// CPU time that they have used there.
    pub(crate) cpu_ns: u64,
    pub(crate) goes_to: Vec<String>,
}

/// What is asked of a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ScaleOrder {
    pub(crate) number: u64,
    pub(crate) at: UnixNanos,
    pub(crate) target: u32,
    pub(crate) text: String,
}

/// Something that happened to a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ScaleNote {
    pub(crate) at: UnixNanos,
    pub(crate) text: String,
}

/// A node on which nothing runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct IdleNode {
    pub(crate) node: String,
    pub(crate) since: UnixNanos,
}

/// Tasks that fit nowhere.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ScaleWait {
    pub(crate) demand: Demand,
    pub(crate) tasks: u32,
    pub(crate) text: String,
}

/// A policy in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyStatus {
    /// What it says.
    pub(crate) policy: Policy,
    /// Grows with every change of policies.
    pub(crate) revision: u64,
}

/// One change of the set of policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyRevision {
    /// Counted from 1.
    pub(crate) revision: u64,
    /// When.
    pub(crate) at: UnixNanos,
    /// Who made it.
    pub(crate) uid: u32,
    /// Of a rollback: the revision that it went back to.
    pub(crate) rolled_back_to: Option<u64>,
    /// By the names of the policies.
    pub(crate) changes: Vec<PolicyChange>,
}

/// What became of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyChange {
    /// Its name.
    pub(crate) policy_name: String,
    /// What it was; `None`: there was none.
    pub(crate) before: Option<Policy>,
    /// What it is; `None`: there is none.
    pub(crate) after: Option<Policy>,
}

/// What policies would give a task.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TaskPolicies {
    pub(crate) task_id: String,
    /// `None`: it waits.
    pub(crate) node: Option<String>,
    pub(crate) settings: Vec<v1::PolicySetting>,
}

/// A name of which something is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct KnownProfile {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Finished ones.
    pub(crate) executions: u64,
    /// How long tasks were measured while they ran.
    pub(crate) hours: f64,
    /// Of a new one.
    pub(crate) demand: Demand,
    /// When something was learnt last.
    pub(crate) seen_at: Option<UnixNanos>,
}

impl TryFrom<v1::ProfileSummary> for KnownProfile {
    type Error = WireError;

    fn try_from(wire: v1::ProfileSummary) -> Result<KnownProfile, WireError> {
        let v1::ProfileSummary { namespace, name, executions, hours, demand, seen_at_unix_nanos: seen_at } =
            wire;
        let demand = demand.ok_or(WireError::Missing("demand"))?.try_into()?;
        Ok(KnownProfile { namespace, name, executions, hours, demand, seen_at })
    }
}

/// What finished tasks of a name have used.
#[derive(Clone, Debug)]
pub(crate) struct MeasuredProfile {
    pub(crate) profile: Profile,
    /// Finished runs behind it.
    pub(crate) executions: u64,
    /// What was learnt how.
    pub(crate) notes: Vec<String>,
    /// Of each resource that was measured while tasks ran.
    pub(crate) estimates: Vec<v1::ResourceEstimate>,
}

fn named(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl TryFrom<v1::Event> for Event {
    type Error = WireError;

    fn try_from(wire: v1::Event) -> Result<Event, WireError> {
        let v1::Event { number, task_id, decision } = wire;
        let task_id = task_id.parse().map_err(|_| WireError::Missing("task_id"))?;
        let decision = decision.ok_or(WireError::Missing("decision"))?.try_into()?;
        Ok(Event { number, task_id, decision })
    }
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
            reserved,
            gpu_cards,
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
            reserved: reserved.map(Demand::try_from).transpose()?,
            gpu_cards: gpu::grant(gpu_cards)?,
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
            cordoned_by,
            drains,
            gpus,
            gpu_cards_taken,
        } = wire;
        Ok(NodeStatus {
            name,
            connected,
            capacity: capacity.ok_or(WireError::Missing("capacity"))?.try_into()?,
            reserved: reserved.ok_or(WireError::Missing("reserved"))?.try_into()?,
            cpu_utilisation_permille,
            agent_socket: named(agent_socket),
            boot_id,
            cordoned_by: named(cordoned_by),
            drains,
            gpus: gpus.map(CardOffer::try_from).transpose()?,
            gpu_cards_taken: gpu::grant(gpu_cards_taken)?,
        })
    }
}

impl TryFrom<v1::GetScaleResponse> for Scale {
    type Error = WireError;

    fn try_from(wire: v1::GetScaleResponse) -> Result<Scale, WireError> {
        let v1::GetScaleResponse { groups, waits } = wire;
        let wait = |v1::ScaleWait { demand, tasks, text }| {
            let demand = demand.ok_or(WireError::Missing("demand"))?.try_into()?;
            Ok(ScaleWait { demand, tasks, text })
        };
        let groups = groups.into_iter().map(ScaleGroup::try_from).collect::<Result<_, _>>()?;
        Ok(Scale { groups, waits: waits.into_iter().map(wait).collect::<Result<_, WireError>>()? })
    }
}

impl TryFrom<v1::ScaleGroup> for ScaleGroup {
    type Error = WireError;

    fn try_from(wire: v1::ScaleGroup) -> Result<ScaleGroup, WireError> {
        let v1::ScaleGroup {
            name,
            provider,
            nodes,
            capacity,
            min,
            max,
            target,
            registered,
            coming,
            leaving,
            order,
            rests_until_unix_nanos: rests_until,
            failures,
            problem,
            notes,
            idle,
            emptiable,
        } = wire;
        let order = order.map(|order| ScaleOrder {
            number: order.number,
            at: order.unix_nanos,
            target: order.target,
            text: order.text,
        });
        let notes = notes.into_iter().map(|note| ScaleNote { at: note.unix_nanos, text: note.text });
        let idle = idle.into_iter().map(|idle| IdleNode { node: idle.node, since: idle.since_unix_nanos });
        Ok(ScaleGroup {
            name,
            provider,
            nodes,
            capacity: capacity.map(TryInto::try_into).transpose()?,
            min,
            max,
            target,
            registered,
            coming,
            leaving,
            order,
            rests_until,
            failures,
            problem: named(problem),
            notes: notes.collect(),
            idle: idle.collect(),
            emptiable: emptiable.map(|it| EmptiableNode {
                node: it.node,
                tasks: it.tasks,
                cpu_ns: it.cpu_nanos,
                goes_to: it.goes_to,
            }),
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

impl TryFrom<v1::PolicyRevision> for PolicyRevision {
    type Error = WireError;

    fn try_from(wire: v1::PolicyRevision) -> Result<PolicyRevision, WireError> {
        let v1::PolicyRevision { revision, unix_nanos, uid, rolled_back_to, changes } = wire;
        let changes = changes.into_iter().map(PolicyChange::try_from).collect::<Result<_, _>>()?;
        Ok(PolicyRevision { revision, at: unix_nanos, uid, rolled_back_to, changes })
    }
}

impl TryFrom<v1::PolicyChange> for PolicyChange {
    type Error = WireError;

    fn try_from(wire: v1::PolicyChange) -> Result<PolicyChange, WireError> {
        let v1::PolicyChange { policy_name, before, after } = wire;
        let policy = |of: Option<v1::Policy>| of.map(Policy::try_from).transpose();
        Ok(PolicyChange { policy_name, before: policy(before)?, after: policy(after)? })
    }
}

impl From<v1::TaskPolicies> for TaskPolicies {
    fn from(wire: v1::TaskPolicies) -> TaskPolicies {
        let v1::TaskPolicies { task_id, node, settings } = wire;
        TaskPolicies { task_id, node: named(node), settings }
    }
}

impl TryFrom<v1::GetProfileResponse> for MeasuredProfile {
    type Error = WireError;

    fn try_from(wire: v1::GetProfileResponse) -> Result<MeasuredProfile, WireError> {
        let v1::GetProfileResponse { profile, executions, notes, estimates } = wire;
        let profile = profile.ok_or(WireError::Missing("profile"))?.try_into()?;
        Ok(MeasuredProfile { profile, executions, notes, estimates })
    }
}
