//! Where rows are kept. The trait is shaped like etcd: keys and values are bytes, each row knows the
//! revision of its last change, and a transaction is a list of comparisons and a list of writes that
//! happen together or not at all.
//!
//! Three backends pass one conformance suite (`conformance.rs`): [`memory::Memory`], which forgets, [`redb::Redb`], which
//! has everything on disk before [`Store::txn`] returns, and [`etcd::Etcd`], where most members of a cluster have it.

use std::{fmt, io, path::PathBuf};

pub mod etcd;
pub mod memory;
pub mod redb;

#[cfg(test)]
mod conformance;

/// What this program writes. It grows with every change that an older program would misread: a field
/// more in a row is one.
pub const SCHEMA: u64 = 2;

/// A value, and when it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// The value.
    pub value: Vec<u8>,
    /// The revision at which it was written: that of the transaction, or a lower one where a backend had to write a large
    /// transaction in parts. Each is above those of earlier transactions.
    pub revision: u64,
}

/// All that is in a store, as it was at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The file, or the prefix.
    pub place: String,
    /// What the rows mean.
    pub schema: u64,
    /// Keys and values, in the order of the keys.
    pub rows: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the broker is found that leads, if there is one: with etcd.
    pub leader: Option<String>,
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

impl Op {
    /// The key, and the value unless it is removed.
    fn write(&self) -> (&[u8], Option<&[u8]>) {
        match self {
            Op::Put { key, value } => (key, Some(value)),
            Op::Delete { key } => (key, None),
        }
    }
}

/// What a backend does in one go. It takes more, but slowly; a single row must not have more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Keys that are written.
    pub writes: usize,
    /// Bytes of their keys and values.
    pub bytes: usize,
}

impl Limits {
    /// Of a backend on this machine.
    pub const NONE: Limits = Limits { writes: usize::MAX, bytes: usize::MAX };
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
        "the store {place} has schema {found}, and this broker knows {known}: start the newer broker that wrote it, \
         or begin without its tasks, with another --state-dir or --etcd-prefix"
    )]
    NewerSchema {
        /// The file, or the prefix.
        place: String,
        /// In the file.
        found: u64,
        /// The highest that this program knows.
        known: u64,
    },
    /// It holds not what a broker wrote.
    #[error("the store {place} is damaged: {what}; restore it from a backup, or move it away")]
    Damaged {
        /// The file, or the prefix.
        place: String,
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
    /// No member of etcd answered in time.
    #[error(
        "no answer from etcd at {endpoints}: most of its members must run and reach each other, and one of them be reached \
         from here; look at `etcdctl endpoint status`, and at --etcd-endpoints and the --etcd-… files"
    )]
    Unreachable {
        /// All of them.
        endpoints: String,
        /// What was last in the way.
        source: etcd::EtcdError,
    },
    /// A member of etcd answered that it will not do it.
    #[error("etcd at {endpoint} refuses")]
    Etcd {
        /// Which.
        endpoint: String,
        /// What it said.
        source: etcd::EtcdError,
    },
    /// Somebody else opened the store.
    #[error("another broker has opened the store {place}; this one writes there no more")]
    TakenOver {
        /// The prefix.
        place: String,
    },
    /// The lease is over.
    #[error("this broker leads no more: its lease in {place} was not renewed in time")]
    NotLeader {
        /// The prefix.
        place: String,
    },
    /// More than the backend has room for.
    #[error("{what} are more than the store takes ({limit})")]
    TooLarge {
        /// What.
        what: String,
        /// How many, or how many bytes.
        limit: usize,
    },
    /// What a backend needs of this machine.
    #[error("cannot prepare the store's threads")]
    Threads {
        /// Why.
        source: io::Error,
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

/// What is done with each row: with its key, its revision and its value.
pub type Visit<'a> = dyn FnMut(&[u8], u64, &[u8]) + 'a;

/// Rows by key.
pub trait Store: Send + fmt::Debug {
    /// The row of one key.
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError>;

    /// The rows whose key begins with `prefix`, in the order of their keys.
    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError>;

    /// Each row, the last key first, with its revision and its value; where the backend need not, it does not hold all of them
    /// at a time.
    fn scan_back(&self, row: &mut Visit<'_>) -> Result<(), StoreError> {
        for (key, Versioned { value, revision }) in self.range(b"")?.into_iter().rev() {
            row(&key, revision, &value);
        }
        Ok(())
    }

    /// All of `ops` if all of `compares` hold, else nothing. Durable, as far as the backend is, when it
    /// returns.
    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError>;

    /// Fails if somebody else owns the store by now.
    fn confirm(&mut self) -> Result<(), StoreError> {
        // What is on this machine has one opener.
        Ok(())
    }

    /// What goes into one transaction at its usual price.
    fn limits(&self) -> Limits {
        Limits::NONE
    }
}
