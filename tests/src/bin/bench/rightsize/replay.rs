//! CPU: every recorded series, by the protocol of the data's README. The first day warms up; then a limit is set for each
//! step from the past alone.

use std::path::Path;

use anyhow::Result;
use shaper_core::{
    profile::{Model, Prices, Resource, Sample, Tracker, Unmet, vpa::Recommender},
    spec::Priority,
    units::Micros,
};
use shaper_tests::{
    random::Random,
    statistics::{mean, quantile},
};

use super::{
    plot,
    series::{self, Series, Set},
};
use crate::{Plan, report::Report, traces};

const DAY: u64 = 86_400;
/// A limit changes only if it would by more than this share.
const DEAD_BAND: f64 = 0.05;
/// Prices of a want, as multiples of the usual ones: the trade-off.
const FACTORS: [f64; 9] = [0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0];
/// Percentiles of VPA's, beside its own.
const PERCENTILES: [f64; 7] = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99];
const VPA_PERCENTILE: f64 = 0.9;
const VPA_MARGIN: f64 = 1.15;
/// Draws of the bootstrap.
const DRAWS: usize = 10_000;
const SEED: u64 = 42;
const PLOT: &str = "docs/rightsizing.svg";

/// What came of a series.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// How much of the limit was not used, %: the mean over steps of 1 − min(use, limit)/limit.
    pub(super) slack: f64,
    /// Steps with use above the limit, %.
    pub(super) over: f64,
    /// Use above the limit, % of use.
    pub(super) unserved: f64,
    /// Changes of the limit a day.
    pub(super) changes: f64,
}

/// What sets limits.
trait Rule {
    fn observe(&mut self, sample: &Sample);
    /// The limit for the next step, where `in_force` is what the last one had.
    fn limit(&mut self, in_force: Option<u64>, hours: f64) -> Option<u64>;
}

impl Rule for Recommender {
    fn observe(&mut self, sample: &Sample) {
        self.observe(sample);
    }

    fn limit(&mut self, _: Option<u64>, _: f64) -> Option<u64> {
        self.target()
    }
}

struct Ours {
    model: Model,
    tracker: Tracker,
    prices: Prices,
}

impl Ours {
    fn new(prices: Prices) -> Ours {
        Ours { model: Model::default(), tracker: Tracker::new(Resource::Cpu), prices }
    }
}

impl Rule for Ours {
    fn observe(&mut self, sample: &Sample) {
        self.tracker.observe(&mut self.model, &self.prices, sample);
    }

    fn limit(&mut self, in_force: Option<u64>, hours: f64) -> Option<u64> {
        self.tracker.advise(&self.model, &self.prices, in_force, hours).map(|advice| advice.limit)
    }
}

/// What a rule sees of use above its limit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    /// All of it: a trace's demand is not cut off.
    Whole,
    /// Use is cut off at the limit, and the kernel says for what share of the time the task was held.
    CutOff,
}

fn replay(series: &Series, rule: &mut dyn Rule, sight: Sight) -> Outcome {
    let hours = series.step as f64 / 3600.0;
    let warm = (DAY / series.step) as usize;
    let (mut in_force, mut changes, mut total) = (None::<u64>, 0_u32, 0.0);
    let mut outcome = Outcome::default();
    for (step, &used) in series.used.iter().enumerate() {
        let over = Micros(series.step * 1_000_000);
        let at = (step as u64 + 1) * series.step * 1_000_000_000;
        let mut seen = Sample { used, over, at, unmet: Unmet::Nothing };
        if step >= warm {
            let next = rule.limit(in_force, hours).unwrap_or(u64::MAX);
            match in_force {
                Some(limit) if next.abs_diff(limit) as f64 <= DEAD_BAND * limit as f64 => {}
                Some(_) => {
                    changes += 1;
                    in_force = Some(next);
                }
                None => in_force = Some(next),
            }
            let limit = in_force.unwrap_or(next);
            outcome.slack += limit.saturating_sub(used) as f64 / limit as f64;
            outcome.unserved += used.saturating_sub(limit) as f64;
            outcome.over += f64::from(u8::from(used > limit));
            total += used as f64;
            if sight == Sight::CutOff && used > limit {
                seen.used = limit;
                seen.unmet = Unmet::Waited((used - limit) as f64 / used as f64);
            }
        }
        rule.observe(&seen);
    }
    let steps = series.used.len().saturating_sub(warm) as f64;
    Outcome {
        slack: 100.0 * outcome.slack / steps,
        over: 100.0 * outcome.over / steps,
        unserved: 100.0 * outcome.unserved / f64::max(total, 1.0),
        changes: f64::from(changes) * DAY as f64 / (steps * series.step as f64),
    }
}

/// All series, each with a rule of its own.
fn all<R: Rule>(series: &[Series], sight: Sight, new: impl Fn() -> R) -> Vec<Outcome> {
    series.iter().map(|one| replay(one, &mut new(), sight)).collect()
}

/// The mean over the series that count; each series counts alike.
fn pooled(outcomes: &[Outcome], of: impl Fn(&Outcome) -> bool) -> Outcome {
    let chosen: Vec<&Outcome> = outcomes.iter().filter(|outcome| of(outcome)).collect();
    let mean_of = |figure: fn(&Outcome) -> f64| mean(&chosen.iter().map(|it| figure(it)).collect::<Vec<_>>());
    Outcome {
        slack: mean_of(|it| it.slack),
        over: mean_of(|it| it.over),
        unserved: mean_of(|it| it.unserved),
        changes: mean_of(|it| it.changes),
    }
}

