//! `cargo xtask test`: everything that can be tested on one machine, from the unit tests to the VM.

use std::env;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;

use crate::bins::{self, BinDir};
use crate::initramfs::Contents;
use crate::relay::relay;
use crate::setup::{self, Need};
use crate::tally::Tally;
use crate::vm::{Job, Profile};
use crate::{browser, commands, ebpf, frameworks, kubernetes, process, support, unpacked, vm, workspace};

/// The package of the tests that need a kernel, its target that only makes sense inside the VM, and those for this machine.
const KERNEL_TESTS: &str = "shaper-tests";
pub(crate) const VM_TARGET: &str = "vm";
pub(crate) const NATIVE_TARGET: &str = "native";
pub(crate) const FAULTS_TARGET: &str = "faults";
/// Of a real Prometheus, with `--all` alone.
const PROMETHEUS_TARGET: &str = "prometheus";
/// Modules of it whose tests take minutes, of rates, of deaths and of what a task goes on doing: without `--all` only the
/// first kernel runs them.
const LONG: [&str; 9] = [
    "block_io::",
    "corners::",
    "cpu::",
    "crash::",
    "io_cost::",
    "io_latency::",
    "kills::",
    "memory::",
    "second_writer::what_others_change_is_dealt_with_by_the_policy",
];

/// Those that watch for a minute or more what becomes of a device, of CPU time or of memory, that start the agent dozens of
/// times, or that switch off and stop the machine itself: without `--all` not even the first kernel has them.
const LONGEST: [&str; 12] = [
    "block_io::",
    "corners::",
    "cpu::hogs_divide_the_cpus_by_their_weights_within_three_percent",
    "cpu::loans_stay_within_the_pool_and_a_neighbour_keeps_what_it_has",
    "cpu::the_mean_over_any_ten_seconds_stays_within_the_ceiling",
    "cpu::what_is_lent_is_back_within_two_seconds_of_the_agents_being_stopped",
    "crash::",
    "io_cost::",
    "io_latency::",
    "memory::a_task_that_uses_all_its_memory_keeps_it",
    "memory::idle_memory_is_taken_and_the_hot_set_stays",
    "memory::memory_that_was_given_comes_back_when_it_is_not_needed",
];

/// Those below systemd that install packages.
const PACKAGES: &str = "systemd::packages::";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also the longest tests in the VM, and the long ones on its other kernels; the tests below systemd and with container
    /// runtimes, in a VM with this machine's own root; those of dashboards and alerts, with a real Prometheus; those against Ray
    /// and Dask; those of the web page, in Chromium; the manifests for Kubernetes, against its schemas; the commands of README and docs
    /// that take runtimes, a registry, kubectl or release builds; and a little of each benchmark and soak
    #[arg(long)]
    all: bool,
    /// Of what `--all` adds, this alone
    #[arg(long, value_name = "STAGE", conflicts_with = "all")]
    stage: Option<Added>,
    /// Arguments for cargo-nextest, or for `cargo test` where that is missing
    #[arg(last = true, value_name = "NEXTEST_ARGS")]
    nextest: Vec<String>,
}

/// What `--all` adds to the tests of this machine and of the bare VM.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Added {
    /// With a real Prometheus
    Prometheus,
    /// Below systemd, in the VM, but for packages
    Systemd,
    /// Packages, likewise
    Packages,
    /// Against Ray and Dask
    Frameworks,
    /// Of the web page, in Chromium
    Browser,
    /// Of the manifests for Kubernetes
    Kubernetes,
    /// Of the commands of README and docs, those that take what is installed for them
    Commands,
    /// Of these, benchmarks: a little of each
    Benches,
    /// Of these, soaks, likewise: they aim at figures, so nothing else is to run on the machine
    Soaks,
}

/// What the inputs of the property tests are drawn from. Here it is the same in each run, so that what fails is what was
/// changed; `cargo xtask soak properties` draws others.
pub(crate) const PROPERTY_SEED: &str = "PROPTEST_RNG_SEED";

/// One line of the closing table.
pub(crate) struct Stage {
    pub(crate) name: String,
    /// None for what builds and counts nothing.
    pub(crate) tally: Option<Tally>,
    pub(crate) took: Duration,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure(Need::Native)?;
    let mut stages = Vec::new();
    let bpf_object = built(&mut stages, "build-ebpf", ebpf::build)?.programs;
    let bins = built(&mut stages, "build binaries", bins::build)?;

    if let Some(stage) = args.stage {
        stages.extend(added(stage, bins, bpf_object)?);
        return Ok(conclude(&stages));
    }
    stages.extend(host_tests(&bpf_object, &bins, &args.nextest)?);
    if args.all {
        stages.push(prometheus_tests(&bpf_object, &bins)?);
    }

