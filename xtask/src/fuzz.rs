//! The soak of the fuzz targets: builds `fuzz/` with the coverage that libFuzzer steers by, and runs each target for as much
//! CPU time as it is due.
//!
//! A target is a folder of seeds in `fuzz/seeds` and a function of that name in `fuzz/src`. What a run finds worth keeping is
//! below `target/fuzz/corpus`, where the next run goes on from; what makes a target fail is below `target/fuzz/found`.
//! The coverage is a pass of LLVM that every rustc has, so the toolchain of everything else does.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::setup::{self, Need};
use crate::{process, workspace};

/// CPU time of each target in full.
const CPU_SECONDS: u64 = 600;
/// More processes would only take the time of others that work on the same machine.
const AT_ONCE: usize = 2;
/// A target that is given less than a whole CPU is given up after so many times what it is due.
const PATIENCE: u32 = 8;
/// What one input may take: time (in the debug assertions' company), and memory of the whole process.
const INPUT_SECONDS: u32 = 10;
const MEMORY_MIB: u32 = 1024;
/// Longer inputs find nothing that these do not, but take longer.
const LONGEST_INPUT: u32 = 4096;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// As cargo-fuzz has them; the last keeps apart what comparisons lead to.
const RUSTFLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// What a target is run with.
struct Bed {
    program: PathBuf,
    seeds: PathBuf,
    /// Below it: `corpus`, `found`, `log`.
    target: PathBuf,
    due: Duration,
}

/// What came of a target.
struct Outcome {
    executions: u64,
    cpu: Duration,
    corpus: usize,
    /// Places in the program that an input has led to.
    coverage: u64,
    status: ExitStatus,
    /// Inputs with which it failed.
    found: Vec<PathBuf>,
}

