//! `./x demo`: two real tasks compete for the CPUs and for one link of this machine; their limits are changed
//! while they run; what was configured is compared with what the kernel counted and with what an
//! independent observer saw.

mod cluster;
mod network;
mod node;
mod report;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use serde_json::Value;

use self::network::{Network, Sink};
use self::node::Node;
use self::report::{Observation, Report};
use crate::setup::{self, Need};
use crate::{bins, ebpf};

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// End in one line of JSON with every figure
    #[arg(long)]
    json: bool,
}

/// What a task may use.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Limits {
    cores: f64,
    mbit: f64,
}

struct Phase {
    title: &'static str,
    service: Limits,
    batch: Limits,
}

/// Both tasks ask for one core and for all of the link; the limits add up to less than the machine has, so what
/// is measured is the limit and not the scarcity.
const PHASES: [Phase; 2] = [
    Phase {
        title: "as started",
        service: Limits { cores: 0.8, mbit: 80.0 },
        batch: Limits { cores: 0.4, mbit: 20.0 },
    },
    Phase {
        title: "changed while they run",
        service: Limits { cores: 0.3, mbit: 30.0 },
        batch: Limits { cores: 0.9, mbit: 120.0 },
    },
];

/// A change has this long to come into force; then it is measured.
const SETTLE: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_secs(5);
/// How often a phase is measured at most: what other programs, or the machine below this one, take during a
/// measurement is lost to the demo's tasks.
const ATTEMPTS: usize = 3;
/// How often the observers are read.
const SAMPLE: Duration = Duration::from_millis(50);

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure(Need::Native)?;
    let object = ebpf::build()?.programs;
    let bins = bins::build()?;

    say("a link of its own: two network namespaces with a veth pair");
    let network = Network::create()?;
    let node = Node::start(&bins, &object, &network, None)?;
    say(&format!(
        "an agent on one side of it, for tasks below {}; a receiver that counts on the other",
        node.cgroup_root().display()
    ));
    let mut tasks = [Task::new("service", network.sink()?), Task::new("batch", network.sink()?)];

    let mut report = Report::default();
    for (index, phase) in PHASES.iter().enumerate() {
        let limits = [phase.service, phase.batch];
        say(&format!("{}: {}", phase.title, told(&tasks, limits)));
        let changed = Instant::now();
        for (task, limits) in tasks.iter_mut().zip(limits) {
            if index == 0 { task.launch(&node, limits)? } else { task.change(&node, limits)? }
        }
        observe(&node, &mut tasks, SETTLE)?;
        let (from, limits) = measure(&node, &mut tasks, MEASURE, || Ok(limits.to_vec()))?;
        for (task, limits) in tasks.iter_mut().zip(limits) {
            report.compare(phase.title, task.name, limits, from, &task.observations);
            if index > 0 {
                report.add_change(task.name, limits, changed, &task.observations);
            }
            task.observations.clear();
        }
    }
    for task in &tasks {
        node.shaper(&["cancel", task.name, "--now"])?;
    }
    for line in node.release_all()? {
        say(&line);
    }
    node.check_nothing_is_left()?;
    say("released: no limit, pin, group or qdisc is left");
    drop(node);

    let why = cluster::run(&bins, &object, &network, &mut report)?;

    print!("\n{why}");
    print!("\n{}", report.table());
    if args.json {
        println!("{}", report.json());
    }
    if !report.passes() {
        say(
            "beyond tolerance. The demo needs about two idle CPUs: what other programs use, its tasks cannot have",
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn say(text: &str) {
    eprintln!("demo: {text}");
}

fn told(tasks: &[Task; 2], limits: [Limits; 2]) -> String {
    let one = |(task, limits): (&Task, &Limits)| {
        format!("{} may use {} cores and send {} Mbit/s", task.name, limits.cores, limits.mbit)
    };
    tasks.iter().zip(&limits).map(one).collect::<Vec<_>>().join("; ")
}

/// A task of the demo, with those who watch it.
struct Task {
    name: &'static str,
    sink: Sink,
    cgroup: Option<std::path::PathBuf>,
    observations: Vec<Observation>,
}

impl Task {
    fn new(name: &'static str, sink: Sink) -> Task {
        Task { name, sink, cgroup: None, observations: Vec::new() }
    }

    /// A command that sends whatever the connection takes, and computes without end in `threads` processes.
    fn command(&self, threads: usize) -> String {
        let (address, port) = (self.sink.address().ip(), self.sink.address().port());
        let compute = "while :; do :; done & ".repeat(threads);
        format!("exec 3>/dev/tcp/{address}/{port}; {compute}exec cat /dev/zero >&3")
    }

    fn find_cgroup(&mut self, node: &Node) -> Result<()> {
        let task = node.describe(self.name)?;
        let cgroup = task["cgroup"].as_str().context("the agent named no cgroup for the task")?;
        self.cgroup = Some(cgroup.into());
        Ok(())
    }

    fn launch(&mut self, node: &Node, limits: Limits) -> Result<()> {
        let (cores, mbit) = (limits.cores.to_string(), format!("{}mbit", limits.mbit));
        node.shaper(&[
            "run",
            "--detach",
            "--id",
            self.name,
            "--user",
            "nobody",
            "--cpu",
            &cores,
            "--net",
            &mbit,
            "--cwd",
            "/",
            "--",
            "bash",
            "-c",
            &self.command(1),
        ])?;
        self.find_cgroup(node)
    }

    fn change(&mut self, node: &Node, limits: Limits) -> Result<()> {
        let (cores, mbit) = (limits.cores.to_string(), format!("{}mbit", limits.mbit));
        node.shaper(&["set", self.name, "--cpu", &cores, "--net", &mbit]).map(drop)
    }

    /// The cgroup's own account of CPU time, which shaper neither keeps nor reads: µs.
    fn cpu_by_cgroup(&self) -> Result<u64> {
        let path = self.cgroup.as_deref().unwrap_or(Path::new("")).join("cpu.stat");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        usage
            .and_then(|usage| usage.parse().ok())
            .with_context(|| format!("no usage_usec in {}", path.display()))
    }

    fn observe(&mut self, status: &Value) -> Result<Observation> {
        let usage = &status["usage"];
        let number = |value: &Value| value.as_u64().context("the agent's JSON lacks a counter");
        let observation = Observation {
            at: Instant::now(),
            cpu_by_cgroup_us: self.cpu_by_cgroup()?,
            received_bytes: self.sink.received(),
            kernel_at_ns: number(&usage["at_monotonic_ns"])?,
            kernel_cpu_ns: number(&usage["cpu_time_ns"])?,
            kernel_sent_bytes: number(&usage["egress"]["bytes"])?,
            uplink_sent_bytes: number(&usage["uplink_egress"]["bytes"])?,
        };
        self.observations.push(observation);
        Ok(observation)
    }
}

/// Observes the tasks for `length`, and again if one of them had less than its limits: returns from when on its
/// observations count, and the limits.
fn measure(
    node: &Node,
    tasks: &mut [Task],
    length: Duration,
    limits: impl Fn() -> Result<Vec<Limits>>,
) -> Result<(Instant, Vec<Limits>)> {
    let mut attempt = 1;
    loop {
        let from = Instant::now();
        observe(node, tasks, length)?;
        let limits = limits()?;
        let mut measured = tasks.iter().zip(&limits);
        let short = measured.find_map(|(task, limits)| {
            Some((task.name, report::shortfall(*limits, from, &task.observations)?))
        });
        match short {
            Some((task, shortfall)) if attempt < ATTEMPTS => {
                say(&format!(
                    "{task} had {shortfall}: if others took the rest, they may be gone; measuring again"
                ));
                attempt += 1;
            }
            _ => return Ok((from, limits)),
        }
    }
}

/// Reads all observers until `length` has passed, and shows a line a second.
fn observe(node: &Node, tasks: &mut [Task], length: Duration) -> Result<()> {
    let start = Instant::now();
    let mut shown: Option<Vec<Observation>> = None;
    loop {
        let statuses = node.statuses()?;
        let mut now = Vec::new();
        for task in tasks.iter_mut() {
            let status = statuses.iter().find(|status| status["task_id"] == task.name);
            now.push(task.observe(status.with_context(|| format!("task {} is gone", task.name))?)?);
        }
        let since = |before: &[Observation]| now[0].at - before[0].at;
        match &shown {
            Some(before) if since(before) < Duration::from_secs(1) => {}
            Some(before) => {
                let lines = tasks.iter().zip(before.iter().zip(&now)).map(|(task, (before, now))| {
                    let rates = before.rates_until(now);
                    format!("{} {:.2} cores {:6.1} Mbit/s", task.name, rates.kernel_cores, rates.kernel_mbit)
                });
                say(&format!(
                    "  {:4.1} s  {}",
                    start.elapsed().as_secs_f64(),
                    lines.collect::<Vec<_>>().join("   ")
                ));
                shown = Some(now);
            }
            None => shown = Some(now),
        }
        if start.elapsed() >= length {
            return Ok(());
        }
        std::thread::sleep(SAMPLE);
    }
}
