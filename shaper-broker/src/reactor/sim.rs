//! The reactor against model agents: random events, lost and doubled messages, disconnects, reboots,
//! and crashes of the broker before and after its commits. One seed is one run.
//!
//! A model agent does what the contract asks of a real one: it keeps its inventory over restarts of the
//! broker, carries out (task, attempt, generation) once, and forgets an execution when told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::{prelude::*, sample::Index};
use shaper_core::{
    spec::{DecisionKind, Priority},
    task::{ExitStatus, Phase as RunPhase},
    units::Millicores,
};

use super::{
    state::{Node, TaskRow},
    tests::{OPERATOR, SECOND, USER, hello, id, spec, status},
    *,
};

const NODES: usize = 3;
const TASKS: usize = 6;
/// In thousandths of a core. One task is larger than any node.
const CAPACITY: u64 = 4000;
/// Of tasks that are over, so few are remembered that their ids are used again.
const BOUNDS: Bounds = Bounds { open_tasks: 100, ended_tasks: 2 };
const DEMANDS: [u64; TASKS] = [1000, 3000, 2000, 4000, 500, 9000];

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
        14 => (index(), prop::bool::weighted(0.15)).prop_map(|(node, refuses)| Step::Obey { node, refuses }),
        18 => (index(), prop::bool::weighted(0.1)).prop_map(|(node, doubled)| Step::Hear { node, doubled }),
        8 => (index(), index(), prop_oneof![4 => Just(Exit::Done), 2 => Just(Exit::Evicted), 1 => Just(Exit::Abandoned)])
            .prop_map(|(node, task, how)| Step::Exit { node, task, how }),
        1 => index().prop_map(Step::Fence),
        3 => (0u8..90).prop_map(Step::Wait),
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
}

impl Agent {
    fn live(&self) -> impl Iterator<Item = &ExecutionId> {
        self.inventory.iter().filter(|(_, task)| task.status.phase == RunPhase::Running).map(|(id, _)| id)
    }

    fn obey(&mut self, refuses: bool) {
        let Some(Directive { execution, generation, epoch, kind }) = self.inbox.pop_front() else { return };
        assert!(epoch >= self.highest_epoch, "a directive of epoch {epoch} after {}", self.highest_epoch);
        self.highest_epoch = epoch;
        let result = |outcome| DirectiveResult { execution: execution.clone(), generation, outcome };
        let known = self.inventory.get(&execution).cloned();
        match (kind, known) {
            (DirectiveKind::Start(_), None) if refuses => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Refused("no".into()))));
            }
            (DirectiveKind::Start(_), None) => {
                let running = status(execution.task.as_str(), execution.attempt, RunPhase::Running);
                let task = NodeTask { status: running, generation, evicted: false };
                self.inventory.insert(execution.clone(), task.clone());
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Accepted)));
                self.outbox.push_back(Said::Report(Box::new(task)));
            }
            (DirectiveKind::Start(_), Some(task)) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Settled(Box::new(task)))));
            }
            (DirectiveKind::Stop { .. }, Some(task)) if task.status.phase == RunPhase::Running => {
                self.end(&execution, ExitStatus::Signal(15));
            }
            (DirectiveKind::Stop { .. }, Some(task)) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Settled(Box::new(task)))));
            }
            (DirectiveKind::Stop { .. }, None) => {
                self.outbox.push_back(Said::Result(result(DirectiveOutcome::Refused("not here".into()))));
            }
            (DirectiveKind::Forget, _) => {
                let running = self.live().any(|live| *live == execution);
                assert!(!running, "{execution} is to be forgotten and runs");
                self.inventory.remove(&execution);
            }
        }
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
    sessions: u64,
    agents: Vec<Agent>,
    /// Whether the broker dies at its next event, and whether after the commit.
    crash: Option<bool>,
    /// Tasks that a client was told of, as they were then.
    promised: BTreeMap<TaskId, (u64, Phase)>,
    /// Attempts that were seen to be placed.
    placed: BTreeSet<ExecutionId>,
}

