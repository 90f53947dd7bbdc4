//! The reactor against model agents: random events, lost and doubled messages, disconnects, reboots,
//! and crashes of the broker before and after its commits. One seed is one run.
//!
//! A model agent does what the contract asks of a real one: it keeps its inventory over restarts of the
//! broker, carries out (task, attempt, generation) once, and forgets an execution when told.

mod cards;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::{prelude::*, sample::Index};
use shaper_core::{
    gpu::{CardOffer, CardRequest},
    policy::PolicyFloors,
    spec::{DecisionKind, OnNodeLost, Priority},
    task::{ExitStatus, Phase as RunPhase},
    units::{Bytes, Millicores},
};

use self::cards::{CARD, CARDS, gpus};
use super::{
    state::{Node, TaskRow},
    tests::{GIB, OPERATOR, SECOND, USER, hello, id, policy, spec, status},
    *,
};

const NODES: usize = 3;
const TASKS: usize = 11;
/// In thousandths of a core. One task is larger than any node.
const CAPACITY: u64 = 4000;
/// Of tasks that are over, so few are remembered that their ids are used again.
const BOUNDS: Bounds = Bounds { open_tasks: 100, ended_tasks: 2, task_lease_seconds: LEASE };
/// Of every second task, which is run again when its node is lost.
const LEASE: u32 = 40;
const DEMANDS: [u64; TASKS] = [1000, 3000, 2000, 4000, 500, 9000, 500, 500, 500, 1000, 500];

