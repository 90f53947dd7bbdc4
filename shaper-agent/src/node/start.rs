//! Starting tasks, adopting cgroups, changing limits.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use shaper_common::abi::{SLOT_FIRST, SLOTS};
use shaper_core::{
    id::{ExecutionId, TaskId},
    limits::{Limits, LimitsChange},
    task::{Origin, Phase, TaskStatus},
};

use super::{LAUNCH_DEADLINE, Node, NodeError, RunRequest, not_established, now};
use crate::{
    actuate::{self, Raw},
    caller::Caller,
    kernel::{cgroup::Cgroup, features},
    launch::{self, spec::LaunchSpec},
    record::{self, Record},
};

impl Node {
    /// Starts a command as a task.
    pub fn run(&mut self, caller: &Caller, request: RunRequest) -> Result<TaskStatus, NodeError> {
        let run_as = self.may_run(caller, &request)?;
        let id = match request.task_id {
            Some(id) => id,
            None => self.make_id(&request.command)?,
        };
        let attempt = self.next_attempt(caller, &id)?;
        let record = Record {
            execution: ExecutionId { task: id.clone(), attempt },
            owner: caller.as_owner(),
            runs_as: run_as.as_owner(),
            origin: Origin::Launched { command: request.command.clone() },
            slot: 0,
            cgroup: PathBuf::new(),
            limits: request.limits,
            baseline: Raw::new(),
            created_at: now(),
            boot_id: self.boot_id.clone(),
            phase: Phase::Running,
            usage: None,
        };
        let execution = record.execution.clone();
        self.begin(record)?;
        let spec = LaunchSpec {
            execution: execution.clone(),
            command: request.command,
            env: request.env,
            cwd: request.cwd,
            uid: run_as.uid,
            gid: run_as.gid,
            groups: run_as.groups,
            cgroup: PathBuf::new(),
            join: Vec::new(),
            log_segment_bytes: launch::spec::DEFAULT_LOG_SEGMENT_BYTES,
        };
        if let Err(error) = self.launch(&id, spec) {
            self.abort(&id);
            return Err(error);
        }
        if attempt > 1 {
            let before = ExecutionId { attempt: attempt - 1, ..execution };
            record::erase(self.state_dir(), &before)?;
        }
        self.status(&id)
    }

    pub(super) fn may_run(&self, caller: &Caller, request: &RunRequest) -> Result<Caller, NodeError> {
        if request.command.is_empty() || request.command[0].is_empty() {
            return Err(NodeError::Invalid("no command was given".into()));
        }
        if !request.cwd.is_absolute() {
            return Err(NodeError::Invalid(format!(
                "the working directory `{}` is not an absolute path",
                request.cwd.display()
            )));
        }
        let has_nul = |text: &str| text.contains('\0');
        if request.command.iter().any(|text| has_nul(text))
            || request.env.iter().any(|(name, value)| has_nul(name) || has_nul(value) || name.contains('='))
        {
            return Err(NodeError::Invalid(
                "a NUL byte in the command, or a bad name in the environment".into(),
            ));
        }
        let run_as = match &request.run_as {
            Some(other) if !caller.is_operator() && other.uid != caller.uid => {
                return Err(NodeError::Denied(format!(
                    "uid {} may not run a task as uid {}: only root may choose whom a task runs as",
                    caller.uid, other.uid
                )));
            }
            // Their own user, but with groups that only the kernel may vouch for.
            Some(_) if !caller.is_operator() => caller.clone(),
            Some(other) => other.clone(),
            None => caller.clone(),
        };
        if run_as.uid == 0 && !self.config.allow_root_tasks {
            return Err(NodeError::Precondition(
                "this node runs no tasks as root: name a user with --user, or start the agent with \
                 --allow-root-tasks"
                    .into(),
            ));
        }
        let running =
            self.tasks.values().filter(|task| task.is_running() && task.record.owner.uid == caller.uid);
        if !caller.is_operator() && running.count() >= self.config.max_tasks_per_user {
            return Err(NodeError::Exhausted(format!(
                "uid {} has {} tasks on this node, which is the most that one user may have",
                caller.uid, self.config.max_tasks_per_user
            )));
        }
        Ok(run_as)
    }

