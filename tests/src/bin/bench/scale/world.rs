//! A cluster without kernels: the broker's decisions, nodes that come and go as it asks, and tasks that use what they are said to
//! use.

use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use anyhow::{Context, Result, bail};
use shaper_broker::reactor::{
    Directive, DirectiveKind, DirectiveOutcome, DirectiveResult, Effect, Event, Hello, NodeTask, ScaleEvent,
    SessionId, State, begin, next_wakeup, on_event,
};
use shaper_core::{
    id::ExecutionId,
    limits::Limits,
    place::NOTHING,
    policy::PolicyFloors,
    scale::{Group, OrderKind, Provider, Scaling},
    spec::{Capacity, Credentials, Demand, OnNodeLost, Policy, Priority, Profile, TaskSpec},
    task::{ExitStatus, Origin, Owner, Phase, TaskStatus, Usage},
    units::{Bytes, Millicores},
};

const SECOND: u64 = 1_000_000_000;
const GIB: u64 = 1 << 30;
/// Of a node.
const CORES: u64 = 64;
/// Seconds until a node that was asked for is there.
const COMES_AFTER: u64 = 120;
/// Seconds without a task after which it is given back.
const IDLE: u64 = 600;
/// Agents tell what their tasks have used every so many seconds, and the broker looks at its groups.
const STEP: u64 = 30;
/// Of a series of use, seconds from one value to the next.
const SAMPLE: u64 = 300;
const WHO: Credentials = Credentials { uid: 0, gid: 0, groups: Vec::new() };

/// A job of the trace.
pub(super) struct Job {
    /// Seconds since the first.
    pub(super) arrives: u64,
    /// Seconds.
    pub(super) runs_for: u64,
    pub(super) cores: u64,
    /// What it uses, thousandths of its cores, every five minutes; it begins again after its end.
    pub(super) share: Rc<Vec<u64>>,
    pub(super) from: usize,
}

impl Job {
    /// Millicores that it wants when it has run for so many seconds.
    fn wants(&self, seconds: u64) -> u64 {
        let at = (self.from + (seconds / SAMPLE) as usize) % self.share.len();
        self.share[at] * self.cores
    }
}

/// What came of it.
#[derive(Default)]
pub(super) struct Outcome {
    /// Of each job, seconds.
    pub(super) waits: Vec<f64>,
    /// When there were how many nodes, those that are coming included.
    pub(super) nodes: Vec<(u64, u32)>,
    /// Millicore seconds that tasks wanted, and of these, what their nodes did not have.
    pub(super) wanted: u64,
    pub(super) missed: u64,
    /// How often less was reserved for a task.
    pub(super) lowered: u64,
}

struct Running {
    job: usize,
    node: String,
    began: u64,
    used_ns: u64,
    status: TaskStatus,
    request: Demand,
    generation: u64,
}

struct World<'a> {
    state: State,
    jobs: &'a [Job],
    /// Seconds.
    now: u64,
    sessions: u64,
    nodes: BTreeMap<String, SessionId>,
    /// When nodes come, and how they are called.
    coming: VecDeque<(u64, String)>,
    made: u64,
    running: BTreeMap<String, Running>,
    /// When which task ends.
    ends: BTreeMap<(u64, String), ()>,
    outcome: Outcome,
}

/// Everything from the first job to the end of the last. With `floor`, so many thousandths of a core stay reserved for each task at
/// least, and what it used lately; without, all that it asked for.
pub(super) fn run(jobs: &[Job], floor: Option<u64>) -> Result<Outcome> {
    let mut world = World {
        state: State::default(),
        jobs,
        now: 1,
        sessions: 0,
        nodes: BTreeMap::new(),
        coming: VecDeque::new(),
        made: 0,
        running: BTreeMap::new(),
        ends: BTreeMap::new(),
        outcome: Outcome::default(),
    };
    begin(&mut world.state);
    world.state.scale.scaling = Scaling { settle: 10 * SECOND, groups: vec![group()] };
    if let Some(floor) = floor {
        let policy = policy(Millicores(floor));
        world.on(Event::ApplyPolicy { caller: WHO, within: Vec::new(), policy: Box::new(policy) })?;
    }
    let mut arriving = jobs.iter().enumerate().peekable();
    let last = jobs.last().map_or(0, |job| job.arrives);
    // Whatever is left after so long is a fault.
    let patience = last + jobs.iter().map(|job| job.runs_for).max().unwrap_or(0) * 4 + 86_400;
    world.count_nodes();
    while world.outcome.waits.len() < jobs.len() || !world.running.is_empty() {
        if world.now > patience {
            bail!(
                "{} jobs of {} have begun, and {} run for ever",
                world.outcome.waits.len(),
                jobs.len(),
                world.running.len()
            );
        }
        while let Some((number, job)) = arriving.next_if(|(_, job)| job.arrives < world.now) {
            let spec = Box::new(spec(number, job));
            world.on(Event::Submit { caller: WHO, spec })?;
        }
        world.pass()?;
    }
    world.count_nodes();
    Ok(world.outcome)
}

