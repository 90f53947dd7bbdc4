//! Who goes next, and what is done so that it can: a state machine, pure and deterministic.
//!
//! [`Queue::handle`] takes one [`Input`] and says what is decided. The same inputs give the same decisions and the same
//! [`Queue::digest`], whoever replays them, and when.
//!
//! # The order
//!
//! By priority; within one by the namespace that has had the least ([`fair`]); within that by age. Whoever waits for
//! [`Config::ages_after`] counts as one priority higher, so that nobody starves. A namespace that has used up its quota is
//! passed over.
//!
//! # The means
//!
//! Of each task, or gang, these are tried, in this order: it *fits*; it fits once others are *shrunk* to their floors; it fits
//! once lower ones are *ended*; *more nodes* are asked for, once. What it takes is booked at once, and it starts when the
//! others have made room: a nomination. A gang is planned as a whole, and where one of its tasks finds no place, all give back
//! what they took: none holds a part and waits for the rest, so no two wait for each other.
//!
//! The first that finds no place is promised one ([`Reservation`]), and of those behind it starts only who does
//! not delay it.

mod books;
mod explain;
pub mod fair;
mod job;
mod jobs;
mod life;
mod reclaim;
mod refusal;
mod search;
#[cfg(test)]
mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
};

use serde::{Deserialize, Serialize};

use self::{
    books::{Books, Claim},
    fair::Namespace,
    job::{Job, Stage, Task},
    jobs::{Jobs, Known},
    search::Line,
};
pub use self::{
    explain::{Blocked, Why},
    fair::{Amounts, OverQuota, Quota},
    job::{JobId, JobSpec, Outcome, Spread, Stop, TaskKey, Tasks, Verdict},
    refusal::{MAX_TASKS, Refusal},
};
use crate::{
    place::{
        Cluster, Constraint, ConstraintId, NodeId, NodeSpec, Placement, Readiness, Reservation, Scorer,
        Scoring,
    },
    spec::Priority,
    task::UnixNanos,
};

const SECOND: u64 = 1_000_000_000;
/// A task that has failed is not placed again for 1 s, 2 s, 4 s … and not for longer than this.
const MAX_BACKOFF: u64 = 60 * SECOND;

/// Who is before whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Who came first.
    Arrival,
    /// By priority, then who came first.
    Priority,
    /// By priority, then whose namespace has had the least, then who came first.
    Fair,
}

/// How it is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which node is best.
    pub scoring: Scoring,
    /// Who is before whom.
    pub order: Order,
    /// Whether those behind the first that finds no place may start.
    pub backfills: bool,
    /// So many of those behind it are looked at.
    pub depth: usize,
    /// Who waits for so long counts as one priority higher, ns.
    pub ages_after: u64,
    /// A predicted peak is believed for so long, ns.
    pub fresh_for: u64,
    /// Jobs that have ended are remembered while they have no more tasks than this together, and the latest always. One that is
    /// to begin after a forgotten one is refused ([`Refusal::Forgotten`]).
    pub remembers: u32,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            scoring: Scoring::of(Scorer::Seed),
            order: Order::Fair,
            backfills: true,
            depth: 64,
            ages_after: 30 * 60 * SECOND,
            fresh_for: 30 * SECOND,
            remembers: 100_000,
        }
    }
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Input {
    /// A node comes.
    Node(NodeSpec),
    /// A node takes tasks from now on, or does not.
    Readiness(NodeId, Readiness),
    /// A namespace may use so much.
    Quota(String, Quota),
    /// A job is submitted.
    Submit(JobSpec),
    /// A job is to end.
    Cancel(JobId),
    /// An attempt has ended.
    Ended {
        /// The task.
        task: TaskKey,
        /// Which attempt: another than the one that runs is not looked at.
        attempt: u32,
        /// How.
        outcome: Outcome,
    },
    /// A task was shrunk to its floor, or could not be.
    Shrunk {
        /// The task.
        task: TaskKey,
        /// Whether it has given back what is above its floor.
        done: bool,
    },
    /// What those who reserve CPU on a node will use of it at most, millicores.
    Peak(NodeId, u64),
    /// Time has passed.
    Tick,
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// A node has this number.
    Node(NodeId),
    /// A job has this number.
    Accepted(JobId),
    /// It is not taken, and why.
    Refused(Refusal),
    /// A task starts.
    Start {
        /// The task.
        task: TaskKey,
        /// Which attempt, from 1.
        attempt: u32,
        /// Where.
        at: Placement,
    },
    /// A task is to be shrunk to its floor.
    Shrink {
        /// The task.
        task: TaskKey,
        /// For whom.
        makes_room_for: TaskKey,
    },
    /// A task is to end.
    Stop {
        /// The task.
        task: TaskKey,
        /// Which attempt.
        attempt: u32,
        /// Why.
        why: Stop,
    },
    /// A task has a place, and starts there once others have made room.
    Nominated {
        /// The task.
        task: TaskKey,
        /// Where.
        at: Placement,
    },
    /// Nothing helps: so many more of these would need nodes.
    ScaleOut {
        /// The job.
        job: JobId,
        /// Of its tasks, how many have no place.
        tasks: u32,
    },
    /// A job is over.
    Over(JobId, Verdict),
}

