//! The gRPC service on the agent's socket: checks what comes in, asks the node, answers.

use std::{collections::HashMap, path::PathBuf, pin::Pin, time::Duration};

use shaper_core::{
    adopt::annotated,
    id::TaskId,
    limits::{Limits, LimitsChange},
    task::TaskStatus,
};
use shaper_identity::serve::Asking;
use shaper_proto::{
    convert::{self, WireError},
    peer::Caller,
    v1::{self, agent_server::Agent},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    actor::{ActorError, Handle},
    adoption::Births,
    kernel::cgroup::CgroupError,
    launch::{
        self,
        log::{LogReader, LogRecord, Stream as LogStream},
    },
    ledger,
    node::{EnterRequest, Node, NodeError, RunRequest},
};

/// The service.
pub struct AgentService {
    node: Handle,
    births: Option<Births>,
}

/// Where inotify instances have run out, a followed log is looked at this often.
const LOOK: Duration = Duration::from_millis(250);
/// Bytes of log in one answer.
const CHUNK: usize = 256 << 10;

impl AgentService {
    /// A service in front of a node; `births`: where it has rules of adoption.
    pub fn new(node: Handle, births: Option<Births>) -> AgentService {
        AgentService { node, births }
    }

    async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Node) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, Status> {
        self.node.call(job).await.map_err(unavailable)?.map_err(refused)
    }

    /// Adopts a container that waits to be started.
    async fn admit(
        &self,
        pid: u32,
        annotations: HashMap<String, String>,
    ) -> Result<Option<TaskStatus>, Status> {
        let births = self.births.as_ref().ok_or_else(|| Status::failed_precondition(NO_RULES))?;
        let asked = annotated(&annotations.into_iter().collect())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let judged = births.judge(pid).await;
        let judged = judged.map_err(|error| Status::failed_precondition(launch::chain(&error)))?;
        let Some((found, is_own)) = judged else { return Ok(None) };
        // One container does not decide for the pod that it is in.
        let asked = if is_own { asked } else { Limits::default() };
        self.ask(move |node| node.admit(found, &asked, !is_own)).await
    }

    async fn task(
        &self,
        job: impl FnOnce(&mut Node) -> Result<TaskStatus, NodeError> + Send + 'static,
    ) -> Result<Response<v1::Task>, Status> {
        Ok(Response::new(self.ask(job).await?.into()))
    }
}

const NO_PROCESS: &str = "the kernel does not say which process of yours connected: that takes Linux 6.5 \
                          (SO_PEERPIDFD), and that the process still runs; `shaper run` and `shaper adopt` work without";

const NO_RULES: &str = "this agent has no rules of adoption: start it with --adopt FILE";

fn unavailable(error: ActorError) -> Status {
    Status::unavailable(error.to_string())
}

/// What a verifier has to say can be longer than an answer may be: most of it is in the log only.
const TEXT_MAX: usize = 2048;

fn shortened(text: String) -> String {
    if text.len() <= TEXT_MAX {
        return text;
    }
    let letters = text.chars().count();
    let start: String = text.chars().take(letters.min(TEXT_MAX / 8)).collect();
    let end: String = text.chars().skip(letters.saturating_sub(TEXT_MAX / 8)).collect();
    format!("{start} [… the agent's log has all of it …] {end}")
}

fn refused(error: NodeError) -> Status {
    let whole = launch::chain(&error);
    let text = shortened(whole.clone());
    match &error {
        NodeError::Invalid(_) | NodeError::TaskId(_) => Status::invalid_argument(text),
        NodeError::NoSuchTask(_) => Status::not_found(text),
        NodeError::Exists(_) => Status::already_exists(text),
        NodeError::Denied(_) => Status::permission_denied(text),
        NodeError::Exhausted(_) => Status::resource_exhausted(text),
        NodeError::Precondition(_) | NodeError::NotReclaimable(_) => Status::failed_precondition(text),
        NodeError::Actuate(error) if error.is_refusal() => Status::failed_precondition(text),
        NodeError::Actuate(error) if error.is_gone() => Status::not_found(text),
        NodeError::Cgroup(error) if error.is_gone() => Status::not_found(text),
        NodeError::Cgroup(CgroupError::Open { .. } | CgroupError::NotACgroup(_)) => {
            Status::invalid_argument(text)
        }
        _ => {
            tracing::error!(error = %whole, "a request failed");
            Status::internal(text)
        }
    }
}

fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// As the kernel says. Whoever is no user has no business with the tasks of a node.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let Asking { who, caller, .. } = Asking::of(request)?;
    caller.clone().ok_or_else(|| Status::permission_denied(format!("{who} is no user, and has no tasks")))
}

fn task_id(text: &str) -> Result<TaskId, Status> {
    text.parse().map_err(|error: shaper_core::id::InvalidTaskId| Status::invalid_argument(error.to_string()))
}

fn limits(wire: Option<v1::Limits>) -> Result<Limits, Status> {
    wire.map_or(Ok(Limits::default()), Limits::try_from).map_err(invalid)
}

fn run_request(wire: v1::RunTaskRequest) -> Result<RunRequest, Status> {
    let v1::RunTaskRequest {
        task_id: id,
        command,
        env,
        cwd,
        limits: wire_limits,
        run_as,
        gpus,
        gpu_model,
        image,
    } = wire;
    let pair = |text: String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(Status::invalid_argument(format!("`{text}` in env is not NAME=VALUE"))),
    };
    Ok(RunRequest {
        attempt: None,
        owner: None,
        assignment: None,
        gpus,
        gpu_model,
        image: convert::image(image).map_err(invalid)?,
        task_id: if id.is_empty() { None } else { Some(task_id(&id)?) },
        command,
        env: env.into_iter().map(pair).collect::<Result<_, Status>>()?,
        cwd: PathBuf::from(cwd),
        limits: limits(wire_limits)?,
        run_as: run_as.map(|v1::Credentials { uid, gid, groups }| Caller { uid, gid, groups }),
    })
}

#[tonic::async_trait]
impl Agent for AgentService {
    async fn run_task(&self, request: Request<v1::RunTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let run = run_request(request.into_inner())?;
        let answer = self.ask(move |node| node.run(&caller, run)).await?;
        let status = answer.await.map_err(|_| unavailable(ActorError::Stopped))?.map_err(refused)?;
        Ok(Response::new(status.into()))
    }

    async fn enter_task(&self, request: Request<v1::EnterTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let process = Asking::of(&request)?.process.clone();
        let process = process.ok_or_else(|| Status::failed_precondition(NO_PROCESS))?;
        let v1::EnterTaskRequest { task_id: id, workload, limits: wire_limits, command } =
            request.into_inner();
        let workload = workload.ok_or_else(|| invalid(WireError::Missing("workload")))?;
        let enter = EnterRequest {
            task_id: if id.is_empty() { None } else { Some(task_id(&id)?) },
            workload: workload.try_into().map_err(invalid)?,
            limits: limits(wire_limits)?,
            command,
        };
        self.task(move |node| node.enter(&caller, &process, enter)).await
    }

