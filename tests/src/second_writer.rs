//! Somebody who turns the knobs that shaper holds, and what has to come of it on any hierarchy.

use std::process;

use shaper_core::{
    ledger::{Actor, Entry, Kind},
    limits::Limit,
    task::TaskStatus,
    units::Millicores,
};

use crate::{
    agent::{Agent, Options},
    cgroup::{cpu_group, cpu_quota, write},
    shaper::Shaper,
    time::eventually,
};

/// Writes the CPU quota of a task's, as anybody may who is root.
pub fn write_cpu_quota(task: &TaskStatus, quota: u64) {
    let pid = task.pid.expect("it runs");
    match cpu_group(pid) {
        (group, true) => write(group, "cpu.cfs_quota_us", &quota.to_string()),
        (group, false) => write(group, "cpu.max", &format!("{quota} 100000")),
    }
}

/// What the ledger has of others.
pub fn of_others(shaper: &Shaper, id: &str) -> Vec<Entry> {
    shaper.ledger(id).into_iter().filter(|entry| entry.kind == Kind::SecondWriter).collect()
}

fn agent_that(policy: &str) -> (Agent<'static>, TaskStatus) {
    let agent = Options::default().with(&["--second-writer", policy, "--cpu-burst-pool", "off"]).start();
    let task = agent.run("task", &["--cpu", "0.5"], &["tick", "6000", "0"]);
    (agent, task)
}

/// What was decided stands, and the ledger says who wanted something else.
pub fn assert_held() {
    let (agent, task) = agent_that("hold");
    let pid = task.pid.expect("it runs");
    write_cpu_quota(&task, 60_000);
    eventually("it is turned back", || cpu_quota(pid) == 50_000);
    eventually("it is in the ledger", || agent.shaper().ledger("task").len() == 3);
    let entries = agent.shaper().ledger("task");
    let Actor::Process { pid: writer, name } = &entries[1].cause.actor else {
        panic!("{:?}", entries[1]);
    };
    assert_eq!((entries[1].kind, *writer), (Kind::SecondWriter, process::id()));
    let comm = std::fs::read_to_string("/proc/self/comm").expect("this is a process");
    assert_eq!(name, comm.trim_end());
    let change = &entries[1].changes[0];
    assert_eq!((change.before.as_str(), change.after.as_str()), ("0.5 cores", "0.6 cores (burst 50000 µs)"));
    assert_eq!((entries[2].kind, entries[2].changes[0].after.as_str()), (Kind::Standing, "0.5 cores"));
    assert_eq!(agent.shaper().get("task").notes, Vec::<String>::new());
    // What is written and changes nothing is nobody's news.
    write_cpu_quota(&task, 50_000);
    agent.shaper().set("task", &["--cpu", "0.55"]);
    assert_eq!(of_others(&agent.shaper(), "task").len(), 1);
    assert_eq!(agent.shaper().get("task").limits.cpu, Limit::At(Millicores(550)));

    // Two who insist do not keep each other busy: it says so instead.
    let insists = || {
        write_cpu_quota(&task, 60_000);
        agent.shaper().get("task").notes.iter().any(|note| note.contains("was turned back so often"))
    };
    eventually("it gives up for a while", insists);
    assert_eq!(cpu_quota(pid), 60_000);
    assert!(agent.shaper().ledger("task").len() < 60);
    // Whoever asks is heard all the same.
    agent.shaper().set("task", &["--cpu", "0.7"]);
    assert_eq!(cpu_quota(pid), 70_000);
    assert_eq!(agent.shaper().get("task").notes, Vec::<String>::new());
}

/// What others wrote is theirs, until somebody asks shaper again.
pub fn assert_yielded() {
    let (mut agent, task) = agent_that("yield");
    let pid = task.pid.expect("it runs");
    let unlimited = |agent: &Agent<'_>| agent.shaper().get("task").limits.cpu == Limit::Unlimited;
    write_cpu_quota(&task, 60_000);
    eventually("it is left to them", || unlimited(&agent));
    assert_eq!(of_others(&agent.shaper(), "task").len(), 1);
    let notes = agent.shaper().get("task").notes;
    assert!(notes.iter().any(|note| note.starts_with("cpu was left to ")), "{notes:?}");
    agent.kill9();
    agent.restart();
    assert_eq!(cpu_quota(pid), 60_000);
    assert!(unlimited(&agent));
    write_cpu_quota(&task, 65_000);
    agent.shaper().set("task", &["--cpu", "0.3"]);
    assert_eq!(cpu_quota(pid), 30_000);
    assert_eq!(of_others(&agent.shaper(), "task").len(), 1, "what was theirs is not told of");
    let released = agent.shaper().ok(&["release", "task"]);
    assert!(released.contains("cpu is `0.65 cores (burst 50000 µs)`"), "{released}");
}

/// What others wrote is in force, and the status says so.
pub fn assert_reported() {
    let (agent, task) = agent_that("report");
    let pid = task.pid.expect("it runs");
    write_cpu_quota(&task, 60_000);
    let notes = || agent.shaper().get("task").notes;
    let told = |notes: &[String]| {
        notes.iter().any(|note| note.starts_with("cpu is `0.6 cores (burst 50000 µs)` where `0.5 cores` was"))
    };
    eventually("the status says so", || told(&notes()));
    assert_eq!(of_others(&agent.shaper(), "task").len(), 1);
    assert_eq!(cpu_quota(pid), 60_000);
    write_cpu_quota(&task, 50_000);
    eventually("the status does not say so any more", || notes().is_empty());
    write_cpu_quota(&task, 60_000);
    eventually("the status says so again", || told(&notes()));
    agent.shaper().set("task", &["--cpu", "0.7"]);
    assert_eq!((cpu_quota(pid), notes()), (70_000, Vec::new()));
}
