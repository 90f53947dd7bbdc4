//! Why a task waits, as data.

use serde::{Deserialize, Serialize};

use super::{
    Queue,
    books::{Claim, Yields},
    fair::OverQuota,
    job::{JobId, Stage, Stop, TaskKey, Verdict},
    jobs::Known,
};
use crate::{
    place::{Considered, Explanation, Placement, Victim},
    spec::Priority,
    task::UnixNanos,
};

/// Why one in the queue found no place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// Its namespace has used up its quota.
    Quota(OverQuota),
    /// No node has room, nor would have by other means.
    NoRoom,
    /// Where it would fit, it would delay one that was promised a place at a time.
    Behind {
        /// Who is first.
        first: TaskKey,
        /// Until when it is promised to start.
        until: UnixNanos,
    },
}

/// Where a task is, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Jobs before it have not succeeded yet.
    After(Vec<JobId>),
    /// Others of its array run, as many as may at once.
    AtOnce,
    /// It failed, and is not tried again before this time.
    Backoff(UnixNanos),
    /// It waits.
    Waits {
        /// How many are before it.
        behind: usize,
        /// The share of its namespace, in millionths of all there is by its weight.
        share_millionths: u64,
        /// What it found when it was looked at last; `None`: it was not, for too many are before it.
        blocked: Option<Blocked>,
        /// When it is promised to start, if it is the first that found no place.
        promised: Option<UnixNanos>,
        /// Who could be shrunk to make room for it.
        shrinkable: Considered<TaskKey>,
        /// Who could be ended for it; `None`: it has nobody ended.
        victims: Option<Considered<TaskKey>>,
        /// How each node is for it.
        nodes: Box<Explanation>,
    },
    /// It starts there once these have made room.
    Nominated {
        /// Where.
        at: Placement,
        /// Who.
        awaits: Vec<TaskKey>,
    },
    /// It runs.
    Runs {
        /// Where.
        at: Placement,
        /// Why it is to end, once that is decided.
        stopping: Option<Stop>,
    },
    /// It is over.
    Over(Verdict),
    /// Its job was over long ago ([`Config::remembers`](super::Config::remembers)).
    Forgotten,
}

impl Queue {
    /// Where a task is, and why. `None`: there is no such task. Of one that waits it looks at every node.
    pub fn why(&mut self, task: TaskKey) -> Option<Why> {
        if self.jobs.what_of(task.job) == Known::Forgotten {
            return Some(Why::Forgotten);
        }
        let job = self.jobs.get(task.job)?;
        let stage = job.tasks.get(task.index as usize)?.stage.clone();
        let leader = self.leader(task);
        Some(match stage {
            Stage::Held if job.waits_for > 0 => {
                let is_open = |it: &&JobId| self.jobs.get(**it).is_some_and(|job| job.verdict.is_none());
                Why::After(job.spec.after_ok.iter().filter(is_open).copied().collect())
            }
            Stage::Held => Why::AtOnce,
            Stage::Waiting { not_before } if not_before > self.now => Why::Backoff(not_before),
            Stage::Waiting { .. } => {
                let claim = Claim::of(&job.spec, &job.spec.request);
                let share = self.namespaces[job.namespace as usize].share(&self.books.total);
                let promised = self.promised.as_ref().filter(|(to, _)| *to == leader);
                let [shrinkable, victims] = [Yields::ByShrinking, Yields::ByEnding]
                    .map(|yields| self.named(self.books.considered(yields, &claim)));
                let may_preempt = job.spec.preempts && job.spec.request.priority > Priority::Low;
                Why::Waits {
                    shrinkable,
                    victims: may_preempt.then_some(victims),
                    behind: self.before(leader),
                    share_millionths: ((u128::from(share) * 1_000_000) >> 32) as u64,
                    blocked: self.blocked.get(&leader).cloned(),
                    promised: promised.map(|(_, reservation)| reservation.at()),
                    nodes: Box::new(self.books.cluster.explain(&claim.request, &self.config.scoring)),
                }
            }
            Stage::Nominated(at) => {
                let nomination = self.nominations.get(&leader);
                let awaits = nomination.into_iter().flat_map(|it| it.ends.union(&it.shrinks));
                Why::Nominated { at, awaits: awaits.map(|it| TaskKey::of(*it)).collect() }
            }
            Stage::Running { at, stopping, .. } => Why::Runs { at, stopping },
            Stage::Over(verdict) => Why::Over(verdict),
        })
    }

    /// The same by the names of this queue. The books have everybody who could be shrunk below all.
    fn named(&self, considered: Considered<u64>) -> Considered<TaskKey> {
        let Considered { victims, nodes, suffice, named } = considered;
        let name = |it: Victim<u64>| {
            let task = TaskKey::of(it.task);
            let Victim { task: _, node, priority: _, since, frees, frees_gpu, suffices } = it;
            let priority = self.job(task.job).spec.request.priority;
            Victim { task, node, priority, since, frees, frees_gpu, suffices }
        };
        Considered { victims, nodes, suffice, named: named.into_iter().map(name).collect() }
    }

    /// How many are before one, as things are.
    fn before(&self, key: TaskKey) -> usize {
        let mut pass = self.pass();
        std::iter::from_fn(|| self.next_in_order(&mut pass)).take_while(|next| *next != key).count()
    }
}
