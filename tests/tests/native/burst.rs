//! CPU time that is lent, and that it is taken back whatever becomes of the agent.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use shaper_tests::{
    agent::{Agent, Options},
    burst::Burster,
    time::{Window, eventually, happens},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_task_that_has_rested_is_lent_something_and_its_new_limit_ends_that() {
    let agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(4 * SECOND);
    burster.wait_for_loan();
    eventually("the snapshot says so", || burster.loans(&agent) > 0);
    let pool = agent.shaper().top().cpu_pool.expect("this node lends");
    let (count, p50, p99) = (pool.latency.count, pool.latency.p50_ns / 1000, pool.latency.p99_ns / 1000);
    println!("{count} loans, from the warning to the quota read back: p50 {p50} µs, p99 {p99} µs");
    assert!(pool.lent <= pool.size && pool.has_warden && pool.latency.count > 0, "{pool:?}");
    agent.shaper().set("burster", &["--cpu", "0.2"]);
    let quota = burster.quota();
    assert!(quota <= 20_000, "{quota}");
}

#[test]
fn a_hog_that_has_not_rested_is_lent_nothing() {
    let agent = Agent::start();
    agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    eventually("it was warned of", || agent.shaper().usage_of("hog").quota_warnings > 20);
    let usage = agent.shaper().usage_of("hog");
    assert_eq!(usage.cpu.loans, 0, "{usage:?}");
}

#[test]
fn what_is_used_on_both_sides_of_a_periods_end_is_not_one_use() {
    const TIMES: u64 = 20;
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let log = agent.directory().join("log");
    File::create(&log).and_then(|log| log.set_permissions(Permissions::from_mode(0o666))).unwrap();
    let path = log.display().to_string();
    // It is warned of 42 ms in a period. There is 30 on each side.
    agent.run("task", &["--cpu", "0.5"], &["straddle", &path, "60", &TIMES.to_string()]);
    let noted = |what: &str| fs::read_to_string(&log).is_ok_and(|log| log.contains(what));
    let warnings = || agent.shaper().usage_of("task").quota_warnings;
    eventually("it knows when its periods end", || noted("found"));
    Window::pass(2 * SECOND);
    let before = warnings();
    assert!(before > 0, "it was never warned of");
    eventually("it did", || noted("did"));
    Window::pass(2 * SECOND);
    let after = warnings();
    // Other work of this machine may delay one or the other.
    assert!(after - before <= TIMES / 5, "{} warnings of {TIMES}", after - before);
}

#[test]
fn an_agent_that_lends_nothing_has_no_warden() {
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(3 * SECOND);
    eventually("it was warned of", || agent.shaper().usage_of("burster").quota_warnings > 10);
    assert_eq!((burster.loans(&agent), burster.quota()), (0, burster.grant));
    assert!(agent.shaper().top().cpu_pool.is_none());
    assert!(!agent.cgroup_root().join("warden").exists());
}

#[test]
fn what_is_lent_is_taken_back_when_the_agent_is_killed_and_a_new_one_begins_anew() {
    let mut agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    let warden = agent.warden();
    burster.begin_after(6 * SECOND);
    burster.wait_for_loan();
    agent.kill9();
    eventually("what was lent is taken back", || burster.quota() == burster.grant);
    warden.wait_for_end();
    agent.restart();
    assert_eq!(burster.quota(), burster.grant);
    assert_ne!(agent.warden().pid(), warden.pid());
}

#[test]
fn what_is_lent_is_taken_back_while_the_agent_is_stopped() {
    let agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(8 * SECOND);
    Burster::outlives(|| burster.quota(), burster.grant, || agent.freeze(true), || agent.freeze(false));
    assert_eq!(burster.quota(), burster.grant);
    agent.freeze(false);
    // It goes on, and knows what is in force: nothing is lent that it has not written.
    eventually("it goes on", || agent.shaper().top().cpu_pool.is_some_and(|pool| pool.has_warden));
    let same = happens(|| burster.quota() <= burster.grant);
    assert!(same, "{}", burster.quota());
}

#[test]
fn a_warden_that_is_killed_is_followed_by_another_and_release_all_ends_it() {
    let agent = Agent::start();
    Burster::start(&agent, "burster", 300, 1);
    let warden = agent.warden();
    warden.kill();
    warden.wait_for_end();
    let next = agent.warden();
    assert_ne!(next.pid(), warden.pid());
    agent.shaper().ok(&["release", "--all"]);
    next.wait_for_end();
    assert!(!agent.cgroup_root().exists());
}