/// A task or a gang that starts once others have made room.
#[derive(Clone, Debug)]
struct Nomination {
    /// Of each of its tasks.
    places: Vec<Placement>,
    /// Whose end is still to come.
    ends: BTreeSet<u64>,
    /// Who is still to be shrunk; his end would do as well.
    shrinks: BTreeSet<u64>,
}

/// All that waits and runs.
#[derive(Clone, Debug)]
pub struct Queue {
    config: Config,
    now: UnixNanos,
    books: Books,
    namespaces: Vec<Namespace>,
    by_name: HashMap<String, u32>,
    jobs: Jobs,
    /// Those that could start, by priority and namespace, the oldest first. A gang is here by its first task.
    waiting: BTreeMap<Line, BTreeSet<(UnixNanos, TaskKey)>>,
    /// Those that may not start yet.
    sleeping: BTreeSet<(UnixNanos, TaskKey)>,
    timeouts: BTreeSet<(UnixNanos, TaskKey)>,
    nominations: BTreeMap<TaskKey, Nomination>,
    /// Those that found no place since anything was given back.
    blocked: BTreeMap<TaskKey, Blocked>,
    promised: Option<(TaskKey, Reservation)>,
    decisions: u64,
    digest: u64,
    out: Vec<Decision>,
}

impl Queue {
    /// An empty one.
    pub fn new(config: Config) -> Queue {
        Queue {
            books: Books::new(config.fresh_for),
            config,
            now: 0,
            namespaces: Vec::new(),
            by_name: HashMap::new(),
            jobs: Jobs::default(),
            waiting: BTreeMap::new(),
            sleeping: BTreeSet::new(),
            timeouts: BTreeSet::new(),
            nominations: BTreeMap::new(),
            blocked: BTreeMap::new(),
            promised: None,
            decisions: 0,
            digest: 0,
            out: Vec::new(),
        }
    }

    /// The nodes, and what of them is taken.
    pub fn cluster(&self) -> &Cluster {
        &self.books.cluster
    }

    /// The number of a constraint.
    pub fn constraint(&mut self, constraint: &Constraint) -> ConstraintId {
        self.books.cluster.constraint(constraint)
    }

    /// When something is to be decided that no input will cause: a [`Input::Tick`] is due then.
    pub fn next_wakeup(&self) -> Option<UnixNanos> {
        let first = |set: &BTreeSet<(UnixNanos, TaskKey)>| set.first().map(|(at, _)| *at);
        [first(&self.sleeping), first(&self.timeouts)].into_iter().flatten().min()
    }

    /// How many decisions there were, and a number that stands for all of them and for the state.
    pub fn digest(&self) -> (u64, u64) {
        let mut hasher = DefaultHasher::new();
        self.digest.hash(&mut hasher);
        self.namespaces.hash(&mut hasher);
        self.books.reclaimed().hash(&mut hasher);
        (&self.jobs, &self.waiting, &self.sleeping, &self.timeouts).hash(&mut hasher);
        for id in self.books.cluster.ids() {
            self.books.cluster.taken(id).map(|it| (it.cpu, it.memory, it.gpu)).hash(&mut hasher);
        }
        (self.decisions, hasher.finish())
    }

    /// Something happens at `now`, which does not go back. What is decided, in this order.
    pub fn handle(&mut self, input: Input, now: UnixNanos) -> Vec<Decision> {
        self.now = self.now.max(now);
        match input {
            Input::Node(spec) => self.add(spec),
            Input::Readiness(node, readiness) => self.set_readiness(node, readiness),
            Input::Quota(name, quota) => {
                let number = self.namespace(&name) as usize;
                self.namespaces[number].quota = quota;
                self.something_is_free();
            }
            Input::Submit(spec) => self.submit(spec),
            Input::Cancel(job) => match self.jobs.what_of(job) {
                Known::Here => self.end_job(job, Verdict::Cancelled),
                // It is over, as whoever cancels it wants it.
                Known::Forgotten => {}
                Known::Never => self.out.push(Decision::Refused(self.no_such_job(job))),
            },
            Input::Ended { task, attempt, outcome } => self.ended(task, attempt, outcome),
            Input::Shrunk { task, done } => self.shrunk(task, done),
            Input::Peak(node, peak) => {
                if self.books.predict(node, peak, self.now) {
                    self.something_is_free();
                }
            }
            Input::Tick => {}
        }
        self.wake();
        self.call_in_loans();
        self.schedule();
        self.jobs.forget(self.config.remembers);
        let out = std::mem::take(&mut self.out);
        for decision in &out {
            let mut hasher = DefaultHasher::new();
            (self.digest, self.now, decision).hash(&mut hasher);
            self.digest = hasher.finish();
        }
        self.decisions += out.len() as u64;
        out
    }

