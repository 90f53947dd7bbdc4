//! The agent of a node.

use std::{path::Path, time::Duration};

use shaper_core::{
    doctor::Report,
    id::TaskId,
    ledger::Entry,
    limits::{Limits, LimitsChange},
    snapshot::NodeSnapshot,
    task::{TaskStatus, UnixNanos},
};
use shaper_proto::v1::{self, agent_client::AgentClient, log_chunk::Record};
use tonic::{Streaming, transport::Channel};

use super::{CallError, ConnectError, Failure, Link, Outage, Peer};

const SNAPSHOT: &str = "read what the node uses";

/// A connection to the agent. Clones share it; it connects again by itself when it is next used.
#[derive(Clone)]
pub(crate) struct Client {
    link: Link,
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Client, ConnectError> {
        Ok(Client { link: Link::connect(Peer::Agent, socket).await? })
    }

    fn agent(&self) -> AgentClient<Channel> {
        AgentClient::new(self.link.channel.clone())
    }

    pub(crate) async fn run_task(&self, request: v1::RunTaskRequest) -> Result<TaskStatus, CallError> {
        let operation = match request.task_id.as_str() {
            "" => "run a task".to_owned(),
            id => format!("run task `{id}`"),
        };
        self.link.read(&operation, self.agent().run_task(request).await)
    }

    /// Puts this very process into a task. Outlives the agent: asked again, the process is there already.
    pub(crate) async fn enter_task(&self, request: v1::EnterTaskRequest) -> Result<TaskStatus, CallError> {
        let operation = match request.task_id.as_str() {
            "" => "enter a task".to_owned(),
            id => format!("enter task `{id}`"),
        };
        self.link
            .insist(operation, |channel| {
                let request = request.clone();
                async move { AgentClient::new(channel).enter_task(request).await }
            })
            .await
    }

    pub(crate) async fn adopt(
        &self,
        id: &TaskId,
        cgroup: &str,
        limits: Limits,
    ) -> Result<TaskStatus, CallError> {
        let request = v1::AdoptCgroupRequest {
            task_id: id.to_string(),
            cgroup: cgroup.to_owned(),
            limits: Some(limits.into()),
        };
        self.link.read(&format!("adopt `{cgroup}` as task `{id}`"), self.agent().adopt_cgroup(request).await)
    }

    pub(crate) async fn list_tasks(&self) -> Result<Vec<TaskStatus>, CallError> {
        const OPERATION: &str = "list tasks";
        let v1::ListTasksResponse { tasks } =
            self.link.answer(OPERATION, self.agent().list_tasks(v1::ListTasksRequest {}).await)?;
        tasks.into_iter().map(|task| self.link.domain(OPERATION, task)).collect()
    }

    pub(crate) async fn get_task(&self, id: &TaskId) -> Result<TaskStatus, CallError> {
        let request = v1::GetTaskRequest { task_id: id.to_string() };
        self.link.read(&format!("get task `{id}`"), self.agent().get_task(request).await)
    }

    pub(crate) async fn set_limits(
        &self,
        id: &TaskId,
        change: LimitsChange,
        wait: bool,
    ) -> Result<TaskStatus, CallError> {
        let request = v1::SetLimitsRequest { task_id: id.to_string(), change: Some(change.into()), wait };
        self.link.read(&format!("set limits of task `{id}`"), self.agent().set_limits(request).await)
    }

    pub(crate) async fn release_task(&self, id: &TaskId) -> Result<Vec<String>, CallError> {
        let request = v1::ReleaseTaskRequest { task_id: id.to_string() };
        let response = self.agent().release_task(request).await;
        self.link.answer(format!("release task `{id}`"), response).map(|v1::ReleaseResponse { done }| done)
    }

    pub(crate) async fn release_all(&self) -> Result<Vec<String>, CallError> {
        let response = self.agent().release_all(v1::ReleaseAllRequest {}).await;
        self.link.answer("release all tasks", response).map(|v1::ReleaseResponse { done }| done)
    }

    /// What was done to a task or to all, with remarks on it.
    pub(crate) async fn ledger(
        &self,
        id: Option<&TaskId>,
        since: UnixNanos,
    ) -> Result<(Vec<Entry>, Vec<String>), CallError> {
        const OPERATION: &str = "read the ledger";
        let task_id = id.map(TaskId::to_string).unwrap_or_default();
        let request = v1::GetLedgerRequest { task_id, since_unix_nanos: since };
        let answer = self.link.answer(OPERATION, self.agent().get_ledger(request).await)?;
        let v1::GetLedgerResponse { entries, notes } = answer;
        let entries = entries.into_iter().map(|entry| self.link.domain(OPERATION, entry));
        Ok((entries.collect::<Result<_, _>>()?, notes))
    }

    pub(crate) async fn doctor(&self) -> Result<Report, CallError> {
        const OPERATION: &str = "examine the node";
        self.link.read(OPERATION, self.agent().doctor(v1::DoctorRequest {}).await)
    }

    /// What the node and the caller's tasks use, over the last second.
    pub(crate) async fn snapshot(&self) -> Result<NodeSnapshot, CallError> {
        self.link.read(SNAPSHOT, self.agent().get_snapshot(v1::GetSnapshotRequest {}).await)
    }

