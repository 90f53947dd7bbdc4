//! How tasks end, and how they are let go.

use std::{collections::BTreeMap, path::Path, time::Duration};

use rustix::process::{Signal, pidfd_send_signal};
use shaper_core::{
    id::{ExecutionId, TaskId},
    ledger::{Actor, Cause},
    task::{ExitStatus, Origin, Phase, TaskStatus, UnixNanos},
};
use shaper_proto::{failpoint, peer::Caller};

use super::{ENDED_KEPT, Node, NodeError, Task, now, second_writer::Watch};
use crate::{
    actuate::{self, Knob},
    calibrate,
    config::Config,
    contact::boottime_ns,
    ground::GroundError,
    kernel::bpf::Bpf,
    launch::{self, Attachment},
    manager::Slice,
    record::{self, Record},
};

/// Of a task whose cgroup was a slice's, systemd lets go.
fn end_slice(cgroup: &Path) {
    let Some(slice) = Slice::of(cgroup) else { return };
    if let Err(error) = slice.stop() {
        let (cgroup, error) = (cgroup.display(), launch::chain(&error));
        tracing::warn!(%cgroup, error, "systemd keeps the slice of a task that is over");
    }
}

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
            let Some(target) = &task.target else { return self.status(id) };
            if grace.is_zero() {
                target.cgroup.kill()?;
            } else {
                let grace = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
                task.record.kill_at_boottime_ns = Some(boottime_ns().saturating_add(grace));
                let state_dir = self.state_dir().to_owned();
                let task = self.task(id)?;
                task.record.save(&state_dir)?;
                let directory = record::directory(&state_dir, &task.record.execution);
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
    pub(super) fn settle(&mut self, execution: &ExecutionId) -> Result<(), NodeError> {
        let Some(task) = self.tasks.get(&execution.task) else { return Ok(()) };
        if !task.is_running() || task.record.execution != *execution {
            return Ok(());
        }
        let directory = record::directory(self.state_dir(), execution);
        let phase = match launch::attach(&directory)? {
            Attachment::Ended(exit) => {
                let task = self.task_mut(&execution.task)?;
                if let Some(assignment) = &mut task.record.assignment {
                    assignment.lease_over = exit.lease_over;
                }
                Phase::Ended { status: status_of(exit.status), at: exit.at }
            }
            // It is about to say how the task ended; the next tick asks again.
            Attachment::Running(..) => return Ok(()),
            Attachment::Lost | Attachment::NeverStarted => {
                Phase::Ended { status: ExitStatus::Unknown, at: now() }
            }
        };
        self.end(&execution.task, phase)
    }

    pub(super) fn end(&mut self, id: &TaskId, phase: Phase) -> Result<(), NodeError> {
        let mut usage = self.usage(id).unwrap_or_else(|error| {
            tracing::warn!(task = %id, error = %launch::chain(&error), "cannot read what a task has used");
            Default::default()
        });
        // Nothing is in use any more; what is worth remembering is the peak.
        if let Some(Ok(peak)) = self.task(id)?.target.as_ref().map(actuate::memory_peak) {
            usage.memory_bytes = peak.map(|bytes| bytes.0).or(usage.memory_bytes);
        }
        self.end_shrink(id);
        if let Some(slot) = self.task(id)?.target.as_ref().map(|target| target.slot) {
            self.memory_told(slot);
        }
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        task.record.phase = phase;
        task.record.usage = Some(usage);
        task.record.kill_at_boottime_ns = None;
        failpoint::hit("agent-before-end-is-recorded");
        let saved = task.record.save(&state_dir);
        failpoint::hit("agent-after-end-is-recorded");
        task.unsaved = saved.is_err();
        task.ended.send_replace(true);
        self.tell_task(id);
        self.clean_up(id)?;
        self.forget_oldest()?;
        Ok(saved?)
    }

    /// Removes what an ended task has in the kernel, if its processes are gone; else the next tick
    /// tries again.
    pub(super) fn clean_up(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let Some(mut task) = self.tasks.remove(id) else { return Ok(()) };
        let result = self.take_down(&mut task, true);
        self.tasks.insert(id.clone(), task);
        result
    }

    /// Takes a task's place in the kernel away; may be repeated until `task.target` is `None`.
    /// `kill`: processes that are left are killed, and the cgroup stays until they are gone. Else
    /// they are moved out of ours.
    pub(super) fn take_down(&mut self, task: &mut Task, kill: bool) -> Result<(), NodeError> {
        let is_ours = !matches!(task.record.origin, Origin::Adopted);
        if let Some(target) = &task.target {
            if let Some(lending) = &self.lending {
                lending.withdraw(target.slot);
            }
            if kill && is_ours {
                match target.cgroup.is_populated() {
                    Ok(true) => {
                        target.cgroup.kill()?;
                        if target.cgroup.is_populated()? {
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
            failpoint::hit("end-after-slot");
            self.meter.remove(target.slot);
            self.writers.forget(target);
            if is_ours && let Some(ground) = &self.ground {
                let groups = [&target.v1_cpu, &target.v1_memory, &target.v1_io];
                let groups = groups.into_iter().flatten();
                let gone = if self.is_in_unit(&task.record) {
                    let left = ground.leave_unit(&target.cgroup, groups, kill);
                    if kill {
                        end_slice(&task.record.cgroup);
                    }
                    left
                } else {
                    ground.dissolve(&target.cgroup, groups)
                };
                match gone {
                    Err(GroundError::Cgroup(error)) if error.is_gone() => {}
                    other => other?,
                }
            }
            task.target = None;
        }
        if std::mem::take(&mut task.holds_slot) {
            self.free_slots.insert(task.record.slot);
        }
        Ok(())
    }

    fn forget_oldest(&mut self) -> Result<(), NodeError> {
        let mut ended: BTreeMap<u32, Vec<(UnixNanos, TaskId)>> = BTreeMap::new();
        for (id, task) in self.tasks.iter().filter(|(_, task)| !task.is_held()) {
            if let Phase::Ended { at, .. } = task.record.phase {
                ended.entry(task.record.owner.uid).or_default().push((at, id.clone()));
            }
        }
        for mut of_user in ended.into_values().filter(|of_user| of_user.len() > ENDED_KEPT) {
            of_user.sort();
            of_user.truncate(of_user.len() - ENDED_KEPT);
            for (_, id) in of_user {
                if let Some(task) = self.tasks.remove(&id) {
                    record::erase(self.state_dir(), &task.record.execution)?;
                }
            }
        }
        Ok(())
    }

    // ---- releasing

    /// Lifts the limits of a task, puts its baseline back and forgets it; its processes go on.
    pub fn release(&mut self, caller: &Caller, id: &TaskId) -> Result<Vec<String>, NodeError> {
        self.visible(caller, id)?;
        if self.task(id)?.is_held() {
            self.only_operator(caller, "release a running task")?;
        }
        self.let_go(id, &Cause::new(Actor::User(caller.uid), "release"))
    }

    pub(super) fn let_go(&mut self, id: &TaskId, cause: &Cause) -> Result<Vec<String>, NodeError> {
        let (done, task) = self.begin_release(id, cause)?;
        if let Some(task) = task {
            self.finish_release(task)?;
        }
        Ok(done)
    }

    /// Puts back what a task had before, for good; [`Node::finish_release`] is to follow, unless it is forgotten by this.
    fn begin_release(
        &mut self,
        id: &TaskId,
        cause: &Cause,
    ) -> Result<(Vec<String>, Option<Task>), NodeError> {
        let task = self.task(id)?;
        let execution = task.record.execution.clone();
        if !task.is_held() {
            self.tasks.remove(id);
            record::erase(self.state_dir(), &execution)?;
            return Ok((vec![format!("{id}: it had ended; its log and exit code are forgotten")], None));
        }
        let mut done = Vec::new();
        self.call_off(id);
        let Some(mut task) = self.tasks.remove(id) else { return Ok((done, None)) };
        if let (Some(target), Some(lending)) = (&task.target, &self.lending) {
            lending.withdraw(target.slot);
        }
        let too_much = match self.restore(&task, cause) {
            Ok(too_much) => too_much,
            Err(error) => {
                self.tasks.insert(id.clone(), task);
                return Err(error);
            }
        };
        for (knob, value) in &task.record.baseline {
            if let (Knob::Memory, Some(used)) = (knob, too_much) {
                let line = format!(
                    "{id}: memory is not `{value}` again, but stays at {}: the task uses {used}, and the kernel would \
                     kill it; set it yourself once that is less",
                    task.record.limits.memory
                );
                tracing::warn!("{line}");
                done.push(line);
                continue;
            }
            done.push(format!("{id}: {knob} is `{value}` again"));
        }
        self.leave_alone(&task.record);
        // From here on there is no way back: on a hybrid host it may be out of the groups of one controller already.
        task.record.let_go = true;
        if let Err(error) = task.record.save(self.state_dir()) {
            self.tasks.insert(id.clone(), task);
            return Err(error.into());
        }
        match task.record.origin {
            Origin::Launched { .. } if self.is_in_unit(&task.record) => {
                done.push(format!("{id}: its processes go on in {}", task.record.cgroup.display()))
            }
            Origin::Launched { .. } | Origin::Entered { .. } => {
                done.push(format!("{id}: its processes go on, outside {}", task.record.cgroup.display()))
            }
            Origin::Adopted => {
                done.push(format!("{id}: {} is no longer managed", task.record.cgroup.display()))
            }
        }
        Ok((done, Some(task)))
    }

    /// Takes the place of a task that is let go away, and forgets it.
    pub(super) fn finish_release(&mut self, mut task: Task) -> Result<(), NodeError> {
        if let Err(error) = self.take_down(&mut task, false) {
            self.tasks.insert(task.record.execution.task.clone(), task);
            return Err(error);
        }
        task.ended.send_replace(true);
        failpoint::hit("release-before-forgetting");
        self.forget(&task.record)
    }

    /// Forgets a task that was let go.
    pub(super) fn forget(&self, record: &Record) -> Result<(), NodeError> {
        record.forget(self.state_dir())?;
        // Of the others the supervisor goes on writing there.
        if !matches!(record.origin, Origin::Launched { .. }) {
            record::erase(self.state_dir(), &record.execution)?;
        }
        Ok(())
    }

    fn walk_once(&mut self, yes: bool) {
        if let Some(bpf) = &mut self.bpf {
            bpf.walk_once(yes);
        }
    }

    /// Releases every task and takes away all that the agent made in the kernel.
    pub fn release_all(&mut self, caller: &Caller) -> Result<Vec<String>, NodeError> {
        self.only_operator(caller, "release everything")?;
        let cause = Cause::new(Actor::User(caller.uid), "release --all");
        let mut done = Vec::new();
        let mut failed = Vec::new();
        let held: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| task.is_held()).map(|(id, _)| id.clone()).collect();
        // One walk through all sockets of the machine, and not two for each task.
        self.walk_once(true);
        let mut open = Vec::new();
        for id in held {
            match self.begin_release(&id, &cause) {
                Ok((lines, task)) => {
                    done.extend(lines);
                    open.extend(task);
                }
                Err(error) => failed.push(format!("{id} was not released: {}", launch::chain(&error))),
            }
        }
        if let Some(Err(error)) = self.bpf.as_ref().map(Bpf::walk_tcp) {
            self.walk_once(false);
            self.tasks.extend(open.into_iter().map(|task| (task.record.execution.task.clone(), task)));
            return Err(error.into());
        }
        for task in open {
            let id = task.record.execution.task.clone();
            if let Err(error) = self.finish_release(task) {
                failed.push(format!("{id} was not released: {}", launch::chain(&error)));
            }
        }
        self.walk_once(false);
        // What could not be released keeps its place, and the programs that serve it.
        if failed.is_empty() {
            failpoint::hit("release-without-tasks");
            let Config { state_dir, hierarchies, .. } = &self.config;
            done.extend(calibrate::restore_all(state_dir, &hierarchies.v2)?);
            self.events = None;
            self.close_books();
            self.writers = Watch::default();
            self.meter.tell_by(None);
            if let Some(bpf) = self.bpf.take() {
                done.extend(bpf.remove()?);
            }
            failpoint::hit("release-without-programs");
            if let Some(ground) = self.ground.take() {
                done.extend(ground.remove()?);
            }
        }
        if !failed.is_empty() {
            failed.extend(done);
            return Err(NodeError::Partly(failed));
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
