//! Rows: what of the state is kept, under which key, and how the state is built from them again.

use serde::{Serialize, de::DeserializeOwned};
use shaper_core::id::TaskId;

use super::{
    history::History,
    state::{Node, NodeRow, PolicyRow, State, TaskRow},
};

/// One row to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Its key.
    pub key: String,
    /// JSON.
    pub value: Vec<u8>,
}

/// The key of the epoch. Whoever writes it last owns the store.
pub const EPOCH: &str = "meta/epoch";

const TASK: &str = "task/";
const NODE: &str = "node/";
const POLICY: &str = "policy/";
const HISTORY: &str = "history/";

/// A row that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not what this program writes.
    #[error("the row {key} is damaged; {RESTORE}")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Its content belongs under another key.
    #[error("the row {key} holds what belongs under {belongs}; {RESTORE}")]
    Misplaced {
        /// Its key.
        key: String,
        /// Where it would be right.
        belongs: String,
    },
    /// A task on a node of which there is no row.
    #[error("the row task/{task} is of a task on node {node}, of which there is no row; {RESTORE}")]
    NoNode {
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

fn row(key: String, value: &impl Serialize) -> RowChange {
    // Encoding fails for maps whose keys are no strings, and rows have none.
    let value = serde_json::to_vec(value).expect("a row has a JSON form");
    RowChange { key, value }
}

pub(super) fn epoch(epoch: u64) -> RowChange {
    row(EPOCH.to_owned(), &epoch)
}

pub(super) fn task(task: &TaskRow) -> RowChange {
    row(task_key(task.task.id()), task)
}

pub(super) fn node(node: &NodeRow) -> RowChange {
    row(node_key(&node.name), node)
}

pub(super) fn policy(policy: &PolicyRow) -> RowChange {
    row(policy_key(&policy.policy.policy_name), policy)
}

pub(super) fn history(history: &History) -> RowChange {
    row(history_key(&history.namespace, &history.name), history)
}

fn task_key(id: &TaskId) -> String {
    format!("{TASK}{id}")
}

fn node_key(name: &str) -> String {
    format!("{NODE}{name}")
}

fn policy_key(name: &str) -> String {
    format!("{POLICY}{name}")
}

fn history_key(namespace: &str, name: &str) -> String {
    format!("{HISTORY}{namespace}/{name}")
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(value).map_err(|source| LoadError::Damaged { key: key.to_owned(), source })
}

/// What a row holds. Written as JSON it is what people read.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Row {
    /// The epoch.
    Epoch(u64),
    /// A task, and what was decided about it.
    Task(Box<TaskRow>),
    /// A node.
    Node(NodeRow),
    /// A policy.
    Policy(PolicyRow),
    /// What finished tasks of one name used.
    History(History),
}

impl Row {
    /// What is under a key.
    pub fn decode(key: &str, value: &[u8]) -> Result<Row, LoadError> {
        let (row, belongs) = if key == EPOCH {
            let row = parse(key, value)?;
            (Row::Epoch(row), EPOCH.to_owned())
        } else if key.starts_with(TASK) {
            let row: TaskRow = parse(key, value)?;
            let belongs = task_key(row.task.id());
            (Row::Task(Box::new(row)), belongs)
        } else if key.starts_with(NODE) {
            let row: NodeRow = parse(key, value)?;
            let belongs = node_key(&row.name);
            (Row::Node(row), belongs)
        } else if key.starts_with(POLICY) {
            let row: PolicyRow = parse(key, value)?;
            let belongs = policy_key(&row.policy.policy_name);
            (Row::Policy(row), belongs)
        } else if key.starts_with(HISTORY) {
            let row: History = parse(key, value)?;
            let belongs = history_key(&row.namespace, &row.name);
            (Row::History(row), belongs)
        } else {
            return Err(LoadError::Unknown { key: key.to_owned() });
        };
        if key == belongs { Ok(row) } else { Err(LoadError::Misplaced { key: key.to_owned(), belongs }) }
    }
}

impl State {
    /// The state that these rows describe: no agent is connected.
    pub fn load<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<State, LoadError> {
        let (state, problems) = State::examine(rows);
        problems.into_iter().next().map_or(Ok(state), Err)
    }

    /// The state that those of these rows describe that can be used, and what is wrong with the others.
    pub fn examine<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> (State, Vec<LoadError>) {
        let (mut state, mut problems) = (State::default(), Vec::new());
        for (key, value) in rows {
            match Row::decode(&String::from_utf8_lossy(key), value) {
                Ok(row) => state.take_row(row),
                Err(error) => problems.push(error),
            }
        }
        state.index(&mut problems);
        (state, problems)
    }

    fn take_row(&mut self, row: Row) {
        match row {
            Row::Epoch(epoch) => self.epoch = epoch,
            Row::Task(row) => drop(self.tasks.insert(row.task.id().clone(), *row)),
            Row::Node(row) => drop(self.nodes.insert(row.name.clone(), Node::new(row))),
            Row::Policy(row) => drop(self.policies.insert(row.policy.policy_name.clone(), row)),
            Row::History(row) => {
                self.histories.insert((row.namespace.clone(), row.name.clone()), row);
            }
        }
    }

    /// Derives what is not in rows.
    fn index(&mut self, problems: &mut Vec<LoadError>) {
        let mut registered: Vec<_> = self.nodes.values().map(|node| &node.row).collect();
        registered.sort_by_key(|row| row.order);
        self.registered = registered.into_iter().map(|row| row.name.clone()).collect();
        let tasks = || self.tasks.values().map(|row| &row.task);
        self.revision = tasks().map(|task| task.revision).max().unwrap_or(0);
        self.next_sequence = tasks().map(|task| task.sequence + 1).max().unwrap_or(0);
        self.policies_revision = self.policies.values().map(|row| row.revision).max().unwrap_or(0);
        let ids: Vec<_> = self.tasks.keys().cloned().collect();
        for id in ids {
            if !self.enter(&id) {
                let node = self.tasks.get(&id).and_then(|row| row.task.phase.node());
                let node = node.unwrap_or_default().to_owned();
                problems.push(LoadError::NoNode { task: id, node });
            }
        }
    }
}
