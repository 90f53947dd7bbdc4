//! What was done to tasks is written down: by whom, why, and what came of it.

use std::{fs, io::Write};

use shaper_core::ledger::{Actor, Entry, Kind, Outcome};
use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    time::eventually,
};

/// Kind, actor, reason, and knobs with what they were to hold.
fn told(entry: &Entry) -> (Kind, &Actor, &str, Vec<String>) {
    let changes = entry.changes.iter().map(|change| format!("{} {}", change.knob, change.after));
    (entry.kind, &entry.cause.actor, &entry.cause.reason, changes.collect())
}

#[test]
fn every_change_is_in_the_ledger_and_so_is_the_release() {
    let agent = Agent::start();
    agent.run("task", &["--cpu", "0.5", "--memory", "256Mi"], &["tick", "6000", "0"]);
    agent.shaper().set("task", &["--cpu", "0.7", "--net", "10mbit"]);
    // What is so already is not turned, and nothing is written down.
    agent.shaper().set("task", &["--cpu", "0.7"]);
    agent.shaper().refused(&["set", "task", "--memory", "4Ki"]);
    let other = agent.run("other", &["--cpu-weight", "50"], &["tick", "1", "0"]);
    assert_eq!(agent.shaper().wait("other"), 0);
    agent.shaper().ok(&["release", "task"]);

    let root = Actor::User(0);
    let names = |changes: &[&str]| changes.iter().map(|&change| change.to_owned()).collect::<Vec<_>>();
    let entries = agent.shaper().ledger("task");
    let expected = [
        (Kind::Standing, &root, "run", names(&["cpu 0.5 cores", "memory 256 MiB"])),
        (Kind::Standing, &root, "set", names(&["cpu 0.7 cores", "net_egress 10 Mbit/s"])),
        (Kind::Release, &root, "release", names(&["net_egress max", "memory max", "cpu max"])),
    ];
    assert_eq!(entries.iter().map(told).collect::<Vec<_>>(), expected);
    for entry in &entries {
        assert_eq!(entry.outcome, Outcome::Done);
        assert!(entry.changes.iter().all(|change| change.before != change.after), "{entry:?}");
    }
    // An ended task is there as long as it is remembered.
    assert_eq!(agent.shaper().ledger("other")[0].changes[0].knob, "cpu_weight");
    assert_eq!(agent.shaper().ledger("other")[0].execution, other.execution());
    assert!(
        agent.shaper().ok(&["ledger"]).contains("cpu: 0.5 cores → 0.7 cores; net_egress: max → 10 Mbit/s")
    );
    let wide = agent.shaper().ok(&["ledger", "task", "-o", "wide", "--since", "1h"]);
    assert!(wide.contains("standing") && wide.contains("release"), "{wide}");
}

#[test]
fn release_all_is_in_the_ledger_of_the_next_agent() {
    let mut agent = Agent::start();
    for id in ["one", "two"] {
        agent.run(id, &["--cpu", "0.5"], &["tick", "6000", "0"]);
    }
    agent.kill9();
    assert!(agent.release_offline().status.success());
    agent.restart();
    for id in ["one", "two"] {
        let entries = agent.shaper().ledger(id);
        let last = entries.last().unwrap();
        assert_eq!((last.kind, last.cause.reason.as_str()), (Kind::Release, "release --all"));
        assert_eq!((last.changes[0].after.as_str(), &last.outcome), ("max", &Outcome::Done));
    }
}

#[test]
fn others_see_what_was_done_to_their_own_tasks_only() {
    let agent = Options::default().with(&["--socket-group", &NOBODY.to_string()]).start();
    agent.run("mine", &["--cpu", "0.5"], &["tick", "6000", "0"]);
    let load = agent.load();
    agent.shaper_as(NOBODY).start("theirs", &["--cpu", "0.3"], &[&load, "tick", "6000", "0"]);
    assert_eq!(agent.shaper_as(NOBODY).ledger("theirs")[0].cause.actor, Actor::User(NOBODY));
    assert!(agent.shaper_as(NOBODY).ledger("mine").is_empty());
    assert!(!agent.shaper_as(NOBODY).ok(&["ledger"]).contains("mine"));
    assert_eq!(agent.shaper().ledger("theirs").len(), 1);
}

#[test]
fn an_end_that_was_torn_is_cut_off_and_told() {
    let mut agent = Agent::start();
    agent.run("task", &["--cpu", "0.5"], &["tick", "6000", "0"]);
    agent.kill9();
    let path = agent.state_dir().join("ledger/00000001");
    let whole = fs::metadata(&path).unwrap().len();
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let half = b"{\"number\":3,\"at\":17640";
    file.write_all(half).unwrap();
    agent.restart();
    let answer = agent.shaper().call(&["ledger", "task"]);
    assert!(answer.stdout.contains("cpu: max → 0.5 cores"), "{answer:?}");
    let told = format!("{} bytes were not whole and were cut off", half.len());
    assert!(answer.stderr.contains(&told), "{answer:?}");
    assert!(fs::metadata(&path).unwrap().len() > whole);
    agent.shaper().set("task", &["--cpu", "0.6"]);
    eventually("the change is told", || agent.shaper().ledger("task").len() == 2);
}