    async fn adopt_cgroup(
        &self,
        request: Request<v1::AdoptCgroupRequest>,
    ) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let v1::AdoptCgroupRequest { task_id: id, cgroup, limits: wire_limits } = request.into_inner();
        let (id, limits) = (task_id(&id)?, limits(wire_limits)?);
        self.task(move |node| node.adopt(&caller, id, PathBuf::from(cgroup), limits)).await
    }

    async fn admit_container(
        &self,
        request: Request<v1::AdmitContainerRequest>,
    ) -> Result<Response<v1::AdmitContainerResponse>, Status> {
        if caller(&request)?.uid != 0 {
            return Err(Status::permission_denied("only root's container runtimes ask for a container"));
        }
        let v1::AdmitContainerRequest { pid, annotations } = request.into_inner();
        let admitted = self.admit(pid, annotations).await;
        if let Err(status) = &admitted {
            tracing::warn!(pid, why = status.message(), "a container is not adopted before it starts");
        }
        admitted.map(|task| Response::new(v1::AdmitContainerResponse { task: task.map(Into::into) }))
    }

    async fn list_tasks(
        &self,
        request: Request<v1::ListTasksRequest>,
    ) -> Result<Response<v1::ListTasksResponse>, Status> {
        let caller = caller(&request)?;
        let tasks = self.ask(move |node| node.list(&caller)).await?;
        let tasks = tasks.into_iter().map(Into::into).collect();
        Ok(Response::new(v1::ListTasksResponse { tasks }))
    }

    async fn get_task(&self, request: Request<v1::GetTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let id = task_id(&request.get_ref().task_id)?;
        self.task(move |node| node.get(&caller, &id)).await
    }

    async fn wait_task(&self, request: Request<v1::WaitTaskRequest>) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let id = task_id(&request.get_ref().task_id)?;
        let mut ended = {
            let (caller, id) = (caller.clone(), id.clone());
            self.ask(move |node| node.ended(&caller, &id)).await?
        };
        // An error means that the task was forgotten, which the next request will say.
        let _ = ended.wait_for(|ended| *ended).await;
        self.task(move |node| node.get(&caller, &id)).await
    }

    type ReadLogsStream = Pin<Box<dyn Stream<Item = Result<v1::LogChunk, Status>> + Send>>;

    async fn read_logs(
        &self,
        request: Request<v1::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let caller = caller(&request)?;
        let v1::ReadLogsRequest { task_id: id, cursor, follow } = request.into_inner();
        let id = task_id(&id)?;
        let (directory, ended) =
            self.ask(move |node| Ok((node.log_directory(&caller, &id)?, node.ended(&caller, &id)?))).await?;
        let reader =
            LogReader::open(&directory, cursor).map_err(|error| Status::internal(launch::chain(&error)))?;
        let (chunks, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            send_log(reader, ended, follow, chunks).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn set_limits(&self, request: Request<v1::SetLimitsRequest>) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let v1::SetLimitsRequest { task_id: id, change, wait } = request.into_inner();
        let id = task_id(&id)?;
        let change = change.ok_or_else(|| invalid(WireError::Missing("change")))?;
        let change = LimitsChange::try_from(change).map_err(invalid)?;
        if !wait {
            return self.task(move |node| node.set_limits(&caller, &id, &change)).await;
        }
        let shrunk = {
            let (caller, id) = (caller.clone(), id.clone());
            self.ask(move |node| {
                node.set_limits(&caller, &id, &change).and_then(|_| node.shrunk(&caller, &id))
            })
            .await?
        };
        if let Some(mut shrunk) = shrunk {
            // An error means that the task was forgotten, which the next request will say.
            let _ = shrunk.wait_for(|over| *over).await;
        }
        self.task(move |node| node.get(&caller, &id)).await
    }

    async fn cancel_task(
        &self,
        request: Request<v1::CancelTaskRequest>,
    ) -> Result<Response<v1::Task>, Status> {
        let caller = caller(&request)?;
        let v1::CancelTaskRequest { task_id: id, grace_millis } = request.into_inner();
        let id = task_id(&id)?;
        self.task(move |node| node.cancel(&caller, &id, Duration::from_millis(grace_millis))).await
    }

    async fn release_task(
        &self,
        request: Request<v1::ReleaseTaskRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let caller = caller(&request)?;
        let id = task_id(&request.get_ref().task_id)?;
        let done = self.ask(move |node| node.release(&caller, &id)).await?;
        Ok(Response::new(v1::ReleaseResponse { done }))
    }

    async fn release_all(
        &self,
        request: Request<v1::ReleaseAllRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let caller = caller(&request)?;
        let done = self.ask(move |node| node.release_all(&caller)).await?;
        Ok(Response::new(v1::ReleaseResponse { done }))
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::NodeSnapshot>, Status> {
        let caller = caller(&request)?;
        let snapshot = self.ask(move |node| Ok(node.snapshot(&caller))).await?;
        Ok(Response::new(snapshot.into()))
    }

    type WatchSnapshotsStream = Pin<Box<dyn Stream<Item = Result<v1::NodeSnapshot, Status>> + Send>>;

    async fn watch_snapshots(
        &self,
        request: Request<v1::WatchSnapshotsRequest>,
    ) -> Result<Response<Self::WatchSnapshotsStream>, Status> {
        let caller = caller(&request)?;
        let mut stocks = self.ask(|node| Ok(node.stocks())).await?;
        let (snapshots, stream) = mpsc::channel(1);
        let node = self.node.clone();
        tokio::spawn(async move {
            loop {
                let of_caller = caller.clone();
                let snapshot = node.call(move |node| node.snapshot(&of_caller)).await;
                let snapshot = snapshot.map(Into::into).map_err(unavailable);
                let is_last = snapshot.is_err();
                if snapshots.send(snapshot).await.is_err() || is_last {
                    break;
                }
                tokio::select! {
                    changed = stocks.changed() => if changed.is_err() {
                        break;
                    },
                    () = snapshots.closed() => break,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_ledger(
        &self,
        request: Request<v1::GetLedgerRequest>,
    ) -> Result<Response<v1::GetLedgerResponse>, Status> {
        let caller = caller(&request)?;
        let v1::GetLedgerRequest { task_id: id, since_unix_nanos: since } = request.into_inner();
        let task = if id.is_empty() { None } else { Some(task_id(&id)?) };
        let (directory, query) = self.ask(move |node| Ok(node.ledger_query(&caller, task, since))).await?;
        // It may be long: the node is not kept from its work meanwhile.
        let read = tokio::task::spawn_blocking(move || ledger::read(&directory, &query)).await;
        let read = read.map_err(|error| Status::internal(error.to_string()))?;
        let (entries, notes) = read.map_err(|error| refused(error.into()))?;
        let entries = entries.into_iter().map(v1::LedgerEntry::from).collect();
        Ok(Response::new(v1::GetLedgerResponse { entries, notes }))
    }

    async fn doctor(
        &self,
        _request: Request<v1::DoctorRequest>,
    ) -> Result<Response<v1::DoctorReport>, Status> {
        let report = self.ask(|node| node.doctor()).await?;
        Ok(Response::new(report.into()))
    }
}

/// Sends a log from where its reader is, and what comes until the task has ended if that is wanted.
async fn send_log(
    mut reader: LogReader,
    mut ended: tokio::sync::watch::Receiver<bool>,
    follow: bool,
    chunks: mpsc::Sender<Result<v1::LogChunk, Status>>,
) {
    loop {
        // Asked before reading: what an ended task wrote is all there.
        let is_over = !follow || *ended.borrow();
        let records = match reader.read(CHUNK) {
            Ok(records) => records,
            Err(error) => {
                let _ = chunks.send(Err(Status::internal(launch::chain(&error)))).await;
                return;
            }
        };
        if !records.is_empty() {
            let records = records.into_iter().map(wire_record).collect();
            let chunk = v1::LogChunk { records, cursor: reader.cursor() };
            if chunks.send(Ok(chunk)).await.is_err() {
                return;
            }
            continue;
        }
        if is_over {
            return;
        }
        tokio::select! {
            changed = reader.changed() => if changed.is_err() {
                tokio::time::sleep(LOOK).await;
            },
            // The sender is dropped when the task is forgotten: that is an end, too.
            _ = ended.changed() => {}
            () = chunks.closed() => return,
        }
    }
}

fn wire_record(record: LogRecord) -> v1::log_chunk::Record {
    use v1::log_chunk::{Record, Stream as WireStream};
    match record {
        LogRecord::Output { at, stream, partial, content } => Record {
            unix_nanos: at,
            stream: match stream {
                LogStream::Stdout => WireStream::Stdout.into(),
                LogStream::Stderr => WireStream::Stderr.into(),
            },
            content,
            partial,
            lost_bytes: 0,
        },
        LogRecord::Gap { bytes } => Record { lost_bytes: bytes, ..Record::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end() {
        let long = format!("begin{}end", "ä".repeat(10_000));
        let text = shortened(long);
        assert!(text.len() < TEXT_MAX && text.starts_with("begin") && text.ends_with("end"), "{text}");
        assert_eq!(shortened("short".into()), "short");
    }
}
