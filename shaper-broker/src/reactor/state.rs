//! What the broker knows. What must outlive it is in rows; the rest (sessions, utilisation) agents say
//! again when they connect. Indexes are derived, and kept by [`State::enter`] and [`State::leave`] alone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::{CardOffer, CardSet},
    id::{ExecutionId, TaskId},
    place::{Candidate, CardBooks, NOTHING, Needs},
    spec::{Capacity, Credentials, Decision, DecisionKind, Demand, Policy, Priority, TaskSpec},
    task::{ExitStatus, TaskStatus, UnixNanos},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

use super::{
    SessionId,
    history::History,
    learn::{Kind, Watch},
    lost::Leases,
    places::Places,
    policies::PolicyRevision,
    scale::Scale,
    shown::Shown,
    waiting::{Lacks, Place, Waiting, place_of},
};
use crate::metrics::Tally;

/// Decisions that are kept of a task.
pub const DECISIONS: usize = 64;
/// Nodes that are kept of a decision: the explanation of a waiting task judges all of them anew.
pub const VERDICTS: usize = 4;

/// Where a task is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Phase {
    /// On no node.
    Pending {
        /// Why.
        reason: String,
        /// More nodes were asked for since it began to wait.
        scale_out_asked: bool,
    },
    /// On no node yet: a place is being cleared for it.
    Nominated {
        /// Where.
        node: String,
    },
    /// Assigned to a node, which has not said yet that it runs.
    Starting {
        /// The node.
        node: String,
    },
    /// Running, as far as is known.
    Running {
        /// The node.
        node: String,
    },
    /// Over.
    Ended {
        /// How.
        status: ExitStatus,
        /// When.
        at: UnixNanos,
    },
    /// Over by request.
    Cancelled,
}

impl Phase {
    /// The node that has it, as far as is known.
    pub fn node(&self) -> Option<&str> {
        match self {
            Phase::Starting { node } | Phase::Running { node } => Some(node),
            Phase::Pending { .. } | Phase::Nominated { .. } | Phase::Ended { .. } | Phase::Cancelled => None,
        }
    }

    /// The node in whose books it is.
    pub fn booked_on(&self) -> Option<&str> {
        match self {
            Phase::Nominated { node } | Phase::Starting { node } | Phase::Running { node } => Some(node),
            Phase::Pending { .. } | Phase::Ended { .. } | Phase::Cancelled => None,
        }
    }

    /// Nothing more will happen to it.
    pub fn is_over(&self) -> bool {
        matches!(self, Phase::Ended { .. } | Phase::Cancelled)
    }
}

/// A wish that a task end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Between SIGTERM and SIGKILL.
    pub grace_millis: u64,
    /// Of the Stop directive.
    pub generation: u64,
}

/// Why a task does not go back to a node for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setback {
    /// The node made room.
    Evicted,
    /// The node would not start it.
    Refused,
    /// The node began to start it and gave up.
    Abandoned,
}

impl Setback {
    /// What the node did to it.
    pub fn done_to_it(self) -> &'static str {
        match self {
            Setback::Evicted => "evicted it",
            Setback::Refused => "refused to start it",
            Setback::Abandoned => "abandoned its start",
        }
    }
}

/// A node that a task does not go back to for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Avoid {
    /// The node.
    pub node: String,
    /// Why.
    pub why: Setback,
    /// From here …
    pub since: UnixNanos,
    /// … to here. A clock that was set back, to before `since`, ends it, too.
    pub until: UnixNanos,
}

impl Avoid {
    /// Whether it holds at `now`.
    pub fn holds(&self, now: UnixNanos) -> bool {
        (self.since..self.until).contains(&now)
    }
}

/// What is reserved for a task that is on a node, where that is not what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// What is in the node's books.
    pub request: Demand,
    /// What the node was asked to make of it.
    pub asked: Option<Asked>,
    /// The node would not: it is not asked again before.
    pub rests_until: UnixNanos,
}

