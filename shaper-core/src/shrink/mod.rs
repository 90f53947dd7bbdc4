//! Bringing the memory limit of a running task below what it uses now, without killing it and without
//! stopping it: a conversation with the kernel, held step by step.
//!
//! # Why not simply write the limit
//!
//! `memory.max` below use reclaims once and then kills; without swap, at once. `memory.high` below use makes the
//! task itself do the reclaiming, whenever it asks for memory: measured, it kept 8 % of its progress. What is safe
//! is `memory.reclaim`: it takes cold memory away *in the writer's context*, while the task runs on. But nobody
//! can say beforehand whether so much of it is cold. So this takes a little, looks at what the task makes of it,
//! and goes on or puts everything back.
//!
//! # The conversation
//!
//! [`on_event`] is a function of what is remembered ([`Shrink`]), what has happened ([`Event`]) and the time. What is to
//! be done comes back as [`Action`]s. The agent shows it an [`Observation`] every 100 ms or so, and tells it when a
//! chunk of reclaim is over.
//!
//! ```text
//!            ┌───────────── use > goal ─────────────┐
//!            ▼                                      │
//!  begin ─▶ Reclaiming ── use ≤ goal, calm ─▶ max = target ─▶ Capped ── still calm ─▶ high as before: Done
//!            │                                                  │
//!            └── stall, refaults, no progress, deadline, … ─────┴─▶ max and high as before: Aborted
//! ```
//!
//! - **Reclaiming.** At most one chunk at a time, and no sooner than the next observation after the last: what the task
//!   thinks of a chunk is seen before the next. A chunk that the task does not miss is followed by one twice as large; one
//!   of which half comes back, or that finds the task waiting, by one half as large. Before a chunk, `memory.high`
//!   is brought down to what is used then, and a little more: the task may have back at once what the chunk took
//!   from it, and cannot undo by growing what earlier ones achieved. It is never set below use.
//! - **Settling.** Once use has been at the goal (the target less a margin) for a moment, and it is calm, `memory.max`
//!   is written. Whoever carries that out looks at use once more, and says [`Event::Refused`] rather than write below it.
//! - **Without reclaim.** A limit that is above use comes down in the same way, but nothing is taken for it: memory that a
//!   task was given and does not need ([`Shrink::without_reclaim`]).
//! - **Capped.** The limit is in force and watched a little longer before `memory.high` goes back to what it was.
//!
//! # When it gives up
//!
//! | reason | what was seen |
//! |---|---|
//! | [`Reason::Stalled`] | all of the task waited for memory for a seventh of the last moments, or a part of it for half (PSI) |
//! | [`Reason::WorkingSet`] | round after round, most of what was taken came back (refaults) |
//! | [`Reason::NotReclaimable`] | what is left can be taken by nobody: anonymous, and no swap for it |
//! | [`Reason::Outgrown`] | the task takes new memory as fast as old is reclaimed |
//! | [`Reason::NoProgress`] | use does not fall, whatever is asked |
//! | [`Reason::Deadline`] | it has taken too long |
//!
//! Each carries what was learnt on the way: how much was cold, and what the task would not part with.
//!
//! # What it promises
//!
//! It never asks for a limit below the use that it has seen. Every conversation ends. When it was given up, or called
//! off, both files are as they were; when it is done, `memory.max` is the target and `memory.high` as it was. An
//! ended one asks for nothing more.

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, fmt};

use serde::{Deserialize, Serialize};

