//! `cargo xtask bench`: what shaper costs, how right it is and how well it shapes, against its goals and its peers.
//! Everything is built as it is shipped; what measures is a program of its own (`tests/src/bin/bench`). Where a figure
//! needs cgroup v2 with its controllers, or a clock that no other work moves, that runs in the VM, whose clock then
//! counts instructions.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args as ClapArgs, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::initramfs::{self, Contents};
use crate::kernels::{self, Build};
use crate::qemu::{Accel, Machine};
use crate::setup::{self, Need};
use crate::vm::{self, Both, Profile, Transcript};
use crate::{bins, ebpf, frameworks, runtimes, workspace};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// What it costs to measure, and how right the measurement is
    Measure(Options),
    /// In the VM: how exact limits and weights of CPU are, and how soon a quota is raised
    Actuators(InVm),
    /// In the VM: what a bursty service has of loans, and what they cost others
    Shape(InVm),
    /// How well the network is shaped, by us, by TBF and by HTB: rates, latencies, fairness, CPU time
    Net(Net),
    /// How many tasks a second a broker takes, places and sees to their end, all of it durable, and what that costs
    Broker(OfBroker),
    /// How long the broker takes for a page of a large cluster
    Web(Options),
    /// How many placements are decided a second, with arrivals and departures, each the node of the plain formula
    Place(Options),
    /// How well GPUs are packed: the trace openb by its published protocol, every workload
    Openb(Options),
    /// How well limits follow use, on recorded series, beside the rule of Kubernetes' Vertical Pod Autoscaler
    Rightsize(Options),
    /// How many nodes are started for a week of arrivals, and how long tasks wait, with less reserved first and without
    Scale(Options),
    /// How much longer a container starts behind shaper-runtime, and how soon many are adopted
    Containers(Options),
    /// What a worker of Ray or Dask costs more in a task of its own, and what a task of such a worker; installs both
    Frameworks,
    /// How well block IO is kept in bounds, in the VM: ceilings, weights, promised latencies
    Io(IoOptions),
}

#[derive(ClapArgs)]
struct Options {
    /// End in one line of JSON with every figure
    #[arg(long)]
    json: bool,
    /// Fewer and shorter rounds: less than a minute
    #[arg(long)]
    quick: bool,
}

#[derive(ClapArgs)]
struct InVm {
    #[command(flatten)]
    options: Options,
    /// A series of Debian's kernels; may be given more than once
    #[arg(long, value_name = "SERIES", default_value = vm::SERIES[0])]
    kernel: Vec<String>,
    /// Seconds until a machine is given up
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// Only these parts
    #[arg(value_name = "PART")]
    parts: Vec<String>,
}

#[derive(ClapArgs)]
struct Net {
    #[command(flatten)]
    options: Options,
    /// Only these parts: 1mbit, 10mbit, 100mbit, 1gbit, 5gbit (every load at that rate), latency, attached, packet, ingress
    #[arg(value_name = "PART")]
    parts: Vec<String>,
}

#[derive(ClapArgs)]
struct OfBroker {
    #[command(flatten)]
    options: Options,
    /// Only these parts: stream, unary, sessions
    #[arg(value_name = "PART")]
    parts: Vec<String>,
}

impl Options {
    fn arguments(&self) -> Vec<String> {
        let options = [(self.json, "--json"), (self.quick, "--quick")];
        options.iter().filter(|(is_wanted, _)| *is_wanted).map(|(_, option)| (*option).to_owned()).collect()
    }
}

#[derive(ClapArgs)]
struct IoOptions {
    /// End in one line of JSON with every figure
    #[arg(long)]
    json: bool,
    /// The default kernel alone
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.subject {
        Subject::Measure(options) => here("measure", options, &[]),
        Subject::Actuators(options) => in_vm("actuators", options),
        Subject::Shape(options) => in_vm("shape", options),
        Subject::Net(Net { options, parts }) => {
            setup::ensure(Need::Traffic)?;
            here("net", options, parts)
        }
        Subject::Broker(OfBroker { options, parts }) => here("broker", options, parts),
        Subject::Web(options) => here("web", options, &[]),
        Subject::Place(options) => here("place", options, &[]),
        Subject::Frameworks => frameworks::bench(),
        Subject::Openb(options) => here("openb", options, &[]),
        Subject::Rightsize(options) => here("rightsize", options, &[]),
        Subject::Scale(options) => here("scale", options, &[]),
        Subject::Containers(options) => here("containers", options, &[]),
        Subject::Io(options) => io(options),
    }
}

/// The tests that measure it, which fail beyond their goals.
const IO_TESTS: [&str; 4] = ["--nocapture", "io_cost::", "io_latency::", "block_io::"];

