//! The connection to the agent, and the calls on it. Wire types become domain types here.
//!
//! A restart of the agent does not end its tasks, so whoever waits for a task or follows its log
//! outlives it too: such calls are made again until the agent is back (see [`Outage`]). Calls that
//! change something are made once, except a cancellation, which can be repeated without harm.

use std::{
    error::Error as StdError,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use shaper_core::{
    doctor::Report,
    id::TaskId,
    limits::{Limits, LimitsChange},
    task::TaskStatus,
};
use shaper_proto::{
    convert::WireError,
    v1::{self, agent_client::AgentClient, log_chunk::Record},
};
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{output, users};

/// Why there is no connection to an agent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// No such socket.
    #[error("there is no agent at `{}`: start `shaper-agent`, or name its socket with --socket", .0.display())]
    Absent(PathBuf),
    /// A socket that its server has left.
    #[error("nothing listens at `{}`: start `shaper-agent`, or name its socket with --socket", .0.display())]
    Deserted(PathBuf),
    /// The socket is not for everybody.
    #[error("you may not use the agent at `{}`: {remedy}", .socket.display())]
    Denied {
        /// The socket.
        socket: PathBuf,
        /// How to get access.
        remedy: String,
    },
    /// Anything else.
    #[error("cannot connect to the agent at `{}`: {reason}", .socket.display())]
    Failed {
        /// The socket.
        socket: PathBuf,
        /// What the transport ran into, without its own wrapping.
        reason: String,
    },
}

impl ConnectError {
    fn new(socket: &Path, error: &tonic::transport::Error) -> ConnectError {
        let socket = socket.to_owned();
        let io = causes(error).find_map(|cause| cause.downcast_ref::<io::Error>());
        match io.map(io::Error::kind) {
            Some(io::ErrorKind::NotFound) => ConnectError::Absent(socket),
            Some(io::ErrorKind::ConnectionRefused) => ConnectError::Deserted(socket),
            Some(io::ErrorKind::PermissionDenied) => {
                let remedy = remedy(owning_group(&socket));
                ConnectError::Denied { socket, remedy }
            }
            _ => {
                let reason = causes(error).last().map(ToString::to_string).unwrap_or_default();
                ConnectError::Failed { socket, reason }
            }
        }
    }
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source())
}

/// The group of the socket, or of the directory that hides it.
fn owning_group(socket: &Path) -> Option<u32> {
    socket.ancestors().find_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.gid())
}

fn remedy(group: Option<u32>) -> String {
    match group {
        None | Some(0) => "only root may, so use sudo".into(),
        Some(gid) => {
            let group = users::group_name(gid).unwrap_or_else(|| gid.to_string());
            format!(
                "it belongs to group `{group}`, so become a member (`sudo usermod -aG {group} \"$USER\"`, then \
                 log in again), or use sudo"
            )
        }
    }
}

/// A call that the agent did not fulfil.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub(crate) struct CallError {
    operation: String,
    #[source]
    pub(crate) failure: Failure,
}

/// Why it did not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It said why.
    #[error("{message}")]
    Answered {
        /// What kind of reason.
        code: Code,
        /// The reason.
        message: String,
    },
    /// The connection ended before an answer.
    #[error("the agent went away before it answered; whether it still acted on this is not known")]
    Lost,
    /// It went away and did not come back.
    #[error(
        "the agent went away and did not come back within {} s; tasks go on without it: start `shaper-agent` and \
         ask again", Outage::PATIENCE.as_secs()
    )]
    Gone,
    /// An answer that is none; the two are of different versions.
    #[error("the agent's answer was not understood")]
    Malformed(#[source] WireError),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        // A status with a source was made on this side, of a transport that failed. `Unknown` stands
        // for a stream that was cut off: the agent never uses it. `Unavailable` it uses when it ends.
        if status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Unknown) {
            return Failure::Lost;
        }
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        Failure::Answered { code: status.code(), message }
    }
}

/// The time in which the agent is away: how long to wait before each attempt to reach it again.
#[derive(Debug, Default)]
struct Outage {
    waited: Duration,
    attempts: u32,
}

impl Outage {
    const FIRST_DELAY: Duration = Duration::from_millis(100);
    const LONGEST_DELAY: Duration = Duration::from_secs(2);
    const PATIENCE: Duration = Duration::from_secs(120);