use crate::{limits::Limit, task::UnixNanos, units::Bytes};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Stalls are judged over this long, or a little longer. It holds whatever half second ended since the observation before:
/// the shortest window that the kernel's own triggers have on every kernel.
const WINDOW: u64 = 600 * MS;
/// Part of the window in which all of the task may wait, in hundredths: 100 ms, as seen at the latest. Progress of nine
/// tenths over the whole conversation leaves room for some such windows.
const FULL_MAX: u64 = 14;
/// Part of the window in which some of it may wait. A task of many threads of which one always waits is slowed down
/// without ever being full.
const SOME_MAX: u64 = 50;
/// Up to this part of a window in which all of it waits, it is calm: reclaim goes on.
const FULL_CALM: u64 = 4;
/// How long use must be at the goal before the limit is written.
const SETTLE: u64 = 200 * MS;
/// How long the limit is watched before the conversation is over.
const VERIFY: u64 = 500 * MS;
/// Use that has not fallen for so long will not.
const PATIENCE: u64 = 3 * SECOND;
/// How long the task has, after a chunk, to touch what it misses.
const LISTEN: u64 = 50 * MS;
/// A fall by less is noise: the kernel charges each CPU 256 KiB ahead.
const FALL: u64 = 256 * KIB;
/// Rounds in a row of which most came back: then it is the working set that is being cut.
const ROUNDS_MAX: u32 = 4;
/// So many observations in a row must say that the rest cannot be reclaimed: what is written back now can be later.
const STUCK_MAX: u32 = 5;
/// The time that a conversation may take, and for each GiB that is to go, so much more.
const DEADLINE: u64 = 15 * SECOND;
const DEADLINE_PER_GIB: u64 = 15 * SECOND;
const CHUNK_MIN: u64 = 512 * KIB;
const CHUNK_FIRST_MAX: u64 = 16 * MIB;
const CHUNK_MAX: u64 = 256 * MIB;

/// What is seen of a task's memory at one moment. Totals count from whenever they like; one that goes back counts from 0
/// again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Charged to it.
    pub used: Bytes,
    /// Of that: what reclaim could take if it were cold. Page cache and reclaimable slab; anonymous memory as far as
    /// there is swap for it.
    pub reclaimable: Bytes,
    /// Reclaimed and touched again, in all.
    pub refaulted: Bytes,
    /// Time in which some of it waited for memory, in all, µs.
    pub some_stall_us: u64,
    /// Time in which all of it waited for memory, in all, µs.
    pub full_stall_us: u64,
    /// Its processes that were killed for want of memory, in all.
    pub oom_kills: u64,
}

/// The limits in force when a conversation began: where it goes back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// `memory.max`.
    pub max: Limit<Bytes>,
    /// `memory.high`.
    pub high: Limit<Bytes>,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody has looked.
    Observed(Observation),
    /// The chunk that was asked for is over, however much it brought.
    Reclaimed,
    /// The limit was not written: the task uses more than that by now.
    Refused,
    /// Something that was asked for could not be done, and why.
    Failed(String),
    /// Another target is wanted.
    Retargeted(Bytes),
    /// It is no longer wanted.
    Cancelled,
    /// The task has ended, and its cgroup with it.
    Ended,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reclaim so much, beside everything else, and say when that is over.
    Reclaim(Bytes),
    /// A chunk that is under way is not wanted any more.
    StopReclaim,
    /// Write `memory.high`.
    SetHigh(Limit<Bytes>),
    /// Write `memory.max`, unless it is below use.
    SetMax(Limit<Bytes>),
    /// It is over.
    Finish(Outcome),
}

/// Why a conversation was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The task waited for memory.
    Stalled {
        /// So long all of it, µs …
        full_us: u64,
        /// … and so long a part of it, µs …
        some_us: u64,
        /// … in this time, µs.
        window_us: u64,
    },
    /// It touched what was taken from it.
    WorkingSet {
        /// Taken in the last round.
        taken: Bytes,
        /// Of that: touched again.
        refaulted: Bytes,
    },
    /// Nobody can take what is left.
    NotReclaimable {
        /// What could still be taken.
        reclaimable: Bytes,
    },
    /// It takes new memory as fast as old is reclaimed.
    Outgrown,
    /// Its use does not fall.
    NoProgress,
    /// It took too long.
    Deadline,
    /// The kernel killed a process of it for want of memory.
    OomKill,
    /// Something could not be done.
    Failed(String),
    /// It was called off.
    Cancelled,
}

/// How a conversation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The limit is in force.
    Done {
        /// How far use had fallen.
        freed: Bytes,
    },
    /// Everything is as it was.
    Aborted {
        /// Why.
        reason: Reason,
        /// How much was given up without complaint: the cold memory that was found.
        cold: Bytes,
    },
    /// The task ended meanwhile.
    Ended,
}

/// A conversation as it is told of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What is aimed at.
    pub target: Bytes,
    /// When it began.
    pub began_at: UnixNanos,
    /// Use when it began.
    pub used_at_first: Bytes,
    /// Use as last seen.
    pub used: Bytes,
    /// How it ended; `None`: it goes on.
    pub outcome: Option<Outcome>,
}

