//! The figures, each beside its goal.

use std::{fmt::Write, process::ExitCode, time::Instant};

use anyhow::Result;
use serde::Serialize;
pub(crate) use shaper_tests::statistics::{median, quantile};

use crate::rig;

#[derive(Serialize)]
struct Row {
    metric: String,
    value: f64,
    unit: &'static str,
    goal: String,
    ok: bool,
    /// The least and the most of what this is the median of.
    #[serde(skip_serializing_if = "Option::is_none")]
    range: Option<[f64; 2]>,
}

/// All figures of a run.
pub(crate) struct Report {
    name: &'static str,
    /// Where all of it was measured.
    place: String,
    rig: String,
    start: Instant,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(name: &'static str) -> Result<Report> {
        let (place, rig) = (rig::place(), rig::describe()?);
        crate::say(&rig);
        Ok(Report { name, place, rig, start: Instant::now(), rows: Vec::new() })
    }

    /// A figure without a goal.
    pub(crate) fn tell(&mut self, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, String::new(), true);
    }

    /// A figure that is to be at most `goal`.
    pub(crate) fn at_most(&mut self, goal: f64, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, format!("<= {goal}"), value <= goal);
    }

    /// A figure that is to be at least `goal`.
    pub(crate) fn at_least(&mut self, goal: f64, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, format!(">= {goal}"), value >= goal);
    }

    /// A figure whose goal is more than a bound, in words.
    pub(crate) fn judge(&mut self, goal: &str, ok: bool, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, goal.to_owned(), ok);
    }

    /// A figure that is to be at most so far from 0.
    pub(crate) fn within(&mut self, goal: f64, metric: &str, value: f64, unit: &'static str) {
        self.add(metric, value, unit, format!("+- {goal}"), value.abs() <= goal);
    }

    /// Says of the last figure what it is the median of.
    pub(crate) fn of(&mut self, values: &[f64]) {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.len() > 1
            && let Some(row) = self.rows.last_mut()
        {
            row.range = Some([rounded(least), rounded(most)]);
        }
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
        let metric = format!("{}: {metric}", self.place);
        let row = Row { metric, value: rounded(value), unit, goal, ok, range: None };
        // Once it is known to be complete.
        if let Some(row) = self.rows.last() {
            crate::say(&line(row));
        }
        self.rows.push(row);
    }

    /// Prints everything.
    pub(crate) fn conclude(self, json: bool) -> ExitCode {
        let Report { name, place: _, rig, start, rows } = self;
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
    let Row { metric, value, unit, goal, ok, range } = row;
    let verdict = if *ok { "" } else { "  MISSED" };
    let range = range.map(|[least, most]| format!("  ({least:.3} to {most:.3})")).unwrap_or_default();
    format!("{metric:<86} {value:>10.3} {unit:<9} {goal:>8}{range}{verdict}")
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
