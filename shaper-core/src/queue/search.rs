//! Looking for places: who is next, by which means, and what is promised to the first that finds none.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    ops::Bound,
};

use super::{
    Decision, Nomination, Order, Queue,
    books::{Claim, Spared, Yields},
    explain::Blocked,
    job::{JobId, Spread, Stage, Stop, TaskKey},
};
use crate::{
    place::{NodeId, Placement, Preemption, Request, Wanted},
    spec::Priority,
    task::UnixNanos,
};

/// A way to place a task or a gang. The books have it already.
#[derive(Debug, Default)]
struct Plan {
    places: Vec<Placement>,
    victims: BTreeSet<u64>,
    shrinks: BTreeSet<u64>,
    /// Who is spared, to undo it.
    spared: Vec<Spared>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    Fit,
    Room(Yields),
}

/// Those of one priority in one namespace.
pub(super) type Line = (Reverse<Priority>, u32);

/// A line, and of those in it the first that was not looked at.
type Cursor = (Line, Option<(UnixNanos, TaskKey)>);

/// A look at the queue from its beginning, in order.
pub(super) struct Pass {
    lines: Vec<Cursor>,
    /// Of each namespace.
    shares: Vec<u64>,
}

impl Queue {
    pub(super) fn schedule(&mut self) {
        let mut pass = self.pass();
        // Within one pass nothing is given back, so what no node has room for finds none for another of the same shape.
        let mut hopeless: Vec<(Request, bool)> = Vec::new();
        let mut head: Option<TaskKey> = None;
        let mut looked_at = 0;
        while looked_at <= self.config.depth
            && let Some(key) = self.next_in_order(&mut pass)
        {
            let blocked = match self.blocked.get(&key) {
                Some(blocked) => blocked.clone(),
                None => match self.attempt(key, head, &mut hopeless) {
                    Ok(()) => {
                        let namespace = self.job(key.job).namespace as usize;
                        pass.shares[namespace] = self.namespaces[namespace].share(&self.books.total);
                        continue;
                    }
                    Err(blocked) => blocked,
                },
            };
            looked_at += 1;
            // Who has used up his quota holds up nobody.
            let holds_up = !matches!(blocked, Blocked::Quota(_));
            self.blocked.insert(key, blocked);
            if holds_up && head.is_none() {
                head = Some(key);
                if !self.config.backfills {
                    break;
                }
                self.promise(key);
            }
        }
    }

    pub(super) fn pass(&self) -> Pass {
        let first = |(line, waiting): (&Line, &BTreeSet<_>)| (*line, waiting.first().copied());
        Pass {
            lines: self.waiting.iter().map(first).collect(),
            shares: self.namespaces.iter().map(|it| it.share(&self.books.total)).collect(),
        }
    }

    /// Of those that were not looked at in this pass, who is next.
    pub(super) fn next_in_order(&self, pass: &mut Pass) -> Option<TaskKey> {
        let rank = |(at, (line, next)): (usize, &Cursor)| {
            let ((Reverse(priority), namespace), (since, key)) = (*line, (*next)?);
            let class = match self.config.order {
                Order::Arrival => 0,
                Order::Priority | Order::Fair => self.class(priority, since),
            };
            let share = match self.config.order {
                Order::Arrival | Order::Priority => 0,
                Order::Fair => pass.shares[namespace as usize],
            };
            Some((Reverse(class), share, since, key, at))
        };
        let (_, _, since, key, at) = pass.lines.iter().enumerate().filter_map(rank).min()?;
        let (line, next) = &mut pass.lines[at];
        let behind = (Bound::Excluded((since, key)), Bound::Unbounded);
        *next = self.waiting.get(line).and_then(|waiting| waiting.range(behind).next().copied());
        Some(key)
    }

    /// Higher is first: its priority, and one more for each time that it has waited too long.
    fn class(&self, priority: Priority, since: UnixNanos) -> u64 {
        let own = priority as u64;
        let aged = self.now.saturating_sub(since) / self.config.ages_after.max(1);
        own.saturating_add(aged).min(Priority::High as u64)
    }

