//! Rows: what of the state is kept, under which key, and how the state is built from them again.
//!
//! A task is two rows: what was submitted, which is written once, and what became of it. Their keys are numbers in the order
//! of submission, so that what is written together lies together. A value is MessagePack, a struct as an array of its fields:
//! a third of what JSON takes, of bytes and of time.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shaper_core::{gpu::CardSet, id::TaskId, spec::Decision, task::TaskStatus};

use super::{
    history::History,
    learn::Kind,
    nodes,
    places::Places,
    policies::PolicyRevision,
    scale::ScaleRow,
    state::{
        Avoid, Cancel, Holder, Node, NodeRow, Phase, PolicyRow, Resized, State, Submission, Task, TaskRow,
    },
};

/// A row, by what it is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// The epoch.
    Epoch,
    /// A node.
    Node(String),
    /// What was submitted.
    Submission {
        /// Its place in the order of submissions.
        sequence: u64,
        /// The task.
        task: TaskId,
    },
    /// What became of it.
    Run {
        /// Its place in the order of submissions.
        sequence: u64,
        /// The task.
        task: TaskId,
    },
    /// A policy.
    Policy(String),
    /// A change of the set of policies.
    PolicyRevision(u64),
    /// What finished tasks used, by namespace and name.
    History(String, String),
    /// What was learnt of tasks, by namespace and name.
    Kind(String, String),
    /// How a group of nodes stands.
    Scale(String),
}

/// One row to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Its key.
    pub key: String,
    /// MessagePack; `None`: it is to go.
    pub value: Option<Vec<u8>>,
}

/// The key of the epoch. Whoever writes it last owns the store.
pub const EPOCH: &str = "meta/epoch";

const TASK: &str = "task/";
const RUN: &str = "run/";
const NODE: &str = "node/";
const POLICY: &str = "policy/";
const POLICY_REVISION: &str = "policy-revision/";
const HISTORY: &str = "history/";
const KIND: &str = "kind/";
const SCALE: &str = "scale/";

/// What became of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run<'a> {
    sequence: u64,
    phase: Cow<'a, Phase>,
    attempt: u32,
    node: Option<Cow<'a, str>>,
    acknowledged: bool,
    evicted: bool,
    lost: bool,
    generation: u64,
    start_generation: u64,
    cancel: Option<Cancel>,
    preempted: Option<u64>,
    retries_used: u32,
    setbacks: u32,
    avoid: Cow<'a, [Avoid]>,
    on_node: Option<Cow<'a, TaskStatus>>,
    holders: Cow<'a, [Holder]>,
    revision: u64,
    decisions: Cow<'a, VecDeque<Decision>>,
    #[serde(default)]
    resized: Option<Cow<'a, Resized>>,
    #[serde(default)]
    cards: CardSet,
}

impl Run<'_> {
    fn of(TaskRow { task, decisions }: &TaskRow) -> Run<'_> {
        let Task {
            submission,
            phase,
            attempt,
            node,
            acknowledged,
            evicted,
            lost,
            generation,
            start_generation,
            cancel,
            preempted,
            retries_used,
            setbacks,
            avoid,
            on_node,
            holders,
            revision,
            resized,
            cards,
        } = task;
        Run {
            sequence: submission.sequence,
            phase: Cow::Borrowed(phase),
            attempt: *attempt,
            node: node.as_deref().map(Cow::Borrowed),
            acknowledged: *acknowledged,
            evicted: *evicted,
            lost: *lost,
            generation: *generation,
            start_generation: *start_generation,
            cancel: *cancel,
            preempted: *preempted,
            retries_used: *retries_used,
            setbacks: *setbacks,
            avoid: Cow::Borrowed(avoid),
            on_node: on_node.as_deref().filter(|_| phase.node().is_none()).map(Cow::Borrowed),
            holders: Cow::Borrowed(holders),
            revision: *revision,
            decisions: Cow::Borrowed(decisions),
            resized: resized.as_ref().map(Cow::Borrowed),
            cards: *cards,
        }
    }

    fn of_task(self, submission: Arc<Submission>) -> TaskRow {
        let task = Task {
            submission,
            phase: self.phase.into_owned(),
            attempt: self.attempt,
            node: self.node.map(Cow::into_owned),
            acknowledged: self.acknowledged,
            evicted: self.evicted,
            lost: self.lost,
            generation: self.generation,
            start_generation: self.start_generation,
            cancel: self.cancel,
            preempted: self.preempted,
            retries_used: self.retries_used,
            setbacks: self.setbacks,
            avoid: self.avoid.into_owned(),
            on_node: self.on_node.map(|status| Arc::new(status.into_owned())),
            holders: self.holders.into_owned(),
            revision: self.revision,
            resized: self.resized.map(Cow::into_owned),
            cards: self.cards,
        };
        TaskRow { task, decisions: self.decisions.into_owned() }
    }
}

