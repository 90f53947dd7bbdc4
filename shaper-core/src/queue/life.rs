//! What becomes of tasks and jobs that run: they end, begin again, shrink, and make room for others.

use std::collections::{BTreeSet, VecDeque};

use super::{
    Decision, MAX_BACKOFF, Nomination, Queue, SECOND,
    books::{Claim, Yields},
    job::{JobId, JobSpec, Outcome, Stage, Stop, TaskKey, Tasks, Verdict},
};
use crate::{
    place::{Placement, Request},
    spec::Demand,
    task::UnixNanos,
};

impl Queue {
    /// Decides that a task ends. It holds what it has until it has.
    pub(super) fn stop(&mut self, key: TaskKey, why: Stop) {
        let Some(task) = self.task(key) else { return };
        let attempt = task.attempt;
        let Stage::Running { stopping, .. } = &mut task.stage else { return };
        if stopping.is_some() {
            return;
        }
        *stopping = Some(why);
        self.books.spare(Yields::ByEnding, key.number());
        self.out.push(Decision::Stop { task: key, attempt, why });
    }

    pub(super) fn ended(&mut self, key: TaskKey, attempt: u32, outcome: Outcome) {
        let now = self.now;
        let Some(task) = self.task(key) else { return };
        let Stage::Running { at, since, holds, stopping } = task.stage.clone() else { return };
        if task.attempt != attempt {
            return;
        }
        let job = &self.jobs[key.job];
        let claim = Claim::of(&job.spec, &holds);
        if let Some(timeout) = job.spec.timeout {
            self.timeouts.remove(&(since.saturating_add(timeout), key));
        }
        let (retries, namespace, verdict) = (job.spec.retries, job.namespace as usize, job.verdict);
        self.namespaces[namespace].give_back(&claim.request);
        self.books.stop(key, at);
        self.books.give_back(&claim, at);
        self.something_is_free();
        self.made_room(key, true);
        let failures = self.jobs[key.job].tasks[key.index as usize].failures;
        let over = match (verdict, stopping, outcome) {
            (Some(verdict), ..) => Some(verdict),
            (None, _, Outcome::Succeeded) => Some(Verdict::Succeeded),
            (None, Some(Stop::TimedOut), _) => Some(Verdict::TimedOut),
            (None, Some(_), _) | (None, None, Outcome::Stopped) => None,
            (None, None, Outcome::Failed | Outcome::Lost) => (failures >= retries).then_some(Verdict::Failed),
        };
        let is_failure = over.is_none() && stopping.is_none() && outcome != Outcome::Stopped;
        if is_failure && let Some(task) = self.task(key) {
            task.failures += 1;
        }
        let backoff = if is_failure { SECOND.checked_shl(failures.min(6)).unwrap_or(MAX_BACKOFF) } else { 0 };
        let not_before = now.saturating_add(backoff.min(MAX_BACKOFF));
        match over {
            Some(verdict) => self.task_over(key, verdict),
            None => {
                self.set_stage(key, Stage::Waiting { not_before });
                self.again(key, not_before);
            }
        }
    }

    /// A task is to run again. Of a gang all are, once none runs any more.
    fn again(&mut self, key: TaskKey, not_before: UnixNanos) {
        let leader = self.leader(key);
        let members: Vec<TaskKey> = self.members(leader).collect();
        let mut runs = false;
        for member in &members {
            if matches!(self.stage(*member), Some(Stage::Running { .. })) {
                runs = true;
                self.stop(*member, Stop::GangBroken);
            }
        }
        if !runs {
            let latest = members.iter().filter_map(|member| match self.stage(*member) {
                Some(Stage::Waiting { not_before }) => Some(*not_before),
                _ => None,
            });
            let not_before = latest.max().unwrap_or(0).max(not_before);
            // Those that had succeeded run again with the others.
            let again = members.iter().filter(|it| matches!(self.stage(**it), Some(Stage::Over(_)))).count();
            self.jobs[key.job].left += again as u32;
            self.wait(leader, not_before);
        }
    }

