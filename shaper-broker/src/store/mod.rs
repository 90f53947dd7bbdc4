//! Where rows are kept. The trait is shaped like etcd: keys and values are bytes, each row knows the
//! revision of its last change, and a transaction is a list of comparisons and a list of writes that
//! happen together or not at all.
//!
//! Two backends pass one conformance suite (`conformance.rs`): [`memory::Memory`], which forgets, and
//! [`redb::Redb`], which has everything on disk before [`Store::txn`] returns.

use std::{fmt, path::PathBuf};

pub mod memory;
pub mod redb;

#[cfg(test)]
mod conformance;

/// A value, and when it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// The value.
    pub value: Vec<u8>,
    /// The revision of the transaction that wrote it.
    pub revision: u64,
}

/// What must hold for a transaction to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key has no value.
    Absent {
        /// The key.
        key: Vec<u8>,
    },
    /// The key has the value that was written at this revision.
    WrittenAt {
        /// The key.
        key: Vec<u8>,
        /// The revision.
        revision: u64,
    },
}

impl Compare {
    fn key(&self) -> &[u8] {
        match self {
            Compare::Absent { key } | Compare::WrittenAt { key, .. } => key,
        }
    }

    fn holds(&self, written_at: Option<u64>) -> bool {
        match self {
            Compare::Absent { .. } => written_at.is_none(),
            Compare::WrittenAt { revision, .. } => written_at == Some(*revision),
        }
    }
}

/// One write. Of two to the same key in one transaction, the later holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces.
    Put {
        /// The key.
        key: Vec<u8>,
        /// The value.
        value: Vec<u8>,
    },
    /// Removes, if it is there.
    Delete {
        /// The key.
        key: Vec<u8>,
    },
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Txn {
    /// It happened: its revision, above every earlier one.
    Committed {
        /// The revision.
        revision: u64,
    },
    /// Nothing happened: the first comparison that did not hold was of this key.
    Conflict {
        /// The key.
        key: Vec<u8>,
    },
}

/// Why the store could not do its work. After an error of [`Store::txn`] it is not known whether the
/// transaction happened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open the store {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the backend said.
        source: BackendError,
    },
    /// Another process has it open.
    #[error(
        "the store {} is open in another process: another broker is running; stop it, or choose another --state-dir",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A newer shaper wrote it.
    #[error(
        "the store {} has schema {found}, and this broker knows {known}: start the newer broker that wrote it, \
         or move the file away to begin without its tasks",
        path.display()
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// In the file.
        found: u64,
        /// The highest that this program knows.
        known: u64,
    },
    /// The file is a redb database, but holds not what a broker wrote.
    #[error("the store {} is damaged: {what}; restore it from a copy, or move it away", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Reading failed.
    #[error("cannot read from the store {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the backend said.
        source: BackendError,
    },
    /// Writing failed.
    #[error("cannot write to the store {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the backend said.
        source: BackendError,
    },
}

/// An error of the library behind a backend.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BackendError(Box<::redb::Error>);

impl<E: Into<::redb::Error>> From<E> for BackendError {
    fn from(error: E) -> BackendError {
        BackendError(Box::new(error.into()))
    }
}

/// Rows by key.
pub trait Store: Send + fmt::Debug {
    /// The row of one key.
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError>;

    /// The rows whose key begins with `prefix`, in the order of their keys.
    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError>;

    /// All of `ops` if all of `compares` hold, else nothing. Durable, as far as the backend is, when it
    /// returns.
    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError>;
}