    /// The next delay; `None` once all patience is spent.
    fn delay(&mut self) -> Option<Duration> {
        let delay = Self::FIRST_DELAY.saturating_mul(1 << self.attempts.min(8)).min(Self::LONGEST_DELAY);
        self.waited += delay;
        self.attempts += 1;
        (self.waited <= Self::PATIENCE).then_some(delay)
    }
}

/// A connection to the agent. Clones share it; it connects again by itself when it is next used.
#[derive(Clone)]
pub(crate) struct Client {
    agent: AgentClient<Channel>,
    /// Whether it was said that the agent is away, so that those who share this say it once.
    away: Arc<AtomicBool>,
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Client, ConnectError> {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address goes into a header that nobody reads.
        let channel = Endpoint::from_static("http://shaper-agent")
            .connect_with_connector(connector)
            .await
            .map_err(|error| ConnectError::new(socket, &error))?;
        Ok(Client { agent: AgentClient::new(channel), away: Arc::default() })
    }

    pub(crate) async fn run_task(&self, request: v1::RunTaskRequest) -> Result<TaskStatus, CallError> {
        let operation = match request.task_id.as_str() {
            "" => "run a task".to_owned(),
            id => format!("run task `{id}`"),
        };
        task(&operation, self.agent.clone().run_task(request).await)
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
        task(&format!("adopt `{cgroup}` as task `{id}`"), self.agent.clone().adopt_cgroup(request).await)
    }

    pub(crate) async fn list_tasks(&self) -> Result<Vec<TaskStatus>, CallError> {
        const OPERATION: &str = "list tasks";
        let v1::ListTasksResponse { tasks } =
            answer(OPERATION, self.agent.clone().list_tasks(v1::ListTasksRequest {}).await)?;
        tasks.into_iter().map(|task| domain(OPERATION, task)).collect()
    }

    pub(crate) async fn get_task(&self, id: &TaskId) -> Result<TaskStatus, CallError> {
        let request = v1::GetTaskRequest { task_id: id.to_string() };
        task(&format!("get task `{id}`"), self.agent.clone().get_task(request).await)
    }

    pub(crate) async fn set_limits(
        &self,
        id: &TaskId,
        change: LimitsChange,
    ) -> Result<TaskStatus, CallError> {
        let request = v1::SetLimitsRequest { task_id: id.to_string(), change: Some(change.into()) };
        task(&format!("set limits of task `{id}`"), self.agent.clone().set_limits(request).await)
    }

    pub(crate) async fn release_task(&self, id: &TaskId) -> Result<Vec<String>, CallError> {
        let request = v1::ReleaseTaskRequest { task_id: id.to_string() };
        let response = self.agent.clone().release_task(request).await;
        answer(format!("release task `{id}`"), response).map(|v1::ReleaseResponse { done }| done)
    }

    pub(crate) async fn release_all(&self) -> Result<Vec<String>, CallError> {
        let response = self.agent.clone().release_all(v1::ReleaseAllRequest {}).await;
        answer("release all tasks", response).map(|v1::ReleaseResponse { done }| done)
    }

    pub(crate) async fn doctor(&self) -> Result<Report, CallError> {
        const OPERATION: &str = "examine the node";
        domain(OPERATION, answer(OPERATION, self.agent.clone().doctor(v1::DoctorRequest {}).await)?)
    }

    /// Asks a task to end. Outlives the agent.
    pub(crate) async fn cancel_task(&self, id: &TaskId, grace: Duration) -> Result<TaskStatus, CallError> {
        let grace_millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = v1::CancelTaskRequest { task_id: id.to_string(), grace_millis };
        self.insist(format!("cancel task `{id}`"), |mut agent| {
            let request = request.clone();
            async move { agent.cancel_task(request).await }
        })
        .await
    }

    /// The task once it has ended. Outlives the agent.
    pub(crate) async fn wait_task(&self, id: &TaskId) -> Result<TaskStatus, CallError> {
        let request = v1::WaitTaskRequest { task_id: id.to_string() };
        self.insist(format!("wait for task `{id}`"), |mut agent| {
            let request = request.clone();
            async move { agent.wait_task(request).await }
        })
        .await
    }

    /// The log of a task from its beginning; with `follow`, until the task has ended.
    pub(crate) fn read_log<'a>(&'a self, id: &'a TaskId, follow: bool) -> LogReader<'a> {
        LogReader { client: self, id, follow, cursor: 0, chunks: None, outage: Outage::default() }
    }