    fn add(&mut self, spec: NodeSpec) {
        match self.books.add(spec) {
            Ok(id) => {
                self.out.push(Decision::Node(id));
                self.something_is_free();
            }
            Err(error) => self.out.push(Decision::Refused(Refusal::Node(error))),
        }
    }

    /// What found no place may find one now.
    fn something_is_free(&mut self) {
        self.blocked.clear();
    }

    fn set_readiness(&mut self, node: NodeId, readiness: Readiness) {
        self.books.set_readiness(node, readiness);
        self.promised = None;
        self.something_is_free();
        if matches!(readiness, Readiness::Ready | Readiness::Cordoned | Readiness::UnderPressure) {
            return;
        }
        // Whoever was to come here goes elsewhere.
        let here = |nomination: &Nomination| nomination.places.iter().any(|at| at.node == node);
        let nominated: Vec<TaskKey> =
            self.nominations.iter().filter(|(_, it)| here(it)).map(|(key, _)| *key).collect();
        for key in nominated {
            self.withdraw_nomination(key);
            self.wait(key, self.now);
        }
        if readiness == Readiness::Draining {
            let all: Vec<TaskKey> = self.books.on(node).collect();
            for task in all {
                self.stop(task, Stop::Drained);
            }
        }
    }

    fn namespace(&mut self, name: &str) -> u32 {
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let number = self.namespaces.len() as u32;
        self.namespaces.push(Namespace { name: name.to_owned(), ..Namespace::default() });
        self.by_name.insert(name.to_owned(), number);
        number
    }

    fn no_such_job(&self, job: JobId) -> Refusal {
        Refusal::NoSuchJob { job, submitted: self.jobs.submitted() }
    }

    fn refusal(&self, spec: &JobSpec) -> Option<Refusal> {
        let (tasks, priority) = (spec.tasks.count(), spec.request.priority);
        if tasks == 0 {
            return Some(Refusal::NoTasks);
        }
        if tasks > MAX_TASKS {
            return Some(Refusal::TooManyTasks { asked: tasks, most: MAX_TASKS });
        }
        if matches!(spec.tasks, Tasks::Array { at_once: Some(0), .. }) {
            return Some(Refusal::NoneAtOnce { tasks });
        }
        if spec.oversubscribes && priority != Priority::Low {
            return Some(Refusal::NotLow { priority });
        }
        spec.after_ok.iter().find_map(|job| match self.jobs.what_of(*job) {
            Known::Here => None,
            Known::Forgotten => Some(Refusal::Forgotten { job: *job, remembers: self.config.remembers }),
            Known::Never => Some(self.no_such_job(*job)),
        })
    }

    fn submit(&mut self, spec: JobSpec) {
        if let Some(why) = self.refusal(&spec) {
            self.out.push(Decision::Refused(why));
            return;
        }
        let Some(id) = self.jobs.next() else {
            let submitted = self.jobs.submitted();
            self.out.push(Decision::Refused(Refusal::OutOfNumbers { submitted }));
            return;
        };
        self.out.push(Decision::Accepted(id));
        self.books.cluster.learn(&spec.request);
        let namespace = self.namespace(&spec.namespace);
        let (mut waits_for, mut is_hopeless) = (0, false);
        for before in &spec.after_ok {
            let Some(job) = self.jobs.get_mut(*before) else { continue };
            match job.verdict {
                Some(Verdict::Succeeded) => {}
                Some(_) => is_hopeless = true,
                None => waits_for += u32::from(job.dependents.insert(id)),
            }
        }
        let count = spec.tasks.count();
        self.jobs.add(Job {
            namespace,
            submitted: self.now,
            tasks: vec![Task { stage: Stage::Held, attempt: 0, failures: 0 }; count as usize],
            waits_for,
            dependents: BTreeSet::new(),
            next: 0,
            left: count,
            verdict: None,
            asked_for_nodes: false,
            spec,
        });
        if is_hopeless {
            self.end_job(id, Verdict::Skipped);
        } else if waits_for == 0 {
            self.release_job(id);
        }
    }

