//! Rows: what of the state is kept, under which key, and how the state is built from them again.
//!
//! A task is two rows: what was submitted, which is written once, and what became of it. Their keys are numbers in the order
//! of submission, so that what is written together lies together. A value is MessagePack, a struct as an array of its fields:
//! a third of what JSON takes, of bytes and of time.

use std::{borrow::Cow, collections::HashMap, collections::VecDeque, sync::Arc};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shaper_core::{id::TaskId, spec::Decision, task::TaskStatus};

use super::{
    history::History,
    places::Places,
    state::{Avoid, Cancel, Holder, Node, NodeRow, Phase, PolicyRow, State, Submission, Task, TaskRow},
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
    /// What finished tasks used, by namespace and name.
    History(String, String),
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
const HISTORY: &str = "history/";

/// What became of a task.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run<'a> {
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
    retries_used: u32,
    setbacks: u32,
    avoid: Cow<'a, [Avoid]>,
    on_node: Option<Cow<'a, TaskStatus>>,
    holders: Cow<'a, [Holder]>,
    revision: u64,
    decisions: Cow<'a, VecDeque<Decision>>,
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
            retries_used,
            setbacks,
            avoid,
            on_node,
            holders,
            revision,
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
            retries_used: *retries_used,
            setbacks: *setbacks,
            avoid: Cow::Borrowed(avoid),
            on_node: on_node.as_deref().filter(|_| phase.node().is_none()).map(Cow::Borrowed),
            holders: Cow::Borrowed(holders),
            revision: *revision,
            decisions: Cow::Borrowed(decisions),
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
            retries_used: self.retries_used,
            setbacks: self.setbacks,
            avoid: self.avoid.into_owned(),
            on_node: self.on_node.map(|status| Arc::new(status.into_owned())),
            holders: self.holders.into_owned(),
            revision: self.revision,
        };
        TaskRow { task, decisions: self.decisions.into_owned() }
    }
}

/// A row that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not what this program writes.
    #[error("the row {key} is damaged; restore the store from a copy, or move it away")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong.
        source: rmp_serde::decode::Error,
    },
    /// Its content belongs under another key.
    #[error("the row {key} holds something else; restore the store from a copy, or move it away")]
    Misplaced {
        /// Its key.
        key: String,
    },
    /// A row of a task without the other.
    #[error(
        "the row {key} is one of two of a task, and the other is not there; restore the store from a copy"
    )]
    Half {
        /// Its key.
        key: String,
    },
    /// Two submissions of one id.
    #[error("task `{task}` is there twice; restore the store from a copy")]
    Twice {
        /// The task.
        task: TaskId,
    },
    /// A node with a number that is not its place in the order of registration.
    #[error(
        "the node `{node}` has the number {order}, and is not in that place; restore the store from a copy"
    )]
    Order {
        /// The node.
        node: String,
        /// Its number.
        order: u64,
    },
    /// A task on a node of which there is no row.
    #[error("task `{task}` is on a node of which there is no row; restore the store from a copy")]
    NoNode {
        /// The task.
        task: TaskId,
    },
    /// A key of no kind that this program knows.
    #[error("the row {key} is of no kind that this broker knows; restore the store from a copy")]
    Unknown {
        /// Its key.
        key: String,
    },
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Encoding fails where writing does, or for a sequence of unknown length, and there is neither.
    rmp_serde::to_vec(value).expect("a row has a form in MessagePack")
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

fn submission_key(sequence: u64) -> String {
    format!("{TASK}{sequence:016x}")
}

fn run_key(sequence: u64) -> String {
    format!("{RUN}{sequence:016x}")
}

fn history_key(namespace: &str, name: &str) -> String {
    format!("{HISTORY}{namespace}/{name}")
}

/// The rows of tasks while they are read.
#[derive(Default)]
struct Halves {
    submissions: HashMap<u64, Arc<Submission>>,
    runs: Vec<Run<'static>>,
}

impl State {
    /// A row as it is now.
    pub fn row(&self, row: &Row) -> RowChange {
        // A number may be that of another task once the first is forgotten and the broker has begun anew.
        let task = |task, sequence| self.tasks.get(task).filter(|it| it.task.sequence() == sequence);
        let (key, value) = match row {
            Row::Epoch => (EPOCH.to_owned(), Some(encode(&self.epoch))),
            Row::Node(name) => (format!("{NODE}{name}"), self.nodes.get(name).map(|node| encode(&node.row))),
            Row::Submission { sequence, task: id } => {
                (submission_key(*sequence), task(id, *sequence).map(|it| encode(&*it.task.submission)))
            }
            Row::Run { sequence, task: id } => {
                (run_key(*sequence), task(id, *sequence).map(|it| encode(&Run::of(it))))
            }
            Row::Policy(name) => (format!("{POLICY}{name}"), self.policies.get(name).map(encode)),
            Row::History(namespace, name) => {
                let history = self.histories.get(&(namespace.clone(), name.clone()));
                (history_key(namespace, name), history.map(encode))
            }
        };
        RowChange { key, value }
    }