/// What cannot work, as can be said at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "memory: {target} is below what the task cannot be without: it uses {used}, of which {reclaimable} at most can be \
     reclaimed ({swap}). Let it free memory first, choose at least {least}, or give the node swap"
)]
pub struct NotReclaimable {
    /// The wanted limit.
    pub target: Bytes,
    /// The use.
    pub used: Bytes,
    /// What of it could be reclaimed if it were cold.
    pub reclaimable: Bytes,
    /// The least target that is not hopeless.
    pub least: Bytes,
    /// What there is for anonymous memory.
    pub swap: Swap,
}

/// Where anonymous memory could go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// Nowhere.
    None,
    /// There is room for so much of this task.
    Room(Bytes),
}

impl fmt::Display for Swap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Swap::None => f.write_str("there is no swap for its anonymous memory"),
            Swap::Room(bytes) => write!(f, "swap has room for {bytes} of it"),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { target, began_at: _, used_at_first, used, outcome } = self;
        match outcome {
            None => {
                write!(f, "the limit is to come down to {target}: {used} in use, {used_at_first} at first")
            }
            Some(Outcome::Done { freed }) => {
                write!(f, "the limit came down to {target}: {freed} were cold and are reclaimed")
            }
            Some(Outcome::Aborted { reason, cold }) => write!(
                f,
                "the limit did not come down to {target}, and is what it was: {reason}. Of {used_at_first} in use, \
                 {cold} could be reclaimed"
            ),
            Some(Outcome::Ended) => write!(f, "the task ended before its limit came down to {target}"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Stalled { full_us, some_us, window_us } => write!(
                f,
                "the task waited for memory: all of it for {} ms, a part for {} ms, of {} ms",
                full_us / 1000,
                some_us / 1000,
                window_us / 1000
            ),
            Reason::WorkingSet { taken, refaulted } => {
                write!(f, "the task needs what is taken: of {taken} it touched {refaulted} again at once")
            }
            Reason::NotReclaimable { reclaimable } => {
                write!(
                    f,
                    "only {reclaimable} more could be reclaimed; the rest is anonymous, and swap is full or absent"
                )
            }
            Reason::Outgrown => f.write_str("the task takes new memory as fast as old is reclaimed"),
            Reason::NoProgress => f.write_str("its use does not fall any more"),
            Reason::Deadline => f.write_str("it took too long"),
            Reason::OomKill => f.write_str("the kernel killed a process of it for want of memory"),
            Reason::Failed(text) => f.write_str(text),
            Reason::Cancelled => f.write_str("it was called off"),
        }
    }
}

/// A conversation under way, or over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shrink {
    target: u64,
    before: Before,
    /// Whether memory is taken to get there; else it is given up when use is above the goal.
    reclaims: bool,
    phase: Phase,
    /// Use when it began.
    first_used: u64,
    oom_kills: u64,
    began: u64,
    deadline: u64,
    last: Observation,
    /// `memory.high` as last asked for.
    high: Limit<Bytes>,
    chunk: u64,
    round: Option<Round>,
    bad_rounds: u32,
    stuck: u32,
    fall: Fall,
    /// Since when use has been at the goal.
    at_goal: Option<u64>,
    stalls: Stalls,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Reclaiming,
    Capped { since: u64 },
    Over(Outcome),
}

/// A chunk, and what the task makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Round {
    asked: u64,
    /// Refaults when it was asked for.
    refaulted: u64,
    /// When it was over; `None` while it is under way.
    over_at: Option<u64>,
}

/// How far use has fallen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fall {
    lowest: u64,
    at: u64,
    /// Taken since.
    taken: u64,
    /// Refaults then.
    refaulted: u64,
}

