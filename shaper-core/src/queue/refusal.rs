//! Why something is not taken, as data.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::job::JobId;
use crate::{place::NodeError, spec::Priority};

/// Tasks that one job may have.
pub const MAX_TASKS: u32 = 1 << 20;

/// Why an input is refused. It reads as a sentence that says what would be taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// A node cannot be one.
    Node(NodeError),
    /// A job without tasks.
    NoTasks,
    /// A job of more tasks than one may have.
    TooManyTasks {
        /// So many.
        asked: u32,
        /// The most.
        most: u32,
    },
    /// An array of which none may run never ends.
    NoneAtOnce {
        /// Its tasks.
        tasks: u32,
    },
    /// What others do not use is for tasks of low priority.
    NotLow {
        /// Its priority.
        priority: Priority,
    },
    /// It names a job that was never submitted.
    NoSuchJob {
        /// That job.
        job: JobId,
        /// How many were submitted: the numbers below this are those of jobs.
        submitted: u32,
    },
    /// It is to begin after a job that ended so long ago that it is not known how.
    Forgotten {
        /// That job.
        job: JobId,
        /// Of how many tasks of jobs that have ended it is known how.
        remembers: u32,
    },
    /// Every number of a job has been given away.
    OutOfNumbers {
        /// So many.
        submitted: u32,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Node(error) => error.fmt(f),
            Refusal::NoTasks => f.write_str("a job has at least one task; submit it with one or more"),
            Refusal::TooManyTasks { asked, most } => {
                write!(f, "a job has at most {most} tasks, not {asked}; submit several")
            }
            Refusal::NoneAtOnce { tasks } => write!(
                f,
                "an array of {tasks} tasks of which none may run at once never ends; let at least one run"
            ),
            Refusal::NotLow { priority } => write!(
                f,
                "only tasks of low priority run on what others do not use, not {priority} ones; lower the priority, or \
                 reserve what it needs"
            ),
            Refusal::NoSuchJob { job, submitted: 0 } => {
                write!(f, "there is no job {}; none has been submitted", job.0)
            }
            Refusal::NoSuchJob { job, submitted } => {
                write!(f, "there is no job {}; the latest is {}", job.0, submitted - 1)
            }
            Refusal::Forgotten { job, remembers } => write!(
                f,
                "job {} ended so long ago that it is not known how (jobs that have ended are remembered while they have \
                 {remembers} tasks together); if it succeeded, submit without waiting for it",
                job.0
            ),
            Refusal::OutOfNumbers { submitted } => {
                write!(f, "{submitted} jobs were submitted, and there is no number left; begin a new queue")
            }
        }
    }
}
