//! What small messages wait for beside a load: those of the task that sends it, and those of another.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shaper_core::units::BitsPerSec;
use tempfile::TempDir;

use super::{
    MBIT,
    bed::{Bed, By},
    traffic::{Endless, Traffic},
};
use crate::{
    Plan,
    child::Load,
    pulse,
    report::{Report, median, quantile},
    say,
};

const SHAPERS: [By; 3] = [By::Ours, By::Tbf, By::Htb];
const MBITS: [u64; 4] = [1, 10, 100, 1000];
const QUICK_MBITS: [u64; 2] = [10, 1000];
const LOAD: Traffic = Traffic::Tcp(8);
const PONG: &str = "10.99.0.2:5002";

struct Times {
    rounds: usize,
    /// For so long without the load, and as long beside it: the more messages, the slower is the slowest.
    window: Duration,
}

/// The 99th percentiles of one turn, ms.
struct Turn {
    unloaded: f64,
    same: f64,
    other: f64,
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let (times, mbits): (_, &[u64]) = if plan.is_quick {
        (Times { rounds: 1, window: Duration::from_millis(500) }, &QUICK_MBITS)
    } else {
        (Times { rounds: 5, window: Duration::from_secs(2) }, &MBITS)
    };
    let bed = Bed::make()?;
    let far = bed.far.display().to_string();
    let _pong = Load::start(&["pong", PONG, "--group", &far], Some(&bed.pair.far))?;
    for mbit in mbits {
        let rate = BitsPerSec(mbit * MBIT);
        let mut turns = SHAPERS.map(|_| Vec::new());
        for round in 0..times.rounds {
            for at in 0..SHAPERS.len() {
                let at = (round + at) % SHAPERS.len();
                turns[at].push(turn(&bed, SHAPERS[at], rate, &times)?);
            }
        }
        tell(report, rate, &turns);
    }
    Ok(())
}

fn turn(bed: &Bed, by: By, rate: BitsPerSec, times: &Times) -> Result<Turn> {
    let _in_force = bed.shape(by, rate);
    let notes = TempDir::new().context("cannot make a temporary directory")?;
    // Together they take 2 % of the rate at most.
    let pause_us = (13_000 * MBIT / rate.0 * 8).max(2_000).to_string();
    let start = |group: &Path, name: &str| -> Result<Probe> {
        let file = notes.path().join(name);
        let (group, place) = (group.display().to_string(), file.display().to_string());
        let arguments = ["ping", PONG, &place, &pause_us, "--group", &group];
        Ok(Probe { load: Load::start(&arguments, Some(&bed.pair.near))?, file })
    };
    let (same, other) = (start(&bed.task, "same")?, start(&bed.other, "other")?);
    let (mut loads, files) = ([same.load, other.load], [same.file, other.file]);
    loads[1].run(times.window)?;
    let unloaded = p99(&files[1], 0)?;
    let before = pulse::records(&files[1])?.len();
    let load = Endless::begin(bed, LOAD, rate)?;
    Load::run_all(&mut loads, times.window)?;
    load.end(bed)?;
    Ok(Turn { unloaded, same: p99(&files[0], 0)?, other: p99(&files[1], before)? })
}

struct Probe {
    load: Load,
    file: PathBuf,
}

/// Of what was noted after so many, ms.
fn p99(file: &Path, after: usize) -> Result<f64> {
    let records = pulse::records(file)?;
    let trips: Vec<f64> = records.iter().skip(after).map(|(_, nanos)| *nanos as f64 / 1e6).collect();
    ensure!(!trips.is_empty(), "no message came back");
    if trips.len() < 100 {
        say(&format!("of {} messages the 99th percentile is the slowest", trips.len()));
    }
    Ok(quantile(&trips, 990))
}

fn tell(report: &mut Report, rate: BitsPerSec, turns: &[Vec<Turn>; 3]) {
    let title = format!("ping p99 beside {}, {rate}", LOAD.name());
    let each = |at: usize, figure: fn(&Turn) -> f64| turns[at].iter().map(figure).collect::<Vec<_>>();
    let ratios: Vec<f64> = turns[0].iter().zip(&turns[2]).map(|(ours, htb)| ours.same / htb.same).collect();
    let ratio = median(&ratios);
    report.judge("≤ 0.1 × HTB's", ratio <= 0.1, &format!("{title}: same task, ours / HTB's"), ratio, "");
    report.of(&ratios);
    for (at, by) in SHAPERS.iter().enumerate() {
        let values = each(at, |turn| turn.same);
        report.tell(&format!("{title}: same task, {}", by.name()), median(&values), "ms");
        report.of(&values);
    }
    for (at, by) in SHAPERS.iter().enumerate() {
        let ratios = each(at, |turn| turn.other / turn.unloaded);
        let (ratio, metric) = (median(&ratios), format!("{title}: another task / unloaded, {}", by.name()));
        match by {
            By::Ours => report.judge("≤ 2", ratio <= 2.0, &metric, ratio, ""),
            _ => report.tell(&metric, ratio, ""),
        }
        report.of(&ratios);
        let values = each(at, |turn| turn.unloaded);
        report.tell(&format!("{title}: unloaded, {}", by.name()), median(&values), "ms");
        report.of(&values);
    }
}
