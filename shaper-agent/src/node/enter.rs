//! Processes that put themselves into a task: `shaper exec`.
//!
//! The process that asks is the one that is moved, as the kernel names it; it goes on as whatever it executes next, with its
//! process id, so that whoever started it sees no difference. Nobody supervises it: its limits are the cgroup's, and the
//! task is over when nothing runs there any more.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use shaper_core::{
    id::{ExecutionId, TaskId},
    ledger::{Actor, Cause},
    limits::Limits,
    task::{ExitStatus, Origin, Phase, TaskStatus, Workload},
};
use shaper_proto::{
    failpoint,
    peer::{Caller, PeerProcess},
};
use tokio::io::Interest;

use super::{COMMAND_MAX, Node, NodeError, Task, not_established, now};
use crate::{
    kernel::{
        cgroup::{CgroupError, Open, ReadOnly, groups, groups::GroupEvents},
        process::{self, Facts},
    },
    launch::{self, async_fd, spec::Started},
    record::{self, Record},
};

/// What a process asks for.
#[derive(Clone, Debug)]
pub struct EnterRequest {
    /// The id of the task; `None`: one is made.
    pub task_id: Option<TaskId>,
    /// What it is an execution of.
    pub workload: Workload,
    /// What it may use.
    pub limits: Limits,
    /// What the process is about to execute, as it says.
    pub command: Vec<String>,
}

/// How long the parent of a main process may take to reap it, before nobody knows how it ended.
const REAPED_WITHIN: Duration = Duration::from_secs(1);
/// Where the kernel cannot tell that a cgroup is empty, it is looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// Whether a task is what was asked for.
fn has_asked(task: &Task, request: &EnterRequest) -> bool {
    let EnterRequest { task_id, workload, limits, command } = request;
    let record = &task.record;
    matches!(&record.origin, Origin::Entered { command: of } if *of == *command)
        && task_id.as_ref().is_none_or(|wanted| *wanted == record.execution.task)
        && record.workload.as_ref() == Some(workload)
        && record.limits == *limits
}

impl Node {
    /// Puts the caller's process into a cgroup of its own. Asked again by the same process for the same, it is there already.
    pub fn enter(
        &mut self,
        caller: &Caller,
        process: &PeerProcess,
        request: EnterRequest,
    ) -> Result<TaskStatus, NodeError> {
        let facts = Facts::of(process)
            .map_err(|source| NodeError::System { verb: "look at the process that asks", source })?;
        if let Some(id) = self.task_of(&facts.cgroup) {
            return self.is_there_already(caller, process, &facts, &id, &request);
        }
        if let Some((execution, started)) = self.has_begun(caller, process, &facts, &request) {
            self.move_in(&execution, process, started)?;
            return self.status(&execution.task);
        }
        self.may_enter(caller, &facts, &request)?;
        let EnterRequest { task_id, workload, limits, command } = request;
        let id = match task_id {
            Some(id) => id,
            None => self.make_id(&workload.name.to_string())?,
        };
        let attempt = self.next_attempt(caller, &id, None)?;
        let execution = ExecutionId { task: id.clone(), attempt };
        let origin = Origin::Entered { command };
        let at = (now(), self.boot_id.as_str());
        let record = Record::beginning(execution.clone(), caller.as_owner(), origin, limits, at);
        let record = Record { workload: Some(workload), ..record };
        self.begin(record, Cause::new(Actor::User(caller.uid), "exec"))?;
        let started = Started { pid: process.pid, start_time: facts.start_time, at: now() };
        self.move_in(&execution, process, started)
            .inspect_err(|error| self.abort(&execution, &launch::chain(error)))?;
        self.watch_entered(&execution)?;
        self.look_at_memory();
        if attempt > 1 {
            self.erase_if_over(&ExecutionId { attempt: attempt - 1, ..execution });
        }
        self.tell_task(&id);
        self.status(&id)
    }

    /// The task in whose cgroup that one is, from the mount point on.
    fn task_of(&self, cgroup: &Path) -> Option<TaskId> {
        let cgroup = self.config.hierarchies.v2.join(cgroup);
        let held = self.tasks.iter().filter(|(_, task)| task.target.is_some());
        let mut around = held.filter(|(_, task)| cgroup.starts_with(&task.record.cgroup));
        around.next().map(|(id, _)| id.clone())
    }

    /// The task that an agent before this one made for the process, and into which it did not move it any more.
    fn has_begun(
        &self,
        caller: &Caller,
        process: &PeerProcess,
        facts: &Facts,
        request: &EnterRequest,
    ) -> Option<(ExecutionId, Started)> {
        let task = self.tasks.get(request.task_id.as_ref()?)?;
        let started = task
            .started
            .filter(|started| (started.pid, started.start_time) == (process.pid, facts.start_time))?;
        let is_it = task.is_running() && caller.may_use(&task.record.owner) && has_asked(task, request);
        is_it.then(|| (task.record.execution.clone(), started))
    }

    /// A task within a task would be a way out of its limits.
    fn is_there_already(
        &self,
        caller: &Caller,
        process: &PeerProcess,
        facts: &Facts,
        id: &TaskId,
        request: &EnterRequest,
    ) -> Result<TaskStatus, NodeError> {
        let task = self.task(id)?;
        let is_its_own = task
            .started
            .is_some_and(|started| (started.pid, started.start_time) == (process.pid, facts.start_time));
        if is_its_own && has_asked(task, request) && caller.may_use(&task.record.owner) {
            return self.status(id);
        }
        let whose = if caller.may_use(&task.record.owner) { format!("`{id}`") } else { "another".into() };
        Err(NodeError::Precondition(format!(
            "this process is in task {whose} already, and does not leave its limits: start what is to have a task of its \
             own from outside of that one"
        )))
    }

