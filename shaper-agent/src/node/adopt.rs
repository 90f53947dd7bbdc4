//! What an earlier agent left is taken up again.

use shaper_core::{
    id::ExecutionId,
    task::{ExitStatus, Origin, Phase},
};

use super::{Node, NodeError, end::status_of, not_established, now};
use crate::{
    kernel::{bpf::Bpf, cgroup::Cgroup},
    launch::{self, Attachment},
    record::{self, Record},
};

impl Node {
    pub(super) fn adopt_all(&mut self) -> Result<(), NodeError> {
        let mut live = Vec::new();
        for execution in record::executions(self.state_dir())? {
            let Some(record) = Record::load(self.state_dir(), &execution)? else {
                self.erase_if_over(&execution);
                continue;
            };
            if record.phase == Phase::Running && record.boot_id == self.boot_id {
                live.push(record);
            } else {
                self.remember_ended(record)?;
            }
        }
        let left =
            self.config.state_dir.join("origin.json").exists() || Bpf::is_pinned(&self.config.bpffs_dir);
        if !live.is_empty() || left {
            self.establish()?;
        }
        for record in live {
            let execution = record.execution.clone();
            self.adopt_record(record).inspect_err(|error| {
                tracing::error!(%execution, error = %launch::chain(error), "cannot adopt a task");
            })?;
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
                    tracing::warn!(%execution, %error, "cannot remove what is left of a released task");
                }
            }
            Err(error) => tracing::warn!(%execution, %error, "cannot tell what became of a released task"),
        }
    }

    /// A task that had ended, or that a reboot ended.
    pub(super) fn remember_ended(&mut self, mut record: Record) -> Result<(), NodeError> {
        if record.phase == Phase::Running {
            let directory = record::directory(self.state_dir(), &record.execution);
            record.phase = match launch::attach(&directory)? {
                Attachment::Ended(exit) => Phase::Ended { status: status_of(exit.status), at: exit.at },
                _ => Phase::Ended { status: ExitStatus::Unknown, at: now() },
            };
            record.save(self.state_dir())?;
        }
        self.insert(record, None, None);
        Ok(())
    }

    /// A task of this boot that ran when it was last seen.
    pub(super) fn adopt_record(&mut self, record: Record) -> Result<(), NodeError> {
        let id = record.execution.task.clone();
        let cgroup = match Cgroup::open(&self.config.hierarchies.v2, &record.cgroup) {
            Ok(cgroup) => cgroup,
            Err(error) if error.is_gone() => return self.remember_gone(record),
            Err(error) => return Err(error.into()),
        };
        let target = self.target(cgroup, &record)?;
        self.free_slots.remove(&record.slot);
        let ids = target.cgroup.ids()?;
        let directory = record::directory(self.state_dir(), &record.execution);
        let limits = record.limits;
        let launched = matches!(record.origin, Origin::Launched { .. });
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        bpf.join(record.slot, &ids)?;
        self.insert(record, Some(target), None);

        // What is in force is compared with what should be; only what differs is written.
        self.change(&id, &limits.as_change())?;
        if !launched {
            return Ok(());
        }
        match launch::attach(&directory)? {
            Attachment::Running(supervisor, _) => {
                self.runtime.spawn(async move {
                    // Not our child; waiting keeps the descriptor for as long as it is needed.
                    let _ = launch::ended(supervisor).await;
                });
                self.watch_main(&id, &directory)?;
            }
            Attachment::Ended(_) => self.settle(&id)?,
            Attachment::Lost => {
                self.note(
                    &id,
                    "its supervisor was killed: its output since then is lost, its exit code will be unknown",
                );
                self.watch_main(&id, &directory)?;
            }
            Attachment::NeverStarted => {
                launch::abandon(&directory, "the agent stopped before the task was started")?;
                self.settle(&id)?;
            }
        }
        Ok(())
    }

    /// Its cgroup is gone: it ended while nobody looked.
    pub(super) fn remember_gone(&mut self, mut record: Record) -> Result<(), NodeError> {
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        bpf.retire(record.slot)?;
        record.boot_id.clear();
        self.remember_ended(record)
    }
}
