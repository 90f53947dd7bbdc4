//! The same inputs give the same decisions and the same state: a million of them, made up by a cluster at work, and handled
//! again from what was written down of them.

use std::{collections::BTreeMap, time::Instant};

use anyhow::Result;
use shaper_core::{
    place::{NodeId, Readiness, Request},
    queue::{Config, Decision, Input, JobId, JobSpec, Outcome, Queue, Quota, Spread, TaskKey, Tasks},
    spec::{Demand, Priority},
    units::Millicores,
};

use super::data::{self, NodeShape, Random, TaskShape};
use crate::{Plan, report::Report, traces};

const NODES: usize = 400;
const SECOND: u64 = 1_000_000_000;
/// Jobs in the queue and running, at most; the cluster holds somewhat fewer.
const AT_ONCE: usize = 3_000;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let Some(shapes) = data::nodes()? else {
        report.skip("replay", &format!("there is no {}", traces::folder().join("openb").display()));
        return Ok(());
    };
    let tasks = data::tasks("default")?;
    let count = if plan.is_quick { 100_000 } else { 1_000_000 };
    let start = Instant::now();
    let (inputs, first) = live(&shapes, &tasks, count)?;
    report.tell(
        "inputs a second, with what makes them up",
        count as f64 / start.elapsed().as_secs_f64(),
        "/s",
    );
    let start = Instant::now();
    let (mut queue, _) = empty(&tasks);
    for (input, now) in &inputs {
        queue.handle(input.clone(), *now);
    }
    let second = queue.digest();
    report.tell(
        "inputs a second, from what was written down",
        count as f64 / start.elapsed().as_secs_f64(),
        "/s",
    );
    report.tell("inputs", inputs.len() as f64, "");
    report.tell("decisions", first.0 as f64, "");
    let differ = f64::from(u8::from(first != second));
    report.exactly(0.0, "replays with another hash of decisions and state than the first run", differ, "");
    Ok(())
}

/// A queue without nodes, and the requests of the trace.
fn empty(tasks: &[TaskShape]) -> (Queue, Vec<Request>) {
    let mut queue = Queue::new(Config::default());
    let mut request = |task: &TaskShape| task.with(queue.constraint(&task.constraint(&BTreeMap::new())));
    let requests = tasks.iter().map(&mut request).collect();
    (queue, requests)
}

/// What happened, and when.
type Inputs = Vec<(Input, u64)>;
/// What runs: the attempt, until when, and whether it is to stop.
type Running = BTreeMap<TaskKey, (u32, bool)>;

/// A cluster at work: jobs of all kinds come, tasks end well or not, nodes are drained and come back.
fn live(shapes: &[NodeShape], tasks: &[TaskShape], count: usize) -> Result<(Inputs, (u64, u64))> {
    let (mut queue, requests) = empty(tasks);
    let mut random = Random::new(99);
    let mut inputs: Inputs = Vec::with_capacity(count);
    let (mut running, mut shrinking): (Running, Vec<TaskKey>) = (Running::new(), Vec::new());
    let mut away: Vec<NodeId> = Vec::new();
    let (mut jobs, mut open, mut now) = (0u32, 0usize, 0u64);
    for number in 0..count {
        now += random.below(SECOND as usize / 50) as u64;
        let input = if number < NODES {
            let shape = &shapes[number * 3 % shapes.len()];
            let zone = format!("zone-{}", number % 8);
            Input::Node(shape.spec(number, BTreeMap::from([("zone".to_owned(), zone)])))
        } else {
            match random.below(1000) {
                0 => Input::Quota(format!("team-{}", random.below(8)), a_quota(&mut random)),
                1 if away.len() < 8 => {
                    let node = NodeId(random.below(NODES) as u32);
                    away.push(node);
                    let readiness = [Readiness::Draining, Readiness::Cordoned, Readiness::UnderPressure];
                    Input::Readiness(node, readiness[random.below(3)])
                }
                2 | 3 if !away.is_empty() => {
                    let which = random.below(away.len());
                    Input::Readiness(away.swap_remove(which), Readiness::Ready)
                }
                4..20 => Input::Peak(NodeId(random.below(NODES) as u32), random.below(64_000) as u64),
                20..22 if jobs > 0 => {
                    Input::Cancel(JobId(jobs - 1 - random.below(jobs.min(500) as usize) as u32))
                }
                22..40 => Input::Tick,
                40..120 if !shrinking.is_empty() => {
                    let which = random.below(shrinking.len());
                    Input::Shrunk { task: shrinking.swap_remove(which), done: random.below(10) > 0 }
                }
                120..560 if open < AT_ONCE => {
                    jobs += 1;
                    open += 1;
                    Input::Submit(a_job(&mut random, &requests, jobs))
                }
                _ => match an_end(&mut random, &mut running) {
                    Some(input) => input,
                    None => Input::Tick,
                },
            }
        };
        inputs.push((input.clone(), now));
        for decision in queue.handle(input, now) {
            match decision {
                Decision::Start { task, attempt, .. } => drop(running.insert(task, (attempt, false))),
                Decision::Stop { task, attempt, .. } => drop(running.insert(task, (attempt, true))),
                Decision::Shrink { task, .. } => shrinking.push(task),
                Decision::Over(..) => open = open.saturating_sub(1),
                Decision::Refused(_) => {
                    jobs -= 1;
                    open -= 1;
                }
                Decision::Node(_)
                | Decision::Accepted(_)
                | Decision::Nominated { .. }
                | Decision::ScaleOut { .. } => {}
            }
        }
    }
    Ok((inputs, queue.digest()))
}