impl Shrink {
    /// Begins one. `before` are the limits in force.
    pub fn begin(
        target: Bytes,
        before: Before,
        swap: Swap,
        seen: &Observation,
        now_ns: u64,
    ) -> Result<Shrink, NotReclaimable> {
        let stays = seen.used.0.saturating_sub(seen.reclaimable.0);
        if stays > goal(target.0) {
            let least = Bytes(stays + 2 * margin(stays));
            let Observation { used, reclaimable, .. } = *seen;
            return Err(NotReclaimable { target, used, reclaimable, least, swap });
        }
        let mut shrink = Shrink {
            target: target.0,
            before,
            reclaims: true,
            phase: Phase::Reclaiming,
            first_used: seen.used.0,
            oom_kills: seen.oom_kills,
            began: now_ns,
            deadline: 0,
            last: *seen,
            high: before.high,
            chunk: 0,
            round: None,
            bad_rounds: 0,
            stuck: 0,
            fall: Fall { lowest: seen.used.0, at: now_ns, taken: 0, refaulted: seen.refaulted.0 },
            at_goal: None,
            stalls: Stalls::default(),
        };
        shrink.stalls.add(seen, now_ns);
        shrink.aim_at(target.0, now_ns);
        Ok(shrink)
    }

    /// The same for a limit that is above use: nothing is taken, and when use comes near it, it is given up.
    #[must_use]
    pub fn without_reclaim(self) -> Shrink {
        Shrink { reclaims: false, ..self }
    }

    /// What is aimed at.
    pub fn target(&self) -> Bytes {
        Bytes(self.target)
    }

    /// The limits that it goes back to.
    pub fn before(&self) -> Before {
        self.before
    }

