//! The rules, one by one.

use shaper_core::{
    limits::Limits,
    place::NOTHING,
    spec::{Capacity, Credentials, DecisionKind, Demand, OnNodeLost, Policy, Priority, Profile, TaskSpec},
    task::{ExitStatus, Origin, Owner, Phase as RunPhase, TaskStatus, Traffic, Usage},
    units::{Bytes, Millicores},
};

use super::*;

pub(super) const GIB: u64 = 1 << 30;
pub(super) const SECOND: u64 = 1_000_000_000;
pub(crate) const OPERATOR: Credentials = Credentials { uid: 0, gid: 0, groups: Vec::new() };
pub(crate) const USER: Credentials = Credentials { uid: 1000, gid: 1000, groups: Vec::new() };
pub(super) const OTHER: Credentials = Credentials { uid: 1001, gid: 1001, groups: Vec::new() };

pub(crate) fn id(text: &str) -> TaskId {
    text.parse().unwrap()
}

pub(crate) fn spec(task: &str, cpu: u64, priority: Priority, retries: u32) -> TaskSpec {
    let demand = Demand {
        cpu: Millicores(cpu),
        memory: Bytes(GIB),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };
    TaskSpec {
        profile: Profile { task_id: id(task), demand, priority, estimated_runtime_seconds: None },
        command: vec!["sleep".into(), "1".into()],
        env: Default::default(),
        cwd: "/".into(),
        name: "sleep".into(),
        namespace: "default".into(),
        labels: Default::default(),
        limits: Limits::default(),
        run_as: None,
        retries,
        on_node_lost: OnNodeLost::Wait,
        gpus: Default::default(),
        image: None,
    }
}

/// A policy for the tasks of a priority in the default namespace.
pub(crate) fn policy(name: &str, priority: Priority, preemption_enabled: bool) -> Policy {
    Policy {
        policy_name: name.into(),
        priority,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: Some(900),
        preemption_enabled,
        window_millis: 10_000,
        selector: Default::default(),
        limits: Default::default(),
        floors: Default::default(),
    }
}

pub(crate) fn status(task: &str, attempt: u32, phase: RunPhase) -> TaskStatus {
    TaskStatus {
        task_id: id(task),
        attempt,
        owner: Owner { uid: 1000, gid: 1000 },
        runs_as: Owner { uid: 1000, gid: 1000 },
        origin: Origin::Launched { command: vec!["sleep".into()] },
        workload: None,
        adopted_by: None,
        phase,
        pid: None,
        cgroup: "/x".into(),
        created_at: 0,
        limits: Limits::default(),
        enforcement: Vec::new(),
        usage: Usage::default(),
        shrink: None,
        idle: None,
        oom_kill: None,
        notes: Vec::new(),
    }
}

pub(crate) fn hello(node: &str, boot: &str, cpu: u64, inventory: Vec<NodeTask>) -> Box<Hello> {
    Box::new(Hello {
        node: node.into(),
        boot_id: boot.into(),
        capacity: Capacity { cpu: Millicores(cpu), memory: Bytes(64 * GIB), ..NOTHING },
        inventory,
        highest_epoch: 0,
        agent_socket: format!("/run/{node}.sock"),
        gpus: Default::default(),
        containers: false,
    })
}

/// A broker under test: its state, its rows, its clock.
pub(super) struct Broker {
    pub(super) state: State,
    pub(super) now: u64,
    sessions: u64,
}

impl Broker {
    pub(super) fn new() -> Broker {
        let mut state = State::default();
        begin(&mut state);
        Broker { state, now: SECOND, sessions: 0 }
    }

    pub(super) fn on(&mut self, event: Event) -> Vec<Effect> {
        on_event(&mut self.state, event, self.now).effects
    }

    pub(super) fn submit(&mut self, spec: TaskSpec) -> Vec<Effect> {
        self.on(Event::Submit { caller: USER, spec: Box::new(spec) })
    }

    pub(super) fn connect(&mut self, hello: Box<Hello>) -> (SessionId, Vec<Effect>) {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let effects = self.on(Event::AgentConnected { session, hello });
        (session, effects)
    }

