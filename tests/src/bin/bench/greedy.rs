//! What bounds loans: tasks that take all they can get, and rest in between. And what becomes of loans whose agent is gone.

use std::time::Duration;

use anyhow::{Context, Result};
use shaper_tests::{
    agent::Agent,
    burst::{Burster, Means},
    cgroup::cpu_time,
    time::{Window, monotonic_ns},
};

use crate::{
    Plan,
    report::Report,
    service::beyond,
    site::{ALL_CPUS, CPUS, Site},
};

/// All that the node lends: less than what the tasks could be lent.
const POOL: f64 = 0.4;
/// Limit of each task, and the same in a period, µs.
const CEILINGS: [f64; 2] = [0.3, 0.45];
const PROMISED: f64 = 0.5;
const LOOK: Duration = Duration::from_millis(10);
/// Long enough to be lent something.
const RESTED: Duration = Duration::from_secs(4);
/// Milliseconds.
const BACK_GOAL: f64 = 2000.0;

fn grant_us(cores: f64) -> u64 {
    (cores * 100_000.0) as u64
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    bounds(plan, report)?;
    let mut agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(RESTED);
    burster.wait_for_loan();
    let from = monotonic_ns();
    agent.kill9();
    let back = || burster.quota() <= burster.grant;
    let is_back = shaper_tests::time::happens(back);
    let took = (monotonic_ns() - from) as f64 / 1e6;
    is_back.then_some(()).context("what was lent is not taken back")?;
    report.at_most(BACK_GOAL, "lent quota is back after kill -9 of the agent", took, "ms");
    drop(agent);

    let agent = Agent::start();
    let burster = Burster::start(&agent, "burster", 300, 2);
    burster.begin_after(RESTED);
    let took =
        Burster::outlives(|| burster.quota(), burster.grant, || agent.freeze(true), || agent.freeze(false));
    agent.freeze(false);
    report.at_most(
        BACK_GOAL,
        "lent quota is back after SIGSTOP of the agent",
        took.as_secs_f64() * 1e3,
        "ms",
    );
    Ok(())
}

fn bounds(plan: Plan, report: &mut Report) -> Result<()> {
    let site = Site::start(&["--cpu-burst-pool", &POOL.to_string()])?;
    let neighbour = site.run("neighbour", &["--cpu", &PROMISED.to_string()], &["hogs", ALL_CPUS]);
    let start = |cores: &f64| {
        let id = format!("greedy-{}", grant_us(*cores));
        let task = site.run(&id, &["--cpu", &cores.to_string()], &["greed", &(CPUS as usize).to_string()]);
        (*cores, id, task.cgroup, Means::default())
    };
    let mut greedy: Vec<_> = CEILINGS.iter().map(start).collect();
    let (mut most, mut excess): (f64, f64) = (0.0, 0.0);
    let before = cpu_time(&neighbour.cgroup);
    let from = monotonic_ns();
    let mut looks = 0;
    while monotonic_ns() - from < plan.greed.as_nanos() as u64 {
        let mut lent = beyond(&neighbour.cgroup, grant_us(PROMISED))?;
        for (cores, _, cgroup, means) in &mut greedy {
            means.look(&*cgroup);
            lent += beyond(cgroup, grant_us(*cores))?;
        }
        most = most.max(lent);
        if looks % 100 == 0 {
            let pool = site.pool()?;
            excess = excess.max((pool.lent.0 as f64 - pool.size.0 as f64) / 1000.0);
        }
        looks += 1;
        Window::pass(LOOK);
    }
    let window = Window { from, to: monotonic_ns() };
    let share = (cpu_time(&neighbour.cgroup) - before).as_secs_f64() / window.seconds();
    for (cores, id, _, means) in &greedy {
        let loans = site.agent.shaper().usage_of(id).cpu.loans as f64;
        report.at_least(1.0, &format!("greedy, limit {cores}: loans"), loans, "");
        report.at_most(
            1.01,
            &format!("greedy, limit {cores}: worst mean over 10 s / ceiling"),
            means.worst() / cores,
            "",
        );
    }
    report.within(3.0, "greedy: the neighbour's share off its grant", (share / PROMISED - 1.0) * 100.0, "%");
    report.at_most(POOL, "greedy: most lent to all, by the cgroups' files", most, "cores");
    report.at_most(0.0, "greedy: most lent beyond the pool, by the agent", excess, "cores");
    Ok(())
}