    let tests = built(&mut stages, "build VM tests", || bins::build_tests(VM_TARGET))?;
    let contents = Contents { bins, program: tests, bpf_object };
    let job = Job {
        contents: &contents,
        profile: Profile::Bare,
        timeout: vm::DEFAULT_TIMEOUT,
        beside: true,
        again: true,
        filter: &[],
    };
    let (default, others) = vm::SERIES.split_at(1);
    let without = |tests: &[&str]| -> Vec<String> {
        let tests = if args.all { &[] } else { tests };
        tests.iter().flat_map(|tests| ["--skip", tests].map(str::to_owned)).collect()
    };
    let (first, rest) = (without(&LONGEST), without(&LONG));
    // One after the other as far as they fetch and install anything; then two machines at a time: each has one of this
    // machine's CPUs (`Accel::Tcg`).
    vm::prepare_series(&vm::SERIES)?;
    let run = |filter, series| Job { filter, ..job }.run_series(series);
    let (verdicts, of_others) = thread::scope(|scope| {
        let beside = scope.spawn(|| run(&rest, others));
        (run(&first, default), beside.join())
    });
    let mut verdicts = verdicts?;
    verdicts.extend(of_others.map_err(|_| anyhow!("the thread of the other kernels panicked"))??);
    for verdict in &verdicts {
        let name = format!("vm {}", verdict.series);
        stages.push(Stage { name, tally: Some(verdict.tally), took: verdict.total });
    }
    let mut found = vm::features(&verdicts);
    found.push(support::of_this_machine(&contents.bins)?);
    let compared = support::compare(&found, false);
    let tally = match &compared {
        Ok(()) => Tally { passed: 1, ..Tally::default() },
        Err(error) => {
            eprintln!("error: {error:#}");
            Tally::FAILURE
        }
    };
    stages.push(Stage { name: "kernel-support.md".to_owned(), tally: Some(tally), took: Duration::ZERO });
    if args.all {
        stages.extend(below_systemd(&contents, Added::Systemd)?);
        stages.extend(below_systemd(&contents, Added::Packages)?);
        stages.push(frameworks::test(&contents.bins)?);
        stages.push(frameworks::commands(&contents.bins)?);
        stages.push(browser::test(&contents.bins)?);
        stages.push(kubernetes::test(&contents.bins)?);
        stages.push(commands::test(&contents.bins, &contents.bpf_object)?);
        stages.push(commands::benches(&contents.bins, &contents.bpf_object)?);
        stages.push(commands::soaks(&contents.bins, &contents.bpf_object)?);
    }
    Ok(conclude(&stages))
}

/// One of the stages that `--all` adds.
fn added(stage: Added, bins: BinDir, bpf_object: PathBuf) -> Result<Vec<Stage>> {
    Ok(match stage {
        Added::Prometheus => vec![prometheus_tests(&bpf_object, &bins)?],
        Added::Systemd | Added::Packages => {
            let contents = Contents { bins, program: bins::build_tests(VM_TARGET)?, bpf_object };
            below_systemd(&contents, stage)?
        }
        Added::Frameworks => vec![frameworks::test(&bins)?, frameworks::commands(&bins)?],
        Added::Browser => vec![browser::test(&bins)?],
        Added::Kubernetes => vec![kubernetes::test(&bins)?],
        Added::Commands => vec![commands::test(&bins, &bpf_object)?],
        Added::Benches => vec![commands::benches(&bins, &bpf_object)?],
        Added::Soaks => vec![commands::soaks(&bins, &bpf_object)?],
    })
}

/// The VM's tests that take systemd. dpkg and systemctl read much of this machine's root, slowly: packages have a machine of
/// their own.
fn below_systemd(contents: &Contents, which: Added) -> Result<Vec<Stage>> {
    let (filter, name) = match which {
        Added::Packages => (vec![PACKAGES.to_owned()], "packages"),
        _ => (["systemd::", "--skip", PACKAGES].map(str::to_owned).to_vec(), "systemd"),
    };
    let job = Job {
        contents,
        profile: Profile::Systemd,
        timeout: 2 * vm::DEFAULT_TIMEOUT,
        beside: false,
        again: true,
        filter: &filter,
    };
    let stage = |verdict: vm::Verdict| Stage {
        name: format!("vm {}, {name}", verdict.series),
        tally: Some(verdict.tally),
        took: verdict.total,
    };
    Ok(job.run_series(Profile::Systemd.series())?.into_iter().map(stage).collect())
}

