//! What is told about tasks and the node.

use std::path::PathBuf;

use shaper_core::{
    doctor::{Availability, Report, Rung},
    gpu::{Card, CardUsage},
    id::{BlockDevice, TaskId},
    snapshot::NodeSnapshot,
    task::{Enforcement, Origin, TaskStatus, Usage},
};
use shaper_proto::peer::Caller;
use tokio::sync::watch;

use super::{
    Node, NodeError, Task,
    block_io::{Weighing, no_weights},
    idle::Idling,
    now,
};
use crate::{
    actuate::{self, Knob},
    kernel::{bpf::Counters, features},
    record::{self, Record},
};

/// A note on a task that a process entered.
const FROM_BEFORE: &str =
    "what its process had before it came here stays charged where it was: its memory and its connections";

impl Node {
    /// The caller's tasks.
    pub fn list(&self, caller: &Caller) -> Result<Vec<TaskStatus>, NodeError> {
        let visible = self.tasks.iter().filter(|(_, task)| caller.may_use(&task.record.owner));
        visible.map(|(id, _)| self.status(id)).collect()
    }

    /// One task of the caller's.
    pub fn get(&self, caller: &Caller, id: &TaskId) -> Result<TaskStatus, NodeError> {
        self.visible(caller, id)?;
        self.status(id)
    }

    /// What the node and the caller's running tasks use.
    pub fn snapshot(&mut self, caller: &Caller) -> NodeSnapshot {
        let mut snapshot = self.meter.node(&self.config.node, self.bpf.as_ref(), now());
        snapshot.cpu_pool = self.cpu_pool();
        snapshot.gpus = self.card_usages();
        if let Some(bpf) = &self.bpf {
            // Of others' tasks nothing is told, not even their names.
            let name_of = |slot: u32| {
                let has_it = |task: &&Task| task.target.as_ref().is_some_and(|target| target.slot == slot);
                let task = self.tasks.values().find(has_it).filter(|task| caller.may_use(&task.record.owner));
                task.map(|task| task.record.execution.task.to_string()).unwrap_or_default()
            };
            for task in self.tasks.values().filter(|task| task.is_running()) {
                let Some(target) = task.target.as_ref().filter(|_| caller.may_use(&task.record.owner)) else {
                    continue;
                };
                let Some(mut usage) = self.meter.task(target.slot, bpf, &task.record, name_of) else {
                    continue;
                };
                if let Some(loan) = self.lending.as_ref().and_then(|lending| lending.loan(target.slot)) {
                    (usage.cpu.lent, usage.cpu.loans) = (loan.lent.per_period(), loan.count);
                }
                if let Some(memory) = &mut usage.memory {
                    memory.idle_reclaimed = task.idling.status().map(|status| status.reclaimed);
                }
                usage.gpu_memory = self.card_memory(&task.record.execution.task);
                snapshot.tasks.push(usage);
            }
        }
        snapshot
    }

    /// Changes whenever there is a new snapshot.
    pub fn stocks(&self) -> watch::Receiver<u64> {
        self.stocks.subscribe()
    }

    /// Turns true when the task has ended.
    pub fn ended(&self, caller: &Caller, id: &TaskId) -> Result<watch::Receiver<bool>, NodeError> {
        self.visible(caller, id)?;
        Ok(self.task(id)?.ended.subscribe())
    }

    /// Where a task's log is.
    pub fn log_directory(&self, caller: &Caller, id: &TaskId) -> Result<PathBuf, NodeError> {
        self.visible(caller, id)?;
        let task = self.task(id)?;
        let how = match task.record.origin {
            Origin::Launched { .. } => {
                return Ok(record::directory(self.state_dir(), &task.record.execution));
            }
            Origin::Adopted => "was adopted",
            Origin::Entered { .. } => "is a process of its caller's (`shaper exec`)",
        };
        Err(NodeError::Precondition(format!("task `{id}` {how}: shaper does not have its output")))
    }

