//! The thread that owns state and store. Whatever waits in its queue is worked off in one go: every
//! event through the reactor, one transaction with all rows that changed, and only when that is durable
//! the effects and the answers. If it cannot be made durable, the thread ends with what it did not say,
//! and the process with it.
//!
//! So the price of a commit is shared by all that came while the last one was made: the more there is to do, the more is done
//! at a time. A row that changes more than once meanwhile is written once.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use shaper_core::{
    id::TaskId,
    scale::{Order, Scaling},
    spec::Policy,
    task::UnixNanos,
};
use shaper_metrics::traces;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::{
    failpoint,
    life::life,
    metrics::Commits,
    reactor::{
        self, Answer, Bounds, Directive, Effect, Event, Hello, Phase, Refusal, Row, RowChange, SessionId,
        State, Task,
        rows::{EPOCH, LoadError, Loading},
    },
    store::{Compare, Op, Store, StoreError, Txn},
};

/// Jobs that may wait; of clients, more are refused.
const QUEUE: usize = 1024;
/// Events that share a transaction, or little more than these.
const BATCH: usize = 2048;
/// Rows that one event usually changes, or fewer.
const ROWS_OF_AN_EVENT: usize = 8;
/// Messages to an agent that may wait: more than there can be tasks, so that all can be repeated at once.
pub const OUTBOX: usize = 32_768;
/// Changes that a watcher may be behind, be it slow or away.
pub(crate) const CHANGES: usize = 16_384;

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
    /// The broker is there: the answer to a question.
    Contact(u64),
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
    /// What is counted of commits.
    pub commits: &'a Commits,
    changes: &'a Changes,
}

impl View<'_> {
    /// Every change of a task after this view.
    pub fn changes(&self) -> broadcast::Receiver<Arc<Task>> {
        self.changes.live.subscribe()
    }

    /// The tasks that changed after a revision of this epoch, as they are in this view, in the order of their changes;
    /// `None`: not all of these are known any more, or the revision is not of this epoch.
    pub fn since(&self, epoch: u64, revision: u64) -> Option<Vec<Arc<Task>>> {
        let is_known = (self.changes.compacted..=self.state.revision).contains(&revision);
        if epoch != self.state.epoch || !is_known {
            return None;
        }
        let recent = &self.changes.recent;
        let from = recent.partition_point(|(of_change, _)| *of_change <= revision);
        let latest = recent.range(from..).filter_map(|(of_change, id)| {
            self.state.tasks.get(id).map(|row| &row.task).filter(|task| task.revision == *of_change)
        });
        Some(latest.map(|task| Arc::new(task.clone())).collect())
    }
}

/// The latest changes of tasks, for those who watch and for those who come back to that.
struct Changes {
    live: broadcast::Sender<Arc<Task>>,
    recent: VecDeque<(u64, TaskId)>,
    /// All after this revision are among the recent ones.
    compacted: u64,
}

impl Changes {
    /// A change is durable. Of several of a task that became so together, those who watch see the last.
    fn add(&mut self, state: &State, revision: u64, id: TaskId) {
        if self.recent.len() == CHANGES
            && let Some((oldest, _)) = self.recent.pop_front()
        {
            self.compacted = oldest;
        }
        let task = state.tasks.get(&id).map(|row| &row.task).filter(|task| task.revision == revision);
        if let Some(task) = task
            && self.live.receiver_count() > 0
        {
            // They may have gone meanwhile.
            let _ = self.live.send(Arc::new(task.clone()));
        }
        self.recent.push_back((revision, id));
    }
}

/// Answers to all events of a job, in their order.
type Reply = oneshot::Sender<Vec<Result<Answer, Refusal>>>;

enum Job {
    /// Of a client that waits for the answers.
    Ask(Vec<Event>, Reply),
    /// Of an agent.
    Tell(Vec<Event>),
    /// An agent connected.
    Connect(SessionId, Box<Hello>, mpsc::Sender<ToAgent>),
    Read(Box<dyn FnOnce(&View<'_>) + Send>),
    Stop,
}

impl Job {
    /// How many events it has.
    fn events(&self) -> usize {
        match self {
            Job::Ask(events, _) | Job::Tell(events) => events.len(),
            Job::Connect(..) => 1,
            Job::Read(_) | Job::Stop => 0,
        }
    }
}

/// The answers to one job.
struct Answers {
    reply: Reply,
    given: Vec<Result<Answer, Refusal>>,
    /// All of its events have happened.
    is_complete: bool,
}

/// What was decided, and is not durable yet.
#[derive(Default)]
struct Pending {
    rows: BTreeSet<Row>,
    effects: Vec<Effect>,
    answers: Vec<Answers>,
}

/// A way to the broker.
#[derive(Clone, Debug)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    sessions: Arc<AtomicU64>,
    wakeup: watch::Receiver<Wakeup>,
    noted: watch::Receiver<u64>,
}

/// When something is to be decided that no event will cause.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Wakeup {
    /// [`reactor::next_wakeup`].
    at: Option<UnixNanos>,
    /// [`reactor::next_rerun`].
    rerun: Option<Instant>,
}

