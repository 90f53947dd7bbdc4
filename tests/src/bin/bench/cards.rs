//! What it costs to look at GPU cards each second. There is none on this machine: what the library of the tests takes is in
//! the figures, and what NVIDIA's takes is not.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use shaper_tests::{
    agent::{Agent, Options},
    cards::FakeCards,
    cgroup::TestCgroup,
    process::Children,
    time::{Window, happens},
};

use crate::{
    Plan,
    report::{Report, median},
    say,
};

const CARDS: u32 = 8;
const PROCESSES: u32 = 64;
/// Percent of a core.
const CPU_GOAL: f64 = 0.1;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    say(&format!("{CARDS} cards with {PROCESSES} processes each"));
    let (group, other) = (TestCgroup::new(), TestCgroup::new());
    let mut lines = FakeCards::line(CARDS);
    let mut sleepers = Children(Vec::new());
    for card in 0..CARDS {
        // The agent without cards has as many processes in its tasks.
        for (of, is_on_card) in [(&group, true), (&other, false)] {
            let below = of.make_child(&card.to_string());
            for _ in 0..PROCESSES {
                let child = Command::new("/bin/sleep").arg("3600").stdin(Stdio::null()).spawn();
                let child = child.context("cannot start sleep")?;
                let pid = child.id();
                sleepers.0.push(child);
                fs::write(below.join("cgroup.procs"), pid.to_string()).context("cannot move a process")?;
                if is_on_card {
                    lines.push(format!("process card=GPU-{card} pid={pid} memory={}", 1u64 << 30));
                }
            }
        }
    }
    let cards = FakeCards::new(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    let with = Options::default().with_cards(&cards).start();
    let without = Options::default().with(&["--nvml", "off"]).start();
    let found = happens(|| with.shaper().top().gpus.len() == CARDS as usize);
    anyhow::ensure!(found, "the agent has not found the cards");
    for card in 0..CARDS {
        let (id, number) = (format!("bench-{card}"), card.to_string());
        with.adopt(&id, &group.path().join(&number), &["--cards", &number, "--gpu-memory", "70Gi"]);
        without.adopt(&id, &other.path().join(&number), &[]);
    }
    let seen = happens(|| {
        with.shaper().usage_of("bench-7").gpu_memory.first().is_some_and(|it| it.processes == PROCESSES)
    });
    anyhow::ensure!(seen, "the agent does not see what the processes use");
    let (mut asking, mut more) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let before = (thread_ns(&with, Some("gpu"))?, thread_ns(&with, None)?, thread_ns(&without, None)?);
        let window = Window::pass(plan.long_window);
        let after = (thread_ns(&with, Some("gpu"))?, thread_ns(&with, None)?, thread_ns(&without, None)?);
        let percent = |after: u64, before: u64| (after - before) as f64 / 1e7 / window.seconds();
        asking.push(percent(after.0, before.0));
        more.push(percent(after.1, before.1) - percent(after.2, before.2));
    }
    report.at_most(
        CPU_GOAL,
        "GPU: CPU of the thread that asks, 8 cards, 64 processes each",
        median(&asking),
        "% core",
    );
    report.at_most(CPU_GOAL, "GPU: CPU of the agent, more than without cards", median(&more), "% core");
    Ok(())
}

/// CPU time of an agent's threads, or of those of one name.
fn thread_ns(agent: &Agent, name: Option<&str>) -> Result<u64> {
    let tasks = format!("/proc/{}/task", agent.pid());
    let mut sum = 0;
    for thread in fs::read_dir(&tasks).with_context(|| format!("cannot list {tasks}"))? {
        let thread = thread.with_context(|| format!("cannot list {tasks}"))?.path();
        let read = |file: &str| fs::read_to_string(Path::new(&thread).join(file));
        // One that has ended meanwhile has no files.
        let (Ok(is), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
        if name.is_none_or(|name| is.trim() == name) {
            sum += times.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}