/// What may happen. Each number picks among what is there.
#[derive(Clone, Debug)]
enum Step {
    Submit(Index),
    Cancel(Index),
    Connect(Index),
    Disconnect(Index),
    Reboot {
        node: Index,
        forgets: bool,
    },
    /// An agent comes back with these of its cards.
    Offer(Index, u64),
    /// An agent takes one directive; it may refuse to start, or accept and never say more.
    Obey {
        node: Index,
        refuses: bool,
    },
    /// The broker takes one message; a doubled one comes again later.
    Hear {
        node: Index,
        doubled: bool,
    },
    Exit {
        node: Index,
        task: Index,
        how: Exit,
    },
    /// An agent asks whether the broker is there, and is answered, later.
    Ask(Index),
    /// The answer comes.
    Answer(Index),
    /// An agent is cut off, and the broker does not notice.
    Cut(Index),
    /// An agent tells what its tasks use: now, and twice before.
    Tell(Index),
    /// The broker notices.
    Notice(Index),
    /// An operator says that a node is dead, and it is.
    Fence(Index),
    Wait(u8),
    /// The broker dies at its next event, before or after the commit.
    Crash {
        committed: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Exit {
    Done,
    Evicted,
    Abandoned,
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    prop_oneof![
        6 => index().prop_map(Step::Submit),
        2 => index().prop_map(Step::Cancel),
        6 => index().prop_map(Step::Connect),
        2 => index().prop_map(Step::Disconnect),
        1 => (index(), any::<bool>()).prop_map(|(node, forgets)| Step::Reboot { node, forgets }),
        1 => (index(), 0..4u64).prop_map(|(node, cards)| Step::Offer(node, cards)),
        14 => (index(), prop::bool::weighted(0.15)).prop_map(|(node, refuses)| Step::Obey { node, refuses }),
        18 => (index(), prop::bool::weighted(0.1)).prop_map(|(node, doubled)| Step::Hear { node, doubled }),
        8 => (index(), index(), prop_oneof![4 => Just(Exit::Done), 2 => Just(Exit::Evicted), 1 => Just(Exit::Abandoned)])
            .prop_map(|(node, task, how)| Step::Exit { node, task, how }),
        3 => index().prop_map(Step::Ask),
        3 => index().prop_map(Step::Answer),
        1 => index().prop_map(Step::Cut),
        4 => index().prop_map(Step::Tell),
        1 => index().prop_map(Step::Notice),
        1 => index().prop_map(Step::Fence),
        4 => (0u8..90).prop_map(Step::Wait),
        2 => any::<bool>().prop_map(|committed| Step::Crash { committed }),
    ]
}

#[derive(Clone, Debug)]
enum Said {
    Result(DirectiveResult),
    Report(Box<NodeTask>),
    Decision(ExecutionId, Decision),
}

#[derive(Debug)]
struct Agent {
    name: String,
    boot: u32,
    session: Option<SessionId>,
    inventory: BTreeMap<ExecutionId, NodeTask>,
    highest_epoch: u64,
    inbox: VecDeque<Directive>,
    outbox: VecDeque<Said>,
    /// When it asked what was answered last …
    contact: u64,
    /// … and what the broker has answered since, in this session.
    answered: Option<u64>,
    /// A session that is over, which the broker does not know.
    unnoticed: Option<SessionId>,
    /// The cards that it offers.
    offers: u64,
    /// Those that each attempt was granted.
    granted: BTreeMap<ExecutionId, CardSet>,
    /// Its supervisors end tasks so much after their lease, since clocks differ and machines are busy.
    late: u64,
}

fn number(task: &TaskId) -> usize {
    task.as_str()[1..].parse().expect("tasks are numbered")
}

/// Until when an attempt may live whose agent asked last at `contact`.
fn lease_ends(task: &TaskId, contact: u64) -> u64 {
    if number(task).is_multiple_of(2) { contact + u64::from(LEASE) * SECOND } else { u64::MAX }
}

impl Agent {
    fn live(&self) -> impl Iterator<Item = &ExecutionId> {
        self.inventory.iter().filter(|(_, task)| task.status.phase == RunPhase::Running).map(|(id, _)| id)
    }

    /// The supervisors end what has gone on without the broker for too long, the agent living or not.
    fn supervise(&mut self, now: u64) {
        let live: Vec<_> = self.live().cloned().collect();
        for execution in live {
            if lease_ends(&execution.task, self.contact).saturating_add(self.late) <= now {
                if let Some(task) = self.inventory.get_mut(&execution) {
                    task.lease_over = true;
                }
                self.end(&execution, ExitStatus::Signal(9));
            }
        }
    }

    fn obey(&mut self, refuses: bool, now: u64) {
        // A start waits for an answer, if one is to come.
        self.hear_answer();
        let Some(Directive { execution, generation, epoch, kind }) = self.inbox.pop_front() else { return };
        assert!(epoch >= self.highest_epoch, "a directive of epoch {epoch} after {}", self.highest_epoch);
        self.highest_epoch = epoch;
        let result = |outcome| DirectiveResult { execution: execution.clone(), generation, outcome };
        let known = self.inventory.get(&execution).cloned();
        match (kind, known) {
            (DirectiveKind::Start(..), None) if refuses => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Refused("no".into()))));
            }
            (DirectiveKind::Start(start, cards), None) => {
                let offered = CardSet::from_bits(self.offers).has_all(cards);
                assert!(offered, "{execution} is to have {cards} of {:b}", self.offers);
                self.granted.insert(execution.clone(), cards);
                let lease_over = lease_ends(&execution.task, self.contact) <= now;
                let phase = if lease_over {
                    let (stage, error) = ("lease".into(), "too late".into());
                    RunPhase::Ended { status: ExitStatus::NotStarted { stage, error, code: 126 }, at: SECOND }
                } else {
                    RunPhase::Running
                };
                let status = status(execution.task.as_str(), execution.attempt, phase);
                let request = Some(start.spec.profile.demand);
                let task = NodeTask { status, generation, evicted: false, lease_over, request };
                self.inventory.insert(execution.clone(), task.clone());
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Accepted)));
                self.outbox.push_back(Said::Report(Box::new(task)));
            }
            (DirectiveKind::Start(_, cards), Some(task)) => {
                assert_eq!(self.granted[&execution], cards, "{execution} is granted others");
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Settled(Box::new(task)))));
            }
            (DirectiveKind::Stop { .. }, Some(task)) if task.status.phase == RunPhase::Running => {
                if let Some(task) = self.inventory.get_mut(&execution) {
                    task.generation = task.generation.max(generation);
                }
                self.end(&execution, ExitStatus::Signal(15));
            }
            (DirectiveKind::Stop { .. }, Some(task)) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Settled(Box::new(task)))));
            }
            (DirectiveKind::Stop { .. }, None) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Refused("not here".into()))));
            }
            (DirectiveKind::Resize { request, .. }, Some(task)) if task.status.phase == RunPhase::Running => {
                if task.generation < generation {
                    if refuses {
                        let outcome = DirectiveOutcome::Refused("it uses it".into());
                        return self.outbox.push_back(Said::Result(result(outcome)));
                    }
                    if let Some(task) = self.inventory.get_mut(&execution) {
                        (task.generation, task.request) = (generation, Some(request));
                    }
                }
                let task = Box::new(self.inventory[&execution].clone());
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Settled(task))));
            }
            (DirectiveKind::Resize { .. }, _) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Refused("it is over".into()))));
            }
            (DirectiveKind::Forget, _) => {
                let running = self.live().any(|live| *live == execution);
                assert!(!running, "{execution} is to be forgotten and runs");
                self.inventory.remove(&execution);
            }
        }
    }

    /// Its session is over; what was answered may still have come.
    fn leave(&mut self) {
        self.inbox.clear();
        self.outbox.clear();
        self.hear_answer();
    }

    fn hear_answer(&mut self) {
        self.contact = self.answered.take().unwrap_or(self.contact);
    }

    fn end(&mut self, execution: &ExecutionId, status: ExitStatus) {
        let Some(task) = self.inventory.get_mut(execution) else { return };
        task.status.phase = RunPhase::Ended { status, at: SECOND };
        self.outbox.push_back(Said::Report(Box::new(task.clone())));
    }
}

