//! What users write, and what they are told when it is wrong: nobody is asked, and the code is 2.

use std::process::Stdio;

use crate::host::{Host, texts};

const PROFILE: &str = r#"{
  "task_id": "etl-1",
  "resource_demand": {"cpu_cores": 1.5, "memory_gb": 2},
  "priority": "high"
}
"#;

/// Submits a document, and expects what is said to begin with this, after the name of the file.
fn refused(text: impl AsRef<[u8]>, said: &str) {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("profile.json", text);
    let output = host.shaper(&["submit", &file, "--", "sleep", "1"]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stdout, code), ("", Some(2)), "{stderr}");
    assert!(stderr.starts_with(&format!("{file}:{said}")), "{stderr}");
    assert!(stderr.contains("\nhelp: ") && stderr.ends_with('\n'), "{stderr}");
    assert_eq!(host.cluster.calls(), []);
}

#[test]
fn an_unknown_field() {
    refused(PROFILE.replace("cpu_cores", "cpu_core"), "3:23: resource_demand.cpu_core: ");
}

#[test]
fn a_missing_field() {
    refused(PROFILE.replace(", \"memory_gb\": 2", ""), "3:3: resource_demand.memory_gb: is missing");
}

#[test]
fn negative_cores() {
    refused(PROFILE.replace("1.5", "-1.5"), "3:36: resource_demand.cpu_cores: must be a number of cores");
}

#[test]
fn an_unknown_priority() {
    refused(PROFILE.replace("high", "urgent"), "4:15: priority: must be one of high, medium, low");
}

#[test]
fn two_megabytes() {
    refused("[".repeat(2 << 20), "1:1: the document is longer than 1 MiB");
    refused(
        format!("{{\"task_id\": \"{}\"}}", "x".repeat(2 << 20)),
        "1:1: the document is longer than 1 MiB",
    );
}

#[test]
fn an_alias_bomb() {
    let mut bomb = "a0: &a0 [x, x]\n".to_owned();
    for level in 1..40 {
        bomb += &format!("a{level}: &a{level} [*a{0}, *a{0}]\n", level - 1);
    }
    refused(bomb, "1:5: anchors (`&`) and aliases (`*`) are not taken");
}

#[test]
fn a_field_that_is_there_twice() {
    let text = PROFILE.replace("\"priority\"", "\"task_id\": \"b\",\n  \"priority\"");
    refused(text, "4:3: task_id: is there twice; first in line 2");
}

#[test]
fn a_task_id_that_leads_elsewhere() {
    refused(PROFILE.replace("etl-1", "../../x"), "2:14: task_id: `../../x` is not a task id");
}

#[test]
fn what_is_no_text() {
    refused(b"task_id: \xff", "1:10: the document is not UTF-8");
    refused("", "1:1: the document is empty");
}

#[test]
fn the_fault_is_shown_as_compilers_do() {
    let host = Host::new();
    let file = host.file("p.json", PROFILE.replace("\"high\"", "\"hihg\""));
    let said = format!(
        "{file}:4:15: priority: must be one of high, medium, low, and is the text `hihg`
  |
4 |   \"priority\": \"hihg\"
  |               ^^^^^^
help: did you mean `high`?
"
    );
    assert_eq!(texts(&host.shaper(&["submit", &file, "--", "x"])), ("", said.as_str(), Some(2)));
}

#[test]
fn a_profile_without_a_command() {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("profile.json", PROFILE);
    let output = host.shaper(&["submit", &file]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stdout, code), ("", Some(2)));
    let said =
        format!("shaper: `{file}` has no command: add one after `--`, as in `shaper submit {file} -- ");
    assert!(stderr.starts_with(&said), "{stderr}");
    assert_eq!(host.cluster.calls(), []);
}

#[test]
fn a_policy_that_is_wrong_keeps_the_others_back() {
    let host = Host::new();
    let _broker = host.start_broker();
    let good = host.file("good.yaml", "policy_name: a\npriority: high\n");
    let bad = host.file("bad.yaml", "policy_name: b\npriority: high\nbehaviour: {}\n");
    let output = host.shaper(&["apply", "-f", &good, &bad]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stdout, code), ("", Some(2)));
    assert!(stderr.starts_with(&format!("{bad}:3:1: behaviour: ")), "{stderr}");
    assert!(stderr.contains("help: did you mean `behavior`?"), "{stderr}");
    assert_eq!(host.cluster.calls(), []);
}

#[test]
fn a_document_that_cannot_be_read() {
    let host = Host::new();
    let said = "shaper: cannot read `/nowhere/p.json`: No such file or directory (os error 2)\n";
    assert_eq!(texts(&host.shaper(&["submit", "/nowhere/p.json", "--", "x"])), ("", said, Some(2)));
    // It has no end, and only its beginning is read.
    let output = host.shaper(&["submit", "/dev/zero", "--", "x"]);
    assert!(texts(&output).1.contains("longer than 1 MiB"), "{output:?}");
    let output = host.command(&["submit", "-", "--", "x"]).stdin(Stdio::null()).output().unwrap();
    assert!(texts(&output).1.starts_with("stdin:1:1: the document is empty"), "{output:?}");
}

#[test]
fn wrong_usage_of_the_broker_is_told_before_anybody_is_asked() {
    let host = Host::new();
    let _broker = host.start_broker();
    let file = host.file("p.json", PROFILE);
    for (args, said) in [
        (&["submit"][..], "<FILE|->"),
        (&["submit", &file, "--name", "a/b", "--", "x"], "use 1 to 63 characters"),
        (&["submit", &file, "--retries", "9999", "--", "x"], "9999"),
        (&["submit", &file, "--wait", "-d", "--", "x"], "cannot be used with"),
        (
            &["submit", &file, "--user", "no-such-user-here", "--", "x"],
            "there is no user `no-such-user-here`",
        ),
        (&["apply"], "--file <FILE|->..."),
        (&["explain", "../x"], "`../x` is not a valid task id"),
        (&["profile", "get"], "<NAME>"),
        (&["get", "nodes", "--broker", "http://localhost"], "both sides show a certificate"),
        (&["get", "tasks", "--watch", "--broker", ""], "--watch needs a broker"),
    ] {
        let output = host.shaper(args);
        let (stdout, stderr, code) = texts(&output);
        assert_eq!((stdout, code), ("", Some(2)), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
    assert_eq!(host.cluster.calls(), []);
}
