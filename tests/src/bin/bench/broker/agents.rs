//! Agents that keep the contract and run nothing.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use shaper_proto::v1::{
    self, agent_message, agent_session_client::AgentSessionClient, broker_message, directive,
    directive_result,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{clients::Marks, rig::Rig};

/// How long a task lasts; several agents' tasks end together, as clocks have it.
const RUNTIME: Duration = Duration::from_millis(5);

/// What becomes of tasks that are started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tasks {
    /// They end at once.
    End,
    /// They run on, and their agents tell what they use, as real ones do.
    Stay,
}

/// How often agents tell what running tasks use.
const REPORT: Duration = Duration::from_secs(1);

/// So many agents, each with a connection of its own.
pub(super) struct Agents {
    /// Tasks that were started.
    started: watch::Sender<u64>,
    /// They end with this.
    tasks: tokio::task::JoinSet<Result<()>>,
    failures: tokio::sync::Mutex<mpsc::Receiver<anyhow::Error>>,
}

impl Agents {
    /// Begins all sessions at once; returns when all are there.
    pub(super) async fn attach(rig: &Rig, agents: usize, marks: &Arc<Marks>) -> Result<Agents> {
        Agents::attach_with(rig, agents, marks, Tasks::End).await
    }

    /// Likewise.
    pub(super) async fn attach_with(
        rig: &Rig,
        agents: usize,
        marks: &Arc<Marks>,
        then: Tasks,
    ) -> Result<Agents> {
        let mut sessions = tokio::task::JoinSet::new();
        for number in 0..agents {
            let channel = rig.connect().await?;
            sessions.spawn(begin(channel, number));
        }
        let (failed, failures) = mpsc::channel(1);
        let mut tasks = tokio::task::JoinSet::new();
        let started = watch::Sender::new(0);
        while let Some(session) = sessions.join_next().await {
            let (session, marks, failed) = (session??, marks.clone(), failed.clone());
            let started = started.clone();
            tasks.spawn(async move {
                let ended = session.work(&marks, then, &started).await;
                if let Err(error) = &ended {
                    // One is enough.
                    let _ = failed.try_send(anyhow!("{error:#}"));
                }
                ended
            });
        }
        Ok(Agents { started, tasks, failures: tokio::sync::Mutex::new(failures) })
    }

    /// Returns when so many tasks were started.
    pub(super) async fn run(&self, tasks: u64) -> Result<()> {
        self.started
            .subscribe()
            .wait_for(|started| *started >= tasks)
            .await
            .map(drop)
            .context("the agents have ended")
    }

    /// Why one of them could not go on.
    pub(super) async fn failed(&self) -> anyhow::Error {
        let failure = self.failures.lock().await.recv().await;
        failure.unwrap_or_else(|| anyhow!("all {} agents have ended", self.tasks.len()))
    }
}

struct Session {
    to: mpsc::Sender<v1::AgentMessage>,
    from: Streaming<v1::BrokerMessage>,
}

async fn begin(channel: Channel, number: usize) -> Result<Session> {
    let (to, messages) = mpsc::channel(4096);
    let hello = v1::Hello {
        node: format!("node-{number}"),
        boot_id: "bench".into(),
        capacity: Some(v1::Capacity {
            cpu_millicores: 10_000_000,
            memory_bytes: 16 << 40,
            ..Default::default()
        }),
        agent_socket: "/run/shaper/agent.sock".into(),
        ..Default::default()
    };
    let kind = Some(agent_message::Kind::Hello(hello));
    to.send(v1::AgentMessage { kind }).await?;
    let mut client = AgentSessionClient::new(channel);
    let mut from = client.attach(ReceiverStream::new(messages)).await.context("cannot attach")?.into_inner();
    let first = from.message().await?.and_then(|message| message.kind);
    let Some(broker_message::Kind::Welcome(_)) = first else { bail!("{first:?} is no welcome") };
    Ok(Session { to, from })
}

impl Session {
    async fn work(self, marks: &Marks, then: Tasks, started: &watch::Sender<u64>) -> Result<()> {
        let Session { to, mut from } = self;
        let mut clock = tokio::time::interval(if then == Tasks::End { RUNTIME } else { REPORT });
        let (mut running, mut released) = (Vec::new(), Vec::new());
        loop {
            tokio::select! {
                message = from.message() => {
                    let Some(message) = message? else { bail!("the broker has ended the session") };
                    let Some(broker_message::Kind::Directive(directive)) = message.kind else { continue };
                    let v1::Directive { task_id, attempt, generation, epoch: _, kind } = directive;
                    let outcome = match kind {
                        Some(directive::Kind::Start(start)) => {
                            let task = task(task_id.clone(), attempt, generation, start)?;
                            running.push(task.clone());
                            started.send_modify(|started| *started += 1);
                            directive_result::Outcome::Settled(task)
                        }
                        Some(directive::Kind::Forget(_)) => {
                            released.push(task_id.clone());
                            directive_result::Outcome::Accepted(true)
                        }
                        other => bail!("an unexpected directive: {other:?}"),
                    };
                    let result = v1::DirectiveResult { task_id, attempt, generation, outcome: Some(outcome) };
                    send(&to, agent_message::Kind::Result(result)).await?;
                }
                _ = clock.tick() => {
                    marks.release(&released);
                    released.clear();
                    if then == Tasks::Stay {
                        for task in &mut running {
                            use_more(task);
                            send(&to, agent_message::Kind::Task(task.clone())).await?;
                        }
                        continue;
                    }
                    for mut ended in running.drain(..) {
                        if let Some(task) = &mut ended.task {
                            let status = Some(v1::exit::Status::Code(0));
                            task.exit = Some(v1::Exit { status, unix_nanos: 1_700_000_000_000_000_000 });
                        }
                        send(&to, agent_message::Kind::Task(ended)).await?;
                    }
                }
            }
        }
    }
}

/// A second later.
fn use_more(task: &mut v1::NodeTask) {
    let usage = task.task.as_mut().and_then(|task| task.usage.as_mut());
    if let Some(usage) = usage {
        usage.at_monotonic_ns += 1_000_000_000;
        usage.cpu_time_ns += 80_000_000;
    }
}

async fn send(to: &mpsc::Sender<v1::AgentMessage>, kind: agent_message::Kind) -> Result<()> {
    to.send(v1::AgentMessage { kind: Some(kind) }).await.context("the session has ended")
}

/// The report of a task that has begun.
pub(super) fn task(task_id: String, attempt: u32, generation: u64, start: v1::Start) -> Result<v1::NodeTask> {
    let v1::Start { spec, owner, gpu_cards: _ } = start;
    let spec = spec.context("a start without a spec")?;
    let task = v1::Task {
        task_id,
        attempt,
        runs_as: owner.clone(),
        owner,
        command: spec.command,
        created_unix_nanos: 1_700_000_000_000_000_000,
        cgroup: "/shaper.slice/node".into(),
        limits: Some(v1::Limits::default()),
        usage: Some(v1::Usage { cpu_time_ns: 1_000_000, memory_bytes: Some(1 << 20), ..Default::default() }),
        ..v1::Task::default()
    };
    Ok(v1::NodeTask { task: Some(task), generation, evicted: false, lease_over: false, request: None })
}
