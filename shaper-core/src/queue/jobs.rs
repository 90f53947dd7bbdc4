//! The jobs that are known: all that are not over, and the latest of those that are.
//!
//! A job is *done* once it is over and none of its tasks runs. Nothing in the queue refers to such a one any more: those
//! that waited for it have been told. It is kept for those who ask for it, and for jobs that name it as one to wait for,
//! until it and those that were done after it have more tasks than [`Config::remembers`](super::Config::remembers); the
//! last is always kept. So what is known is bounded by what is not over and by that number.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{Hash, Hasher},
    ops::{Index, IndexMut},
};

use super::job::{Job, JobId};

/// What is known of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Its job.
    Here,
    /// It had one, which was done long ago.
    Forgotten,
    /// No job has it yet.
    Never,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Jobs {
    known: BTreeMap<JobId, Job>,
    /// The number of the next.
    next: u32,
    /// Those that are done, the first to be so first, each with how many tasks it has.
    done: VecDeque<(JobId, u32)>,
    /// Tasks of those.
    tasks_done: u64,
}

impl Jobs {
    /// The number that the next will have; `None`: there is none left.
    pub(super) fn next(&self) -> Option<JobId> {
        (self.next < u32::MAX).then_some(JobId(self.next))
    }

    /// How many have got a number.
    pub(super) fn submitted(&self) -> u32 {
        self.next
    }

    /// Adds one with the next number.
    pub(super) fn add(&mut self, job: Job) {
        self.known.insert(JobId(self.next), job);
        self.next = self.next.saturating_add(1);
    }

    pub(super) fn what_of(&self, id: JobId) -> Known {
        if self.known.contains_key(&id) {
            Known::Here
        } else if id.0 < self.next {
            Known::Forgotten
        } else {
            Known::Never
        }
    }

    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.known.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.known.get_mut(&id)
    }

    /// How many are known, over or not.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// A job is done: nobody has to tell it anything any more.
    pub(super) fn is_done(&mut self, id: JobId) {
        let Some(job) = self.known.get_mut(&id) else { return };
        let (count, before) = (job.spec.tasks.count(), job.spec.after_ok.clone());
        for before in before {
            if let Some(job) = self.known.get_mut(&before) {
                job.dependents.remove(&id);
            }
        }
        self.done.push_back((id, count));
        self.tasks_done += u64::from(count);
    }

    /// Forgets those that were done first, until the others have no more tasks than this.
    pub(super) fn forget(&mut self, remembers: u32) {
        while self.tasks_done > remembers.into()
            && self.done.len() > 1
            && let Some((id, count)) = self.done.pop_front()
        {
            self.tasks_done -= u64::from(count);
            self.known.remove(&id);
        }
    }
}

impl Index<JobId> for Jobs {
    type Output = Job;

    /// One that is not over.
    fn index(&self, id: JobId) -> &Job {
        &self.known[&id]
    }
}

impl IndexMut<JobId> for Jobs {
    #[expect(clippy::expect_used, reason = "as of any index")]
    fn index_mut(&mut self, id: JobId) -> &mut Job {
        self.known.get_mut(&id).expect("a job that is known")
    }
}

impl Hash for Jobs {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for (id, job) in &self.known {
            (id, job.submitted, &job.tasks, job.waits_for, job.left, job.verdict).hash(state);
        }
        (self.next, &self.done).hash(state);
    }
}
