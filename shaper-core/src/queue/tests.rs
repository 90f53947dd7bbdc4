//! Each promise of the queue, against a world that keeps its own books.

mod refused;
mod told;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{
    place::{GpuRequest, Gpus, Request},
    spec::{Capacity, Demand},
    units::{Bytes, Millicores},
};

fn node(name: &str, cpu: u64, zone: &str) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        capacity: Capacity {
            cpu: Millicores(cpu),
            memory: Bytes(1000),
            gpu_memory: None,
            network: None,
            storage_io: None,
        },
        gpus: Gpus::default(),
        labels: BTreeMap::from([("zone".to_owned(), zone.to_owned())]),
        taints: BTreeSet::new(),
    }
}

fn demand(cpu: u64) -> Demand {
    Demand { cpu: Millicores(cpu), memory: Bytes(1), gpu_memory: None, network: None, storage_io: None }
}

/// What runs, as told by decisions alone.
#[derive(Clone, Debug)]
struct Running {
    attempt: u32,
    at: Placement,
    cpu: u64,
    since: UnixNanos,
    stopping: bool,
}

/// The nodes, as they would be: they do what is decided, when the test lets them.
struct World {
    queue: Queue,
    any: ConstraintId,
    now: UnixNanos,
    jobs: Vec<JobSpec>,
    running: BTreeMap<TaskKey, Running>,
    shrinking: BTreeSet<TaskKey>,
    over: BTreeMap<JobId, Verdict>,
    nodes: Vec<u64>,
    zones: Vec<String>,
    inputs: Vec<(Input, UnixNanos)>,
    log: Vec<Decision>,
}

impl World {
    fn new(config: Config) -> World {
        let mut queue = Queue::new(config);
        let any = queue.constraint(&Constraint::default());
        World {
            queue,
            any,
            now: 0,
            jobs: Vec::new(),
            running: BTreeMap::new(),
            shrinking: BTreeSet::new(),
            over: BTreeMap::new(),
            nodes: Vec::new(),
            zones: Vec::new(),
            inputs: Vec::new(),
            log: Vec::new(),
        }
    }

    fn with_nodes(config: Config, cpus: &[u64]) -> World {
        let mut world = World::new(config);
        for (number, cpu) in cpus.iter().enumerate() {
            world.add(*cpu, &format!("zone-{}", number % 2));
        }
        world
    }

    fn add(&mut self, cpu: u64, zone: &str) {
        let name = format!("node-{}", self.nodes.len());
        self.nodes.push(cpu);
        self.zones.push(zone.to_owned());
        self.tell(Input::Node(node(&name, cpu, zone)));
    }

    fn job(&self, cpu: u64, priority: Priority) -> JobSpec {
        JobSpec {
            namespace: "a".to_owned(),
            request: Request { demand: demand(cpu), gpu: GpuRequest::None, constraint: self.any, priority },
            tasks: Tasks::One,
            spread: None,
            floor: None,
            preempts: false,
            oversubscribes: false,
            runs_for: None,
            timeout: None,
            retries: 0,
            after_ok: Vec::new(),
        }
    }

    fn submit(&mut self, spec: JobSpec) -> JobId {
        let id = JobId(self.jobs.len() as u32);
        self.jobs.push(spec.clone());
        let decisions = self.tell(Input::Submit(spec));
        assert!(decisions.contains(&Decision::Accepted(id)), "{decisions:?}");
        id
    }

    fn tell(&mut self, input: Input) -> Vec<Decision> {
        self.inputs.push((input.clone(), self.now));
        let decisions = self.queue.handle(input, self.now);
        for decision in &decisions {
            self.note(decision);
        }
        self.log.extend(decisions.iter().cloned());
        self.check(&decisions);
        decisions
    }