    pub(super) fn node(&mut self, name: &str, cpu: u64) -> SessionId {
        self.connect(hello(name, "boot", cpu, Vec::new())).0
    }

    pub(super) fn report(
        &mut self,
        session: SessionId,
        task: &str,
        attempt: u32,
        phase: RunPhase,
    ) -> Vec<Effect> {
        let report = Box::new(NodeTask {
            status: status(task, attempt, phase),
            generation: 1,
            evicted: false,
            lease_over: false,
            request: None,
        });
        self.on(Event::TaskReport { session, report })
    }

    fn ended(&mut self, session: SessionId, task: &str, attempt: u32, code: i32) -> Vec<Effect> {
        let at = self.now;
        self.report(session, task, attempt, RunPhase::Ended { status: ExitStatus::Code(code), at })
    }

    fn refuse(&mut self, session: SessionId, task: &str, attempt: u32, generation: u64) -> Vec<Effect> {
        let execution = ExecutionId { task: id(task), attempt };
        let outcome = DirectiveOutcome::Refused("no".into());
        self.on(Event::DirectiveResult {
            session,
            result: DirectiveResult { execution, generation, outcome },
        })
    }

    fn accept(&mut self, session: SessionId, task: &str, attempt: u32, generation: u64) -> Vec<Effect> {
        let execution = ExecutionId { task: id(task), attempt };
        let outcome = DirectiveOutcome::Accepted;
        self.on(Event::DirectiveResult {
            session,
            result: DirectiveResult { execution, generation, outcome },
        })
    }

    fn evict(&mut self, session: SessionId, task: &str, attempt: u32) {
        let decision = Box::new(Decision {
            at: self.now,
            by: "liar".into(),
            kind: DecisionKind::Evicted,
            reason: "pressure".into(),
            nodes: Vec::new(),
        });
        let execution = ExecutionId { task: id(task), attempt };
        self.on(Event::TaskDecision { session, execution, decision });
        let status = ExitStatus::Signal(9);
        self.report(session, task, attempt, RunPhase::Ended { status, at: self.now });
    }

    pub(super) fn task(&self, task: &str) -> &Task {
        &self.state.tasks[&id(task)].task
    }

    pub(super) fn kinds(&self, task: &str) -> Vec<DecisionKind> {
        self.state.tasks[&id(task)].decisions.iter().map(|decision| decision.kind).collect()
    }

    fn reason(&self, task: &str) -> &str {
        match &self.task(task).phase {
            Phase::Pending { reason, .. } => reason,
            phase => panic!("{task} is {phase:?}"),
        }
    }
}

pub(super) fn directives(effects: &[Effect]) -> Vec<(&'static str, String, u64)> {
    let directives = effects.iter().filter_map(|effect| match effect {
        Effect::Direct(_, directive) => Some(directive),
        _ => None,
    });
    let kind = |directive: &Directive| match directive.kind {
        DirectiveKind::Start(..) => "start",
        DirectiveKind::Stop { .. } => "stop",
        DirectiveKind::Resize { .. } => "resize",
        DirectiveKind::Forget => "forget",
    };
    directives.map(|it| (kind(it), it.execution.to_string(), it.generation)).collect()
}

fn refusal(effects: &[Effect]) -> Option<&Refusal> {
    effects.iter().find_map(|effect| match effect {
        Effect::Answer(Err(refusal)) => Some(refusal),
        _ => None,
    })
}

fn on(node: &str) -> Phase {
    Phase::Running { node: node.into() }
}

