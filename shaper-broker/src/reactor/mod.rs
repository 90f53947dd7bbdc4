//! The broker's decisions, pure: [`on_event`] takes the state, an event and the time, changes the state
//! and returns which rows changed and the effects. It reads no clock and does no IO.
//!
//! Whoever calls it makes the rows durable and only then lets the effects out. A crash between the two
//! loses effects, never facts: directives are repeated when an agent connects and its inventory lacks
//! what they were for, and a client that got no answer asks again.
//!
//! What agents say is taken for the truth about what runs; what is to run is decided here alone. Each
//! placement is an attempt with a number of its own, so that an attempt has one node, and at most one
//! attempt of a task is ever alive: the next is placed only after the node has said that the last is
//! over, or never began, or after the node has lost everything by a new boot, or after an operator has said that it is dead, or
//! after the node must have ended it, not having heard of the broker for its lease ([`lost`]).

mod agent;
mod client;
pub mod history;
pub mod learn;
mod lost;
mod nodes;
mod places;
pub mod policies;
mod preempt;
pub mod query;
mod recent;
mod reshape;
pub mod rows;
pub mod scale;
mod schedule;
pub mod shown;
pub mod state;
mod waiting;

#[cfg(test)]
mod card_tests;
#[cfg(test)]
mod learn_tests;
#[cfg(test)]
mod lost_tests;
#[cfg(test)]
mod node_tests;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod preempt_tests;
#[cfg(test)]
mod reshape_tests;
#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod sim;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::BTreeSet, sync::Arc};

use shaper_core::{
    gpu::{CardOffer, CardSet},
    id::{ExecutionId, TaskId},
    scale::Order,
    spec::{Capacity, Credentials, Decision, DecisionKind, Demand, NodeVerdict, Policy, TaskSpec},
    task::{TaskStatus, UnixNanos},
};

pub use self::{
    lost::next_rerun,
    nodes::{Leaving, leaving},
    policies::PolicyRevision,
    rows::{Row, RowChange},
    scale::ScaleEvent,
    schedule::next_wakeup,
    state::{Bounds, Cordon, Phase, State, Submission, Task},
    waiting::Lacks,
};

/// A connection of an agent. A later one has a higher number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client wants a task run.
    Submit {
        /// Who.
        caller: Credentials,
        /// What.
        spec: Box<TaskSpec>,
    },
    /// A client wants a task ended.
    Cancel {
        /// Who.
        caller: Credentials,
        /// Which.
        task: TaskId,
        /// Between SIGTERM and SIGKILL.
        grace_millis: u64,
    },
    /// A policy is set.
    ApplyPolicy {
        /// Who.
        caller: Credentials,
        /// Of a caller other than the operator: the namespaces whose policies are theirs to set.
        within: Vec<String>,
        /// Which.
        policy: Box<Policy>,
    },
    /// A policy is to go.
    DeletePolicy {
        /// Who.
        caller: Credentials,
        /// Of a caller other than the operator: the namespaces whose policies are theirs to set.
        within: Vec<String>,
        /// Which.
        name: String,
    },
    /// The policies are to be what they were.
    RollBackPolicies {
        /// Who.
        caller: Credentials,
        /// After which revision.
        revision: u64,
    },
    /// An agent connected and said what it has.
    AgentConnected {
        /// Its session.
        session: SessionId,
        /// What it said.
        hello: Box<Hello>,
    },
    /// A session ended.
    AgentGone {
        /// Which.
        session: SessionId,
    },
    /// An agent answered a directive.
    DirectiveResult {
        /// From which session.
        session: SessionId,
        /// The answer.
        result: DirectiveResult,
    },
    /// A task changed.
    TaskReport {
        /// From which session.
        session: SessionId,
        /// The task.
        report: Box<NodeTask>,
    },
    /// How a node is.
    NodeReport {
        /// From which session.
        session: SessionId,
        /// CPU utilisation.
        cpu_utilisation_permille: u32,
    },
    /// An agent decided something about a task alone.
    TaskDecision {
        /// From which session.
        session: SessionId,
        /// About what.
        execution: ExecutionId,
        /// What.
        decision: Box<Decision>,
    },
    /// An agent asks whether the broker is there.
    Contact {
        /// In which session.
        session: SessionId,
        /// For the answer.
        number: u64,
    },
    /// An operator says that a node is dead.
    FenceNode {
        /// Who.
        caller: Credentials,
        /// The node.
        node: String,
    },
    /// An operator says whether a node takes tasks.
    CordonNode {
        /// Who.
        caller: Credentials,
        /// The node.
        node: String,
        /// Whether, and what becomes of those that it has.
        wish: NodeWish,
    },
    /// An operator says that a node is gone for good.
    RemoveNode {
        /// Who.
        caller: Credentials,
        /// The node.
        node: String,
    },
    /// Of the groups of nodes that are started and ended.
    Scale(ScaleEvent),
    /// A time that [`next_wakeup`] or [`next_rerun`] named has come.
    Tick,
}