    fn note(&mut self, decision: &Decision) {
        match decision {
            Decision::Start { task, attempt, at } => {
                let cpu = self.jobs[task.job.0 as usize].request.demand.cpu.0;
                let running = Running { attempt: *attempt, at: *at, cpu, since: self.now, stopping: false };
                let before = self.running.insert(*task, running);
                assert!(before.is_none(), "{task} runs twice");
            }
            Decision::Stop { task, attempt, why } => {
                let running = self.running.get_mut(task).expect("what is stopped runs");
                assert_eq!(running.attempt, *attempt);
                assert!(!running.stopping, "{task} is stopped twice");
                running.stopping = true;
                if let Stop::Preempted(by) = why {
                    let priority = |key: &TaskKey| self.jobs[key.job.0 as usize].request.priority;
                    assert!(priority(by) > priority(task), "{by} has {task} stopped");
                    assert!(self.jobs[by.job.0 as usize].preempts);
                }
            }
            Decision::Shrink { task, .. } => {
                assert!(self.running.contains_key(task));
                assert!(self.shrinking.insert(*task), "{task} is shrunk twice");
            }
            Decision::Over(job, verdict) => {
                assert!(self.over.insert(*job, *verdict).is_none(), "{job:?} is over twice");
            }
            Decision::Node(_)
            | Decision::Accepted(_)
            | Decision::Refused(_)
            | Decision::Nominated { .. }
            | Decision::ScaleOut { .. } => {}
        }
    }

    fn spec(&self, task: &TaskKey) -> &JobSpec {
        &self.jobs[task.job.0 as usize]
    }

    /// What holds after each input.
    fn check(&self, decisions: &[Decision]) {
        for (number, cpu) in self.nodes.iter().enumerate() {
            let here = self.running.iter().filter(|(_, it)| it.at.node.0 as usize == number);
            let reserved: u64 =
                here.filter(|(task, _)| !self.spec(task).oversubscribes).map(|(_, it)| it.cpu).sum();
            assert!(reserved <= *cpu, "{reserved} of {cpu} on node {number}");
        }
        let mut started: BTreeMap<JobId, u32> = BTreeMap::new();
        for decision in decisions {
            if let Decision::Start { task, .. } = decision {
                *started.entry(task.job).or_default() += 1;
            }
        }
        for (id, count) in started {
            let spec = &self.jobs[id.0 as usize];
            if let Tasks::Gang(all) = spec.tasks {
                assert_eq!(count, all, "a gang starts as a whole");
            }
            if let Tasks::Array { at_once: Some(most), .. } = spec.tasks {
                assert!(self.running.keys().filter(|task| task.job == id).count() as u32 <= most);
            }
            if let Some(Spread { label, most }) = &spec.spread {
                let mut places: BTreeMap<String, u32> = BTreeMap::new();
                for (_, it) in self.running.iter().filter(|(task, _)| task.job == id) {
                    let node = it.at.node.0 as usize;
                    let place = if label.is_some() { self.zones[node].clone() } else { node.to_string() };
                    *places.entry(place).or_default() += 1;
                }
                assert!(places.values().all(|count| count <= most), "{places:?}");
            }
            for before in &spec.after_ok {
                assert_eq!(self.over.get(before), Some(&Verdict::Succeeded));
            }
        }
    }

    fn end(&mut self, task: TaskKey, outcome: Outcome) -> Vec<Decision> {
        let Running { attempt, .. } = self.running.remove(&task).expect("it runs");
        self.shrinking.remove(&task);
        self.tell(Input::Ended { task, attempt, outcome })
    }

    fn shrink(&mut self, task: TaskKey, done: bool) -> Vec<Decision> {
        self.shrinking.remove(&task);
        if done {
            let floor = self.spec(&task).floor.expect("it has a floor").cpu.0;
            self.running.get_mut(&task).expect("it runs").cpu = floor;
        }
        self.tell(Input::Shrunk { task, done })
    }

    fn at(&mut self, now: UnixNanos) -> Vec<Decision> {
        self.now = now;
        self.tell(Input::Tick)
    }

    fn runs(&self, job: JobId) -> bool {
        self.running.keys().any(|task| task.job == job)
    }

    /// Everybody does what he is told, and ends well, until nothing happens any more.
    fn run_out(&mut self) {
        for _ in 0..10_000 {
            let obeys = self.running.iter().find(|(_, it)| it.stopping).map(|(task, _)| *task);
            if let Some(task) = obeys {
                self.end(task, Outcome::Stopped);
            } else if let Some(task) = self.shrinking.first().copied() {
                self.shrink(task, true);
            } else if let Some(task) = self.running.keys().next().copied() {
                self.end(task, Outcome::Succeeded);
            } else if let Some(at) = self.queue.next_wakeup() {
                let at = at.max(self.now);
                self.at(at);
            } else {
                return;
            }
        }
        panic!("it never ends");
    }
}