#[test]
fn a_task_is_placed_runs_ends_and_is_forgotten() {
    let mut broker = Broker::new();
    let session = broker.node("n1", 4000);
    let effects = broker.submit(spec("t", 1000, Priority::Low, 0));
    assert_eq!(directives(&effects), [("start", "t.1".into(), 1)]);
    assert!(matches!(effects.last(), Some(Effect::Answer(Ok(Answer::Task(_, task)))) if task.revision == 1));
    broker.accept(session, "t", 1, 1);
    assert!(broker.task("t").acknowledged);
    broker.refuse(session, "t", 1, 1);
    assert_eq!(
        broker.task("t").phase.node(),
        Some("n1"),
        "what was accepted may be alive: it is not placed again"
    );
    broker.report(session, "t", 1, RunPhase::Running);
    assert_eq!(broker.task("t").phase, on("n1"));
    assert_eq!(broker.state.nodes["n1"].reserved.cpu, Millicores(1000));
    let effects = broker.ended(session, "t", 1, 3);
    assert_eq!(directives(&effects), [("forget", "t.1".into(), 2)]);
    assert!(matches!(broker.task("t").phase, Phase::Ended { status: ExitStatus::Code(3), .. }));
    assert_eq!(broker.state.nodes["n1"].reserved.cpu, Millicores(0));
    assert_eq!(broker.kinds("t"), [DecisionKind::Placed, DecisionKind::Ended]);
    let again = broker.ended(session, "t", 1, 3);
    assert_eq!(directives(&again), [("forget", "t.1".into(), 2)], "a stale report changes nothing");
    assert_eq!(broker.kinds("t").len(), 2);
}

#[test]
fn the_same_submission_is_the_same_task() {
    let mut broker = Broker::new();
    broker.submit(spec("t", 1000, Priority::Low, 0));
    let revision = broker.task("t").revision;
    let effects = broker.submit(spec("t", 1000, Priority::Low, 0));
    assert!(matches!(effects.as_slice(), [Effect::Answer(Ok(Answer::Task(..)))]), "{effects:?}");
    assert_eq!(broker.task("t").revision, revision);
    let effects = broker.submit(spec("t", 2000, Priority::Low, 0));
    assert_eq!(refusal(&effects), Some(&Refusal::Exists(id("t"), Taken::OtherSpec)));
    for caller in [OTHER, OPERATOR] {
        let spec = Box::new(spec("t", 1000, Priority::Low, 0));
        let effects = broker.on(Event::Submit { caller, spec });
        assert_eq!(refusal(&effects), Some(&Refusal::Exists(id("t"), Taken::OtherUser)));
    }
}

#[test]
fn only_the_operator_runs_tasks_as_others() {
    let mut broker = Broker::new();
    let as_user = |task: &str, uid, groups: &[u32]| {
        let run_as = Some(Credentials { uid, gid: 1000, groups: groups.to_vec() });
        Box::new(TaskSpec { run_as, ..spec(task, 1000, Priority::Low, 0) })
    };
    for (task, spec) in [("a", as_user("a", 1001, &[])), ("b", as_user("b", 1000, &[4]))] {
        let effects = broker.on(Event::Submit { caller: USER, spec });
        assert_eq!(refusal(&effects), Some(&Refusal::Denied(Denied::RunAs)), "{task}");
    }
    let effects = broker.on(Event::Submit { caller: USER, spec: as_user("c", 1000, &[1000]) });
    assert_eq!(refusal(&effects), None, "themselves, with a group that they have");
    let effects = broker.on(Event::Submit { caller: OPERATOR, spec: as_user("d", 7, &[7]) });
    assert_eq!(refusal(&effects), None);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut broker = Broker::new();
    let good = spec("t", 1000, Priority::Low, 0);
    let bad = [
        TaskSpec { command: Vec::new(), ..good.clone() },
        TaskSpec { cwd: "here".into(), ..good.clone() },
        TaskSpec { namespace: "a/b".into(), ..good.clone() },
        TaskSpec { name: "a\nb".into(), ..good.clone() },
        TaskSpec { name: String::new(), ..good.clone() },
    ];
    for spec in bad {
        let effects = broker.submit(spec);
        assert!(matches!(refusal(&effects), Some(Refusal::Invalid(_))), "{effects:?}");
    }
    assert!(broker.state.tasks.is_empty());
}

#[test]
fn the_queue_is_by_priority_then_by_submission() {
    let mut broker = Broker::new();
    for (task, priority) in [("low", Priority::Low), ("m1", Priority::Medium), ("m2", Priority::Medium)] {
        broker.submit(spec(task, 1000, priority, 0));
    }
    broker.submit(spec("high", 1000, Priority::High, 0));
    let (_, effects) = broker.connect(hello("n1", "boot", 3000, Vec::new()));
    let started: Vec<_> = directives(&effects).into_iter().map(|(_, execution, _)| execution).collect();
    assert_eq!(started, ["high.1", "m1.1", "m2.1"]);
    assert_eq!(broker.reason("low"), "no connected node has room for it now");
}

