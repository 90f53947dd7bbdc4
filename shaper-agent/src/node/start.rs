//! Starting tasks, adopting cgroups, changing limits.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Component, Path, PathBuf},
};

use shaper_common::abi::{LEVELS_MAX, SLOT_FIRST};
use shaper_core::{
    gpu::CardSet,
    id::{ExecutionId, TaskId},
    ledger::{Actor, Cause},
    limits::{Limits, LimitsChange},
    spec::Image,
    task::{ExitStatus, Origin, Phase, TaskStatus},
};
use shaper_proto::failpoint;
use shaper_proto::peer::Caller;
use tokio::sync::oneshot;

use super::{
    COMMAND_MAX, HIRE_DEADLINE, LAUNCH_DEADLINE, Node, NodeError, RunRequest, SUPERVISOR_LOST,
    not_established, now,
};
use crate::{
    config::TasksIn,
    containers::{self, Containers, Order, Parent},
    durable, ground,
    kernel::{cgroup::Cgroup, features},
    launch::{
        self, Attachment, Hired, SpawnError, Spawned,
        spec::{LaunchSpec, Lease},
    },
    manager::{Service, Slice},
    record::{self, Record},
};

/// Refuses what a container is not given.
fn may_be_a_container(request: &RunRequest) -> Result<(), NodeError> {
    let cards = request.limits.gpu_cards.unwrap_or(CardSet::NONE);
    if request.gpus > 0 || !cards.is_empty() {
        return Err(NodeError::Precondition(
            "a task with an image is given no GPU cards: their devices and libraries are not in its container; run it \
             without the image, or without cards"
                .into(),
        ));
    }
    if let Some(name) = containers::not_for_a_file(&request.env) {
        return Err(NodeError::Invalid(format!(
            "the variable `{}` has a name or a value that no container can be given: a name is letters, digits, `_`, `.` \
             and `-`, and a value is one line",
            name.escape_debug()
        )));
    }
    // There a runtime may have left a descriptor of the node's open (CVE-2024-21626).
    if request.cwd.starts_with("/proc") {
        return Err(NodeError::Invalid("the working directory of a container cannot be below /proc".into()));
    }
    Ok(())
}

impl Node {
    /// Starts a command as a task. The answer comes when its supervisor has said whether it runs: a
    /// program or a working directory that does not answer must not hold up the node.
    pub fn run(
        &mut self,
        caller: &Caller,
        mut request: RunRequest,
    ) -> Result<oneshot::Receiver<Result<TaskStatus, NodeError>>, NodeError> {
        let run_as = self.may_run(caller, &request)?;
        self.choose_cards(&mut request)?;
        let mps_memory = self.limit_by_mps(&mut request);
        let id = match (request.task_id, &request.image) {
            (Some(id), _) => id,
            (None, Some(image)) => self.make_id(image.base())?,
            (None, None) => self.make_id(&request.command[0])?,
        };
        let attempt = self.next_attempt(caller, &id, request.attempt)?;
        let execution = ExecutionId { task: id.clone(), attempt };
        let owner = request.owner.unwrap_or(caller.as_owner());
        let shown = request.image.iter().map(Image::to_string).chain(request.command.iter().cloned());
        let origin = Origin::Launched { command: shown.collect() };
        let at = (now(), self.boot_id.as_str());
        let record = Record {
            runs_as: run_as.as_owner(),
            assignment: request.assignment,
            mps_memory,
            cgroup: self.slice_for(request.image.as_ref(), &execution)?,
            ..Record::beginning(execution.clone(), owner, origin, request.limits, at)
        };
        let cause = match &record.assignment {
            Some(_) => Cause::new(Actor::Broker(self.highest_epoch), "start"),
            None => Cause::new(Actor::User(caller.uid), "run"),
        };
        let lease_seconds = record.assignment.as_ref().and_then(|assignment| assignment.lease_seconds);
        let lease = lease_seconds.map(|seconds| Lease { contact: self.contact.path().to_owned(), seconds });
        self.begin(record, cause)?;
        let container = request.image.map(|image| (image, run_as.clone()));
        let spec = LaunchSpec {
            execution: execution.clone(),
            command: request.command,
            env: request.env,
            cwd: request.cwd,
            uid: run_as.uid,
            gid: run_as.gid,
            groups: run_as.groups,
            cgroup: PathBuf::new(),
            birthplace: None,
            is_trusted: false,
            afterwards: Vec::new(),
            join: Vec::new(),
            supervisor_groups: Vec::new(),
            log_segment_bytes: launch::spec::DEFAULT_LOG_SEGMENT_BYTES,
            lease,
        };
        let answer = self
            .launch(&id, spec, container)
            .inspect_err(|error| self.abort(&execution, &launch::chain(error)))?;
        if attempt > 1 {
            self.erase_if_over(&ExecutionId { attempt: attempt - 1, ..execution });
        }
        Ok(answer)
    }

