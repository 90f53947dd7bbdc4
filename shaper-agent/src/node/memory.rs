//! The memory of running tasks: limits that come below use, and limits that grow before the kernel kills.
//!
//! `shaper_core::shrink` decides how a limit comes down, in one conversation for each task that has one; when and how far
//! one grows, `shaper_core::adjust::memory` does.
//!
//! The conversations are held on the node's thread, by its ticks and by alarms of pressure; reclaim itself, which may take
//! long, is not ([`crate::reclaim`]). What a conversation turns is held by this agent alone ([`Hold::Transient`]) until it
//! has come to its end: another agent that takes the task up puts back what was decided before.

use std::{collections::VecDeque, sync::Arc};

use shaper_core::{
    adjust::memory::{self as grow, MemoryTask, NodeMemory},
    id::{ExecutionId, TaskId},
    ledger::Cause,
    limits::{Limit, LimitsChange},
    shrink::{self, Action, Before, Event, Observation, Outcome, Shrink, Status, Swap},
    snapshot::Pressure,
    spec::{DecisionKind, Priority},
    task::{OomKill, UnixNanos},
    units::Bytes,
};
use shaper_proto::peer::Caller;
use tokio::sync::watch;

use super::{Node, NodeError, change::Hold, not_established, now};
use crate::{
    actuate::{self, ActuateError, Knob, Target, Value, Wish},
    kernel::{
        cgroup::{
            Cgroup, CgroupError, Open, ReadOnly,
            memory::{self, MemoryEvents, MemoryStat, Reclaimer},
            pressure,
        },
        mapped::monotonic_ns,
    },
    launch,
    meter::swap_free,
    reclaim::Chunk,
};

/// A conversation with everything that it needs.
pub(super) struct Shrinking {
    shrink: Shrink,
    began_at: UnixNanos,
    /// Why, where it is this agent that brings back what it gave.
    gives_back: Option<String>,
    files: Files,
    reclaimer: Arc<Reclaimer>,
    /// The chunk that is under way, by when it began: what is told of an older one does not count.
    chunk: Option<(u64, Chunk)>,
    over: watch::Sender<bool>,
}

impl Shrinking {
    fn cause(&self) -> Cause {
        match &self.gives_back {
            Some(reason) => Cause::agent("give back", reason.clone()),
            None => Cause::agent("shrink", self.status().to_string()),
        }
    }

    fn status(&self) -> Status {
        self.shrink.status(self.began_at)
    }

    /// What is told of it, where somebody asked for it. What is given back is told as a decision.
    pub(super) fn told(&self) -> Option<Status> {
        self.gives_back.is_none().then(|| self.status())
    }
}

/// What is read again and again while a conversation lasts, or idle memory is looked for.
pub(super) struct Files {
    used: Open<Bytes, ReadOnly>,
    stat: Open<MemoryStat, ReadOnly>,
    events: Open<MemoryEvents, ReadOnly>,
    pressure: Open<Pressure, ReadOnly>,
    swap_used: Option<Open<Bytes, ReadOnly>>,
    swap_max: Option<Open<Limit<Bytes>>>,
}

impl Files {
    /// `None` where a kernel lacks something that a conversation cannot do without.
    pub(super) fn open(cgroup: &Cgroup) -> Result<Option<Files>, CgroupError> {
        let (Some(used), Some(stat), Some(events), Some(pressure)) = (
            cgroup.open_file(memory::CURRENT)?,
            cgroup.open_file(memory::STAT)?,
            cgroup.open_file(memory::EVENTS)?,
            cgroup.open_file(pressure::MEMORY)?,
        ) else {
            return Ok(None);
        };
        let swap_used = cgroup.open_file(memory::SWAP_CURRENT)?;
        let swap_max = cgroup.open_file(memory::SWAP_MAX)?;
        Ok(Some(Files { used, stat, events, pressure, swap_used, swap_max }))
    }

    /// How much of the task's memory could be swapped out besides what is.
    fn swap_room(&self) -> Result<u64, CgroupError> {
        let free = swap_free();
        let max = self.swap_max.as_ref().map(Open::read).transpose()?;
        let Some(Limit::At(Bytes(max))) = max else { return Ok(free) };
        let used = self.swap_used.as_ref().map(Open::read).transpose()?.unwrap_or_default();
        Ok(free.min(max.saturating_sub(used.0)))
    }

