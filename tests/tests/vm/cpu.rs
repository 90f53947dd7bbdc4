//! CPU time that is lent: the ceiling as a mean, what others were promised, and that it comes back.

use std::time::Duration;

use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
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

/// Cores that cgroups use over 10 s, for which limits are promises.
fn cores_over_ten_seconds(groups: &[&str]) -> Vec<f64> {
    // Readings that fall into one instant: this machine may be held up between them.
    let read = || loop {
        let before = monotonic_ns();
        let used: Vec<Duration> = groups.iter().map(cpu_time).collect();
        if monotonic_ns() - before < 5_000_000 {
            break (before, used);
        }
    };
    let (from, before) = read();
    Window::pass(10 * SECOND);
    let (to, after) = read();
    let used = after.iter().zip(before).map(|(after, before)| (*after - before).as_nanos() as f64);
    used.map(|used| used / (to - from) as f64).collect()
}

#[test]
fn a_hog_has_its_limit_within_two_percent_over_ten_seconds() {
    let agent = Agent::start();
    let task = agent.run("hog", &[], &["pinned", "1"]);
    for milli in [50, 300, 700] {
        agent.shaper().set("hog", &["--cpu", &format!("{milli}m")]);
        // What it may owe is paid by then.
        Window::pass(SECOND);
        let cores = cores_over_ten_seconds(&[&task.cgroup])[0];
        assert_close(&format!("cores at a limit of {milli}m"), cores, f64::from(milli) / 1000.0, 2.0);
    }
}

#[test]
fn hogs_divide_the_cpus_by_their_weights_within_three_percent() {
    let agent = Agent::start();
    let start = |id: &str, weight: &str| agent.run(id, &["--cpu-weight", weight], &["pinned", "0,1"]);
    let tasks = [start("more", "300"), start("less", "100")];
    Window::pass(SECOND);
    let cores = cores_over_ten_seconds(&[&tasks[0].cgroup, &tasks[1].cgroup]);
    let all: f64 = cores.iter().sum();
    assert_close("part of the weight 300", cores[0] / all, 0.75, 3.0);
    assert_close("part of the weight 100", cores[1] / all, 0.25, 3.0);
}

#[test]
fn a_quota_that_is_raised_or_lowered_takes_the_kernels_own_burst_along() {
    // What is lent is in the same file.
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let task = agent.run("task", &["--cpu", "0.5"], &["tick", "600", "0"]);
    let files = || [read(&task.cgroup, "cpu.max"), read(&task.cgroup, "cpu.max.burst")];
    assert_eq!(files(), ["50000 100000", "50000"]);
    agent.shaper().set("task", &["--cpu", "0.75"]);
    assert_eq!(files(), ["75000 100000", "75000"]);
    agent.shaper().set("task", &["--cpu", "0.25"]);
    assert_eq!(files(), ["25000 100000", "25000"]);
}