    fn may_enter(&self, caller: &Caller, facts: &Facts, request: &EnterRequest) -> Result<(), NodeError> {
        let EnterRequest { command, .. } = request;
        let length = command.iter().map(String::len).sum::<usize>();
        if command.iter().all(String::is_empty) || length > COMMAND_MAX {
            return Err(NodeError::Invalid(format!(
                "the command has {length} bytes; there must be one, of {COMMAND_MAX} at most"
            )));
        }
        if facts.is_contained {
            return Err(NodeError::Precondition(
                "this process is in a container, whose manager ends and counts it by its cgroup: adopt the cgroup of \
                 the container instead (`shaper adopt`)"
                    .into(),
            ));
        }
        // What runs as root does so already, and not by the agent's doing.
        if !caller.is_operator() && !self.config.allowed_uids.contains(caller.uid) {
            return Err(NodeError::Precondition(format!(
                "this node has no tasks of uid {}: it takes {} (--allowed-uids)",
                caller.uid, self.config.allowed_uids
            )));
        }
        self.has_room_for(caller)
    }

    /// Moves the process into what was made for it, which its limits are in force on already.
    fn move_in(
        &mut self,
        execution: &ExecutionId,
        process: &PeerProcess,
        started: Started,
    ) -> Result<(), NodeError> {
        launch::note_started(&record::directory(self.state_dir(), execution), &started)?;
        failpoint::hit("enter-before-move");
        let task = self.task_mut(&execution.task)?;
        task.started = Some(started);
        let target = task.target.as_mut().ok_or_else(not_established)?;
        target.has_sockets = true;
        let target = &*target;
        let groups = [&target.v1_cpu, &target.v1_memory, &target.v1_io];
        let moved = process::while_held(process, |pid| -> Result<(), NodeError> {
            for group in groups.into_iter().flatten() {
                group.add(pid)?;
            }
            // Last: until it is in this one, it is not the task's.
            Ok(target.cgroup.add(pid)?)
        });
        moved.map_err(|source| NodeError::System {
            verb: "hold on to the process that asks, so that no other is moved (ptrace)",
            source,
        })??;
        failpoint::hit("enter-after-move");
        Ok(())
    }

    /// Waits, beside the node's thread, until nothing runs in the cgroup of a task any more.
    pub(super) fn watch_entered(&mut self, execution: &ExecutionId) -> Result<(), NodeError> {
        let main = launch::main_process(&record::directory(self.state_dir(), execution))?;
        let task = self.task_mut(&execution.task)?;
        if let Some((started, _)) = &main {
            task.started = Some(*started);
        }
        let cgroup = &task.target.as_ref().ok_or_else(not_established)?.cgroup;
        let events = cgroup.open_file(groups::EVENTS)?.ok_or_else(not_established)?;
        let main = main.and_then(|(_, pidfd)| pidfd);
        let (execution, handle) = (execution.clone(), self.handle.clone());
        self.runtime.spawn(async move {
            if let Err(error) = emptied(&events).await {
                tracing::warn!(%execution, %error, "cannot be told of the end of a task: it is looked for");
                while matches!(events.read(), Ok(GroupEvents { populated: true, .. })) {
                    tokio::time::sleep(LOOK).await;
                }
            }
            let status = match main {
                Some(main) => exit_of(main).await,
                None => ExitStatus::Unknown,
            };
            handle.tell(move |node| node.is_empty_now(&execution, status)).await;
        });
        Ok(())
    }

    fn is_empty_now(&mut self, execution: &ExecutionId, status: ExitStatus) {
        let Some(task) = self.tasks.get(&execution.task) else { return };
        if task.record.execution != *execution || !task.is_running() {
            return;
        }
        let Some(target) = &task.target else { return };
        let result = match target.cgroup.is_populated() {
            // Somebody has moved a process there since.
            Ok(true) => self.watch_entered(execution),
            Ok(false) => self.end(&execution.task, Phase::Ended { status, at: now() }),
            Err(error) if error.is_gone() => self.end(&execution.task, Phase::Ended { status, at: now() }),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = result {
            tracing::warn!(%execution, error = %launch::chain(&error), "cannot end a task that nothing runs in any more");
        }
    }
}

/// Why nobody tells of an end.
#[derive(Debug, thiserror::Error)]
enum WaitError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot wait for cgroup.events")]
    Wait(#[from] io::Error),
}

/// Returns when a cgroup has no process any more, or is gone.
async fn emptied(events: &Open<GroupEvents, ReadOnly>) -> Result<(), WaitError> {
    let changes = async_fd(events.as_fd(), Interest::PRIORITY)?;
    loop {
        // What changes after this is told of.
        match events.read() {
            Ok(GroupEvents { populated: true, .. }) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        changes.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// How a process ended that has ended, as far as its parent reaps it soon and the kernel tells.
async fn exit_of(main: OwnedFd) -> ExitStatus {
    let reaped = async {
        // Readable from its end on, and once more when it was reaped.
        let ended = async_fd(main.as_fd(), Interest::READABLE)?;
        loop {
            if let Some(status) = process::exit_status(main.as_fd()) {
                return Ok::<_, io::Error>(Some(status));
            }
            ended.readable().await?.clear_ready();
        }
    };
    match tokio::time::timeout(REAPED_WITHIN, reaped).await {
        Ok(Ok(Some(status))) => status,
        _ => ExitStatus::Unknown,
    }
}