    /// Reclaimed by whomever, in all.
    pub(super) fn stolen(&self) -> Result<Bytes, CgroupError> {
        Ok(Bytes(self.stat.read()?.stolen.saturating_mul(rustix::param::page_size() as u64)))
    }

    pub(super) fn observe(&self) -> Result<(Observation, Swap), CgroupError> {
        let stat = self.stat.read()?;
        let pressure = self.pressure.read()?;
        let room = self.swap_room()?;
        // Memory of tmpfs and of shared mappings is on the lists of the anonymous.
        let anonymous = stat.inactive_anon.0.saturating_add(stat.active_anon.0);
        let cache = stat.inactive_file.0.saturating_add(stat.active_file.0);
        let refaults = stat.refault_anon.saturating_add(stat.refault_file);
        let observation = Observation {
            used: self.used.read()?,
            reclaimable: Bytes(cache.saturating_add(anonymous.min(room))),
            refaulted: Bytes(refaults.saturating_mul(rustix::param::page_size() as u64)),
            some_stall_us: pressure.some_total_us,
            full_stall_us: pressure.full_total_us,
            oom_kills: self.events.read()?.oom_kill,
        };
        Ok((observation, if room == 0 { Swap::None } else { Swap::Room(Bytes(room)) }))
    }
}

impl Node {
    /// Changes limits of a running task. A memory limit below use is not refused if it may come to be in force: then it is
    /// on its way when this returns, and the others are in force.
    pub(super) fn change_or_shrink(
        &mut self,
        id: &TaskId,
        change: &LimitsChange,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let Some(wanted) = change.memory else { return self.change(id, change, cause) };
        self.put_back_owed(id)?;
        let is_below_use = match wanted {
            Limit::Unlimited => false,
            Limit::At(wanted) => {
                let target = self.task(id)?.target.as_ref().ok_or_else(not_established)?;
                actuate::memory_in_use(target)?.is_some_and(|used| wanted < used)
            }
        };
        let (true, Limit::At(wanted)) = (is_below_use, wanted) else {
            self.call_off(id);
            return self.change(id, change, cause);
        };
        let rest = LimitsChange { memory: None, ..*change };
        if self.task(id)?.shrinking.is_some() {
            self.change(id, &rest, cause)?;
            if let Some(shrinking) = &mut self.task_mut(id)?.shrinking {
                (shrinking.gives_back, shrinking.began_at) = (None, now());
            }
            self.tell_shrink(id, Event::Retargeted(whole_pages(wanted)));
            return Ok(());
        }
        let target = self.task(id)?.target.as_ref().ok_or_else(not_established)?;
        let Some(shrinking) = prepare(target, whole_pages(wanted))? else {
            // Nothing here can shrink: it is refused as a whole.
            return self.change(id, change, cause);
        };
        self.change(id, &rest, cause)?;
        self.begin_shrink(id, shrinking)
    }

    fn begin_shrink(&mut self, id: &TaskId, shrinking: Shrinking) -> Result<(), NodeError> {
        tracing::info!(task = %id, status = %shrinking.status(), "shrinks");
        let task = self.task_mut(id)?;
        if shrinking.gives_back.is_none() {
            task.last_shrink = None;
        }
        task.shrinking = Some(shrinking);
        task.idling.disturb();
        self.look_at_shrink(id);
        Ok(())
    }

    /// Turns true when the conversation that a task has now is over; `None` if it has none.
    pub fn shrunk(&self, caller: &Caller, id: &TaskId) -> Result<Option<watch::Receiver<bool>>, NodeError> {
        self.visible(caller, id)?;
        Ok(self.task(id)?.shrinking.as_ref().map(|shrinking| shrinking.over.subscribe()))
    }

