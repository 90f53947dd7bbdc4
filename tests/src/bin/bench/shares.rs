//! How exact limits and weights of CPU are.

use std::time::Duration;

use anyhow::Result;
use shaper_tests::time::Window;

use crate::{
    Plan,
    report::Report,
    site::{Site, cores},
};

/// Percent.
const LIMIT_GOAL: f64 = 2.0;
const WEIGHT_GOAL: f64 = 3.0;
const WINDOW: Duration = Duration::from_secs(10);
/// What a change may owe is paid by then.
const SETTLED: Duration = Duration::from_secs(1);

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let percents: &[u64] = if plan.is_quick { &[5, 30] } else { &[5, 10, 30, 50, 70, 95] };
    let site = Site::start(&[])?;
    let alone = site.run("alone", &[], &["hogs", "1"]);
    for percent in percents {
        limit(&site, report, "alone", &alone.cgroup, percent * 10, "one hog alone");
    }
    site.end(&alone);
    let both = site.hogs("both", &[]);
    let beside: &[u64] = if plan.is_quick { &[1500] } else { &[100, 300, 1500] };
    for milli in beside {
        limit(&site, report, "both", &both.cgroup, *milli, "hogs on both CPUs");
    }
    if !plan.is_quick {
        let others = site.hogs("others", &[]);
        let whose = "hogs on both CPUs, others without a limit beside them";
        limit(&site, report, "both", &both.cgroup, 300, whose);
        site.end(&others);
    }
    site.end(&both);
    weights(&site, plan, report, &[300, 100]);
    if !plan.is_quick {
        weights(&site, plan, report, &[300, 200, 100]);
    }
    Ok(())
}

fn limit(site: &Site, report: &mut Report, id: &str, group: &str, milli: u64, whose: &str) {
    site.agent.shaper().set(id, &["--cpu", &format!("{milli}m")]);
    Window::pass(SETTLED);
    let off = (cores(&[group], WINDOW)[0] / (milli as f64 / 1000.0) - 1.0) * 100.0;
    report.within(
        LIMIT_GOAL,
        &format!("limit of {} % of a CPU, {whose}: share off it", milli / 10),
        off,
        "%",
    );
}

/// Hogs without a limit, on both CPUs.
fn weights(site: &Site, plan: Plan, report: &mut Report, weights: &[u32]) {
    let start = |weight: &u32| {
        let weight = weight.to_string();
        site.hogs(&format!("of-{}-weight-{weight}", weights.len()), &["--cpu-weight", &weight])
    };
    let tasks: Vec<_> = weights.iter().map(start).collect();
    Window::pass(SETTLED);
    let groups: Vec<&str> = tasks.iter().map(|task| task.cgroup.as_str()).collect();
    let used = cores(&groups, plan.weights);
    let (all, sum): (f64, u32) = (used.iter().sum(), weights.iter().sum());
    let names = weights.iter().map(u32::to_string).collect::<Vec<_>>().join(":");
    for (weight, used) in weights.iter().zip(&used) {
        let off = (used / all / (f64::from(*weight) / f64::from(sum)) - 1.0) * 100.0;
        report.within(WEIGHT_GOAL, &format!("weights {names}: share of {weight} off its part"), off, "%");
    }
    report.tell(&format!("weights {names}: all together"), all, "cores");
    tasks.iter().for_each(|task| site.end(task));
}