/// A wish that another amount be reserved for a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// How much.
    pub request: Demand,
    /// Of the directive.
    pub generation: u64,
    /// Why, for people.
    pub reason: String,
    /// Who is to have the room; `None`: nobody.
    pub whom: Option<TaskId>,
}

/// A node that may know an attempt of a task: the latest that was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// The node.
    pub node: String,
    /// The attempt.
    pub attempt: u32,
    /// Generation of the directive that started it.
    pub start_generation: u64,
}

/// What was submitted. It never changes: a row of its own, written once, and shared by all that know the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// What.
    pub spec: TaskSpec,
    /// By whom.
    pub owner: Credentials,
    /// When.
    pub submitted_at: UnixNanos,
    /// Its place in the order of submissions, which no other task has.
    pub sequence: u64,
    /// With `on_node_lost: rerun`: how long an attempt goes on when the broker is not heard of on its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_lease_seconds: Option<u32>,
}

/// A task. To copy it is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// What was submitted.
    pub submission: Arc<Submission>,
    /// Where it is.
    pub phase: Phase,
    /// The latest attempt, from 1; 0 before the first. Each placement is an attempt of its own.
    pub attempt: u32,
    /// Node of the latest attempt.
    pub node: Option<String>,
    /// Whether the node has said that it knows the latest attempt.
    pub acknowledged: bool,
    /// Whether the node has said that it evicts the latest attempt.
    pub evicted: bool,
    /// Whether the node of the latest attempt went away while it had it.
    pub lost: bool,
    /// Of the latest directive.
    pub generation: u64,
    /// Of the latest Start.
    pub start_generation: u64,
    /// Whether it is to end.
    pub cancel: Option<Cancel>,
    /// Whether the latest attempt is to make room for another task: the generation of the Stop directive.
    pub preempted: Option<u64>,
    /// Of `spec.retries`, how many are used up.
    pub retries_used: u32,
    /// Evictions, refusals and abandoned starts so far: the exponent of the backoff.
    pub setbacks: u32,
    /// Where it does not go for now.
    pub avoid: Vec<Avoid>,
    /// As last reported by its node. While an attempt lasts its node tells it anew after each loss of the session, so no
    /// row has it then.
    pub on_node: Option<Arc<TaskStatus>>,
    /// Nodes that may know an attempt. The id of the task is not free before they have forgotten it.
    pub holders: Vec<Holder>,
    /// Of its latest change.
    pub revision: u64,
    /// What is reserved for it on its node, if that is not what it asked for, or is to be another.
    pub resized: Option<Resized>,
    /// The GPU cards that it has on the node in whose books it is, or is to have there.
    pub cards: CardSet,
}

impl Task {
    /// What is to be run.
    pub fn spec(&self) -> &TaskSpec {
        &self.submission.spec
    }

    /// Who submitted it.
    pub fn owner(&self) -> &Credentials {
        &self.submission.owner
    }

    /// Its place in the order of submissions.
    pub fn sequence(&self) -> u64 {
        self.submission.sequence
    }

    /// Its id.
    pub fn id(&self) -> &TaskId {
        &self.spec().profile.task_id
    }

    /// The latest attempt.
    pub fn execution(&self) -> ExecutionId {
        ExecutionId { task: self.id().clone(), attempt: self.attempt }
    }

    /// What it asks for.
    pub fn demand(&self) -> &Demand {
        &self.spec().profile.demand
    }

    /// What is reserved for it: what it asks for, if nothing was changed on its node.
    pub fn request(&self) -> &Demand {
        self.resized.as_ref().map_or_else(|| self.demand(), |resized| &resized.request)
    }

    /// All that it asks a node for.
    pub fn needs(&self) -> Needs<'_> {
        self.needs_with(self.demand())
    }

    /// The same of what is reserved for it.
    pub fn booked(&self) -> Needs<'_> {
        self.needs_with(self.request())
    }

    fn needs_with<'a>(&'a self, demand: &'a Demand) -> Needs<'a> {
        let TaskSpec { gpus, image, .. } = self.spec();
        Needs { demand, gpus, container: image.is_some() }
    }

    /// Its priority.
    pub fn priority(&self) -> Priority {
        self.spec().profile.priority
    }
}

