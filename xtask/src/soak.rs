//! Runs in full, in the VM, what a run of all tests does a little of: `cargo xtask soak NAME`.
//!
//! A test that belongs to a soak asks `shaper_tests::soak` how often to do what it does, and prints the figures that it
//! aims at in lines that begin with `soak: `. In a soak it fails where they are not met.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::builder::PossibleValuesParser;

use crate::tally::Tally;
use crate::vm::{self, Job, Profile};

/// (name, part of the names of its tests)
const SOAKS: &[(&str, &str)] = &[("shrink", "memory::")];

/// What PID 1 of the machine takes for itself, and tells the tests of.
const ARGUMENT: &str = "--soak=";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to do
    #[arg(value_parser = PossibleValuesParser::new(SOAKS.iter().map(|(name, _)| *name)))]
    name: String,
    /// How much of it
    #[arg(long, default_value = "1/1", value_name = "PART/WHOLE")]
    fraction: Fraction,
    /// A series of Debian's kernels; may be given more than once [default: 6.12, 6.1 and 6.18]
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
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
    let tests = SOAKS.iter().filter(|(name, _)| *name == args.name).map(|(_, tests)| (*tests).to_owned());
    let mut filter: Vec<String> = tests.collect();
    filter.extend([format!("{ARGUMENT}{part}/{whole}"), "--nocapture".to_owned()]);
    let contents = vm::contents()?;
    let job = Job {
        contents: &contents,
        profile: Profile::Bare,
        timeout: Duration::from_secs(args.timeout),
        filter: &filter,
    };
    let verdicts = if args.kernel.is_empty() {
        job.run_series(Profile::Bare.series())?
    } else {
        job.run_series(&args.kernel)?
    };
    let mut tally = Tally::default();
    for verdict in &verdicts {
        tally += verdict.tally;
    }
    println!("{tally}");
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