    /// The same at once, and again each second.
    pub(crate) fn watch_snapshots(&self) -> SnapshotWatch {
        SnapshotWatch { client: self.clone(), snapshots: None, outage: Outage::default(), delay: None }
    }

    /// Asks a task to end. Outlives the agent.
    pub(crate) async fn cancel_task(&self, id: &TaskId, grace: Duration) -> Result<TaskStatus, CallError> {
        let grace_millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = v1::CancelTaskRequest { task_id: id.to_string(), grace_millis };
        self.link
            .insist(format!("cancel task `{id}`"), |channel| {
                let request = request.clone();
                async move { AgentClient::new(channel).cancel_task(request).await }
            })
            .await
    }

    /// The task once it has ended. Outlives the agent.
    pub(crate) async fn wait_task(&self, id: &TaskId) -> Result<TaskStatus, CallError> {
        let request = v1::WaitTaskRequest { task_id: id.to_string() };
        self.link
            .insist(format!("wait for task `{id}`"), |channel| {
                let request = request.clone();
                async move { AgentClient::new(channel).wait_task(request).await }
            })
            .await
    }

    /// The log of a task from its beginning; with `follow`, until the task has ended.
    pub(crate) fn read_log<'a>(&'a self, id: &'a TaskId, follow: bool) -> LogReader<'a> {
        LogReader { client: self, id, follow, cursor: 0, chunks: None, outage: Outage::default() }
    }
}

/// Reads the log of a task, every record once, also across restarts of the agent.
pub(crate) struct LogReader<'a> {
    client: &'a Client,
    id: &'a TaskId,
    follow: bool,
    cursor: u64,
    chunks: Option<Streaming<v1::LogChunk>>,
    outage: Outage,
}

impl LogReader<'_> {
    /// The next records; `None` at the end. A chunk counts as read when this returns it.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Record>>, CallError> {
        loop {
            match self.chunk().await {
                Ok(chunk) => {
                    self.outage = Outage::default();
                    self.client.link.is_back();
                    return Ok(chunk.map(|v1::LogChunk { records, cursor }| {
                        self.cursor = cursor;
                        records
                    }));
                }
                Err(error) if error.is_loss() => {
                    self.chunks = None;
                    self.client.link.sit_out(&mut self.outage, error).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn chunk(&mut self) -> Result<Option<v1::LogChunk>, CallError> {
        let operation = || format!("read the log of task `{}`", self.id);
        let chunks = match &mut self.chunks {
            Some(chunks) => chunks,
            none => {
                let request = v1::ReadLogsRequest {
                    task_id: self.id.to_string(),
                    cursor: self.cursor,
                    follow: self.follow,
                };
                none.insert(
                    self.client.link.answer(operation(), self.client.agent().read_logs(request).await)?,
                )
            }
        };
        chunks.message().await.map_err(|status| self.client.link.failed(operation(), &status))
    }
}

/// Reads snapshots, across restarts of the agent.
pub(crate) struct SnapshotWatch {
    client: Client,
    snapshots: Option<Streaming<v1::NodeSnapshot>>,
    outage: Outage,
    /// What to wait for before the agent is asked again.
    delay: Option<Duration>,
}

impl SnapshotWatch {
    /// The next snapshot. That the agent is away is said on standard error, and borne for a while.
    pub(crate) async fn next(&mut self) -> Result<NodeSnapshot, CallError> {
        loop {
            match self.snapshot().await {
                Ok(snapshot) => {
                    self.outage = Outage::default();
                    self.client.link.is_back();
                    return Ok(snapshot);
                }
                Err(error) if error.is_loss() => {
                    self.snapshots = None;
                    self.client.link.sit_out(&mut self.outage, error).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next snapshot, or `None` at each attempt that finds the agent away: for those who say so
    /// themselves, and whose patience has no end.
    pub(crate) async fn attempt(&mut self) -> Result<Option<NodeSnapshot>, CallError> {
        if let Some(delay) = self.delay.take() {
            tokio::time::sleep(delay).await;
        }
        match self.snapshot().await {
            Ok(snapshot) => {
                self.outage = Outage::default();
                Ok(Some(snapshot))
            }
            Err(error) if error.is_loss() => {
                self.snapshots = None;
                self.delay = Some(self.outage.delay().unwrap_or(Outage::LONGEST_DELAY));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn snapshot(&mut self) -> Result<NodeSnapshot, CallError> {
        let link = &self.client.link;
        let snapshots = match &mut self.snapshots {
            Some(snapshots) => snapshots,
            none => {
                let response = self.client.agent().watch_snapshots(v1::WatchSnapshotsRequest {}).await;
                none.insert(link.answer(SNAPSHOT, response)?)
            }
        };
        match snapshots.message().await {
            Ok(Some(snapshot)) => link.domain(SNAPSHOT, snapshot),
            // The stream has no end of its own.
            Ok(None) => Err(CallError { operation: SNAPSHOT.into(), failure: Failure::Lost(link.peer) }),
            Err(status) => Err(link.failed(SNAPSHOT, &status)),
        }
    }
}