    /// Every conversation goes on.
    pub(super) fn look_at_shrinks(&mut self) {
        let shrinking = |task: &super::Task| task.shrinking.is_some();
        let ids: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| shrinking(task)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.look_at_shrink(&id);
        }
    }

    pub(super) fn look_at_shrink(&mut self, id: &TaskId) {
        let Some(shrinking) = self.tasks.get(id).and_then(|task| task.shrinking.as_ref()) else { return };
        let event = match shrinking.files.observe() {
            Ok((seen, _)) => Event::Observed(seen),
            Err(error) if error.is_gone() => Event::Ended,
            Err(error) => Event::Failed(launch::chain(&error)),
        };
        self.tell_shrink(id, event);
    }

    fn reclaimed(&mut self, execution: &ExecutionId, began: u64) {
        let id = &execution.task;
        let Some(task) = self.tasks.get_mut(id).filter(|task| task.record.execution == *execution) else {
            return;
        };
        if let Some(shrinking) = &mut task.shrinking
            && shrinking.chunk.take_if(|(at, _)| *at == began).is_some()
        {
            self.tell_shrink(id, Event::Reclaimed);
        }
    }

    /// Calls off the conversation that a task has, if it has one: everything is as it was.
    pub(super) fn call_off(&mut self, id: &TaskId) {
        self.tell_shrink(id, Event::Cancelled);
    }

    /// Calls off every conversation: nobody goes on with them.
    pub(super) fn call_off_all(&mut self) {
        for id in self.tasks.keys().cloned().collect::<Vec<_>>() {
            self.call_off(&id);
        }
    }

    pub(super) fn end_shrink(&mut self, id: &TaskId) {
        self.tell_shrink(id, Event::Ended);
    }

    /// Tells the conversation of a task, if it has one, what has happened, and does what it asks for.
    fn tell_shrink(&mut self, id: &TaskId, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(shrinking) = self.tasks.get_mut(id).and_then(|task| task.shrinking.as_mut()) else {
                return;
            };
            for action in shrink::on_event(&mut shrinking.shrink, event, monotonic_ns()) {
                tracing::debug!(task = %id, ?action, "shrinks");
                let Some(event) = self.carry_out_shrink(id, &action) else { continue };
                // Of what puts everything back, all is tried. Else what follows from a failure takes the place of what
                // would have come next.
                if !self.is_shrink_over(id) {
                    events.push_back(event);
                    break;
                }
                tracing::error!(task = %id, ?event, "cannot put a memory limit back; it is tried again");
                self.put_back_later(id, action);
            }
        }
    }

    fn is_shrink_over(&self, id: &TaskId) -> bool {
        let shrinking = self.tasks.get(id).and_then(|task| task.shrinking.as_ref());
        shrinking.is_none_or(|shrinking| shrinking.shrink.outcome().is_some())
    }

    fn put_back_later(&mut self, id: &TaskId, action: Action) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        match action {
            Action::SetHigh(limit) => task.memory_owed.push(Wish::MemoryHigh(limit)),
            Action::SetMax(limit) => task.memory_owed.push(Wish::Exactly(Knob::Memory, Value::Memory(limit))),
            Action::Reclaim(_) | Action::StopReclaim | Action::Finish(_) => {}
        }
    }

    /// Puts back what could not be put back at the end of a conversation.
    pub(super) fn put_back_owed(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let owed = self.task(id)?.memory_owed.clone();
        if !owed.is_empty() {
            self.set_knobs(id, &owed, Hold::Transient, &Cause::agent("shrink", "put back after a failure"))?;
            self.task_mut(id)?.memory_owed.clear();
        }
        Ok(())
    }

    fn carry_out_shrink(&mut self, id: &TaskId, action: &Action) -> Option<Event> {
        let failed = |error: NodeError| Some(Event::Failed(launch::chain(&error)));
        match *action {
            Action::Reclaim(amount) => {
                let task = self.tasks.get_mut(id)?;
                let (execution, handle) = (task.record.execution.clone(), self.handle.clone());
                let shrinking = task.shrinking.as_mut()?;
                let (runtime, began) = (self.runtime.clone(), monotonic_ns());
                let done = move |reclaimed| {
                    tracing::debug!(%execution, %amount, ?reclaimed, "reclaimed");
                    // What went wrong is seen by use that does not fall.
                    runtime.spawn(
                        async move { handle.tell(move |node| node.reclaimed(&execution, began)).await },
                    );
                };
                let reclaimer = Arc::clone(&shrinking.reclaimer);
                shrinking.chunk = Some((began, Chunk::start(&self.runtime, reclaimer, amount, done)));
                None
            }
            Action::StopReclaim => {
                self.tasks.get_mut(id)?.shrinking.as_mut()?.chunk = None;
                None
            }
            Action::SetHigh(limit) => self.turn_for_now(id, Wish::MemoryHigh(limit)).err().and_then(failed),
            Action::SetMax(limit) => {
                let task = self.tasks.get(id)?;
                let before = task.shrinking.as_ref()?.shrink.before();
                // A limit that nobody but its owner has set so far: what the next agent puts back if this one dies now.
                if !task.record.baseline.contains_key(&Knob::Memory) {
                    let as_it_is = Wish::Exactly(Knob::Memory, Value::Memory(before.max));
                    let cause = Cause::agent("shrink", "what was in force before");
                    if let Err(error) = self.set_knobs(id, &[as_it_is], Hold::Standing, &cause) {
                        return failed(error);
                    }
                }
                let wish = if limit == before.max {
                    Wish::Exactly(Knob::Memory, Value::Memory(limit))
                } else {
                    Wish::Memory(limit)
                };
                match self.turn_for_now(id, wish) {
                    Ok(()) => None,
                    Err(NodeError::Actuate(ActuateError::BelowUse { .. })) => Some(Event::Refused),
                    Err(error) => failed(error),
                }
            }
            Action::Finish(ref outcome) => {
                self.finish_shrink(id, outcome);
                None
            }
        }
    }

    /// For as long as the conversation lasts.
    fn turn_for_now(&mut self, id: &TaskId, wish: Wish) -> Result<(), NodeError> {
        let cause = self.task(id)?.shrinking.as_ref().map(Shrinking::cause);
        let cause = cause.unwrap_or_else(|| Cause::agent("shrink", ""));
        self.set_knobs(id, &[wish], Hold::Transient, &cause)
    }

    fn finish_shrink(&mut self, id: &TaskId, outcome: &Outcome) {
        let Some(shrinking) = self.tasks.get_mut(id).and_then(|task| task.shrinking.take()) else { return };
        let (status, target) = (shrinking.status(), shrinking.shrink.target());
        tracing::info!(task = %id, %status, "shrinks no more");
        if let Outcome::Done { .. } = outcome {
            // In force already; from here on it is the task's limit.
            let change = LimitsChange { memory: Some(Limit::At(target)), ..LimitsChange::default() };
            let cause = shrinking.cause();
            if let Err(error) = self.change(id, &change, &cause) {
                tracing::error!(task = %id, error = %launch::chain(&error), "cannot record a memory limit that is in force");
            }
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        let execution = task.record.execution.clone();
        match shrinking.gives_back {
            None => task.last_shrink = Some(status),
            Some(reason) if matches!(outcome, Outcome::Done { .. }) => {
                self.tell_decision(&execution, DecisionKind::Shrunk, reason);
            }
            Some(_) => self.memory_uses.leave_alone(&execution, monotonic_ns()),
        }
        shrinking.over.send_replace(true);
        self.tell_task(id);
    }
}

