//! An agent that keeps the contract and runs nothing.

use std::collections::BTreeMap;

use shaper_proto::v1::{
    self, agent_message, agent_session_client::AgentSessionClient, broker_message, directive,
    directive_result,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::broker::PATIENCE;

/// What outlives a session.
pub(crate) struct Agent {
    pub(crate) node: String,
    pub(crate) boot_id: String,
    pub(crate) cpu_millicores: u64,
    pub(crate) inventory: BTreeMap<(String, u32), v1::NodeTask>,
    pub(crate) highest_epoch: u64,
    /// Executions that were begun.
    pub(crate) starts: Vec<(String, u32)>,
}

impl Agent {
    pub(crate) fn new(node: &str, cpu_millicores: u64) -> Agent {
        Agent {
            node: node.into(),
            boot_id: "boot-1".into(),
            cpu_millicores,
            inventory: BTreeMap::new(),
            highest_epoch: 0,
            starts: Vec::new(),
        }
    }

    fn hello(&self) -> v1::Hello {
        v1::Hello {
            node: self.node.clone(),
            boot_id: self.boot_id.clone(),
            capacity: Some(v1::Capacity {
                cpu_millicores: self.cpu_millicores,
                memory_bytes: 64 << 30,
                ..v1::Capacity::default()
            }),
            inventory: self.inventory.values().cloned().collect(),
            highest_epoch: self.highest_epoch,
            agent_socket: format!("/run/{}.sock", self.node),
            gpus: None,
            runs_containers: false,
        }
    }

    /// A session, after Welcome and policies.
    pub(crate) async fn attach(&mut self, channel: Channel) -> Result<Session, Status> {
        let (to, outgoing) = mpsc::channel(16);
        let mut client = AgentSessionClient::new(channel);
        to.send(message(agent_message::Kind::Hello(self.hello()))).await.unwrap();
        let from = client.attach(ReceiverStream::new(outgoing)).await?.into_inner();
        let mut session = Session { to, from };
        let broker_message::Kind::Welcome(v1::Welcome { epoch }) = session.next().await? else {
            panic!("the first message of a broker is Welcome");
        };
        assert!(epoch >= self.highest_epoch, "epoch {epoch} after {}", self.highest_epoch);
        self.highest_epoch = epoch;
        let broker_message::Kind::Policies(_) = session.next().await? else {
            panic!("the second message of a broker is its policies");
        };
        Ok(session)
    }

    /// As if the task had been started; its report.
    pub(crate) fn start(&mut self, directive: &v1::Directive) -> v1::NodeTask {
        let start = match &directive.kind {
            Some(directive::Kind::Start(start)) => start,
            Some(directive::Kind::LeasedStart(v1::LeasedStart { start: Some(start), .. })) => start,
            _ => panic!("{directive:?} is no start"),
        };
        let v1::Start { spec, owner, gpu_cards: _ } = start;
        let spec = spec.clone().unwrap();
        let task = v1::Task {
            task_id: directive.task_id.clone(),
            attempt: directive.attempt,
            owner: owner.clone(),
            runs_as: spec.run_as.or_else(|| owner.clone()),
            command: spec.command,
            limits: Some(v1::Limits::default()),
            usage: Some(v1::Usage {
                cpu_time_ns: 1_000_000_000,
                memory_bytes: Some(1 << 20),
                ..Default::default()
            }),
            ..v1::Task::default()
        };
        let task = v1::NodeTask {
            task: Some(task),
            generation: directive.generation,
            evicted: false,
            lease_over: false,
            request: None,
        };
        let key = (directive.task_id.clone(), directive.attempt);
        self.starts.push(key.clone());
        self.inventory.insert(key, task.clone());
        task
    }

    /// As if the task had ended; its report.
    pub(crate) fn end(&mut self, task: &str, attempt: u32, code: i32) -> v1::NodeTask {
        let entry = self.inventory.get_mut(&(task.to_owned(), attempt)).unwrap();
        let exit = v1::Exit { status: Some(v1::exit::Status::Code(code)), unix_nanos: 1_000_000_000 };
        entry.task.as_mut().unwrap().exit = Some(exit);
        entry.clone()
    }

    pub(crate) fn forget(&mut self, directive: &v1::Directive) {
        assert_eq!(directive.kind, Some(directive::Kind::Forget(true)));
        self.inventory.remove(&(directive.task_id.clone(), directive.attempt));
    }

    /// Obeys until the session ends, or until there is nothing left of what it began: tasks end at once.
    #[cfg(feature = "failpoints")]
    pub(crate) async fn obey(&mut self, channel: Channel) {
        let Ok(mut session) = self.attach(channel).await else { return };
        while let Ok(broker_message::Kind::Directive(directive)) = session.next().await {
            let key = (directive.task_id.clone(), directive.attempt);
            match directive.kind {
                Some(directive::Kind::Start(_)) if !self.inventory.contains_key(&key) => {
                    let running = self.start(&directive);
                    session.accept(&directive).await;
                    session.report(running).await;
                    session.report(self.end(&key.0, key.1, 0)).await;
                }
                Some(directive::Kind::Forget(_)) => {
                    self.forget(&directive);
                    return;
                }
                _ => panic!("unexpected: {directive:?}"),
            }
        }
    }
}

/// One stream.
pub(crate) struct Session {
    to: mpsc::Sender<v1::AgentMessage>,
    from: Streaming<v1::BrokerMessage>,
}

fn message(kind: agent_message::Kind) -> v1::AgentMessage {
    v1::AgentMessage { kind: Some(kind) }
}

impl Session {
    pub(crate) async fn next(&mut self) -> Result<broker_message::Kind, Status> {
        let next = tokio::time::timeout(PATIENCE, self.from.message()).await.expect("the broker is silent");
        next?.and_then(|message| message.kind).ok_or_else(|| Status::unavailable("the session has ended"))
    }

    pub(crate) async fn directive(&mut self) -> v1::Directive {
        match self.next().await.unwrap() {
            broker_message::Kind::Directive(directive) => directive,
            other => panic!("{other:?} is no directive"),
        }
    }

    /// Nobody may listen any more: a broker that died is found out by the next read.
    async fn send(&mut self, kind: agent_message::Kind) {
        let _ = self.to.send(message(kind)).await;
    }

    async fn result(&mut self, directive: &v1::Directive, outcome: directive_result::Outcome) {
        let v1::Directive { task_id, attempt, generation, .. } = directive.clone();
        let result = v1::DirectiveResult { task_id, attempt, generation, outcome: Some(outcome) };
        self.send(agent_message::Kind::Result(result)).await;
    }

    pub(crate) async fn accept(&mut self, directive: &v1::Directive) {
        self.result(directive, directive_result::Outcome::Accepted(true)).await;
    }

    pub(crate) async fn refuse(&mut self, directive: &v1::Directive, why: &str) {
        self.result(directive, directive_result::Outcome::Refused(why.into())).await;
    }

    pub(crate) async fn report(&mut self, task: v1::NodeTask) {
        self.send(agent_message::Kind::Task(task)).await;
    }

    pub(crate) async fn say(&mut self, kind: agent_message::Kind) {
        self.send(kind).await;
    }
}
