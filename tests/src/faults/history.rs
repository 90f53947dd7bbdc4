//! What was observed, in the order in which it was. The checker knows nothing else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What a task asks for, and what a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// CPU.
    pub(super) millicores: u64,
    /// Memory.
    pub(super) bytes: u64,
}

/// How an attempt ended, or a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// By itself.
    Code(i32),
    /// It was killed: by request, or because the node evicted it.
    Signal(i32),
    /// It never began.
    NotStarted,
    /// Its node was started anew; or nobody knows.
    Unknown,
}

/// Where a task is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On no node.
    Waits,
    /// Assigned to a node, or running there.
    On(String),
    /// Over.
    Ended(How),
    /// Over by request.
    Cancelled,
}

impl Place {
    /// Nothing more will happen to it.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Place::Ended(_) | Place::Cancelled)
    }
}

/// A task as a broker tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// The latest attempt.
    pub(super) attempt: u32,
    /// Where it is.
    pub(super) place: Place,
}

/// All tasks, as the last broker tells them in the end.
pub(super) type Finals = BTreeMap<String, Told>;

/// Something that was observed. A broker is named with the number of its process: `b1.3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// A client is about to submit a task for the first time.
    Asked {
        /// Which.
        task: String,
        /// What it asks for.
        demand: Amount,
    },
    /// A client is about to ask for a task's end.
    CancelAsked {
        /// Which.
        task: String,
    },
    /// A client was told that the task is taken.
    Acknowledged {
        /// Which.
        task: String,
        /// By which broker.
        by: String,
    },
    /// A client was told where a task is.
    Read {
        /// Which.
        task: String,
        /// By which broker.
        by: String,
        /// How many entries there were when it asked.
        since: usize,
        /// The answer; `None`: there is no such task.
        told: Option<Told>,
    },
    /// A broker says that it has taken over the store.
    Took {
        /// Which.
        by: String,
        /// Its epoch.
        epoch: u64,
    },
    /// A broker says that it serves.
    Serves {
        /// Which.
        by: String,
    },
    /// The process of a broker has ended.
    Gone {
        /// Which.
        by: String,
    },
    /// An agent obeys an epoch from here on.
    Obeyed {
        /// Of which node.
        node: String,
        /// Which.
        epoch: u64,
    },
    /// An agent carries out a directive.
    Accepted {
        /// Of which node.
        node: String,
        /// Of which task.
        task: String,
        /// Of which attempt.
        attempt: u32,
        /// Of which broker's reign.
        epoch: u64,
    },
    /// An attempt lives from here on.
    Began {
        /// On which node.
        node: String,
        /// Of which task.
        task: String,
        /// Which.
        attempt: u32,
    },
    /// An attempt lives no more.
    Over {
        /// Of which task.
        task: String,
        /// Which.
        attempt: u32,
        /// How it ended.
        how: How,
    },
    /// Something was broken.
    Struck {
        /// What.
        target: Target,
        /// How.
        fault: String,
        /// It is, or was a moment ago, what leads.
        leads: bool,
    },
    /// It is whole again.
    Mended {
        /// What.
        target: Target,
    },
}

/// What can be broken, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// A broker.
    Broker(usize),
    /// A member of etcd.
    Etcd(usize),
    /// An agent.
    Agent(usize),
}

/// An observation and its time, since the beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// When.
    pub(super) at: Duration,
    /// What.
    pub(super) seen: Seen,
}

/// Where everybody writes what he observes.
#[derive(Clone)]
pub(super) struct History {
    begun: Instant,
    entries: Arc<Mutex<Vec<Entry>>>,
    /// Whenever one is added.
    added: Arc<Condvar>,
}

impl History {
    pub(super) fn begin() -> History {
        History { begun: Instant::now(), entries: Arc::default(), added: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, seen: Seen) {
        let mut entries = self.lock();
        // Under the lock, so that the times are in order.
        let at = self.begun.elapsed();
        entries.push(Entry { at, seen });
        drop(entries);
        self.added.notify_all();
    }

    /// Since its beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// How much was observed so far.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// What each task asks for.
    pub(super) fn demands(&self) -> BTreeMap<String, Amount> {
        let asked = |Entry { seen, .. }: &Entry| match seen {
            Seen::Asked { task, demand } => Some((task.clone(), *demand)),
            _ => None,
        };
        self.lock().iter().filter_map(asked).collect()
    }

    /// Waits until somebody was told that a task is over; false if nobody was in so long.
    pub(super) fn wait_for_end(&self, patience: Duration) -> bool {
        let is_over = |told: &Told| told.place.is_over();
        let is_end = |entry: &Entry| matches!(&entry.seen, Seen::Read { told, .. } if told.as_ref().is_some_and(is_over));
        let waited =
            self.added.wait_timeout_while(self.lock(), patience, |entries| !entries.iter().any(is_end));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.lock().clone()
    }
}