/// What is to become of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeWish {
    /// It takes tasks.
    Open,
    /// It takes no more, and keeps those that it has.
    Cordoned,
    /// It takes no more, and those that it has go elsewhere.
    Drained,
}

/// What an agent says first.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Its node.
    pub node: String,
    /// Of the node's kernel.
    pub boot_id: String,
    /// What the node has.
    pub capacity: Capacity,
    /// The broker's tasks that the agent has, ended ones included.
    pub inventory: Vec<NodeTask>,
    /// The highest epoch that it has obeyed.
    pub highest_epoch: u64,
    /// Its own socket.
    pub agent_socket: String,
    /// Its GPU cards.
    pub gpus: CardOffer,
    /// Whether it runs tasks that have an image.
    pub containers: bool,
}

/// A task as an agent reports it.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeTask {
    /// The task.
    pub status: TaskStatus,
    /// Of the latest directive that was carried out for it.
    pub generation: u64,
    /// The node has evicted it. The decision may not have been heard: no session outlives a crash.
    pub evicted: bool,
    /// It was ended, or not started, because the broker was not heard of for its lease, or the node was started anew.
    pub lease_over: bool,
    /// What the node guarantees it, if it says so.
    pub request: Option<Demand>,
}

/// An order to an agent. (task, attempt, generation) is carried out once.
#[derive(Clone, Debug, PartialEq)]
pub struct Directive {
    /// About what.
    pub execution: ExecutionId,
    /// Of the directive, among those of the task.
    pub generation: u64,
    /// Of the broker.
    pub epoch: u64,
    /// What.
    pub kind: DirectiveKind,
}

/// What an agent is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum DirectiveKind {
    /// Run what was submitted, with these GPU cards.
    Start(Arc<Submission>, CardSet),
    /// End it.
    Stop {
        /// Between SIGTERM and SIGKILL.
        grace_millis: u64,
        /// Why.
        reason: String,
    },
    /// Another amount is to be reserved for it.
    Resize {
        /// How much.
        request: Demand,
        /// Why.
        reason: String,
    },
    /// Its end is recorded.
    Forget,
}

/// An answer to a directive.
#[derive(Clone, Debug, PartialEq)]
pub struct DirectiveResult {
    /// About what.
    pub execution: ExecutionId,
    /// Of the directive.
    pub generation: u64,
    /// The answer.
    pub outcome: DirectiveOutcome,
}

/// What became of a directive.
#[derive(Clone, Debug, PartialEq)]
pub enum DirectiveOutcome {
    /// It is being carried out.
    Accepted,
    /// It will not be, and why.
    Refused(String),
    /// It was, and this is there now.
    Settled(Box<NodeTask>),
}

/// What is to be done once the rows are durable.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// The answer to the client that caused the event.
    Answer(Result<Answer, Refusal>),
    /// To an agent that connected: the epoch.
    Welcome(SessionId, u64),
    /// To an agent that asked: the broker is there.
    Contact(SessionId, u64),
    /// To an agent: all policies.
    Policies(SessionId, u64, Vec<Policy>),
    /// To an agent.
    Direct(SessionId, Box<Directive>),
    /// End a session.
    Close(SessionId, String),
    /// To whom it may concern: a task changed.
    Changed {
        /// Which.
        task: TaskId,
        /// Of this change. The state may have a later one when it comes to that, and tells of both.
        revision: u64,
    },
    /// A task has ended or was cancelled: nothing more is decided about it.
    Over(TaskId),
    /// More nodes are needed.
    ScaleOut {
        /// For which task.
        task: TaskId,
        /// What is missing.
        reason: String,
    },
    /// To whoever starts and ends the nodes of a group.
    Scale {
        /// Of which group.
        group: String,
        /// What to do.
        order: Box<Order>,
    },
    /// Something that the operator should know.
    Warn(String),
}

