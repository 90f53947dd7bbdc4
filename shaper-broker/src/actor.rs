//! The thread that owns state and store. Whatever waits in its queue is worked off in one go: every
//! event through the reactor, one transaction with all rows that changed, and only when that is durable
//! the effects and the answers. If it cannot be made durable, the thread ends with what it did not say,
//! and the process with it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shaper_core::{spec::Policy, task::UnixNanos};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::{
    failpoint,
    reactor::{
        self, Answer, Directive, Effect, Event, Hello, Phase, Refusal, RowChange, SessionId, State, Task,
        rows::{EPOCH, LoadError},
    },
    store::{Compare, Op, Store, StoreError, Txn},
};

/// Jobs that may wait; of clients, more are refused.
const QUEUE: usize = 1024;
/// Jobs that share a transaction, at most.
const BATCH: usize = 256;
/// Messages to an agent that may wait: more than there can be tasks, so that all can be repeated at once.
pub const OUTBOX: usize = 32_768;
/// Changes that a slow watcher may be behind.
const CHANGES: usize = 1024;

/// The broker is not there any more, or has more to do than it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActorError {
    /// Its thread ended.
    #[error("the broker is stopping")]
    Stopped,
    /// Its queue is full.
    #[error("the broker has {QUEUE} requests waiting; try again")]
    Busy,
}

/// Why the broker cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FatalError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rows are not a state.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Somebody else writes to the store.
    #[error("another broker has taken over the store (the row {0} was changed); this one ends")]
    TakenOver(String),
}

/// A message to an agent.
#[derive(Clone, Debug)]
pub enum ToAgent {
    /// The epoch.
    Welcome(u64),
    /// All policies.
    Policies(u64, Vec<Policy>),
    /// An order.
    Directive(Box<Directive>),
    /// The session ends: why.
    Close(String),
}

/// What can be read, as it is durable.
pub struct View<'a> {
    /// The state.
    pub state: &'a State,
    /// The time.
    pub now: UnixNanos,
    changes: &'a broadcast::Sender<Arc<Task>>,
}

impl View<'_> {
    /// Every change of a task after this view.
    pub fn changes(&self) -> broadcast::Receiver<Arc<Task>> {
        self.changes.subscribe()
    }
}

type Reply = oneshot::Sender<Result<Answer, Refusal>>;

enum Job {
    /// Of a client that waits for the answer.
    Ask(Event, Reply),
    /// Of an agent.
    Tell(Event),
    /// An agent connected.
    Connect(SessionId, Box<Hello>, mpsc::Sender<ToAgent>),
    Read(Box<dyn FnOnce(&View<'_>) + Send>),
    Stop,
}

/// A way to the broker.
#[derive(Clone, Debug)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    sessions: Arc<AtomicU64>,
    wakeup: watch::Receiver<Option<UnixNanos>>,
}

impl Handle {
    /// A request of a client: the answer is durable.
    pub async fn ask(&self, event: Event) -> Result<Result<Answer, Refusal>, ActorError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Job::Ask(event, reply))?;
        answer.await.map_err(|_| ActorError::Stopped)
    }

    /// A look at the state.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View<'_>) -> T + Send + 'static,
    ) -> Result<T, ActorError> {
        let (reply, answer) = oneshot::channel();
        // The caller may have gone away meanwhile.
        self.submit(Job::Read(Box::new(move |view| drop(reply.send(look(view))))))?;
        answer.await.map_err(|_| ActorError::Stopped)
    }

    fn submit(&self, job: Job) -> Result<(), ActorError> {
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ActorError::Busy,
            mpsc::error::TrySendError::Closed(_) => ActorError::Stopped,
        })
    }

    /// Something that an agent says: waits for its turn, however long the queue.
    pub async fn tell(&self, event: Event) -> Result<(), ActorError> {
        self.jobs.send(Job::Tell(event)).await.map_err(|_| ActorError::Stopped)
    }

    /// An agent that connected, and the way to it.
    pub async fn connect(
        &self,
        hello: Box<Hello>,
        outbox: mpsc::Sender<ToAgent>,
    ) -> Result<SessionId, ActorError> {
        let session = SessionId(self.sessions.fetch_add(1, Ordering::Relaxed));
        let job = Job::Connect(session, hello, outbox);
        self.jobs.send(job).await.map_err(|_| ActorError::Stopped)?;
        Ok(session)
    }

    /// Ends the thread after what is in its queue.
    pub async fn stop(&self) {
        // It may have ended already.
        let _ = self.jobs.send(Job::Stop).await;
    }

    /// Returns when the thread has ended.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }
}

/// State, store and queue.
pub struct Actor {
    state: State,
    store: Box<dyn Store>,
    /// When the row of the epoch was written: by this broker, or it is not the owner any more.
    epoch_revision: u64,
    jobs: mpsc::Receiver<Job>,
    /// Jobs that its own effects led to.
    own: VecDeque<Job>,
    outboxes: HashMap<SessionId, mpsc::Sender<ToAgent>>,
    changes: broadcast::Sender<Arc<Task>>,
    wakeup: watch::Sender<Option<UnixNanos>>,
}