/// The kernel keeps whole pages, and shows what it keeps.
fn whole_pages(Bytes(bytes): Bytes) -> Bytes {
    let page = rustix::param::page_size() as u64;
    Bytes(bytes / page * page)
}

/// Everything for a conversation; `None` where this kernel cannot hold one, or the limit is not one of cgroup v2.
fn prepare(target: &Target, wanted: Bytes) -> Result<Option<Shrinking>, NodeError> {
    let cgroup = &target.cgroup;
    let (Some(max), Some(high)) = (cgroup.find(memory::MAX)?, cgroup.find(memory::HIGH)?) else {
        return Ok(None);
    };
    let before = Before { max, high };
    let (Some(files), Some(reclaimer)) = (Files::open(cgroup)?, Reclaimer::open(cgroup)?) else {
        return Ok(None);
    };
    let (seen, swap) = files.observe()?;
    let shrink = Shrink::begin(wanted, before, swap, &seen, monotonic_ns())?;
    Ok(Some(Shrinking {
        shrink,
        began_at: now(),
        gives_back: None,
        files,
        reclaimer: Arc::new(reclaimer),
        chunk: None,
        over: watch::Sender::new(false),
    }))
}

// ---- growing

/// One task of the broker's, owned: what decides borrows from it.
struct Seen {
    execution: ExecutionId,
    priority: Priority,
    limit: Limit<Bytes>,
    floor: Bytes,
    is_fixed: bool,
    grant: Limit<Bytes>,
    used: Bytes,
    is_short: bool,
    wall: Limit<Bytes>,
}