    fn task_over(&mut self, key: TaskKey, verdict: Verdict) {
        self.set_stage(key, Stage::Over(verdict));
        let job = &mut self.jobs[key.job];
        job.left -= 1;
        if job.verdict.is_none() && verdict != Verdict::Succeeded {
            // The others of a gang are of no use; those of an array go on.
            if matches!(job.spec.tasks, Tasks::Gang(_)) {
                self.end_job(key.job, verdict);
                return;
            }
        }
        if let Tasks::Array { count, .. } = job.spec.tasks
            && job.next < count
            && job.verdict.is_none()
        {
            let index = job.next;
            job.next += 1;
            self.wait(TaskKey { job: key.job, index }, self.now);
            return;
        }
        // A gang of which one waits to begin again has not ended.
        let leader = self.leader(key);
        let waits = |member: TaskKey| matches!(self.stage(member), Some(Stage::Waiting { .. }));
        let job = self.job(key.job);
        if job.verdict.is_none() && job.left > 0 && self.members(leader).any(waits) {
            self.again(leader, 0);
            return;
        }
        if job.left == 0 && job.verdict.is_none() {
            let failed = job.tasks.iter().find_map(|task| match task.stage {
                Stage::Over(verdict) if verdict != Verdict::Succeeded => Some(verdict),
                _ => None,
            });
            let verdict = failed.unwrap_or(Verdict::Succeeded);
            let dependents = self.close_job(key.job, verdict);
            self.tell(dependents, verdict);
        } else if job.left == 0 {
            self.jobs.is_done(key.job);
        }
    }

    /// Ends a job, and those that wait for it.
    pub(super) fn end_job(&mut self, id: JobId, verdict: Verdict) {
        let dependents = self.end_tasks(id, verdict);
        self.tell(dependents, verdict);
    }

    /// Tells those that waited for a job how it ended; those that cannot begin any more end, and so on.
    fn tell(&mut self, dependents: BTreeSet<JobId>, verdict: Verdict) {
        let mut next: VecDeque<(JobId, Verdict)> = dependents.into_iter().map(|id| (id, verdict)).collect();
        while let Some((id, verdict)) = next.pop_front() {
            if verdict != Verdict::Succeeded {
                let dependents = self.end_tasks(id, Verdict::Skipped);
                next.extend(dependents.into_iter().map(|id| (id, Verdict::Skipped)));
                continue;
            }
            let Some(job) = self.jobs.get_mut(id) else { continue };
            job.waits_for -= 1;
            if job.waits_for == 0 && job.verdict.is_none() {
                self.release_job(id);
            }
        }
    }

    /// Ends all tasks of a job. Those that run hold what they have until they have ended. Who waited for it.
    fn end_tasks(&mut self, id: JobId, verdict: Verdict) -> BTreeSet<JobId> {
        let Some(job) = self.jobs.get(id).filter(|job| job.verdict.is_none()) else { return BTreeSet::new() };
        let keys = (0..job.spec.tasks.count()).map(|index| TaskKey { job: id, index });
        let why = if verdict == Verdict::TimedOut { Stop::TimedOut } else { Stop::Cancelled };
        self.jobs[id].verdict = Some(verdict);
        for key in keys {
            match self.stage(key) {
                Some(Stage::Held) => self.set_stage(key, Stage::Over(verdict)),
                Some(Stage::Waiting { .. }) => {
                    self.leave_queue(key);
                    self.set_stage(key, Stage::Over(verdict));
                }
                Some(Stage::Nominated(_)) => {
                    self.withdraw_nomination(self.leader(key));
                    self.set_stage(key, Stage::Over(verdict));
                }
                Some(Stage::Running { .. }) => {
                    self.stop(key, why);
                    continue;
                }
                Some(Stage::Over(_)) | None => continue,
            }
            self.jobs[id].left -= 1;
        }
        self.close_job(id, verdict)
    }

