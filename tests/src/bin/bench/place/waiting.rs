//! How long gangs wait, first come first served, by strict priority, and with backfill: the week of SURF's cluster in
//! `arrivals/`. Jobs of one submission that run equally long are one gang.

use std::{collections::BTreeMap, fs::File, io::Read, process::Command};

use anyhow::{Context, Result, bail};
use shaper_core::place::backfill::{self, Holder, Waiting};

use super::data::{self, Random};
use crate::{
    Plan,
    report::{Report, quantile},
};

/// Of 16 cores each: the week's jobs need 115 on average.
const NODES: u64 = 128;
/// Users say that a job takes so many times as long as it does.
const OVERESTIMATE: u64 = 2;

#[derive(Clone, Copy)]
struct Gang {
    /// Seconds since the first.
    arrives: u64,
    runs_for: u64,
    nodes: u64,
    /// 0 is the highest of three.
    priority: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum By {
    Arrival,
    Priority,
    Backfill,
}

pub(crate) fn measure(_: Plan, report: &mut Report) -> Result<()> {
    let path = data::folder().join("arrivals/surf_week.csv.gz");
    if !path.exists() {
        report.skip("backfill", &format!("there is no {}", path.display()));
        return Ok(());
    }
    let gangs = gangs(&unpacked(&path)?)?;
    report.tell("gangs", gangs.len() as f64, "");
    let mut longest = BTreeMap::new();
    for (by, name) in [
        (By::Arrival, "first come, first served"),
        (By::Priority, "strict priority"),
        (By::Backfill, "EASY backfill"),
    ] {
        let waits = run(&gangs, by)?;
        let mean = waits.iter().sum::<f64>() / waits.len() as f64;
        report.tell(&format!("{name}: mean wait"), mean, "min");
        report.tell(&format!("{name}: p95 wait"), quantile(&waits, 950), "min");
        let most = waits.iter().copied().fold(0.0, f64::max);
        report.tell(&format!("{name}: longest wait"), most, "min");
        longest.insert(name, (mean, most));
    }
    let (first, easy) = (longest["first come, first served"], longest["EASY backfill"]);
    report.at_most(1.0, "mean wait, EASY backfill / first come, first served", easy.0 / first.0, "");
    report.at_most(1.0, "longest wait, the same (nobody starves)", easy.1 / first.1, "");
    Ok(())
}

fn unpacked(path: &std::path::Path) -> Result<String> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut gzip =
        Command::new("gzip").arg("-dc").stdin(file).stdout(std::process::Stdio::piped()).spawn()?;
    let mut text = String::new();
    gzip.stdout.take().context("gzip has no output")?.read_to_string(&mut text)?;
    let status = gzip.wait()?;
    if !status.success() {
        bail!("gzip of {}: {status}", path.display());
    }
    Ok(text)
}

fn gangs(text: &str) -> Result<Vec<Gang>> {
    let mut sizes: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for line in text.lines().skip(1) {
        let row: Vec<&str> = line.split(',').collect();
        let [_, submitted, duration, cores, ..] = row[..] else {
            bail!("a row of the arrivals is short: {line}")
        };
        let key = (submitted.parse::<u64>()? / 1000, duration.parse::<u64>()? / 1000);
        *sizes.entry(key).or_default() += cores.parse::<u64>()?.div_ceil(16);
    }
    let first = sizes.keys().next().map_or(0, |key| key.0);
    let mut random = Random::new(7);
    let gang = |((arrives, runs_for), nodes): ((u64, u64), u64)| Gang {
        arrives: arrives - first,
        runs_for: runs_for.max(1),
        nodes,
        priority: random.below(3) as u64,
    };
    Ok(sizes.into_iter().map(gang).collect())
}

/// How long each gang waits, in minutes.
fn run(gangs: &[Gang], by: By) -> Result<Vec<f64>> {
    let mut queue: Vec<usize> = Vec::new();
    let mut running: Vec<(u64, usize)> = Vec::new();
    let (mut next, mut free, mut waits) = (0, NODES, vec![None; gangs.len()]);
    while next < gangs.len() || !queue.is_empty() {
        let end = running.iter().map(|(until, _)| *until).min();
        let arrival = gangs.get(next).map(|gang| gang.arrives);
        let Some(now) = [end, arrival].into_iter().flatten().min() else {
            bail!("{} gangs wait, and nothing runs", queue.len());
        };
        running.retain(|(until, gang)| {
            let runs = *until > now;
            free += if runs { 0 } else { gangs[*gang].nodes };
            runs
        });
        while gangs.get(next).is_some_and(|gang| gang.arrives <= now) {
            queue.push(next);
            next += 1;
        }
        if by == By::Priority {
            queue.sort_by_key(|gang| (gangs[*gang].priority, *gang));
        }
        for gang in starts(gangs, by, now, free, &running, &queue) {
            free -= gangs[gang].nodes;
            running.push((now + gangs[gang].runs_for, gang));
            waits[gang] = Some((now - gangs[gang].arrives) as f64 / 60.0);
            queue.retain(|it| *it != gang);
        }
    }
    waits.into_iter().map(|wait| wait.context("a gang never started")).collect()
}

fn starts(
    gangs: &[Gang],
    by: By,
    now: u64,
    free: u64,
    running: &[(u64, usize)],
    queue: &[usize],
) -> Vec<usize> {
    if by != By::Backfill {
        let mut free = free;
        let fits = move |gang: &&usize| {
            let fits = gangs[**gang].nodes <= free;
            free -= if fits { gangs[**gang].nodes } else { 0 };
            fits
        };
        return queue.iter().take_while(fits).copied().collect();
    }
    let amounts = |gang: usize| [gangs[gang].nodes, 0, 0];
    let holder = |(until, gang): &(u64, usize)| {
        // As it was said when it began; who is over time ends any moment, which is now.
        let began = until - gangs[*gang].runs_for;
        Holder { amounts: amounts(*gang), until: (began + gangs[*gang].runs_for * OVERESTIMATE).max(now) }
    };
    let waiting = |gang: &usize| Waiting {
        amounts: amounts(*gang),
        runs_for: Some(gangs[*gang].runs_for * OVERESTIMATE),
    };
    let holders: Vec<_> = running.iter().map(holder).collect();
    let waiting: Vec<_> = queue.iter().map(waiting).collect();
    let plan = backfill::plan(now, [free, 0, 0], &holders, &waiting);
    plan.start.into_iter().map(|index| queue[index]).collect()
}