    /// What is told of one that began at that time.
    pub fn status(&self, began_at: UnixNanos) -> Status {
        Status {
            target: self.target(),
            began_at,
            used_at_first: Bytes(self.first_used),
            used: self.last.used,
            outcome: self.outcome().cloned(),
        }
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.phase {
            Phase::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    fn aim_at(&mut self, target: u64, now: u64) {
        self.target = target;
        let distance = self.last.used.0.saturating_sub(goal(target));
        self.deadline = now + DEADLINE + distance / MIB * (DEADLINE_PER_GIB / KIB);
        self.chunk = (distance / 16).clamp(CHUNK_MIN, CHUNK_FIRST_MAX);
        self.bad_rounds = 0;
        self.stuck = 0;
        self.at_goal = None;
        self.fall = Fall { lowest: self.last.used.0, at: now, taken: 0, refaulted: self.last.refaulted.0 };
    }

    fn observed(&mut self, seen: &Observation, now: u64) -> Vec<Action> {
        self.last = *seen;
        self.stalls.add(seen, now);
        let stall = self.stalls.judge();
        if seen.oom_kills > self.oom_kills {
            return self.abort(Reason::OomKill);
        }
        self.oom_kills = seen.oom_kills;
        if stall.is_too_long() {
            let Stall { full_us, some_us, window_us } = stall;
            return self.abort(Reason::Stalled { full_us, some_us, window_us });
        }
        if let Phase::Capped { since } = self.phase {
            return if now.saturating_sub(since) >= VERIFY { self.done() } else { Vec::new() };
        }
        if now > self.deadline {
            return self.abort(Reason::Deadline);
        }
        let used = seen.used.0;
        if used.saturating_add(FALL) <= self.fall.lowest {
            self.fall = Fall { lowest: used, at: now, taken: 0, refaulted: seen.refaulted.0 };
        }
        if used <= goal(self.target) {
            return self.settle(used, &stall, now);
        }
        self.at_goal = None;
        if !self.reclaims {
            return self.abort(Reason::Outgrown);
        }
        if now.saturating_sub(self.fall.at) > PATIENCE {
            return self.give_up(seen);
        }
        let is_stuck = used.saturating_sub(seen.reclaimable.0) > goal(self.target);
        self.stuck = if is_stuck { self.stuck + 1 } else { 0 };
        if self.stuck >= STUCK_MAX {
            return self.abort(Reason::NotReclaimable { reclaimable: seen.reclaimable });
        }
        if let Some(round) = self.round {
            if round.over_at.is_none_or(|at| now.saturating_sub(at) < LISTEN) {
                return Vec::new();
            }
            self.round = None;
            if let Some(reason) = self.judge(&round, seen, &stall) {
                return self.abort(reason);
            }
        }
        if stall.is_calm() { self.ask(seen) } else { Vec::new() }
    }

    /// What the task has made of the last chunk decides about the size of the next.
    fn judge(&mut self, round: &Round, seen: &Observation, stall: &Stall) -> Option<Reason> {
        let back = seen.refaulted.0.saturating_sub(round.refaulted);
        let is_missed = back > round.asked / 2 && back >= FALL;
        if is_missed || !stall.is_calm() {
            self.chunk = (self.chunk / 2).max(CHUNK_MIN);
        } else {
            self.chunk = (self.chunk * 2).min(CHUNK_MAX);
        }
        self.bad_rounds = if is_missed { self.bad_rounds + 1 } else { 0 };
        (self.bad_rounds >= ROUNDS_MAX)
            .then_some(Reason::WorkingSet { taken: Bytes(round.asked), refaulted: Bytes(back) })
    }

    /// Asks for a chunk. What it will take, the task may have back at once: it is not throttled for that.
    fn ask(&mut self, seen: &Observation) -> Vec<Action> {
        let used = seen.used.0;
        let chunk = self.chunk.min(used.saturating_sub(aim(self.target))).max(CHUNK_MIN);
        self.round = Some(Round { asked: chunk, refaulted: seen.refaulted.0, over_at: None });
        let mut actions = self.lower_high(used.saturating_add(slack(used)));
        actions.push(Action::Reclaim(Bytes(chunk)));
        actions
    }

    /// Brings `memory.high` down to `to`, but not below the target, and not for little.
    fn lower_high(&mut self, to: u64) -> Vec<Action> {
        let to = pages(to.max(self.target));
        let is_worth = match self.high {
            Limit::Unlimited => true,
            Limit::At(Bytes(high)) => {
                high.saturating_sub(to) >= FALL || (high > to && to == pages(self.target))
            }
        };
        if !is_worth {
            return Vec::new();
        }
        self.high = Limit::At(Bytes(to));
        vec![Action::SetHigh(self.high)]
    }

    /// Use is at the goal: once that has lasted, and is calm, the limit is written.
    fn settle(&mut self, used: u64, stall: &Stall, now: u64) -> Vec<Action> {
        let since = *self.at_goal.get_or_insert(now);
        let mut actions = self.lower_high(self.target);
        if now.saturating_sub(since) >= SETTLE && stall.is_calm() && used <= self.target {
            actions.extend(self.stop_reclaim());
            self.phase = Phase::Capped { since: now };
            actions.push(Action::SetMax(Limit::At(Bytes(self.target))));
        }
        actions
    }

    /// Use has not fallen for long.
    fn give_up(&mut self, seen: &Observation) -> Vec<Action> {
        let back = seen.refaulted.0.saturating_sub(self.fall.refaulted);
        let taken = self.fall.taken;
        let reason = if taken > 2 * FALL && back > taken / 2 {
            Reason::WorkingSet { taken: Bytes(taken), refaulted: Bytes(back) }
        } else if taken > 2 * FALL {
            Reason::Outgrown
        } else {
            Reason::NoProgress
        };
        self.abort(reason)
    }

    fn done(&mut self) -> Vec<Action> {
        let freed = Bytes(self.first_used.saturating_sub(self.last.used.0));
        self.finish(Vec::new(), Outcome::Done { freed })
    }

    fn abort(&mut self, reason: Reason) -> Vec<Action> {
        let mut actions = Vec::new();
        actions.extend(self.stop_reclaim());
        if matches!(self.phase, Phase::Capped { .. }) {
            actions.push(Action::SetMax(self.before.max));
        }
        let cold = Bytes(self.first_used.saturating_sub(self.fall.lowest));
        self.finish(actions, Outcome::Aborted { reason, cold })
    }

    fn stop_reclaim(&mut self) -> Option<Action> {
        let round = self.round.take()?;
        round.over_at.is_none().then_some(Action::StopReclaim)
    }

    fn finish(&mut self, mut actions: Vec<Action>, outcome: Outcome) -> Vec<Action> {
        if self.high != self.before.high {
            self.high = self.before.high;
            actions.push(Action::SetHigh(self.high));
        }
        self.phase = Phase::Over(outcome.clone());
        actions.push(Action::Finish(outcome));
        actions
    }

    fn retarget(&mut self, target: u64, now: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.phase, Phase::Capped { .. }) {
            actions.push(Action::SetMax(self.before.max));
            self.phase = Phase::Reclaiming;
        }
        self.aim_at(target, now);
        self.reclaims = true;
        // A high that was right for the old target may hold the task below the new one.
        let used = self.last.used.0;
        let least = pages(used.saturating_add(slack(used)).max(target));
        if self.high != self.before.high && self.high.at().is_some_and(|Bytes(high)| high < least) {
            self.high = match self.before.high {
                Limit::At(Bytes(before)) if before <= least => self.before.high,
                _ => Limit::At(Bytes(least)),
            };
            actions.push(Action::SetHigh(self.high));
        }
        actions
    }
}

/// Goes on with a conversation. `now_ns` is monotonic; its origin does not matter.
pub fn on_event(shrink: &mut Shrink, event: Event, now_ns: u64) -> Vec<Action> {
    if matches!(shrink.phase, Phase::Over(_)) {
        return Vec::new();
    }
    let now = now_ns.max(shrink.began);
    match event {
        Event::Observed(seen) => shrink.observed(&seen, now),
        Event::Reclaimed => {
            if let Some(round) = &mut shrink.round
                && round.over_at.is_none()
            {
                round.over_at = Some(now);
                shrink.fall.taken = shrink.fall.taken.saturating_add(round.asked);
            }
            Vec::new()
        }
        Event::Refused => {
            if matches!(shrink.phase, Phase::Capped { .. }) {
                shrink.phase = Phase::Reclaiming;
            }
            shrink.at_goal = None;
            Vec::new()
        }
        Event::Failed(text) => shrink.abort(Reason::Failed(text)),
        Event::Retargeted(Bytes(target)) => shrink.retarget(target, now),
        Event::Cancelled => shrink.abort(Reason::Cancelled),
        Event::Ended => {
            shrink.phase = Phase::Over(Outcome::Ended);
            vec![Action::Finish(Outcome::Ended)]
        }
    }
}

/// Use at or below this is low enough for the target: what a task takes between two looks must not meet the limit.
fn goal(target: u64) -> u64 {
    target.saturating_sub(margin(target))
}

/// Reclaim goes on to here: a task that grows a little is still at the goal when that has been seen.
fn aim(target: u64) -> u64 {
    target.saturating_sub(2 * margin(target))
}

fn margin(target: u64) -> u64 {
    (target / 64).clamp(512 * KIB, 64 * MIB)
}

/// What a task may take between two chunks without being throttled.
fn slack(used: u64) -> u64 {
    (used / 32).max(4 * MIB)
}

/// The kernel keeps whole pages, and shows what it keeps; of every size that it has.
fn pages(bytes: u64) -> u64 {
    const LARGEST_PAGE: u64 = 64 * KIB;
    bytes.checked_next_multiple_of(LARGEST_PAGE).unwrap_or(bytes)
}

/// Stall totals of the last moments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stalls {
    /// When, and how long all of it and some of it had waited since the conversation began; oldest first.
    samples: VecDeque<(u64, u64, u64)>,
    totals: (u64, u64),
}

