//! An agent that is only the contract on the wire: it keeps tasks and their logs, and a test plays
//! the node. A [`Node`] outlives its agent, as tasks do.

pub(crate) mod broker;
pub(crate) mod snapshot;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use shaper_core::{
    doctor::{Availability, Report, Rung},
    ledger::{Actor, Cause, Entry, Kind, KnobChange, Outcome},
    limits::{Limit, Limits, LimitsChange},
    shrink::{self, Reason, Status as Shrink},
    snapshot::NodeSnapshot,
    task::{Enforcement, ExitStatus, Origin, Owner, Phase, TaskStatus, Usage},
    units::Bytes,
};
use shaper_proto::v1::{
    self,
    agent_server::{self, AgentServer},
    log_chunk::{Record, Stream},
};
use tokio::{
    net::UnixListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{
    Request, Response, Status,
    transport::{self, server::Router},
};

/// Longer than anything here takes, and short enough to see a test fail.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the agent was asked for, where a test looks at it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Call {
    Run(v1::RunTaskRequest),
    Enter(v1::EnterTaskRequest),
    Adopt(v1::AdoptCgroupRequest),
    ReadLogs { cursor: u64 },
    Wait,
    Cancel { grace_millis: u64 },
    WatchSnapshots,
}

#[derive(Default)]
struct State {
    tasks: BTreeMap<String, (TaskStatus, Vec<Record>)>,
    calls: Vec<Call>,
    /// What was measured; otherwise [`snapshot::snapshot`].
    snapshot: Option<NodeSnapshot>,
    refuses_snapshots: bool,
}

/// What there is on the node, whether or not an agent runs.
pub(crate) struct Node {
    state: Mutex<State>,
    /// Tells tests of changes.
    changed: Condvar,
    /// Tells the agent of changes.
    version: watch::Sender<u64>,
}

