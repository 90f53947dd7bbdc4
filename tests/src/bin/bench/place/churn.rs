//! Decisions a second, with arrivals and departures, on nodes and tasks of the shapes of the trace "openb".

use std::{
    collections::{BTreeMap, BTreeSet},
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use shaper_core::place::{Cluster, GpuRequest, NodeId, Placement, Request, Scorer, Scoring, Walk};

use super::data::{self, NodeShape, Random, TaskShape};
use crate::{
    Plan,
    report::{Report, quantile},
    traces,
};

/// Zones that nodes are labelled with, in turn.
const ZONES: usize = 8;
/// Tasks that do not fit, one after the other, until the cluster counts as full.
const PATIENCE: usize = 20_000;

struct Scene {
    nodes: usize,
    /// Of the most used resource, in thousandths.
    full: u64,
    decisions: usize,
    /// Every so many decisions one is checked against the plain formula.
    check_every: usize,
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let Some(shapes) = data::nodes()? else {
        report.skip("placement", &format!("there is no {}", traces::folder().join("openb").display()));
        return Ok(());
    };
    let tasks = data::tasks("default")?;
    let decisions = if plan.is_quick { 200_000 } else { 1_000_000 };
    let checks = if plan.is_quick { 2_000 } else { 20_000 };
    for (full, goal) in [(700, 1e6), (900, 3e5)] {
        let scene = Scene { nodes: 10_000, full, decisions, check_every: decisions / checks };
        let found = play(&scene, &shapes, &tasks)?;
        let title = format!("10,000 nodes, {} % full", full / 10);
        found.tell(report, &title);
        report.at_least(
            goal,
            &format!("{title}: decisions, each carried out, and departures"),
            found.rate,
            "/s",
        );
    }
    for full in [700, 900] {
        let scene =
            Scene { nodes: 100_000, full, decisions: decisions / 2, check_every: decisions / (checks / 8) };
        let found = play(&scene, &shapes, &tasks)?;
        let title = format!("100,000 nodes, {} % full", full / 10);
        found.tell(report, &title);
        report.tell(&format!("{title}: decisions, each carried out, and departures"), found.rate, "/s");
        report.at_most(30.0, &format!("{title}: a decision, p99.9"), found.slow, "us");
        report.at_most(
            30.0,
            &format!("{title}: the slowest shape of task, least of 20 times"),
            found.worst,
            "us",
        );
        report.tell(
            &format!("{title}: the longest single decision, whatever interrupted it"),
            found.longest,
            "us",
        );
    }
    Ok(())
}

struct Found {
    full: f64,
    rate: f64,
    /// p99.9 and the most, of single decisions without what carries them out, microseconds.
    slow: f64,
    longest: f64,
    worst: f64,
    compared: f64,
    unplaced: f64,
    checked: usize,
    wrong: usize,
    same: bool,
}

impl Found {
    fn tell(&self, report: &mut Report, title: &str) {
        report.tell(&format!("{title}: most used resource, when it was measured"), self.full, "%");
        report.tell(&format!("{title}: tasks that no node had room for"), self.unplaced, "%");
        report.tell(&format!("{title}: blocks of 64 compared for a decision, mean"), self.compared, "");
        report.tell(
            &format!("{title}: decisions checked against the plain formula"),
            self.checked as f64,
            "",
        );
        report.exactly(
            0.0,
            &format!("{title}: of them, other nodes than the formula's"),
            self.wrong as f64,
            "",
        );
        let other = if self.same { 0.0 } else { 1.0 };
        report.exactly(
            0.0,
            &format!("{title}: runs with other decisions than the one that was checked"),
            other,
            "",
        );
    }
}

/// Three runs of the same decisions: checked, each timed, and timed as a whole.
fn play(scene: &Scene, shapes: &[NodeShape], tasks: &[TaskShape]) -> Result<Found> {
    let mut start = Stage::build(scene, shapes, tasks)?;
    let full = start.fullness();
    let (mut checked, mut wrong, mut compared, mut unplaced) = (0, 0, 0u64, 0);
    let mut stage = start.clone();
    for number in 0..scene.decisions {
        let request = stage.next();
        let mut walk = Walk::default();
        let found = stage.cluster.decide_and_tell(&request, &stage.scoring, &mut walk, |_| true);
        compared += u64::from(walk.compared);
        unplaced += usize::from(found.is_none());
        if number % scene.check_every == 0 {
            checked += 1;
            wrong += usize::from(stage.plain(&request) != found.map(|at| at.node));
        }
        stage.carry_out(&request, found);
    }
    let checked_by = stage.digest;

    let mut times = Vec::with_capacity(scene.decisions);
    let mut slowest: BTreeMap<u32, (Duration, Request)> = BTreeMap::new();
    let mut stage = start.clone();
    for _ in 0..scene.decisions {
        let request = stage.next();
        let before = Instant::now();
        let found = black_box(stage.cluster.decide(&request, &stage.scoring));
        let took = before.elapsed();
        times.push(took.as_secs_f64() * 1e6);
        let slot = slowest.entry(stage.drawn).or_insert((took, request));
        slot.0 = slot.0.max(took);
        stage.carry_out(&request, found);
    }
    let mut same = stage.digest == checked_by;
    // Interruptions come once; what is slow by itself is slow again.
    let mut worst = 0.0f64;
    for (_, request) in slowest.values() {
        let again = (0..20).map(|_| {
            let before = Instant::now();
            black_box(stage.cluster.decide(request, &stage.scoring));
            before.elapsed().as_secs_f64() * 1e6
        });
        worst = worst.max(again.fold(f64::INFINITY, f64::min));
    }

    let before = Instant::now();
    for _ in 0..scene.decisions {
        let request = start.next();
        let found = start.cluster.decide(&request, &start.scoring);
        start.carry_out(&request, found);
    }
    let rate = scene.decisions as f64 / before.elapsed().as_secs_f64();
    same &= start.digest == checked_by;
    let of_all = |count: f64| count / scene.decisions as f64;
    Ok(Found {
        full,
        rate,
        slow: quantile(&times, 999),
        longest: times.iter().copied().fold(0.0, f64::max),
        worst,
        compared: of_all(compared as f64),
        unplaced: of_all(unplaced as f64) * 100.0,
        checked,
        wrong,
        same,
    })
}

/// A cluster with tasks on it.
#[derive(Clone)]
struct Stage {
    cluster: Cluster,
    scoring: Scoring,
    /// What may come: every different request that a task of the trace makes.
    requests: Vec<Request>,
    /// Of each task of the trace, which.
    tasks: Vec<u32>,
    /// Which request each task that runs made, and where it is.
    live: Vec<(u32, Placement)>,
    random: Random,
    /// Which request came last.
    drawn: u32,
    /// CPU, memory, thousandths of GPUs.
    total: [u64; 3],
    used: [u64; 3],
    limit: [u64; 3],
    /// Of all decisions so far.
    digest: u64,
}

fn amounts(request: &Request) -> [u64; 3] {
    [request.demand.cpu.0, request.demand.memory.0, request.gpu.thousandths()]
}

impl Stage {
    fn build(scene: &Scene, shapes: &[NodeShape], tasks: &[TaskShape]) -> Result<Stage> {
        let mut cluster = Cluster::default();
        let mut total = [0; 3];
        for (number, shape) in shapes.iter().cycle().take(scene.nodes).enumerate() {
            let zone = format!("zone-{}", number % ZONES);
            cluster.add(shape.spec(number, BTreeMap::from([("zone".to_owned(), zone)])))?;
            let has = [shape.cpu, shape.memory, u64::from(shape.gpus) * 1000];
            for (total, has) in total.iter_mut().zip(has) {
                *total += has;
            }
        }
        // One in ten has a constraint: on the model of its GPUs, or, without any, on the zone.
        let models: BTreeSet<&String> = shapes.iter().map(|shape| &shape.model).collect();
        let models: Vec<_> = models.into_iter().cloned().collect();
        let mut random = Random::new(1);
        let mut requests: Vec<Request> = Vec::new();
        let mut numbers = Vec::new();
        for task in tasks {
            let (mut task, mut labels) = (task.clone(), BTreeMap::new());
            task.models.clear();
            if random.below(10) == 0 {
                if task.gpu == GpuRequest::None {
                    let zone = format!("zone-{}", random.below(ZONES));
                    labels.insert("zone".to_owned(), BTreeSet::from([zone]));
                } else {
                    let model = || models[random.below(models.len())].clone();
                    task.models = std::iter::repeat_with(model).take(2).collect();
                }
            }
            let request = task.request(&mut cluster, &labels);
            let known = requests.iter().position(|it| *it == request).unwrap_or(requests.len());
            if known == requests.len() {
                requests.push(request);
            }
            numbers.push(known as u32);
        }
        let mut stage = Stage {
            cluster,
            scoring: Scoring::of(Scorer::Seed),
            requests,
            tasks: numbers,
            live: Vec::new(),
            random,
            drawn: 0,
            total,
            used: [0; 3],
            limit: total.map(|total| (u128::from(total) * u128::from(scene.full) / 1000) as u64),
            digest: 0,
        };
        let mut refused = 0;
        while !stage.is_beyond_limit() {
            let request = stage.next();
            match stage.cluster.decide(&request, &stage.scoring) {
                Some(at) => stage.take(&request, at)?,
                None => refused += 1,
            }
            if refused > PATIENCE {
                break;
            }
        }
        // Until everything there has come while others went.
        for _ in 0..2 * stage.live.len() {
            let request = stage.next();
            let found = stage.cluster.decide(&request, &stage.scoring);
            stage.carry_out(&request, found);
        }
        stage.digest = 0;
        Ok(stage)
    }

    fn draw(&mut self, count: usize) -> usize {
        self.random.below(count)
    }

    fn next(&mut self) -> Request {
        let task = self.draw(self.tasks.len());
        self.drawn = self.tasks[task];
        self.requests[self.drawn as usize]
    }

    /// The request that came last goes where it was decided that it goes.
    fn take(&mut self, request: &Request, at: Placement) -> Result<()> {
        if !self.cluster.allocate(request, at) {
            bail!("what was decided was not there");
        }
        for (used, amount) in self.used.iter_mut().zip(amounts(request)) {
            *used += amount;
        }
        self.live.push((self.drawn, at));
        Ok(())
    }

    /// A task comes, and others go until the cluster is as full as it is to be.
    fn carry_out(&mut self, request: &Request, found: Option<Placement>) {
        self.digest = (self.digest ^ found.map_or(u64::MAX, |at| u64::from(at.node.0)))
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(17);
        if let Some(at) = found
            && self.take(request, at).is_err()
        {
            self.digest = u64::MAX;
        }
        while self.is_beyond_limit() {
            let which = self.draw(self.live.len());
            let (number, at) = self.live.swap_remove(which);
            let request = &self.requests[number as usize];
            self.cluster.release(request, at);
            for (used, amount) in self.used.iter_mut().zip(amounts(request)) {
                *used -= amount;
            }
        }
    }

    fn is_beyond_limit(&self) -> bool {
        self.used.iter().zip(self.limit).any(|(used, limit)| *used > limit)
    }

    /// Of the most used resource, in percent.
    fn fullness(&self) -> f64 {
        let share = |(used, total): (&u64, u64)| *used as f64 / total as f64 * 100.0;
        self.used.iter().zip(self.total).map(share).fold(0.0, f64::max)
    }

    /// The formula, over all nodes, one after the other.
    fn plain(&self, request: &Request) -> Option<NodeId> {
        let mut best: Option<(u128, u128, NodeId)> = None;
        for id in self.cluster.ids().filter(|id| self.cluster.fits(*id, request)) {
            let (Some(spec), Some(taken)) = (self.cluster.spec(id), self.cluster.taken(id)) else { continue };
            let [cpus, memories] = [spec.capacity.cpu.0, spec.capacity.memory.0].map(u128::from);
            let [cpu, memory] = [cpus - u128::from(taken.cpu), memories - u128::from(taken.memory)];
            // Of the trace's nodes, which are below 2^17 millicores and 2^40 bytes: 2^118 at most.
            let (numerator, denominator) = (3 * cpu * memories + 2 * memory * cpus, cpus * memories);
            let is_better = best.is_none_or(|(best, of, _)| {
                if of == denominator { numerator > best } else { numerator * of > best * denominator }
            });
            if is_better {
                best = Some((numerator, denominator, id));
            }
        }
        best.map(|(.., id)| id)
    }
}
