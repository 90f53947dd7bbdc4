//! What an earlier agent left is taken up again. Nothing that is wrong with one task keeps the agent from
//! starting: without it, nothing could be released either.

use std::collections::{HashMap, HashSet};

use shaper_common::abi::SLOT_AGENT;
use shaper_core::{
    id::ExecutionId,
    ledger::Cause,
    task::{ExitStatus, Origin, Phase},
};

use super::{Node, NodeError, SUPERVISOR_LOST, end::status_of, not_established, now};
use crate::{
    kernel::{
        bpf::Bpf,
        cgroup::{Cgroup, CgroupError},
    },
    launch::{self, Attachment},
    ledger::Decided,
    record::{self, Record},
};

/// Why an attempt that was recorded has come to nothing.
const NEVER_STARTED: &str = "the agent stopped before the task was started";

impl Node {
    pub(super) fn adopt_all(&mut self, decided: &HashMap<ExecutionId, Decided>) -> Result<(), NodeError> {
        let mut records = Vec::new();
        for execution in record::executions(self.state_dir())? {
            match Record::load(self.state_dir(), &execution) {
                Ok(Some(mut record)) => {
                    self.ledger.skip(record.ledger_number);
                    if let Some(decided) = decided.get(&execution) {
                        record.catch_up(decided);
                    }
                    records.push(record);
                }
                Ok(None) => self.erase_if_over(&execution),
                Err(error) => {
                    tracing::error!(%execution, error = %launch::chain(&error), "cannot read a task's record; it is left as it is");
                }
            }
        }
        // In this boot: what runs, and what has ended but may have left processes or a slot.
        let (live, past): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| {
            record.boot_id == self.boot_id && (record.phase == Phase::Running || record.cgroup.exists())
        });
        let left =
            self.config.state_dir.join("origin.json").exists() || Bpf::is_pinned(&self.config.bpffs_dir);
        if !live.is_empty() || left {
            self.establish()?;
        }
        for record in past {
            if record.let_go {
                self.forget(&record)?;
            } else {
                self.remember_ended(record);
            }
        }
        for record in live {
            let execution = record.execution.clone();
            if let Err(error) = self.adopt_record(record) {
                let error = launch::chain(&error);
                tracing::error!(%execution, error, "cannot take a task up again as it was");
                self.note(&execution.task, &format!("after a restart of the agent: {error}"));
            }
        }
        self.recheck_table()?;
        if let Some(bpf) = &self.bpf {
            bpf.remove_other_layouts()?;
            bpf.settle_ingress()?;
        }
        Ok(())
    }

    /// While there was no agent, root may have written into the pinned table: what would charge a task for cgroups that are not its
    /// own, and hold them to its limits, is taken out.
    fn recheck_table(&mut self) -> Result<(), NodeError> {
        let Some(bpf) = &mut self.bpf else { return Ok(()) };
        // Read before the cgroups are listed: one that is made between has its entry after.
        let entries = bpf.entries()?;
        let mut own = HashMap::from([(SLOT_AGENT, None)]);
        for task in self.tasks.values() {
            // Of a task that cannot be looked into nothing is taken away.
            if let Some(target) = &task.target {
                own.insert(target.slot, target.cgroup.ids().ok().map(HashSet::<u64>::from_iter));
            } else if task.is_running() {
                own.insert(task.record.slot, None);
            }
        }
        let is_own = |id, slot| match own.get(&slot) {
            Some(ids) => ids.as_ref().is_none_or(|ids| ids.contains(&id)),
            None => false,
        };
        let foreign: Vec<u64> =
            entries.into_iter().filter(|&(id, slot)| !is_own(id, slot)).map(|(id, _)| id).collect();
        if !foreign.is_empty() {
            tracing::warn!(
                cgroups = ?foreign,
                "the table of the kernel programs had cgroups that are no task's: they are taken out"
            );
            bpf.take_out(&foreign)?;
        }
        Ok(())
    }

    /// A directory without a record: released, or never begun.
    pub(super) fn erase_if_over(&self, execution: &ExecutionId) {
        let directory = record::directory(self.state_dir(), execution);
        match launch::attach(&directory) {
            Ok(Attachment::Running(..)) => {}
            Ok(_) => {
                if let Err(error) = record::erase(self.state_dir(), execution) {
                    tracing::warn!(%execution, %error, "cannot remove what is left of a task");
                }
            }
            Err(error) => tracing::warn!(%execution, %error, "cannot tell what became of a task"),
        }
    }

    /// A task that had ended, or that a reboot ended.
    fn remember_ended(&mut self, mut record: Record) {
        if record.phase == Phase::Running {
            let directory = record::directory(self.state_dir(), &record.execution);
            // Recorded, and then the agent died before it had a cgroup: it never ran, and never will.
            let attachment = match record.origin {
                Origin::Launched { .. } => launch::abandon(&directory, NEVER_STARTED),
                Origin::Adopted | Origin::Entered { .. } => launch::attach(&directory),
            };
            record.phase = match attachment {
                Ok(Attachment::Ended(exit)) => {
                    if let Some(assignment) = &mut record.assignment {
                        assignment.lease_over = exit.lease_over;
                    }
                    Phase::Ended { status: status_of(exit.status), at: exit.at }
                }
                _ => {
                    // The end of a boot is that of all in it: such a task goes on elsewhere, as if nobody had come back.
                    if let Some(assignment) = &mut record.assignment {
                        assignment.lease_over |=
                            assignment.lease_seconds.is_some() && record.boot_id != self.boot_id;
                    }
                    Phase::Ended { status: ExitStatus::Unknown, at: now() }
                }
            };
            if let Err(error) = record.save(self.state_dir()) {
                tracing::warn!(execution = %record.execution, %error, "cannot record that a task has ended");
            }
        }
        self.insert(record, None);
    }

    /// The cgroup of a task, unless it is gone. What was made in its place since is somebody else's: nothing was decided
    /// about that.
    fn cgroup_of(&self, record: &Record) -> Result<Option<Cgroup>, CgroupError> {
        match Cgroup::open(&self.config.hierarchies.v2, &record.cgroup) {
            Ok(cgroup) if record.cgroup_id.is_some_and(|id| id != cgroup.id()) => Ok(None),
            Ok(cgroup) => Ok(Some(cgroup)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A task of this boot that has, or may have, something in the kernel.
    fn adopt_record(&mut self, mut record: Record) -> Result<(), NodeError> {
        let id = record.execution.task.clone();
        if !self.free_slots.remove(&record.slot) {
            // Of another layout, which had other slots: nothing is counted on it here.
            record.slot = self
                .free_slots
                .pop_first()
                .ok_or_else(|| NodeError::Exhausted("there are more tasks than --max-tasks allows".into()))?;
            record.save(self.state_dir())?;
        }
        let cgroup = match self.cgroup_of(&record) {
            Ok(Some(cgroup)) => cgroup,
            Ok(None) => {
                let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
                let retired = bpf.retire(record.slot);
                self.free_slots.insert(record.slot);
                if record.let_go {
                    self.forget(&record)?;
                } else {
                    self.remember_ended(record);
                }
                return Ok(retired?);
            }
            Err(error) => {
                self.insert(record, None);
                return Err(error.into());
            }
        };
        let target = match self.target(cgroup, &record) {
            Ok(target) => target,
            Err(error) => {
                self.insert(record, None);
                return Err(error);
            }
        };
        let (slot, origin) = (record.slot, record.origin.clone());
        let ids = target.cgroup.ids();
        let running = record.phase == Phase::Running;
        let directory = record::directory(self.state_dir(), &record.execution);
        let execution = record.execution.clone();
        let let_go = record.let_go;
        self.insert(record, Some(target));
        if let_go && let Some(task) = self.tasks.remove(&id) {
            return self.finish_release(task);
        }
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        bpf.join(slot, &ids?)?;
        self.meter_task(&id)?;
        if !running {
            return Ok(()); // The next tick finishes what the last agent began.
        }
        // What is in force is compared with what should be; only what differs is written. Whatever
        // comes of it, the task is looked after.
        let cause = Cause::agent("start", "taken up from an earlier agent");
        let record = &self.task(&id)?.record;
        let changed = if record.baseline.is_empty() {
            // The last agent came no further than to write down what it was about to limit.
            let limits = record.limits.as_change();
            self.change(&id, &limits, &cause)
        } else {
            self.put_all_back(&id, &cause).or_else(|refused| self.go_back(&id, refused))
        };
        if let Err(error) = self.watch_quota(&id) {
            tracing::warn!(task = %id, error = %launch::chain(&error), "cannot watch a CPU quota");
        }
        if matches!(origin, Origin::Entered { .. }) {
            self.watch_entered(&execution)?;
        }
        if matches!(origin, Origin::Launched { .. }) {
            match launch::attach(&directory)? {
                Attachment::Running(supervisor, _) => {
                    self.look_out_for(&execution, supervisor);
                    self.watch_main(&execution)?;
                }
                Attachment::Ended(_) => self.settle(&execution)?,
                Attachment::Lost => {
                    self.note(&id, SUPERVISOR_LOST);
                    self.watch_main(&execution)?;
                }
                Attachment::NeverStarted => {
                    launch::abandon(&directory, NEVER_STARTED)?;
                    self.settle(&execution)?;
                }
            }
        }
        changed
    }
}
