//! What `cargo` and `./x` do, they do in the repository, on this machine.

use std::{
    io::{BufRead, BufReader},
    process::{Command, ExitStatus, Stdio},
};

use serde::Deserialize;

use crate::page::root;

/// What xtask is told by a command that is one of its.
pub(crate) fn arguments(command: &str) -> Option<&str> {
    command.strip_prefix("cargo xtask ").or_else(|| command.strip_prefix("./x "))
}

/// Whether a command is executed here.
pub(crate) fn is_for(command: &str) -> bool {
    command.starts_with("cargo ") || arguments(command).is_some()
}

/// Asserts of a command that is xtask's that it takes these arguments: it reads all up to `--help`, and then does nothing.
pub(crate) fn assert_understood(at: &str, command: &str) {
    let Some(arguments) = arguments(command) else { return };
    let own = arguments.split_once(" -- ").map_or(arguments, |(own, _)| own);
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["run", "--quiet", "--locked", "--package", "xtask", "--"]);
    let output = command.args(own.split_whitespace()).arg("--help").output().expect("cargo can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{at}: cargo xtask {own}: {said}");
}

/// Executes a command; what it prints is shown, and returned but for its errors, with how it ended.
pub(crate) fn run(command: &str) -> (String, ExitStatus) {
    let mut shell = Command::new("/bin/bash");
    shell.args(["-c", command]).current_dir(root()).stdin(Stdio::null()).stdout(Stdio::piped());
    // What cargo tells this program of its package is not for another cargo: it would build much anew.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_")) {
        if !matches!(name.as_str(), "CARGO_HOME" | "CARGO_INCREMENTAL" | "CARGO_TARGET_DIR") {
            shell.env_remove(name);
        }
    }
    let mut child = shell.spawn().expect("a shell can be started");
    let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
    let mut printed = String::new();
    for line in stdout.lines().map_while(Result::ok) {
        println!("{line}");
        printed += &line;
        printed += "\n";
    }
    let status = child.wait().expect("it is a child");
    (printed, status)
}

/// The last line of a benchmark's that was asked for JSON.
#[derive(Deserialize)]
struct Figures {
    rows: Vec<Figure>,
}

#[derive(Deserialize)]
struct Figure {
    metric: String,
    value: f64,
}

/// Asserts that there are figures, each of which says of what.
pub(crate) fn assert_figures(at: &str, printed: &str) {
    let last = printed.lines().last().unwrap_or_default();
    let figures: Figures =
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{at}: {error} in the last line: {last}"));
    let are_figures = figures.rows.iter().all(|row| !row.metric.is_empty() && row.value.is_finite());
    assert!(!figures.rows.is_empty() && are_figures, "{at}: {last}");
}

#[test]
fn figures_are_in_the_last_line() {
    let row = r#"{"metric": "a page", "value": 1.5, "unit": "ms", "goal": "≤ 2", "ok": true}"#;
    assert_figures("here", &format!("a page  1.5 ms\n{{\"name\": \"web\", \"rows\": [{row}]}}\n"));
}

#[test]
#[should_panic(expected = "here: {")]
fn no_figures_are_none() {
    assert_figures("here", "{\"name\": \"web\", \"rows\": []}\n");
}