fn single(job: JobId) -> TaskKey {
    TaskKey { job, index: 0 }
}

#[test]
fn who_has_had_the_least_is_next() {
    let mut world = World::with_nodes(Config::default(), &[4000]);
    let first = JobSpec { namespace: "a".into(), ..world.job(1000, Priority::Medium) };
    let ids: Vec<JobId> = (0..6).map(|_| world.submit(first.clone())).collect();
    let other = world.submit(JobSpec { namespace: "b".into(), ..first });
    assert!(ids[..4].iter().all(|id| world.runs(*id)) && !world.runs(other));
    world.end(single(ids[0]), Outcome::Succeeded);
    assert!(world.runs(other), "before two that came earlier");
    world.tell(Input::Quota("a".into(), Quota { most: [Some(2000), None, None], weight: 1 }));
    world.end(single(ids[1]), Outcome::Succeeded);
    assert!(!world.runs(ids[4]), "two thousand are used");
    let Some(Why::Waits { blocked: Some(Blocked::Quota(over)), .. }) = world.queue.why(single(ids[4])) else {
        panic!("{:?}", world.queue.why(single(ids[4])))
    };
    assert_eq!(over, OverQuota { resource: 0, wanted: 1000, used: 2000, most: 2000 });
}

#[test]
fn whoever_waits_too_long_is_next() {
    let config = Config { ages_after: 10, ..Config::default() };
    let mut world = World::with_nodes(config, &[1000]);
    let running = world.submit(world.job(1000, Priority::High));
    let low = world.submit(world.job(1000, Priority::Low));
    world.at(20);
    let high = world.submit(world.job(1000, Priority::High));
    world.end(single(running), Outcome::Succeeded);
    assert!(world.runs(low) && !world.runs(high));
}

#[test]
fn others_are_shrunk_before_any_is_ended() {
    let mut world = World::with_nodes(Config::default(), &[4000]);
    let wide = world.submit(JobSpec { floor: Some(demand(1000)), ..world.job(3000, Priority::Medium) });
    let low = world.submit(world.job(1000, Priority::Low));
    let high = JobSpec { preempts: true, ..world.job(2000, Priority::High) };
    let first = world.submit(high.clone());
    assert_eq!(
        world.log.last(),
        Some(&Decision::Shrink { task: single(wide), makes_room_for: single(first) })
    );
    assert!(
        matches!(world.queue.why(single(first)), Some(Why::Nominated { awaits, .. }) if awaits == [single(wide)])
    );
    world.shrink(single(wide), true);
    assert!(world.runs(first));
    // There is nothing to shrink any more: who is ended is the lower, and gives up what it takes.
    let second = world.submit(JobSpec { request: world.job(1000, Priority::High).request, ..high });
    assert!(world.running[&single(low)].stopping && !world.running[&single(wide)].stopping);
    world.end(single(low), Outcome::Stopped);
    assert!(world.runs(second));
    // And it waits for a node again.
    world.end(single(first), Outcome::Succeeded);
    assert!(world.runs(low));
}

#[test]
fn who_cannot_be_shrunk_is_not_counted_on() {
    let mut world = World::with_nodes(Config::default(), &[4000]);
    let wide = world.submit(JobSpec { floor: Some(demand(1000)), ..world.job(3000, Priority::Medium) });
    let next = world.submit(world.job(2000, Priority::Medium));
    world.shrink(single(wide), false);
    assert!(!world.runs(next));
    assert!(matches!(world.queue.why(single(next)), Some(Why::Waits { blocked: Some(Blocked::NoRoom), .. })));
    assert_eq!(world.log.iter().filter(|it| matches!(it, Decision::ScaleOut { .. })).count(), 1);
    world.end(single(wide), Outcome::Succeeded);
    assert!(world.runs(next));
}