impl Handle {
    /// A request of a client: the answer is durable.
    pub async fn ask(&self, event: Event) -> Result<Result<Answer, Refusal>, ActorError> {
        let (reply, answers) = oneshot::channel();
        self.submit(Job::Ask(vec![event], reply))?;
        let answers = answers.await.map_err(|_| ActorError::Stopped)?;
        answers.into_iter().next().ok_or(ActorError::Stopped)
    }

    /// Requests of a client, one after the other: waits for their turn, however long the queue. The answers, in the same order,
    /// come when all of it is durable.
    pub async fn ask_all(
        &self,
        events: Vec<Event>,
    ) -> Result<oneshot::Receiver<Vec<Result<Answer, Refusal>>>, ActorError> {
        let (reply, answers) = oneshot::channel();
        self.jobs.send(Job::Ask(events, reply)).await.map_err(|_| ActorError::Stopped)?;
        Ok(answers)
    }

    /// A look at the state that waits for its turn, however long the queue: for those of whom there are few.
    pub async fn read_in_turn<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View<'_>) -> T + Send + 'static,
    ) -> Result<T, ActorError> {
        let (job, answer) = reading(look);
        self.jobs.send(job).await.map_err(|_| ActorError::Stopped)?;
        answer.await.map_err(|_| ActorError::Stopped)
    }

    /// A look at the state.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View<'_>) -> T + Send + 'static,
    ) -> Result<T, ActorError> {
        let (job, answer) = reading(look);
        self.submit(job)?;
        answer.await.map_err(|_| ActorError::Stopped)
    }

    fn submit(&self, job: Job) -> Result<(), ActorError> {
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ActorError::Busy,
            mpsc::error::TrySendError::Closed(_) => ActorError::Stopped,
        })
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// What an agent says: waits for its turn, however long the queue.
    pub async fn tell(&self, events: Vec<Event>) -> Result<(), ActorError> {
        self.jobs.send(Job::Tell(events)).await.map_err(|_| ActorError::Stopped)
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

    /// How many decisions there were: of the latest ones a look at the state tells more.
    pub fn noted(&self) -> watch::Receiver<u64> {
        self.noted.clone()
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

/// A look, and where what it sees comes.
fn reading<T: Send + 'static>(
    look: impl FnOnce(&View<'_>) -> T + Send + 'static,
) -> (Job, oneshot::Receiver<T>) {
    let (reply, answer) = oneshot::channel();
    let job = move |view: &View<'_>| {
        // For a caller who has gone away meanwhile nobody looks.
        if !reply.is_closed() {
            drop(reply.send(look(view)));
        }
    };
    (Job::Read(Box::new(job)), answer)
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
    changes: Changes,
    wakeup: watch::Sender<Wakeup>,
    noted: watch::Sender<u64>,
    orders: Option<Orders>,
    commits: Commits,
    /// When it had taken over the store.
    began: Instant,
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
    bounds: Bounds,
    scaling: Scaling,
    queue: mpsc::Receiver<Job>,
    wakeup: watch::Sender<Wakeup>,
    noted: watch::Sender<u64>,
    orders: Option<Orders>,
}

/// The way of orders to those who start and end nodes, each with the name of its group.
type Orders = mpsc::UnboundedSender<(String, Order)>;

impl Seat {
    /// Has nodes started and ended: what is to be told to whom. There is one order of each group at a time.
    pub fn scale(&mut self, scaling: Scaling) -> mpsc::UnboundedReceiver<(String, Order)> {
        let (orders, receiver) = mpsc::unbounded_channel();
        self.scaling = scaling;
        self.orders = Some(orders);
        receiver
    }
}

/// A way to a broker that has not begun yet.
pub fn prepare(bounds: Bounds) -> (Handle, Seat) {
    let (jobs, queue) = mpsc::channel(QUEUE);
    let (wakeup, wakeups) = watch::channel(Wakeup::default());
    let (noted, follower) = watch::channel(0);
    let handle = Handle { jobs, sessions: Arc::new(AtomicU64::new(1)), wakeup: wakeups, noted: follower };
    (handle, Seat { bounds, scaling: Scaling::default(), queue, wakeup, noted, orders: None })
}

impl Actor {
    /// Takes over a store: its epoch is higher from here on.
    pub fn open(mut store: Box<dyn Store>, seat: Seat) -> Result<Actor, FatalError> {
        // Of a task the key of what was submitted is the later one.
        let (mut loading, mut before) = (Loading::default(), None);
        store.scan_back(&mut |key, revision, value| {
            if key == EPOCH.as_bytes() {
                before = Some(revision);
            }
            loading.add(key, value);
        })?;
        let mut state = loading.finish()?;
        state.bounds = seat.bounds;
        state.scale.scaling = seat.scaling.clone();
        let key = EPOCH.as_bytes().to_vec();
        let compare = match before {
            Some(revision) => Compare::WrittenAt { key, revision },
            None => Compare::Absent { key },
        };
        let begun = reactor::begin(&mut state).rows;
        commit(store.as_mut(), compare, begun.iter().map(|row| op(state.row(row))))?;
        let epoch_revision = epoch_revision(store.as_ref())?;
        tracing::info!(
            epoch = state.epoch,
            tasks = state.tasks.len(),
            nodes = state.nodes.len(),
            "took over the store"
        );
        let Seat { bounds: _, scaling: _, queue, wakeup, noted, orders } = seat;
        let compacted = state.revision;
        let actor = Actor {
            state,
            store,
            epoch_revision,
            jobs: queue,
            own: VecDeque::new(),
            outboxes: HashMap::new(),
            changes: Changes { live: broadcast::channel(CHANGES).0, recent: VecDeque::new(), compacted },
            wakeup,
            noted,
            orders,
            commits: Commits::default(),
            began: Instant::now(),
        };
        actor.wakeup.send_replace(actor.next_wakeup());
        Ok(actor)
    }

    fn next_wakeup(&self) -> Wakeup {
        let rerun = reactor::next_rerun(&self.state).map(Duration::from_nanos);
        Wakeup {
            at: reactor::next_wakeup(&self.state),
            rerun: rerun.and_then(|uptime| self.began.checked_add(uptime)),
        }
    }

    /// Works until [`Handle::stop`], or until a commit fails.
    pub fn run(mut self) -> Result<(), FatalError> {
        while let Some(first) = self.own.pop_front().or_else(|| self.jobs.blocking_recv()) {
            let mut events = first.events();
            let mut batch = vec![first];
            while events < BATCH
                && let Some(job) = self.own.pop_front().or_else(|| self.jobs.try_recv().ok())
            {
                events += job.events();
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
        let (mut pending, mut reads, mut stops) = (Pending::default(), Vec::new(), false);
        for job in batch {
            match job {
                Job::Ask(events, reply) => {
                    pending.answers.push(Answers {
                        reply,
                        given: Vec::with_capacity(events.len()),
                        is_complete: false,
                    });
                    self.apply(events, &mut pending)?;
                    if let Some(answers) = pending.answers.last_mut() {
                        answers.is_complete = true;
                    }
                }
                Job::Tell(events) => self.apply(events, &mut pending)?,
                Job::Connect(session, hello, outbox) => {
                    self.outboxes.insert(session, outbox);
                    self.apply(vec![Event::AgentConnected { session, hello }], &mut pending)?;
                }
                Job::Read(look) => reads.push(look),
                Job::Stop => stops = true,
            }
        }
        self.settle(&mut pending)?;
        let view = View { state: &self.state, now: now(), commits: &self.commits, changes: &self.changes };
        for look in reads {
            look(&view);
        }
        let next = self.next_wakeup();
        self.wakeup.send_if_modified(|wakeup| std::mem::replace(wakeup, next) != next);
        let now = self.state.shown.noted();
        self.noted.send_if_modified(|noted| std::mem::replace(noted, now) != now);
        Ok(stops)
    }

    /// Lets events happen. What was decided before is settled first where the store would not take both at its usual price.
    fn apply(&mut self, events: Vec<Event>, pending: &mut Pending) -> Result<(), FatalError> {
        let most = self.store.limits().writes.saturating_sub(ROWS_OF_AN_EVENT);
        for event in events {
            // The rows are as they were before this event, so they can be committed without it.
            if pending.rows.len() > most {
                self.settle(pending)?;
            }
            match &event {
                Event::Submit { .. } => failpoint::hit("after-receive-submit"),
                // The agent has it, and the broker has not recorded that.
                Event::DirectiveResult { .. } => failpoint::hit("after-directive"),
                Event::AgentGone { session } => drop(self.outboxes.remove(session)),
                _ => {}
            }
            self.state.uptime = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let outcome = reactor::on_event(&mut self.state, event, now());
            pending.rows.extend(outcome.rows);
            for effect in outcome.effects {
                match (effect, pending.answers.last_mut().filter(|answers| !answers.is_complete)) {
                    (Effect::Answer(answer), Some(answers)) => answers.given.push(answer),
                    (Effect::Answer(_), None) => {}
                    (effect, _) => pending.effects.push(effect),
                }
            }
        }
        Ok(())
    }

    /// Makes rows durable, and lets out what follows from them.
    fn settle(&mut self, pending: &mut Pending) -> Result<(), FatalError> {
        let effects = std::mem::take(&mut pending.effects);
        self.commit(std::mem::take(&mut pending.rows), &effects)?;
        for effect in effects {
            self.carry_out(effect);
        }
        for answers in std::mem::take(&mut pending.answers) {
            if answers.is_complete {
                failpoint::hit("before-answer");
                // The client may have gone away; it can ask again.
                let _ = answers.reply.send(answers.given);
            } else {
                pending.answers.push(answers);
            }
        }
        Ok(())
    }

    fn commit(&mut self, rows: BTreeSet<Row>, effects: &[Effect]) -> Result<(), FatalError> {
        if rows.is_empty() {
            // Leases of tasks count by these words, so they are the owner's alone to say, as a commit is.
            let says_to_be_there = |it: &Effect| matches!(it, Effect::Welcome(..) | Effect::Contact(..));
            if effects.iter().any(says_to_be_there) {
                self.store.confirm()?;
            }
            return Ok(());
        }
        let ends = effects.iter().any(|effect| self.ends(effect));
        failpoint::hit("before-commit");
        if ends {
            failpoint::hit("on-task-ended-before-commit");
        }
        let fence = Compare::WrittenAt { key: EPOCH.as_bytes().to_vec(), revision: self.epoch_revision };
        let begun = Instant::now();
        commit(self.store.as_mut(), fence, rows.iter().map(|row| op(self.state.row(row))))?;
        self.commits.took.add(begun.elapsed());
        self.commits.rows += rows.len() as u64;
        if rows.contains(&Row::Epoch) {
            self.epoch_revision = epoch_revision(self.store.as_ref())?;
        }
        failpoint::hit("after-commit");
        if ends {
            failpoint::hit("on-task-ended-after-commit");
        }
        Ok(())
    }

    /// Whether this is of a task that is over: two failpoints are about that.
    fn ends(&self, effect: &Effect) -> bool {
        let Effect::Changed { task, .. } = effect else { return false };
        let row = self.state.tasks.get(task);
        cfg!(feature = "failpoints") && row.is_some_and(|row| matches!(row.task.phase, Phase::Ended { .. }))
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            // They wait until all of a job is settled.
            Effect::Answer(_) => {}
            Effect::Welcome(session, epoch) => self.send(session, ToAgent::Welcome(epoch)),
            Effect::Contact(session, number) => self.send(session, ToAgent::Contact(number)),
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
            Effect::Changed { task, revision } => self.changes.add(&self.state, revision, task),
            Effect::Over(task) => {
                if traces::are_wanted()
                    && let Some(life) = self.state.tasks.get(&task).and_then(|row| life(row))
                {
                    life.tell();
                }
            }
            Effect::ScaleOut { task, reason } => {
                tracing::warn!(%task, reason, "more nodes are needed");
            }
            Effect::Scale { group, order } => {
                tracing::info!(group, number = order.number, target = order.target, "asks for another size");
                if let Some(orders) = &self.orders {
                    // Nobody takes them any more when this broker ends.
                    let _ = orders.send((group, *order));
                }
            }
            Effect::Warn(text) => tracing::warn!("{text}"),
        }
    }

    /// An agent that does not take what it is sent is as good as gone; it is told all again when it is back.
    fn send(&mut self, session: SessionId, message: ToAgent) {
        let Some(outbox) = self.outboxes.get(&session) else { return };
        if outbox.try_send(message).is_err() {
            self.outboxes.remove(&session);
            self.own.push_back(Job::Tell(vec![Event::AgentGone { session }]));
        }
    }
}

fn op(RowChange { key, value }: RowChange) -> Op {
    let key = key.into_bytes();
    match value {
        Some(value) => Op::Put { key, value },
        None => Op::Delete { key },
    }
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
        let Wakeup { at, rerun } = *handle.wakeup.borrow_and_update();
        let until = at.map(|at| Duration::from_nanos(at.saturating_sub(now())));
        let until_rerun = rerun.map(|rerun| rerun.saturating_duration_since(Instant::now()));
        let due = async {
            match until.into_iter().chain(until_rerun).min() {
                Some(wait) => tokio::time::sleep(wait.max(MIN_WAIT)).await,
                None => std::future::pending().await,
            }
        };
        let stopped = tokio::select! {
            changed = handle.wakeup.changed() => changed.is_err(),
            () = due => handle.jobs.send(Job::Tell(vec![Event::Tick])).await.is_err(),
        };
        if stopped {
            return;
        }
    }
}