/// How long a task waited in the last window.
#[derive(Clone, Copy, Debug)]
struct Stall {
    full_us: u64,
    some_us: u64,
    window_us: u64,
}

impl Stalls {
    fn add(&mut self, seen: &Observation, now: u64) {
        let (_, full, some) = self.samples.back().copied().unwrap_or((now, 0, 0));
        let since = |now: u64, before: u64| if now < before { now } else { now - before };
        let (full, some) = match self.samples.is_empty() {
            true => (0, 0),
            false => (
                full + since(seen.full_stall_us, self.totals.0),
                some + since(seen.some_stall_us, self.totals.1),
            ),
        };
        self.totals = (seen.full_stall_us, seen.some_stall_us);
        self.samples.push_back((now, full, some));
        // The oldest that is kept is as old as the window, or older.
        while self.samples.get(1).is_some_and(|(at, ..)| now.saturating_sub(*at) >= WINDOW) {
            self.samples.pop_front();
        }
    }

    fn judge(&self) -> Stall {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return Stall { full_us: 0, some_us: 0, window_us: WINDOW / 1000 };
        };
        Stall {
            full_us: last.1 - first.1,
            some_us: last.2 - first.2,
            window_us: last.0.saturating_sub(first.0).max(WINDOW) / 1000,
        }
    }
}

impl Stall {
    fn is_too_long(&self) -> bool {
        self.full_us * 100 >= self.window_us * FULL_MAX || self.some_us * 100 >= self.window_us * SOME_MAX
    }

    fn is_calm(&self) -> bool {
        self.full_us * 100 <= self.window_us * FULL_CALM
    }
}
