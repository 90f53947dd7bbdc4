//! The figures, each beside its goal.

use std::{fmt::Write, process::ExitCode, time::Instant};

use serde::Serialize;

#[derive(Serialize)]
struct Row {
    metric: String,
    value: f64,
    unit: &'static str,
    goal: String,
    ok: bool,
}

/// All figures of a run.
pub(crate) struct Report {
    name: &'static str,
    rig: String,
    start: Instant,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(name: &'static str, rig: String) -> Report {
        crate::say(&rig);
        Report { name, rig, start: Instant::now(), rows: Vec::new() }
    }

    /// A figure without a goal.
    pub(crate) fn tell(&mut self, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, String::new(), true);
    }

    /// A figure that is to be at most `goal`.
    pub(crate) fn at_most(&mut self, goal: f64, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, format!("<= {goal}"), value <= goal);
    }

    /// A figure that is to be exactly `goal`.
    pub(crate) fn exactly(&mut self, goal: f64, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, goal.to_string(), value == goal);
    }

    /// A figure that this machine does not have.
    pub(crate) fn skip(&mut self, metric: &str, why: &str) {
        self.add(&format!("{metric}: skipped, {why}"), 0.0, "", String::new(), true);
    }

    fn add(&mut self, metric: &str, value: f64, unit: &'static str, goal: String, ok: bool) {
        let row =
            Row { metric: format!("host: {metric}"), value: (value * 1e4).round() / 1e4, unit, goal, ok };
        crate::say(&line(&row));
        self.rows.push(row);
    }

    /// Prints everything.
    pub(crate) fn conclude(self, json: bool) -> ExitCode {
        let Report { name, rig, start, rows } = self;
        let mut text = format!("\n{rig}\n{:<86} {:>10} {:<9} {:>8}\n", "MEASURED", "", "", "GOAL");
        for row in &rows {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}", line(row));
        }
        let _ = writeln!(text, "{:.0} s", start.elapsed().as_secs_f64());
        print!("{text}");
        if json {
            println!("{}", serde_json::json!({ "name": name, "rows": rows }));
        }
        if rows.iter().all(|row| row.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn line(row: &Row) -> String {
    let Row { metric, value, unit, goal, ok } = row;
    let verdict = if *ok { "" } else { "  MISSED" };
    format!("{metric:<86} {value:>10.3} {unit:<9} {goal:>8}{verdict}")
}

/// The middle one; of an even number, the mean of the two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}
