//! CPU time that is lent: the ceiling as a mean, what others were promised, and that it comes back.

use std::time::Duration;

use shaper_tests::{
    agent::Agent,
    burst::Burster,
    cgroup::{cpu_time, read},
    time::{Window, eventually, monotonic_ns},
};

use super::SECOND;

/// What is lent is back within this, whatever becomes of the agent: it is what the project promises.
const BACK: Duration = Duration::from_secs(2);

#[test]
fn what_is_lent_is_back_within_two_seconds_of_the_agents_death() {
    let mut agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    let warden = agent.warden();
    burster.begin_after(6 * SECOND);
    burster.wait_for_loan();
    let from = monotonic_ns();
    agent.kill9();
    eventually("what was lent is taken back", || burster.quota() == burster.grant);
    let took = Duration::from_nanos(monotonic_ns() - from);
    println!("lent quota is back {took:?} after kill -9; the warden has {}", read_memory(warden.pid()));
    assert!(took <= BACK, "{took:?}");
    warden.wait_for_end();

    agent.restart();
    assert_eq!(burster.quota(), burster.grant);
    agent.shaper().ok(&["release", "--all"]);
    assert!(!agent.cgroup_root().exists());
}

fn read_memory(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let of = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or("gone").to_owned();
    of("VmRSS")
}

#[test]
fn what_is_lent_is_back_within_two_seconds_of_the_agents_being_stopped() {
    let agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(8 * SECOND);
    let took =
        Burster::outlives(|| burster.quota(), burster.grant, || agent.freeze(true), || agent.freeze(false));
    println!(
        "lent quota is back {took:?} after SIGSTOP; the warden has {}",
        read_memory(agent.warden().pid())
    );
    agent.freeze(false);
    assert!(took <= BACK, "{took:?}");
}

#[test]
fn the_mean_over_any_ten_seconds_stays_within_the_ceiling() {
    let agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(10 * SECOND);
    let worst = burster.worst_mean(25 * SECOND);
    let loans = burster.loans(&agent);
    println!("at most {worst:.4} cores over any 10 s with a limit of 0.3, {loans} loans");
    assert!(loans > 0, "it was lent nothing");
    // A thousandth for what the clock and the count of CPU time differ by.
    assert!(worst <= 0.3 * 1.011, "{worst:.4} cores over 10 s");
    // It is held there, not far below.
    assert!(worst >= 0.3 * 0.95, "{worst:.4} cores over 10 s");
}

#[test]
fn loans_stay_within_the_pool_and_a_neighbour_keeps_what_it_has() {
    let agent = Agent::start();
    // On both CPUs, where by weight each has half: it depends on the quotas alone what they get.
    let neighbour = Burster::start(&agent, "neighbour", 1000, 2);
    neighbour.begin_after(Duration::ZERO);
    let burster = Burster::start(&agent, "burster", 400, 2);
    // Asked in both phases: asking takes CPU time as well.
    let mut most = 0;
    let mut cores = |begin: &dyn Fn()| {
        let before = cpu_time(&neighbour.cgroup);
        let from = monotonic_ns();
        begin();
        while monotonic_ns() - from < 8_000_000_000 {
            let pool = agent.shaper().top().cpu_pool.expect("this node lends");
            assert!(pool.lent <= pool.size, "{pool:?}");
            most = most.max(pool.lent.0);
            Window::pass(SECOND / 10);
        }
        (cpu_time(&neighbour.cgroup) - before).as_nanos() as f64 / (monotonic_ns() - from) as f64
    };
    let alone = cores(&|| {});
    let beside = cores(&|| burster.begin_after(Duration::ZERO));
    println!(
        "the neighbour has {beside:.3} cores beside the loans and {alone:.3} without, at most {most} m lent"
    );
    assert!(burster.loans(&agent) > 0, "it was lent nothing");
    assert!(beside >= 0.97 * alone, "{beside:.3} cores beside the loans, {alone:.3} without");
}

#[test]
fn a_raised_quota_keeps_the_kernels_own_burst_within_it() {
    let agent = Agent::start();
    let task = agent.run("task", &["--cpu", "0.5"], &["tick", "600", "0"]);
    assert_eq!(
        [read(&task.cgroup, "cpu.max"), read(&task.cgroup, "cpu.max.burst")],
        ["50000 100000", "50000"]
    );
}
