//! `cargo xtask bench`: what the kernel programs and the agent cost, and how right they are, on this machine. This
//! file only wires; each subject has its module.
#![forbid(unsafe_code)]

mod accuracy;
mod added;
mod agent;
mod child;
mod cost;
mod kernel;
mod ledger;
mod load;
mod peer;
mod report;
mod rig;
mod scaling;

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Result, bail};

use report::Report;

/// How long everything is watched.
#[derive(Clone, Copy)]
struct Plan {
    is_quick: bool,
    /// Rounds of interleaved measurements.
    rounds: usize,
    /// One measurement of a load.
    window: Duration,
    /// One measurement of the agent.
    long_window: Duration,
    /// How long the hog is counted.
    hog: Duration,
}

const QUICK: Plan = Plan {
    is_quick: true,
    rounds: 3,
    window: Duration::from_millis(200),
    long_window: Duration::from_secs(5),
    hog: Duration::from_secs(2),
};
const FULL: Plan = Plan {
    is_quick: false,
    rounds: 9,
    window: Duration::from_millis(500),
    long_window: Duration::from_secs(15),
    hog: Duration::from_secs(5),
};

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        // What is measured is this program, too.
        ["load", kind, rest @ ..] => load::run(kind, rest).map(|()| ExitCode::SUCCESS),
        ["measure", options @ ..] => {
            let (mut plan, mut json, mut parts) = (FULL, false, Vec::new());
            for option in options {
                match *option {
                    "--json" => json = true,
                    "--quick" => plan = QUICK,
                    part if PARTS.iter().any(|(name, _)| *name == part) => parts.push(part),
                    other => bail!("measure has no option {other}"),
                }
            }
            measure(plan, json, &parts)
        }
        _ => bail!("usage: bench measure [--json] [--quick] [PART…]"),
    }
}

type Part = fn(Plan, &mut Report) -> Result<()>;

const PARTS: [(&str, Part); 6] = [
    ("cost", cost::measure),
    ("added", added::measure),
    ("scaling", scaling::measure),
    ("agent", agent::measure),
    ("accuracy", accuracy::measure),
    ("ledger", ledger::measure),
];

/// Measures these parts, or all.
fn measure(plan: Plan, json: bool, parts: &[&str]) -> Result<ExitCode> {
    let mut report = Report::new("measure", rig::describe()?);
    for (name, part) in PARTS {
        if parts.is_empty() || parts.contains(&name) {
            part(plan, &mut report)?;
        }
    }
    Ok(report.conclude(json))
}

fn say(text: &str) {
    eprintln!("bench: {text}");
}
