//! A task that is idle until it is told to take all it can get, and what it is lent then.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    agent::Agent,
    cgroup::{cpu_quota, cpu_time},
    time::{Window, eventually, monotonic_ns},
};

/// Such a task.
pub struct Burster {
    id: String,
    pid: u32,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its limit as a quota, µs in a period.
    pub grant: u64,
    trigger: PathBuf,
}

impl Burster {
    /// Starts it with a limit of so many thousandths of a core; it is to use so many CPUs.
    #[track_caller]
    pub fn start(agent: &Agent<'_>, id: &str, milli: u64, threads: usize) -> Burster {
        let trigger = agent.directory().join(format!("{id}-begins"));
        let (path, threads) = (trigger.display().to_string(), threads.to_string());
        let task = agent.run(id, &["--cpu", &format!("{milli}m")], &["once", &path, "spin", &threads]);
        let pid = task.pid.expect("it runs");
        let burster = Burster { id: id.into(), pid, cgroup: task.cgroup.into(), grant: milli * 100, trigger };
        assert_eq!(burster.quota(), burster.grant);
        burster
    }

    /// Rests for so long, in which it earns what it may be lent; then begins.
    pub fn begin_after(&self, rest: Duration) {
        Window::pass(rest);
        fs::write(&self.trigger, "").expect("the folder is ours");
    }

    /// The quota that is in force.
    pub fn quota(&self) -> u64 {
        cpu_quota(self.pid)
    }

    /// How often it was lent something.
    pub fn loans(&self, agent: &Agent<'_>) -> u64 {
        agent.shaper().usage_of(&self.id).cpu.loans
    }

    /// Waits until it is lent something.
    #[track_caller]
    pub fn wait_for_loan(&self) {
        eventually("it is lent something", || self.quota() > self.grant);
    }

    /// Has the agent do something (die, stop) at a moment in which something is lent, and returns how long the loan lasts then.
    #[track_caller]
    pub fn outlives(
        quota: impl Fn() -> u64,
        grant: u64,
        mut end: impl FnMut(),
        mut undo: impl FnMut(),
    ) -> Duration {
        loop {
            eventually("it is lent something", || quota() > grant);
            let from = monotonic_ns();
            end();
            // It may have been taken back by the agent just before.
            if quota() > grant {
                eventually("what was lent is taken back", || quota() <= grant);
                return Duration::from_nanos(monotonic_ns() - from);
            }
            undo();
        }
    }

    /// The largest mean over any 10 s, in cores, while `time` passes.
    pub fn worst_mean(&self, time: Duration) -> f64 {
        let mut means = Means::default();
        let end = monotonic_ns() + time.as_nanos() as u64;
        while monotonic_ns() < end {
            means.look(&self.cgroup);
            Window::pass(Duration::from_millis(20));
        }
        means.worst()
    }
}

/// CPU time of a cgroup, looked at again and again.
#[derive(Default)]
pub struct Means(Vec<(u64, Duration)>);

impl Means {
    /// Looks at it.
    pub fn look(&mut self, cgroup: impl AsRef<Path>) {
        let before = monotonic_ns();
        let used = cpu_time(cgroup);
        // Between two readings of the clock; one that was held up says nothing.
        if monotonic_ns() - before < 5_000_000 {
            self.0.push((before, used));
        }
    }

    /// The largest mean over any 10 s, in cores.
    pub fn worst(&self) -> f64 {
        const WINDOW_NS: u64 = 10_000_000_000;
        let mut worst: f64 = 0.0;
        for (index, (from, used_before)) in self.0.iter().enumerate() {
            let Some((to, used)) = self.0[index..].iter().find(|(at, _)| at - from >= WINDOW_NS) else {
                break;
            };
            worst = worst.max((*used - *used_before).as_nanos() as f64 / (to - from) as f64);
        }
        worst
    }
}
