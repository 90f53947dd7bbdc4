//! Taking away what a running task does not use, before anybody is short of it.
//!
//! # Why
//!
//! What a task has touched once stays charged to it until something reclaims it, and as long as there is room nothing
//! does. So use says little about need, and what lies idle cannot be granted to another. Asking the kernel
//! (`memory.reclaim`) for a little, again and again, finds out: the kernel offers what was used least recently, and the
//! task touches again what it needed. (Meta's Senpai and TMO do this.) No limit is changed by it: what the task misses, it
//! has back at once.
//!
//! # How
//!
//! [`Idle::observed`] is shown an [`Observation`] every second or so. Now and then it answers with a chunk to be
//! reclaimed; [`Idle::reclaimed`] tells what came of that.
//!
//! ```text
//!             ┌── not missed: a larger chunk ──┐
//!             ▼                                │
//!        Reclaiming ── a chunk ── two seconds ─┴─ missed, or it waits for memory ─▶ Resting
//!             ▲                                                                        │
//!             └──────────────── 10 s, 40 s, … 10 min ──────────────────────────────────┘
//! ```
//!
//! - **A chunk** is a 256th of what is in use at first, and twice that after each that is not missed, up to a 32nd. In a minute
//!   no more than a quarter is taken: what is needed once a minute, too, is missed before much of it is gone.
//! - **It is missed** when a quarter of the last chunk, or an eighth of what was taken in the last minute, came back
//!   (refaults). Or a part of the task waited for memory for more than a thousandth of the last ten seconds (PSI `some`),
//!   whoever is to blame: such a task has nothing to spare.
//! - **Then it rests**, four times as long each time unless four minutes went well before: once the working set is reached,
//!   what remains is one chunk every ten minutes, to find out whether that has changed. (It may cost more than was asked
//!   for: a kernel that finds nothing idle looks at everything, and takes what was not touched while it looked. Linux
//!   6.12 with multi-generational LRU took up to 27 of 40 MiB, all in use, where 0.5 were asked for. All came back.)
//! - A task whose limit is moved or met, or that lost a process for want of memory, is left alone for a while
//!   ([`Idle::disturb`]).

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, fmt};

use serde::{Deserialize, Serialize};

pub use crate::shrink::Observation;
use crate::units::Bytes;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// How long the task has, after a chunk, to touch what it misses.
const LISTEN: u64 = 2 * SECOND;
/// Over this long pressure is judged …
const PRESSURE_WINDOW: u64 = 10 * SECOND;
/// … and of it, some of the task may wait for so many thousandths.
const SOME_MAX_PERMILLE: u64 = 1;
/// Over this long what was taken is compared with what came back …
const WINDOW: u64 = 60 * SECOND;
/// … and no more than this part of use is taken.
const WINDOW_PART: u64 = 4;
/// More than this part of a chunk that came back was missed …
const MISSED_PART: u64 = 4;
/// … or more than this part of what was taken in the window.
const MISSED_PART_OF_WINDOW: u64 = 8;
/// Less that came back is noise.
const NOISE: u64 = 64 * KIB;
const CHUNK_MIN: u64 = 512 * KIB;
const CHUNK_MAX: u64 = 64 * MIB;
const FIRST_PART: u64 = 256;
const MOST_PART: u64 = 32;
const REST_FIRST: u64 = 10 * SECOND;
const REST_GROWTH: u64 = 4;
const REST_MAX: u64 = 600 * SECOND;
/// When so long went well, the next rest is a short one.
const WENT_WELL: u64 = 240 * SECOND;
/// After a limit was moved or met.
const DISTURBED: u64 = 30 * SECOND;
/// A task that uses no more than this has nothing that is worth the trouble.
const USED_MIN: u64 = 4 * MIB;

/// What is remembered of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idle {
    state: State,
    /// Until when it rests.
    rest_until: u64,
    /// How long the last rest was; 0: there was none.
    rest: u64,
    /// The size of the next chunk; 0: to be reckoned from use.
    chunk: u64,
    round: Option<Round>,
    /// What was seen in the last minute, oldest first …
    samples: VecDeque<Sample>,
    /// … of which what is older than the last rest has been judged.
    judge_from: u64,
    totals: Totals,
    /// The kernel's counts when last seen.
    last: Observation,
    seen_at: u64,
}

/// What is going on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// What is idle goes, chunk by chunk.
    Reclaiming,
    /// Nothing is taken for now.
    Resting(Why),
}

