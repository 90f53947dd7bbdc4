//! How well GPUs are packed: the trace "openb", replayed by the published protocol.

use std::{collections::BTreeMap, thread, time::Instant};

use anyhow::{Context, Result};
use shaper_core::place::{Cluster, GpuRequest, NodeId, Placement, Request, Scorer, Scoring, Shape, TaskMix};

use super::data::{self, NodeShape, Random, TaskShape};
use crate::{Plan, report::Report};

/// What decides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum By {
    Scorer(Scorer),
    Random,
}

const POLICIES: [By; 5] = [
    By::Scorer(Scorer::Fgd),
    By::Scorer(Scorer::Fragmentation),
    By::Scorer(Scorer::Seed),
    By::Scorer(Scorer::BestFit),
    By::Random,
];

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Scorer(scorer) => scorer.name(),
            By::Random => "random",
        }
    }
}

/// The seeds of the published table.
const SEEDS: std::ops::RangeInclusive<u64> = 42..=51;
/// Student's t for 95 % with 9 degrees of freedom.
const T: f64 = 2.262;
/// Of what is asked for by GPU capacity, in percent: where allocation is read off.
const ARRIVALS: [u64; 2] = [100, 130];

/// Percent of GPU capacity that is allocated at each of [`ARRIVALS`].
type Allocated = [f64; 2];

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let Some(nodes) = data::nodes()? else {
        report.skip("packing", &format!("there is no {}", data::folder().join("openb").display()));
        return Ok(());
    };
    let start = Instant::now();
    let seeds: Vec<u64> = if plan.is_quick { SEEDS.take(3).collect() } else { SEEDS.collect() };
    let mut names = data::workloads()?;
    if plan.is_quick {
        names.retain(|name| ["default", "gpuspec33", "cpu250"].contains(&name.as_str()));
    }
    let workloads: BTreeMap<String, Vec<TaskShape>> =
        names.into_iter().map(|name| Ok((name.clone(), data::tasks(&name)?))).collect::<Result<_>>()?;
    let jobs: Vec<(&String, &Vec<TaskShape>, By, u64)> = workloads
        .iter()
        .flat_map(|(name, tasks)| POLICIES.map(|by| (name, tasks, by)))
        .flat_map(|(name, tasks, by)| seeds.iter().map(move |seed| (name, tasks, by, *seed)))
        .collect();
    let results = all(&jobs, &nodes)?;
    let published = data::published()?;
    let mut table = Table::default();
    for ((name, _, by, _), allocated) in jobs.iter().zip(results) {
        table.0.entry(((*name).clone(), *by)).or_default().push(allocated);
    }
    let mut better = 0;
    for name in workloads.keys() {
        for (at, percent) in ARRIVALS.iter().enumerate() {
            let title = format!("{name} @{percent}");
            for by in POLICIES {
                let values = table.of(name, by, at);
                report.tell(&format!("{title}: {}, GPU allocated", by.name()), mean(&values), "%");
                report.of(&values);
            }
            for (policy, by) in [("Random", By::Random), ("BestFit", By::Scorer(Scorer::BestFit))] {
                if let Some(means) = published.get(&(name.clone(), policy.to_owned())) {
                    let off = mean(&table.of(name, by, at)) - means[at];
                    report.tell(&format!("{title}: {} less the published mean", by.name()), off, "points");
                }
            }
            if let Some(means) = published.get(&(name.clone(), "FGD".to_owned())) {
                let off = mean(&table.of(name, By::Scorer(Scorer::Fgd), at)) - means[at];
                report.within(0.2, &format!("{title}: fgd less the published mean"), off, "points");
            }
            let pair = |by: By| table.of(name, by, at);
            let (ours, theirs) = (pair(By::Scorer(Scorer::Fragmentation)), pair(By::Scorer(Scorer::Fgd)));
            let gains: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
            let (gain, half) = (mean(&gains), T * deviation(&gains) / (gains.len() as f64).sqrt());
            report.at_least(0.0, &format!("{title}: fragmentation less fgd, mean of pairs"), gain, "points");
            report.tell(&format!("{title}: half of its 95 % interval"), half, "points");
            better += usize::from(at == 1 && gain >= 0.5);
        }
    }
    if !plan.is_quick {
        report.at_least(5.0, "workloads where fragmentation gains 0.5 points @130", better as f64, "");
    }
    report.at_most(60.0, "the whole table", start.elapsed().as_secs_f64(), "s");
    Ok(())
}

