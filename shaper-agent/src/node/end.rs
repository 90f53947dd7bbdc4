//! How tasks end, and how they are let go.

use std::time::{Duration, Instant};

use rustix::process::{Signal, pidfd_send_signal};
use shaper_core::{
    id::TaskId,
    task::{ExitStatus, Origin, Phase, TaskStatus, UnixNanos},
};

use super::{ENDED_KEPT, Node, NodeError, Task, not_established, now};
use crate::{
    actuate::{self, ActuateError, Target},
    caller::Caller,
    ground::GroundError,
    kernel::cgroup::Cgroup,
    launch::{self, Attachment},
    record::{self, Record},
};

impl Node {
    /// Asks a task to end, and makes it after `grace`.
    pub fn cancel(&mut self, caller: &Caller, id: &TaskId, grace: Duration) -> Result<TaskStatus, NodeError> {
        self.visible(caller, id)?;
        let task = self.task_mut(id)?;
        if matches!(task.record.origin, Origin::Adopted) {
            return Err(NodeError::Precondition(format!(
                "task `{id}` was adopted: its processes belong to somebody else; `shaper release {id}` lets it go"
            )));
        }
        if task.is_running() {
            if grace.is_zero() {
                if let Some(target) = &task.target {
                    target.cgroup.kill()?;
                }
            } else {
                task.kill_at = Some(Instant::now() + grace);
                let directory = record::directory(self.state_dir(), &self.task(id)?.record.execution);
                if let Some((_, Some(main))) = launch::main_process(&directory)? {
                    match pidfd_send_signal(&main, Signal::TERM) {
                        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                        Err(errno) => {
                            return Err(NodeError::System { verb: "signal the task", source: errno.into() });
                        }
                    }
                }
            }
        }
        self.status(id)
    }

    /// The main process has ended, or nobody can say any more: records that, and begins to take the
    /// task's place in the kernel away. What the main process left running ends with it.
    pub(super) fn settle(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let Some(task) = self.tasks.get(id) else { return Ok(()) };
        if !task.is_running() {
            return Ok(());
        }
        let directory = record::directory(self.state_dir(), &task.record.execution);
        let phase = match launch::attach(&directory)? {
            Attachment::Ended(exit) => Phase::Ended { status: status_of(exit.status), at: exit.at },
            _ => Phase::Ended { status: ExitStatus::Unknown, at: now() },
        };
        self.end(id, phase)
    }

    pub(super) fn end(&mut self, id: &TaskId, phase: Phase) -> Result<(), NodeError> {
        let usage = self.usage(id)?;
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        task.record.phase = phase;
        task.record.usage = Some(usage);
        task.record.save(&state_dir)?;
        task.kill_at = None;
        task.ended.send_replace(true);
        self.clean_up(id)?;
        self.forget_oldest()
    }

    /// Removes what an ended task has in the kernel, if its processes are gone; else the next tick
    /// tries again.
    pub(super) fn clean_up(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let Some(mut task) = self.tasks.remove(id) else { return Ok(()) };
        let result = self.take_down(&mut task, true);
        self.tasks.insert(id.clone(), task);
        result
    }