/// What a client gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The task as it is now, in this epoch.
    Task(u64, Arc<Task>),
    /// The policy, and since which revision of the set it holds.
    Policy(Box<Policy>, u64),
    /// What changed in the set of policies.
    Policies(Box<PolicyRevision>),
    /// The tasks that a dead node had.
    Fenced(Vec<TaskId>),
    /// What becomes of the tasks of a node that is drained.
    Leaves(Vec<Leaving>),
}

/// Why a client gets nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such task, or not theirs.
    #[error("there is no task `{0}` of yours")]
    NoSuchTask(TaskId),
    /// No execution of this name has finished, or none of theirs.
    #[error("no task `{namespace}/{name}` of yours has finished yet")]
    NoHistory {
        /// The namespace.
        namespace: String,
        /// The name.
        name: String,
    },
    /// No node of this name has ever connected.
    #[error("there is no node `{0}`; `shaper get nodes` lists them")]
    NoSuchNode(String),
    /// No policy of this name.
    #[error("there is no policy `{0}`; `shaper policy get` lists them")]
    NoSuchPolicy(String),
    /// No such revision of the policies is known.
    #[error(
        "the policies cannot go back to revision {revision}: the latest is {latest}, and what was before \
         revision {oldest} is forgotten; `shaper policy history` lists them"
    )]
    NoSuchRevision {
        /// Which.
        revision: u64,
        /// The oldest one to go back to.
        oldest: u64,
        /// The one in force.
        latest: u64,
    },
    /// It is still in use.
    #[error("node `{node}` {why}")]
    NodeInUse {
        /// Which.
        node: String,
        /// By whom, and the remedy.
        why: String,
    },
    /// It is not dead.
    #[error(
        "node `{0}` answers: only a node that does not is said to be dead; stop its agent, or power it off, first"
    )]
    NodeAnswers(String),
    /// The id is taken.
    #[error("the task id `{0}` is taken by {1}; choose another, ids are unique in the cluster")]
    Exists(TaskId, Taken),
    /// Not theirs to do.
    #[error("{0}")]
    Denied(Denied),
    /// It cannot be.
    #[error("{0}")]
    Invalid(Invalid),
    /// The broker is full.
    #[error("the broker has {limit} {what}, and takes no more; {remedy}")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: usize,
        /// What to do.
        remedy: &'static str,
    },
}

/// By what an id is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Taken {
    /// A task of the same user.
    #[error("a task of yours with another spec")]
    OtherSpec,
    /// A task of another user.
    #[error("a task of another user")]
    OtherUser,
}

/// What only the operator may do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Running a task as somebody else.
    #[error("only uid 0 may run a task as another user or with other groups; leave run_as out")]
    RunAs,
    /// Saying that a node is dead.
    #[error("only uid 0 may say that a node is dead")]
    Fence,
    /// Saying whether it takes tasks.
    #[error("only uid 0 may cordon, drain and remove nodes")]
    Nodes,
    /// Setting policies.
    #[error(
        "policies of namespace `{0}` are not yours to set: those of your own namespaces are, and all are uid 0's"
    )]
    Policies(String),
    /// Going back.
    #[error("only uid 0 may roll back the policies: they are everybody's")]
    RollBack,
    /// Replacing somebody else's.
    #[error("policy `{name}` is of namespace `{namespace}` and of uid {uid}: choose another name")]
    PolicyOfOthers {
        /// Which.
        name: String,
        /// Its namespace.
        namespace: String,
        /// Whose.
        uid: u32,
    },
}

/// What cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No command.
    #[error("the command is empty; say what to run")]
    NoCommand,
    /// A directory that is not absolute.
    #[error("the working directory `{0}` is not absolute")]
    Cwd(String),
    /// A name that cannot be part of a key.
    #[error("the {what} `{name}` must be 1 to 255 bytes, without `/` and control characters")]
    Name {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
    },
}