/// A task with what was decided about it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskRow {
    /// The task.
    pub task: Task,
    /// The latest decisions, newest last.
    pub decisions: VecDeque<Decision>,
}

impl TaskRow {
    pub(super) fn decide(&mut self, mut decision: Decision) {
        if decision.nodes.len() > VERDICTS {
            // The chosen node is worth more than the first ones.
            let chosen = decision.nodes.iter().position(|it| Some(&it.node) == self.task.node.as_ref());
            if let Some(chosen) = chosen.filter(|_| decision.kind == DecisionKind::Placed) {
                decision.nodes.swap(0, chosen);
            }
            decision.nodes.truncate(VERDICTS);
        }
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision);
    }
}

/// What is kept of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// Its place in the order of registration, which decides ties.
    pub order: u64,
    /// What it has.
    pub capacity: Capacity,
    /// The boot that it was in when it last connected.
    pub boot_id: String,
    /// Its agent's own socket.
    pub agent_socket: String,
    /// It takes no tasks.
    #[serde(default)]
    pub cordon: Option<Cordon>,
    /// Its GPU cards: of those that it has, the ones that placement knows.
    #[serde(default)]
    pub gpus: CardOffer,
    /// Whether it runs tasks that have an image.
    #[serde(default)]
    pub containers: bool,
}

/// Why a node takes no tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cordon {
    /// Since when.
    pub at: UnixNanos,
    /// Who said so.
    pub by: String,
    /// Those that it has are to go elsewhere.
    pub drains: bool,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is kept.
    pub row: NodeRow,
    /// Its agent's session; while it has none, nothing is placed there.
    pub session: Option<SessionId>,
    /// CPU utilisation as last reported.
    pub cpu_utilisation_permille: u32,
    /// Sum of what is reserved for `tasks` and of the demands of `nominees`: while a place is cleared, more than there is.
    /// What of its GPU cards is, `cards` says.
    pub reserved: Capacity,
    /// What of its GPU cards is reserved for them.
    pub cards: CardBooks,
    /// The tasks that are assigned to it.
    pub tasks: BTreeSet<TaskId>,
    /// Of those: how many for which not what they asked for is reserved, or something was asked of the node.
    pub(super) lowered: usize,
    /// Those for whom a place is cleared there.
    pub(super) nominees: BTreeSet<Place>,
    /// Those of which it may still know an attempt.
    pub(super) holds: BTreeSet<TaskId>,
    /// The uptime at which its agent was last told that this broker is there, or at which a task with a lease was last placed
    /// here; 0 if neither happened.
    pub(super) contact_at: u64,
}

impl Node {
    pub(super) fn new(row: NodeRow) -> Node {
        let reserved = Capacity { network: Some(BitsPerSec(0)), storage_io: Some(Iops(0)), ..NOTHING };
        Node {
            row,
            session: None,
            cpu_utilisation_permille: 0,
            reserved,
            cards: CardBooks::default(),
            tasks: BTreeSet::new(),
            lowered: 0,
            nominees: BTreeSet::new(),
            holds: BTreeSet::new(),
            contact_at: 0,
        }
    }

    /// Whether tasks may be placed there now.
    pub fn takes_work(&self) -> bool {
        self.session.is_some() && self.row.cordon.is_none()
    }