impl Node {
    pub(crate) fn new() -> Arc<Node> {
        Arc::new(Node { state: Mutex::default(), changed: Condvar::new(), version: watch::Sender::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let outcome = change(&mut self.state());
        self.changed.notify_all();
        self.version.send_modify(|version| *version += 1);
        outcome
    }

    pub(crate) fn add(&self, task: TaskStatus) {
        self.update(|state| state.tasks.insert(task.task_id.to_string(), (task, Vec::new())));
    }

    /// The task writes to its log.
    pub(crate) fn write(&self, id: &str, records: impl IntoIterator<Item = Record>) {
        self.update(|state| state.tasks.get_mut(id).unwrap().1.extend(records));
    }

    /// The task ends.
    pub(crate) fn end(&self, id: &str, status: ExitStatus) {
        self.update(|state| state.tasks.get_mut(id).unwrap().0.phase = Phase::Ended { status, at: 1 });
    }

    /// A second is over, and this was measured in it.
    pub(crate) fn measure(&self, snapshot: NodeSnapshot) {
        self.update(|state| state.snapshot = Some(snapshot));
    }

    /// As an agent that cannot measure.
    pub(crate) fn refuse_snapshots(&self) {
        self.update(|state| state.refuses_snapshots = true);
    }

    fn snapshot(&self) -> v1::NodeSnapshot {
        self.state().snapshot.clone().unwrap_or_else(snapshot::snapshot).into()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// Waits until the agent has been called like this.
    pub(crate) fn await_call(&self, is_meant: impl Fn(&Call) -> bool) {
        let missing = |state: &mut State| !state.calls.iter().any(&is_meant);
        let (state, timeout) = self.changed.wait_timeout_while(self.state(), PATIENCE, missing).unwrap();
        assert!(!timeout.timed_out(), "no such call among {:?}", state.calls);
    }

    fn find(&self, id: &str) -> Result<TaskStatus, Status> {
        let state = self.state();
        let found = state.tasks.get(id).map(|(task, _)| task.clone());
        found.ok_or_else(|| Status::not_found(format!("there is no task `{id}`")))
    }

    fn called(&self, call: Call) {
        self.update(|state| state.calls.push(call));
    }
}

/// A running agent or broker; dropped, it is gone like one that was killed: connections end mid-answer.
pub(crate) struct Server {
    runtime: Option<Runtime>,
}

impl Server {
    fn start(socket: &Path, router: Router) -> Server {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let _ = std::fs::remove_file(socket);
        let listener = runtime.block_on(async { UnixListener::bind(socket) }).unwrap();
        runtime.spawn(router.serve_with_incoming(UnixListenerStream::new(listener)));
        Server { runtime: Some(runtime) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
    }
}

pub(crate) fn start_agent(node: &Arc<Node>, socket: &Path) -> Server {
    Server::start(socket, transport::Server::builder().add_service(AgentServer::new(Service(node.clone()))))
}

struct Service(Arc<Node>);

fn answer(task: TaskStatus) -> Result<Response<v1::Task>, Status> {
    Ok(Response::new(task.into()))
}

#[tonic::async_trait]
impl agent_server::Agent for Service {
    async fn run_task(&self, request: Request<v1::RunTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let request = request.into_inner();
        self.0.called(Call::Run(request.clone()));
        let id = if request.task_id.is_empty() { "made-1" } else { &request.task_id };
        if self.0.find(id).is_ok_and(|task| task.phase == Phase::Running) {
            return Err(Status::already_exists(format!("a task `{id}` runs already")));
        }
        let limits = request.limits.unwrap_or_default().try_into();
        let limits = limits
            .map_err(|error: shaper_proto::convert::WireError| Status::invalid_argument(error.to_string()))?;
        let started =
            TaskStatus { origin: Origin::Launched { command: request.command }, limits, ..task(id) };
        self.0.add(started.clone());
        answer(started)
    }

    async fn enter_task(&self, request: Request<v1::EnterTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let request = request.into_inner();
        self.0.called(Call::Enter(request.clone()));
        let id = if request.task_id.is_empty() { "made-1" } else { &request.task_id };
        let refused = |error: shaper_proto::convert::WireError| Status::invalid_argument(error.to_string());
        let workload = request.workload.map(TryInto::try_into).transpose().map_err(refused)?;
        let origin = Origin::Entered { command: request.command };
        let entered = TaskStatus { origin, workload, ..task(id) };
        self.0.add(entered.clone());
        answer(entered)
    }

    async fn adopt_cgroup(
        &self,
        request: Request<v1::AdoptCgroupRequest>,
    ) -> Result<Response<v1::Task>, Status> {
        let request = request.into_inner();
        self.0.called(Call::Adopt(request.clone()));
        let adopted =
            TaskStatus { origin: Origin::Adopted, cgroup: request.cgroup, ..task(&request.task_id) };
        self.0.add(adopted.clone());
        answer(adopted)
    }

    async fn admit_container(
        &self,
        _: Request<v1::AdmitContainerRequest>,
    ) -> Result<Response<v1::AdmitContainerResponse>, Status> {
        Err(Status::unimplemented("the command line asks for no container"))
    }

    async fn list_tasks(
        &self,
        _: Request<v1::ListTasksRequest>,
    ) -> Result<Response<v1::ListTasksResponse>, Status> {
        let tasks = self.0.state().tasks.values().map(|(task, _)| task.clone().into()).collect();
        Ok(Response::new(v1::ListTasksResponse { tasks }))
    }

    async fn get_task(&self, request: Request<v1::GetTaskRequest>) -> Result<Response<v1::Task>, Status> {
        answer(self.0.find(&request.into_inner().task_id)?)
    }

    async fn wait_task(&self, request: Request<v1::WaitTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let id = request.into_inner().task_id;
        let mut version = self.0.version.subscribe();
        self.0.called(Call::Wait);
        loop {
            let task = self.0.find(&id)?;
            if task.phase != Phase::Running {
                return answer(task);
            }
            version.changed().await.map_err(|_| Status::internal("the node is gone"))?;
        }
    }

    type ReadLogsStream = ReceiverStream<Result<v1::LogChunk, Status>>;

    async fn read_logs(
        &self,
        request: Request<v1::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let v1::ReadLogsRequest { task_id, mut cursor, follow } = request.into_inner();
        self.0.called(Call::ReadLogs { cursor });
        self.0.find(&task_id)?;
        let (sender, receiver) = mpsc::channel(1);
        let node = self.0.clone();
        tokio::spawn(async move {
            let mut version = node.version.subscribe();
            loop {
                version.mark_unchanged();
                let (records, ended) = {
                    let state = node.state();
                    let (task, log) = &state.tasks[&task_id];
                    let new = log.iter().skip(cursor as usize).take(2).cloned().collect::<Vec<_>>();
                    (new, task.phase != Phase::Running)
                };
                if !records.is_empty() {
                    cursor += records.len() as u64;
                    if sender.send(Ok(v1::LogChunk { records, cursor })).await.is_err() {
                        return;
                    }
                } else if ended || !follow || version.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn set_limits(&self, request: Request<v1::SetLimitsRequest>) -> Result<Response<v1::Task>, Status> {
        let v1::SetLimitsRequest { task_id, change, wait } = request.into_inner();
        let change = LimitsChange::try_from(change.unwrap_or_default())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut task = self.0.find(&task_id)?;
        task.limits = task.limits.with(&change);
        for enforcement in &mut task.enforcement {
            if enforcement.resource == "cpu" {
                enforcement.in_force = format!("{} cores", task.limits.cpu);
            }
        }
        if let Some(Limit::At(target)) = change.memory {
            let reason = Reason::Stalled { full_us: 120_000, some_us: 130_000, window_us: 500_000 };
            task.shrink = Some(Shrink {
                target,
                began_at: task.created_at,
                used_at_first: Bytes(64 << 20),
                used: Bytes(48 << 20),
                outcome: wait.then_some(shrink::Outcome::Aborted { reason, cold: Bytes(16 << 20) }),
            });
            return answer(task);
        }
        task.notes.push("`net_egress` holds for what leaves this machine".into());
        self.0.add(task.clone());
        answer(task)
    }

    async fn cancel_task(
        &self,
        request: Request<v1::CancelTaskRequest>,
    ) -> Result<Response<v1::Task>, Status> {
        let v1::CancelTaskRequest { task_id, grace_millis } = request.into_inner();
        self.0.called(Call::Cancel { grace_millis });
        answer(self.0.find(&task_id)?)
    }

    async fn release_task(
        &self,
        request: Request<v1::ReleaseTaskRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let id = request.into_inner().task_id;
        self.0.find(&id)?;
        self.0.update(|state| state.tasks.remove(&id));
        Ok(Response::new(v1::ReleaseResponse { done: vec![format!("{id}: cpu.max back to max")] }))
    }

    async fn release_all(
        &self,
        _: Request<v1::ReleaseAllRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        Err(Status::permission_denied("only root may release all tasks"))
    }

    async fn doctor(&self, _: Request<v1::DoctorRequest>) -> Result<Response<v1::DoctorReport>, Status> {
        Ok(Response::new(report().into()))
    }

    /// One entry for each task that was asked for, or for every one.
    async fn get_ledger(
        &self,
        request: Request<v1::GetLedgerRequest>,
    ) -> Result<Response<v1::GetLedgerResponse>, Status> {
        let v1::GetLedgerRequest { task_id, since_unix_nanos } = request.into_inner();
        let state = self.0.state();
        let wanted = state.tasks.values().map(|(task, _)| task).filter(|task| {
            (task_id.is_empty() || task_id == task.task_id.as_str()) && task.created_at >= since_unix_nanos
        });
        let entry = |(number, task): (usize, &TaskStatus)| {
            let change = KnobChange { knob: "cpu".into(), before: "max".into(), after: "0.5 cores".into() };
            Entry {
                number: number as u64 + 1,
                at: task.created_at,
                execution: task.execution(),
                owner: task.owner,
                kind: Kind::Standing,
                cause: Cause::new(Actor::User(task.owner.uid), "run"),
                changes: vec![change],
                outcome: Outcome::Done,
            }
        };
        let entries = wanted.enumerate().map(|task| entry(task).into()).collect();
        Ok(Response::new(v1::GetLedgerResponse { entries, notes: vec!["a remark".into()] }))
    }

    async fn get_snapshot(
        &self,
        _: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::NodeSnapshot>, Status> {
        Ok(Response::new(self.0.snapshot()))
    }

    type WatchSnapshotsStream = ReceiverStream<Result<v1::NodeSnapshot, Status>>;

    /// A change of the node stands for a second.
    async fn watch_snapshots(
        &self,
        _: Request<v1::WatchSnapshotsRequest>,
    ) -> Result<Response<Self::WatchSnapshotsStream>, Status> {
        let mut version = self.0.version.subscribe();
        let (sender, receiver) = mpsc::channel(1);
        let node = self.0.clone();
        node.called(Call::WatchSnapshots);
        if node.state().refuses_snapshots {
            return Err(Status::unimplemented("nobody measures here"));
        }
        tokio::spawn(async move {
            version.mark_unchanged();
            while sender.send(Ok(node.snapshot())).await.is_ok() && version.changed().await.is_ok() {}
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

pub(crate) fn report() -> Report {
    let rung = |feature: &str, availability| Rung {
        feature: feature.into(),
        used_for: "counting".into(),
        availability,
        degrades_to: "not counted".into(),
    };
    Report {
        kernel: "6.12.1".into(),
        node: "n1".into(),
        cgroups: "unified".into(),
        cgroup_root: "/sys/fs/cgroup/shaper".into(),
        bpffs_dir: "/sys/fs/bpf/shaper".into(),
        uplinks: vec!["eth0 (tcx)".into(), "eth1 (clsact)".into()],
        gpus: vec!["0: Fake H100 (GPU-1, device 195:0, 80 GiB)".into()],
        rungs: vec![
            rung("tcx", Availability::Available),
            rung("dmem", Availability::Missing { evidence: "not in cgroup.controllers".into() }),
        ],
    }
}

/// A task that runs as root since an hour ago.
pub(crate) fn task(id: &str) -> TaskStatus {
    let since_epoch = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    TaskStatus {
        task_id: id.parse().unwrap(),
        attempt: 1,
        owner: Owner { uid: 0, gid: 0 },
        runs_as: Owner { uid: 0, gid: 0 },
        origin: Origin::Launched { command: vec!["sh".into(), "-c".into(), "echo it's".into()] },
        workload: None,
        phase: Phase::Running,
        pid: Some(42),
        cgroup: format!("/sys/fs/cgroup/shaper/{id}.1"),
        created_at: (since_epoch - Duration::from_secs(3600)).as_nanos() as u64,
        limits: Limits::default(),
        enforcement: vec![Enforcement {
            resource: "cpu".into(),
            mechanism: "cpu.max".into(),
            in_force: "max cores".into(),
        }],
        usage: Usage::default(),
        shrink: None,
        idle: None,
        oom_kill: None,
        notes: Vec::new(),
        adopted_by: None,
    }
}

pub(crate) fn out(line: &str) -> Record {
    Record { stream: Stream::Stdout.into(), content: line.into(), ..Record::default() }
}

pub(crate) fn err(line: &str) -> Record {
    Record { stream: Stream::Stderr.into(), ..out(line) }
}