/// Runs the targets whose names contain one of `names`, or all, for a part of their time, `at_once` at a time.
pub(crate) fn run(part: u32, whole: u32, names: &[String], at_once: Option<usize>) -> Result<ExitCode> {
    let bed = Bed {
        program: build()?,
        seeds: workspace::root().join("fuzz/seeds"),
        target: workspace::target().join("fuzz"),
        due: Duration::from_secs(CPU_SECONDS) * part / whole,
    };
    let wanted = |name: &String| names.is_empty() || names.iter().any(|part| name.contains(part.as_str()));
    let targets: Vec<String> = targets(&bed.seeds)?.into_iter().filter(wanted).collect();
    if targets.is_empty() {
        bail!("no target of {} is named so", bed.seeds.display());
    }
    let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..at_once.unwrap_or(AT_ONCE).clamp(1, AT_ONCE) {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = bed.run(target);
                    bed.tell(target, &outcome);
                    outcomes.lock().unwrap_or_else(|it| it.into_inner()).push(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(|it| it.into_inner());
    let good = outcomes.iter().flatten().filter(|outcome| outcome.is_good()).count();
    println!("soak: fuzz: {good} of {} targets without a failure", targets.len());
    Ok(if good == targets.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names of the targets.
fn targets(seeds: &Path) -> Result<Vec<String>> {
    let list = || {
        let mut names = Vec::new();
        for entry in fs::read_dir(seeds)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        std::io::Result::Ok(names)
    };
    list().with_context(|| format!("cannot list {}", seeds.display()))
}

fn build() -> Result<PathBuf> {
    setup::ensure(Need::Build)?;
    setup::ensure(Need::Fuzzing)?;
    let (target, started) = (workspace::target().join("fuzz"), Instant::now());
    let mut cargo = process::cargo();
    cargo.args(["build", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    // With a target named, build scripts and macros are built without the flags.
    cargo.args(["--target", TRIPLE, "--target-dir"]).arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\u{1f}")).env_remove("RUSTFLAGS");
    process::run(&mut cargo).context("cannot build the fuzz targets")?;
    println!("soak: fuzz: built in {} s", started.elapsed().as_secs());
    Ok(target.join(TRIPLE).join("release/shaper-fuzz"))
}

impl Bed {
    fn found_in(&self, target: &str) -> PathBuf {
        self.target.join("found").join(target)
    }

    fn log_of(&self, target: &str) -> PathBuf {
        self.target.join("log").join(target)
    }

    fn run(&self, target: &str) -> Result<Outcome> {
        let (corpus, found) = (self.target.join("corpus").join(target), self.found_in(target));
        let log = self.log_of(target);
        for folder in [&corpus, &found, &self.target.join("log")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let before = files(&found)?;
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut fuzzer = Command::new(&self.program);
        fuzzer.env("SHAPER_FUZZ", target).current_dir(&self.target);
        fuzzer.arg(format!("-artifact_prefix={}/", found.display()));
        fuzzer.arg(format!("-timeout={INPUT_SECONDS}")).arg(format!("-rss_limit_mb={MEMORY_MIB}"));
        fuzzer.arg(format!("-max_len={LONGEST_INPUT}"));
        // It is asked to end when it has had its CPU time; a machine that never gives it that is not waited for.
        fuzzer.arg(format!("-max_total_time={}", (self.due * PATIENCE).as_secs().max(1)));
        fuzzer.args(["-print_final_stats=1", "-use_value_profile=1", "-reload=0"]);
        let dictionary = self.seeds.join(format!("{target}.dict"));
        if dictionary.is_file() {
            fuzzer.arg(format!("-dict={}", dictionary.display()));
        }
        fuzzer.arg(&corpus).arg(self.seeds.join(target));
        fuzzer.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child =
            fuzzer.spawn().with_context(|| format!("cannot start `{}`", process::shown(&fuzzer)))?;
        let cpu = self.wait_for_cpu(&mut child)?;
        let status = child.wait().context("cannot wait for a fuzz target")?;
        let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let said = String::from_utf8_lossy(&said);
        Ok(Outcome {
            executions: stat(&said, "number_of_executed_units").unwrap_or(0),
            cpu,
            corpus: files(&corpus)?.len() + files(&self.seeds.join(target))?.len(),
            coverage: coverage(&said).unwrap_or(0),
            status,
            found: files(&found)?.into_iter().filter(|file| !before.contains(file)).collect(),
        })
    }

    /// Waits until `child` has had the CPU time that is due, and asks it to end, or until it has ended by itself. Its CPU
    /// time, as last seen.
    fn wait_for_cpu(&self, child: &mut Child) -> Result<Duration> {
        let mut cpu = Duration::ZERO;
        let mut asked = false;
        loop {
            // Of a process that has ended and was not waited for it can still be read.
            cpu = cpu_time(child.id()).unwrap_or(cpu);
            if child.try_wait().context("cannot wait for a fuzz target")?.is_some() {
                return Ok(cpu);
            }
            if cpu >= self.due && !asked {
                asked = true;
                let pid = rustix::process::Pid::from_child(child);
                // Ended in this moment, it needs no asking.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::USR1);
            }
            // It has one thread, so it cannot have had it before.
            thread::sleep(
                self.due.saturating_sub(cpu).clamp(Duration::from_millis(100), Duration::from_secs(5)),
            );
        }
    }

    fn tell(&self, target: &str, outcome: &Result<Outcome>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return println!("soak: fuzz {target}: {error:#}"),
        };
        println!(
            "soak: fuzz {target}: {} executions in {:.1} s of CPU, {} failures, corpus {}, coverage {}",
            outcome.executions,
            outcome.cpu.as_secs_f64(),
            outcome.found.len(),
            outcome.corpus,
            outcome.coverage,
        );
        if !outcome.is_good() {
            println!(
                "soak: fuzz {target}: it ended with {}; see {}",
                outcome.status,
                self.log_of(target).display()
            );
        }
        for input in &outcome.found {
            println!("  again: SHAPER_FUZZ={target} {} {}", self.program.display(), input.display());
        }
    }
}

impl Outcome {
    fn is_good(&self) -> bool {
        self.status.success() && self.found.is_empty() && self.executions > 0
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    list().with_context(|| format!("cannot list {}", folder.display()))
}

/// CPU time of a process (proc_pid_stat(5), fields 14 and 15).
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    cpu_ticks(&stat)
        .map(|ticks| Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(14 - 3).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

/// A line of libFuzzer's final statistics: `stat::number_of_executed_units: 123`.
fn stat(said: &str, name: &str) -> Option<u64> {
    said.lines().find_map(|line| {
        line.strip_prefix("stat::")?.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok()
    })
}

/// The last count of covered places: `#2097152 pulse  cov: 1234 ft: …`.
fn coverage(said: &str) -> Option<u64> {
    let of_line = |line: &str| line.split_once(" cov: ")?.1.split(' ').next()?.parse().ok();
    said.lines().rev().find_map(of_line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_read() {
        let said = "#2\tINITED cov: 7 ft: 8 corp: 1/1b\n#9\tNEW    cov: 12 ft: 9 corp: 2/2b lim: 4\nBASE: 1\n\
                    stat::number_of_executed_units: 4711\nstat::average_exec_per_sec:     9\n";
        assert_eq!(stat(said, "number_of_executed_units"), Some(4711));
        assert_eq!(stat(said, "average_exec_per_sec"), Some(9));
        assert_eq!(stat(said, "number_of"), None);
        assert_eq!(coverage(said), Some(12));
        assert_eq!(coverage(""), None);
    }

    #[test]
    fn cpu_time_is_user_and_system_time() {
        assert_eq!(cpu_ticks("7 (a) b) R 1 2 3 4 5 6 7 8 9 10 30 12 0 0"), Some(42));
        assert_eq!(cpu_ticks("7 (a) R 1"), None);
    }
}