    pub(super) fn may_run(&self, caller: &Caller, request: &RunRequest) -> Result<Caller, NodeError> {
        // An image has a command and a directory of its own.
        let is_the_images = |is_left_out: bool| is_left_out && request.image.is_some();
        let has_program = request.command.first().is_some_and(|program| !program.is_empty());
        if !(has_program || is_the_images(request.command.is_empty())) {
            return Err(NodeError::Invalid("no command was given".into()));
        }
        if request.image.is_some() {
            self.parent_of_containers()?;
            may_be_a_container(request)?;
        }
        if !(request.cwd.is_absolute() || is_the_images(request.cwd.as_os_str().is_empty())) {
            return Err(NodeError::Invalid(format!(
                "the working directory `{}` is not an absolute path",
                request.cwd.display()
            )));
        }
        let length = request.command.iter().map(String::len).sum::<usize>()
            + request.env.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        if length > COMMAND_MAX {
            return Err(NodeError::Invalid(format!(
                "command and environment have {length} bytes; {COMMAND_MAX} is the most"
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
        if run_as.uid != 0 && !self.config.allowed_uids.contains(run_as.uid) {
            return Err(NodeError::Precondition(format!(
                "this node runs no tasks as uid {}: it takes {} (--allowed-uids)",
                run_as.uid, self.config.allowed_uids
            )));
        }
        // What the broker says of groups no kernel vouches for.
        let has_group_of_root = run_as.gid == 0 || run_as.groups.contains(&0);
        if request.assignment.is_some() && has_group_of_root && !self.config.allow_root_tasks {
            return Err(NodeError::Precondition(
                "this node runs none of the broker's tasks with root's group (gid 0): name another, or start the \
                 agent with --allow-root-tasks"
                    .into(),
            ));
        }
        self.has_room_for(caller)?;
        Ok(run_as)
    }

    /// Where the cgroups of containers have to be, if tasks with an image can be run here.
    fn parent_of_containers(&self) -> Result<Parent, NodeError> {
        let Some(containers) = &self.config.containers else {
            return Err(NodeError::Precondition(
                "this node runs no tasks with an image: start its agent with --containers docker or --containers podman"
                    .into(),
            ));
        };
        if !self.config.hierarchies.v1.is_empty() {
            return Err(NodeError::Precondition(
                "this node runs no tasks with an image: its controllers are those of cgroup v1; boot it with cgroup v2 \
                 alone (systemd.unified_cgroup_hierarchy=1)"
                    .into(),
            ));
        }
        let parent = containers.parent();
        parent.map_err(|why| NodeError::Precondition(format!("this node can run no container now: {why}")))
    }

    /// The slice of a task whose container has to be in one; empty: it is where all tasks are.
    fn slice_for(&self, image: Option<&Image>, execution: &ExecutionId) -> Result<PathBuf, NodeError> {
        if image.is_none() || self.parent_of_containers()? == Parent::Path {
            return Ok(PathBuf::new());
        }
        if self.config.tasks_in != TasksIn::Units {
            return Err(NodeError::Precondition(
                "Docker puts containers into slices of systemd's here, and this agent's tasks are to be below \
                 --cgroup-root: start it with --tasks-in units, or Docker with the cgroup driver cgroupfs"
                    .into(),
            ));
        }
        Ok(self.config.hierarchies.v2.join(Slice::named(&self.unit_name(execution)).cgroup()))
    }

    /// One user cannot take all the slots.
    pub(super) fn has_room_for(&self, caller: &Caller) -> Result<(), NodeError> {
        let running =
            self.tasks.values().filter(|task| task.is_running() && task.record.owner.uid == caller.uid);
        if !caller.is_operator() && running.count() >= self.config.max_tasks_per_user {
            return Err(NodeError::Exhausted(format!(
                "uid {} has {} tasks on this node, which is the most that one user may have",
                caller.uid, self.config.max_tasks_per_user
            )));
        }
        Ok(())
    }

    /// The program's name and the first number that is free.
    pub(super) fn make_id(&self, program: &str) -> Result<TaskId, NodeError> {
        let name = Path::new(program).file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let plain: String =
            name.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-').take(40).collect();
        let plain = plain.trim_matches('-');
        let plain = if plain.is_empty() { "task" } else { plain };
        let on_disk = record::executions(self.state_dir())?;
        for number in 1u32.. {
            let id: TaskId = format!("{plain}-{number}").parse()?;
            if !self.tasks.contains_key(&id) && !on_disk.iter().any(|execution| execution.task == id) {
                return Ok(id);
            }
        }
        Err(NodeError::Exhausted("no id is free".into()))
    }

    /// The number of the next run of a task. The numbers of released ones, which have a directory but no
    /// record, are not given out again.
    pub(super) fn next_attempt(
        &self,
        caller: &Caller,
        id: &TaskId,
        wanted: Option<u32>,
    ) -> Result<u32, NodeError> {
        self.next_attempt_beside(caller, id, wanted, &record::executions(self.state_dir())?)
    }

    /// The same, where those that are on disk are known.
    pub(super) fn next_attempt_beside(
        &self,
        caller: &Caller,
        id: &TaskId,
        wanted: Option<u32>,
        on_disk: &[ExecutionId],
    ) -> Result<u32, NodeError> {
        if let Some(task) = self.tasks.get(id)
            && (task.is_held() || !caller.may_use(&task.record.owner))
        {
            return Err(NodeError::Exists(id.clone()));
        }
        let of_task = on_disk.iter().filter(|execution| execution.task == *id);
        let last = of_task.map(|execution| execution.attempt).max().unwrap_or(0);
        match wanted {
            None => Ok(last + 1),
            Some(wanted) if wanted > last => Ok(wanted),
            Some(wanted) => Err(NodeError::Precondition(format!(
                "attempt {wanted} of `{id}` is over: this node has seen attempt {last}"
            ))),
        }
    }

    /// Makes everything in the kernel for a task and puts its limits in force, intent first.
    pub(super) fn begin(&mut self, mut record: Record, cause: Cause) -> Result<(), NodeError> {
        self.establish()?;
        let Some(slot) = self.free_slots.pop_first() else {
            return Err(NodeError::Exhausted(format!(
                "this node has {} tasks, the most it can hold (see shaper-agent --max-tasks)",
                self.bpf.as_ref().map_or(0, |bpf| bpf.slots() - SLOT_FIRST)
            )));
        };
        record.slot = slot;
        match (&record.origin, &self.config.tasks_in) {
            (Origin::Adopted, _) => {}
            (Origin::Launched { .. }, _) if Slice::of(&record.cgroup).is_some() => {}
            (Origin::Launched { .. }, TasksIn::Units) => {
                let unit = Service::cgroup(&self.unit(&record.execution));
                record.cgroup = self.config.hierarchies.v2.join(unit).join(ground::TASK);
            }
            // A process that is there already has a unit of its own, or somebody else's.
            (Origin::Launched { .. }, TasksIn::CgroupRoot) | (Origin::Entered { .. }, _) => {
                record.cgroup = self.config.cgroup_root.join(record.execution.to_string());
            }
        }
        let execution = record.execution.clone();
        failpoint::hit("agent-before-record");
        if let Err(error) = record.save(self.state_dir()) {
            self.free_slots.insert(slot);
            return Err(error.into());
        }
        self.insert(record, None);
        self.task_mut(&execution.task)?.holds_slot = true;
        failpoint::hit("agent-after-record");
        self.begin_in_kernel(&execution.task, &cause)
            .inspect_err(|error| self.abort(&execution, &launch::chain(error)))
    }

    fn begin_in_kernel(&mut self, id: &TaskId, cause: &Cause) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (slot, limits) = (record.slot, record.limits);
        let adopted = record.origin == Origin::Adopted;
        let in_unit = self.is_in_unit(record);
        let cgroup = if in_unit {
            let (supervisor, cgroup) = self.hire(&record.execution, Slice::of(&record.cgroup))?;
            self.task_mut(id)?.supervisor = Some(supervisor);
            cgroup
        } else if adopted {
            Cgroup::open(&self.config.hierarchies.v2, &record.cgroup)?
        } else {
            self.ground.as_ref().ok_or_else(not_established)?.make_task(&record.execution)?
        };
        let record = &self.task(id)?.record;
        let mut target = self.target(cgroup, record)?;
        failpoint::hit("start-after-cgroup");
        // For those of rules one walk through all sockets follows.
        target.has_sockets = adopted && record.adopted_by.is_none();
        let cgroup_id = target.cgroup.id();
        self.task_mut(id)?.target = Some(target);
        // The cgroup itself first: from then on the kernel gives the slot to new children, and the
        // walk finds the older ones.
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        bpf.assign(slot, cgroup_id)?;
        let ids = self.task(id)?.target.as_ref().ok_or_else(not_established)?.cgroup.ids()?;
        self.bpf.as_mut().ok_or_else(not_established)?.join(slot, &ids)?;
        failpoint::hit("start-after-slot");
        self.meter_task(id)?;
        self.change(id, &limits.as_change(), cause)
    }

    /// The unit of an execution. Several agents on one machine have cgroup roots of different names.
    fn unit(&self, execution: &ExecutionId) -> String {
        format!("{}.service", self.unit_name(execution))
    }

    fn unit_name(&self, execution: &ExecutionId) -> String {
        let root = self.config.cgroup_root.file_name().and_then(|name| name.to_str()).unwrap_or("shaper");
        format!("{root}-{execution}")
    }

    /// Whether a task that shaper started has a unit, rather than a cgroup below the agent's.
    pub(super) fn is_in_unit(&self, record: &Record) -> bool {
        matches!(record.origin, Origin::Launched { .. })
            && record.cgroup.starts_with(self.config.hierarchies.v2.join(Service::SLICE))
    }

    /// Has systemd start a supervisor, which waits for a word then, and makes the cgroup of its task in its unit, unless that
    /// is a slice's.
    fn hire(&self, execution: &ExecutionId, slice: Option<Slice>) -> Result<(Hired, Cgroup), NodeError> {
        let failed = |verb| move |source| NodeError::System { verb, source };
        let (ours, theirs) =
            UnixStream::pair().map_err(failed("make a line to the supervisor of the task"))?;
        let name = self.unit(execution);
        let unit = self.config.hierarchies.v2.join(Service::cgroup(&name));
        let directory = record::directory(self.state_dir(), execution);
        let launcher = &self.config.launcher;
        let command = [launcher.as_os_str(), "--unit".as_ref(), directory.as_os_str()];
        let description = format!("Task {execution} of shaper");
        let command = command.map(|argument| argument.to_string_lossy().into_owned()).into();
        let cgroup_of_slice = slice.as_ref().map(|slice| self.config.hierarchies.v2.join(slice.cgroup()));
        Service { name, description, command, line: theirs.into(), slice }.start()?;
        let supervisor = Hired::answered(ours, HIRE_DEADLINE)
            .map_err(failed("hear from the supervisor of the task, which systemd was to start"))?;
        let ground = self.ground.as_ref().ok_or_else(not_established)?;
        let cgroup = match cgroup_of_slice {
            Some(cgroup) => ground.open_slice(&cgroup)?,
            None => ground.divide_unit(&unit, supervisor.pid())?,
        };
        Ok((supervisor, cgroup))
    }

    /// Measures a task whose slot has its cgroups.
    pub(super) fn meter_task(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let launched = matches!(self.task(id)?.record.origin, Origin::Launched { .. });
        let target = self.tasks.get(id).and_then(|task| task.target.as_ref()).ok_or_else(not_established)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        if let Some(group) = &target.v1_io {
            bpf.join_v1(target.slot, group.id()?)?;
        }
        bpf.share_network(target.slot);
        // What shaper starts opens no card that it was not granted; what others started is left as it is.
        if launched && bpf.admitted(target.slot).is_none() {
            bpf.admit(target.slot, Some(CardSet::NONE));
        }
        self.meter.add(bpf, target);
        self.writers.watch(target);
        let events = self.meter.memory_events(target.slot).unwrap_or_default();
        self.task_mut(id)?.memory_events = events;
        Ok(())
    }

    fn launch(
        &mut self,
        id: &TaskId,
        mut spec: LaunchSpec,
        container: Option<(Image, Caller)>,
    ) -> Result<oneshot::Receiver<Result<TaskStatus, NodeError>>, NodeError> {
        let hired = self.task_mut(id)?.supervisor.take();
        if hired.is_none() {
            spec.supervisor_groups = self.ground.as_ref().ok_or_else(not_established)?.supervisors()?;
        }
        let task = self.task_mut(id)?;
        let target = task.target.as_mut().ok_or_else(not_established)?;
        target.has_sockets = true;
        spec.cgroup = target.cgroup.path().to_owned();
        let groups = [&target.v1_cpu, &target.v1_memory, &target.v1_io];
        spec.join = groups.into_iter().flatten().map(|group| group.directory().to_owned()).collect();
        let execution = spec.execution.clone();
        let directory = record::directory(self.state_dir(), &execution);
        if let Some((image, run_as)) = container {
            self.contain(&mut spec, &image, &run_as, &directory)?;
        }
        launch::prepare(&directory, &spec)?;
        failpoint::hit("agent-before-spawn");

        let (reply, answer) = oneshot::channel();
        let (launcher, handle) = (self.config.launcher.clone(), self.handle.clone());
        self.runtime.spawn(async move {
            let spawn = move || match hired {
                Some(hired) => hired.go(&directory, LAUNCH_DEADLINE),
                None => launch::spawn(&launcher, &directory, LAUNCH_DEADLINE),
            };
            let spawned = tokio::task::spawn_blocking(spawn).await;
            handle
                .tell(move |node| {
                    let spawned = spawned.unwrap_or_else(|error| {
                        Err(SpawnError::Io {
                            operation: "start",
                            directory: record::directory(node.state_dir(), &execution),
                            source: std::io::Error::other(error),
                        })
                    });
                    // The caller may have gone away; the task is there all the same.
                    let _ = reply.send(node.launched(&execution, spawned));
                })
                .await;
        });
        Ok(answer)
    }

    /// Makes of a task the client that runs it in a container.
    fn contain(
        &self,
        spec: &mut LaunchSpec,
        image: &Image,
        run_as: &Caller,
        directory: &Path,
    ) -> Result<(), NodeError> {
        let (Some(containers), Some(ground)) = (&self.config.containers, &self.ground) else {
            return Err(not_established());
        };
        let target = self.task(&spec.execution.task)?.target.as_ref().ok_or_else(not_established)?;
        let env_file = directory.join("env");
        durable::write(&env_file, containers::env_file(&spec.env).as_bytes(), 0o600)?;
        let name = self.unit_name(&spec.execution);
        let parent = match Slice::of(&spec.cgroup) {
            Some(slice) => PathBuf::from(slice.name()),
            None => {
                let place = spec.cgroup.strip_prefix(&self.config.hierarchies.v2).unwrap_or(&spec.cgroup);
                Path::new("/").join(place)
            }
        };
        let order = Order {
            name: &name,
            task: spec.execution.task.as_str(),
            image,
            command: &spec.command,
            cwd: &spec.cwd,
            run_as,
            parent: &parent,
            env_file: &env_file,
        };
        spec.command = containers.run(&order);
        spec.afterwards = containers.remove(&name);
        spec.env = Containers::env();
        spec.cwd = "/".into();
        (spec.uid, spec.gid, spec.groups) = (0, 0, Vec::new());
        spec.is_trusted = true;
        spec.birthplace = Some(ground.make_client(&target.cgroup)?);
        Ok(())
    }

    /// The supervisor has said what became of the start, or has not said anything in time.
    fn launched(
        &mut self,
        execution: &ExecutionId,
        spawned: Result<Spawned, SpawnError>,
    ) -> Result<TaskStatus, NodeError> {
        failpoint::hit("agent-after-spawn");
        let id = &execution.task;
        match spawned {
            Ok(Spawned { pidfd, started: Ok(_), .. }) => {
                self.look_out_for(execution, pidfd);
                self.watch_main(execution)?;
                self.look_at_memory();
            }
            Ok(Spawned { pidfd, started: Err(said), .. }) => {
                self.reap(pidfd);
                self.never_ran(execution, &said)?;
            }
            Err(SpawnError::NotReady { pidfd, after, .. }) => {
                self.note(id, &format!("its supervisor has not said within {after:?} that it runs"));
                self.watch_supervisor(execution, pidfd);
            }
            Err(error) => {
                let text = launch::chain(&error);
                if let SpawnError::Protocol { pidfd, .. } = error {
                    self.reap(pidfd);
                }
                self.never_ran(execution, &text)?;
            }
        }
        self.tell_task(id);
        self.status(id)
    }

    /// The start failed. If the supervisor recorded why, that is what is told; else what it said.
    fn never_ran(&mut self, execution: &ExecutionId, said: &str) -> Result<(), NodeError> {
        let directory = record::directory(self.state_dir(), execution);
        match launch::abandon(&directory, said)? {
            Attachment::Running(..) => self.watch_main(execution),
            _ => self.settle(execution),
        }
    }

    /// Waits for a supervisor, which is our child, so that it does not stay a zombie.
    fn reap(&self, supervisor: OwnedFd) {
        self.runtime.spawn(async move {
            if let Err(error) = launch::ended(supervisor).await {
                tracing::warn!(%error, "cannot wait for a supervisor");
            }
        });
    }

    /// Waits for the end of a supervisor whose task runs, and notes it if the task runs on.
    pub(super) fn look_out_for(&self, execution: &ExecutionId, supervisor: OwnedFd) {
        let (execution, handle) = (execution.clone(), self.handle.clone());
        self.runtime.spawn(async move {
            if let Err(error) = launch::ended(supervisor).await {
                tracing::warn!(%execution, %error, "cannot wait for a supervisor");
            }
            handle.tell(move |node| node.supervisor_is_over(&execution)).await;
        });
    }

    fn supervisor_is_over(&mut self, execution: &ExecutionId) {
        let Some(task) = self.tasks.get(&execution.task) else { return };
        if task.record.execution != *execution || !task.is_running() {
            return;
        }
        let directory = record::directory(self.state_dir(), execution);
        if matches!(launch::attach(&directory), Ok(Attachment::Lost)) {
            self.note(&execution.task, SUPERVISOR_LOST);
        }
    }

    fn watch_supervisor(&self, execution: &ExecutionId, supervisor: OwnedFd) {
        let (execution, handle) = (execution.clone(), self.handle.clone());
        self.runtime.spawn(async move {
            if let Err(error) = launch::ended(supervisor).await {
                tracing::warn!(%execution, %error, "cannot wait for a supervisor");
            }
            handle.tell(move |node| node.main_is_over(&execution)).await;
        });
    }

    /// Waits, beside the node's thread, for the end of the main process and for its exit to be
    /// recorded; then settles the task.
    pub(super) fn watch_main(&mut self, execution: &ExecutionId) -> Result<(), NodeError> {
        let directory = record::directory(self.state_dir(), execution);
        let main = launch::main_process(&directory)?;
        if let Some((started, _)) = &main {
            self.task_mut(&execution.task)?.started = Some(*started);
        }
        let pidfd = main.and_then(|(_, pidfd)| pidfd);
        let (execution, handle) = (execution.clone(), self.handle.clone());
        self.runtime.spawn(async move {
            if let Err(error) = wait_for_exit(pidfd, &directory).await {
                tracing::warn!(%execution, error = %launch::chain(&error), "cannot wait for a task");
            }
            handle.tell(move |node| node.main_is_over(&execution)).await;
        });
        Ok(())
    }

    fn main_is_over(&mut self, execution: &ExecutionId) {
        match self.tasks.get_mut(&execution.task) {
            // Another attempt has its place.
            Some(task) if task.record.execution != *execution => return,
            Some(task) => task.over = true,
            None => return,
        }
        if let Err(error) = self.settle(execution) {
            tracing::warn!(%execution, error = %launch::chain(&error), "cannot settle a task; the next tick tries again");
        }
    }

    /// Takes back everything that was made for a task whose start failed. A process that wanted to enter goes on. What cannot be taken back now
    /// is tried again by the ticks, as for any task that has ended.
    pub(super) fn abort(&mut self, execution: &ExecutionId, why: &str) {
        let Some(mut task) = self.tasks.remove(&execution.task) else { return };
        let status = ExitStatus::NotStarted { stage: "preparation".into(), error: why.into(), code: 126 };
        task.record.phase = Phase::Ended { status, at: now() };
        task.ended.send_replace(true);
        let kill = !matches!(task.record.origin, Origin::Entered { .. });
        let result = self.take_down(&mut task, kill);
        if result.is_ok() && task.target.is_none() {
            if let Err(error) = record::erase(self.state_dir(), execution) {
                tracing::warn!(%execution, %error, "cannot remove the record of a failed start");
            }
            return;
        }
        if let Err(error) = result {
            tracing::warn!(%execution, error = %launch::chain(&error), "cannot undo a failed start yet");
        }
        task.unsaved = task.record.save(self.state_dir()).is_err();
        self.tasks.insert(execution.task.clone(), task);
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
        let attempt = self.next_attempt(caller, &id, None)?;
        let execution = ExecutionId { task: id.clone(), attempt };
        let at = (now(), self.boot_id.as_str());
        let record = Record::beginning(execution, caller.as_owner(), Origin::Adopted, limits, at);
        let record = Record { cgroup: path, ..record };
        self.begin_adopted(record, Cause::new(Actor::User(caller.uid), "adopt"))?;
        self.join_older_sockets(std::slice::from_ref(&id))?;
        self.status(&id)
    }

    /// Brings the cgroup of a record under management; [`Node::join_older_sockets`] is to follow.
    pub(super) fn begin_adopted(&mut self, mut record: Record, cause: Cause) -> Result<(), NodeError> {
        record.cgroup_id = Some(self.may_adopt(&record.cgroup)?);
        self.begin(record, cause)
    }

    /// Sockets that are older than the adoption of these tasks join the pacing loop.
    pub(super) fn join_older_sockets(&mut self, adopted: &[TaskId]) -> Result<(), NodeError> {
        if let Err(error) = self.bpf.as_ref().ok_or_else(not_established)?.walk_tcp() {
            let error = launch::chain(&error);
            for id in adopted {
                self.note(id, &format!("its older connections may not follow a network limit: {error}"));
            }
        }
        if !features::is_at_least(6, 12) {
            for id in adopted {
                self.note(
                    id,
                    "connections older than the adoption follow the network limit only when it is changed",
                );
            }
        }
        Ok(())
    }

    /// Refuses what cannot be adopted; the id of what can.
    fn may_adopt(&self, path: &Path) -> Result<u64, NodeError> {
        let mount = &self.config.hierarchies.v2;
        if path.components().any(|part| matches!(part, Component::ParentDir | Component::CurDir)) {
            return Err(NodeError::Invalid(format!("{} must be a plain path, without `..`", path.display())));
        }
        let id = Cgroup::open(mount, path)?.id();
        if path == mount {
            return Err(NodeError::Invalid("the root of the hierarchy cannot be adopted".into()));
        }
        // The kernel programs look so far for whose a packet is.
        let depth = path.strip_prefix(mount).map_or(0, |below| below.components().count());
        if depth > LEVELS_MAX as usize {
            return Err(NodeError::Invalid(format!(
                "{} lies {depth} levels below {}, and at most {LEVELS_MAX} can be managed: adopt one above it",
                path.display(),
                mount.display()
            )));
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
        Ok(id)
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
        let adopted = self.task(id)?.record.origin == Origin::Adopted;
        match self.change_or_shrink(id, change, &Cause::new(Actor::User(caller.uid), "set")) {
            Err(NodeError::Actuate(error)) if error.is_gone() && adopted => {
                // It was removed just now, and the kernel is about to tell of it.
                self.end_if_gone(id);
                return Err(NodeError::Precondition(format!(
                    "task `{id}` has ended: its cgroup was removed, and nothing was changed"
                )));
            }
            other => other?,
        }
        if let Some(memory) = change.memory {
            let state_dir = self.state_dir().to_owned();
            let task = self.task_mut(id)?;
            task.record.memory_floor = memory.at();
            task.unsaved = task.record.save(&state_dir).is_err();
        }
        self.status(id)
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