#[test]
fn a_task_that_fits_nowhere_says_why_and_asks_once_for_nodes() {
    let asked =
        |effects: &[Effect]| effects.iter().filter(|it| matches!(it, Effect::ScaleOut { .. })).count();
    let mut broker = Broker::new();
    let effects = broker.submit(spec("large", 9000, Priority::High, 0));
    assert_eq!((broker.reason("large"), asked(&effects)), ("no node is connected", 1));
    let (n1, effects) = broker.connect(hello("n1", "boot", 2000, Vec::new()));
    assert_eq!(broker.reason("large"), "no connected node could hold it, even if it were empty");
    assert_eq!(asked(&effects), 0, "once an episode");

    broker.submit(spec("a", 2000, Priority::Low, 0));
    let effects = broker.submit(spec("b", 1000, Priority::Low, 0));
    assert_eq!((broker.reason("b"), asked(&effects)), ("no connected node has room for it now", 1));
    assert_eq!(broker.kinds("b"), [DecisionKind::Pending, DecisionKind::ScaleOut]);
    let decisions = query::explain(&broker.state, &USER, &id("b"), broker.now).unwrap();
    assert_eq!(decisions[0].nodes[0].lacking, ["cpu: 1 core wanted, 0 of 2 free"]);
    for (attempt, code) in [(7, 0), (8, 0)] {
        broker.ended(n1, "nobody", attempt, code);
    }
    assert_eq!(broker.kinds("b").len(), 2, "waiting on is no decision");
    let effects = broker.ended(n1, "a", 1, 0);
    assert_eq!(directives(&effects), [("forget", "a.1".into(), 2), ("start", "b.1".into(), 1)]);
}

#[test]
fn a_refused_start_goes_elsewhere_while_retries_last() {
    let mut broker = Broker::new();
    let (n1, n2) = (broker.node("n1", 4000), broker.node("n2", 4000));
    broker.submit(spec("t", 1000, Priority::Low, 1));
    assert_eq!(broker.task("t").phase.node(), Some("n1"), "the first on a tie");
    broker.refuse(n1, "t", 1, 9);
    assert_eq!(broker.task("t").attempt, 1, "another directive's refusal is not the start's");
    let effects = broker.refuse(n1, "t", 1, 1);
    assert_eq!(directives(&effects), [("start", "t.2".into(), 2)]);
    assert_eq!(broker.task("t").phase.node(), Some("n2"));
    broker.refuse(n1, "t", 1, 1);
    assert_eq!(broker.task("t").phase.node(), Some("n2"), "a stale refusal changes nothing");
    broker.refuse(n2, "t", 2, 2);
    let Phase::Ended { status: ExitStatus::NotStarted { stage, error, .. }, .. } = &broker.task("t").phase
    else {
        panic!("{:?}", broker.task("t").phase);
    };
    assert_eq!((stage.as_str(), error.as_str()), ("refused", "no"));
    assert_eq!(broker.state.nodes["n2"].reserved.cpu, Millicores(0));
}

#[test]
fn an_evicted_task_goes_elsewhere_or_waits_longer_each_time() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    let (mut attempt, mut waits) = (1, Vec::new());
    for _ in 0..8 {
        broker.report(n1, "t", attempt, RunPhase::Running);
        broker.evict(n1, "t", attempt);
        let until = next_wakeup(&broker.state).unwrap();
        waits.push((until - broker.now) / SECOND);
        broker.now = until - 1;
        assert_eq!(directives(&broker.on(Event::Tick)), []);
        assert!(broker.reason("t").starts_with("n1 evicted it"), "{}", broker.reason("t"));
        broker.now = until;
        attempt += 1;
        assert_eq!(directives(&broker.on(Event::Tick))[0].1, format!("t.{attempt}"));
        assert_eq!(next_wakeup(&broker.state), None);
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert!(!broker.kinds("t").contains(&DecisionKind::ScaleOut), "nodes are not what it lacks");
    assert_eq!(broker.task("t").retries_used, 0);
    let evicted = broker.state.tasks[&id("t")].decisions.iter().find(|it| it.kind == DecisionKind::Evicted);
    assert_eq!(evicted.map(|it| it.by.as_str()), Some("n1"), "by whom is not for the agent to say");

    broker.node("n2", 1000);
    broker.evict(n1, "t", attempt);
    assert_eq!(broker.task("t").phase.node(), Some("n2"), "at once, for it fits elsewhere");
}