fn group() -> Group {
    Group {
        name: "workers".into(),
        nodes: "w*".parse().expect("it is a pattern"),
        capacity: Some(capacity()),
        min: 0,
        max: 10_000,
        cooldown: 30 * SECOND,
        provision: 900 * SECOND,
        idle: Some(IDLE * SECOND),
        timeout: 60 * SECOND,
        provider: Provider::Exec { command: vec!["/bin/true".into()] },
    }
}

fn capacity() -> Capacity {
    Capacity { cpu: Millicores(CORES * 1000), memory: Bytes(1024 * GIB), ..NOTHING }
}

fn policy(floor: Millicores) -> Policy {
    Policy {
        policy_name: "jobs".into(),
        priority: Priority::Medium,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: None,
        preemption_enabled: false,
        window_millis: 10_000,
        selector: Default::default(),
        limits: Default::default(),
        floors: PolicyFloors { cpu: Some(floor), memory: None },
    }
}

fn spec(number: usize, job: &Job) -> TaskSpec {
    let demand = Demand {
        cpu: Millicores(job.cores * 1000),
        memory: Bytes(GIB),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };
    let task_id = format!("j{number}").parse().expect("it is a name");
    TaskSpec {
        profile: Profile { task_id, demand, priority: Priority::Medium, estimated_runtime_seconds: None },
        command: vec!["job".into()],
        env: Default::default(),
        cwd: "/".into(),
        name: "job".into(),
        namespace: "default".into(),
        labels: Default::default(),
        limits: Limits::default(),
        run_as: None,
        retries: 0,
        on_node_lost: OnNodeLost::Wait,
        gpus: Default::default(),
        image: None,
    }
}

fn status(execution: &ExecutionId) -> TaskStatus {
    TaskStatus {
        task_id: execution.task.clone(),
        attempt: execution.attempt,
        owner: Owner { uid: 0, gid: 0 },
        runs_as: Owner { uid: 0, gid: 0 },
        origin: Origin::Launched { command: vec!["job".into()] },
        workload: None,
        adopted_by: None,
        phase: Phase::Running,
        pid: None,
        cgroup: String::new(),
        created_at: 0,
        limits: Limits::default(),
        enforcement: Vec::new(),
        usage: Usage::default(),
        shrink: None,
        idle: None,
        oom_kill: None,
        notes: Vec::new(),
    }
}

