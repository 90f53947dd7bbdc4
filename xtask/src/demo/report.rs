//! Configured against measured.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Limits;

/// Bytes on the wire of a full TCP segment with timestamps (Ethernet, IPv4), and its payload.
const FRAME: f64 = 1514.0;
const SEGMENT: f64 = 1448.0;

/// How far the mean of a phase may be from the limit.
const CPU_TOLERANCE: f64 = 0.05;
const NET_TOLERANCE: f64 = 0.03;
/// When a change must be in force.
const IN_FORCE: f64 = 1.0;
/// In force: a window of this length is within 10 % of the limit.
const WINDOW: Duration = Duration::from_millis(300);
const WINDOW_TOLERANCE: f64 = 0.10;

/// All observers of a task at one instant.
#[derive(Clone, Copy)]
pub(super) struct Observation {
    pub(super) at: Instant,
    /// The cgroup's cpu.stat.
    pub(super) cpu_by_cgroup_us: u64,
    /// The receiver's count of payload.
    pub(super) received_bytes: u64,
    /// When the kernel programs' counters below were read.
    pub(super) kernel_at_ns: u64,
    pub(super) kernel_cpu_ns: u64,
    pub(super) kernel_sent_bytes: u64,
    pub(super) uplink_sent_bytes: u64,
}

/// Between two observations.
pub(super) struct Rates {
    pub(super) kernel_cores: f64,
    pub(super) kernel_mbit: f64,
    uplink_mbit: f64,
    cgroup_cores: f64,
    receiver_mbit: f64,
}

impl Observation {
    pub(super) fn rates_until(&self, later: &Observation) -> Rates {
        let seconds = (later.at - self.at).as_secs_f64();
        let kernel_ns = (later.kernel_at_ns - self.kernel_at_ns) as f64;
        let difference = |field: fn(&Observation) -> u64| field(later).saturating_sub(field(self)) as f64;
        Rates {
            kernel_cores: difference(|o| o.kernel_cpu_ns) / kernel_ns,
            kernel_mbit: difference(|o| o.kernel_sent_bytes) * 8000.0 / kernel_ns,
            uplink_mbit: difference(|o| o.uplink_sent_bytes) * 8000.0 / kernel_ns,
            cgroup_cores: difference(|o| o.cpu_by_cgroup_us) / 1e6 / seconds,
            receiver_mbit: difference(|o| o.received_bytes) * FRAME / SEGMENT * 8.0 / 1e6 / seconds,
        }
    }
}

fn rates_from(from: Instant, observations: &[Observation]) -> Option<Rates> {
    let first = observations.iter().find(|observation| observation.at >= from)?;
    Some(first.rates_until(observations.last()?))
}

/// What the task had less of than its limits and the tolerance allow, from `from` on, if there is any: others can
/// take time from a task, and cannot give it more than its limit.
pub(super) fn shortfall(limits: Limits, from: Instant, observations: &[Observation]) -> Option<String> {
    let rates = rates_from(from, observations)?;
    let cores = rates.kernel_cores.min(rates.cgroup_cores);
    let mbit = rates.kernel_mbit.min(rates.uplink_mbit).min(rates.receiver_mbit);
    if cores < limits.cores * (1.0 - CPU_TOLERANCE) {
        return Some(format!("{cores:.3} of {} cores", limits.cores));
    }
    (mbit < limits.mbit * (1.0 - NET_TOLERANCE)).then(|| format!("{mbit:.2} of {} Mbit/s", limits.mbit))
}

#[derive(Serialize)]
struct Row {
    metric: String,
    value: f64,
    unit: &'static str,
    goal: String,
    ok: bool,
    #[serde(skip)]
    configured: Option<f64>,
}