impl Cluster {
    fn new() -> Cluster {
        let agent = |number| Agent {
            name: format!("n{number}"),
            boot: 0,
            session: None,
            inventory: BTreeMap::new(),
            highest_epoch: 0,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
        };
        let mut cluster = Cluster {
            state: State::default(),
            rows: BTreeMap::new(),
            now: SECOND,
            sessions: 0,
            agents: (0..NODES).map(agent).collect(),
            crash: None,
            promised: BTreeMap::new(),
            placed: BTreeSet::new(),
        };
        cluster.start();
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
        for agent in &mut self.agents {
            agent.session = None;
            agent.inbox.clear();
            agent.outbox.clear();
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
                    let agent = self.agents.iter_mut().find(|agent| agent.session == Some(session));
                    agent.expect("directives go to connected agents").inbox.push_back(*directive);
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
        let inventory = agent.inventory.values().cloned().collect();
        let mut hello = hello(&agent.name, &format!("boot{}", agent.boot), CAPACITY, inventory);
        hello.highest_epoch = agent.highest_epoch;
        self.on(Event::AgentConnected { session, hello });
    }

    fn disconnect(&mut self, number: usize) {
        let agent = &mut self.agents[number];
        agent.inbox.clear();
        agent.outbox.clear();
        if let Some(session) = agent.session.take() {
            self.on(Event::AgentGone { session });
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
                let spec = Box::new(spec(&format!("t{number}"), DEMANDS[number], priority, 2));
                self.on(Event::Submit { caller: USER, spec });
            }
            Step::Cancel(pick) => {
                let task = id(&format!("t{}", pick.index(TASKS)));
                self.on(Event::Cancel { caller: USER, task, grace_millis: 100 });
            }
            Step::Connect(node) => self.connect(node.index(NODES)),
            Step::Disconnect(node) => self.disconnect(node.index(NODES)),
            Step::Fence(node) => {
                let agent = &mut self.agents[node.index(NODES)];
                if agent.session.is_none() {
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
            Step::Obey { node, refuses } => self.agents[node.index(NODES)].obey(*refuses),
            Step::Hear { node, doubled } => self.hear(node.index(NODES), *doubled),
            Step::Exit { node, task, how } => self.exit(node.index(NODES), task, *how),
            Step::Wait(seconds) => {
                self.now += u64::from(*seconds) * SECOND;
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
            let is_pending = matches!(task.phase, Phase::Pending { .. });
            assert_eq!(waiting.iter().any(|(_, _, queued)| queued == id), is_pending);
        }
        for node in self.state.nodes.values() {
            let sum: u64 = node.tasks.iter().map(|id| self.state.tasks[id].task.demand().cpu.0).sum();
            assert_eq!(node.reserved.cpu, Millicores(sum), "{}", node.row.name);
            assert!(sum <= CAPACITY, "{} holds {sum}", node.row.name);
        }
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
            let again =
                Node { session: node.session, cpu_utilisation_permille: 0, ..again.nodes[name].clone() };
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
        for _ in 0..200 {
            for number in 0..NODES {
                self.connect(number);
                while !self.agents[number].inbox.is_empty() || !self.agents[number].outbox.is_empty() {
                    self.agents[number].obey(false);
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
            self.now += 60 * SECOND;
            self.on(Event::Tick);
            self.check();
            let quiet = self.agents.iter().all(|it| it.inbox.is_empty() && it.outbox.is_empty());
            if quiet && self.state.nodes.values().all(|node| node.tasks.is_empty()) {
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
    fn nothing_is_lost_doubled_or_overcommitted(steps in prop::collection::vec(step(), 1..150)) {
        let mut cluster = Cluster::new();
        for step in &steps {
            cluster.step(step);
        }
        cluster.settle();
    }
}