impl Node {
    /// Something is new in a task's `memory.events`: it grows at once if it has met a limit, and it is noted if the kernel
    /// killed.
    pub(super) fn memory_told(&mut self, slot: u32) {
        let (Some(id), Some(events)) = (self.task_of_slot(slot), self.meter.memory_events(slot)) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let before = std::mem::replace(&mut task.memory_events, events);
        let is_short = events.high > before.high || events.max > before.max;
        if is_short {
            task.idling.disturb();
        }
        // At the limit that it had.
        if events.oom_kill > before.oom_kill {
            self.note_oom_kill(&id, events.oom_kill - before.oom_kill);
        }
        if is_short {
            self.needs_it_after_all(&id);
            self.grow_memory(Some(&id));
        }
    }

    /// A limit that was to come down, because the task was believed not to need it, stays.
    fn needs_it_after_all(&mut self, id: &TaskId) {
        let shrinking = self.tasks.get(id).and_then(|task| task.shrinking.as_ref());
        if shrinking.is_some_and(|shrinking| shrinking.gives_back.is_some()) {
            self.call_off(id);
        }
    }

    /// What is to be learnt from a kill: at which limit, and how much had been used. It is kept with the record.
    fn note_oom_kill(&mut self, id: &TaskId, kills: u64) {
        let state_dir = self.config.state_dir.clone();
        let Some(task) = self.tasks.get_mut(id) else { return };
        let peak = task.target.as_ref().and_then(|target| actuate::memory_peak(target).ok().flatten());
        let before = task.record.oom_kill.map_or(0, |kill| kill.kills);
        let kill = OomKill { at: now(), limit: task.record.limits.memory, peak, kills: before + kills };
        tracing::warn!(task = %id, %kill, "the kernel killed a process for want of memory");
        task.record.oom_kill = Some(kill);
        task.unsaved = task.record.save(&state_dir).is_err();
        self.tell_task(id);
    }

    /// A task waits for memory: it grows if its limit may be why.
    pub(super) fn grow_if_near(&mut self, id: &TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let used = task.target.as_ref().and_then(|target| self.meter.memory_used(target.slot));
        if let (Limit::At(Bytes(grant)), Some(Bytes(used))) = (task.record.limits.memory, used)
            && used >= grant / 4 * 3
        {
            self.grow_memory(Some(id));
        }
    }

    /// Once a second, and when a task has begun.
    pub(super) fn look_at_memory(&mut self) {
        self.grow_memory(None);
    }

