//! The broker as a service: tasks a second from submission to release, all of it durable; what of the CPU one task takes; and
//! how long clients wait. Its agents are fakes that keep the contract and run nothing: a task is over so soon after its
//! start was acknowledged.

mod agents;
mod clients;
mod rig;
mod start;
mod web;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use self::{
    agents::Agents,
    clients::Marks,
    rig::{Rig, cpu_time},
};
pub(crate) use self::{start::start, web::web};
use crate::{
    Plan,
    report::{Report, quantile},
};

/// Fake agents that share the work.
const AGENTS: usize = 32;
/// What the goal is stated for.
const RATE: u64 = 20_000;
/// What a broker should bear without a queue.
const CALM: u64 = 5_000;
/// Submissions of a stream that wait for their outcome, at most.
const AHEAD: u64 = 4_000;
/// Unary calls that wait for their answer.
const CALLS: usize = 128;
/// Connections that they share.
const CONNECTIONS: usize = 4;
/// Until everything has its place in memory.
const WARM_UP: Duration = Duration::from_secs(2);

/// What was measured of a while in which the broker was busy.
struct Busy {
    /// Tasks that were released, a second.
    rate: f64,
    /// CPU time of the broker, in microseconds a task.
    cpu: f64,
    /// Milliseconds from the submission to its durable answer …
    answer: Vec<f64>,
    /// … and to the release of the task.
    life: Vec<f64>,
}

/// Measures while `load` submits. It ends when the marks say so.
async fn busy(rig: &Rig, marks: &Arc<Marks>, while_for: Duration) -> Result<Busy> {
    tokio::time::sleep(WARM_UP.min(while_for)).await;
    let pid = rig.pid()?;
    let (before, released, start) = (cpu_time(pid)?, marks.released.load(Ordering::Relaxed), Instant::now());
    marks.begin();
    tokio::time::sleep(while_for).await;
    let (after, end) = (cpu_time(pid)?, marks.released.load(Ordering::Relaxed));
    let seconds = start.elapsed().as_secs_f64();
    marks.is_over.store(true, Ordering::Relaxed);
    ensure!(end > released, "no task came to its end in {seconds:.1} s");
    let tasks = (end - released) as f64;
    let (answer, life) = marks.latencies();
    Ok(Busy { rate: tasks / seconds, cpu: (after - before).as_secs_f64() * 1e6 / tasks, answer, life })
}

fn p(values: &[f64], thousandths: usize) -> f64 {
    quantile(values, thousandths)
}

/// By stream: as fast as it goes, at a rate without a queue, and at the rate of the goal.
pub(crate) fn stream(plan: Plan, report: &mut Report) -> Result<()> {
    of_store(plan, report, "redb", &[])
}

fn of_store(plan: Plan, report: &mut Report, name: &str, arguments: &[&str]) -> Result<()> {
    for rate in [None, Some(CALM), Some(RATE)] {
        let rig = Rig::start(arguments)?;
        let marks = Arc::new(Marks::default());
        let measured = rig.runtime.block_on(async {
            let agents = Agents::attach(&rig, AGENTS, &marks).await?;
            let clients = clients::stream(rig.connect().await?, marks.clone(), AHEAD, rate);
            let measured = tokio::select! {
                measured = busy(&rig, &marks, plan.steady) => measured,
                failed = agents.failed() => Err(failed),
                ended = clients => Err(ended.err().context("the stream of submissions ended")?),
            };
            measured
        })?;
        let Busy { rate: done, cpu, answer, life } = measured;
        match rate {
            None => {
                let metric = format!("{name}: by stream, one client, {AGENTS} agents, {AHEAD} ahead: tasks");
                if name == "redb" {
                    report.at_least(RATE as f64, &metric, done, "/s");
                } else {
                    report.tell(&metric, done, "/s");
                }
                report.tell(&format!("{name}: the same: CPU of the broker a task"), cpu, "us");
            }
            Some(rate) => {
                report.tell(&format!("{name}: by stream, {rate} submitted a second: tasks"), done, "/s");
                if name == "redb" && rate == RATE {
                    report.at_most(15.0, &format!("{name}: the same: CPU of the broker a task"), cpu, "us");
                    let metric = format!("{name}: the same: from submission to its durable answer, p99");
                    report.at_most(10.0, &metric, p(&answer, 990), "ms");
                } else {
                    report.tell(&format!("{name}: the same: CPU of the broker a task"), cpu, "us");
                    let metric = format!("{name}: the same: from submission to its durable answer, p99");
                    report.tell(&metric, p(&answer, 990), "ms");
                }
                report.tell(&format!("{name}: the same: that, p50"), p(&answer, 500), "ms");
                let metric = format!("{name}: the same: from submission to the release, p50");
                report.tell(&metric, p(&life, 500), "ms");
                report.tell(&format!("{name}: the same: that, p99"), p(&life, 990), "ms");
            }
        }
        report.tell(
            &format!("{name}: memory of the broker after that"),
            rig.memory()? as f64 / f64::from(1 << 20),
            "MiB",
        );
    }
    Ok(())
}

