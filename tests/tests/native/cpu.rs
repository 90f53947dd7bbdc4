//! CPU: measured and limited.

use std::time::Duration;

use shaper_core::task::TaskStatus;
use shaper_tests::{
    agent::Agent,
    cgroup::{TestCgroup, cpu_time},
    shaper::in_force,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_hog_gets_its_limit_and_a_change_is_in_force_within_a_second() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    assert_eq!(in_force(&task, "cpu").1, "0.5 cores");

    agent.assert_cores("hog", 0.5, 4 * SECOND);

    let task = agent.shaper().set("hog", &["--cpu", "0.8"]);
    assert_eq!(in_force(&task, "cpu").1, "0.8 cores");
    Window::pass(SECOND);
    agent.assert_cores("hog", 0.8, 3 * SECOND);
}

/// Both count from the birth of the cgroup. The kernel's count is waited for, so that what runs while it is
/// read, which may be a whole stretch at the limit, stays within the 2 %.
#[track_caller]
fn assert_the_counts_agree(agent: &Agent, task: &TaskStatus) {
    eventually("the hog has used enough", || cpu_time(&task.cgroup) > 5 * SECOND / 2);
    let mut least_missing = f64::MAX;
    for _ in 0..10 {
        // One reading of the agent's lies between two of the kernel's.
        let before = cpu_time(&task.cgroup).as_secs_f64();
        let counted = agent.shaper().get("hog").usage.cpu_time_ns as f64 / 1e9;
        let after = cpu_time(&task.cgroup).as_secs_f64();
        let range = before * 0.98..=after * 1.02;
        assert!(range.contains(&counted), "the agent counts {counted} s, the kernel {before} to {after} s");
        least_missing = least_missing.min(1.0 - counted / before);
        Window::pass(SECOND / 10);
    }
    // What is missing from every reading is not late, but lost.
    assert!(least_missing < 0.002, "{:.2} % of the CPU time is lost", least_missing * 100.0);
}

#[test]
fn the_agents_count_of_cpu_time_is_the_kernels() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    assert_the_counts_agree(&agent, &task);
}

/// Some kernels do not report every switch, the more the more there are (docs/kernel-support.md).
#[test]
fn the_agents_count_of_cpu_time_is_the_kernels_beside_a_storm_of_forks() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let storm = group.make_child("storm");
    let mut storms: Vec<_> = (0..3).map(|_| TestCgroup::run(&storm, None, &["fork"])).collect();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    assert_the_counts_agree(&agent, &task);
    for storm in &mut storms {
        assert!(storm.try_wait().unwrap().is_none(), "the storm is over");
        storm.kill().and_then(|()| storm.wait()).unwrap();
    }
}
