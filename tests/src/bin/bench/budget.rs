//! How soon a quota is raised once it is nearly used up.
//!
//! Three clocks are kept apart. When a budget is crossed the task itself says: it knows by the scheduler's own count how
//! much it has used ([`crate::pulse`]). When the quota is raised a third process sees, which the write wakes and which no
//! other keeps from the CPU. What the agent says of itself stands beside that: from the program's event, at the tick after
//! the crossing, to its own reading back.
//!
//! The machine has one CPU for that ([`OneCpu`]).

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_getres};
use shaper_tests::time::{Window, monotonic_ns};

use crate::{
    Plan,
    pulse::{self, Record},
    report::{Report, quantile},
    site::{OneCpu, Site},
};

/// Limit of the task, and the same as a quota, µs in a period.
const LIMIT: &str = "0.5";
const GRANT_US: u64 = 50_000;
/// What it uses each time it works: more than its quota.
const ALL_US: u64 = 60_000;
/// More than the hog's, so that it can use up its quota beside it.
const WEIGHT: &str = "1000";
/// Nothing is lent before a task has rested for a window.
const EARNED: Duration = Duration::from_secs(11);
const CONTENDED_GOAL_MS: f64 = 30.0;
/// What the issue allows beyond a tick on an idle node.
const BEYOND_TICK_MS: f64 = 2.0;
/// A crossing comes less than once a second.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let tick_ms = clock_getres(ClockId::MonotonicCoarse).tv_nsec as f64 / 1e6;
    report.tell("a tick of this kernel", tick_ms, "ms");
    let _alone = OneCpu::begin()?;
    crossings(plan, report, "idle node", false, tick_ms + BEYOND_TICK_MS, tick_ms)?;
    crossings(plan, report, "beside a hog", true, CONTENDED_GOAL_MS, tick_ms)
}

fn crossings(
    plan: Plan,
    report: &mut Report,
    node: &str,
    is_contended: bool,
    goal_ms: f64,
    tick_ms: f64,
) -> Result<()> {
    let site = Site::start(&[])?;
    let (worked, written) = (site.file("worked"), site.file("written"));
    // Where the agent has itself warned, on a kernel of 250 ticks a second.
    let budget_us = GRANT_US - (2.0 * tick_ms * 1000.0) as u64;
    let (file, budget, all) = (worked.display().to_string(), budget_us.to_string(), ALL_US.to_string());
    let task =
        site.run("service", &["--cpu", LIMIT, "--cpu-weight", WEIGHT], &["cross", &file, &budget, &all]);
    let _observer = site.observe(task.cgroup.as_ref(), &written)?;
    Window::pass(EARNED);
    if is_contended {
        site.run("hogs", &[], &["hogs", "0"]);
    }
    let from = monotonic_ns();
    let wanted = plan.crossings as usize;
    let after = |record: &Record| record.0 >= from;
    let mut seen = (0, monotonic_ns());
    let tries = loop {
        let tries: Vec<Record> = pulse::records(&worked)?.into_iter().filter(after).collect();
        if tries.len() > wanted {
            break tries;
        }
        if tries.len() > seen.0 {
            seen = (tries.len(), monotonic_ns());
        }
        let still = monotonic_ns() - seen.1 < PATIENCE.as_nanos() as u64;
        still.then_some(()).with_context(|| format!("the task stopped after {} crossings", tries.len()))?;
        Window::pass(Duration::from_millis(500));
    };
    let raised: Vec<Record> =
        pulse::records(&written)?.into_iter().filter(|(_, quota)| *quota > GRANT_US).collect();
    let mut lags = Vec::new();
    for pair in tries.windows(2) {
        let ((began, crossed), (next, _)) = (pair[0], pair[1]);
        let first = raised.iter().find(|(at, _)| (began..next).contains(at));
        lags.extend(first.map(|(at, _)| (*at as f64 - crossed as f64) / 1e6));
    }
    let tried = (tries.len() - 1) as f64;
    report.at_least(
        100.0,
        &format!("{node}: crossings that were lent something"),
        100.0 * lags.len() as f64 / tried,
        "%",
    );
    let what = format!("{node}: from crossing the budget to the raised quota read back");
    report.tell(&format!("{what}, p50"), quantile(&lags, 500), "ms");
    report.at_most(goal_ms, &format!("{what}, p99"), quantile(&lags, 990), "ms");
    report.of(&lags);
    let own = site.pool()?.latency;
    let what = format!("{node}: from the kernel's event to the agent's own reading back");
    report.tell(&format!("{what}, p50"), own.p50_ns as f64 / 1e6, "ms");
    report.tell(&format!("{what}, p99"), own.p99_ns as f64 / 1e6, "ms");
    Ok(())
}