/// A call for each task.
pub(crate) fn unary(plan: Plan, report: &mut Report) -> Result<()> {
    let rig = Rig::start(&[])?;
    let marks = Arc::new(Marks::default());
    let measured = rig.runtime.block_on(async {
        let agents = Agents::attach(&rig, AGENTS, &marks).await?;
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(rig.connect().await?);
        }
        tokio::select! {
            measured = busy(&rig, &marks, plan.steady) => measured,
            failed = agents.failed() => Err(failed),
            ended = clients::unary(channels, marks.clone(), CALLS) => Err(ended.err().context("the calls ended")?),
        }
    })?;
    let Busy { rate, cpu, answer, .. } = measured;
    let metric = format!("redb: a call a task, {CALLS} at a time over {CONNECTIONS} connections: tasks");
    report.at_least(5000.0, &metric, rate, "/s");
    report.tell("redb: the same: CPU of the broker a task", cpu, "us");
    report.at_most(10.0, "redb: the same: a call, p99", p(&answer, 990), "ms");
    report.tell("redb: the same: a call, p50", p(&answer, 500), "ms");
    Ok(())
}

/// As many agents as a broker is to serve.
const MANY: usize = 1000;

/// A thousand agents: how long it takes until all have a session, and all again after the broker was killed.
pub(crate) fn sessions(plan: Plan, report: &mut Report) -> Result<()> {
    let many = if plan.is_quick { MANY / 5 } else { MANY };
    let mut rig = Rig::start(&[])?;
    let marks = Arc::new(Marks::default());
    let start = Instant::now();
    let agents = rig.runtime.block_on(Agents::attach(&rig, many, &marks))?;
    report.tell(
        &format!("{many} agents: until all have a session"),
        start.elapsed().as_secs_f64() * 1e3,
        "ms",
    );
    let measured = rig.runtime.block_on(async {
        tokio::select! {
            measured = busy(&rig, &marks, plan.steady.min(Duration::from_secs(10))) => measured,
            failed = agents.failed() => Err(failed),
            ended = clients::stream(rig.connect().await?, marks.clone(), AHEAD, None) => {
                Err(ended.err().context("the stream of submissions ended")?)
            }
        }
    })?;
    report.tell(&format!("{many} agents: by stream, one client: tasks"), measured.rate, "/s");
    report.tell(&format!("{many} agents: the same: CPU of the broker a task"), measured.cpu, "us");
    drop(agents);
    rig.restart()?;
    let start = Instant::now();
    let marks = Arc::new(Marks::default());
    let _agents = rig.runtime.block_on(Agents::attach(&rig, many, &marks))?;
    let metric = format!("{many} agents: all at once after the broker was killed, until all have a session");
    report.tell(&metric, start.elapsed().as_secs_f64() * 1e3, "ms");
    Ok(())
}