/// Why nothing is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It touched what was taken from it.
    WorkingSet {
        /// Taken.
        taken: Bytes,
        /// Of that: touched again.
        refaulted: Bytes,
    },
    /// A part of it waited for memory.
    Pressure {
        /// So long, µs …
        some_us: u64,
        /// … in this time, µs.
        window_us: u64,
    },
    /// There is nothing that could be taken.
    NotReclaimable,
    /// Its limit was moved or met, or the kernel killed a process of it.
    Disturbed,
}

/// What is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Taken so far.
    pub reclaimed: Bytes,
    /// Touched again since it is looked at, whoever had taken it.
    pub refaulted: Bytes,
    /// Whether only page cache can go: there is no swap for anonymous memory.
    pub is_cache_only: bool,
    /// What is going on.
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Round {
    /// Refaults when it was asked for.
    refaulted: u64,
    /// What it brought, and when it was over; `None` while it is under way.
    over: Option<(u64, u64)>,
}

/// Since this task is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    taken: u64,
    refaulted: u64,
    some_us: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    at: u64,
    used: u64,
    totals: Totals,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pressure {
    Calm,
    Waits { some_us: u64, window_us: u64 },
}

impl Idle {
    /// Begins with a task. Nothing is taken before its pressure is known.
    pub fn new(seen: &Observation, now_ns: u64) -> Idle {
        Idle {
            state: State::Reclaiming,
            rest_until: now_ns,
            rest: 0,
            chunk: 0,
            round: None,
            samples: VecDeque::new(),
            judge_from: now_ns,
            totals: Totals::default(),
            last: *seen,
            seen_at: now_ns,
        }
    }

    /// What is told of it.
    pub fn status(&self, is_cache_only: bool) -> Status {
        Status {
            reclaimed: Bytes(self.totals.taken),
            refaulted: Bytes(self.totals.refaulted),
            is_cache_only,
            state: self.state.clone(),
        }
    }