    /// Nothing before it any more: its tasks wait for nodes.
    fn release_job(&mut self, id: JobId) {
        let job = &self.jobs[id];
        let first = match job.spec.tasks {
            Tasks::One | Tasks::Gang(_) => 1,
            Tasks::Array { count, at_once } => at_once.map_or(count, |at_once| at_once.min(count)),
        };
        for index in 0..first {
            self.wait(TaskKey { job: id, index }, self.now);
        }
        self.jobs[id].next = first;
    }

    /// The tasks that start together with one, which is the first of them.
    fn members(&self, key: TaskKey) -> impl Iterator<Item = TaskKey> + use<> {
        let count = self.job(key.job).spec.tasks.together();
        (key.index..key.index + count).map(move |index| TaskKey { index, ..key })
    }

    /// The task by which it waits: of a gang, the first.
    fn leader(&self, task: TaskKey) -> TaskKey {
        let is_gang = matches!(self.job(task.job).spec.tasks, Tasks::Gang(_));
        if is_gang { TaskKey { index: 0, ..task } } else { task }
    }

    fn job(&self, id: JobId) -> &Job {
        &self.jobs[id]
    }

    fn task(&mut self, key: TaskKey) -> Option<&mut Task> {
        self.jobs.get_mut(key.job)?.tasks.get_mut(key.index as usize)
    }

    fn stage(&self, key: TaskKey) -> Option<&Stage> {
        Some(&self.jobs.get(key.job)?.tasks.get(key.index as usize)?.stage)
    }

    fn set_stage(&mut self, key: TaskKey, stage: Stage) {
        if let Some(task) = self.task(key) {
            task.stage = stage;
        }
    }

    fn place_in_queue(&self, key: TaskKey) -> (Line, (UnixNanos, TaskKey)) {
        let job = self.job(key.job);
        ((Reverse(job.spec.request.priority), job.namespace), (job.submitted, key))
    }

    /// A task, or with it its gang, waits for a node.
    fn wait(&mut self, key: TaskKey, not_before: UnixNanos) {
        for member in self.members(key) {
            self.set_stage(member, Stage::Waiting { not_before });
        }
        if not_before > self.now {
            self.sleeping.insert((not_before, key));
        } else {
            let (queue, place) = self.place_in_queue(key);
            self.waiting.entry(queue).or_default().insert(place);
        }
    }

    fn leave_queue(&mut self, key: TaskKey) {
        let (queue, place) = self.place_in_queue(key);
        if let Some(waiting) = self.waiting.get_mut(&queue) {
            waiting.remove(&place);
            if waiting.is_empty() {
                self.waiting.remove(&queue);
            }
        }
        if let Some(Stage::Waiting { not_before }) = self.stage(key) {
            let not_before = *not_before;
            self.sleeping.remove(&(not_before, key));
        }
        self.blocked.remove(&key);
        if self.promised.as_ref().is_some_and(|(promised, _)| *promised == key) {
            self.promised = None;
        }
    }

    /// Whoever slept long enough waits, and whoever ran too long is to end.
    fn wake(&mut self) {
        while let Some((at, key)) = self.sleeping.first().copied()
            && at <= self.now
        {
            self.sleeping.pop_first();
            let (queue, place) = self.place_in_queue(key);
            self.waiting.entry(queue).or_default().insert(place);
        }
        while let Some((at, key)) = self.timeouts.first().copied()
            && at <= self.now
        {
            self.timeouts.pop_first();
            self.stop(key, Stop::TimedOut);
        }
    }

    /// Where more is lent than there is, the youngest end.
    fn call_in_loans(&mut self) {
        for (node, mut excess) in self.books.overdrawn(self.now) {
            let mut borrowers: Vec<(Reverse<UnixNanos>, Reverse<TaskKey>, u64)> = Vec::new();
            for task in self.books.on(node) {
                let lent = match self.stage(task) {
                    Some(Stage::Running { holds, .. }) => Claim::of(&self.job(task.job).spec, holds).lent,
                    _ => 0,
                };
                let Some(Stage::Running { since, stopping, .. }) = self.stage(task) else { continue };
                match stopping {
                    // It is on its way already.
                    Some(_) => excess = excess.saturating_sub(lent),
                    None if lent > 0 => borrowers.push((Reverse(*since), Reverse(task), lent)),
                    None => {}
                }
            }
            borrowers.sort_unstable();
            for (_, Reverse(task), lent) in borrowers {
                if excess == 0 {
                    break;
                }
                excess = excess.saturating_sub(lent);
                self.stop(task, Stop::Reclaimed);
            }
        }
    }
}