    /// As placement sees it.
    pub fn candidate(&self) -> Candidate<'_> {
        let NodeRow { name, capacity, gpus, containers, .. } = &self.row;
        let (reserved, cards) = (&self.reserved, &self.cards);
        Candidate { name, capacity, reserved, offer: gpus, cards, containers: *containers }
    }

    /// What is reserved for people to see: memory of GPU cards is the sum over them, and all of one that a task has to itself.
    pub fn reserved_in_all(&self) -> Capacity {
        let each = self.row.capacity.gpu_memory.filter(|_| !self.row.gpus.cards.is_empty());
        Capacity { gpu_memory: each.map(|each| self.cards.memory(each)), ..self.reserved }
    }

    /// Books a task that has these cards.
    pub(super) fn take(&mut self, needs: Needs<'_>, cards: CardSet) {
        self.reserve(needs.demand, u64::saturating_add);
        self.cards.take(needs, cards);
    }

    /// Takes it off the books.
    pub(super) fn give(&mut self, needs: Needs<'_>, cards: CardSet) {
        self.reserve(needs.demand, u64::saturating_sub);
        self.cards.give(needs, cards);
    }

    fn reserve(&mut self, demand: &Demand, change: fn(u64, u64) -> u64) {
        let Demand { cpu, memory, gpu_memory: _, network, storage_io } = *demand;
        let Capacity { cpu: cpus, memory: memories, gpu_memory: _, network: uplink, storage_io: disks } =
            self.reserved;
        let sum =
            |taken: Option<u64>, wanted: Option<u64>| Some(change(taken.unwrap_or(0), wanted.unwrap_or(0)));
        self.reserved = Capacity {
            cpu: Millicores(change(cpus.0, cpu.0)),
            memory: Bytes(change(memories.0, memory.0)),
            gpu_memory: None,
            network: sum(uplink.map(|it| it.0), network.map(|it| it.0)).map(BitsPerSec),
            storage_io: sum(disks.map(|it| it.0), storage_io.map(|it| it.0)).map(Iops),
        };
    }
}

/// A policy and when it was applied: one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRow {
    /// The policy.
    pub policy: Policy,
    /// Who set it.
    pub uid: u32,
    /// Of the set of policies, when this one was applied.
    pub revision: u64,
}

/// What the broker has room for, and how long it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Tasks that are not over; more are refused.
    pub open_tasks: usize,
    /// Tasks that are over and that no node knows any more; of more than these the first are forgotten.
    pub ended_tasks: usize,
    /// The lease of tasks with `on_node_lost: rerun` that are submitted from now on.
    pub task_lease_seconds: u32,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { open_tasks: 1_000_000, ended_tasks: 50_000, task_lease_seconds: 30 }
    }
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// In every directive. An agent refuses one below the highest that it has obeyed.
    pub epoch: u64,
    /// For how many nanoseconds this broker has owned the rows, as the shell says before each event. Unlike the time of day
    /// nobody sets it.
    pub uptime: u64,
    /// How much of it there may be.
    pub bounds: Bounds,
    /// Tasks by id.
    pub tasks: HashMap<TaskId, Box<TaskRow>>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// Policies by name.
    pub policies: BTreeMap<String, PolicyRow>,
    /// The latest changes of the set of policies, without a gap.
    pub policy_revisions: BTreeMap<u64, PolicyRevision>,
    /// What finished tasks used, by namespace and name.
    pub histories: BTreeMap<(String, String), History>,
    /// What was learnt of tasks, by namespace and name.
    pub kinds: BTreeMap<(String, String), Kind>,
    /// Tasks that run, as they are measured.
    pub(super) watches: HashMap<TaskId, Watch>,
    /// Of the latest change of a task.
    pub revision: u64,
    /// Of the latest change of the policies.
    pub policies_revision: u64,
    /// Agents by session.
    pub sessions: BTreeMap<SessionId, String>,
    /// Names of the nodes in the order of registration; where one was removed, there is none until the next registers.
    pub(super) registered: Vec<Option<String>>,
    /// The nodes as placement sees them.
    pub(super) places: Places,
    /// Tasks that wait.
    pub(super) waiting: Waiting,
    /// Tasks on nodes that are placed again when the node is lost.
    pub(super) leases: Leases,
    /// How many are assigned to nodes or nominated.
    pub(super) assigned: usize,
    /// Of those: how many run.
    pub(super) running: usize,
    /// Groups of nodes that are started and ended.
    pub scale: Scale,
    /// When it was looked at last whether tasks that run could do with less.
    pub(super) slack_looked_at: UnixNanos,
    /// What is counted for the metrics alone.
    pub tally: Tally,
    /// What is kept for people to look at alone.
    pub shown: Shown,
    /// Tasks that are over and that no node knows any more, in the order in which that came to be.
    pub(super) released: VecDeque<TaskId>,
    pub(super) next_sequence: u64,
}