    /// The command's name and the first number that is free.
    pub(super) fn make_id(&self, command: &[String]) -> Result<TaskId, NodeError> {
        let name = Path::new(&command[0]).file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let plain: String =
            name.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-').take(40).collect();
        let plain = plain.trim_matches('-');
        let plain = if plain.is_empty() { "task" } else { plain };
        for number in 1u32.. {
            let id: TaskId = format!("{plain}-{number}").parse()?;
            if !self.tasks.contains_key(&id) {
                return Ok(id);
            }
        }
        Err(NodeError::Exhausted("no id is free".into()))
    }

    pub(super) fn next_attempt(&self, caller: &Caller, id: &TaskId) -> Result<u32, NodeError> {
        let mut last = 0;
        if let Some(task) = self.tasks.get(id) {
            if task.target.is_some() || !caller.may_use(&task.record.owner) {
                return Err(NodeError::Exists(id.clone()));
            }
            last = task.record.execution.attempt;
        }
        // A released attempt has a directory but no record; its number is not given out again.
        let on_disk = record::executions(self.state_dir())?;
        let on_disk =
            on_disk.iter().filter(|execution| execution.task == *id).map(|execution| execution.attempt);
        Ok(on_disk.max().unwrap_or(0).max(last) + 1)
    }

    /// Makes everything in the kernel for a task and puts its limits in force, intent first.
    pub(super) fn begin(&mut self, mut record: Record) -> Result<(), NodeError> {
        self.establish()?;
        let Some(slot) = self.free_slots.pop_first() else {
            return Err(NodeError::Exhausted(format!(
                "this node has {} tasks, the most it can hold",
                SLOTS - SLOT_FIRST
            )));
        };
        record.slot = slot;
        if matches!(record.origin, Origin::Launched { .. }) {
            record.cgroup = self.config.cgroup_root.join(record.execution.to_string());
        }
        let id = record.execution.task.clone();
        record.save(self.state_dir())?;
        self.insert(record, None, None);
        let result = self.begin_in_kernel(&id);
        if result.is_err() {
            self.abort(&id);
        }
        result
    }

    pub(super) fn begin_in_kernel(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (slot, limits) = (record.slot, record.limits);
        let ground = self.ground.as_ref().ok_or_else(not_established)?;
        let cgroup = match record.origin {
            Origin::Launched { .. } => ground.make_task(&record.execution)?,
            Origin::Adopted => Cgroup::open(&self.config.hierarchies.v2, &record.cgroup)?,
        };
        let target = self.target(cgroup, record)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        // The cgroup itself first: from then on the kernel gives the slot to new children, and the
        // walk finds the older ones.
        bpf.assign(slot, &[target.cgroup.id()])?;
        bpf.join(slot, &target.cgroup.ids()?)?;
        self.task_mut(id)?.target = Some(target);
        self.change(id, &limits.as_change())
    }

    pub(super) fn launch(&mut self, id: &TaskId, mut spec: LaunchSpec) -> Result<(), NodeError> {
        let task = self.task(id)?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        spec.cgroup = target.cgroup.path().to_owned();
        let groups = [&target.v1_cpu, &target.v1_memory];
        spec.join = groups.into_iter().flatten().map(|group| group.directory().to_owned()).collect();
        let directory = record::directory(self.state_dir(), &spec.execution);
        launch::prepare(&directory, &spec)?;
        let spawned = launch::spawn(&self.config.launcher, &directory, LAUNCH_DEADLINE)?;
        self.runtime.spawn(async move {
            if let Err(error) = launch::ended(spawned.pidfd).await {
                tracing::warn!(%error, "cannot wait for a supervisor");
            }
        });
        match spawned.started {
            Ok(_) => self.watch_main(id, &directory),
            // It never ran, and that is recorded: a task that has ended.
            Err(_) => self.settle(id),
        }
    }

    /// Waits, beside the node's thread, for the end of the main process and for its exit to be
    /// recorded; then settles the task.
    pub(super) fn watch_main(&mut self, id: &TaskId, directory: &Path) -> Result<(), NodeError> {
        let main = launch::main_process(directory)?;
        let (id, directory, handle) = (id.clone(), directory.to_owned(), self.handle.clone());
        if let Some((started, _)) = &main {
            self.task_mut(&id)?.started = Some(*started);
        }
        let pidfd = main.and_then(|(_, pidfd)| pidfd);
        self.runtime.spawn(async move {
            if let Err(error) = wait_for_exit(pidfd, &directory).await {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot wait for a task");
            }
            handle
                .tell(move |node| {
                    if let Err(error) = node.settle(&id) {
                        tracing::error!(task = %id, error = %launch::chain(&error), "cannot settle a task");
                    }
                })
                .await;
        });
        Ok(())
    }

