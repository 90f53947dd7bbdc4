//! The agent's side of its session with the broker: it connects, says what it has, carries out directives
//! and reports. The node works without it; a lost session is begun again.
//!
//! While there are tasks with a lease it asks the broker whether it is there, one question at a time, and notes when it asked
//! what was answered ([`crate::contact`]).

mod questions;

use std::time::Duration;

use hyper_util::rt::TokioIo;
use shaper_core::{
    spec::{Demand, Policy, TaskSpec},
    task::Owner,
};
use shaper_identity::{
    Role,
    tls::{self, Material, TlsError},
};
use shaper_proto::{
    convert::{self, WireError},
    failpoint,
    v1::{
        self, agent_message, agent_session_client::AgentSessionClient, broker_message, directive,
        directive_result,
    },
};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::{
    actor::{ActorError, Handle},
    config::Broker,
    contact::boottime_ns,
    launch,
    node::{
        Node, NodeError,
        cluster::{Assigned, DirectiveId, Inventory, News, Starting},
    },
};
use questions::Questions;

/// The first pause after a lost session; it doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A broker on another machine that does not answer for this long is gone.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// News that may wait; a broker that is further behind gets a new session, with an inventory.
const NEWS: usize = 1024;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect to the broker at {path}")]
    Connect { path: String, source: tonic::transport::Error },
    #[error(transparent)]
    Certificate(#[from] TlsError),
    #[error("the broker ended the session: {}", .0.message())]
    Status(tonic::Status),
    #[error("the broker closed the session")]
    Closed,
    #[error("it is begun anew: the broker fell behind, or this node has other cards to offer")]
    Behind,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Actor(#[from] ActorError),
}

/// Keeps a session for as long as the agent lives: with the one of the brokers that leads. Those that stand by refuse it.
pub async fn keep(brokers: Vec<Broker>, node: Handle) {
    let mut pause = PAUSE;
    loop {
        let begun = tokio::time::Instant::now();
        for broker in &brokers {
            match session(broker, &node).await {
                Err(SessionError::Actor(ActorError::Stopped)) => return,
                Err(error) => {
                    tracing::warn!(%broker, error = %launch::chain(&error), "no session with the broker");
                }
                Ok(never) => match never {},
            }
        }
        if begun.elapsed() > LONGEST_PAUSE {
            pause = PAUSE;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

enum Never {}

async fn connect(broker: &Broker) -> Result<Channel, SessionError> {
    // The authority is not used, but a URI needs one.
    let endpoint = Endpoint::from_static("http://broker");
    let connected = match broker {
        Broker::Socket(path) => {
            let path = path.clone();
            let connector = tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            endpoint.connect_with_connector(connector).await
        }
        Broker::Tls { address, directory } => {
            // Read anew each time, so that a certificate that was replaced is the one that is shown. A session ends when
            // the one that it began with does, and the next begins here.
            let config = Material::load(directory)?.client(&[Role::Broker])?;
            let address = address.clone();
            let connector = tower::service_fn(move |_| {
                let (address, config) = (address.clone(), config.clone());
                async move { tls::connect(&address, config).await }
            });
            let endpoint = endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE);
            endpoint.connect_timeout(KEEPALIVE).connect_with_connector(connector).await
        }
    };
    connected.map_err(|source| SessionError::Connect { path: broker.to_string(), source })
}

async fn session(broker: &Broker, node: &Handle) -> Result<Never, SessionError> {
    let mut client = AgentSessionClient::new(connect(broker).await?);
    let (outgoing, messages) = mpsc::channel(NEWS);
    let (news, mut received_news) = mpsc::channel(NEWS);
    let mut questions = Questions::begin(node.call(|node| node.contact()).await?, boottime_ns());
    let inventory = node.call(move |node| node.meet(news)).await??;
    let session = inventory.session;
    let hello = agent_message::Kind::Hello(hello(inventory));
    send(&outgoing, hello).await?;
    let answer = client.attach(ReceiverStream::new(messages)).await.map_err(SessionError::Status)?;
    let mut incoming = answer.into_inner();
    tracing::info!(%broker, "in session with the broker");
    loop {
        tokio::select! {
            message = incoming.message() => {
                let message = message.map_err(SessionError::Status)?.ok_or(SessionError::Closed)?;
                let kind = message.kind.ok_or(WireError::Missing("kind"))?;
                receive(kind, node, session, &outgoing, &mut questions).await?;
            }
            () = questions.due() => {
                let contact = questions.ask(boottime_ns());
                send(&outgoing, agent_message::Kind::Contact(contact)).await?;
            }
            news = received_news.recv() => {
                // The node let go of its end: we were too slow for it.
                let news = news.ok_or(SessionError::Behind)?;
                send(&outgoing, wire_news(news)).await?;
            }
        }
    }
}

async fn send(
    outgoing: &mpsc::Sender<v1::AgentMessage>,
    kind: agent_message::Kind,
) -> Result<(), SessionError> {
    outgoing.send(v1::AgentMessage { kind: Some(kind) }).await.map_err(|_| SessionError::Closed)
}

async fn receive(
    message: broker_message::Kind,
    node: &Handle,
    session: u64,
    outgoing: &mpsc::Sender<v1::AgentMessage>,
    questions: &mut Questions,
) -> Result<(), SessionError> {
    match message {
        broker_message::Kind::Welcome(v1::Welcome { epoch }) => {
            node.call(move |node| node.obey(epoch)).await??;
            // A broker of an epoch that is over is not the one that is asked.
            questions.answered(questions::HELLO);
        }
        broker_message::Kind::Contact(v1::Contact { number }) => questions.answered(number),
        broker_message::Kind::Policies(v1::PolicySet { revision, policies }) => {
            let policies = policies.into_iter().map(Policy::try_from).collect::<Result<_, _>>()?;
            node.call(move |node| node.set_policies(revision, policies)).await?;
        }
        broker_message::Kind::Directive(directive) => {
            if let Some(v1::Directive { task_id, attempt, generation, .. }) = questions.called_off(&directive)
            {
                let outcome =
                    directive_result::Outcome::Refused("it is to be stopped before it began".into());
                let result = v1::DirectiveResult { task_id, attempt, generation, outcome: Some(outcome) };
                send(outgoing, agent_message::Kind::Result(result)).await?;
            }
            questions.take(directive);
        }
    }
    for directive in questions.ready(boottime_ns()) {
        // One that waits must not hold up the others.
        let (node, outgoing) = (node.clone(), outgoing.clone());
        tokio::spawn(async move {
            let numbers = (directive.task_id.clone(), directive.attempt, directive.generation);
            let outcome = match carry_out(directive, &node, session).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    let reason = launch::chain(&error);
                    tracing::warn!(task = numbers.0, attempt = numbers.1, reason, "refused a directive");
                    directive_result::Outcome::Refused(reason)
                }
            };
            let (task_id, attempt, generation) = numbers;
            let result = v1::DirectiveResult { task_id, attempt, generation, outcome: Some(outcome) };
            failpoint::hit("agent-before-result");
            // Without a session the next inventory tells it.
            let _ = send(&outgoing, agent_message::Kind::Result(result)).await;
        });
    }
    Ok(())
}

async fn carry_out(
    wire: v1::Directive,
    node: &Handle,
    session: u64,
) -> Result<directive_result::Outcome, SessionError> {
    let v1::Directive { task_id, attempt, generation, epoch, kind } = wire;
    let id = DirectiveId { execution: convert::execution(&task_id, attempt)?, generation, epoch, session };
    let task = id.execution.task.clone();
    let (start, lease_seconds) = match kind.ok_or(WireError::Missing("directive.kind"))? {
        directive::Kind::Start(start) => (start, None),
        directive::Kind::LeasedStart(v1::LeasedStart { start, task_lease_seconds }) => {
            (start.ok_or(WireError::Missing("leased_start.start"))?, Some(task_lease_seconds))
        }
        directive::Kind::Stop(v1::Stop { grace_millis, reason }) => {
            tracing::info!(%task, reason, "the broker ends a task");
            let grace = Duration::from_millis(grace_millis);
            let assigned = node.call(move |node| node.stop_assigned(&id, grace)).await??;
            return Ok(directive_result::Outcome::Settled(wire_assigned(assigned)));
        }
        directive::Kind::Resize(v1::Resize { request, reason }) => {
            let request = Demand::try_from(request.ok_or(WireError::Missing("resize.request"))?)?;
            let resize = move |node: &mut Node| node.resize_assigned(&id, request, &reason);
            return Ok(directive_result::Outcome::Settled(wire_assigned(node.call(resize).await??)));
        }
        directive::Kind::Forget(_) => {
            node.call(move |node| node.forget_assigned(&id)).await??;
            return Ok(directive_result::Outcome::Accepted(true));
        }
    };
    let v1::Start { spec, owner, gpu_cards } = start;
    let spec = TaskSpec::try_from(spec.ok_or(WireError::Missing("start.spec"))?)?;
    let v1::Credentials { uid, gid, groups: _ } = owner.ok_or(WireError::Missing("start.owner"))?;
    let owner = Owner { uid, gid };
    let cards = convert::gpu::grant(gpu_cards)?;
    let start = move |node: &mut Node| node.start_assigned(&id, owner, spec, cards, lease_seconds);
    let assigned = match node.call(start).await?? {
        Starting::There(assigned) => *assigned,
        Starting::Waiting(answer) => {
            answer.await.map_err(|_| ActorError::Stopped)??;
            node.call(move |node| node.assigned(&task)).await??
        }
    };
    Ok(directive_result::Outcome::Settled(wire_assigned(assigned)))
}

fn hello(inventory: Inventory) -> v1::Hello {
    let Inventory {
        node,
        boot_id,
        capacity,
        gpus,
        runs_containers,
        tasks,
        highest_epoch,
        agent_socket,
        session: _,
    } = inventory;
    v1::Hello {
        node,
        boot_id,
        capacity: Some(capacity.into()),
        inventory: tasks.into_iter().map(wire_assigned).collect(),
        highest_epoch,
        agent_socket,
        gpus: gpus.map(Into::into),
        runs_containers,
    }
}

fn wire_assigned(assigned: Assigned) -> v1::NodeTask {
    let Assigned { status, generation, evicted, lease_over, request } = assigned;
    v1::NodeTask {
        task: Some(status.into()),
        generation,
        evicted,
        lease_over,
        request: request.map(Into::into),
    }
}

fn wire_news(news: News) -> agent_message::Kind {
    match news {
        News::Task(assigned) => agent_message::Kind::Task(wire_assigned(*assigned)),
        News::Decision { execution, decision } => agent_message::Kind::Decision(v1::TaskDecision {
            task_id: execution.task.into(),
            attempt: execution.attempt,
            decision: Some(decision.into()),
        }),
        News::Node { cpu_utilisation_permille, policies_revision } => {
            agent_message::Kind::Report(v1::NodeReport { cpu_utilisation_permille, policies_revision })
        }
    }
}