#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Adds how long after `changed` the new limits of a running task were in force.
    pub(super) fn add_change(
        &mut self,
        task: &str,
        limits: Limits,
        changed: Instant,
        observations: &[Observation],
    ) {
        let by_cpu = |rates: &Rates| rates.cgroup_cores / limits.cores;
        let by_net = |rates: &Rates| rates.receiver_mbit / limits.mbit;
        self.in_force(format!("{task}: new CPU limit in force after"), changed, observations, by_cpu);
        self.in_force(format!("{task}: new TCP limit in force after"), changed, observations, by_net);
    }

    /// Compares what every observer saw from `from` on with what the task may use.
    pub(super) fn compare(
        &mut self,
        phase: &str,
        task: &str,
        limits: Limits,
        from: Instant,
        observations: &[Observation],
    ) {
        let Some(rates) = rates_from(from, observations) else { return };
        let cpu = [("kernel programs", rates.kernel_cores), ("cgroup's cpu.stat", rates.cgroup_cores)];
        for (observer, value) in cpu {
            self.measured(
                format!("{task}, {phase}: CPU, by the {observer}"),
                value,
                "cores",
                limits.cores,
                CPU_TOLERANCE,
            );
        }
        let net = [
            ("kernel programs", rates.kernel_mbit),
            ("uplink", rates.uplink_mbit),
            ("receiver", rates.receiver_mbit),
        ];
        for (observer, value) in net {
            self.measured(
                format!("{task}, {phase}: TCP, by the {observer}"),
                value,
                "Mbit/s",
                limits.mbit,
                NET_TOLERANCE,
            );
        }
    }

    fn measured(&mut self, metric: String, value: f64, unit: &'static str, limit: f64, tolerance: f64) {
        let ok = (value / limit - 1.0).abs() <= tolerance;
        let goal = format!("{limit} ± {:.0} %", tolerance * 100.0);
        self.rows.push(Row { metric, value: rounded(value), unit, goal, ok, configured: Some(limit) });
    }

    fn in_force(
        &mut self,
        metric: String,
        changed: Instant,
        observations: &[Observation],
        ratio: impl Fn(&Rates) -> f64,
    ) {
        let begins = observations.iter().find(|first| {
            let last = observations.iter().find(|last| last.at >= first.at + WINDOW);
            last.is_some_and(|last| (ratio(&first.rates_until(last)) - 1.0).abs() <= WINDOW_TOLERANCE)
        });
        let value = begins.map_or(f64::INFINITY, |first| (first.at - changed).as_secs_f64());
        let (goal, ok) = (format!("<= {IN_FORCE}"), value <= IN_FORCE);
        self.rows.push(Row { metric, value: rounded(value), unit: "s", goal, ok, configured: None });
    }

    pub(super) fn passes(&self) -> bool {
        self.rows.iter().all(|row| row.ok)
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<64} {:>10} {:>10} {:>7}\n",
            "CONFIGURED AGAINST MEASURED", "CONFIGURED", "MEASURED", "ERROR"
        );
        for row in &self.rows {
            let Row { metric, value, unit, goal, ok, configured } = row;
            let (limit, error) = match configured {
                Some(limit) => (format!("{limit}"), format!("{:+.1} %", (value / limit - 1.0) * 100.0)),
                None => (goal.clone(), String::new()),
            };
            let verdict = if *ok { "" } else { "  BEYOND TOLERANCE" };
            // Writing to a String does not fail.
            let _ = writeln!(text, "{metric:<64} {limit:>10} {value:>10.3} {error:>7} {unit}{verdict}");
        }
        let _ = writeln!(
            text,
            "Tolerance: CPU {:.0} %, TCP {:.0} %; a change in force within {IN_FORCE} s. TCP rates are bytes on the wire; \
             the receiver counts payload, times {FRAME}/{SEGMENT}.",
            CPU_TOLERANCE * 100.0,
            NET_TOLERANCE * 100.0
        );
        text
    }

    /// The one line.
    pub(super) fn json(&self) -> String {
        serde_json::json!({ "name": "demo", "rows": self.rows }).to_string()
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { cores: 0.5, mbit: 10.0 };

    fn observation(start: Instant, ms: u64, scale: f64) -> Observation {
        let part = |per_second: f64| (per_second * scale * ms as f64 / 1000.0) as u64;
        Observation {
            at: start + Duration::from_millis(ms),
            cpu_by_cgroup_us: part(500_000.0),
            received_bytes: part(1_250_000.0 * SEGMENT / FRAME),
            kernel_at_ns: ms * 1_000_000,
            kernel_cpu_ns: part(500_000_000.0),
            kernel_sent_bytes: part(1_250_000.0),
            uplink_sent_bytes: part(1_250_000.0),
        }
    }

    fn observations(start: Instant, scale: f64) -> Vec<Observation> {
        (0..60).map(|index| observation(start, index * 100, scale)).collect()
    }

    fn report(scale: f64) -> Report {
        let start = Instant::now();
        let observations = observations(start, scale);
        let mut report = Report::default();
        report.compare("phase", "task", LIMITS, start, &observations);
        report.add_change("task", LIMITS, start, &observations);
        report
    }

    #[test]
    fn what_is_on_the_limit_passes_and_what_is_not_fails() {
        assert!(report(1.0).passes(), "{}", report(1.0).table());
        assert!(!report(1.04).passes());
        assert!(!report(0.9).passes());
    }

    #[test]
    fn only_what_a_task_lacks_falls_short() {
        let start = Instant::now();
        let falls_short = |scale| shortfall(LIMITS, start, &observations(start, scale)).is_some();
        assert_eq!([0.9, 0.96, 1.0, 1.1].map(falls_short), [true, true, false, false]);
    }

    #[test]
    fn the_json_has_a_row_for_every_figure() {
        let value: serde_json::Value = serde_json::from_str(&report(1.0).json()).unwrap();
        let rows = value["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 7);
        assert!(rows.iter().all(|row| row["ok"] == true && row["goal"].is_string()));
    }
}