struct Cluster {
    state: State,
    rows: BTreeMap<String, Vec<u8>>,
    now: u64,
    /// When the broker had its rows.
    began: u64,
    sessions: u64,
    agents: Vec<Agent>,
    /// Whether the broker dies at its next event, and whether after the commit.
    crash: Option<bool>,
    /// Tasks that a client was told of, as they were then.
    promised: BTreeMap<TaskId, (u64, Phase)>,
    /// Attempts that were seen to be placed.
    placed: BTreeSet<ExecutionId>,
}

fn has_nominee(node: &Node, id: &TaskId) -> bool {
    node.nominees.iter().any(|(_, _, nominee)| nominee == id)
}

impl Cluster {
    fn new(preempts: bool, floors: bool) -> Cluster {
        let agent = |number: usize| Agent {
            name: format!("n{number}"),
            boot: 0,
            session: None,
            inventory: BTreeMap::new(),
            highest_epoch: 0,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            contact: 0,
            answered: None,
            unnoticed: None,
            offers: CARDS[number],
            granted: BTreeMap::new(),
            // Up to just before the half lease is over.
            late: number as u64 * (u64::from(LEASE) / 2 - 1) * SECOND / (NODES as u64 - 1),
        };
        let mut cluster = Cluster {
            state: State::default(),
            rows: BTreeMap::new(),
            now: SECOND,
            began: SECOND,
            sessions: 0,
            agents: (0..NODES).map(agent).collect(),
            crash: None,
            promised: BTreeMap::new(),
            placed: BTreeSet::new(),
        };
        cluster.start();
        for priority in [Priority::Medium, Priority::High].into_iter().filter(|_| preempts) {
            let policy = Box::new(policy(&format!("{priority}"), priority, true));
            cluster.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
        }
        for priority in [Priority::Low, Priority::Medium].into_iter().filter(|_| floors) {
            let floors = PolicyFloors { cpu: Some(Millicores(200)), memory: None };
            let policy = Policy { floors, ..policy(&format!("{priority}-floors"), priority, false) };
            let policy = Box::new(policy);
            cluster.on(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy });
        }
        cluster
    }

    /// A broker begins on the committed rows; every connection is lost.
    fn start(&mut self) {
        let rows = self.rows.iter().map(|(key, value)| (key.as_bytes(), value.as_slice()));
        self.state = State::load(rows).expect("committed rows can be loaded");
        self.state.bounds = BOUNDS;
        self.placed.extend(self.state.tasks.values().map(|row| row.task.execution()));
        let outcome = begin(&mut self.state);
        self.commit(&outcome);
        self.began = self.now;
        for agent in &mut self.agents {
            agent.session = None;
            agent.unnoticed = None;
            agent.leave();
        }
    }

    fn commit(&mut self, outcome: &Outcome) {
        for RowChange { key, value } in outcome.rows.iter().map(|row| self.state.row(row)) {
            match value {
                Some(value) => drop(self.rows.insert(key, value)),
                None => drop(self.rows.remove(&key)),
            }
        }
    }

    fn on(&mut self, event: Event) {
        self.state.uptime = self.now - self.began;
        let outcome = on_event(&mut self.state, event, self.now);
        match self.crash.take() {
            Some(false) => return self.start(),
            Some(true) => {
                self.commit(&outcome);
                // Nobody was told, but it may be over by that, and forgotten.
                for effect in &outcome.effects {
                    if let Effect::Changed { task, .. } = effect {
                        self.promise(task);
                    }
                }
                return self.start();
            }
            None => self.commit(&outcome),
        }
        for effect in outcome.effects {
            match effect {
                Effect::Direct(session, directive) => {
                    let is_there = |agent: &&mut Agent| {
                        agent.session == Some(session) || agent.unnoticed == Some(session)
                    };
                    let agent = self.agents.iter_mut().find(is_there);
                    let agent = agent.expect("directives go to those that the broker takes for connected");
                    if agent.session == Some(session) {
                        agent.inbox.push_back(*directive);
                    }
                }
                Effect::Welcome(session, _) | Effect::Contact(session, _) => {
                    // It had asked in this very moment.
                    if let Some(agent) = self.agents.iter_mut().find(|agent| agent.session == Some(session)) {
                        agent.answered = Some(self.now);
                    }
                }
                Effect::Close(session, _) => {
                    for agent in &mut self.agents {
                        agent.unnoticed.take_if(|unnoticed| *unnoticed == session);
                        if agent.session.take_if(|of_agent| *of_agent == session).is_some() {
                            agent.leave();
                        }
                    }
                }
                Effect::Answer(Ok(Answer::Task(_, task))) => self.promise(task.id()),
                Effect::Changed { task, .. } => self.promise(&task),
                _ => {}
            }
        }
    }

    /// Clients are told of a task.
    fn promise(&mut self, id: &TaskId) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else {
            // It was forgotten by the same event.
            self.promised.remove(id);
            return;
        };
        if let Phase::Starting { node } = &task.phase
            && self.placed.insert(task.execution())
        {
            assert!(self.state.nodes[node].session.is_some(), "placed on {node}, which is silent");
        }
        self.promised.insert(id.clone(), (task.sequence(), task.phase.clone()));
    }

    fn connect(&mut self, number: usize) {
        if self.agents[number].session.is_some() {
            return;
        }
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let agent = &mut self.agents[number];
        agent.session = Some(session);
        agent.answered = None;
        // The broker closes that one.
        agent.unnoticed = None;
        let inventory = agent.inventory.values().cloned().collect();
        let mut hello = hello(&agent.name, &format!("boot{}", agent.boot), CAPACITY, inventory);
        hello.highest_epoch = agent.highest_epoch;
        hello.gpus = CardOffer { model: format!("model {number}"), cards: CardSet::from_bits(agent.offers) };
        hello.capacity.gpu_memory = Some(Bytes(CARD * GIB));
        self.on(Event::AgentConnected { session, hello });
    }

    fn disconnect(&mut self, number: usize) {
        let agent = &mut self.agents[number];
        agent.leave();
        if let Some(session) = agent.session.take() {
            self.on(Event::AgentGone { session });
        }
    }

    /// What it offers changes while it is away.
    fn offer(&mut self, number: usize, cards: u64) {
        self.notice(number);
        self.disconnect(number);
        self.agents[number].offers = cards;
    }

    fn notice(&mut self, number: usize) {
        if let Some(session) = self.agents[number].unnoticed.take() {
            self.on(Event::AgentGone { session });
        }
    }

    fn ask(&mut self, number: usize) {
        if let Some(session) = self.agents[number].session {
            self.on(Event::Contact { session, number: 1 });
        }
    }

    fn hear(&mut self, number: usize, doubled: bool) {
        let agent = &mut self.agents[number];
        let (Some(session), Some(said)) = (agent.session, agent.outbox.pop_front()) else { return };
        if doubled {
            agent.outbox.push_back(said.clone());
        }
        self.on(match said {
            Said::Result(result) => Event::DirectiveResult { session, result },
            Said::Report(report) => Event::TaskReport { session, report },
            Said::Decision(execution, decision) => {
                Event::TaskDecision { session, execution, decision: Box::new(decision) }
            }
        });
    }

    fn exit(&mut self, number: usize, pick: &Index, how: Exit) {
        let now = self.now;
        let agent = &mut self.agents[number];
        let live: Vec<_> = agent.live().cloned().collect();
        if live.is_empty() {
            return;
        }
        let execution = pick.get(&live).clone();
        let status = match how {
            Exit::Done => ExitStatus::Code(0),
            Exit::Evicted => {
                let decision = Decision {
                    at: now,
                    by: agent.name.clone(),
                    kind: DecisionKind::Evicted,
                    reason: "pressure".into(),
                    nodes: Vec::new(),
                };
                agent.outbox.push_back(Said::Decision(execution.clone(), decision));
                ExitStatus::Signal(9)
            }
            Exit::Abandoned => {
                ExitStatus::NotStarted { stage: "abandoned".into(), error: "killed".into(), code: 126 }
            }
        };
        agent.end(&execution, status);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Submit(pick) => {
                let number = pick.index(TASKS);
                let priority = [Priority::Low, Priority::Medium, Priority::High][number % 3];
                let mut spec = Box::new(spec(&format!("t{number}"), DEMANDS[number], priority, 2));
                let (gib, count, model) = gpus(number);
                spec.profile.demand.gpu_memory = (gib > 0).then_some(Bytes(gib * GIB));
                spec.gpus = CardRequest { count, model: model.into() };
                if lease_ends(&spec.profile.task_id, 0) < u64::MAX {
                    spec.on_node_lost = OnNodeLost::Rerun;
                }
                self.on(Event::Submit { caller: USER, spec });
            }
            Step::Cancel(pick) => {
                let task = id(&format!("t{}", pick.index(TASKS)));
                self.on(Event::Cancel { caller: USER, task, grace_millis: 100 });
            }
            Step::Connect(node) => self.connect(node.index(NODES)),
            Step::Disconnect(node) => self.disconnect(node.index(NODES)),
            Step::Ask(node) => self.ask(node.index(NODES)),
            Step::Answer(node) => self.agents[node.index(NODES)].hear_answer(),
            Step::Cut(node) => {
                let agent = &mut self.agents[node.index(NODES)];
                agent.leave();
                if let Some(session) = agent.session.take() {
                    agent.unnoticed = Some(session);
                }
            }
            Step::Tell(node) => {
                let agent = &mut self.agents[node.index(NODES)];
                let live: Vec<_> = agent.live().cloned().collect();
                for execution in live {
                    for earlier in [10, 5, 0] {
                        let mut report = agent.inventory[&execution].clone();
                        // A tenth of a core. The clock of the node is ahead of ours.
                        let at = (self.now / SECOND + 20 - earlier) * SECOND;
                        report.status.usage.at_monotonic_ns = at;
                        report.status.usage.cpu_time_ns = at / 10;
                        agent.outbox.push_back(Said::Report(Box::new(report)));
                    }
                }
            }
            Step::Notice(node) => self.notice(node.index(NODES)),
            Step::Fence(node) => {
                let agent = &mut self.agents[node.index(NODES)];
                if agent.session.is_none() && agent.unnoticed.is_none() {
                    // As the operator says.
                    let live: Vec<_> = agent.live().cloned().collect();
                    for execution in live {
                        agent.end(&execution, ExitStatus::Unknown);
                    }
                    agent.outbox.clear();
                    let node = agent.name.clone();
                    self.on(Event::FenceNode { caller: OPERATOR, node });
                }
            }
            Step::Reboot { node, forgets } => {
                let number = node.index(NODES);
                self.notice(number);
                self.disconnect(number);
                let agent = &mut self.agents[number];
                agent.boot += 1;
                if *forgets {
                    agent.inventory.retain(|_, task| task.status.phase != RunPhase::Running);
                }
                for task in agent.inventory.values_mut().filter(|it| it.status.phase == RunPhase::Running) {
                    task.status.phase = RunPhase::Ended { status: ExitStatus::Unknown, at: SECOND };
                }
            }
            Step::Offer(node, cards) => {
                let number = node.index(NODES);
                self.offer(number, cards & CARDS[number]);
                self.connect(number);
            }
            Step::Obey { node, refuses } => self.agents[node.index(NODES)].obey(*refuses, self.now),
            Step::Hear { node, doubled } => self.hear(node.index(NODES), *doubled),
            Step::Exit { node, task, how } => self.exit(node.index(NODES), task, *how),
            Step::Wait(seconds) => {
                self.now += u64::from(*seconds) * SECOND;
                for agent in &mut self.agents {
                    agent.supervise(self.now);
                }
                self.on(Event::Tick);
            }
            Step::Crash { committed } => self.crash = Some(*committed),
        }
        self.check();
    }

    /// What holds at every moment.
    fn check(&self) {
        let waiting = self.state.waiting.in_order();
        assert_eq!(waiting.len(), self.state.waiting.len());
        for (id, row) in &self.state.tasks {
            let TaskRow { task, decisions } = &**row;
            let live: Vec<_> = self.agents.iter().flat_map(Agent::live).filter(|it| it.task == *id).collect();
            assert!(live.len() <= 1, "{id} is alive as {live:?}");
            if let [live] = live[..] {
                assert!(live.attempt <= task.attempt, "{live} was never placed");
            }
            let assigned: Vec<_> = self.state.nodes.values().filter(|node| node.tasks.contains(id)).collect();
            assert_eq!(assigned.len(), usize::from(task.phase.node().is_some()), "{id}: {:?}", task.phase);
            assert!(decisions.len() <= state::DECISIONS);
            let promised: Vec<_> = self.state.nodes.values().filter(|node| has_nominee(node, id)).collect();
            let names: Vec<_> = promised.iter().map(|node| &node.row.name).collect();
            match &task.phase {
                Phase::Nominated { node } => assert_eq!(names, [node], "{id}"),
                _ => assert!(names.is_empty(), "{id}: {names:?}"),
            }
            let is_silent = |node: &&Node| node.session.is_none();
            assert!(
                !promised.iter().any(is_silent),
                "{id} is promised a place on {names:?}, which is silent"
            );
            let is_pending = matches!(task.phase, Phase::Pending { .. });
            assert_eq!(waiting.iter().any(|(_, _, queued)| queued == id), is_pending);
        }
        for node in self.state.nodes.values() {
            let cpu = |id: &TaskId| self.state.tasks[id].task.request().cpu.0;
            let sum: u64 = node.tasks.iter().map(cpu).sum();
            let promised: u64 = node.nominees.iter().map(|(_, _, id)| cpu(id)).sum();
            assert_eq!(node.reserved.cpu, Millicores(sum + promised), "{}", node.row.name);
            let stay = node.tasks.iter().filter(|id| {
                let task = &self.state.tasks[*id].task;
                task.preempted.is_none() && task.cancel.is_none()
            });
            // What was asked of it, it has when its node has done it.
            let soon = |id: &TaskId| {
                let resized = self.state.tasks[id].task.resized.as_ref();
                resized.and_then(|it| it.asked.as_ref()).map_or_else(|| cpu(id), |asked| asked.request.cpu.0)
            };
            let stay: u64 = stay.map(soon).sum();
            assert!(stay + promised <= CAPACITY, "{} has {stay}, and {promised} are promised", node.row.name);
            assert!(sum <= CAPACITY, "{} holds {sum}", node.row.name);
        }
        self.check_cards();
        for (id, (sequence, promised)) in &self.promised {
            // What is over may be forgotten, and its id be used again.
            let Some(row) = self.state.tasks.get(id) else {
                assert!(promised.is_over(), "{id} was acknowledged and is lost");
                continue;
            };
            let again = row.task.sequence() > *sequence;
            assert!(!promised.is_over() || again || row.task.phase == *promised, "{id} was {promised:?}");
        }
        self.check_rows();
    }

    /// A new broker would know all that this one does, but for who is connected.
    fn check_rows(&self) {
        let rows = self.rows.iter().map(|(key, value)| (key.as_bytes(), value.as_slice()));
        let again = State::load(rows).expect("committed rows can be loaded");
        let rows = |state: &State| {
            let without_reports = |row: &TaskRow| {
                let task = Task {
                    on_node: row.task.on_node.clone().filter(|_| row.task.phase.is_over()),
                    ..row.task.clone()
                };
                TaskRow { task, decisions: row.decisions.clone() }
            };
            let tasks = state.tasks.iter().map(|(id, row)| (id.clone(), without_reports(row)));
            tasks.collect::<BTreeMap<_, _>>()
        };
        let (before, after) = (rows(&self.state), rows(&again));
        for (id, row) in &before {
            assert_eq!(after.get(id), Some(row), "{id}");
        }
        assert_eq!(before.len(), after.len());
        for (name, node) in &self.state.nodes {
            let again = Node {
                session: node.session,
                cpu_utilisation_permille: 0,
                contact_at: node.contact_at,
                ..again.nodes[name].clone()
            };
            assert_eq!(Node { cpu_utilisation_permille: 0, ..node.clone() }, again, "{name}");
        }
        assert_eq!(self.state.nodes.len(), again.nodes.len());
        assert_eq!((&self.state.policies, &self.state.histories), (&again.policies, &again.histories));
        assert_eq!(self.state.policy_revisions, again.policy_revisions);
        assert_eq!((self.state.epoch, &self.state.registered), (again.epoch, &again.registered));
        assert_eq!(self.state.waiting.in_order(), again.waiting.in_order());
        assert_eq!(self.state.open_tasks(), again.open_tasks());
        let released = |state: &State| state.released.iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(released(&self.state), released(&again));
    }

    /// Everybody is there, everything is heard, whatever runs ends: then nothing is left undone.
    fn settle(&mut self) {
        self.crash = None;
        for (number, cards) in CARDS.into_iter().enumerate() {
            self.offer(number, cards);
        }
        for _ in 0..200 {
            for number in 0..NODES {
                self.connect(number);
                self.ask(number);
                self.agents[number].hear_answer();
                while !self.agents[number].inbox.is_empty() || !self.agents[number].outbox.is_empty() {
                    self.agents[number].obey(false, self.now);
                    self.hear(number, false);
                }
                // What was cancelled must have been stopped; the rest ends by itself.
                let is_cancelled =
                    |id: &TaskId| self.state.tasks.get(id).is_some_and(|it| it.task.cancel.is_some());
                let live = self.agents[number].live().filter(|live| !is_cancelled(&live.task));
                let live: Vec<_> = live.cloned().collect();
                for execution in live {
                    self.agents[number].end(&execution, ExitStatus::Code(0));
                }
            }
            // Less than a lease and a half, so that whoever asks in each round is not given up.
            self.now += 30 * SECOND;
            self.on(Event::Tick);
            self.check();
            let quiet = self.agents.iter().all(|it| it.inbox.is_empty() && it.outbox.is_empty());
            let is_empty = |node: &Node| node.tasks.is_empty() && node.nominees.is_empty();
            if quiet && self.state.nodes.values().all(is_empty) {
                break;
            }
        }
        for TaskRow { task, .. } in self.state.tasks.values().map(Box::as_ref) {
            let fits = task.demand().cpu.0 <= CAPACITY;
            assert_eq!(
                task.phase.is_over(),
                fits || task.phase == Phase::Cancelled,
                "{} is {:?}",
                task.id(),
                task.phase
            );
        }
        for agent in &self.agents {
            assert!(agent.inventory.is_empty(), "{} still has {:?}", agent.name, agent.inventory.keys());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_doubled_or_overcommitted(
        steps in prop::collection::vec(step(), 1..150),
        preempts in any::<bool>(),
        floors in any::<bool>(),
    ) {
        let mut cluster = Cluster::new(preempts, floors);
        for step in &steps {
            cluster.step(step);
        }
        cluster.settle();
    }
}