/// Nanoseconds since 1970.
fn now() -> UnixNanos {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixNanos::try_from(since.as_nanos())
        .unwrap_or(UnixNanos::MAX)
        .saturating_add_signed(failpoint::clock_skew())
}

/// Where jobs wait until there is an [`Actor`] for them.
pub struct Seat {
    queue: mpsc::Receiver<Job>,
    wakeup: watch::Sender<Option<UnixNanos>>,
}

/// A way to a broker that has not begun yet.
pub fn prepare() -> (Handle, Seat) {
    let (jobs, queue) = mpsc::channel(QUEUE);
    let (wakeup, wakeups) = watch::channel(None);
    let handle = Handle { jobs, sessions: Arc::new(AtomicU64::new(1)), wakeup: wakeups };
    (handle, Seat { queue, wakeup })
}

impl Actor {
    /// Takes over a store: its epoch is higher from here on.
    pub fn open(mut store: Box<dyn Store>, seat: Seat) -> Result<Actor, FatalError> {
        let rows = store.range(b"")?;
        let mut state = State::load(rows.iter().map(|(key, row)| (key.as_slice(), row.value.as_slice())))?;
        let before = rows.iter().find(|(key, _)| key == EPOCH.as_bytes()).map(|(_, row)| row.revision);
        let key = EPOCH.as_bytes().to_vec();
        let compare = match before {
            Some(revision) => Compare::WrittenAt { key, revision },
            None => Compare::Absent { key },
        };
        let changes = reactor::begin(&mut state).changes;
        commit(store.as_mut(), compare, changes.into_iter().map(op))?;
        let epoch_revision = epoch_revision(store.as_ref())?;
        tracing::info!(
            epoch = state.epoch,
            tasks = state.tasks.len(),
            nodes = state.nodes.len(),
            "took over the store"
        );
        let Seat { queue, wakeup } = seat;
        wakeup.send_replace(reactor::next_wakeup(&state));
        Ok(Actor {
            state,
            store,
            epoch_revision,
            jobs: queue,
            own: VecDeque::new(),
            outboxes: HashMap::new(),
            changes: broadcast::channel(CHANGES).0,
            wakeup,
        })
    }

    /// Works until [`Handle::stop`], or until a commit fails.
    pub fn run(mut self) -> Result<(), FatalError> {
        while let Some(first) = self.own.pop_front().or_else(|| self.jobs.blocking_recv()) {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Some(job) = self.own.pop_front().or_else(|| self.jobs.try_recv().ok())
            {
                batch.push(job);
            }
            if self.work(batch)? {
                break;
            }
        }
        Ok(())
    }

    /// One batch; whether to stop after it.
    fn work(&mut self, batch: Vec<Job>) -> Result<bool, FatalError> {
        let (mut rows, mut effects, mut reads) = (BTreeMap::new(), Vec::new(), Vec::new());
        let (limits, mut writes, mut bytes) = (self.store.limits(), 0, 0);
        let mut stops = false;
        for job in batch {
            let (event, reply) = match job {
                Job::Ask(event, reply) => (event, Some(reply)),
                Job::Tell(event) => (event, None),
                Job::Connect(session, hello, outbox) => {
                    self.outboxes.insert(session, outbox);
                    (Event::AgentConnected { session, hello }, None)
                }
                Job::Read(look) => {
                    reads.push(look);
                    continue;
                }
                Job::Stop => {
                    stops = true;
                    continue;
                }
            };
            match &event {
                Event::Submit { .. } => failpoint::hit("after-receive-submit"),
                // The agent has it, and the broker has not recorded that.
                Event::DirectiveResult { .. } => failpoint::hit("after-directive"),
                Event::AgentGone { session } => drop(self.outboxes.remove(session)),
                _ => {}
            }
            let outcome = reactor::on_event(&mut self.state, event, now());
            let changes = outcome.changes.into_iter().map(|RowChange { key, value }| (key, value));
            let changes: BTreeMap<_, _> = changes.collect();
            let more = changes.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
            // The rows are as they were before this event, so they can be committed without it. What is written twice
            // counts twice.
            if writes > 0 && (writes + changes.len() > limits.writes || bytes + more > limits.bytes) {
                self.settle(std::mem::take(&mut rows), std::mem::take(&mut effects))?;
                (writes, bytes) = (0, 0);
            }
            (writes, bytes) = (writes + changes.len(), bytes + more);
            rows.extend(changes);
            effects.push((outcome.effects, reply));
        }
        self.settle(rows, effects)?;
        let view = View { state: &self.state, now: now(), changes: &self.changes };
        for look in reads {
            look(&view);
        }
        let next = reactor::next_wakeup(&self.state);
        self.wakeup.send_if_modified(|wakeup| std::mem::replace(wakeup, next) != next);
        Ok(stops)
    }

