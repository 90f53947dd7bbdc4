//! What a context switch costs where many cgroups are managed, and where many are active.

use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use shaper_common::abi::SLOTS_MAX;
use shaper_tests::cgroup::TestCgroup;

use crate::{
    Plan,
    child::Load,
    kernel::{Kernel, compare},
    peer::{EMPTY_SWITCH, Peer},
    report::{Report, median},
    rig, say,
};

const KNOWN: usize = 10_000;
const KNOWN_GOAL: f64 = 1.1;
const ACTIVE: usize = 1_000;
const ACTIVE_GOAL: f64 = 1.3;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let _clock = enable_stats(Stats::RunTime).context("cannot switch the kernel's clock for programs on")?;
    let empty = Peer::attach(&[EMPTY_SWITCH])?;
    let empty = (empty.program(EMPTY_SWITCH)?, empty);
    known(plan, report, empty.0)?;
    active(plan, report, empty.0)
}

fn ping_pong(group: &str) -> Result<Load> {
    Load::start(&["ring", "2", "--group", group, "--cpu", &rig::cpu().to_string()], None)
}

fn known(plan: Plan, report: &mut Report, empty: u32) -> Result<()> {
    let parent = TestCgroup::new();
    say(&format!("making {KNOWN} cgroups"));
    let groups: Vec<PathBuf> = (0..KNOWN).map(|number| parent.make_child(&number.to_string())).collect();
    let mut load = ping_pong(&groups[0].display().to_string())?;
    let (mut alone, mut among) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let mut kernel = Kernel::establish(SLOTS_MAX, &[])?;
        let ours = kernel.program("sched_switch")?;
        kernel.manage(&groups[..1])?;
        let mut cost = || compare(ours, empty, || load.run(plan.window).map(drop));
        alone.push(cost()?.net);
        for group in &groups[1..] {
            kernel.manage(&[group])?;
        }
        among.push(cost()?.net);
    }
    let ratios: Vec<f64> = among.iter().zip(&alone).map(|(among, alone)| among / alone).collect();
    report.tell("sched_switch, net: 1 managed cgroup known", median(&alone), "ns");
    report.tell("sched_switch, net: 10,000 managed cgroups known, one active", median(&among), "ns");
    report.at_most(KNOWN_GOAL, "sched_switch: 10,000 known / 1 known", median(&ratios), "");
    Ok(())
}

fn active(plan: Plan, report: &mut Report, empty: u32) -> Result<()> {
    let (parent, one) = (TestCgroup::new(), TestCgroup::new());
    let groups: Vec<PathBuf> = (0..ACTIVE).map(|number| parent.make_child(&number.to_string())).collect();
    let place = |path: &std::path::Path| path.display().to_string();
    let (size, cpu) = (ACTIVE.to_string(), rig::cpu().to_string());
    say(&format!("starting two rings of {ACTIVE} processes"));
    let arguments = ["ring", &size, &place(parent.path()), "--group", &place(&groups[0]), "--cpu", &cpu];
    let mut apart = Load::start(&arguments, None)?;
    let mut together = Load::start(&["ring", &size, "--group", &place(one.path()), "--cpu", &cpu], None)?;
    let mut pair = ping_pong(&place(one.path()))?;

    let mut kernel = Kernel::establish(SLOTS_MAX, &[])?;
    let ours = kernel.program("sched_switch")?;
    kernel.manage(&[one.path()])?;
    for group in &groups {
        kernel.manage(&[group])?;
    }
    let (mut by_many, mut by_one, mut by_pair) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        for (load, into) in
            [(&mut apart, &mut by_many), (&mut together, &mut by_one), (&mut pair, &mut by_pair)]
        {
            into.push(compare(ours, empty, || load.run(plan.window).map(drop))?.net);
        }
    }
    let ratio = |others: &[f64]| {
        median(&by_many.iter().zip(others).map(|(many, other)| many / other).collect::<Vec<_>>())
    };
    report.tell("sched_switch, net: ring of 1,000 processes, one cgroup each", median(&by_many), "ns");
    report.tell("sched_switch, net: ring of 1,000 processes in one cgroup", median(&by_one), "ns");
    report.at_most(ACTIVE_GOAL, "sched_switch: 1,000 active / 1 active", ratio(&by_one), "");
    report.tell("sched_switch: 1,000 active / ping-pong of two", ratio(&by_pair), "");
    Ok(())
}
