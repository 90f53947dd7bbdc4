//! What it costs to write a change down: in the ledger, and in a task's record.

use std::time::Instant;

use anyhow::{Context, Result};
use shaper_agent::{
    actuate::{Change, Knob, Value, Values},
    kernel::cgroup::cpu::{Bandwidth, CpuMax},
    ledger::{Intent, Ledger},
    record::Record,
};
use shaper_core::{
    ledger::{Cause, Kind, Outcome},
    limits::{Limit, Limits},
    task::{Origin, Owner, Phase},
    units::Millicores,
};

use crate::{
    Plan,
    report::{Report, median},
};

/// Changes written in each round.
const CHANGES: u64 = 1000;
/// Records saved: each is brought to the disk twice.
const RECORDS: u64 = 50;

fn bandwidth(milli: u64) -> Value {
    let max = CpuMax::of(Limit::At(Millicores(milli)));
    Value::Bandwidth(Bandwidth { max, burst: max.quota.at() })
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    // A disk's directory: /tmp may be memory.
    let directory = tempfile::Builder::new().prefix("shaper-bench-").tempdir_in("/var/tmp")?;
    let (mut ledger, _) = Ledger::open(directory.path(), 0)?;
    let execution: shaper_core::id::ExecutionId = "task.1".parse().context("it is one")?;
    let owner = Owner { uid: 0, gid: 0 };
    let limits = Limits { cpu: Limit::At(Millicores(500)), ..Limits::default() };
    let intent = Intent {
        execution: execution.clone(),
        owner,
        kind: Kind::Standing,
        cause: Cause::agent(
            "adjust",
            "it used 98 % of its grant, and the node has 1.2 cores that nobody uses",
        ),
        changes: vec![Change { knob: Knob::Cpu, before: bandwidth(500), after: bandwidth(700) }],
        limits: Some(limits),
        standing: None,
    };
    let mut record = Record {
        execution,
        owner,
        runs_as: owner,
        origin: Origin::Launched { command: vec!["sleep".into(), "1000".into()] },
        workload: None,
        slot: 3,
        cgroup: "/sys/fs/cgroup/shaper/task.1".into(),
        cgroup_id: None,
        limits,
        ledger_number: 0,
        standing: Values::new(),
        before: None,
        baseline: Values::from([(Knob::Cpu, bandwidth(500))]),
        created_at: 0,
        boot_id: "00000000-0000-0000-0000-000000000000".into(),
        phase: Phase::Running,
        usage: None,
        memory_floor: None,
        oom_kill: None,
        assignment: None,
        let_go: false,
        adopted_by: None,
        writers: None,
        kill_at_boottime_ns: None,
        mps_memory: None,
    };
    let (mut appended, mut saved) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let start = Instant::now();
        for at in 0..CHANGES {
            let number = ledger.intend(at, intent.clone())?;
            ledger.conclude(at, number, Outcome::Done)?;
        }
        appended.push(start.elapsed().as_secs_f64() * 1e6 / CHANGES as f64);
        let start = Instant::now();
        for number in 0..RECORDS {
            record.ledger_number = number;
            record.save(directory.path())?;
        }
        saved.push(start.elapsed().as_secs_f64() * 1e6 / RECORDS as f64);
    }
    report.tell("ledger: a change, intent and outcome, handed to the kernel", median(&appended), "us");
    report.tell("ledger: a task's record, brought to the disk", median(&saved), "us");
    Ok(())
}