    /// Promises a place to the first that found none.
    fn promise(&mut self, key: TaskKey) {
        if self.promised.as_ref().is_some_and(|(to, at)| *to == key && at.at() > self.now) {
            return;
        }
        let job = &self.jobs[key.job];
        let claim = Claim::of(&job.spec, &job.spec.request);
        let spread = job.spec.spread.clone();
        let count = job.spec.tasks.together() as usize;
        let mut apart = self.apart(key.job, spread.as_ref());
        let wanted = Wanted { request: &claim.request, count };
        let found = self.books.forecast(wanted, self.now, |node| apart.admit(node));
        self.promised = found.map(|reservation| (key, reservation));
        // What would have delayed the promise before may not delay this one.
        self.blocked.retain(|_, blocked| !matches!(blocked, Blocked::Behind { .. }));
    }

    fn attempt(
        &mut self,
        key: TaskKey,
        head: Option<TaskKey>,
        hopeless: &mut Vec<(Request, bool)>,
    ) -> Result<(), Blocked> {
        let job = self.job(key.job);
        let (spec, namespace) = (&job.spec, job.namespace as usize);
        let count = spec.tasks.together();
        if let Some(over) = self.namespaces[namespace].over_quota(&spec.request, count) {
            return Err(Blocked::Quota(over));
        }
        let may_preempt = spec.preempts && spec.request.priority > Priority::Low;
        let is_plain = count == 1 && spec.spread.is_none() && !spec.oversubscribes;
        let shape = (spec.request, may_preempt);
        if is_plain && hopeless.contains(&shape) {
            return Err(Blocked::NoRoom);
        }
        for means in [Means::Fit, Means::Room(Yields::ByShrinking), Means::Room(Yields::ByEnding)] {
            if means == Means::Room(Yields::ByEnding) && !may_preempt {
                continue;
            }
            if let Some(plan) = self.plan(key, means, head) {
                self.carry_out(key, plan);
                return Ok(());
            }
        }
        if let Some(first) = head
            && let Some(until) = self.promised.as_ref().map(|(_, reservation)| reservation.at())
            && let Some(plan) = self.plan(key, Means::Fit, None)
        {
            let spec = &self.job(key.job).spec;
            self.undo(&Claim::of(spec, &spec.request), plan);
            return Err(Blocked::Behind { first, until });
        }
        if is_plain {
            hopeless.push(shape);
        }
        let job = &mut self.jobs[key.job];
        if !job.asked_for_nodes {
            job.asked_for_nodes = true;
            self.out.push(Decision::ScaleOut { job: key.job, tasks: count });
        }
        Err(Blocked::NoRoom)
    }

    /// A place for each that starts together, by these means. The books have it all, or nothing.
    fn plan(&mut self, key: TaskKey, means: Means, head: Option<TaskKey>) -> Option<Plan> {
        let now = self.now;
        let job = &self.jobs[key.job];
        let spec = &job.spec;
        let (claim, count) = (Claim::of(spec, &spec.request), spec.tasks.together());
        let until = spec.runs_for.map(|it| now.saturating_add(it));
        let spread = spec.spread.clone();
        let mut apart = self.apart(key.job, spread.as_ref());
        let mut promise = self.promised.as_ref().filter(|_| head.is_some()).map(|(_, it)| it.clone());
        let scoring = self.config.scoring.clone();
        let mut plan = Plan::default();
        for _ in 0..count {
            let keeps_promise = |node: NodeId, is_now: bool| match &promise {
                Some(promise) if is_now => promise.admits(node, &claim.request, until),
                Some(promise) => !promise.nodes().any(|it| it == node),
                None => true,
            };
            let fit =
                self.books.fit(&claim, &scoring, now, |node| apart.admits(node) && keeps_promise(node, true));
            let at = if let Some(at) = fit.filter(|at| self.books.take(&claim, *at)) {
                at
            } else {
                let may = |node: NodeId| apart.admits(node) && keeps_promise(node, false);
                let found = match means {
                    Means::Fit => None,
                    Means::Room(yields) => {
                        self.books.make_room(yields, &claim, now, may).map(|found| (yields, found))
                    }
                };
                let Some((yields, Preemption { at, victims, .. })) = found else {
                    self.undo(&claim, plan);
                    return None;
                };
                plan.spared.extend(victims.iter().map(|task| self.books.spare(yields, *task)));
                match yields {
                    Yields::ByShrinking => plan.shrinks.extend(victims),
                    Yields::ByEnding => plan.victims.extend(victims),
                }
                self.books.take_ahead(&claim, at);
                at
            };
            apart.admit(at.node);
            if let Some(promise) = &mut promise {
                promise.started(&claim.request, at, until);
            }
            plan.places.push(at);
        }
        if let (Some(promise), Some((_, kept))) = (promise, &mut self.promised) {
            *kept = promise;
        }
        Some(plan)
    }

