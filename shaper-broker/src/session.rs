//! The session of an agent: a stream in each direction for as long as both sides live.

use std::{pin::Pin, time::Duration};

use shaper_identity::serve::Asking;
use shaper_proto::v1::{self, agent_session_server::AgentSession};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    actor::{Handle, OUTBOX, ToAgent},
    reactor::{Event, SessionId},
    ready,
    service::{self, unavailable},
    wire,
};

/// How long an agent may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// Messages of an agent that are passed on at a time.
const AT_A_TIME: usize = 256;

/// The service.
pub struct SessionService {
    broker: Handle,
}

impl SessionService {
    /// A service in front of a broker.
    pub fn new(broker: Handle) -> SessionService {
        SessionService { broker }
    }
}

#[tonic::async_trait]
impl AgentSession for SessionService {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::BrokerMessage, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let Asking { caller, node, .. } = Asking::of(&request)?.clone();
        if node.is_none() && !caller.is_some_and(|caller| caller.is_operator()) {
            return Err(Status::permission_denied("only an agent that runs as uid 0 gets a session"));
        }
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(PATIENCE, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the agent did not say Hello"))??;
        let Some(v1::AgentMessage { kind: Some(v1::agent_message::Kind::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message of a session is Hello"));
        };
        let hello = Box::new(wire::hello(hello).map_err(service::invalid)?);
        let name = hello.node.clone();
        if let Some(certified) = node.filter(|certified| *certified != name) {
            return Err(Status::permission_denied(format!(
                "the certificate is of node `{certified}`, and the agent says that it is node `{name}`: start it with \
                 --node {certified}, or with the certificate of node `{name}`"
            )));
        }
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        // Weak, so that the stream ends when the broker lets go of it.
        let weak = outbox.downgrade();
        let session = self.broker.connect(hello, outbox).await.map_err(unavailable)?;
        tracing::info!(node = name, session = session.0, "an agent connected");
        tokio::spawn(listen(self.broker.clone(), session, name, messages, weak));
        let outgoing = ReceiverStream::new(outgoing);
        Ok(Response::new(Box::pin(outgoing.map(|it| wire::to_agent(it).map_err(Status::aborted)))))
    }
}

/// Passes on what an agent says, until it says no more.
async fn listen(
    broker: Handle,
    session: SessionId,
    node: String,
    mut messages: Streaming<v1::AgentMessage>,
    outbox: mpsc::WeakSender<ToAgent>,
) {
    let reason = loop {
        let some = ready::some(&mut messages, AT_A_TIME).await;
        let mut end = some.is_empty().then(|| "it closed the session".to_owned());
        let mut events = Vec::with_capacity(some.len());
        for message in some {
            match message.map(|message| wire::event(session, message)) {
                Ok(Ok(event)) => events.push(event),
                Ok(Err(error)) => {
                    if let Some(outbox) = outbox.upgrade() {
                        // It is told why, if it still listens.
                        let _ = outbox.try_send(ToAgent::Close(error.to_string()));
                    }
                    end = Some(format!("it sent what is no message: {error}"));
                }
                Err(status) => end = Some(status.message().to_owned()),
            }
            if end.is_some() {
                break;
            }
        }
        if !events.is_empty() && broker.tell(events).await.is_err() {
            return;
        }
        if let Some(reason) = end {
            break reason;
        }
    };
    tracing::info!(node, session = session.0, reason, "an agent is gone");
    // A broker that has stopped needs no telling.
    let _ = broker.tell(vec![Event::AgentGone { session }]).await;
}