fn of_set(series: &[Series], outcomes: &[Outcome], set: Set) -> Outcome {
    let chosen: Vec<Outcome> =
        series.iter().zip(outcomes).filter(|(one, _)| one.set == set).map(|(_, outcome)| *outcome).collect();
    pooled(&chosen, |_| true)
}

/// The interval that has the ratio of the pooled unserved demands in 95 of 100 draws of as many series, with replacement.
fn bootstrap(ours: &[Outcome], vpa: &[Outcome]) -> [f64; 2] {
    let mut random = Random(SEED);
    let ratios: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let drawn: Vec<usize> = ours.iter().map(|_| random.below(ours.len() as u64) as usize).collect();
            let sum = |outcomes: &[Outcome]| drawn.iter().map(|&at| outcomes[at].unserved).sum::<f64>();
            sum(ours) / sum(vpa)
        })
        .collect();
    [quantile(&ratios, 25), quantile(&ratios, 975)]
}

/// What a curve (slack, figure), by rising slack, has at `slack`; nothing where it does not reach.
fn at(curve: &[(f64, f64)], slack: f64) -> Option<f64> {
    let above = curve.iter().position(|point| point.0 >= slack)?;
    let (to, from) = (curve[above], curve[above.checked_sub(1)?]);
    Some(from.1 + (to.1 - from.1) * (slack - from.0) / (to.0 - from.0))
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let Some(series) = series::cpu()? else {
        report.skip("CPU limits", &format!("there is no {}", traces::folder().join("usage").display()));
        return Ok(());
    };
    report.tell("series of CPU use", series.len() as f64, "");
    let usual = Prices::of(Resource::Cpu, Priority::Medium);
    let vpa = all(&series, Sight::Whole, || Recommender::new(Resource::Cpu));
    let ours = all(&series, Sight::Whole, || Ours::new(usual));
    let (of_vpa, of_ours) = (pooled(&vpa, |_| true), pooled(&ours, |_| true));
    report.tell("VPA's rule: slack", of_vpa.slack, "%");
    report.within(0.5, "slack, ours - VPA's", of_ours.slack - of_vpa.slack, "points");
    report.tell("VPA's rule: unserved demand", of_vpa.unserved, "%");
    report.tell("ours: unserved demand", of_ours.unserved, "%");
    report.at_most(0.5, "unserved demand, ours / VPA's, all series", of_ours.unserved / of_vpa.unserved, "");
    report.of(&bootstrap(&ours, &vpa));
    report.tell("VPA's rule: samples over the limit", of_vpa.over, "%");
    report.tell("ours: samples over the limit", of_ours.over, "%");
    report.tell("VPA's rule: changes of a limit", of_vpa.changes, "1/day");
    report.judge(
        "<= VPA's",
        of_ours.changes <= of_vpa.changes,
        "ours: changes of a limit",
        of_ours.changes,
        "1/day",
    );
    for set in Set::ALL {
        let (theirs, ours) = (of_set(&series, &vpa, set), of_set(&series, &ours, set));
        let name = set.name();
        report.tell(&format!("{name}: slack, ours - VPA's"), ours.slack - theirs.slack, "points");
        report.at_most(
            1.0,
            &format!("{name}: unserved demand, ours / VPA's"),
            ours.unserved / theirs.unserved,
            "",
        );
        report.tell(&format!("{name}: changes of a limit, ours / VPA's"), ours.changes / theirs.changes, "");
    }
    let cut = pooled(&all(&series, Sight::CutOff, || Ours::new(usual)), |_| true);
    report.tell("ours, of cut off use: unserved demand", cut.unserved, "%");
    report.tell("ours, of cut off use: slack", cut.slack, "%");
    if plan.is_quick {
        return Ok(());
    }
    trade_off(&series, &usual, report)
}

/// Both rules with other prices and percentiles: what each serves at the slack of the other.
fn trade_off(series: &[Series], usual: &Prices, report: &mut Report) -> Result<()> {
    let priced =
        |factor: f64| Prices { unserved: usual.unserved * factor, touched: usual.touched * factor, ..*usual };
    let ours: Vec<Vec<Outcome>> =
        FACTORS.iter().map(|&factor| all(series, Sight::Whole, || Ours::new(priced(factor)))).collect();
    let vpa: Vec<Vec<Outcome>> = PERCENTILES
        .iter()
        .map(|&percentile| {
            all(series, Sight::Whole, || Recommender::with(Resource::Cpu, percentile, VPA_MARGIN))
        })
        .collect();
    let usual_vpa =
        PERCENTILES.iter().position(|&percentile| percentile == VPA_PERCENTILE).unwrap_or_default();
    for set in Set::ALL {
        let theirs = of_set(series, &vpa[usual_vpa], set);
        let curve: Vec<(f64, f64)> = ours
            .iter()
            .map(|outcomes| of_set(series, outcomes, set))
            .map(|outcome| (outcome.slack, outcome.unserved))
            .collect();
        let metric = format!("{}: unserved demand at VPA's slack of this set, ours / VPA's", set.name());
        match at(&curve, theirs.slack) {
            Some(unserved) => report.at_most(1.0, &metric, unserved / theirs.unserved, ""),
            None => report.skip(&metric, "no price gives that slack"),
        }
    }
    let curves = |outcomes: &[Vec<Outcome>]| -> Vec<Outcome> {
        outcomes.iter().map(|outcomes| pooled(outcomes, |_| true)).collect()
    };
    plot::draw(Path::new(PLOT), &curves(&ours), &curves(&vpa))?;
    crate::say(&format!("the trade-off is drawn in {PLOT}"));
    Ok(())
}
