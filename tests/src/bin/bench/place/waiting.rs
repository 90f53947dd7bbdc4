//! How long gangs wait, first come first served, by strict priority, and with backfill: the week of SURF's cluster in
//! `arrivals/`. Jobs of one submission that run equally long are one gang.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use shaper_core::{
    place::{Constraint, GpuRequest, Gpus, NodeSpec, Request},
    queue::{Config, Decision, Input, JobSpec, Order, Outcome, Queue, TaskKey, Tasks},
    spec::{Capacity, Demand, Priority},
    units::{Bytes, Millicores},
};

use super::data::Random;
use crate::{
    Plan,
    report::{Report, quantile},
    traces,
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
    priority: Priority,
}

pub(crate) fn measure(_: Plan, report: &mut Report) -> Result<()> {
    let path = traces::folder().join("arrivals/surf_week.csv.gz");
    if !path.exists() {
        report.skip("backfill", &format!("there is no {}", path.display()));
        return Ok(());
    }
    let gangs = gangs(&traces::unpacked(&path)?)?;
    report.tell("gangs", gangs.len() as f64, "");
    let mut longest = BTreeMap::new();
    for (order, backfills, name) in [
        (Order::Arrival, false, "first come, first served"),
        (Order::Priority, false, "strict priority"),
        (Order::Arrival, true, "EASY backfill"),
        (Order::Fair, true, "priority, fairness and backfill"),
    ] {
        // Strict priority: nobody is preferred for having waited long.
        let ages_after = if backfills { Config::default().ages_after } else { u64::MAX };
        let config = Config { order, backfills, ages_after, ..Config::default() };
        let waits = run(&gangs, config)?;
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
        priority: [Priority::Low, Priority::Medium, Priority::High][random.below(3)],
    };
    Ok(sizes.into_iter().map(gang).collect())
}

const NODE: Millicores = Millicores(16_000);
const SECOND: u64 = 1_000_000_000;

/// How long each gang waits, in minutes.
fn run(gangs: &[Gang], config: Config) -> Result<Vec<f64>> {
    let mut queue = Queue::new(config);
    let any = queue.constraint(&Constraint::default());
    let amounts = Demand { cpu: NODE, memory: Bytes(1), gpu_memory: None, network: None, storage_io: None };
    for number in 0..NODES {
        let capacity =
            Capacity { cpu: NODE, memory: Bytes(1), gpu_memory: None, network: None, storage_io: None };
        queue.handle(
            Input::Node(NodeSpec {
                name: format!("node-{number}"),
                capacity,
                gpus: Gpus::default(),
                labels: BTreeMap::new(),
                taints: BTreeSet::new(),
            }),
            0,
        );
    }
    let mut ends: BTreeMap<(u64, TaskKey), u32> = BTreeMap::new();
    let mut waits: Vec<Option<f64>> = vec![None; gangs.len()];
    let mut arriving = gangs.iter().peekable();
    loop {
        let end = ends.first_key_value().map(|((at, task), attempt)| (*at, *task, *attempt));
        let arrival = arriving.peek().map(|gang| gang.arrives);
        let (now, input) = match (arrival, end) {
            (Some(now), end) if end.is_none_or(|(at, ..)| now < at) => {
                let Some(gang) = arriving.next() else { break };
                let request = Request {
                    demand: amounts,
                    gpu: GpuRequest::None,
                    constraint: any,
                    priority: gang.priority,
                };
                let spec = JobSpec {
                    namespace: "surf".to_owned(),
                    request,
                    tasks: Tasks::Gang(u32::try_from(gang.nodes)?),
                    spread: None,
                    floor: None,
                    preempts: false,
                    oversubscribes: false,
                    runs_for: Some(gang.runs_for * OVERESTIMATE * SECOND),
                    timeout: None,
                    retries: 0,
                    after_ok: Vec::new(),
                };
                (now, Input::Submit(spec))
            }
            (_, Some((now, task, attempt))) => {
                ends.remove(&(now, task));
                (now, Input::Ended { task, attempt, outcome: Outcome::Succeeded })
            }
            (None, None) => break,
            (Some(_), None) => bail!("an arrival comes first where nothing runs"),
        };
        for decision in queue.handle(input, now * SECOND) {
            if let Decision::Start { task, attempt, .. } = decision {
                let number = task.job.0 as usize;
                let gang = gangs.get(number).context("a gang that was not submitted")?;
                ends.insert((now + gang.runs_for, task), attempt);
                waits[number] = Some((now - gang.arrives) as f64 / 60.0);
            }
        }
    }
    waits.into_iter().map(|wait| wait.context("a gang never started")).collect()
}
