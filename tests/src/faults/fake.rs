//! An agent that keeps the contract on a node that is only pretended ([`Machine`]). It has a thread and a network namespace of
//! its own, and connects as a real one does.

use std::{
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use shaper_identity::{
    Role,
    tls::{self, Material},
};
use shaper_proto::v1::{self, agent_message, agent_session_client::AgentSessionClient, broker_message};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::{
    machine::Machine,
    switch::{Lan, Plug, Switch},
};
use crate::net::Netns;

/// The address of the first.
pub(super) const FIRST: u8 = 31;
/// As of the real one.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How often it asks whether the broker is there, one question at a time.
const QUESTIONS: Duration = Duration::from_millis(500);
/// Messages that may be on their way to a broker.
const NEWS: usize = 64;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What becomes of the process that the agent would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Runs,
    /// Stopped, by SIGSTOP.
    Stands,
    /// Killed, and not started again yet.
    Gone,
    /// Never to be started again.
    Over,
}

/// The agent, until it is dropped.
pub(super) struct Agent {
    pub(super) machine: Machine,
    pub(super) plug: Plug,
    mode: watch::Sender<Mode>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
    _netns: Arc<Netns>,
}

/// What its thread needs.
struct Life {
    machine: Machine,
    brokers: Vec<String>,
    identity: PathBuf,
    mode: watch::Receiver<Mode>,
    gate: Arc<Gate>,
}

/// Where a thread that is stopped waits.
#[derive(Default)]
struct Gate {
    is_shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn wait(&self) {
        let shut = self.is_shut.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(shut, |shut| *shut));
    }

    fn shut(&self, shut: bool) {
        *self.is_shut.lock().unwrap_or_else(PoisonError::into_inner) = shut;
        self.opened.notify_all();
    }
}

impl Agent {
    /// Starts it. `identities` has its certificate, under its name.
    pub(super) fn start(
        switch: &Switch,
        number: usize,
        machine: Machine,
        identity: PathBuf,
        brokers: &[String],
    ) -> Agent {
        let netns = Arc::new(Netns::new());
        let plug = switch.connect(&netns, &format!("n{number}"), Lan::Agents, FIRST + number as u8);
        let (mode, follows) = watch::channel(Mode::Runs);
        let gate = Arc::new(Gate::default());
        let mut brokers = brokers.to_vec();
        // They do not all ask the same one first.
        let first = number % brokers.len().max(1);
        brokers.rotate_left(first);
        let life = Life { machine: machine.clone(), brokers, identity, mode: follows, gate: gate.clone() };
        let there = netns.clone();
        let thread = thread::spawn(move || there.within(|| life.live()));
        Agent { machine, plug, mode, gate, thread: Some(thread), _netns: netns }
    }

    /// SIGSTOP: its thread stands still, and the kernel goes on for it.
    pub(super) fn stop(&self) {
        self.gate.shut(true);
        self.mode.send_replace(Mode::Stands);
    }

    /// SIGKILL.
    pub(super) fn kill(&self) {
        self.mode.send_replace(Mode::Gone);
    }

    /// It goes on, or is started again.
    pub(super) fn go_on(&self) {
        self.mode.send_replace(Mode::Runs);
        self.gate.shut(false);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.mode.send_replace(Mode::Over);
        self.gate.shut(false);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Life {
    fn live(self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a thread can wait for IO").block_on(self.lives());
    }

    /// One life after the other.
    async fn lives(mut self) {
        loop {
            let mode = *self.mode.borrow_and_update();
            match mode {
                Mode::Over => return,
                Mode::Gone => {
                    if self.mode.changed().await.is_err() {
                        return;
                    }
                }
                Mode::Stands => self.gate.wait(),
                Mode::Runs => self.run_until_killed().await,
            }
        }
    }

    async fn run_until_killed(&mut self) {
        let mut mode = self.mode.clone();
        let mut keeps = std::pin::pin!(self.keep());
        loop {
            tokio::select! {
                () = &mut keeps => return,
                changed = mode.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = *mode.borrow_and_update();
                    match now {
                        Mode::Runs => {}
                        // With it stands all that this thread has: the session, too.
                        Mode::Stands => self.gate.wait(),
                        Mode::Gone | Mode::Over => return,
                    }
                }
            }
        }
    }

    /// Keeps a session with the broker that leads, as the real agent does.
    async fn keep(&self) {
        let mut pause = PAUSE;
        loop {
            let begun = tokio::time::Instant::now();
            for broker in &self.brokers {
                // Why does not matter: it is begun again.
                let _ = self.session(broker).await;
            }
            if begun.elapsed() > LONGEST_PAUSE {
                pause = PAUSE;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn connect(&self, broker: &str) -> Result<Channel, Error> {
        let config = Material::load(&self.identity)?.client(&[Role::Broker])?;
        let address = broker.to_owned();
        let connector = tower::service_fn(move |_| {
            let (address, config) = (address.clone(), config.clone());
            async move { tls::connect(&address, config).await }
        });
        let endpoint = Endpoint::from_static("http://broker");
        let endpoint = endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE);
        Ok(endpoint.connect_timeout(KEEPALIVE).connect_with_connector(connector).await?)
    }

    async fn session(&self, broker: &str) -> Result<(), Error> {
        let mut client = AgentSessionClient::new(self.connect(broker).await?);
        let (outgoing, messages) = mpsc::channel(NEWS);
        let (news, mut to_be_told) = mpsc::unbounded_channel();
        let mut questions = tokio::time::interval(QUESTIONS);
        let mut open = Some((0, std::time::Instant::now()));
        let mut number = 0;
        let send = async |kind| outgoing.send(v1::AgentMessage { kind: Some(kind) }).await;
        send(agent_message::Kind::Hello(self.machine.meet(news))).await?;
        let mut incoming = client.attach(ReceiverStream::new(messages)).await?.into_inner();
        loop {
            tokio::select! {
                message = incoming.message() => match message?.and_then(|message| message.kind) {
                    Some(broker_message::Kind::Welcome(v1::Welcome { epoch })) => {
                        self.machine.obey(epoch)?;
                        if let Some((_, asked)) = open.take() {
                            self.machine.heard(asked);
                        }
                    }
                    Some(broker_message::Kind::Contact(v1::Contact { number })) => {
                        if let Some((_, asked)) = open.take_if(|open| open.0 == number) {
                            self.machine.heard(asked);
                        }
                    }
                    Some(broker_message::Kind::Directive(directive)) => {
                        send(self.machine.carry_out(&directive)).await?;
                    }
                    Some(broker_message::Kind::Policies(_)) => {}
                    None => return Ok(()),
                },
                _ = questions.tick() => if open.is_none() {
                    number += 1;
                    open = Some((number, std::time::Instant::now()));
                    send(agent_message::Kind::Contact(v1::Contact { number })).await?;
                },
                told = to_be_told.recv() => match told {
                    Some(kind) => send(kind).await?,
                    None => return Ok(()),
                },
            }
        }
    }
}