impl State {
    /// How many policies a user has set.
    pub(super) fn policies_of(&self, uid: u32) -> usize {
        self.policies.values().filter(|row| row.uid == uid).count()
    }

    /// The nodes in the order of registration.
    pub fn nodes_in_order(&self) -> impl Iterator<Item = &Node> {
        self.registered.iter().flatten().filter_map(|name| self.nodes.get(name))
    }

    /// Those that take work.
    pub fn connected(&self) -> impl Iterator<Item = &Node> {
        self.nodes_in_order().filter(|node| node.takes_work())
    }

    /// Tasks that are not over.
    pub fn open_tasks(&self) -> usize {
        self.waiting.len() + self.assigned
    }

    /// Tasks that wait.
    pub fn waiting_tasks(&self) -> usize {
        self.waiting.len()
    }

    /// When the task was submitted that was submitted first of those that wait.
    pub fn waits_longest(&self) -> Option<UnixNanos> {
        let id = self.waiting.oldest()?;
        self.tasks.get(id).map(|row| row.task.submission.submitted_at)
    }

    /// What the tasks that wait lack.
    pub fn lacks(&self) -> Lacks {
        self.waiting.lacks_of_all()
    }

    /// How many tasks are nominated, starting, and running.
    pub fn assigned_tasks(&self) -> [usize; 3] {
        let nominated = self.nodes.values().map(|node| node.nominees.len()).sum();
        [nominated, self.assigned.saturating_sub(nominated + self.running), self.running]
    }

    /// Puts a task where its phase says. False: the node of its phase is not there.
    #[must_use]
    pub(super) fn enter(&mut self, id: &TaskId) -> bool {
        let Some(TaskRow { task, .. }) = self.tasks.get(id).map(Box::as_ref) else { return false };
        match &task.phase {
            Phase::Pending { .. } => {
                self.waiting.insert(task, &self.policies);
                true
            }
            Phase::Nominated { node } => match self.nodes.get_mut(node) {
                Some(node) => {
                    if node.nominees.insert(place_of(task)) {
                        node.take(task.needs(), task.cards);
                        self.places.take(&node.row, task.needs(), task.cards);
                        self.assigned += 1;
                    }
                    true
                }
                None => false,
            },
            Phase::Starting { node } | Phase::Running { node } => match self.nodes.get_mut(node) {
                Some(node) => {
                    if node.tasks.insert(id.clone()) {
                        self.running += usize::from(matches!(task.phase, Phase::Running { .. }));
                        node.lowered += usize::from(task.resized.is_some());
                        node.take(task.booked(), task.cards);
                        self.places.take(&node.row, task.booked(), task.cards);
                        self.assigned += 1;
                        if let Some(seconds) = task.submission.task_lease_seconds {
                            node.contact_at = node.contact_at.max(self.uptime);
                            self.leases.add(&node.row.name, seconds, id, self.uptime);
                        }
                    }
                    true
                }
                None => false,
            },
            Phase::Ended { .. } | Phase::Cancelled => {
                if task.holders.is_empty() {
                    self.released.push_back(id.clone());
                }
                true
            }
        }
    }