#[test]
fn a_gang_starts_as_a_whole_and_begins_again_as_a_whole() {
    let mut world = World::with_nodes(Config::default(), &[2000, 2000]);
    let gang = JobSpec { tasks: Tasks::Gang(3), retries: 1, ..world.job(1000, Priority::Medium) };
    let one = world.submit(gang.clone());
    let other = world.submit(gang);
    assert!(world.runs(one) && !world.runs(other));
    assert_eq!(world.queue.cluster().taken(NodeId(0)).map(|it| it.cpu), Some(2000));
    let member = |index| TaskKey { job: one, index };
    world.end(member(2), Outcome::Succeeded);
    world.end(member(0), Outcome::Failed);
    assert!(world.running[&member(1)].stopping, "it is of no use alone");
    world.end(member(1), Outcome::Stopped);
    assert!(world.runs(other), "while the first backs off");
    world.run_out();
    assert_eq!(world.over.values().collect::<Vec<_>>(), [&Verdict::Succeeded; 2]);
}

#[test]
fn only_who_does_not_delay_the_first_goes_before_it() {
    let mut world = World::with_nodes(Config::default(), &[4000, 2000]);
    let lasts =
        |world: &World, cpu, long| JobSpec { runs_for: Some(long), ..world.job(cpu, Priority::Medium) };
    let holder = world.submit(lasts(&world, 3000, 100));
    let small = world.submit(lasts(&world, 1000, 500));
    let head = world.submit(lasts(&world, 4000, 50));
    assert!(matches!(world.queue.why(single(head)), Some(Why::Waits { promised: Some(100), .. })));
    assert!(world.runs(holder) && world.runs(small));
    // On the node that was promised 1000 are free until 100.
    let too_long = world.submit(lasts(&world, 1000, 200));
    let elsewhere = world.submit(lasts(&world, 1000, 200));
    assert!(world.runs(too_long) || world.runs(elsewhere), "there is another node");
    let third = world.submit(lasts(&world, 1000, 200));
    assert!(!world.runs(third));
    let why = world.queue.why(single(third));
    assert!(
        matches!(why, Some(Why::Waits { blocked: Some(Blocked::Behind { until: 100, .. }), .. })),
        "{why:?}"
    );
    let short = world.submit(lasts(&world, 1000, 90));
    assert!(world.runs(short));
}

#[test]
fn what_is_reserved_and_not_used_is_lent_to_who_asks_for_that() {
    let mut world = World::with_nodes(Config::default(), &[4000]);
    world.submit(world.job(4000, Priority::High));
    let borrower = JobSpec { oversubscribes: true, ..world.job(1000, Priority::Low) };
    let refused = JobSpec { request: world.job(1, Priority::High).request, ..borrower.clone() };
    assert!(matches!(world.tell(Input::Submit(refused))[..], [Decision::Refused(_)]));
    let one = world.submit(borrower.clone());
    let other = world.submit(borrower);
    assert!(!world.runs(one));
    world.tell(Input::Peak(NodeId(0), 1500));
    assert!(world.runs(one) && world.runs(other));
    // They use it themselves: the younger goes first.
    world.tell(Input::Peak(NodeId(0), 2500));
    assert!(!world.running[&single(one)].stopping && world.running[&single(other)].stopping);
}

#[test]
fn a_drained_node_is_left_and_a_cordoned_one_kept() {
    let mut world = World::with_nodes(Config::default(), &[2000, 1000]);
    let one = world.submit(world.job(1000, Priority::Medium));
    world.tell(Input::Readiness(NodeId(0), Readiness::Cordoned));
    assert!(!world.running[&single(one)].stopping);
    let other = world.submit(world.job(1000, Priority::Medium));
    assert_eq!(world.running[&single(other)].at.node, NodeId(1));
    world.tell(Input::Readiness(NodeId(0), Readiness::Draining));
    assert!(world.running[&single(one)].stopping);
    world.end(single(other), Outcome::Succeeded);
    world.end(single(one), Outcome::Stopped);
    assert_eq!(world.running[&single(one)].at.node, NodeId(1));
}

