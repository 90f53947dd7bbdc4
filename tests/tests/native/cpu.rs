//! CPU: measured and limited.

use std::{thread, time::Duration};

use shaper_tests::{
    agent::Agent,
    cgroup::{cpu_time, throttled_periods},
    shaper::in_force,
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
    thread::sleep(SECOND);
    agent.assert_cores("hog", 0.8, 3 * SECOND);
}

#[test]
fn the_agents_count_of_cpu_time_is_the_kernels() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    let pid = agent.shaper().get("hog").pid.expect("it runs");
    thread::sleep(3 * SECOND);
    for _ in 0..5 {
        // Both count from the birth of the cgroup; one reading of the agent's lies between two of the kernel's.
        let before = cpu_time(&task.cgroup).as_secs_f64();
        let counted = agent.shaper().get("hog").usage.cpu_time_ns as f64 / 1e9;
        let after = cpu_time(&task.cgroup).as_secs_f64();
        // Where other work keeps the hog from its limit, the agent's count was seen up to 9 % below the kernel's;
        // why is not known yet (docs/benchmarks.md). Undisturbed they are within 2 %.
        let (throttled, periods) = throttled_periods(pid);
        let part = if (throttled as f64) < 0.9 * periods as f64 { 0.10 } else { 0.02 };
        let range = before * (1.0 - part)..=after * (1.0 + part);
        assert!(range.contains(&counted), "the agent counts {counted} s, the kernel {before} to {after} s");
        thread::sleep(SECOND / 5);
    }
}
