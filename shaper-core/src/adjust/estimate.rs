//! What a task needs, found out by giving it more and by taking back what it leaves.
//!
//! Use alone tells the need of a task only while its ceiling is out of its reach. So the estimate has
//! two halves:
//!
//! - **Up, at once.** Throttling for 5 % of the time means that the need is hidden: it is taken for a
//!   quarter more than the grant. With the headroom on top of that, a grant grows by half a step, from a
//!   fifth of a core to two cores in six. A task that fills its grant and is not throttled hides nothing
//!   (one busy thread fills a core and wants no more): its need is its use, and all that it is given is
//!   headroom, where there is some, so that it stays that way.
//! - **Down, slowly.** Use below 70 % of the grant, for two seconds without a break, means that the need
//!   is overrated: it loses a tenth, and another every 500 ms, down to the use. So does a need that is
//!   beyond the grant although the grant does not stop the task.
//!
//! Between 70 and 90 % nothing happens. A need that equals the use puts the use at 80 % of the grant, in
//! the middle of that band, and so a steady task ends there and stays.
//!
//! **Where throttling is not counted** (the network; CPU on some hosts) 95 % has to do as its sign, and
//! two tasks on a full node that just have what they need look as if each wanted more. They would take
//! the last few percent from one another for ever. So what a task was seen to be content with counts as
//! its need for ten seconds, unless it uses more.

use std::collections::BTreeMap;

use super::Resource;
use crate::id::ExecutionId;

pub(super) type Estimates = BTreeMap<ExecutionId, Estimate>;

const MILLI: u64 = 1_000_000;

/// Use that falls is believed by this time constant; use that rises, at once.
const FALL_NS: u64 = 1_000 * MILLI;
/// How long a task must leave its grant unused before the first bit is taken back.
const QUIET_NS: u64 = 2_000 * MILLI;
/// A tenth is taken back as often as this: 19 % a second.
const GIVE_BACK_NS: u64 = 500 * MILLI;
/// A task is short for this long after it last was: throttling comes in bursts.
const SHORT_NS: u64 = 1_000 * MILLI;
/// For so long a task is believed to need what it was content with, and 5 % more at most.
const CONTENT_NS: u64 = 10_000 * MILLI;
/// Throttled for less than this, in thousandths of the time, is a coincidence.
const THROTTLED_PERMILLE: u32 = 50;

/// One task and one resource, as observed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) capacity: u64,
    pub(super) request: u64,
    pub(super) limit: Option<u64>,
    pub(super) grant: Option<u64>,
    pub(super) used: u64,
    pub(super) throttled_permille: Option<u32>,
}

/// What is believed of one task and one resource.
#[derive(Clone, Debug)]
pub(super) struct Estimate {
    used: u64,
    need: u64,
    /// When the next tenth of the need is given up, while the task leaves its grant unused.
    give_back_at: Option<u64>,
    short_until: Option<u64>,
    /// What it used when it last left some of its grant, and until when that counts.
    content: Option<(u64, u64)>,
}

impl Estimate {
    /// A task seen for the first time: what it has is taken for what it should have.
    pub(super) fn new(sample: &Sample, ceiling: u64) -> Estimate {
        let grant = sample.grant.unwrap_or(ceiling).min(ceiling);
        Estimate {
            used: 0,
            need: without_headroom(grant),
            give_back_at: None,
            short_until: None,
            content: None,
        }
    }

    pub(super) fn update(
        &mut self,
        resource: Resource,
        sample: &Sample,
        ceiling: u64,
        now: u64,
        elapsed: u64,
    ) {
        let fall = part(self.used.saturating_sub(sample.used), elapsed.min(FALL_NS), FALL_NS);
        self.used = sample.used.max(self.used - fall);

        let grant = sample.grant.unwrap_or(ceiling).min(ceiling);
        let fills = |percent: u64| u128::from(self.used) * 100 >= u128::from(grant) * u128::from(percent);
        let throttled = sample.throttled_permille.map(|permille| permille >= THROTTLED_PERMILLE);
        let content =
            self.content.filter(|(used, until)| now < *until && self.used - self.used / 20 <= *used);
        let stopped = throttled.unwrap_or(fills(95));
        match (stopped, content) {
            (false, _) => {}
            // Told by use alone, and known better.
            (true, Some((used, _))) if throttled.is_none() => self.need = self.need.max(used),
            (true, _) => {
                let more = grant.saturating_add((grant / 4).max(resource.least_change));
                self.need = self.need.max(more);
            }
        }
        self.need = self.need.max(self.used).min(ceiling);
        if !stopped {
            self.content = Some((self.used, now.saturating_add(CONTENT_NS)));
        }

        let short = throttled.unwrap_or(stopped && self.need > grant);
        if short {
            self.short_until = Some(now.saturating_add(SHORT_NS));
        }
        if short || (fills(70) && self.need <= grant) {
            self.give_back_at = None;
        } else {
            let due = *self.give_back_at.get_or_insert(now.saturating_add(QUIET_NS));
            if now >= due {
                self.give_back_at = Some(now.saturating_add(GIVE_BACK_NS));
                self.need = (self.need - self.need.div_ceil(10)).max(self.used).min(ceiling);
            }
        }
    }

    /// What it uses: as high as the last sample, or what an earlier one has fallen to since.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// What it would use if it could.
    pub(super) fn need(&self) -> u64 {
        self.need
    }

    /// Whether its grant stops it, or did within the last second.
    pub(super) fn is_short(&self, now: u64) -> bool {
        self.short_until.is_some_and(|until| now < until)
    }
}

/// The need whose grant, with headroom, is `grant`.
fn without_headroom(grant: u64) -> u64 {
    grant - grant / 5
}

/// `value` times `numerator / denominator`, of which the numerator is the smaller, rounded up.
fn part(value: u64, numerator: u64, denominator: u64) -> u64 {
    let part = (u128::from(value) * u128::from(numerator)).div_ceil(denominator.into());
    u64::try_from(part).unwrap_or(value)
}