    /// A job is over. Who waited for it.
    fn close_job(&mut self, id: JobId, verdict: Verdict) -> BTreeSet<JobId> {
        let job = &mut self.jobs[id];
        job.verdict = Some(verdict);
        self.out.push(Decision::Over(id, verdict));
        let dependents = std::mem::take(&mut job.dependents);
        if job.left == 0 {
            self.jobs.is_done(id);
        }
        dependents
    }

    pub(super) fn shrunk(&mut self, key: TaskKey, done: bool) {
        let Some(job) = self.jobs.get(key.job) else { return };
        let (Some(floor), namespace) = (job.spec.floor, job.namespace as usize) else { return };
        if job.spec.oversubscribes {
            return;
        }
        let spec = job.spec.clone();
        let Some(task) = self.task(key) else { return };
        let Stage::Running { at, since, holds, stopping } = &mut task.stage else { return };
        let (at, since, before, is_stopping) = (*at, *since, *holds, stopping.is_some());
        if !done {
            // Whoever counted on it looks elsewhere.
            for nominated in self.awaiting(key, false) {
                self.withdraw_nomination(nominated);
                self.wait(nominated, self.now);
            }
            self.something_is_free();
            return;
        }
        let demand = Demand { gpu_memory: before.demand.gpu_memory, ..floor };
        let after = Request { demand, ..before };
        *holds = after;
        self.namespaces[namespace].give_back(&before);
        self.namespaces[namespace].take(&after);
        self.books.stop(key, at);
        self.books.give_back(&Claim::of(&spec, &before), at);
        self.books.take_ahead(&Claim::of(&spec, &after), at);
        self.books.start(key, &JobSpec { floor: None, ..spec }, &after, at, since);
        if is_stopping {
            self.books.spare(Yields::ByEnding, key.number());
        }
        self.something_is_free();
        self.made_room(key, false);
    }

    /// Who waits for a task to shrink, or also to end.
    fn awaiting(&self, key: TaskKey, or_end: bool) -> Vec<TaskKey> {
        let number = key.number();
        let awaits = |(_, it): &(&TaskKey, &Nomination)| {
            it.shrinks.contains(&number) || or_end && it.ends.contains(&number)
        };
        self.nominations.iter().filter(awaits).map(|(key, _)| *key).collect()
    }

    /// A task has been shrunk, or has ended.
    fn made_room(&mut self, key: TaskKey, has_ended: bool) {
        for nominated in self.awaiting(key, has_ended) {
            let Some(nomination) = self.nominations.get_mut(&nominated) else { continue };
            nomination.shrinks.remove(&key.number());
            if has_ended {
                nomination.ends.remove(&key.number());
            }
            if nomination.shrinks.is_empty()
                && nomination.ends.is_empty()
                && let Some(Nomination { places, .. }) = self.nominations.remove(&nominated)
            {
                self.start(nominated, &places);
            }
        }
    }

    pub(super) fn withdraw_nomination(&mut self, key: TaskKey) {
        let Some(nomination) = self.nominations.remove(&key) else { return };
        let job = &self.jobs[key.job];
        let (claim, namespace) = (Claim::of(&job.spec, &job.spec.request), job.namespace as usize);
        for at in nomination.places {
            self.books.give_back(&claim, at);
            self.namespaces[namespace].give_back(&claim.request);
        }
        self.something_is_free();
    }

    pub(super) fn start(&mut self, key: TaskKey, places: &[Placement]) {
        let now = self.now;
        let spec = self.job(key.job).spec.clone();
        for (member, at) in self.members(key).zip(places) {
            let Some(task) = self.task(member) else { continue };
            task.attempt += 1;
            task.stage = Stage::Running { at: *at, since: now, holds: spec.request, stopping: None };
            let attempt = task.attempt;
            self.books.start(member, &spec, &spec.request, *at, now);
            if let Some(timeout) = spec.timeout {
                self.timeouts.insert((now.saturating_add(timeout), member));
            }
            self.out.push(Decision::Start { task: member, attempt, at: *at });
        }
    }
}