#[test]
fn what_waits_for_others_begins_after_them_or_never() {
    let mut world = World::with_nodes(Config::default(), &[4000]);
    let array = Tasks::Array { count: 3, at_once: Some(2) };
    let first = world.submit(JobSpec { tasks: array, retries: 1, ..world.job(1000, Priority::Medium) });
    let second = world.submit(JobSpec { after_ok: vec![first], ..world.job(1000, Priority::High) });
    let third = world.submit(JobSpec { after_ok: vec![second], ..world.job(1000, Priority::High) });
    assert_eq!(world.queue.why(single(second)), Some(Why::After(vec![first])));
    assert_eq!(world.running.len(), 2);
    world.end(single(first), Outcome::Failed);
    assert_eq!(world.queue.why(single(first)), Some(Why::Backoff(SECOND)));
    world.at(SECOND);
    world.end(single(first), Outcome::Succeeded);
    world.end(TaskKey { job: first, index: 1 }, Outcome::Succeeded);
    assert!(!world.runs(second));
    world.end(TaskKey { job: first, index: 2 }, Outcome::Succeeded);
    assert!(world.runs(second));
    world.end(single(second), Outcome::Failed);
    assert_eq!(world.over[&second], Verdict::Failed);
    assert_eq!(world.over[&third], Verdict::Skipped);
    let late = world.submit(JobSpec { after_ok: vec![second], ..world.job(1, Priority::Low) });
    assert_eq!(world.over[&late], Verdict::Skipped);
    let unknown = JobSpec { after_ok: vec![JobId(99)], ..world.job(1, Priority::Low) };
    let refused = Refusal::NoSuchJob { job: JobId(99), submitted: 4 };
    assert_eq!(refused.to_string(), "there is no job 99; the latest is 3");
    assert_eq!(world.tell(Input::Submit(unknown)), [Decision::Refused(refused.clone())]);
    assert_eq!(world.tell(Input::Cancel(JobId(99))), [Decision::Refused(refused)]);
}

#[test]
fn who_runs_too_long_is_ended_and_does_not_come_back() {
    let mut world = World::with_nodes(Config::default(), &[1000]);
    let job = world.submit(JobSpec { timeout: Some(50), retries: 3, ..world.job(1000, Priority::Medium) });
    assert_eq!(world.queue.next_wakeup(), Some(50));
    world.at(50);
    assert!(world.running[&single(job)].stopping);
    world.end(single(job), Outcome::Stopped);
    assert_eq!(world.over[&job], Verdict::TimedOut);
}

/// What happens in the property test.
#[derive(Clone, Debug)]
enum Step {
    Submit { job: Draft, after: Option<prop::sample::Index> },
    End(prop::sample::Index, Outcome),
    Obey(prop::sample::Index),
    Shrink(prop::sample::Index, bool),
    Cancel(prop::sample::Index),
    Node(u64),
    Ready(prop::sample::Index, Readiness),
    Peak(prop::sample::Index, u64),
    Quota(bool, Option<u64>),
    Pass(u64),
}

#[derive(Clone, Debug)]
struct Draft {
    cpu: u64,
    priority: Priority,
    tasks: Tasks,
    spread: Option<Spread>,
    floor: Option<u64>,
    preempts: bool,
    oversubscribes: bool,
    runs_for: Option<u64>,
    timeout: Option<u64>,
    retries: u32,
    is_other: bool,
}

fn a_draft() -> impl Strategy<Value = Draft> {
    let priority = prop_oneof![Just(Priority::Low), Just(Priority::Medium), Just(Priority::High)];
    let tasks = prop_oneof![
        4 => Just(Tasks::One),
        2 => (1u32..4).prop_map(Tasks::Gang),
        1 => (1u32..5, prop::option::of(1u32..3)).prop_map(|(count, at_once)| Tasks::Array { count, at_once }),
    ];
    let spread = prop::option::weighted(
        0.3,
        (any::<bool>(), 1u32..3)
            .prop_map(|(zone, most)| Spread { label: zone.then(|| "zone".to_owned()), most }),
    );
    let times = (prop::option::of(1u64..200), prop::option::weighted(0.2, 1u64..300));
    let flags = (any::<bool>(), prop::bool::weighted(0.2), any::<bool>());
    (1u64..9, priority, tasks, spread, prop::option::weighted(0.3, 1u64..5), times, 0u32..3, flags).prop_map(
        |(cpu, priority, tasks, spread, floor, (runs_for, timeout), retries, flags)| {
            let (preempts, oversubscribes, is_other) = flags;
            let oversubscribes = oversubscribes && priority == Priority::Low;
            let floor = floor.map(|floor| floor.min(cpu));
            Draft {
                cpu,
                priority,
                tasks,
                spread,
                floor,
                preempts,
                oversubscribes,
                runs_for,
                timeout,
                retries,
                is_other,
            }
        },
    )
}