#[test]
fn an_abandoned_start_costs_no_retry() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.node("n2", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    let status = ExitStatus::NotStarted { stage: "abandoned".into(), error: "killed".into(), code: 126 };
    let effects = broker.report(n1, "t", 1, RunPhase::Ended { status, at: 5 });
    assert_eq!(directives(&effects), [("forget", "t.1".into(), 2), ("start", "t.2".into(), 3)]);
    assert_eq!((broker.task("t").retries_used, broker.task("t").phase.node()), (0, Some("n2")));
}

#[test]
fn a_silent_node_keeps_its_tasks_and_gets_no_more() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.report(n1, "t", 1, RunPhase::Running);
    broker.on(Event::AgentGone { session: n1 });
    assert_eq!(broker.task("t").phase, on("n1"));
    assert_eq!(broker.kinds("t"), [DecisionKind::Placed, DecisionKind::Lost]);
    assert!(broker.on(Event::AgentGone { session: n1 }).is_empty(), "once");
    broker.submit(spec("u", 1000, Priority::Low, 0));
    assert_eq!(broker.reason("u"), "no node is connected");
    broker.ended(n1, "t", 1, 0);
    assert_eq!(broker.task("t").phase, on("n1"), "what a dead session says is not heard");

    let running = NodeTask {
        status: status("t", 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    };
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, vec![running]));
    assert_eq!(broker.task("t").phase, on("n1"));
    assert!(!broker.task("t").lost);
    assert_eq!(directives(&effects), [("start", "u.1".into(), 1)]);
}

#[test]
fn an_eviction_of_which_nobody_heard_is_one_all_the_same() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.report(n1, "t", 1, RunPhase::Running);
    broker.on(Event::AgentGone { session: n1 });
    let ended = RunPhase::Ended { status: ExitStatus::Signal(15), at: 1 };
    let evicted = NodeTask {
        status: status("t", 1, ended),
        generation: 1,
        evicted: true,
        lease_over: false,
        request: None,
    };
    broker.connect(hello("n1", "boot", 4000, vec![evicted]));
    assert!(broker.reason("t").starts_with("n1 evicted it"), "{}", broker.reason("t"));
}

#[test]
fn a_lost_start_is_repeated_with_the_same_numbers() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.on(Event::AgentGone { session: n1 });
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, Vec::new()));
    assert_eq!(directives(&effects), [("start", "t.1".into(), 1)]);
}

#[test]
fn a_known_attempt_that_is_not_there_any_more() {
    // (new boot, retries) → what becomes of it
    let outcome = |boot: &str, retries| {
        let mut broker = Broker::new();
        let n1 = broker.node("n1", 4000);
        broker.submit(spec("t", 1000, Priority::Low, retries));
        broker.accept(n1, "t", 1, 1);
        broker.on(Event::AgentGone { session: n1 });
        broker.connect(hello("n1", boot, 4000, Vec::new()));
        let task = broker.task("t").clone();
        (task.phase, task.attempt)
    };
    let unknown = Phase::Ended { status: ExitStatus::Unknown, at: SECOND };
    assert_eq!(outcome("boot", 1), (unknown.clone(), 1), "the same boot: it may have run to its end");
    assert_eq!(outcome("boot2", 0), (unknown, 1));
    assert_eq!(outcome("boot2", 1), (Phase::Starting { node: "n1".into() }, 2));
}

