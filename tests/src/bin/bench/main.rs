//! `cargo xtask bench`: what the kernel programs and the agent cost, and how right they are; how exact limits are, and
//! what loans are worth; how well the network is shaped; what a broker takes in, and how long its pages take; how fast and how well tasks are placed; how many
//! nodes are started for them; how well limits are sized by what was used; what containers wait for. This file only wires; each part of a subject has its module.
#![forbid(unsafe_code)]

mod accuracy;
mod added;
mod agent;
mod broker;
mod budget;
mod cards;
mod child;
mod containers;
mod cost;
mod greedy;
mod kernel;
mod ledger;
mod load;
mod net;
mod peer;
mod place;
mod pulse;
mod report;
mod rig;
mod rightsize;
mod scale;
mod scaling;
mod service;
mod shares;
mod site;
mod traces;

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Result, bail};

use report::Report;

/// How long everything is watched.
#[derive(Clone, Copy)]
struct Plan {
    is_quick: bool,
    /// No part was named.
    is_whole: bool,
    /// Rounds of interleaved measurements.
    rounds: usize,
    /// One measurement of a load.
    window: Duration,
    /// One measurement of the agent.
    long_window: Duration,
    /// How long the hog is counted.
    hog: Duration,
    /// How long weights are measured; limits are a promise over 10 s.
    weights: Duration,
    /// Times that a budget is crossed.
    crossings: u32,
    /// Rounds of a service with each kind of limit.
    service_rounds: usize,
    /// How long a service is measured each time.
    service: Duration,
    /// How long tasks that take all they can get are watched.
    greed: Duration,
    /// How long a broker is kept busy, once it is.
    steady: Duration,
}

const QUICK: Plan = Plan {
    is_quick: true,
    is_whole: true,
    rounds: 3,
    window: Duration::from_millis(200),
    long_window: Duration::from_secs(5),
    hog: Duration::from_secs(2),
    weights: Duration::from_secs(4),
    crossings: 10,
    service_rounds: 1,
    service: Duration::from_secs(2),
    greed: Duration::from_secs(11),
    steady: Duration::from_secs(6),
};
const FULL: Plan = Plan {
    is_quick: false,
    is_whole: true,
    rounds: 9,
    window: Duration::from_millis(500),
    long_window: Duration::from_secs(15),
    hog: Duration::from_secs(5),
    weights: Duration::from_secs(10),
    crossings: 100,
    service_rounds: 5,
    service: Duration::from_secs(6),
    greed: Duration::from_secs(40),
    steady: Duration::from_secs(60),
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
        [name, options @ ..] => {
            let Some((name, all)) = SUBJECTS.iter().find(|(subject, _)| subject == name) else {
                bail!("{USAGE}");
            };
            let (mut plan, mut json, mut parts) = (FULL, false, Vec::new());
            for option in options {
                match *option {
                    "--json" => json = true,
                    "--quick" => plan = QUICK,
                    part if all.iter().any(|(name, _)| *name == part) => parts.push(part),
                    other => bail!("{name} has neither option nor part {other}"),
                }
            }
            plan.is_whole = parts.is_empty();
            let mut report = Report::new(name)?;
            for (name, part) in *all {
                if parts.is_empty() || parts.contains(name) {
                    part(plan, &mut report)?;
                }
            }
            Ok(report.conclude(json))
        }
        [] => bail!("{USAGE}"),
    }
}

const USAGE: &str = "usage: bench measure|actuators|shape|net|broker|web|place|openb|rightsize|scale|containers [--json] [--quick] [PART…]";

type Part = fn(Plan, &mut Report) -> Result<()>;

const SUBJECTS: [(&str, &[(&str, Part)]); 11] = [
    (
        "measure",
        &[
            ("cost", cost::measure),
            ("added", added::measure),
            ("scaling", scaling::measure),
            ("agent", agent::measure),
            ("cards", cards::measure),
            ("accuracy", accuracy::measure),
            ("ledger", ledger::measure),
        ],
    ),
    // On cgroup v2 with the controller for CPU time, so in the VM.
    ("actuators", &[("shares", shares::measure), ("budget", budget::measure)]),
    ("shape", &[("service", service::measure), ("greedy", greedy::measure)]),
    (
        "net",
        &[
            ("1mbit", net::at::<1>),
            ("10mbit", net::at::<10>),
            ("100mbit", net::at::<100>),
            ("1gbit", net::at::<1000>),
            ("5gbit", net::at::<5000>),
            ("latency", net::latency),
            ("attached", net::attached),
            ("packet", net::packet),
            ("ingress", net::ingress),
        ],
    ),
    ("web", &[("pages", broker::web)]),
    (
        "broker",
        &[
            ("stream", broker::stream),
            ("unary", broker::unary),
            ("sessions", broker::sessions),
            ("start", broker::start),
        ],
    ),
    // Pure: no kernel is needed, only the traces.
    (
        "place",
        &[
            ("churn", place::churn),
            ("preempting", place::preempting),
            ("replay", place::replay),
            ("waiting", place::waiting),
        ],
    ),
    ("openb", &[("packing", place::packing)]),
    ("scale", &[("arrivals", scale::arrivals)]),
    ("containers", &[("start", containers::start), ("adopt", containers::adopt)]),
    ("rightsize", &[("cpu", rightsize::cpu), ("memory", rightsize::memory), ("cost", rightsize::cost)]),
];

fn say(text: &str) {
    eprintln!("bench: {text}");
}