fn a_step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let outcome =
        prop_oneof![6 => Just(Outcome::Succeeded), 2 => Just(Outcome::Failed), 1 => Just(Outcome::Lost)];
    let readiness = prop_oneof![
        3 => Just(Readiness::Ready),
        1 => Just(Readiness::Cordoned),
        1 => Just(Readiness::Draining),
        1 => Just(Readiness::Away)
    ];
    prop_oneof![
        8 => (a_draft(), prop::option::weighted(0.15, index())).prop_map(|(job, after)| Step::Submit { job, after }),
        6 => (index(), outcome).prop_map(|(which, outcome)| Step::End(which, outcome)),
        4 => index().prop_map(Step::Obey),
        3 => (index(), prop::bool::weighted(0.8)).prop_map(|(which, done)| Step::Shrink(which, done)),
        1 => index().prop_map(Step::Cancel),
        1 => (4u64..12).prop_map(Step::Node),
        1 => (index(), readiness).prop_map(|(which, readiness)| Step::Ready(which, readiness)),
        2 => (index(), 0u64..12).prop_map(|(which, peak)| Step::Peak(which, peak)),
        1 => (any::<bool>(), prop::option::of(4u64..30)).prop_map(|(which, most)| Step::Quota(which, most)),
        2 => (1u64..40).prop_map(Step::Pass),
    ]
}

fn some<T: Copy>(of: impl Iterator<Item = T>, which: &prop::sample::Index) -> Option<T> {
    let all: Vec<T> = of.collect();
    (!all.is_empty()).then(|| all[which.index(all.len())])
}