#[test]
fn what_the_broker_does_not_know_is_left_alone_and_what_is_over_is_ended() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("done", 1000, Priority::Low, 0));
    broker.ended(n1, "done", 1, 0);
    broker.submit(spec("stray", 1000, Priority::Low, 0));
    broker.ended(n1, "stray", 1, 0);
    let end = RunPhase::Ended { status: ExitStatus::Code(0), at: 1 };
    let inventory = [
        ("done", 1, end),
        ("stray", 1, RunPhase::Running),
        ("stranger", 1, RunPhase::Running),
        ("done", 5, RunPhase::Running),
    ];
    let inventory = inventory.map(|(task, attempt, phase)| NodeTask {
        status: status(task, attempt, phase),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    });
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, inventory.to_vec()));
    assert_eq!(directives(&effects), [("forget", "done.1".into(), 2), ("stop", "stray.1".into(), 2)]);
    assert_eq!(effects.iter().filter(|it| matches!(it, Effect::Warn(_))).count(), 2);
    assert!(effects.contains(&Effect::Close(n1, "the agent of n1 has connected again".into())));
}

#[test]
fn a_cancel_ends_what_waits_at_once_and_what_runs_when_its_node_says_so() {
    let mut broker = Broker::new();
    broker.submit(spec("waits", 1000, Priority::Low, 0));
    let cancel = |task: &str, caller, grace_millis| Event::Cancel { caller, task: id(task), grace_millis };
    assert!(matches!(refusal(&broker.on(cancel("waits", OTHER, 0))), Some(Refusal::NoSuchTask(_))));
    broker.on(cancel("waits", USER, 0));
    assert_eq!(broker.task("waits").phase, Phase::Cancelled);

    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.report(n1, "t", 1, RunPhase::Running);
    assert_eq!(directives(&broker.on(cancel("t", OPERATOR, 5000))), [("stop", "t.1".into(), 2)]);
    assert_eq!(directives(&broker.on(cancel("t", USER, 9000))), [], "less urgent than what was asked");
    assert_eq!(broker.task("t").phase, on("n1"));
    broker.on(Event::AgentGone { session: n1 });
    let running = NodeTask {
        status: status("t", 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    };
    let (n1, effects) = broker.connect(hello("n1", "boot", 4000, vec![running]));
    assert_eq!(directives(&effects), [("stop", "t.1".into(), 2)], "repeated with the same numbers");
    broker.ended(n1, "t", 1, 0);
    assert_eq!(broker.task("t").phase, Phase::Cancelled);
    assert_eq!(broker.state.histories.len(), 0, "cut short is not finished");
}

#[test]
fn a_cancelled_start_that_never_arrived_is_not_repeated() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.on(Event::AgentGone { session: n1 });
    broker.on(Event::Cancel { caller: USER, task: id("t"), grace_millis: 0 });
    let (_, effects) = broker.connect(hello("n1", "boot", 4000, Vec::new()));
    assert_eq!(directives(&effects), []);
    assert_eq!(broker.task("t").phase, Phase::Cancelled);
}

#[test]
fn the_epoch_goes_above_what_an_agent_has_obeyed() {
    let mut broker = Broker::new();
    let epoch = broker.state.epoch;
    let hello = Hello { highest_epoch: epoch, ..*hello("n1", "boot", 4000, Vec::new()) };
    broker.connect(Box::new(hello.clone()));
    assert_eq!(broker.state.epoch, epoch, "its own");
    let (session, effects) = broker.connect(Box::new(Hello { highest_epoch: epoch + 7, ..hello }));
    assert_eq!(broker.state.epoch, epoch + 8);
    assert!(effects.contains(&Effect::Welcome(session, epoch + 8)));
}