/// Prints the table and the sum.
fn conclude(stages: &[Stage]) -> ExitCode {
    let mut total = Tally::default();
    println!("\n{:<24} {:>8} {:>8} {:>8}", "", "passed", "failed", "seconds");
    for Stage { name, tally, took } in stages {
        let count = |of: fn(Tally) -> u64| tally.map_or(String::new(), |tally| of(tally).to_string());
        println!(
            "{name:<24} {:>8} {:>8} {:>8.1}",
            count(|t| t.passed),
            count(|t| t.failed),
            took.as_secs_f64()
        );
        total += tally.unwrap_or_default();
    }
    println!("\n{total}");
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a build, without which nothing that follows makes sense.
fn built<T>(stages: &mut Vec<Stage>, name: &str, build: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let built = build()?;
    stages.push(Stage { name: name.to_owned(), tally: None, took: start.elapsed() });
    Ok(built)
}

/// The workspace's tests on this machine's kernel.
fn host_tests(bpf_object: &Path, bins: &BinDir, extra: &[String]) -> Result<Vec<Stage>> {
    let with_environment = |command: &mut Command| {
        command.env("SHAPER_BPF_OBJECT", bpf_object).env("SHAPER_BIN_DIR", bins.path());
        if env::var_os(PROPERTY_SEED).is_none() {
            command.env(PROPERTY_SEED, "1");
        }
    };
    let has_nextest = process::read(process::cargo().args(["nextest", "--version"])).is_ok();
    if has_nextest {
        // Its default filter, in .config/nextest.toml, leaves out the VM's tests.
        let mut command = process::cargo();
        command.args(["nextest", "run", "--workspace", "--locked", "--profile", "ci"]);
        command.args(["--color", if io::stdout().is_terminal() { "always" } else { "never" }]).args(extra);
        with_environment(&mut command);
        return Ok(vec![counted("host, nextest", command, Output::Stderr)?]);
    }
    let mut stages = Vec::new();
    for selection in cargo_test_selections()? {
        let mut command = process::cargo();
        command.args(["test", "--locked", "--no-fail-fast"]).args(selection).args(extra);
        with_environment(&mut command);
        stages.push(counted(
            if stages.is_empty() { "host" } else { "host, kernel" },
            command,
            Output::Stdout,
        )?);
    }
    Ok(stages)
}

/// Those of a real Prometheus, which is fetched for them.
fn prometheus_tests(bpf_object: &Path, bins: &BinDir) -> Result<Stage> {
    unpacked::PROMETHEUS.prepare()?;
    let mut command = Command::new(bins::build_tests(PROMETHEUS_TARGET)?);
    command.arg("--test-threads=1").env("SHAPER_BPF_OBJECT", bpf_object).env("SHAPER_BIN_DIR", bins.path());
    counted("host, Prometheus", command, Output::Stdout)
}

/// `cargo test` cannot leave out one target, so it selects all the others: first every package but the one with the
/// VM's tests, then the targets of that one, a thread at a time because they share the kernel.
fn cargo_test_selections() -> Result<[Vec<String>; 2]> {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let others = words(&["--workspace", "--exclude", KERNEL_TESTS]);
    let mut kernel = words(&["--package", KERNEL_TESTS, "--lib"]);
    let apart = [VM_TARGET, PROMETHEUS_TARGET, frameworks::TARGET, browser::TARGET];
    for target in kernel_test_targets()?.into_iter().filter(|target| !apart.contains(&target.as_str())) {
        kernel.extend(["--test".to_owned(), target]);
    }
    kernel.extend(words(&["--", "--test-threads=1", "--skip", commands::STAGES]));
    Ok([others, kernel])
}

/// The names of the `[[test]]` targets of the package with the kernel tests.
fn kernel_test_targets() -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        targets: Vec<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let metadata: Metadata = workspace::metadata(&workspace::root().join("Cargo.toml"))?;
    let package = metadata.packages.into_iter().find(|package| package.name == KERNEL_TESTS);
    let targets = package.with_context(|| format!("the workspace has no package {KERNEL_TESTS}"))?.targets;
    Ok(targets
        .into_iter()
        .filter(|target| target.kind.contains(&"test".to_owned()))
        .map(|t| t.name)
        .collect())
}

/// Where a test runner prints its counts.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    /// libtest
    Stdout,
    /// nextest
    Stderr,
}

/// Runs tests with their output on ours, and counts them.
pub(crate) fn counted(name: &str, mut command: Command, output: Output) -> Result<Stage> {
    let start = Instant::now();
    let shown = process::shown(&command);
    match output {
        Output::Stdout => command.stdout(Stdio::piped()),
        Output::Stderr => command.stderr(Stdio::piped()),
    };
    let mut child = command.spawn().with_context(|| format!("cannot start `{shown}`"))?;
    let mut tally = Tally::default();
    let mut count = |line: String| {
        // nextest repeats what a failed test's own libtest printed: its own sum says it all.
        let counts = match output {
            Output::Stdout => Tally::of_libtest(&line),
            Output::Stderr => Tally::of_nextest(&line),
        };
        tally += counts.unwrap_or_default();
    };
    let relayed = match (child.stdout.take(), child.stderr.take()) {
        (Some(stdout), _) => relay(stdout, io::stdout(), &mut count),
        (_, Some(stderr)) => relay(stderr, io::stderr(), &mut count),
        (None, None) => Ok(()),
    };
    let status = child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    relayed.with_context(|| format!("cannot read what `{shown}` prints"))?;
    if !status.success() && tally.failed == 0 {
        eprintln!("`{shown}` failed: {status}");
        tally += Tally::FAILURE;
    }
    Ok(Stage { name: name.to_owned(), tally: Some(tally), took: start.elapsed() })
}
