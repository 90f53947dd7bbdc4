//! What a task receives, held in the queue of an ifb: the rate that comes to its sockets, of that which was configured.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Error, Result, ensure};
use shaper_core::units::BitsPerSec;
use shaper_tests::{
    agent::Options,
    iperf::Outcome,
    net::{DEVICE, NetPair, Netns},
};

use super::{
    MBIT,
    bed::Bed,
    traffic::{Traffic, inside},
};
use crate::{
    Plan,
    report::{Report, median},
};

const NEAR: &str = "10.99.0.1";
const PORT: &str = "5301";
const LOADS: [Traffic; 3] = [Traffic::Tcp(1), Traffic::Tcp(8), Traffic::Udp];
const MBITS: [u64; 4] = [10, 20, 100, 1000];
const QUICK_MBITS: [u64; 2] = [20, 100];
const GOAL: std::ops::RangeInclusive<f64> = 0.97..=1.01;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let (rounds, seconds, mbits): (_, _, &[u64]) =
        if plan.is_quick { (1, "3", &QUICK_MBITS) } else { (5, "5", &MBITS) };
    let bed = Bed::make()?;
    for mbit in mbits {
        let rate = BitsPerSec(mbit * MBIT);
        let agent = Options::default().on(&bed.pair).start();
        agent.adopt("task", &bed.task, &["--net-in", &format!("{mbit}mbit")]);
        for traffic in LOADS {
            let runs: Result<Vec<Outcome>> = (0..rounds).map(|_| run(&bed, traffic, rate, seconds)).collect();
            let runs = runs?;
            let parts: Vec<f64> = runs.iter().map(|run| wire(run, traffic) / rate.0 as f64).collect();
            let part = median(&parts);
            let metric = format!("{}, {rate}: ingress by ifb / configured", traffic.name());
            report.judge("0.97–1.01", GOAL.contains(&part), &metric, part, "");
            report.of(&parts);
            if traffic != Traffic::Udp {
                let rtts: Vec<f64> = runs.iter().filter_map(|run| run.mean_rtt_ms).collect();
                report.tell(
                    &format!("{}, {rate}: mean RTT in the queue", traffic.name()),
                    median(&rtts),
                    "ms",
                );
                report.of(&rtts);
            }
        }
    }
    Ok(())
}

/// Bits a second on the wire that arrived.
fn wire(run: &Outcome, traffic: Traffic) -> f64 {
    let per_payload = match traffic {
        Traffic::Tcp(_) => 1514.0 / 1448.0,
        Traffic::Udp => 1442.0 / 1400.0,
    };
    run.bytes * 8.0 / run.seconds * per_payload
}

/// One test, of which the first second is not counted.
fn run(bed: &Bed, traffic: Traffic, rate: BitsPerSec, seconds: &str) -> Result<Outcome> {
    let NetPair { near, far } = &bed.pair;
    let mut server = Ended(start(near, &bed.task, &["iperf3", "-s", "-1", "--forceflush", "-p", PORT])?);
    let said = server.0.stdout.take().context("a child has no output")?;
    let mut lines = BufReader::new(said).lines();
    let listens = lines.any(|line| line.is_ok_and(|line| line.starts_with("Server listening")));
    ensure!(listens, "iperf3 has ended before it listened on {DEVICE}");
    // What else it says goes nowhere, but is taken.
    thread::spawn(move || lines.for_each(drop));
    let mut client =
        inside(&bed.far, &["timeout", "-k", "2", "60", "iperf3", "-c", NEAR, "-p", PORT, "-O", "1", "-J"]);
    client.args(["-t", seconds]).args(traffic.arguments(rate));
    let output = far.within(|| client.output()).context("cannot start iperf3")?;
    let outcome = Outcome::parse(&String::from_utf8_lossy(&output.stdout)).map_err(Error::msg);
    outcome.with_context(|| {
        format!("{} at {rate}: {}", traffic.name(), String::from_utf8_lossy(&output.stderr).trim())
    })
}

fn start(namespace: &Netns, group: &Path, arguments: &[&str]) -> Result<Child> {
    let mut command: Command = inside(group, arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    namespace.within(|| command.spawn()).context("cannot start iperf3; `./x setup bench` installs it")
}

/// A child that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
