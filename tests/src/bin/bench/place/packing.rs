//! How well GPUs are packed: the trace "openb", replayed by the published protocol, with the published arrivals.

use std::{collections::BTreeMap, thread, time::Instant};

use anyhow::{Context, Result};
use shaper_core::place::{Cluster, GpuRequest, NodeId, Placement, Request, Scorer, Scoring, Shape, TaskMix};
use shaper_tests::statistics::{error_of, mean};

use super::{
    data::{self, NodeShape, Random, TaskShape},
    streams,
};
use crate::{Plan, report::Report, traces};

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
/// How many of them do for a quick look.
const QUICK: usize = 3;
/// Student's t for 95 %, of as many seeds as there are.
const T: f64 = 2.262;
const QUICK_T: f64 = 4.303;
/// Of what is asked for by GPU capacity, in percent, where allocation is read off: the mean over arrivals that round
/// to it. There are none beyond the last.
const ARRIVALS: [u64; 2] = [100, 130];

/// Percent of GPU capacity that is allocated at each of [`ARRIVALS`].
type Allocated = [f64; 2];

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let Some(nodes) = data::nodes()? else {
        report.skip("packing", &format!("there is no {}", traces::folder().join("openb").display()));
        return Ok(());
    };
    let start = Instant::now();
    let seeds: Vec<u64> = if plan.is_quick { SEEDS.take(QUICK).collect() } else { SEEDS.collect() };
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
                if let Some(published) = published.get(&(name.clone(), policy.to_owned())) {
                    let off = mean(&table.of(name, by, at)) - published.means[at];
                    report.tell(&format!("{title}: {} less the published mean", by.name()), off, "points");
                }
            }
            let theirs = table.of(name, By::Scorer(Scorer::Fgd), at);
            if let Some(published) = published.get(&(name.clone(), "FGD".to_owned())) {
                report.tell(&format!("{title}: published FGD"), published.means[at], "%");
                let error = published.deviations[at] / (SEEDS.count() as f64).sqrt();
                report.tell(&format!("{title}: standard error of that mean"), error, "points");
                report.tell(&format!("{title}: standard error of fgd's"), error_of(&theirs), "points");
                let (metric, off) =
                    (format!("{title}: fgd less the published mean"), mean(&theirs) - published.means[at]);
                if plan.is_quick {
                    report.tell(&metric, off, "points");
                } else {
                    report.within(0.2, &metric, off, "points");
                }
            }
            let ours = table.of(name, By::Scorer(Scorer::Fragmentation), at);
            let gains: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
            let half = if plan.is_quick { QUICK_T } else { T } * error_of(&gains);
            let gain = mean(&gains);
            report.at_least(0.0, &format!("{title}: fragmentation less fgd, mean of pairs"), gain, "points");
            report.tell(&format!("{title}: half of its 95 % interval"), half, "points");
            if !plan.is_quick {
                let metric = format!("{title}: fragmentation less fgd, lower end of the 95 % interval");
                report.at_least(0.0, &metric, gain - half, "points");
            }
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

/// One run. What does not fit is dropped, and nothing departs.
fn replay(nodes: &[NodeShape], tasks: &[TaskShape], by: By, seed: u64) -> Result<Allocated> {
    let capacity: u64 = nodes.iter().map(|shape| u64::from(shape.gpus) * 1000).sum();
    let most = ARRIVALS.into_iter().max().unwrap_or(0);
    let stream = streams::published(seed, tasks, nodes.len(), capacity * most / 100);
    let mut cluster = Cluster::default();
    for (number, node) in stream.nodes.iter().enumerate() {
        cluster.add(nodes[*node].spec(number, BTreeMap::new()))?;
    }
    let requests: Vec<Request> =
        tasks.iter().map(|task| task.request(&mut cluster, &BTreeMap::new())).collect();
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
    let mut random = Random::new(seed);
    let (mut asked, mut allocated) = (0, 0);
    let mut readings = ARRIVALS.map(|_| Vec::new());
    for next in stream.tasks {
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
        for (readings, percent) in readings.iter_mut().zip(ARRIVALS) {
            // Within half a percent.
            if (asked * 100).abs_diff(capacity * percent) * 2 <= capacity {
                readings.push(allocated as f64 / capacity as f64 * 100.0);
            }
        }
    }
    Ok(readings.map(|readings| mean(&readings)))
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