    /// The state that these rows describe: no agent is connected.
    pub fn load<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<State, LoadError> {
        let (mut state, mut halves) = (State::default(), Halves::default());
        for (key, value) in rows {
            let key = String::from_utf8_lossy(key);
            state.load_row(&mut halves, &key, value)?;
        }
        let Halves { mut submissions, runs } = halves;
        for run in runs {
            let key = || run_key(run.sequence);
            let submission =
                submissions.remove(&run.sequence).ok_or_else(|| LoadError::Half { key: key() })?;
            let row = run.of_task(submission);
            if let Some(before) = state.tasks.insert(row.task.id().clone(), Box::new(row)) {
                return Err(LoadError::Twice { task: before.task.id().clone() });
            }
        }
        if let Some(sequence) = submissions.keys().min() {
            return Err(LoadError::Half { key: submission_key(*sequence) });
        }
        state.index()?;
        Ok(state)
    }

    fn load_row(&mut self, halves: &mut Halves, key: &str, value: &[u8]) -> Result<(), LoadError> {
        let expected = if key == EPOCH {
            self.epoch = parse(key, value)?;
            EPOCH.to_owned()
        } else if key.starts_with(TASK) {
            let row: Submission = parse(key, value)?;
            let expected = submission_key(row.sequence);
            halves.submissions.insert(row.sequence, Arc::new(row));
            expected
        } else if key.starts_with(RUN) {
            let row: Run<'static> = parse(key, value)?;
            let expected = run_key(row.sequence);
            halves.runs.push(row);
            expected
        } else if key.starts_with(NODE) {
            let row: NodeRow = parse(key, value)?;
            let expected = format!("{NODE}{}", row.name);
            self.nodes.insert(row.name.clone(), Node::new(row));
            expected
        } else if key.starts_with(POLICY) {
            let row: PolicyRow = parse(key, value)?;
            let expected = format!("{POLICY}{}", row.policy.policy_name);
            self.policies.insert(row.policy.policy_name.clone(), row);
            expected
        } else if key.starts_with(HISTORY) {
            let row: History = parse(key, value)?;
            let expected = history_key(&row.namespace, &row.name);
            self.histories.insert((row.namespace.clone(), row.name.clone()), row);
            expected
        } else {
            return Err(LoadError::Unknown { key: key.to_owned() });
        };
        if key == expected { Ok(()) } else { Err(LoadError::Misplaced { key: key.to_owned() }) }
    }

    /// Derives what is not in rows.
    fn index(&mut self) -> Result<(), LoadError> {
        let mut registered: Vec<_> = self.nodes.values().map(|node| &node.row).collect();
        registered.sort_by_key(|row| row.order);
        for (place, row) in (0..).zip(&registered) {
            if row.order != place {
                return Err(LoadError::Order { node: row.name.clone(), order: row.order });
            }
            self.places.add(row);
        }
        self.registered = registered.into_iter().map(|row| row.name.clone()).collect();
        let tasks = || self.tasks.values().map(|row| &row.task);
        self.revision = tasks().map(|task| task.revision).max().unwrap_or(0);
        self.next_sequence = tasks().map(|task| task.sequence() + 1).max().unwrap_or(0);
        self.policies_revision = self.policies.values().map(|row| row.revision).max().unwrap_or(0);
        // Those that are over are forgotten in the order in which that came to be.
        let mut tasks: Vec<_> = tasks().map(|task| (task.revision, task.id().clone())).collect();
        tasks.sort();
        for (_, id) in tasks {
            if !self.enter(&id) {
                return Err(LoadError::NoNode { task: id });
            }
            let Some(row) = self.tasks.get(&id) else { continue };
            for holder in &row.task.holders {
                if let Some(node) = self.nodes.get_mut(&holder.node) {
                    node.holds.insert(id.clone());
                }
            }
        }
        Ok(())
    }

    /// Builds the index of placement anew, after what a node has was changed.
    pub(super) fn find_places(&mut self) {
        let mut places = Places::default();
        for node in self.nodes_in_order() {
            places.add(&node.row);
            places.open(&node.row, node.session.is_some());
            for row in node.tasks.iter().filter_map(|id| self.tasks.get(id)) {
                places.take(&node.row, row.task.demand());
            }
        }
        self.places = places;
    }
}