    /// Whether there is any use in looking at the task: not while it rests.
    pub fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.rest_until
    }

    fn is_under_way(&self) -> bool {
        self.round.is_some_and(|round| round.over.is_none())
    }

    /// Looks at the task; the answer is how much to reclaim, beside everything else. `may_ask`: whether a chunk can be
    /// reclaimed now. `now_ns` is monotonic; its origin does not matter.
    pub fn observed(&mut self, seen: &Observation, may_ask: bool, now_ns: u64) -> Option<Bytes> {
        let now = now_ns.max(self.seen_at);
        self.count(seen, now);
        if seen.oom_kills > self.last.oom_kills {
            self.disturb(now);
        }
        (self.last, self.seen_at) = (*seen, now);
        if self.is_under_way() || now < self.rest_until {
            return None;
        }
        if let Some(Round { refaulted, over: Some((taken, at)) }) = self.round {
            if now - at < LISTEN {
                return None;
            }
            self.round = None;
            self.judge(taken, self.totals.refaulted - refaulted, now);
        }
        if now < self.rest_until {
            return None;
        }
        match self.pressure(now)? {
            Pressure::Calm => self.ask(seen, may_ask),
            Pressure::Waits { some_us, window_us } => {
                self.begin_rest(Why::Pressure { some_us, window_us }, now);
                None
            }
        }
    }

    /// The chunk that was asked for is over, and has brought so much.
    pub fn reclaimed(&mut self, Bytes(taken): Bytes, now_ns: u64) {
        let now = now_ns.max(self.seen_at);
        if let Some(round) = &mut self.round
            && round.over.is_none()
        {
            round.over = Some((taken, now));
            self.totals.taken = self.totals.taken.saturating_add(taken);
        }
    }

    /// Its limit was moved or met: it is left alone for a while. What is under way may end.
    pub fn disturb(&mut self, now_ns: u64) {
        let now = now_ns.max(self.seen_at);
        self.state = State::Resting(Why::Disturbed);
        self.rest_until = self.rest_until.max(now.saturating_add(DISTURBED));
        self.chunk = 0;
        self.judge_from = now;
    }

    /// The kernel's counts, which may begin anew, as totals of ours; and what was seen when.
    fn count(&mut self, seen: &Observation, now: u64) {
        let since = |now: u64, before: u64| if now < before { now } else { now - before };
        let totals = &mut self.totals;
        totals.refaulted = totals.refaulted.saturating_add(since(seen.refaulted.0, self.last.refaulted.0));
        totals.some_us = totals.some_us.saturating_add(since(seen.some_stall_us, self.last.some_stall_us));
        self.samples.push_back(Sample { at: now, used: seen.used.0, totals: self.totals });
        // The oldest that is kept is as old as the window, or older.
        while self.samples.get(1).is_some_and(|sample| now - sample.at >= WINDOW) {
            self.samples.pop_front();
        }
    }

    /// What the task has made of the last chunk.
    fn judge(&mut self, taken: u64, back: u64, now: u64) {
        let first = self.samples.iter().find(|sample| sample.at >= self.judge_from);
        let first = first.map_or(self.totals, |sample| sample.totals);
        let all = (self.totals.taken - first.taken, self.totals.refaulted - first.refaulted);
        let is_missed =
            |taken: u64, back: u64, part: u64| back >= NOISE && back > taken.saturating_sub(1) / part;
        if is_missed(taken, back, MISSED_PART) {
            self.begin_rest(Why::WorkingSet { taken: Bytes(taken), refaulted: Bytes(back) }, now);
        } else if is_missed(all.0, all.1, MISSED_PART_OF_WINDOW) {
            self.begin_rest(Why::WorkingSet { taken: Bytes(all.0), refaulted: Bytes(all.1) }, now);
        } else if taken < NOISE {
            self.begin_rest(Why::NotReclaimable, now);
        } else {
            self.chunk = self.chunk.saturating_mul(2);
        }
    }

    /// Whether it waited for memory, lately; `None` while that has not been seen for long enough.
    fn pressure(&self, now: u64) -> Option<Pressure> {
        let last = self.samples.back()?;
        let is_old = |sample: &&Sample| now - sample.at >= PRESSURE_WINDOW;
        let first = self.samples.iter().rev().find(is_old).filter(|it| it.at >= self.judge_from)?;
        let some_us = last.totals.some_us - first.totals.some_us;
        let window_us = (now - first.at) / 1000;
        let waits = some_us * 1000 > window_us * SOME_MAX_PERMILLE;
        Some(if waits { Pressure::Waits { some_us, window_us } } else { Pressure::Calm })
    }

    fn begin_rest(&mut self, why: Why, now: u64) {
        self.state = State::Resting(why);
        let went_well = now.saturating_sub(self.rest_until) >= WENT_WELL;
        self.rest =
            if went_well { REST_FIRST } else { (self.rest * REST_GROWTH).clamp(REST_FIRST, REST_MAX) };
        self.rest_until = now.saturating_add(self.rest);
        self.chunk = 0;
        self.judge_from = now;
    }

    fn ask(&mut self, seen: &Observation, may_ask: bool) -> Option<Bytes> {
        let used = seen.used.0;
        let first = (used / FIRST_PART).clamp(CHUNK_MIN, CHUNK_MAX);
        let most = (used / MOST_PART).clamp(CHUNK_MIN, CHUNK_MAX);
        let chunk = self.chunk.max(first).min(most);
        if used < USED_MIN || seen.reclaimable.0 < chunk {
            self.state = State::Resting(Why::NotReclaimable);
            return None;
        }
        self.state = State::Reclaiming;
        let taken = |sample: &Sample| self.totals.taken - sample.totals.taken;
        let is_too_much =
            self.samples.front().is_some_and(|first| taken(first) + chunk > first.used / WINDOW_PART);
        if is_too_much || !may_ask {
            return None;
        }
        self.chunk = chunk;
        self.round = Some(Round { refaulted: self.totals.refaulted, over: None });
        Some(Bytes(chunk))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { reclaimed, refaulted: _, is_cache_only, state } = self;
        write!(f, "{reclaimed} reclaimed")?;
        match state {
            State::Reclaiming => f.write_str(", more as long as it is not missed")?,
            State::Resting(why) => write!(f, "; none now: {why}")?,
        }
        if *is_cache_only {
            f.write_str(" (page cache alone: there is no swap for anonymous memory)")?;
        }
        Ok(())
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::WorkingSet { taken, refaulted } => {
                write!(f, "the rest is in use, of {taken} it touched {refaulted} again")
            }
            Why::Pressure { some_us, window_us } => write!(
                f,
                "a part of the task waited for memory for {} ms of {} s",
                some_us / 1000,
                window_us / 1_000_000
            ),
            Why::NotReclaimable => f.write_str("there is nothing that could be taken"),
            Why::Disturbed => f.write_str("its limit was moved or met a moment ago"),
        }
    }
}