    /// Takes back everything that was made for a task whose start failed.
    pub(super) fn abort(&mut self, id: &TaskId) {
        let Some(mut task) = self.tasks.remove(id) else { return };
        let result = self.take_down(&mut task, true);
        if let Err(error) = result.and_then(|()| Ok(record::erase(self.state_dir(), &task.record.execution)?))
        {
            tracing::error!(task = %id, error = %launch::chain(&error), "cannot undo a failed start");
        }
    }

    // ---- changing

    /// Adopts an existing cgroup.
    pub fn adopt(
        &mut self,
        caller: &Caller,
        id: TaskId,
        path: PathBuf,
        limits: Limits,
    ) -> Result<TaskStatus, NodeError> {
        self.only_operator(caller, "adopt a cgroup")?;
        let attempt = self.next_attempt(caller, &id)?;
        let record = Record {
            execution: ExecutionId { task: id.clone(), attempt },
            owner: caller.as_owner(),
            runs_as: caller.as_owner(),
            origin: Origin::Adopted,
            slot: 0,
            cgroup: path,
            limits,
            baseline: Raw::new(),
            created_at: now(),
            boot_id: self.boot_id.clone(),
            phase: Phase::Running,
            usage: None,
        };
        self.may_adopt(&record.cgroup)?;
        self.begin(record)?;
        // Sockets that are older than the adoption join the pacing loop.
        self.bpf.as_ref().ok_or_else(not_established)?.walk_tcp()?;
        if !features::is_at_least(6, 12) {
            self.note(
                &id,
                "connections older than the adoption follow the network limit only when it is changed",
            );
        }
        self.status(&id)
    }

    pub(super) fn may_adopt(&self, path: &Path) -> Result<(), NodeError> {
        let mount = &self.config.hierarchies.v2;
        Cgroup::open(mount, path)?;
        if path == mount {
            return Err(NodeError::Invalid("the root of the hierarchy cannot be adopted".into()));
        }
        if path.starts_with(&self.config.cgroup_root) || self.config.cgroup_root.starts_with(path) {
            return Err(NodeError::Invalid(format!("{} is the agent's own", path.display())));
        }
        for task in self.tasks.values().filter(|task| task.target.is_some()) {
            let other = &task.record.cgroup;
            if path.starts_with(other) || other.starts_with(path) {
                return Err(NodeError::Precondition(format!(
                    "{} overlaps with {}, which is task `{}`; a cgroup belongs to one task",
                    path.display(),
                    other.display(),
                    task.record.execution.task
                )));
            }
        }
        Ok(())
    }

    /// Changes limits of a running task, all or none.
    pub fn set_limits(
        &mut self,
        caller: &Caller,
        id: &TaskId,
        change: &LimitsChange,
    ) -> Result<TaskStatus, NodeError> {
        self.visible(caller, id)?;
        self.only_operator(caller, "change the limits of a task")?;
        if change.is_empty() {
            return Err(NodeError::Invalid("the request changes nothing".into()));
        }
        if !self.task(id)?.is_running() {
            return Err(NodeError::Precondition(format!("task `{id}` has ended")));
        }
        self.change(id, change)?;
        self.status(id)
    }

    pub(super) fn change(&mut self, id: &TaskId, change: &LimitsChange) -> Result<(), NodeError> {
        let task = self.tasks.get_mut(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        // The ledger is on disk before the first knob is turned.
        let mut baseline = task.record.baseline.clone();
        actuate::note_baseline(target, bpf, change, &mut baseline)?;
        let before = task.record.limits;
        task.record.baseline = baseline;
        task.record.limits = before.with(change);
        task.record.save(&self.config.state_dir)?;
        if let Err(error) = actuate::apply(target, bpf, change) {
            task.record.limits = before;
            task.record.save(&self.config.state_dir)?;
            return Err(error.into());
        }
        Ok(())
    }
}

/// Returns when the exit of an attempt is recorded, or nobody is left who could record it.
async fn wait_for_exit(main: Option<OwnedFd>, directory: &Path) -> Result<(), NodeError> {
    let system = |verb| move |source| NodeError::System { verb, source };
    if let Some(main) = main {
        launch::ended(main).await.map_err(system("wait for the main process"))?;
    }
    launch::recorded(directory).await?;
    Ok(())
}
