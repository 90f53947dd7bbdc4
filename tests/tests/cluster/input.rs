//! What is wrong is refused, with the reason, and changes nothing.

use shaper_core::document;
use shaper_tests::{
    broker::Broker,
    cluster::{Cluster, Load, networks},
    shaper::REFUSED,
};

const GOOD: &str = r#"{"profile": {"task_id": "t", "resource_demand": {"cpu_cores": 0.5, "memory_gb": 0.5},
"priority": "low"}, "command": ["/bin/true"], "cwd": "/", "run_as": {"uid": 65534, "gid": 65534}}"#;

/// Nine levels of nine references each.
fn alias_bomb() -> String {
    let mut text = String::from("a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n");
    for level in 1..9 {
        let references = vec![format!("*a{}", level - 1); 9].join(", ");
        text += &format!("a{level}: &a{level} [{references}]\n");
    }
    text + "task_id: *a8\n"
}

#[test]
fn a_document_that_is_wrong_is_refused_and_changes_nothing() {
    let broker = Broker::start();
    let submit =
        |text: &str| broker.shaper().call_with(&["submit", "--output", "json", "-"], text.as_bytes());
    let first = submit(GOOD);
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = (broker.tasks(), broker.nodes());
    let changed = |from: &str, to: &str| {
        assert!(GOOD.contains(from));
        GOOD.replacen(from, to, 1)
    };
    let huge = changed("/bin/true", &"x".repeat(2 << 20));
    let bad: [(&str, String, &str); 16] = [
        ("an unknown field", changed("\"priority\"", "\"colour\": 1, \"priority\""), "colour"),
        ("a missing field", changed("\"cpu_cores\": 0.5, ", ""), "cpu_cores"),
        ("negative cores", changed("\"cpu_cores\": 0.5", "\"cpu_cores\": -1"), "-1"),
        ("no cores", changed("\"cpu_cores\": 0.5", "\"cpu_cores\": 0"), "cpu_cores"),
        ("cores that are not a number", changed("\"cpu_cores\": 0.5", "\"cpu_cores\": .nan"), "cpu_cores"),
        ("endless cores", changed("\"cpu_cores\": 0.5", "\"cpu_cores\": 1e400"), "cpu_cores"),
        ("an urgent task", changed("\"low\"", "\"urgent\""), "urgent"),
        ("2 MiB", huge, "1 MiB"),
        ("an alias bomb", alias_bomb(), "lias"),
        ("a field twice", changed("\"cwd\": \"/\"", "\"cwd\": \"/\", \"cwd\": \"/tmp\""), "cwd"),
        ("a path as id", changed("\"t\"", "\"../../x\""), "../../x"),
        ("a taken id", changed("0.5", "0.6"), "taken by a task of yours with another spec"),
        ("no document", String::new(), "stdin"),
        ("no JSON", "{".into(), "stdin"),
        ("a list", "[1, 2]".into(), "stdin"),
        ("no text", "\u{0}\u{1}".into(), "stdin"),
    ];
    for (what, text, word) in &bad {
        let answer = submit(text);
        let said = &answer.stderr;
        assert_eq!(answer.code, REFUSED, "{what}: {said}");
        assert!(said.contains(word) && !said.contains("panicked"), "{what}: {said:.2000}");
        assert!(said.len() < 4000, "{what}: {} bytes were said", said.len());
    }
    assert_eq!((broker.tasks(), broker.nodes()), before);

    let again = submit(GOOD);
    assert_eq!((again.code, &again.stdout), (0, &first.stdout), "{}", again.stderr);
    assert_eq!((broker.tasks(), broker.nodes()), before);
}

#[test]
fn a_policy_that_is_wrong_is_refused_and_changes_nothing() {
    let broker = Broker::start();
    let apply = |text: &str| broker.shaper().call_with(&["apply", "-f", "-"], text.as_bytes());
    assert_eq!(apply("{policy_name: p, priority: high}").code, 0);
    let before = broker.shaper().ok(&["get", "policies", "--output", "json"]);
    for (text, word) in [
        ("{policy_name: p, priority: urgent}", "urgent"),
        ("{policy_name: p}", "priority"),
        ("{policy_name: p, priority: high, behavior: {eviction_threshold: 1.5}}", "eviction_threshold"),
        ("{policy_name: p, priority: high, behavior: {eviction_threshold: -0.5}}", "eviction_threshold"),
        ("{policy_name: ../p, priority: high}", "../p"),
        ("{policy_name: p, priority: high, colour: red}", "colour"),
    ] {
        let answer = apply(text);
        assert_eq!(answer.code, REFUSED, "{text}: {}", answer.stderr);
        assert!(answer.stderr.contains(word), "{text}: {}", answer.stderr);
    }
    assert_eq!(broker.shaper().ok(&["get", "policies", "--output", "json"]), before);
}

#[test]
fn what_two_runs_used_is_a_profile_for_the_third() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi"]);
    let load = cluster.path().join("test-load").display().to_string();
    for id in ["first", "second"] {
        let spin = format!("timeout 2 {load} spin; exit 0");
        let mut spec: serde_json::Value =
            serde_json::from_str(&cluster.spec(id, 0.2, "medium", Load::Spin)).unwrap();
        spec["command"] = serde_json::json!(["/bin/sh", "-c", spin]);
        spec["name"] = "job".into();
        spec["limits"] = serde_json::json!({"cpu_cores": 0.2});
        let answer =
            cluster.broker.shaper().call_with(&["submit", "--wait", "-"], spec.to_string().as_bytes());
        assert_eq!(answer.code, 0, "{}", answer.stderr);
    }
    let answer = cluster.broker.shaper().call(&["profile", "get", "job"]);
    assert_eq!(answer.code, 0, "{}", answer.stderr);
    assert!(answer.stderr.contains("2 executions of job"), "{}", answer.stderr);
    let profile = document::task("profile", answer.stdout.clone().into_bytes()).unwrap().profile;
    assert_eq!(profile.task_id.as_str(), "job");
    let cores = profile.demand.cpu.0 as f64 / 1000.0;
    // Its limit and what it wanted beyond it: it was stopped most of the time. Less where this machine is busy.
    assert!((0.1..=0.5).contains(&cores), "{}", answer.stdout);
    let seconds = profile.estimated_runtime_seconds.unwrap();
    assert!((2..=5).contains(&seconds), "{}", answer.stdout);
    assert!(profile.demand.memory.0 < 1 << 30, "{}", answer.stdout);

    let third = ["submit", "--wait", "--user", "65534:65534", "-", "--", "/bin/sh", "-c", "exit 4"];
    let third = cluster.broker.shaper().call_with(&third, answer.stdout.as_bytes());
    assert_eq!(third.code, 4, "{}", third.stderr);
    let unknown = cluster.broker.shaper().refused(&["profile", "get", "no-such-job"]);
    assert!(unknown.contains("no-such-job"), "{unknown}");
}