#[test]
fn policies_reach_every_agent_and_stay_in_the_namespaces_of_who_sets_them() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    let policy = Box::new(policy("p", Priority::High, true));
    let named = |name: &str, namespace: &str| {
        Box::new(Policy { policy_name: name.into(), namespace: namespace.into(), ..(*policy).clone() })
    };
    let own = || vec!["etl".to_owned()];
    let by_user = |within, policy| Event::ApplyPolicy { caller: USER, within, policy };
    let by_operator = |policy| Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy };
    for within in [Vec::new(), own()] {
        let effects = broker.on(by_user(within, policy.clone()));
        assert_eq!(refusal(&effects), Some(&Refusal::Denied(Denied::Policies("default".into()))));
    }
    let effects = broker.on(by_operator(policy.clone()));
    assert!(effects.contains(&Effect::Policies(n1, 1, vec![(*policy).clone()])));
    assert!(effects.contains(&Effect::Answer(Ok(Answer::Policy(policy.clone(), 1)))));
    let (n2, effects) = broker.connect(hello("n2", "boot", 4000, Vec::new()));
    assert!(effects.contains(&Effect::Policies(n2, 1, vec![(*policy).clone()])));
    let effects = broker.on(by_operator(policy.clone()));
    assert_eq!(effects.len(), 1, "the same again changes nothing");

    let effects = broker.on(by_user(own(), named("theirs", "etl")));
    assert_eq!(refusal(&effects), None);
    broker.on(by_operator(named("of-root", "etl")));
    broker.on(by_user(vec!["b".into()], named("before", "b")));
    // Neither by a name in another namespace, nor what the operator has set in theirs.
    for (name, namespace, uid) in [("p", "default", 0), ("of-root", "etl", 0), ("before", "b", USER.uid)] {
        let effects = broker.on(by_user(own(), named(name, "etl")));
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        let denied = Denied::PolicyOfOthers { name, namespace, uid };
        assert_eq!(refusal(&effects), Some(&Refusal::Denied(denied)));
    }
    for number in 2..50 {
        assert_eq!(refusal(&broker.on(by_user(own(), named(&format!("p{number}"), "etl")))), None);
    }
    let full = broker.on(by_user(own(), named("one-more", "etl")));
    assert!(matches!(refusal(&full), Some(Refusal::Full { limit: 50, .. })), "{full:?}");
    assert_eq!(refusal(&broker.on(by_user(own(), named("theirs", "etl")))), None);
    assert_eq!(refusal(&broker.on(by_operator(named("one-more", "etl")))), None);
}

#[test]
fn users_see_their_own_tasks_and_profiles() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    let mut done = status("t", 1, RunPhase::Ended { status: ExitStatus::Code(0), at: 10 * SECOND });
    done.usage.cpu_time_ns = 20 * SECOND;
    done.usage.memory_bytes = Some(GIB);
    done.usage.ingress = Traffic { bytes: 1_250_000, packets: 1 };
    broker.on(Event::TaskReport {
        session: n1,
        report: Box::new(NodeTask {
            status: done,
            generation: 1,
            evicted: false,
            lease_over: false,
            request: None,
        }),
    });
    let seen = |caller| query::tasks(&broker.state, &caller).count();
    assert_eq!((seen(USER), seen(OTHER), seen(OPERATOR)), (1, 0, 1));
    assert!(query::explain(&broker.state, &OTHER, &id("t"), 0).is_err());
    let measured = query::profile(&broker.state, &USER, "default", "sleep", Priority::Medium).unwrap();
    assert_eq!(measured.demand.cpu, Millicores(2300), "2 cores and 15 %");
    assert_eq!(measured.demand.network.map(|it| it.0), Some(1_150_000), "1 Mbit/s and 15 %");
    assert!(query::profile(&broker.state, &OTHER, "default", "sleep", Priority::Medium).is_err());
    assert!(query::profile(&broker.state, &OPERATOR, "default", "other", Priority::Medium).is_err());
}

#[test]
fn decisions_are_bounded() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    for attempt in 1..100 {
        broker.evict(n1, "t", attempt);
        broker.now += 60 * SECOND;
        broker.on(Event::Tick);
    }
    assert_eq!(broker.kinds("t").len(), state::DECISIONS);
    assert_eq!(broker.kinds("t").last(), Some(&DecisionKind::Placed));
}

#[test]
fn the_broker_takes_no_more_than_it_can() {
    let mut broker = Broker::new();
    broker.state.bounds.open_tasks = 3;
    for number in 0..3 {
        assert_eq!(refusal(&broker.submit(spec(&format!("t{number}"), 1000, Priority::Low, 0))), None);
    }
    let effects = broker.submit(spec("more", 1000, Priority::Low, 0));
    assert!(matches!(refusal(&effects), Some(Refusal::Full { .. })));
    broker.on(Event::Cancel { caller: USER, task: id("t0"), grace_millis: 0 });
    assert_eq!(refusal(&broker.submit(spec("more", 1000, Priority::Low, 0))), None);
}