/// What an event led to. The rows are to be durable, as the state has them now or later, before any of the effects happens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Rows that changed ([`State::row`]).
    pub rows: Vec<Row>,
    /// The rest.
    pub effects: Vec<Effect>,
}

/// Lets something happen to the state.
pub fn on_event(state: &mut State, event: Event, now: UnixNanos) -> Outcome {
    let mut turn = Turn::new(state, now);
    match event {
        Event::Submit { caller, spec } => turn.submit(caller, *spec),
        Event::Cancel { caller, task, grace_millis } => turn.cancel(&caller, &task, grace_millis),
        Event::ApplyPolicy { caller, within, policy } => turn.apply_policy(&caller, &within, *policy),
        Event::DeletePolicy { caller, within, name } => turn.delete_policy(&caller, &within, &name),
        Event::RollBackPolicies { caller, revision } => turn.roll_back_policies(&caller, revision),
        Event::AgentConnected { session, hello } => turn.connected(session, *hello),
        Event::AgentGone { session } => turn.gone(session),
        Event::DirectiveResult { session, result } => turn.result(session, result),
        Event::TaskReport { session, report } => turn.report(session, *report),
        Event::NodeReport { session, cpu_utilisation_permille } => {
            turn.node_report(session, cpu_utilisation_permille);
        }
        Event::TaskDecision { session, execution, decision } => {
            turn.agent_decided(session, &execution, *decision);
        }
        Event::Contact { session, number } => turn.contact(session, number),
        Event::FenceNode { caller, node } => turn.fence(&caller, &node),
        Event::CordonNode { caller, node, wish } => turn.cordon(&caller, &node, wish),
        Event::RemoveNode { caller, node } => turn.remove_node(&caller, &node),
        Event::Scale(event) => turn.scale(event),
        Event::Tick => {
            turn.rerun();
            turn.notice_slack();
        }
    }
    turn.schedule();
    turn.finish()
}

/// A new broker on the rows of an old one: a higher epoch, to be durable before anything else happens.
pub fn begin(state: &mut State) -> Outcome {
    state.epoch += 1;
    let mut rows = vec![Row::Epoch];
    // The nodes for which places were promised may never come.
    let is_nominated = |task: &&Task| matches!(task.phase, Phase::Nominated { .. });
    let nominated = state.tasks.values().map(|row| &row.task).filter(is_nominated);
    let nominated: Vec<_> = nominated.map(|task| task.id().clone()).collect();
    for id in nominated {
        state.leave(&id);
        state.revision += 1;
        if let Some(row) = state.tasks.get_mut(&id) {
            row.task.cards = CardSet::NONE;
            row.task.phase = Phase::Pending { reason: schedule::NO_NODE.to_owned(), scale_out_asked: false };
            row.task.revision = state.revision;
            rows.push(Row::Run { sequence: row.task.sequence(), task: id.clone() });
        }
        let entered = state.enter(&id);
        debug_assert!(entered, "`{id}` waits");
    }
    Outcome { rows, effects: Vec::new() }
}

/// One event at work: what it touched, and what it wants done.
struct Turn<'a> {
    state: &'a mut State,
    now: UnixNanos,
    effects: Vec<Effect>,
    answer: Option<Result<Reply, Refusal>>,
    /// Tasks of which something changed that clients see.
    tasks: BTreeSet<TaskId>,
    /// Rows other than those of `tasks`.
    rows: Vec<Row>,
    /// Every waiting task is to be looked at: a node came or went.
    look_at_all: bool,
    /// Nodes where something was given back.
    freed: BTreeSet<String>,
    /// Tasks that began to wait.
    began_to_wait: BTreeSet<TaskId>,
    /// It is to be looked at on all nodes whether running tasks could do with less.
    look_for_slack: bool,
    /// What was found by that.
    spares: reshape::Spares,
}

/// An answer that is made when everything has happened.
enum Reply {
    Task(TaskId),
    Policy(String),
    Policies(u64),
    Fenced(Vec<TaskId>),
    Leaves(Vec<Leaving>),
}

