//! Rates on the wire, round-trip times, fairness and CPU time, by each shaper at one rate.

use std::collections::BTreeMap;

use anyhow::Result;
use shaper_core::units::BitsPerSec;
use shaper_tests::statistics::jain;

use super::{
    MBIT,
    bed::{Bed, By},
    traffic::{Run, Traffic},
};
use crate::{
    Plan,
    report::{Report, median},
};

const ALL: [By; 4] = [By::Ours, By::Tbf, By::Htb, By::Nobody];
/// Those that ours is compared with.
const PEERS: [By; 2] = [By::Tbf, By::Htb];
const FLOWS: u32 = 8;
const LOADS: [Traffic; 3] = [Traffic::Tcp(1), Traffic::Tcp(FLOWS), Traffic::Udp];

/// What is off as little as this is exact.
const EXACT: f64 = 0.005;
const WIRE_GOAL: &str = "0.98–1.01 and error ≤ the larger of 0.5 % and the better of HTB and TBF";
/// Less than this beyond a rate is no load for it.
const ENOUGH: f64 = 1.05;

/// How long, in seconds from the beginning of a test.
struct Times {
    rounds: usize,
    length: u64,
    /// From when on what is sent is counted as steady.
    steady: f64,
}

/// What is told of a test.
struct Cell {
    /// Of the rate that was configured.
    wire: f64,
    first_second: f64,
    rtt_ms: f64,
    jain: f64,
    cpu_per_gb: f64,
    machine_cpu_per_gb: f64,
    retransmits: f64,
}

/// By round, of each shaper and load.
#[derive(Default)]
struct Table(BTreeMap<(By, Traffic), Vec<Cell>>);

impl Table {
    fn of(&self, by: By, traffic: Traffic, figure: fn(&Cell) -> f64) -> Vec<f64> {
        self.0.get(&(by, traffic)).into_iter().flatten().map(figure).collect()
    }

    fn median(&self, by: By, traffic: Traffic, figure: fn(&Cell) -> f64) -> f64 {
        median(&self.of(by, traffic, figure))
    }

    /// Ours by HTB's, of each round.
    fn by_htb(&self, traffic: Traffic, figure: fn(&Cell) -> f64) -> Vec<f64> {
        let (ours, theirs) = (self.of(By::Ours, traffic, figure), self.of(By::Htb, traffic, figure));
        ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect()
    }
}

pub(super) fn measure(plan: Plan, report: &mut Report, rate: BitsPerSec) -> Result<()> {
    let times = if plan.is_quick {
        Times { rounds: 1, length: 1, steady: 0.3 }
    } else if rate.0 < 100 * MBIT {
        // A buffer of 64 KiB takes half a second at 1 Mbit/s: a short window has one more or one less.
        Times { rounds: 5, length: 5, steady: 1.0 }
    } else {
        Times { rounds: 5, length: 3, steady: 1.0 }
    };
    let bed = Bed::make()?;
    let mut table = Table::default();
    for round in 0..times.rounds {
        // Who comes first has no advantage.
        for turn in 0..ALL.len() {
            let by = ALL[(round + turn) % ALL.len()];
            let _in_force = bed.shape(by, rate);
            for traffic in LOADS {
                let cell = cell(&bed, traffic, rate, &times)?;
                table.0.entry((by, traffic)).or_default().push(cell);
            }
        }
    }
    for traffic in [Traffic::Tcp(1), Traffic::Tcp(FLOWS)] {
        tcp(report, &table, traffic, rate);
    }
    udp(report, &table, rate);
    Ok(())
}

fn cell(bed: &Bed, traffic: Traffic, rate: BitsPerSec, times: &Times) -> Result<Cell> {
    let run = Run::of(bed, traffic, rate, times.length)?;
    let configured = rate.0 as f64;
    Ok(Cell {
        // The two ends do not end at the same instant.
        wire: run.wire(times.steady, times.length as f64 - 0.05) / configured,
        first_second: run.wire(0.0, 1.0) / configured,
        rtt_ms: run.outcome.mean_rtt_ms.unwrap_or(f64::NAN),
        jain: jain(&run.outcome.by_flow),
        cpu_per_gb: run.outcome.cpu_per_gb(),
        machine_cpu_per_gb: run.machine_cpu_per_gb(),
        retransmits: run.outcome.retransmits as f64,
    })
}

