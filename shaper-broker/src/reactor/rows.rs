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
    #[error("the row {key} is damaged; restore the store from a copy, or move it away")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Its content belongs under another key.
    #[error("the row {key} holds something else; restore the store from a copy, or move it away")]
    Misplaced {
        /// Its key.
        key: String,
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

fn row(key: String, value: &impl Serialize) -> RowChange {
    // Encoding fails for maps whose keys are no strings, and rows have none.
    let value = serde_json::to_vec(value).expect("a row has a JSON form");
    RowChange { key, value }
}

pub(super) fn epoch(epoch: u64) -> RowChange {
    row(EPOCH.to_owned(), &epoch)
}

pub(super) fn task(task: &TaskRow) -> RowChange {
    row(format!("{TASK}{}", task.task.id()), task)
}

pub(super) fn node(node: &NodeRow) -> RowChange {
    row(format!("{NODE}{}", node.name), node)
}

pub(super) fn policy(policy: &PolicyRow) -> RowChange {
    row(format!("{POLICY}{}", policy.policy.policy_name), policy)
}

pub(super) fn history(history: &History) -> RowChange {
    row(format!("{HISTORY}{}/{}", history.namespace, history.name), history)
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(value).map_err(|source| LoadError::Damaged { key: key.to_owned(), source })
}

impl State {
    /// The state that these rows describe: no agent is connected.
    pub fn load<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<State, LoadError> {
        let mut state = State::default();
        for (key, value) in rows {
            let key = String::from_utf8_lossy(key);
            state.load_row(&key, value)?;
        }
        state.index()?;
        Ok(state)
    }

    fn load_row(&mut self, key: &str, value: &[u8]) -> Result<(), LoadError> {
        let expected = if key == EPOCH {
            self.epoch = parse(key, value)?;
            epoch(self.epoch).key
        } else if key.starts_with(TASK) {
            let row: TaskRow = parse(key, value)?;
            let expected = task(&row).key;
            self.tasks.insert(row.task.id().clone(), row);
            expected
        } else if key.starts_with(NODE) {
            let row: NodeRow = parse(key, value)?;
            let expected = node(&row).key;
            self.nodes.insert(row.name.clone(), Node::new(row));
            expected
        } else if key.starts_with(POLICY) {
            let row: PolicyRow = parse(key, value)?;
            let expected = policy(&row).key;
            self.policies.insert(row.policy.policy_name.clone(), row);
            expected
        } else if key.starts_with(HISTORY) {
            let row: History = parse(key, value)?;
            let expected = history(&row).key;
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
        self.registered = registered.into_iter().map(|row| row.name.clone()).collect();
        let tasks = || self.tasks.values().map(|row| &row.task);
        self.revision = tasks().map(|task| task.revision).max().unwrap_or(0);
        self.next_sequence = tasks().map(|task| task.sequence + 1).max().unwrap_or(0);
        self.policies_revision = self.policies.values().map(|row| row.revision).max().unwrap_or(0);
        let ids: Vec<_> = self.tasks.keys().cloned().collect();
        for id in ids {
            if !self.enter(&id) {
                return Err(LoadError::NoNode { task: id });
            }
        }
        Ok(())
    }
}