    fn undo(&mut self, claim: &Claim, plan: Plan) {
        for at in plan.places {
            self.books.give_back(claim, at);
        }
        for spared in plan.spared {
            self.books.spare_again(spared);
        }
    }

    fn carry_out(&mut self, key: TaskKey, plan: Plan) {
        self.leave_queue(key);
        let job = &self.jobs[key.job];
        let (claim, namespace) = (Claim::of(&job.spec, &job.spec.request), job.namespace as usize);
        for _ in &plan.places {
            self.namespaces[namespace].take(&claim.request);
        }
        if plan.victims.is_empty() && plan.shrinks.is_empty() {
            self.start(key, &plan.places);
            return;
        }
        for (member, at) in self.members(key).zip(&plan.places) {
            self.set_stage(member, Stage::Nominated(*at));
            self.out.push(Decision::Nominated { task: member, at: *at });
        }
        let (ends, shrinks) = (plan.victims.clone(), plan.shrinks.clone());
        self.nominations.insert(key, Nomination { places: plan.places, ends, shrinks });
        for task in plan.shrinks {
            self.out.push(Decision::Shrink { task: TaskKey::of(task), makes_room_for: key });
        }
        for task in plan.victims {
            self.stop(TaskKey::of(task), Stop::Preempted(key));
        }
    }

    fn apart(&mut self, id: JobId, spread: Option<&Spread>) -> Apart {
        let Some(Spread { label, most }) = spread else { return Apart::default() };
        let places = label.as_ref().map(|label| self.books.places(label).to_vec());
        let mut apart = Apart { most: Some(*most), places, counts: HashMap::new() };
        for task in &self.job(id).tasks {
            if let Stage::Nominated(at) | Stage::Running { at, .. } = &task.stage {
                apart.count(at.node);
            }
        }
        apart
    }
}

/// How many of a job there are at each place.
#[derive(Default)]
struct Apart {
    most: Option<u32>,
    /// Of each node, which place; without, each is its own.
    places: Option<Vec<Option<u32>>>,
    counts: HashMap<u32, u32>,
}

impl Apart {
    fn place(&self, node: NodeId) -> Option<u32> {
        match &self.places {
            Some(places) => places.get(node.0 as usize).copied().flatten(),
            None => Some(node.0),
        }
    }

    fn admits(&self, node: NodeId) -> bool {
        let Some(most) = self.most else { return true };
        self.place(node).is_some_and(|place| self.counts.get(&place).is_none_or(|count| *count < most))
    }

    fn count(&mut self, node: NodeId) {
        if let (Some(_), Some(place)) = (self.most, self.place(node)) {
            *self.counts.entry(place).or_default() += 1;
        }
    }

    /// Counts one more there, if it may be.
    fn admit(&mut self, node: NodeId) -> bool {
        let admits = self.admits(node);
        if admits {
            self.count(node);
        }
        admits
    }
}