#[test]
fn what_is_over_is_forgotten_once_no_node_knows_it_and_there_is_more() {
    let mut broker = Broker::new();
    broker.state.bounds.ended_tasks = 1;
    let session = broker.node("n1", 4000);
    for task in ["a", "b", "c"] {
        broker.submit(spec(task, 1000, Priority::Low, 0));
        broker.accept(session, task, 1, 1);
        broker.ended(session, task, 1, 0);
    }
    assert_eq!(broker.state.tasks.len(), 3, "n1 has not said that it has forgotten them");
    broker.accept(session, "a", 1, 1);
    assert_eq!(broker.task("a").holders.len(), 1, "that was said of the start");
    for task in ["b", "a"] {
        broker.accept(session, task, 1, 2);
    }
    let left: BTreeSet<_> = broker.state.tasks.keys().map(TaskId::as_str).collect();
    assert_eq!(left, BTreeSet::from(["a", "c"]), "b was the first that nobody knew");
    // n1 has been told, and its answer was lost.
    broker.node("n1", 4000);
    let left: BTreeSet<_> = broker.state.tasks.keys().map(TaskId::as_str).collect();
    assert_eq!(left, BTreeSet::from(["c"]));
    let effects = broker.submit(spec("a", 2000, Priority::Low, 0));
    assert_eq!(directives(&effects), [("start", "a.1".into(), 1)], "the id is free");
}

#[test]
fn what_a_running_task_uses_is_no_change_of_it() {
    let mut broker = Broker::new();
    let session = broker.node("n1", 4000);
    broker.submit(spec("t", 1000, Priority::Low, 0));
    broker.report(session, "t", 1, RunPhase::Running);
    let revision = broker.task("t").revision;
    let mut report = NodeTask {
        status: status("t", 1, RunPhase::Running),
        generation: 1,
        evicted: false,
        lease_over: false,
        request: None,
    };
    report.status.usage.cpu_time_ns = 7;
    let event = Event::TaskReport { session, report: Box::new(report) };
    assert_eq!(on_event(&mut broker.state, event, broker.now), Outcome::default());
    let task = broker.task("t");
    assert_eq!(task.on_node.as_ref().map(|it| it.usage.cpu_time_ns), Some(7));
    assert_eq!(task.revision, revision);
}

/// Lines of tasks that wait, against the plain rule: each task in turn, by priority and submission, is tried on what is free.
#[test]
fn tasks_of_many_kinds_are_placed_in_the_order_of_the_queue() {
    let mut broker = Broker::new();
    let n1 = broker.node("n1", 1000);
    broker.submit(spec("first", 1000, Priority::High, 0));
    for (task, cpu, priority) in [
        ("large-low", 900, Priority::Low),
        ("small-low", 100, Priority::Low),
        ("large-high", 800, Priority::High),
        ("small-high", 300, Priority::High),
        ("small-medium", 100, Priority::Medium),
        ("other-small-medium", 100, Priority::Medium),
    ] {
        broker.submit(spec(task, cpu, priority, 0));
        assert_eq!(broker.reason(task), "no connected node has room for it now");
    }
    let effects = broker.ended(n1, "first", 1, 0);
    let started: Vec<_> = directives(&effects)
        .into_iter()
        .filter(|it| it.0 == "start")
        .map(|(_, execution, _)| execution)
        .collect();
    assert_eq!(started, ["large-high.1", "small-medium.1", "other-small-medium.1"]);
    for task in ["large-low", "small-low", "small-high"] {
        assert_eq!(broker.reason(task), "no connected node has room for it now");
    }
    // A second of a line that is known to lack room is told so without a look at the nodes.
    broker.submit(spec("large-low-2", 900, Priority::Low, 0));
    assert_eq!(broker.reason("large-low-2"), "no connected node has room for it now");
    broker.on(Event::AgentGone { session: n1 });
    for task in ["large-low", "large-low-2", "small-low", "small-high"] {
        assert_eq!(broker.reason(task), "no node is connected", "{task}");
    }
}