impl World<'_> {
    fn on(&mut self, event: Event) -> Result<()> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            self.state.uptime = self.now * SECOND;
            for effect in on_event(&mut self.state, event, self.now * SECOND).effects {
                match effect {
                    Effect::Direct(session, directive) => events.extend(self.obey(session, *directive)?),
                    Effect::Scale { group, order } => {
                        match order.kind {
                            OrderKind::Grow { by, .. } => {
                                for _ in 0..by {
                                    self.made += 1;
                                    self.coming
                                        .push_back((self.now + COMES_AFTER, format!("w{}", self.made)));
                                }
                            }
                            OrderKind::Withdraw { nodes } => {
                                self.coming.truncate(self.coming.len().saturating_sub(nodes as usize));
                            }
                            OrderKind::Remove { node } => {
                                let session =
                                    self.nodes.remove(&node).context("a node that is not there is ended")?;
                                if self.running.values().any(|running| running.node == node) {
                                    bail!("{node} is ended, and tasks run there");
                                }
                                events.push_back(Event::AgentGone { session });
                            }
                        }
                        let (number, outcome) = (order.number, Ok(None));
                        events.push_back(Event::Scale(ScaleEvent::Done { group, number, outcome }));
                        self.count_nodes();
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What an agent does.
    fn obey(&mut self, session: SessionId, directive: Directive) -> Result<Option<Event>> {
        let Directive { execution, generation, kind, .. } = directive;
        let task = execution.task.to_string();
        let node = self.nodes.iter().find(|(_, of)| **of == session).map(|(name, _)| name.clone());
        let node = node.context("a node that is not there is told something")?;
        match kind {
            DirectiveKind::Start(submission, _) => {
                let job: usize = task[1..].parse()?;
                self.outcome.waits.push((self.now - self.jobs[job].arrives) as f64);
                self.ends.insert((self.now + self.jobs[job].runs_for, task.clone()), ());
                let (status, request) = (status(&execution), submission.spec.profile.demand);
                let running = Running { job, node, began: self.now, used_ns: 0, status, request, generation };
                let report = self.report(&running, self.now);
                self.running.insert(task, running);
                Ok(Some(Event::TaskReport { session, report: Box::new(report) }))
            }
            DirectiveKind::Resize { request, .. } => {
                let running = self.running.get_mut(&task).context("a task that does not run is resized")?;
                self.outcome.lowered += u64::from(request.cpu < running.request.cpu);
                (running.request, running.generation) = (request, generation);
                let report = NodeTask {
                    status: running.status.clone(),
                    generation,
                    evicted: false,
                    lease_over: false,
                    request: Some(request),
                };
                let outcome = DirectiveOutcome::Settled(Box::new(report));
                let result = DirectiveResult { execution, generation, outcome };
                Ok(Some(Event::DirectiveResult { session, result }))
            }
            DirectiveKind::Stop { reason, .. } => bail!("{task} is ended: {reason}"),
            DirectiveKind::Forget => Ok(None),
        }
    }

    fn report(&self, running: &Running, now: u64) -> NodeTask {
        let usage =
            Usage { at_monotonic_ns: now * SECOND, cpu_time_ns: running.used_ns, ..running.status.usage };
        let status = TaskStatus { usage, ..running.status.clone() };
        let request = Some(running.request);
        NodeTask { status, generation: running.generation, evicted: false, lease_over: false, request }
    }

    /// What happens until the next step.
    fn pass(&mut self) -> Result<()> {
        let until = self.now + STEP;
        loop {
            let ends = self.ends.keys().next().map(|(at, _)| *at);
            let comes = self.coming.front().map(|(at, _)| *at);
            let Some(next) = ends.into_iter().chain(comes).min().filter(|at| *at < until) else { break };
            self.now = self.now.max(next);
            if comes == Some(next)
                && let Some((_, node)) = self.coming.pop_front()
            {
                self.sessions += 1;
                let session = SessionId(self.sessions);
                self.nodes.insert(node.clone(), session);
                let hello = Hello {
                    boot_id: node.clone(),
                    node,
                    capacity: capacity(),
                    inventory: Vec::new(),
                    highest_epoch: 0,
                    agent_socket: String::new(),
                    gpus: Default::default(),
                    containers: false,
                };
                self.on(Event::AgentConnected { session, hello: Box::new(hello) })?;
            } else if let Some(((_, task), ())) = self.ends.pop_first()
                && let Some(running) = self.running.remove(&task)
            {
                let mut report = self.report(&running, self.now);
                report.status.phase = Phase::Ended { status: ExitStatus::Code(0), at: self.now * SECOND };
                let session = *self.nodes.get(&running.node).context("what runs is on a node")?;
                self.on(Event::TaskReport { session, report: Box::new(report) })?;
            }
        }
        self.now = until;
        self.use_cpu();
        let reports: Vec<_> = self
            .running
            .values()
            .filter_map(|running| Some((*self.nodes.get(&running.node)?, self.report(running, self.now))))
            .collect();
        for (session, report) in reports {
            self.on(Event::TaskReport { session, report: Box::new(report) })?;
        }
        self.on(Event::Scale(ScaleEvent::Look))?;
        if next_wakeup(&self.state).is_some_and(|at| at <= self.now * SECOND) {
            self.on(Event::Tick)?;
        }
        Ok(())
    }

    /// Tasks use what they want, as far as their nodes have it: first what is reserved for them, then of the rest in proportion to
    /// what they want beyond.
    fn use_cpu(&mut self) {
        let mut by_node: BTreeMap<&str, Vec<(&mut u64, [u64; 3])>> = BTreeMap::new();
        for running in self.running.values_mut() {
            let wanted = self.jobs[running.job].wants(self.now - running.began);
            let seconds = STEP.min(self.now - running.began);
            self.outcome.wanted += wanted * seconds;
            let own = wanted.min(running.request.cpu.0);
            let amounts = [own, wanted - own, seconds];
            by_node.entry(&running.node).or_default().push((&mut running.used_ns, amounts));
        }
        for tasks in by_node.into_values() {
            let own: u64 = tasks.iter().map(|(_, [own, ..])| own).sum();
            let more: u64 = tasks.iter().map(|(_, [_, beyond, _])| beyond).sum();
            let left = (CORES * 1000).saturating_sub(own);
            for (used_ns, [own, beyond, seconds]) in tasks {
                let got = if more <= left { beyond } else { beyond * left / more };
                *used_ns += (own + got) * seconds * 1_000_000;
                self.outcome.missed += (beyond - got) * seconds;
            }
        }
    }

    fn count_nodes(&mut self) {
        self.outcome.nodes.push((self.now, (self.nodes.len() + self.coming.len()) as u32));
    }
}