    /// What this node offers.
    pub fn doctor(&self) -> Result<Report, NodeError> {
        let config = &self.config;
        let uplinks = match &self.bpf {
            Some(bpf) => bpf
                .uplinks()
                .iter()
                .map(|(device, form)| match form {
                    Ok(form) => format!("{device} ({form})"),
                    Err(error) => format!("{device} (not counted: {error})"),
                })
                .collect(),
            None => config.uplinks.iter().map(|device| format!("{device} (not attached)")).collect(),
        };
        let mut rungs = features::probe(&config.opener)
            .map_err(|source| NodeError::System { verb: "probe the kernel", source })?;
        rungs.extend(self.nvml_rung());
        if let Some(bpf) = &self.bpf {
            rungs.extend(features::slot_table(bpf.control().without_entry));
            let distrusted = bpf.distrusted().iter();
            rungs.extend(distrusted.map(|(measure, why)| features::distrusted(*measure, why)));
            rungs.extend(self.weighing().ok().and_then(|weighing| no_weights_rung(&weighing)));
            rungs.extend(bpf.without().iter().map(|(name, why)| features::program(name, why)));
        }
        Ok(Report {
            kernel: features::release(),
            node: config.node.clone(),
            cgroups: config.hierarchies.name().into(),
            cgroup_root: config.cgroup_root.display().to_string(),
            bpffs_dir: config.bpffs_dir.display().to_string(),
            uplinks,
            gpus: self.card_usages().iter().map(|usage| self.card_for_people(usage)).collect(),
            rungs,
        })
    }

    /// A card, for people.
    fn card_for_people(&self, usage: &CardUsage) -> String {
        let CardUsage { card: Card { number, id, model, device }, memory, trouble, .. } = usage;
        let memory = memory.map_or(String::new(), |memory| format!(", {memory}"));
        let held = match self.cards.holders.strongest(*number) {
            Some((rung, None)) => format!(", parts held by {rung}"),
            Some((rung, Some(why))) => format!(", parts held by {rung}: {why}"),
            None => String::new(),
        };
        let trouble = trouble.as_ref().map_or(String::new(), |trouble| format!(": {trouble}"));
        format!("{number}: {model} ({id}, device {device}{memory}{held}){trouble}")
    }

    pub(super) fn status(&self, id: &TaskId) -> Result<TaskStatus, NodeError> {
        let task = self.task(id)?;
        let Record {
            execution,
            owner,
            runs_as,
            origin,
            workload,
            cgroup,
            limits,
            created_at,
            phase,
            adopted_by,
            ..
        } = &task.record;
        let mut enforcement: Vec<Enforcement> = match (&task.target, &self.bpf) {
            (Some(target), Some(bpf)) if task.is_running() => {
                match actuate::enforcement(target, bpf, &task.record.baseline) {
                    Err(error) if error.is_gone() => Vec::new(),
                    other => other?,
                }
            }
            _ => Vec::new(),
        };
        for found in &mut enforcement {
            if let Ok(Knob::GpuMemory(number)) = found.resource.parse()
                && let Some(rung) = self.rung(task, number)
            {
                found.mechanism = rung.name().to_owned();
            }
        }
        let loan = task.target.as_ref().zip(self.lending.as_ref());
        if let Some(loan) = loan.and_then(|(target, lending)| lending.loan(target.slot))
            && let Some(cpu) = enforcement.iter_mut().find(|found| found.resource == Knob::Cpu.to_string())
        {
            let lent = loan.lent.per_period();
            if lent.0 > 0 {
                cpu.in_force += &format!(", {lent} of them lent");
            } else if loan.pays_back {
                cpu.in_force += ", while it makes good what it was lent";
            }
        }
        self.explain_latency(task, &mut enforcement);
        Ok(TaskStatus {
            task_id: execution.task.clone(),
            attempt: execution.attempt,
            owner: *owner,
            runs_as: *runs_as,
            origin: origin.clone(),
            workload: workload.clone(),
            phase: phase.clone(),
            pid: task.started.filter(|_| task.is_running()).map(|started| started.pid),
            cgroup: cgroup.display().to_string(),
            created_at: *created_at,
            limits: *limits,
            enforcement,
            usage: self.usage(id)?,
            shrink: task
                .shrinking
                .as_ref()
                .and_then(|shrinking| shrinking.told())
                .or(task.last_shrink.clone()),
            idle: task.idling.status(),
            oom_kill: task.record.oom_kill,
            notes: self.notes(task),
            adopted_by: adopted_by.clone(),
        })
    }