    /// Takes a task from where its phase says, which is not the end.
    pub(super) fn leave(&mut self, id: &TaskId) {
        let Some(TaskRow { task, .. }) = self.tasks.get(id).map(Box::as_ref) else { return };
        match &task.phase {
            Phase::Pending { .. } => self.waiting.remove(task),
            Phase::Nominated { node } => {
                if let Some(node) = self.nodes.get_mut(node)
                    && node.nominees.remove(&place_of(task))
                {
                    node.give(task.needs(), task.cards);
                    self.places.give(&node.row, task.needs(), task.cards);
                    self.assigned -= 1;
                }
            }
            Phase::Starting { node } | Phase::Running { node } => {
                if let Some(node) = self.nodes.get_mut(node)
                    && node.tasks.remove(id)
                {
                    self.running -= usize::from(matches!(task.phase, Phase::Running { .. }));
                    node.lowered -= usize::from(task.resized.is_some());
                    node.give(task.booked(), task.cards);
                    self.places.give(&node.row, task.booked(), task.cards);
                    self.assigned -= 1;
                    if let Some(seconds) = task.submission.task_lease_seconds {
                        self.leases.remove(&node.row.name, seconds, id);
                    }
                }
            }
            Phase::Ended { .. } | Phase::Cancelled => {}
        }
    }

    /// Changes what is reserved for a task that is on a node.
    pub(super) fn rebook(&mut self, id: &TaskId, resized: Option<Resized>) {
        let Some(row) = self.tasks.get_mut(id) else { return };
        let (before, was_lowered) = (*row.task.request(), row.task.resized.is_some());
        row.task.resized = resized;
        let (after, cards) = (row.task.booked(), row.task.cards);
        let before = Needs { demand: &before, ..after };
        let Some(node) = row.task.phase.node().and_then(|node| self.nodes.get_mut(node)) else { return };
        node.lowered += usize::from(row.task.resized.is_some());
        node.lowered -= usize::from(was_lowered);
        if before != after {
            node.give(before, cards);
            self.places.give(&node.row, before, cards);
            node.take(after, cards);
            self.places.take(&node.row, after, cards);
        }
    }

    /// Lines up anew those that wait, after the policies were changed.
    pub(super) fn line_up(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        for (_, _, id) in waiting.in_order() {
            if let Some(row) = self.tasks.get(&id) {
                self.waiting.insert(&row.task, &self.policies);
            }
        }
    }

    /// A node may know the latest attempt of the task from here on.
    pub(super) fn hold(&mut self, id: &TaskId, node: &str) {
        let Some(row) = self.tasks.get_mut(id) else { return };
        let Task { attempt, start_generation, holders, .. } = &mut row.task;
        holders.retain(|holder| holder.node != node);
        holders.push(Holder {
            node: node.to_owned(),
            attempt: *attempt,
            start_generation: *start_generation,
        });
        if let Some(node) = self.nodes.get_mut(node) {
            node.holds.insert(id.clone());
        }
    }

    /// A node knows no attempt of the task any more. False: nothing changes by that, or one is assigned to it.
    #[must_use]
    pub(super) fn let_go(&mut self, id: &TaskId, node: &str) -> bool {
        let row = self.tasks.get_mut(id).filter(|row| row.task.phase.node() != Some(node));
        let Some(TaskRow { task, .. }) = row.map(Box::as_mut) else { return false };
        if let Some(node) = self.nodes.get_mut(node) {
            node.holds.remove(id);
        }
        let before = task.holders.len();
        task.holders.retain(|holder| holder.node != node);
        let changed = task.holders.len() != before;
        if changed && task.holders.is_empty() && task.phase.is_over() {
            self.released.push_back(id.clone());
        }
        changed
    }

    /// Forgets the first of those that are over, if there are too many: the next to go.
    pub(super) fn forget_one(&mut self) -> Option<Box<TaskRow>> {
        if self.released.len() <= self.bounds.ended_tasks {
            return None;
        }
        let id = self.released.pop_front()?;
        let forgotten = self.tasks.remove(&id);
        if let Some(row) = &forgotten {
            self.shown.forget(row.task.sequence(), &id);
        }
        debug_assert!(forgotten.as_ref().is_some_and(|row| row.task.phase.is_over()), "`{id}` is not over");
        forgotten
    }
}