/// A row that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not what this program writes.
    #[error("the row {key} is damaged; {RESTORE}")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong.
        source: rmp_serde::decode::Error,
    },
    /// Its content belongs under another key.
    #[error("the row {key} holds what belongs under {belongs}; {RESTORE}")]
    Misplaced {
        /// Its key.
        key: String,
        /// Where it would be right.
        belongs: String,
    },
    /// A row of a task without the other.
    #[error("the row {key} is one of two of a task, and the other is not there; {RESTORE}")]
    Half {
        /// Its key.
        key: String,
    },
    /// Two submissions of one id.
    #[error("task `{task}` is there twice; {RESTORE}")]
    Twice {
        /// The task.
        task: TaskId,
    },
    /// A node with a number that another has, or that is far beyond those of all others.
    #[error("the node `{node}` has the number {order}, which another has or none can have; {RESTORE}")]
    Order {
        /// The node.
        node: String,
        /// Its number.
        order: u64,
    },
    /// A task on a node of which there is no row.
    #[error("the row {key} is of task `{task}` on node {node}, of which there is no row; {RESTORE}")]
    NoNode {
        /// Its key.
        key: String,
        /// The task.
        task: TaskId,
        /// The node.
        node: String,
    },
    /// A key of no kind that this program knows.
    #[error("the row {key} is of no kind that this broker knows; {RESTORE}")]
    Unknown {
        /// Its key.
        key: String,
    },
}

/// The remedy, for each of them.
const RESTORE: &str = "restore the store from a backup (`shaper-broker store restore`), or move it away";

/// Most rows have fewer bytes.
const USUAL_ROW: usize = 1024;

fn encode(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(USUAL_ROW);
    // Encoding fails where writing does, or for a sequence of unknown length, and there is neither.
    rmp_serde::encode::write(&mut bytes, value).expect("a row has a form in MessagePack");
    bytes
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    let mut rest = value;
    let parsed = T::deserialize(&mut rmp_serde::Deserializer::new(&mut rest));
    let whole = parsed.and_then(|parsed| match rest {
        [] => Ok(parsed),
        _ => Err(rmp_serde::decode::Error::Uncategorized(format!("{} bytes are left over", rest.len()))),
    });
    whole.map_err(|source| LoadError::Damaged { key: key.to_owned(), source })
}

