//! One task beside the model of its kind: where it stands, and what its limit should be.

use super::{Expected, Model, Prices, RECENT, Resource, Sample, model::bucket};

/// What a limit loses that is not changed, is forgiven at this rate while it is as good as the best.
const FORGIVEN: f64 = 0.5;
/// As good as the best: it costs at most so much more.
const AS_GOOD: f64 = 1.02;

/// Where one resource of one task stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Tracker {
    resource: Resource,
    /// The buckets of the last samples.
    recent: [u16; RECENT],
    samples: u32,
    /// Use times hours, and hours, both fading: their ratio is the mean.
    used: f64,
    hours: f64,
    /// What was lost by the limit in force, h.
    lost: f64,
}

/// Why a limit is advised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There was none.
    First,
    /// What is in force has cost more, since it was set, than a change does.
    Change,
    /// What is in force is the best, or not yet too dear.
    Keep,
}

/// What the limit should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Advice {
    /// In the unit of the resource.
    pub limit: u64,
    /// Why.
    pub reason: Reason,
    /// The limit that costs least, whether it is worth a change or not.
    pub best: u64,
    /// What is to be expected of `limit`.
    pub expected: Expected,
    /// What the limit in force has lost against the best so far, h; beside [`Prices::change`].
    pub lost: f64,
}

impl Tracker {
    /// A task that has not been seen.
    pub fn new(resource: Resource) -> Tracker {
        Tracker { resource, recent: [0; RECENT], samples: 0, used: 0.0, hours: 0.0, lost: 0.0 }
    }

    /// How many samples were booked.
    pub fn samples(&self) -> u32 {
        self.samples
    }

    /// Books a sample, here and in the model of the task's kind.
    pub fn observe(&mut self, model: &mut Model, prices: &Prices, sample: &Sample) {
        let (demand, hours) = (sample.demand() / self.least(), sample.hours());
        let bucket = bucket(demand);
        model.fade_for(sample, prices.half_life);
        // The first sample follows nothing: it is its own level.
        model.learn(self.level().unwrap_or(bucket), bucket, hours);
        let faded = (-hours / prices.half_life).exp2();
        self.used = self.used * faded + demand * hours;
        self.hours = self.hours * faded + hours;
        self.recent[self.samples as usize % RECENT] = bucket;
        self.samples = self.samples.saturating_add(1);
    }

    /// What the limit should be, `hours` after it was last asked, where `in_force` is what is in force. Nothing is advised
    /// for a kind of task of which nothing is known.
    pub fn advise(
        &mut self,
        model: &Model,
        prices: &Prices,
        in_force: Option<u64>,
        hours: f64,
    ) -> Option<Advice> {
        let outlook = model.outlook(self.level())?;
        let mean = if self.hours > 0.0 { self.used / self.hours } else { outlook.mean() }.max(1.0);
        let (best, least_cost) = outlook.cheapest(mean, prices);
        let best_limit = self.in_units(best);
        let Some(in_force) = in_force else {
            self.lost = 0.0;
            let expected = outlook.expected(best, mean);
            return Some(Advice {
                limit: best_limit,
                reason: Reason::First,
                best: best_limit,
                expected,
                lost: 0.0,
            });
        };
        let held = outlook.expected(in_force as f64 / self.least(), mean);
        let cost = prices.cost(&held);
        self.lost += (cost - least_cost).max(0.0) * hours;
        if cost <= least_cost * AS_GOOD {
            self.lost *= FORGIVEN;
        }
        let lost = self.lost;
        let differs = best_limit.abs_diff(in_force) as f64 > prices.dead_band * in_force as f64;
        if lost > prices.change && differs {
            self.lost = 0.0;
            let expected = outlook.expected(best, mean);
            return Some(Advice {
                limit: best_limit,
                reason: Reason::Change,
                best: best_limit,
                expected,
                lost,
            });
        }
        Some(Advice { limit: in_force, reason: Reason::Keep, best: best_limit, expected: held, lost })
    }

    /// The most of the last samples, as a bucket.
    pub(super) fn level(&self) -> Option<u16> {
        let seen = RECENT.min(self.samples as usize);
        self.recent[..seen].iter().copied().max()
    }

    #[expect(clippy::cast_precision_loss, reason = "a figure of five per cent's precision")]
    fn least(&self) -> f64 {
        self.resource.least() as f64
    }

    /// From least limits, rounded up.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and saturating is right"
    )]
    fn in_units(&self, limit: f64) -> u64 {
        (limit * self.least()).ceil() as u64
    }
}