#[derive(Default)]
struct Table(BTreeMap<(String, By), Vec<Allocated>>);

impl Table {
    /// By seed.
    fn of(&self, workload: &str, by: By, at: usize) -> Vec<f64> {
        let runs = self.0.get(&(workload.to_owned(), by));
        runs.into_iter().flatten().map(|allocated| allocated[at]).collect()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

/// Runs everything, on all CPUs.
fn all(jobs: &[(&String, &Vec<TaskShape>, By, u64)], nodes: &[NodeShape]) -> Result<Vec<Allocated>> {
    let workers = thread::available_parallelism().map_or(1, |count| count.get());
    thread::scope(|scope| {
        let work = |worker: usize| {
            scope.spawn(move || {
                let mine = jobs.iter().enumerate().skip(worker).step_by(workers);
                let run = |(number, (_, tasks, by, seed)): (usize, &(&String, &Vec<TaskShape>, By, u64))| {
                    Ok((number, replay(nodes, tasks, *by, *seed)?))
                };
                mine.map(run).collect::<Result<Vec<_>>>()
            })
        };
        let workers: Vec<_> = (0..workers).map(work).collect();
        let mut results = vec![[0.0; 2]; jobs.len()];
        for worker in workers {
            let found = worker.join().ok().context("a replay has panicked")??;
            for (number, allocated) in found {
                results[number] = allocated;
            }
        }
        Ok(results)
    })
}

/// One run: the tasks in a random order, then tasks at random, until so much GPU has been asked for. What does not
/// fit is dropped, and nothing departs.
fn replay(nodes: &[NodeShape], tasks: &[TaskShape], by: By, seed: u64) -> Result<Allocated> {
    let mut cluster = Cluster::default();
    for (number, shape) in nodes.iter().enumerate() {
        cluster.add(shape.spec(number, BTreeMap::new()))?;
    }
    let capacity: u64 = nodes.iter().map(|shape| u64::from(shape.gpus) * 1000).sum();
    let requests: Vec<Request> =
        tasks.iter().map(|task| task.request(&mut cluster, &BTreeMap::new())).collect();
    let mut random = Random::new(seed);
    let mut order: Vec<usize> = (0..requests.len()).collect();
    random.shuffle(&mut order);
    match by {
        By::Scorer(Scorer::BestFit) => cluster.index_best_fit(),
        By::Scorer(Scorer::Fgd) => {
            let mut mix = TaskMix::default();
            for request in &requests {
                mix.add(Shape::of(request));
            }
            cluster.expect(&mix);
        }
        By::Scorer(Scorer::Seed | Scorer::Fragmentation) | By::Random => {}
    }
    let (mut asked, mut allocated, mut read) = (0, 0, Vec::new());
    let mut order = order.into_iter();
    while read.len() < ARRIVALS.len() {
        let next = order.next().unwrap_or_else(|| random.below(requests.len()));
        let request = requests[next];
        asked += request.gpu.thousandths();
        let at = match by {
            By::Scorer(scorer) => {
                if scorer == Scorer::Fragmentation {
                    cluster.learn(&request);
                }
                cluster.decide(&request, &Scoring::of(scorer))
            }
            By::Random => {
                let fitting: Vec<NodeId> = cluster.ids().filter(|id| cluster.fits(*id, &request)).collect();
                (!fitting.is_empty()).then(|| {
                    let node = fitting[random.below(fitting.len())];
                    Placement { node, gpus: any_gpus(&cluster, node, &request, &mut random) }
                })
            }
        };
        if let Some(at) = at
            && cluster.allocate(&request, at)
        {
            allocated += request.gpu.thousandths();
        }
        while read.len() < ARRIVALS.len() && asked * 100 >= capacity * ARRIVALS[read.len()] {
            read.push(allocated as f64 / capacity as f64 * 100.0);
        }
    }
    Ok([read[0], read[1]])
}

/// GPUs that fit, at random.
fn any_gpus(cluster: &Cluster, node: NodeId, request: &Request, random: &mut Random) -> u16 {
    let mut sharable: Vec<u8> = cluster.sharable(node, request).collect();
    random.shuffle(&mut sharable);
    let count = match request.gpu {
        GpuRequest::None => 0,
        GpuRequest::Share(_) => 1,
        GpuRequest::Whole(count) => usize::from(count),
    };
    sharable.into_iter().take(count).fold(0, |gpus, gpu| gpus | 1 << gpu)
}