    /// `kill`: processes that are left are killed, and the cgroup stays until they are gone. Else
    /// they are moved to where the agent came from.
    pub(super) fn take_down(&mut self, task: &mut Task, kill: bool) -> Result<(), NodeError> {
        let Some(target) = task.target.take() else {
            // A start that failed may have left an empty cgroup or the slot.
            self.free_slots.insert(task.record.slot);
            return self.remove_leftover(&task.record);
        };
        if kill && matches!(task.record.origin, Origin::Launched { .. }) {
            match target.cgroup.is_populated() {
                Ok(true) => {
                    target.cgroup.kill()?;
                    if target.cgroup.is_populated()? {
                        task.target = Some(target);
                        return Ok(());
                    }
                }
                Ok(false) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(bpf) = self.bpf.as_mut() {
            bpf.retire(target.slot)?;
        }
        let Target { cgroup, v1_cpu, v1_memory, slot } = target;
        if matches!(task.record.origin, Origin::Launched { .. })
            && let Some(ground) = &self.ground
        {
            match ground.dissolve(cgroup, [v1_cpu, v1_memory].into_iter().flatten()) {
                Err(GroundError::Cgroup(error)) if error.is_gone() => {}
                other => other?,
            }
        }
        self.free_slots.insert(slot);
        Ok(())
    }

    pub(super) fn remove_leftover(&self, record: &Record) -> Result<(), NodeError> {
        if !matches!(record.origin, Origin::Launched { .. }) || record.cgroup.as_os_str().is_empty() {
            return Ok(());
        }
        match Cgroup::open(&self.config.hierarchies.v2, &record.cgroup).and_then(Cgroup::remove) {
            Err(error) if !error.is_gone() => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub(super) fn forget_oldest(&mut self) -> Result<(), NodeError> {
        let mut ended: Vec<(UnixNanos, TaskId)> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.target.is_none())
            .map(|(id, task)| (task.record.created_at, id.clone()))
            .collect();
        ended.sort();
        let surplus = ended.len().saturating_sub(ENDED_KEPT);
        for (_, id) in ended.drain(..surplus) {
            if let Some(task) = self.tasks.remove(&id) {
                record::erase(self.state_dir(), &task.record.execution)?;
            }
        }
        Ok(())
    }

    // ---- releasing

    /// Lifts the limits of a task, puts its baseline back and forgets it; its processes go on.
    pub fn release(&mut self, caller: &Caller, id: &TaskId) -> Result<Vec<String>, NodeError> {
        self.visible(caller, id)?;
        if self.task(id)?.target.is_some() {
            self.only_operator(caller, "release a running task")?;
        }
        self.let_go(id)
    }

    pub(super) fn let_go(&mut self, id: &TaskId) -> Result<Vec<String>, NodeError> {
        let task = self.task(id)?;
        let execution = task.record.execution.clone();
        if task.target.is_none() {
            self.tasks.remove(id);
            record::erase(self.state_dir(), &execution)?;
            return Ok(vec![format!("{id}: it had ended; its log and exit code are forgotten")]);
        }
        let mut done = Vec::new();
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        let Some(mut task) = self.tasks.remove(id) else { return Ok(done) };
        let restored = match &task.target {
            Some(target) => actuate::restore(target, bpf, &task.record.baseline),
            None => Ok(()),
        };
        match restored {
            Err(ActuateError::Cgroup(error)) if error.is_gone() => {}
            Err(error) => {
                self.tasks.insert(id.clone(), task);
                return Err(error.into());
            }
            Ok(()) => {}
        }
        for (knob, value) in &task.record.baseline {
            done.push(format!("{id}: {knob} is `{value}` again"));
        }
        if let Err(error) = self.take_down(&mut task, false) {
            self.tasks.insert(id.clone(), task);
            return Err(error);
        }
        match task.record.origin {
            Origin::Launched { .. } => {
                done.push(format!("{id}: its processes go on, outside {}", task.record.cgroup.display()))
            }
            Origin::Adopted => {
                done.push(format!("{id}: {} is no longer managed", task.record.cgroup.display()))
            }
        }
        task.ended.send_replace(true);
        task.record.forget(self.state_dir())?;
        if task.record.origin == Origin::Adopted {
            record::erase(self.state_dir(), &execution)?;
        }
        Ok(done)
    }

    /// Releases every task and takes away all that the agent made in the kernel.
    pub fn release_all(&mut self, caller: &Caller) -> Result<Vec<String>, NodeError> {
        self.only_operator(caller, "release everything")?;
        let mut done = Vec::new();
        let held: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| task.target.is_some()).map(|(id, _)| id.clone()).collect();
        for id in held {
            done.extend(self.let_go(&id)?);
        }
        if let Some(bpf) = self.bpf.take() {
            done.extend(bpf.remove()?);
        }
        if let Some(ground) = self.ground.take() {
            done.extend(ground.remove()?);
        }
        if done.is_empty() {
            done.push("nothing was held".into());
        }
        Ok(done)
    }
}

pub(super) fn status_of(status: launch::spec::ExitStatus) -> ExitStatus {
    let code = status.code();
    match status {
        launch::spec::ExitStatus::Code(code) => ExitStatus::Code(code),
        launch::spec::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
        launch::spec::ExitStatus::NotStarted { stage, error, errno: _ } => {
            ExitStatus::NotStarted { stage, error, code }
        }
    }
}