fn a_quota(random: &mut Random) -> Quota {
    let cpu = (random.below(2) == 0).then(|| 500_000 + random.below(4_000_000) as u64);
    Quota { most: [cpu, None, None], weight: 1 + random.below(3) as u32 }
}

fn a_job(random: &mut Random, requests: &[Request], jobs: u32) -> JobSpec {
    let mut request = requests[random.below(requests.len())];
    request.priority = [Priority::Low, Priority::Low, Priority::Medium, Priority::High][random.below(4)];
    let tasks = match random.below(12) {
        0 => Tasks::Gang(2 + random.below(6) as u32),
        1 => Tasks::Array { count: 1 + random.below(20) as u32, at_once: Some(4) },
        _ => Tasks::One,
    };
    let zone = |random: &mut Random| (random.below(2) == 0).then(|| "zone".to_owned());
    let spread = (random.below(10) == 0).then(|| Spread { label: zone(random), most: 2 });
    let half = |demand: Demand| Demand { cpu: Millicores(demand.cpu.0 / 2), ..demand };
    JobSpec {
        namespace: format!("team-{}", random.below(8)),
        request,
        tasks,
        spread,
        floor: (random.below(5) == 0).then(|| half(request.demand)),
        preempts: request.priority == Priority::High,
        oversubscribes: request.priority == Priority::Low && random.below(6) == 0,
        runs_for: (random.below(4) > 0).then(|| (1 + random.below(600)) as u64 * SECOND),
        timeout: (random.below(10) == 0).then(|| (60 + random.below(600)) as u64 * SECOND),
        retries: random.below(3) as u32,
        after_ok: (jobs > 1 && random.below(10) == 0)
            .then(|| JobId(jobs - 2 - random.below((jobs as usize - 1).min(50)) as u32))
            .into_iter()
            .collect(),
    }
}

/// Somebody ends: first whoever is to, else anybody.
fn an_end(random: &mut Random, running: &mut Running) -> Option<Input> {
    let from = TaskKey { job: JobId(random.below(1 << 20) as u32), index: 0 };
    let oldest = running.range(from..).chain(running.iter()).next();
    let stopping = running.iter().take(64).find(|(_, (_, stopping))| *stopping);
    let (task, (attempt, stopping)) = stopping.or(oldest).map(|(task, it)| (*task, *it))?;
    running.remove(&task);
    let outcome = match random.below(20) {
        _ if stopping => Outcome::Stopped,
        0 => Outcome::Failed,
        1 => Outcome::Lost,
        _ => Outcome::Succeeded,
    };
    Some(Input::Ended { task, attempt, outcome })
}