    /// Makes rows durable, and lets out what follows from them.
    fn settle(
        &mut self,
        rows: BTreeMap<String, Vec<u8>>,
        effects: Vec<(Vec<Effect>, Option<Reply>)>,
    ) -> Result<(), FatalError> {
        self.commit(rows, &effects)?;
        for (effects, reply) in effects {
            self.carry_out(effects, reply);
        }
        Ok(())
    }

    fn commit(
        &mut self,
        rows: BTreeMap<String, Vec<u8>>,
        effects: &[(Vec<Effect>, Option<Reply>)],
    ) -> Result<(), FatalError> {
        if rows.is_empty() {
            return Ok(());
        }
        let ended = |effect: &Effect| matches!(effect, Effect::Changed(task) if matches!(task.phase, Phase::Ended { .. }));
        let ends = effects.iter().flat_map(|(effects, _)| effects).any(ended);
        failpoint::hit("before-commit");
        if ends {
            failpoint::hit("on-task-ended-before-commit");
        }
        let fence = Compare::WrittenAt { key: EPOCH.as_bytes().to_vec(), revision: self.epoch_revision };
        let writes_epoch = rows.contains_key(EPOCH);
        let ops = rows.into_iter().map(|(key, value)| op(RowChange { key, value }));
        commit(self.store.as_mut(), fence, ops)?;
        if writes_epoch {
            self.epoch_revision = epoch_revision(self.store.as_ref())?;
        }
        failpoint::hit("after-commit");
        if ends {
            failpoint::hit("on-task-ended-after-commit");
        }
        Ok(())
    }

    fn carry_out(&mut self, effects: Vec<Effect>, mut reply: Option<Reply>) {
        for effect in effects {
            match effect {
                Effect::Answer(answer) => {
                    if let Some(reply) = reply.take() {
                        failpoint::hit("before-answer");
                        // The client may have gone away; it can ask again.
                        let _ = reply.send(answer);
                    }
                }
                Effect::Welcome(session, epoch) => self.send(session, ToAgent::Welcome(epoch)),
                Effect::Policies(session, revision, policies) => {
                    self.send(session, ToAgent::Policies(revision, policies));
                }
                Effect::Direct(session, directive) => {
                    failpoint::hit("before-directive");
                    self.send(session, ToAgent::Directive(directive));
                }
                Effect::Close(session, reason) => {
                    self.send(session, ToAgent::Close(reason));
                    self.outboxes.remove(&session);
                }
                // Nobody may be watching.
                Effect::Changed(task) => drop(self.changes.send(Arc::from(task))),
                Effect::ScaleOut { task, reason } => {
                    tracing::warn!(%task, reason, "more nodes are needed");
                }
                Effect::Warn(text) => tracing::warn!("{text}"),
            }
        }
    }

    /// An agent that does not take what it is sent is as good as gone; it is told all again when it is back.
    fn send(&mut self, session: SessionId, message: ToAgent) {
        let Some(outbox) = self.outboxes.get(&session) else { return };
        if outbox.try_send(message).is_err() {
            self.outboxes.remove(&session);
            self.own.push_back(Job::Tell(Event::AgentGone { session }));
        }
    }
}

fn op(RowChange { key, value }: RowChange) -> Op {
    Op::Put { key: key.into_bytes(), value }
}

/// One transaction of the owner of the store.
fn commit(store: &mut dyn Store, fence: Compare, ops: impl Iterator<Item = Op>) -> Result<(), FatalError> {
    match store.txn(&[fence], &ops.collect::<Vec<_>>())? {
        Txn::Committed { .. } => Ok(()),
        Txn::Conflict { key } => Err(FatalError::TakenOver(String::from_utf8_lossy(&key).into_owned())),
    }
}

/// When the row of the epoch was written, which need not be the revision of a large transaction.
fn epoch_revision(store: &dyn Store) -> Result<u64, FatalError> {
    let row = store.get(EPOCH.as_bytes())?;
    row.map(|row| row.revision).ok_or_else(|| FatalError::TakenOver(EPOCH.to_owned()))
}

/// Two ticks are at least this far apart.
const MIN_WAIT: Duration = Duration::from_millis(10);

/// Tells the broker when a time has come that it waits for.
pub async fn tick(mut handle: Handle) {
    loop {
        let at = *handle.wakeup.borrow_and_update();
        let due = async {
            match at {
                Some(at) => {
                    tokio::time::sleep(Duration::from_nanos(at.saturating_sub(now())).max(MIN_WAIT)).await
                }
                None => std::future::pending().await,
            }
        };
        let stopped = tokio::select! {
            changed = handle.wakeup.changed() => changed.is_err(),
            () = due => handle.jobs.send(Job::Tell(Event::Tick)).await.is_err(),
        };
        if stopped {
            return;
        }
    }
}