impl World {
    fn act(&mut self, step: Step) {
        match step {
            Step::Submit { job, after } => {
                let known = |job: &u32| self.queue.jobs.what_of(JobId(*job)) == Known::Here;
                let known = (0..self.jobs.len() as u32).filter(known);
                let after_ok = after.and_then(|which| some(known, &which));
                let spec = JobSpec {
                    namespace: if job.is_other { "b" } else { "a" }.to_owned(),
                    tasks: job.tasks,
                    spread: job.spread,
                    floor: job.floor.map(demand),
                    preempts: job.preempts,
                    oversubscribes: job.oversubscribes,
                    runs_for: job.runs_for,
                    timeout: job.timeout,
                    retries: job.retries,
                    after_ok: after_ok.map(JobId).into_iter().collect(),
                    ..self.job(job.cpu, job.priority)
                };
                self.submit(spec);
            }
            Step::End(which, outcome) => {
                if let Some(task) = some(self.running.keys().copied(), &which) {
                    self.end(task, outcome);
                }
            }
            Step::Obey(which) => {
                let stopping = self.running.iter().filter(|(_, it)| it.stopping).map(|(task, _)| *task);
                if let Some(task) = some(stopping, &which) {
                    self.end(task, Outcome::Stopped);
                }
            }
            Step::Shrink(which, done) => {
                if let Some(task) = some(self.shrinking.iter().copied(), &which) {
                    self.shrink(task, done);
                }
            }
            Step::Cancel(which) => {
                if let Some(job) = some(0..self.jobs.len() as u32, &which) {
                    self.tell(Input::Cancel(JobId(job)));
                }
            }
            Step::Node(cpu) => {
                let zone = format!("zone-{}", self.nodes.len() % 2);
                self.add(cpu, &zone);
            }
            Step::Ready(which, readiness) => {
                if let Some(node) = some(0..self.nodes.len() as u32, &which) {
                    self.tell(Input::Readiness(NodeId(node), readiness));
                }
            }
            Step::Peak(which, peak) => {
                if let Some(node) = some(0..self.nodes.len() as u32, &which) {
                    self.tell(Input::Peak(NodeId(node), peak));
                }
            }
            Step::Quota(is_other, most) => {
                let name = if is_other { "b" } else { "a" };
                self.tell(Input::Quota(name.to_owned(), Quota { most: [most, None, None], weight: 1 }));
            }
            Step::Pass(long) => {
                let now = self.now + long;
                self.at(now);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever happens, the world's own books are never overdrawn (see [`World::check`]); once every node is ready, empty
    /// of quotas and large enough, all jobs end; and the same inputs give the same decisions.
    #[test]
    fn nothing_is_overcommitted_and_everybody_has_his_turn(steps in prop::collection::vec(a_step(), 1..90)) {
        let config = Config { ages_after: 500, fresh_for: 100, remembers: 6, ..Config::default() };
        let mut world = World::with_nodes(config.clone(), &[8, 8, 6]);
        for step in steps {
            world.act(step);
        }
        // Room for any gang, however it is to be spread.
        for number in 0..6 {
            world.add(64, &format!("zone-{number}"));
        }
        for name in ["a", "b"] {
            world.tell(Input::Quota(name.to_owned(), Quota::default()));
        }
        for node in 0..world.nodes.len() as u32 {
            world.tell(Input::Readiness(NodeId(node), Readiness::Ready));
            world.tell(Input::Peak(NodeId(node), 0));
        }
        world.run_out();
        for job in 0..world.jobs.len() as u32 {
            let why = world.queue.why(single(JobId(job)));
            prop_assert!(world.over.contains_key(&JobId(job)), "{:?} {:?}", world.jobs[job as usize], why);
        }
        for (node, _) in (0..).zip(&world.nodes) {
            prop_assert_eq!(world.queue.cluster().taken(NodeId(node)), Some(Default::default()));
        }

        let mut again = Queue::new(config);
        again.constraint(&Constraint::default());
        let decisions: Vec<Decision> =
            world.inputs.iter().flat_map(|(input, now)| again.handle(input.clone(), *now)).collect();
        prop_assert_eq!(decisions, world.log);
        prop_assert_eq!(again.digest(), world.queue.digest());
    }

    /// Whoever was promised a place has it by then, if all end when they were thought to, whoever went before him.
    #[test]
    fn a_promise_is_kept(
        jobs in prop::collection::vec((1u64..9, 1u64..60, 1u32..4, 0u64..20), 2..40),
        backfills: bool,
    ) {
        let config = Config { order: Order::Arrival, backfills, ..Config::default() };
        let mut world = World::with_nodes(config, &[8, 8, 6]);
        let mut promises: BTreeMap<JobId, UnixNanos> = BTreeMap::new();
        let mut jobs = jobs.into_iter();
        let mut next = jobs.next();
        let mut arrives = 0;
        loop {
            let ends = world.running.iter().map(|(task, it)| (it.since + world.spec(task).runs_for.unwrap_or(0), *task));
            let end = ends.min();
            match (next, end) {
                (Some((cpu, long, count, after)), end) if end.is_none_or(|(at, _)| arrives < at) => {
                    world.now = world.now.max(arrives);
                    let spec = JobSpec {
                        tasks: Tasks::Gang(count), runs_for: Some(long), ..world.job(cpu.min(8), Priority::Medium)
                    };
                    // Gangs that never fit wait for ever.
                    if cpu * u64::from(count) <= 8 || cpu <= 6 && count <= 3 {
                        world.submit(spec);
                    }
                    arrives += after;
                    next = jobs.next();
                }
                (_, Some((at, task))) => {
                    world.now = world.now.max(at);
                    world.end(task, Outcome::Succeeded);
                }
                (None, None) => break,
                (Some(_), None) => unreachable!("arrivals come first where nothing runs"),
            }
            for job in 0..world.jobs.len() as u32 {
                let job = JobId(job);
                if world.runs(job) && let Some(at) = promises.remove(&job) {
                    prop_assert!(world.now <= at, "{:?} was promised {} and starts at {}", job, at, world.now);
                }
                if let Some((key, promised)) = &world.queue.promised && key.job == job {
                    let before = promises.entry(job).or_insert(promised.at());
                    *before = promised.at().min(*before);
                }
            }
        }
        prop_assert_eq!(world.over.len(), world.jobs.len());
    }
}
