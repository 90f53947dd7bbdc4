//! Runs in full, in the VM and on this machine's own kernel, what a run of all tests does a little of: `cargo xtask soak NAME`.
//! So does the fuzzing (`fuzz.rs`), of which `.ci/run` does a little.
//!
//! A test that belongs to a soak asks `shaper_tests::soak` how often to do what it does, and prints the figures that it
//! aims at in lines that begin with `soak: `. In a soak it fails where they are not met.

use std::env;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;

use crate::bins;
use crate::ebpf;
use crate::fuzz;
use crate::guards;
use crate::setup::{self, Need};
use crate::tally::Tally;
use crate::test::{self, Output};
use crate::vm::{self, Job, Profile};

struct Soak {
    name: &'static str,
    /// Part of the names of its tests; of a target of its own, nothing.
    tests: &'static str,
    /// Where there are some for this machine's own kernel.
    host: Option<&'static str>,
    /// The kernels of the VM.
    series: &'static [&'static str],
}

const SOAKS: &[Soak] = &[
    Soak { name: "broker", tests: "", host: Some(test::FAULTS_TARGET), series: &[] },
    Soak { name: "kills", tests: "kills::", host: Some(test::NATIVE_TARGET), series: &["6.12"] },
    Soak { name: "shrink", tests: "memory::", host: None, series: &vm::SERIES },
];

/// The soak of the fuzz targets.
const FUZZ: &str = "fuzz";
/// The soak of the property tests: so many rounds, each with a seed of its own.
const PROPERTIES: &str = "properties";
const ROUNDS: u32 = 100;
/// The packages of pure code, whose tests are nothing but computation.
const PURE: [&str; 3] = ["shaper-core", "shaper-common", "shaper-broker"];
/// The soak that takes guards away: see `guards`.
const GUARDS: &str = "guards";
/// What repeats a soak.
const SEED: &str = "SHAPER_SEED";

/// What tells a test, in an environment, and what PID 1 of the machine takes for itself to do the same.
const VARIABLE: &str = "SHAPER_SOAK";
const ARGUMENT: &str = "--soak=";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to do
    #[arg(value_parser = PossibleValuesParser::new(SOAKS.iter().map(|soak| soak.name).chain([FUZZ, GUARDS, PROPERTIES])))]
    name: String,
    /// How much of it
    #[arg(long, default_value = "1/1", value_name = "PART/WHOLE")]
    fraction: Fraction,
    /// Of the guards, those whose names have this; may be given more than once [default: all]
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// A series of Debian's kernels; may be given more than once [default: 6.12, 6.1 and 6.18; for kills 6.12, for
    /// broker none]
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
    /// Of `fuzz`: a target, or a part of the names of some; may be given more than once [default: all]
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// Of `fuzz`: how many targets run at a time, 1 or 2 [default: 2]
    #[arg(long, value_name = "NUMBER")]
    jobs: Option<usize>,
    /// Seconds until a machine is given up
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fraction {
    part: u32,
    whole: u32,
}

impl FromStr for Fraction {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Fraction> {
        let numbers =
            text.split_once('/').and_then(|(part, whole)| Some((part.parse().ok()?, whole.parse().ok()?)));
        match numbers {
            Some((part, whole)) if part > 0 && whole > 0 => Ok(Fraction { part, whole }),
            _ => bail!("`{text}` is not a fraction, such as 1/20"),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let Fraction { part, whole } = args.fraction;
    if args.name == FUZZ {
        return fuzz::run(part, whole, &args.target, args.jobs);
    }
    if args.name == PROPERTIES {
        return properties(args.fraction);
    }
    if args.name == GUARDS {
        return guards::run(part, whole, &args.only);
    }
    let Some(soak) = SOAKS.iter().find(|soak| soak.name == args.name) else {
        bail!("there is no soak `{}`", args.name);
    };
    let mut tally = Tally::default();
    if let Some(target) = soak.host {
        setup::ensure(Need::Native)?;
        let (bpf_object, bins) = (ebpf::build()?.programs, bins::build()?);
        let mut tests = Command::new(bins::build_tests(target)?);
        tests.args([soak.tests, "--nocapture", "--test-threads=1"]);
        tests.env(VARIABLE, format!("{part}/{whole}"));
        tests.env("SHAPER_BPF_OBJECT", bpf_object).env("SHAPER_BIN_DIR", bins.path());
        tally += test::counted("host", tests, Output::Stdout)?.tally.unwrap_or_default();
    }
    if soak.series.is_empty() {
        return Ok(concluded(tally));
    }
    let contents = vm::contents()?;
    let filter = [soak.tests.to_owned(), format!("{ARGUMENT}{part}/{whole}"), "--nocapture".to_owned()];
    let job = Job {
        contents: &contents,
        profile: Profile::Bare,
        timeout: Duration::from_secs(args.timeout),
        beside: false,
        again: false,
        filter: &filter,
    };
    let verdicts = match args.kernel.is_empty() {
        true => job.run_series(soak.series)?,
        false => job.run_series(&args.kernel)?,
    };
    for verdict in &verdicts {
        tally += verdict.tally;
    }
    Ok(concluded(tally))
}

/// Prints the sum: whether all was well.
pub(crate) fn concluded(tally: Tally) -> ExitCode {
    println!("{tally}");
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the tests of pure code with other inputs than those of each run of all tests.
fn properties(Fraction { part, whole }: Fraction) -> Result<ExitCode> {
    let given = env::var(SEED).ok().map(|seed| seed.parse::<u64>().with_context(|| format!("{SEED}={seed}")));
    let first = given.unwrap_or_else(|| Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() << 16))?;
    let binaries = bins::build_unit_tests(&PURE)?;
    if binaries.len() != PURE.len() {
        bail!("cargo built the unit tests of {} packages, not those of {}", binaries.len(), PURE.join(", "));
    }
    let rounds = (u64::from(ROUNDS) * u64::from(part)).div_ceil(u64::from(whole));
    let mut tally = Tally::default();
    for seed in first..first + rounds {
        for binary in &binaries {
            let mut tests = Command::new(binary);
            tests.arg("--quiet").env(test::PROPERTY_SEED, seed.to_string());
            let round = test::counted("host", tests, Output::Stdout)?.tally.unwrap_or_default();
            if round.failed > 0 {
                println!("soak: {SEED}={seed} repeats what failed");
            }
            tally += round;
        }
    }
    println!("soak: {rounds} rounds, the first with {SEED}={first}");
    Ok(concluded(tally))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_of_whole_numbers() {
        assert_eq!("1/20".parse::<Fraction>().unwrap(), Fraction { part: 1, whole: 20 });
        for broken in ["", "1", "1/0", "0/1", "a/b", "1/2/3"] {
            assert!(broken.parse::<Fraction>().is_err(), "{broken}");
        }
    }
}