    fn notes(&self, task: &Task) -> Vec<String> {
        let mut notes = task.notes.clone();
        if let Some(manager) = task.target.as_ref().and_then(|target| target.manager.as_ref()) {
            notes.push(format!("its cgroup is managed by {manager}: what stands is told to it"));
        }
        notes.extend(task.differs.iter().map(|(knob, differs)| differs.note(*knob)));
        notes.extend(self.open_before(task));
        notes.extend(self.card_notes(task));
        notes.extend(task.record.oom_kill.map(|kill| kill.to_string()));
        if let Idling::Not(why) = &task.idling {
            notes.push(format!("memory that it does not use is not taken away: {why}"));
        }
        if matches!(task.record.origin, Origin::Entered { .. }) && task.is_running() {
            notes.push(FROM_BEFORE.into());
        }
        if task.record.limits.net_egress.at().is_some() && task.is_running() {
            notes.push(
                "the network limit holds for what leaves this machine. Beyond it TCP waits; of other protocols what is \
                 too much is dropped"
                    .into(),
            );
        }
        if task.record.limits.net_ingress.at().is_some() && task.is_running() {
            notes.push(
                "the limit on what it receives holds for TCP and UDP that arrive at this node's uplinks. What is too much \
                 waits in a queue, and is dropped where that is full"
                    .into(),
            );
        }
        notes
    }

    pub(super) fn usage(&self, id: &TaskId) -> Result<Usage, NodeError> {
        let task = self.task(id)?;
        if let Some(usage) = task.record.usage {
            return Ok(usage);
        }
        let (Some(target), Some(bpf)) = (&task.target, &self.bpf) else { return Ok(Usage::default()) };
        let counters = self.meter.counters_now(target.slot, bpf).unwrap_or_else(|| bpf.counters(target.slot));
        let memory_bytes = match actuate::memory_in_use(target) {
            Err(error) if error.is_gone() => None,
            other => other?.map(|bytes| bytes.0),
        };
        let usage = usage_of(&counters, self.meter.counters_before(target.slot), memory_bytes);
        Ok(Usage { cpu_throttled_ns: self.meter.throttled_ns_read(target.slot), ..usage })
    }
}

pub(super) fn usage_of(now: &Counters, before: Option<&Counters>, memory_bytes: Option<u64>) -> Usage {
    let elapsed = before.map_or(0, |before| now.at_ns.saturating_sub(before.at_ns));
    let rate = |now: u64, before: u64, scale: u64| {
        let difference = u128::from(now.saturating_sub(before)) * u128::from(scale);
        difference.checked_div(u128::from(elapsed)).map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    };
    let before = before.copied().unwrap_or_default();
    const BITS_PER_SEC: u64 = 8 * 1_000_000_000;
    Usage {
        at_monotonic_ns: now.at_ns,
        cpu_time_ns: now.cpu_ns,
        cpu_throttled_ns: None,
        egress: now.egress,
        ingress: now.ingress,
        uplink_egress: now.uplink_egress,
        memory_bytes,
        cpu_now_millicores: rate(now.cpu_ns, before.cpu_ns, 1000),
        egress_now_bps: rate(now.egress.bytes, before.egress.bytes, BITS_PER_SEC),
        ingress_now_bps: rate(now.ingress.bytes, before.ingress.bytes, BITS_PER_SEC),
        egress_granted_bps: now.granted.map(|bytes| bytes * 8),
    }
}

/// A row where weights of block IO mean nothing on some device.
fn no_weights_rung(weighing: &[(BlockDevice, Weighing)]) -> Option<Rung> {
    let is_without = |(_, found): &(BlockDevice, Weighing)| matches!(found, Weighing::None { .. });
    weighing.iter().any(is_without).then(|| Rung {
        feature: "io-weight".into(),
        used_for: "share of contended block devices: `--io-weight`".into(),
        availability: Availability::Unusable { reason: no_weights(weighing) },
        degrades_to: "refused where no device heeds it; limits (`--io`) and promises (`--io-latency`) work"
            .into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shaper_core::task::Traffic;

    #[test]
    fn rates_come_from_two_readings() {
        let before = Counters { at_ns: 1_000_000_000, cpu_ns: 5, ..Counters::default() };
        let now = Counters {
            at_ns: 2_000_000_000,
            cpu_ns: 500_000_005,
            egress: Traffic { bytes: 1_250_000, packets: 900 },
            ..Counters::default()
        };
        let usage = usage_of(&now, Some(&before), None);
        assert_eq!((usage.cpu_now_millicores, usage.egress_now_bps), (500, 10_000_000));
        assert_eq!(usage_of(&now, None, None).cpu_now_millicores, 0);
    }
}
