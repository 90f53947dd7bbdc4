//! Panels and alerts ask for what the daemons tell, and for nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;

use super::*;

fn read(path: &str) -> String {
    fs::read_to_string(workspace::root().join(path)).unwrap()
}

/// Every metric with its type, as docs/metrics.md has them: the daemons' own table, as a test of theirs compares.
fn metrics() -> BTreeMap<String, String> {
    let text = read("docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows = rows.map(|row| {
        let (name, rest) = row.split_once('`').unwrap();
        (name.to_owned(), rest.split('|').nth(1).unwrap().trim().to_owned())
    });
    rows.collect()
}

/// The names in a query that are no label, function or variable.
fn names(query: &str) -> BTreeSet<&str> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let words = query.split(|letter| !is_part(letter));
    words.filter(|word| word.starts_with("shaper_") || word.starts_with("process_")).collect()
}

/// The metric that a series is of, and its type.
fn metric<'a>(metrics: &'a BTreeMap<String, String>, series: &str) -> Option<(&'a str, &'a str)> {
    let ends = ["", "_bucket", "_sum", "_count"];
    ends.into_iter().find_map(|end| {
        let (name, kind) = metrics.get_key_value(series.strip_suffix(end)?)?;
        // A histogram has no series of its name alone, and nothing else has others.
        (end.is_empty() != (kind == "histogram")).then_some((name.as_str(), kind.as_str()))
    })
}

/// What is wrong with a query.
fn problems(metrics: &BTreeMap<String, String>, query: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for series in names(query) {
        let Some((_, kind)) = metric(metrics, series) else {
            problems.push(format!("{series} is no metric"));
            continue;
        };
        let grows = kind == "counter" || kind == "histogram";
        let over_time = |function: &str| {
            query.split(&format!("{function}(")).skip(1).any(|rest| rest.starts_with(series))
        };
        if grows != (over_time("rate") || over_time("increase")) && !query.contains("__name__") {
            problems.push(format!("{series} is a {kind}: rate() and increase() are for what only grows"));
        }
    }
    if names(query).is_empty() && !query.contains("up{") {
        problems.push("it asks for nothing".to_owned());
    }
    problems
}

fn queries(board: &Value) -> Vec<(String, String)> {
    let panels = board["panels"].as_array().unwrap();
    let of_panel = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().unwrap().clone();
        targets.into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    };
    panels.iter().flat_map(of_panel).collect()
}

#[test]
fn the_files_are_as_written_here() {
    for (name, board) in all() {
        let found = read(&format!("deploy/grafana/{name}"));
        assert!(found == text(&board).unwrap(), "{name} is not up to date: cargo xtask dashboards");
    }
}

#[test]
fn panels_ask_for_metrics_that_there_are() {
    let metrics = metrics();
    assert!(metrics.len() > 80, "{}", metrics.len());
    for (file, board) in all() {
        for (title, query) in queries(&board) {
            assert_eq!(problems(&metrics, &query), [""; 0], "{file}, {title}: {query}");
            assert!(query.contains("job=~\"$job\""), "{file}, {title}: of every job there is");
            let fixed = query.contains("[1h]");
            assert!(
                !query.contains('[') || fixed || query.contains("[$__rate_interval]"),
                "{title}: {query}"
            );
        }
        for variable in board["templating"]["list"].as_array().unwrap() {
            let of = variable["definition"].as_str().unwrap_or_default();
            assert!(names(of).iter().all(|series| metric(&metrics, series).is_some()), "{file}: {of}");
        }
    }
}

#[test]
fn panels_lie_beside_each_other() {
    for (file, board) in all() {
        let mut taken = BTreeSet::new();
        let mut titles = BTreeSet::new();
        for panel in board["panels"].as_array().unwrap() {
            let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    assert!(x < 24 && taken.insert((x, y)), "{file}: {}", panel["title"]);
                }
            }
            assert!(
                titles.insert(panel["title"].as_str().unwrap()),
                "{file}: {} is there twice",
                panel["title"]
            );
            assert!(!panel["description"].as_str().unwrap().is_empty(), "{file}: {}", panel["title"]);
        }
    }
}

/// Name and query of each alert.
fn alerts() -> Vec<(String, String)> {
    let text = read("deploy/prometheus/rules.yml");
    let rules = text.split("- alert: ").skip(1);
    let rule = |rule: &str| {
        let (name, rest) = rule.split_once('\n').unwrap();
        let query = rest.split("expr: >-\n").nth(1).unwrap().split("        for: ").next().unwrap();
        (name.trim().to_owned(), query.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    rules.map(rule).collect()
}

#[test]
fn alerts_ask_for_metrics_that_there_are_and_have_a_case_and_a_page() {
    let (metrics, alerts) = (metrics(), alerts());
    let (rules, cases, pages) = (
        read("deploy/prometheus/rules.yml"),
        read("deploy/prometheus/rules.test.yml"),
        read("docs/runbook.md"),
    );
    assert!(alerts.len() >= 20, "{}", alerts.len());
    for (name, query) in &alerts {
        assert_eq!(problems(&metrics, query), [""; 0], "{name}: {query}");
        // It fires in one case, and is quiet in that of a cluster that is well.
        assert!(cases.contains(&format!("  - name: {name}\n")), "{name} has no case of its own");
        let quiet = format!("eval_time: 50m, alertname: {name}, exp_alerts: []");
        assert!(cases.contains(&quiet), "{name} is not among those that are quiet");
        assert!(pages.contains(&format!("\n## {name}\n")), "{name} is not in docs/runbook.md");
        let anchor = format!("/docs/runbook.md#{}\n", name.to_lowercase());
        assert!(rules.contains(&anchor), "{name} does not say where its page is");
    }
    for page in pages.lines().filter_map(|line| line.strip_prefix("## ")) {
        assert!(alerts.iter().any(|(name, _)| name == page), "docs/runbook.md has {page}, which is no alert");
    }
}

#[test]
fn what_is_no_metric_is_found() {
    let metrics = metrics();
    for (query, problem) in [
        ("shaper_no_such_thing", "is no metric"),
        ("shaper_broker_commit_seconds", "is no metric"),
        ("shaper_broker_tasks_bucket", "is no metric"),
        ("sum(shaper_task_cpu_seconds_total)", "is a counter"),
        ("rate(shaper_task_memory_bytes[5m])", "is a gauge"),
        ("vector(1)", "asks for nothing"),
    ] {
        let found = problems(&metrics, query);
        assert!(found.len() == 1 && found[0].contains(problem), "{query}: {found:?}");
    }
}