fn tcp(report: &mut Report, table: &Table, traffic: Traffic, rate: BitsPerSec) {
    let title = format!("{}, {rate}", traffic.name());
    wire(report, table, traffic, &title);
    if traffic == Traffic::Tcp(FLOWS) {
        let first = table.median(By::Ours, traffic, |cell| cell.first_second);
        let metric = format!("{title}: first second / configured, ours");
        report.judge("≤ 1.05", first <= 1.05, &metric, first, "");
        report.of(&table.of(By::Ours, traffic, |cell| cell.first_second));
        each(report, table, (&PEERS, traffic), &format!("{title}: first second / configured"), "", |cell| {
            cell.first_second
        });
        let fairness = table.median(By::Ours, traffic, |cell| cell.jain);
        report.judge("≥ 0.99", fairness >= 0.99, &format!("{title}: Jain, ours"), fairness, "");
        report.of(&table.of(By::Ours, traffic, |cell| cell.jain));
        each(report, table, (&PEERS, traffic), &format!("{title}: Jain"), "", |cell| cell.jain);
    }

    let ratios = table.by_htb(traffic, |cell| cell.rtt_ms);
    let ratio = median(&ratios);
    let metric = format!("{title}: mean RTT, ours / HTB's");
    report.judge("≤ 0.1 × HTB's", ratio <= 0.1, &metric, ratio, "");
    report.of(&ratios);
    each(report, table, (&ALL, traffic), &format!("{title}: mean RTT"), "ms", |cell| cell.rtt_ms);

    let ratios = table.by_htb(traffic, |cell| cell.cpu_per_gb);
    let (ratio, metric) = (median(&ratios), format!("{title}: CPU per GB, ours / HTB's"));
    match rate.0 / MBIT {
        5000.. => report.judge("≤ 1.0", ratio <= 1.0, &metric, ratio, ""),
        100.. => report.judge("≤ 1.5", ratio <= 1.5, &metric, ratio, ""),
        _ => report.tell(&metric, ratio, ""),
    }
    report.of(&ratios);
    each(report, table, (&ALL, traffic), &format!("{title}: CPU per GB"), "s", |cell| cell.cpu_per_gb);
    // At less it is lost in what else the machine does.
    if rate.0 >= 1000 * MBIT {
        let ratios = table.by_htb(traffic, |cell| cell.machine_cpu_per_gb);
        report.tell(&format!("{title}: CPU per GB of the machine, ours / HTB's"), median(&ratios), "");
        report.of(&ratios);
    }
    each(report, table, (&ALL, traffic), &format!("{title}: retransmits"), "", |cell| cell.retransmits);
}

/// Ours is to be right, and not less right than others.
fn wire(report: &mut Report, table: &Table, traffic: Traffic, title: &str) {
    let of = |by| table.median(by, traffic, |cell| cell.wire);
    let ours = of(By::Ours);
    let error = |by| (of(by) - 1.0).abs();
    let most = EXACT.max(error(By::Htb).min(error(By::Tbf)));
    let is_good = (0.98..=1.01).contains(&ours) && error(By::Ours) <= most;
    report.judge(WIRE_GOAL, is_good, &format!("{title}: wire rate / configured, ours"), ours, "");
    report.of(&table.of(By::Ours, traffic, |cell| cell.wire));
    each(report, table, (&PEERS, traffic), &format!("{title}: wire rate / configured"), "", |cell| cell.wire);
}

fn udp(report: &mut Report, table: &Table, rate: BitsPerSec) {
    let title = format!("{}, {rate}", Traffic::Udp.name());
    let metric = format!("{title}: wire rate / configured");
    let offered = table.median(By::Nobody, Traffic::Udp, |cell| cell.wire);
    report.tell(&format!("{metric}, nobody"), offered, "");
    if offered < ENOUGH {
        report.skip(&metric, "the sender does not reach the rate");
        return;
    }
    let ours = table.median(By::Ours, Traffic::Udp, |cell| cell.wire);
    report.judge("0.98–1.005", (0.98..=1.005).contains(&ours), &format!("{metric}, ours"), ours, "");
    report.of(&table.of(By::Ours, Traffic::Udp, |cell| cell.wire));
    each(report, table, (&PEERS, Traffic::Udp), &metric, "", |cell| cell.wire);
}

/// The figure of each of these shapers.
fn each(
    report: &mut Report,
    table: &Table,
    (shapers, traffic): (&[By], Traffic),
    metric: &str,
    unit: &'static str,
    figure: fn(&Cell) -> f64,
) {
    for &by in shapers {
        tell(report, table, (by, traffic), metric, unit, figure);
    }
}

fn tell(
    report: &mut Report,
    table: &Table,
    (by, traffic): (By, Traffic),
    metric: &str,
    unit: &'static str,
    figure: fn(&Cell) -> f64,
) {
    report.tell(&format!("{metric}, {}", by.name()), table.median(by, traffic, figure), unit);
    report.of(&table.of(by, traffic, figure));
}