fn io(options: &IoOptions) -> Result<ExitCode> {
    let contents = vm::contents()?;
    let filter = IO_TESTS.map(str::to_owned);
    let job = vm::Job {
        contents: &contents,
        profile: vm::Profile::Bare,
        timeout: vm::DEFAULT_TIMEOUT,
        beside: false,
        again: false,
        filter: &filter,
    };
    let series = if options.quick { &vm::SERIES[..1] } else { &vm::SERIES[..2] };
    let verdicts = job.run_series(series)?;
    let mut rows = Vec::new();
    println!("{:<86} {:>10} {:<5} GOAL", "MEASURED", "", "");
    let of_kernel = |verdict: &vm::Verdict| {
        let figure = |figure: &String| (verdict.series.clone(), figure.clone());
        verdict.figures.iter().map(figure).collect::<Vec<_>>()
    };
    for (series, figure) in verdicts.iter().flat_map(of_kernel) {
        let row = serde_json::from_str::<Figure>(&figure);
        let mut row = row.with_context(|| format!("the VM printed an unknown figure: {figure}"))?;
        row.metric = format!("vm {series}: {}", row.metric);
        let missed = if row.ok { "" } else { "  MISSED" };
        println!("{:<86} {:>10.2} {:<5} {}{missed}", row.metric, row.value, row.unit, row.goal);
        rows.push(row);
    }
    let is_good = !rows.is_empty()
        && rows.iter().all(|row| row.ok)
        && verdicts.iter().all(|verdict| verdict.tally.failed == 0);
    if options.json {
        println!("{}", serde_json::json!({ "name": "io", "rows": rows }));
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A figure, as the VM's tests print it (`tests/src/figures.rs`).
#[derive(Deserialize, Serialize)]
struct Figure {
    metric: String,
    value: f64,
    unit: String,
    goal: String,
    ok: bool,
}

fn here(subject: &str, options: &Options, parts: &[String]) -> Result<ExitCode> {
    setup::ensure(Need::Native)?;
    let objects = ebpf::build()?;
    let bins = bins::build_release()?;
    let bench = bins.bin("bench");
    let mut command = Command::new(&bench);
    command
        .arg(subject)
        .args(options.arguments())
        .args(parts)
        .env("SHAPER_BIN_DIR", bins.path())
        .env("SHAPER_BPF_OBJECT", &objects.programs)
        .env("SHAPER_BENCH_OBJECT", &objects.bench);
    if subject == "containers" {
        command.env("SHAPER_RUNTIMES", runtimes::fetch()?);
    }
    let status = command.status().with_context(|| format!("cannot start {}", bench.display()))?;
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        // It has said why.
        Some(_) => Ok(ExitCode::FAILURE),
        None => bail!("{}: {status}", bench.display()),
    }
}

/// Runs it on each kernel. What the machines print is copied to the standard error; the figures of all are one line.
fn in_vm(subject: &str, options: &InVm) -> Result<ExitCode> {
    vm::prepare(Profile::Bare)?;
    let bpf_object = ebpf::build()?.programs;
    let bins = bins::build_release()?;
    let contents = Contents { program: bins.bin("bench"), bins, bpf_object };
    // PID 1 gets what follows its own argument through the kernel's command line.
    let mut arguments = vec!["--bench".to_owned(), subject.to_owned(), "--json".to_owned()];
    arguments.extend(options.options.quick.then(|| "--quick".to_owned()));
    arguments.extend(options.parts.iter().cloned());
    let mut rows = Vec::new();
    let mut is_good = true;
    for series in &options.kernel {
        let (found, failure) = on_kernel(series, subject, &contents, &arguments, options.timeout)?;
        if let Some(failure) = failure {
            eprintln!("bench {subject} on {series}: {failure}");
            is_good = false;
        }
        rows.extend(found);
    }
    if options.options.json {
        println!("{}", serde_json::json!({ "name": subject, "rows": rows }));
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The figures that were found on a kernel, and what went wrong: a goal that was missed, or more.
fn on_kernel(
    series: &str,
    subject: &str,
    contents: &Contents,
    arguments: &[String],
    timeout: u64,
) -> Result<(Vec<Value>, Option<String>)> {
    let kernel = kernels::debian(series, Build::Cloud)?;
    let file =
        |ending: &str| workspace::target().join("vm").join(format!("bench-{}.{ending}", kernel.release));
    let (initrd, log) = (file("cpio"), file("log"));
    initramfs::write(&kernel, contents, &initrd)?;
    let log_file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let machine = Machine {
        kernel: &kernel,
        initrd: &initrd,
        // Done in this machine's time, not in the guest's.
        disk: None,
        host_root: false,
        accel: Accel::Counted,
        init_args: arguments,
    };
    eprintln!("bench {subject}: booting {kernel}, {}", machine.accel);
    let timeout = Duration::from_secs(timeout);
    let start = Instant::now();
    let (mut transcript, mut rows) = (Transcript::default(), None);
    let end = machine.boot(timeout, Both(io::stderr(), log_file), Stdio::inherit(), |line| {
        transcript.read(line, start);
        rows = rows_of(line, subject).or(rows.take());
        ControlFlow::Continue(())
    })?;
    eprintln!("bench {subject}: {} s", start.elapsed().as_secs());
    let failure = transcript.failure(&end, timeout);
    let failure = failure.or_else(|| rows.is_none().then(|| "there are no figures".to_owned()));
    Ok((rows.unwrap_or_default(), failure))
}

/// The figures in a line of the console, if that is the one that has them.
fn rows_of(line: &str, subject: &str) -> Option<Vec<Value>> {
    let mut line: Value = serde_json::from_str(line.trim()).ok()?;
    (line.get("name")?.as_str()? == subject).then(|| line.get_mut("rows").map(Value::take))?.and_then(
        |rows| match rows {
            Value::Array(rows) => Some(rows),
            _ => None,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_one_line_of_the_console() {
        let line = "{\"name\":\"shape\",\"rows\":[{\"metric\":\"m\",\"value\":1.0}]}\r";
        assert_eq!(rows_of(line, "shape").unwrap().len(), 1);
        assert!(rows_of(line, "actuators").is_none());
        for other in ["", "bench: {}", "{}", "{\"name\":\"shape\"}", "{\"name\":\"shape\",\"rows\":1}"] {
            assert!(rows_of(other, "shape").is_none(), "{other}");
        }
    }
}