    /// Makes a call again until it meets no outage.
    async fn insist<F>(
        &self,
        operation: String,
        call: impl Fn(AgentClient<Channel>) -> F,
    ) -> Result<TaskStatus, CallError>
    where
        F: Future<Output = Result<Response<v1::Task>, Status>>,
    {
        let mut outage = Outage::default();
        loop {
            match task(&operation, call(self.agent.clone()).await) {
                Err(error) if matches!(error.failure, Failure::Lost) => {
                    self.sit_out(&mut outage, error).await?;
                }
                outcome => {
                    self.is_back();
                    return outcome;
                }
            }
        }
    }

    /// Waits a while, because the agent was lost; fails when it has been away for too long.
    async fn sit_out(&self, outage: &mut Outage, lost: CallError) -> Result<(), CallError> {
        if !self.away.swap(true, Ordering::Relaxed) {
            output::warn("the agent went away; waiting for it to come back");
        }
        let delay = outage.delay().ok_or(CallError { failure: Failure::Gone, ..lost })?;
        tokio::time::sleep(delay).await;
        Ok(())
    }

    fn is_back(&self) {
        self.away.store(false, Ordering::Relaxed);
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
                    self.client.is_back();
                    return Ok(chunk.map(|v1::LogChunk { records, cursor }| {
                        self.cursor = cursor;
                        records
                    }));
                }
                Err(error) if matches!(error.failure, Failure::Lost) => {
                    self.chunks = None;
                    self.client.sit_out(&mut self.outage, error).await?;
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
                none.insert(answer(operation(), self.client.agent.clone().read_logs(request).await)?)
            }
        };
        chunks.message().await.map_err(|status| failed(operation(), status))
    }
}

fn failed(operation: impl Into<String>, status: Status) -> CallError {
    CallError { operation: operation.into(), failure: status.into() }
}

fn answer<W>(operation: impl Into<String>, response: Result<Response<W>, Status>) -> Result<W, CallError> {
    response.map(Response::into_inner).map_err(|status| failed(operation, status))
}

fn domain<W, D: TryFrom<W, Error = WireError>>(
    operation: impl Into<String>,
    wire: W,
) -> Result<D, CallError> {
    wire.try_into()
        .map_err(|error| CallError { operation: operation.into(), failure: Failure::Malformed(error) })
}

fn task(operation: &str, response: Result<Response<v1::Task>, Status>) -> Result<TaskStatus, CallError> {
    answer(operation, response).and_then(|task| domain(operation, task))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_met_with_growing_patience_that_ends() {
        let mut outage = Outage::default();
        let delays: Vec<u128> =
            std::iter::from_fn(|| outage.delay()).map(|delay| delay.as_millis()).collect();
        assert_eq!(delays[..7], [100, 200, 400, 800, 1600, 2000, 2000]);
        let total: u128 = delays.iter().sum();
        assert!((118_000..=120_000).contains(&total), "{total}");
    }

    #[test]
    fn who_may_not_connect_is_told_how_to() {
        let denied = |gid| {
            let socket = "/run/shaper/agent.sock".into();
            ConnectError::Denied { socket, remedy: remedy(gid) }.to_string()
        };
        let root = "you may not use the agent at `/run/shaper/agent.sock`: only root may, so use sudo";
        assert_eq!(denied(Some(0)), root);
        assert_eq!(denied(None), root);
        assert_eq!(
            denied(Some(3_999_999_999)),
            "you may not use the agent at `/run/shaper/agent.sock`: it belongs to group `3999999999`, so become a \
             member (`sudo usermod -aG 3999999999 \"$USER\"`, then log in again), or use sudo"
        );
    }

    #[test]
    fn a_refusal_is_told_from_a_lost_agent() {
        let refused = Failure::from(Status::not_found("no such task"));
        assert_eq!(refused.to_string(), "no such task");
        let wordless = Failure::from(Status::new(Code::PermissionDenied, ""));
        assert!(matches!(wordless, Failure::Answered { code: Code::PermissionDenied, .. }));
        assert!(!wordless.to_string().is_empty());
        assert!(matches!(Failure::from(Status::unavailable("ends")), Failure::Lost));
        let broken = Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert!(matches!(Failure::from(broken), Failure::Lost));
    }
}