/// The number in the key of a row of a task, if it is written as we write it.
fn sequence_in(key: &str, prefix: &str) -> Option<u64> {
    let digits = key.strip_prefix(prefix).filter(|digits| digits.len() == 16)?;
    let are_ours = digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    are_ours.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

fn submission_key(sequence: u64) -> String {
    format!("{TASK}{sequence:016x}")
}

fn run_key(sequence: u64) -> String {
    format!("{RUN}{sequence:016x}")
}

fn kind_key(namespace: &str, name: &str) -> String {
    format!("{KIND}{namespace}/{name}")
}

fn history_key(namespace: &str, name: &str) -> String {
    format!("{HISTORY}{namespace}/{name}")
}

fn scale_key(name: &str) -> String {
    format!("{SCALE}{name}")
}

fn node_key(name: &str) -> String {
    format!("{NODE}{name}")
}

fn policy_key(name: &str) -> String {
    format!("{POLICY}{name}")
}

fn policy_revision_key(revision: u64) -> String {
    format!("{POLICY_REVISION}{revision:016x}")
}

/// What a row holds. Written as JSON it is what people read.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// The epoch.
    Epoch(u64),
    /// What was submitted.
    Submission(Box<Submission>),
    /// What became of it.
    Run(Box<Run<'static>>),
    /// A node.
    Node(NodeRow),
    /// A policy.
    Policy(PolicyRow),
    /// A change of the set of policies.
    PolicyRevision(PolicyRevision),
    /// What finished tasks of one name used.
    History(History),
    /// What was learnt of tasks of one name.
    Kind(Kind),
    /// How a group of nodes stands.
    Scale(ScaleRow),
}

impl Content {
    /// What is under a key.
    pub fn decode(key: &str, value: &[u8]) -> Result<Content, LoadError> {
        // Of a million rows most are of tasks: no text is made for these.
        if key.starts_with(TASK) {
            let row: Submission = parse(key, value)?;
            return match sequence_in(key, TASK) == Some(row.sequence) {
                true => Ok(Content::Submission(Box::new(row))),
                false => Err(misplaced(key, submission_key(row.sequence))),
            };
        }
        if key.starts_with(RUN) {
            let row: Run<'static> = parse(key, value)?;
            return match sequence_in(key, RUN) == Some(row.sequence) {
                true => Ok(Content::Run(Box::new(row))),
                false => Err(misplaced(key, run_key(row.sequence))),
            };
        }
        let (content, belongs) = if key == EPOCH {
            (Content::Epoch(parse(key, value)?), EPOCH.to_owned())
        } else if key.starts_with(NODE) {
            let row: NodeRow = parse(key, value)?;
            let belongs = node_key(&row.name);
            (Content::Node(row), belongs)
        } else if key.starts_with(SCALE) {
            let row: ScaleRow = parse(key, value)?;
            let belongs = scale_key(&row.name);
            (Content::Scale(row), belongs)
        } else if key.starts_with(POLICY) {
            let row: PolicyRow = parse(key, value)?;
            let belongs = policy_key(&row.policy.policy_name);
            (Content::Policy(row), belongs)
        } else if key.starts_with(POLICY_REVISION) {
            let row: PolicyRevision = parse(key, value)?;
            let belongs = policy_revision_key(row.revision);
            (Content::PolicyRevision(row), belongs)
        } else if key.starts_with(HISTORY) {
            let row: History = parse(key, value)?;
            let belongs = history_key(&row.namespace, &row.name);
            (Content::History(row), belongs)
        } else if key.starts_with(KIND) {
            let row: Kind = parse(key, value)?;
            let belongs = kind_key(&row.namespace, &row.name);
            (Content::Kind(row), belongs)
        } else {
            return Err(LoadError::Unknown { key: key.to_owned() });
        };
        if key == belongs { Ok(content) } else { Err(misplaced(key, belongs)) }
    }
}

fn misplaced(key: &str, belongs: String) -> LoadError {
    LoadError::Misplaced { key: key.to_owned(), belongs }
}

/// A state while its rows are read, in any order. What was submitted had better come before what became of it: else that waits.
#[derive(Default)]
pub struct Loading {
    state: State,
    submissions: HashMap<u64, Arc<Submission>>,
    /// Those that came before what was submitted.
    runs: Vec<Run<'static>>,
    problems: Vec<LoadError>,
}

impl Loading {
    /// The next row.
    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        let state = &mut self.state;
        match Content::decode(&String::from_utf8_lossy(key), value) {
            Ok(Content::Epoch(epoch)) => state.epoch = epoch,
            Ok(Content::Submission(row)) => drop(self.submissions.insert(row.sequence, Arc::new(*row))),
            Ok(Content::Run(row)) => match self.submissions.remove(&row.sequence) {
                Some(submission) => self.join(*row, submission),
                None => self.runs.push(*row),
            },
            Ok(Content::Node(row)) => drop(state.nodes.insert(row.name.clone(), Node::new(row))),
            Ok(Content::Policy(row)) => drop(state.policies.insert(row.policy.policy_name.clone(), row)),
            Ok(Content::PolicyRevision(row)) => drop(state.policy_revisions.insert(row.revision, row)),
            Ok(Content::History(row)) => {
                state.histories.insert((row.namespace.clone(), row.name.clone()), row);
            }
            Ok(Content::Kind(row)) => {
                drop(state.kinds.insert((row.namespace.clone(), row.name.clone()), row))
            }
            Ok(Content::Scale(row)) => drop(state.scale.standings.insert(row.name, row.standing)),
            Err(error) => self.problems.push(error),
        }
    }

    /// Puts the two rows of a task together.
    fn join(&mut self, run: Run<'static>, submission: Arc<Submission>) {
        let row = run.of_task(submission);
        match self.state.tasks.entry(row.task.id().clone()) {
            Entry::Occupied(there) => self.problems.push(LoadError::Twice { task: there.key().clone() }),
            Entry::Vacant(place) => drop(place.insert(Box::new(row))),
        }
    }

    /// The state that those of the rows describe that can be used, and what is wrong with the others.
    pub fn examine(mut self) -> (State, Vec<LoadError>) {
        for run in std::mem::take(&mut self.runs) {
            match self.submissions.remove(&run.sequence) {
                Some(submission) => self.join(run, submission),
                None => self.problems.push(LoadError::Half { key: run_key(run.sequence) }),
            }
        }
        let Loading { mut state, submissions, mut problems, .. } = self;
        let mut left: Vec<_> = submissions.into_keys().collect();
        left.sort_unstable();
        problems.extend(left.into_iter().map(|sequence| LoadError::Half { key: submission_key(sequence) }));
        state.index(&mut problems);
        (state, problems)
    }

    /// The state, if all rows are sound: no agent is connected.
    pub fn finish(self) -> Result<State, LoadError> {
        let (state, problems) = self.examine();
        problems.into_iter().next().map_or(Ok(state), Err)
    }
}

