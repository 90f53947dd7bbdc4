//! How many nodes are started, and how long tasks wait for them: the broker's own decisions (`shaper_broker::reactor`) on the
//! arrivals of SURF's week, with what is reserved brought down first and without.
//!
//! The trace says when jobs came, how long they ran and that each asked for 16 cores. What they used it does not say, so each
//! is given the use of one of 25 machines of another trace (Bitbrains), from a random moment on, as a share of its cores. Nodes
//! have 64 cores, come two minutes after they were asked for, and are given back when nothing has run on them for ten.

mod plot;
mod world;

use anyhow::{Result, bail};

use crate::{
    Plan,
    place::Random,
    report::{Report, quantile},
    rightsize::series::{self, Set},
    traces,
};
use world::{Job, Outcome};

/// A quick run stops after so many jobs.
const QUICK_JOBS: usize = 800;

pub(crate) fn arrivals(plan: Plan, report: &mut Report) -> Result<()> {
    let path = traces::folder().join("arrivals/surf_week.csv.gz");
    let Some(all) = series::cpu()?.filter(|_| path.exists()) else {
        report.skip("arrivals", &format!("there is no {}", path.display()));
        return Ok(());
    };
    // Thousandths of the machine's cores.
    let shares: Vec<Vec<u64>> = all
        .iter()
        .filter(|series| series.set == Set::Bitbrains)
        .filter_map(|series| Some((series.cores?, &series.used)))
        .map(|(cores, used)| used.iter().map(|used| (*used as f64 / cores).min(1000.0) as u64).collect())
        .collect();
    let mut jobs = jobs(&traces::unpacked(&path)?, shares)?;
    if plan.is_quick {
        jobs.truncate(QUICK_JOBS);
    }
    report.tell("jobs of 16 cores", jobs.len() as f64, "");
    let alone = world::run(&jobs, None)?;
    // Half a core, and what was used lately.
    let first = world::run(&jobs, Some(500))?;
    for (name, outcome) in [("scaling on requests alone", &alone), ("reserving less first", &first)] {
        report.tell(&format!("{name}: node hours"), outcome.node_hours(), "h");
        report.tell(&format!("{name}: most nodes at once"), outcome.most_nodes() as f64, "");
        report.tell(&format!("{name}: mean wait"), outcome.mean_wait(), "s");
        report.tell(&format!("{name}: p95 wait"), quantile(&outcome.waits, 950), "s");
        report.tell(&format!("{name}: unserved CPU"), outcome.unserved() * 100.0, "%");
        report.tell(&format!("{name}: requests lowered"), outcome.lowered as f64, "");
        report.exactly(
            jobs.len() as f64,
            &format!("{name}: jobs that ended"),
            outcome.waits.len() as f64,
            "",
        );
    }
    report.at_most(
        1.0,
        "node hours, reserving less first / requests alone",
        first.node_hours() / alone.node_hours(),
        "",
    );
    report.at_most(1.0, "mean wait, the same", first.mean_wait() / alone.mean_wait(), "");
    if !plan.is_quick && plan.is_whole {
        plot::draw("docs/scaling.svg".as_ref(), &alone, &first)?;
    }
    Ok(())
}

fn jobs(text: &str, shares: Vec<Vec<u64>>) -> Result<Vec<Job>> {
    let mut random = Random::new(11);
    let mut rows = Vec::new();
    for line in text.lines().skip(1) {
        let row: Vec<&str> = line.split(',').collect();
        let [_, submitted, duration, cores, ..] = row[..] else {
            bail!("a row of the arrivals is short: {line}")
        };
        rows.push((submitted.parse::<u64>()? / 1000, duration.parse::<u64>()? / 1000, cores.parse::<u64>()?));
    }
    rows.sort_by_key(|row| row.0);
    let first = rows.first().map_or(0, |row| row.0);
    let shares: Vec<_> = shares.into_iter().map(std::rc::Rc::new).collect();
    if shares.is_empty() {
        bail!("there is no series of use");
    }
    let job = |(arrives, runs_for, cores): (u64, u64, u64)| {
        let share = &shares[random.below(shares.len())];
        let from = random.below(share.len());
        Job { arrives: arrives - first, runs_for: runs_for.max(1), cores, share: share.clone(), from }
    };
    Ok(rows.into_iter().map(job).collect())
}

impl Outcome {
    fn mean_wait(&self) -> f64 {
        self.waits.iter().sum::<f64>() / self.waits.len().max(1) as f64
    }

    fn most_nodes(&self) -> u32 {
        self.nodes.iter().map(|(_, nodes)| *nodes).max().unwrap_or(0)
    }

    /// CPU that was wanted and that the nodes did not have, as a share of what was wanted.
    fn unserved(&self) -> f64 {
        self.missed as f64 / self.wanted.max(1) as f64
    }

    /// From when they were asked for until they were given back.
    fn node_hours(&self) -> f64 {
        let changes = self.nodes.windows(2).map(|two| (two[1].0 - two[0].0) as f64 * f64::from(two[0].1));
        changes.sum::<f64>() / 3600.0
    }
}