impl Turn<'_> {
    fn new(state: &mut State, now: UnixNanos) -> Turn<'_> {
        Turn {
            state,
            now,
            effects: Vec::new(),
            answer: None,
            tasks: BTreeSet::new(),
            rows: Vec::new(),
            look_at_all: false,
            freed: BTreeSet::new(),
            began_to_wait: BTreeSet::new(),
            look_for_slack: false,
            spares: reshape::Spares::new(),
        }
    }

    /// A task that will be changed.
    fn change(&mut self, id: &TaskId) -> Option<&mut state::TaskRow> {
        let row = self.state.tasks.get_mut(id)?;
        self.tasks.insert(id.clone());
        Some(row.as_mut())
    }

    /// Moves a task to another phase; it keeps its cards if it stays in the books of its node.
    fn move_to(&mut self, id: &TaskId, phase: Phase) {
        let kept = self.state.tasks.get(id).map(|row| &row.task);
        let kept =
            kept.filter(|task| phase.booked_on().is_some() && phase.booked_on() == task.phase.booked_on());
        let cards = kept.map_or(CardSet::NONE, |task| task.cards);
        self.move_with(id, phase, cards);
    }

    /// Moves a task to another phase, with these cards. The only way in which either changes.
    fn move_with(&mut self, id: &TaskId, phase: Phase, cards: CardSet) {
        let now_waits = matches!(phase, Phase::Pending { .. });
        self.state.leave(id);
        let Some(row) = self.change(id) else { return };
        let before = std::mem::replace(&mut row.task.phase, phase);
        row.task.cards = cards;
        let is_over = row.task.phase.is_over();
        let is_on_a_node = row.task.phase.node().is_some();
        if !is_on_a_node {
            row.task.preempted = None;
            row.task.resized = None;
        }
        if let Some(node) = before.booked_on().filter(|node| row.task.phase.booked_on() != Some(node)) {
            self.freed.insert(node.to_owned());
        }
        if !is_on_a_node {
            self.state.watches.remove(id);
            self.state.shown.end(id);
        }
        if is_over {
            self.effects.push(Effect::Over(id.clone()));
        }
        let entered = self.state.enter(id);
        debug_assert!(entered, "task `{id}` was placed on a node that is not there");
        if now_waits {
            self.began_to_wait.insert(id.clone());
        }
    }

    fn decide(
        &mut self,
        id: &TaskId,
        kind: DecisionKind,
        reason: impl Into<String>,
        nodes: Vec<NodeVerdict>,
    ) {
        self.state.tally.decided(kind);
        let decision = Decision { at: self.now, by: "broker".to_owned(), kind, reason: reason.into(), nodes };
        self.state.shown.note(id, &decision);
        if let Some(row) = self.change(id) {
            row.decide(decision);
        }
    }

    /// The rows of all that was touched, and the effects.
    fn finish(self) -> Outcome {
        let Turn { state, mut effects, answer, tasks, mut rows, .. } = self;
        for id in tasks {
            if let Some(row) = state.tasks.get_mut(&id) {
                state.revision += 1;
                row.task.revision = state.revision;
                rows.push(Row::Run { sequence: row.task.sequence(), task: id.clone() });
                effects.push(Effect::Changed { task: id, revision: state.revision });
            }
        }
        let answer = answer.map(|reply| {
            reply.map(|reply| match reply {
                Reply::Task(id) => {
                    let row = state.tasks.get(&id);
                    row.map(|row| Answer::Task(state.epoch, Arc::new(row.task.clone())))
                }
                Reply::Policy(name) => state
                    .policies
                    .get(&name)
                    .map(|row| Answer::Policy(Box::new(row.policy.clone()), row.revision)),
                Reply::Policies(revision) => {
                    let change = state.policy_revisions.get(&revision).cloned();
                    change.map(|change| Answer::Policies(Box::new(change)))
                }
                Reply::Fenced(tasks) => Some(Answer::Fenced(tasks)),
                Reply::Leaves(tasks) => Some(Answer::Leaves(tasks)),
            })
        });
        match answer {
            Some(Ok(Some(answer))) => effects.push(Effect::Answer(Ok(answer))),
            Some(Err(refusal)) => effects.push(Effect::Answer(Err(refusal))),
            Some(Ok(None)) | None => {}
        }
        while let Some(forgotten) = state.forget_one() {
            let (task, sequence) = (forgotten.task.id(), forgotten.task.sequence());
            rows.push(Row::Submission { sequence, task: task.clone() });
            rows.push(Row::Run { sequence, task: task.clone() });
        }
        Outcome { rows, effects }
    }
}