impl State {
    /// A row as it is now.
    pub fn row(&self, row: &Row) -> RowChange {
        // A number may be that of another task once the first is forgotten and the broker has begun anew.
        let task = |task, sequence| self.tasks.get(task).filter(|it| it.task.sequence() == sequence);
        let (key, value) = match row {
            Row::Epoch => (EPOCH.to_owned(), Some(encode(&self.epoch))),
            Row::Node(name) => (node_key(name), self.nodes.get(name).map(|node| encode(&node.row))),
            Row::Submission { sequence, task: id } => {
                (submission_key(*sequence), task(id, *sequence).map(|it| encode(&*it.task.submission)))
            }
            Row::Run { sequence, task: id } => {
                (run_key(*sequence), task(id, *sequence).map(|it| encode(&Run::of(it))))
            }
            Row::Policy(name) => (policy_key(name), self.policies.get(name).map(encode)),
            Row::PolicyRevision(revision) => {
                (policy_revision_key(*revision), self.policy_revisions.get(revision).map(encode))
            }
            Row::History(namespace, name) => {
                let history = self.histories.get(&(namespace.clone(), name.clone()));
                (history_key(namespace, name), history.map(encode))
            }
            Row::Scale(name) => (scale_key(name), self.scale.row(name).map(|row| encode(&row))),
            Row::Kind(namespace, name) => (kind_key(namespace, name), self.kind(namespace, name).map(encode)),
        };
        RowChange { key, value }
    }

    /// The state that these rows describe: no agent is connected.
    pub fn load<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<State, LoadError> {
        let mut loading = Loading::default();
        rows.into_iter().for_each(|(key, value)| loading.add(key, value));
        loading.finish()
    }

    /// The state that those of these rows describe that can be used, and what is wrong with the others.
    pub fn examine<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> (State, Vec<LoadError>) {
        let mut loading = Loading::default();
        rows.into_iter().for_each(|(key, value)| loading.add(key, value));
        loading.examine()
    }

    /// Derives what is not in rows.
    fn index(&mut self, problems: &mut Vec<LoadError>) {
        let mut rows: Vec<_> = self.nodes.values().map(|node| &node.row).collect();
        rows.sort_by_key(|row| row.order);
        let (mut registered, most) = (Vec::with_capacity(rows.len()), nodes::most_places(rows.len()));
        for row in rows {
            let NodeRow { name, order, .. } = row;
            if *order < registered.len() as u64 || *order >= most as u64 {
                // Nodes have no places then, so no task can be said to be on one.
                problems.push(LoadError::Order { node: name.clone(), order: *order });
                return;
            }
            while (registered.len() as u64) < *order {
                registered.push(None);
                self.places.add_nobody();
            }
            registered.push(Some(name.clone()));
            self.places.add(row);
        }
        self.registered = registered;
        let tasks = || self.tasks.values().map(|row| &row.task);
        self.revision = tasks().map(|task| task.revision).max().unwrap_or(0);
        self.next_sequence = tasks().map(|task| task.sequence() + 1).max().unwrap_or(0);
        let applied = self.policies.values().map(|row| row.revision).max();
        let changed = self.policy_revisions.last_key_value().map(|(revision, _)| *revision);
        self.policies_revision = applied.max(changed).unwrap_or(0);
        let order: Vec<_> = tasks().map(|task| (task.sequence(), task.id().clone())).collect();
        // Those that are over are forgotten in the order in which that came to be.
        let mut tasks: Vec<_> = tasks().map(|task| (task.revision, task.id().clone())).collect();
        tasks.sort();
        for (sequence, id) in order {
            self.shown.list(sequence, id);
        }
        for (_, id) in tasks {
            let entered = self.enter(&id);
            let Some(row) = self.tasks.get(&id) else { continue };
            if !entered {
                let key = run_key(row.task.sequence());
                let node = row.task.phase.booked_on().unwrap_or_default().to_owned();
                problems.push(LoadError::NoNode { key, task: id, node });
                continue;
            }
            for holder in &row.task.holders {
                if let Some(node) = self.nodes.get_mut(&holder.node) {
                    node.holds.insert(id.clone());
                }
            }
        }
    }

    /// Builds the index of placement anew, after what a node has was changed.
    pub(super) fn find_places(&mut self) {
        let mut places = Places::default();
        for name in &self.registered {
            let Some(node) = name.as_ref().and_then(|name| self.nodes.get(name)) else {
                places.add_nobody();
                continue;
            };
            places.add(&node.row);
            places.open(&node.row, node.takes_work());
            let nominees = node.nominees.iter().map(|(_, _, id)| id);
            for row in node.tasks.iter().chain(nominees).filter_map(|id| self.tasks.get(id)) {
                places.take(&node.row, row.task.booked(), row.task.cards);
            }
        }
        self.places = places;
    }
}