    /// Gives more memory to those of the broker's tasks that are short of it, and sees to it that they are noticed in time.
    fn grow_memory(&mut self, short: Option<&TaskId>) {
        let Some(available) = self.meter.memory_available() else { return };
        let node = NodeMemory { capacity: self.config.capacity.memory, available };
        let mut seen = self.see_memory(short);
        for growth in grow::grow(&node, &tasks_of(&seen)) {
            let Some(task) = seen.iter_mut().find(|task| task.execution == growth.execution) else {
                continue;
            };
            let change = LimitsChange { memory: Some(Limit::At(growth.to)), ..LimitsChange::default() };
            let cause = Cause::agent("grow", growth.reason.clone());
            match self.change(&growth.execution.task, &change, &cause) {
                Ok(()) => {
                    task.grant = Limit::At(growth.to);
                    self.tell_decision(&growth.execution, DecisionKind::Grew, growth.reason);
                }
                Err(error) => {
                    let error = launch::chain(&error);
                    tracing::warn!(execution = %growth.execution, error, "cannot give a task more memory");
                }
            }
        }
        let walls = grow::walls(&node, &tasks_of(&seen), &self.memory_uses, monotonic_ns());
        for (task, wall) in seen.iter().zip(walls).filter(|(task, _)| !task.is_fixed) {
            // Below use it would stop the task, and whoever sets it.
            let is_below_use = wall.at().is_some_and(|wall| wall <= task.used);
            let wall = if is_below_use { Limit::Unlimited } else { wall };
            if wall == task.wall {
                continue;
            }
            let cause = Cause::agent("grow", "where the kernel tells that it is short of memory");
            let id = &task.execution.task;
            match self.set_knobs(id, &[Wish::MemoryHigh(wall)], Hold::Transient, &cause) {
                Ok(()) => {
                    if let Some(task) = self.tasks.get_mut(id) {
                        task.wall = wall;
                    }
                }
                Err(error) => {
                    tracing::warn!(task = %id, error = %launch::chain(&error), "cannot set memory.high");
                }
            }
        }
        self.give_memory_back(&node, &seen);
    }

    /// Brings back what tasks were given and do not need, or what others need more, by a conversation with each.
    fn give_memory_back(&mut self, node: &NodeMemory, seen: &[Seen]) {
        for back in grow::give_back(&mut self.memory_uses, node, &tasks_of(seen), monotonic_ns()) {
            let id = &back.execution.task;
            let Some(target) = self.tasks.get(id).and_then(|task| task.target.as_ref()) else { continue };
            let begun = match prepare(target, whole_pages(back.to)) {
                Ok(Some(shrinking)) => self.begin_shrink(
                    id,
                    Shrinking {
                        shrink: shrinking.shrink.without_reclaim(),
                        gives_back: Some(back.reason),
                        ..shrinking
                    },
                ),
                // Nothing here can hold one: it keeps what it has.
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = begun {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot take back memory that was given");
                self.memory_uses.leave_alone(&back.execution, monotonic_ns());
            }
        }
    }

    /// The broker's tasks that run. Those of which nobody told are short if they are close to their limit.
    fn see_memory(&self, short: Option<&TaskId>) -> Vec<Seen> {
        let mut seen = Vec::new();
        for (id, task) in &self.tasks {
            let (Some(target), Some(assignment)) = (&task.target, &task.record.assignment) else { continue };
            let is_steady = task.started.is_some() && task.record.kill_at_boottime_ns.is_none();
            let is_movable = is_steady && task.shrinking.is_none() && target.v1_memory.is_none();
            if !task.is_running() {
                continue;
            }
            let is_told = short == Some(id);
            let grant = task.record.limits.memory;
            let floor = task.record.memory_floor.unwrap_or(match assignment.spec.limits.memory {
                Limit::At(limit) => limit,
                Limit::Unlimited => assignment.request().memory,
            });
            // What the meter knows of a task that does nothing may be ten seconds old.
            let has_to_give = grant.at().is_some_and(|grant| grant > floor);
            let used = if is_told || has_to_give {
                actuate::memory_in_use(target).ok().flatten()
            } else {
                self.meter.memory_used(target.slot)
            };
            let Some(used) = used else { continue };
            seen.push(Seen {
                execution: task.record.execution.clone(),
                priority: assignment.spec.profile.priority,
                limit: assignment.spec.limits.memory,
                floor,
                is_fixed: !is_movable,
                grant,
                used,
                is_short: is_told || grant.at().is_some_and(|grant| used > grow::wall(grant)),
                wall: task.wall,
            });
        }
        seen
    }
}

fn tasks_of(seen: &[Seen]) -> Vec<MemoryTask<'_>> {
    seen.iter().map(Seen::task).collect()
}

impl Seen {
    fn task(&self) -> MemoryTask<'_> {
        let Seen { execution, priority, limit, floor, is_fixed, grant, used, is_short, wall: _ } = self;
        MemoryTask {
            execution,
            priority: *priority,
            limit: *limit,
            floor: *floor,
            is_fixed: *is_fixed,
            grant: *grant,
            used: *used,
            is_short: *is_short,
        }
    }
}
