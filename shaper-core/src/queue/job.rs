//! What is submitted: jobs of tasks.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    place::{Placement, Request},
    spec::Demand,
    task::UnixNanos,
};

/// A job, numbered in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub u32);

/// One task of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskKey {
    /// The job.
    pub job: JobId,
    /// Its place in the job, from 0.
    pub index: u32,
}

impl TaskKey {
    /// As placement numbers it.
    pub(super) fn number(self) -> u64 {
        u64::from(self.job.0) << 32 | u64::from(self.index)
    }

    pub(super) fn of(number: u64) -> TaskKey {
        TaskKey { job: JobId((number >> 32) as u32), index: number as u32 }
    }
}

impl fmt::Display for TaskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.job.0, self.index)
    }
}

/// How many tasks a job has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tasks {
    /// One.
    One,
    /// So many that run together or not at all: where one ends otherwise than well, all begin again.
    Gang(u32),
    /// So many that know nothing of each other.
    Array {
        /// How many.
        count: u32,
        /// How many of them run or wait for a node at once, at most.
        at_once: Option<u32>,
    },
}

impl Tasks {
    /// How many.
    pub fn count(self) -> u32 {
        match self {
            Tasks::One => 1,
            Tasks::Gang(count) | Tasks::Array { count, .. } => count,
        }
    }

    /// How many start together.
    pub(super) fn together(self) -> u32 {
        if let Tasks::Gang(count) = self { count } else { 1 }
    }
}

/// How the tasks of a job are kept apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Spread {
    /// Nodes with the same value of this label are one place, and those without it are none; `None`: each node is one.
    pub label: Option<String>,
    /// So many at one place, at most.
    pub most: u32,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// Whose quota and share it counts against.
    pub namespace: String,
    /// What each of its tasks asks for.
    pub request: Request,
    /// Its tasks.
    pub tasks: Tasks,
    /// How they are kept apart.
    pub spread: Option<Spread>,
    /// What each may be shrunk to while it runs; `None`: its request is its floor.
    pub floor: Option<Demand>,
    /// Whether lower ones may be ended for it.
    pub preempts: bool,
    /// Whether its CPU comes from what others have reserved and do not use. Of low priority alone.
    pub oversubscribes: bool,
    /// How long each will run, as far as is known, ns.
    pub runs_for: Option<u64>,
    /// How long each may run, ns.
    pub timeout: Option<u64>,
    /// How often a task is placed again after it has failed or its node was lost.
    pub retries: u32,
    /// Jobs that must have succeeded before it begins.
    pub after_ok: Vec<JobId>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should.
    Succeeded,
    /// It failed, or could not be started.
    Failed,
    /// Its node is lost for good.
    Lost,
    /// It was ended, as was decided.
    Stopped,
}

/// What has become of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All its tasks succeeded.
    Succeeded,
    /// One did not.
    Failed,
    /// It ran too long.
    TimedOut,
    /// Somebody cancelled it.
    Cancelled,
    /// It never began, because a job that it waited for did not succeed.
    Skipped,
}

/// Where a task is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// Not in the queue: for jobs before it, or for others of its array.
    Held,
    /// In the queue.
    Waiting {
        /// Not before.
        not_before: UnixNanos,
    },
    /// It has a place, once others are out of the way.
    Nominated(Placement),
    /// It runs.
    Running {
        at: Placement,
        since: UnixNanos,
        /// What it holds: the request, or the floor.
        holds: Request,
        /// Why it is to end, once that is decided.
        stopping: Option<Stop>,
    },
    /// It will not run again.
    Over(Verdict),
}

/// Why a task is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// To make room for this one.
    Preempted(TaskKey),
    /// Its node is drained.
    Drained,
    /// What others did not use, they use now.
    Reclaimed,
    /// Another of its gang has ended.
    GangBroken,
    /// It ran too long.
    TimedOut,
    /// Somebody cancelled its job.
    Cancelled,
}

/// One task.
#[derive(Clone, Debug, Hash)]
pub(super) struct Task {
    pub(super) stage: Stage,
    /// Of the one that runs, or ran last; from 1.
    pub(super) attempt: u32,
    /// How often it has failed.
    pub(super) failures: u32,
}

/// A job, and what has become of it.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) spec: JobSpec,
    pub(super) namespace: u32,
    pub(super) submitted: UnixNanos,
    pub(super) tasks: Vec<Task>,
    /// Jobs that it still waits for.
    pub(super) waits_for: u32,
    /// Those that wait for it.
    pub(super) dependents: BTreeSet<JobId>,
    /// The next of an array that is not in the queue yet.
    pub(super) next: u32,
    /// Tasks that are not over.
    pub(super) left: u32,
    pub(super) verdict: Option<Verdict>,
    /// Whether more nodes were asked for.
    pub(super) asked_for_nodes: bool,
}
