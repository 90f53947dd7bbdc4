//! What it costs to know so much about so many.

use std::{hint::black_box, time::Instant};

use anyhow::Result;
use shaper_core::{
    profile::{Model, Prices, Resource, Sample, Tracker, Unmet},
    spec::Priority,
    units::Micros,
};
use shaper_tests::random::Random;

use crate::{Plan, report::Report};

const KEYS: usize = 10_000;
const UPDATES: usize = 500_000;
const QUICK: usize = 5;
/// Samples of each before anything is measured: a day and a half, so that models are as full as they get.
const WARM: usize = 2_000;
/// Models whose samples differ; the others are copies of them.
const KINDS: usize = 16;
const MINUTE: Micros = Micros(60_000_000);

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let prices = Prices::of(Resource::Cpu, Priority::Medium);
    let mut random = Random(1);
    // Anything from a hundredth of a core to a hundred: more different uses than any task has.
    let mut minute = 0;
    let mut sample = move || {
        minute += 1;
        let used = 10_u64 << random.below(14);
        Sample {
            used: used + random.below(used),
            over: MINUTE,
            at: minute * 60_000_000_000,
            unmet: Unmet::Nothing,
        }
    };
    let mut kinds: Vec<(Model, Tracker)> = (0..KINDS)
        .map(|_| {
            let (mut model, mut tracker) = (Model::default(), Tracker::new(Resource::Cpu));
            for _ in 0..WARM {
                tracker.observe(&mut model, &prices, &sample());
            }
            (model, tracker)
        })
        .collect();
    let all: Vec<(Model, Tracker)> =
        (0..KEYS * Resource::ALL.len()).map(|number| kinds[number % KINDS].clone()).collect();
    let bytes: usize = all.iter().map(|(model, _)| model.bytes() + size_of::<(Model, Tracker)>()).sum();
    report.at_most(
        200.0,
        "10,000 kinds of tasks, 6 resources each, all models full",
        bytes as f64 / 1_048_576.0,
        "MiB",
    );
    drop(black_box(all));

    let updates = if plan.is_quick { UPDATES / QUICK } else { UPDATES };
    let samples: Vec<Sample> = (0..updates).map(|_| sample()).collect();
    let mut limits = [None; KINDS];
    let start = Instant::now();
    for (number, sample) in samples.iter().enumerate() {
        let (model, tracker) = &mut kinds[number % KINDS];
        tracker.observe(model, &prices, sample);
        let limit = &mut limits[number % KINDS];
        *limit = tracker.advise(model, &prices, *limit, 1.0 / 60.0).map(|advice| advice.limit);
    }
    let each = start.elapsed().as_secs_f64() * 1e6 / updates as f64;
    black_box(limits);
    report.at_most(10.0, "a sample booked, and its advice, in a full model", each, "us");
    Ok(())
}
