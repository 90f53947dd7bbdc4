//! How soon a broker that was stopped serves again, with much to read.

use std::{collections::BTreeSet, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use shaper_broker::{
    reactor::{self, Directive, DirectiveKind, Effect, Event, Hello, Row, SessionId, State},
    store::{Op, Store, Txn, redb::Redb},
    wire,
};
use shaper_core::{
    limits::Limits,
    spec::{Capacity, Credentials, DEFAULT_NAMESPACE, Demand, OnNodeLost, Priority, Profile, TaskSpec},
    units::{Bytes, Millicores},
};
use shaper_proto::v1;

use super::{agents, rig::Rig};
use crate::{Plan, report::Report};

/// What the goal is stated for.
const TASKS: usize = 1_000_000;
const NODES: usize = 10_000;
/// Tasks that a node has room for: half of all tasks wait.
const ROOM: u64 = 50;
/// With `--quick`.
const PART: usize = 10;
/// Rows that are written at a time.
const AT_A_TIME: usize = 20_000;
/// When all of it happened, in nanoseconds since 1970.
const NOW: u64 = 1_700_000_000_000_000_000;
const MIB: f64 = (1 << 20) as f64;

fn spec(number: usize) -> Result<TaskSpec> {
    let kinds = [Priority::Low, Priority::Medium, Priority::High];
    Ok(TaskSpec {
        profile: Profile {
            task_id: format!("task-{number}").parse()?,
            demand: Demand {
                cpu: Millicores(1000),
                memory: Bytes(1 << 30),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            priority: kinds[number % kinds.len()],
            estimated_runtime_seconds: Some(60),
        },
        command: vec!["/usr/bin/python3".into(), "train.py".into(), format!("--shard={number}")],
        env: [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into(),
        cwd: "/srv/train".into(),
        name: format!("train-{}", number % 100),
        namespace: DEFAULT_NAMESPACE.into(),
        labels: [("team".to_owned(), "vision".to_owned())].into(),
        limits: Limits::default(),
        run_as: None,
        retries: 3,
        on_node_lost: OnNodeLost::Wait,
        gpus: Default::default(),
        image: None,
    })
}

/// Tasks in a broker that has had these nodes and tasks, and the rows of all of it.
fn history(tasks: usize, nodes: usize) -> Result<(State, BTreeSet<Row>)> {
    let (mut state, mut rows) = (State::default(), BTreeSet::new());
    rows.extend(reactor::begin(&mut state).rows);
    let caller = Credentials { uid: 1000, gid: 1000, groups: Vec::new() };
    for number in 0..nodes {
        let hello = Hello {
            node: format!("node-{number}"),
            boot_id: "1c9e2b7a-6f0d-4f0e-9d5e-3c2b1a0f9e8d".into(),
            capacity: Capacity {
                cpu: Millicores(ROOM * 1000),
                memory: Bytes(ROOM << 30),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            inventory: Vec::new(),
            highest_epoch: 0,
            agent_socket: "/run/shaper/agent.sock".into(),
            gpus: Default::default(),
            containers: false,
        };
        let session = SessionId(number as u64);
        let event = Event::AgentConnected { session, hello: Box::new(hello) };
        rows.extend(reactor::on_event(&mut state, event, NOW).rows);
    }
    for number in 0..tasks {
        let event = Event::Submit { caller: caller.clone(), spec: Box::new(spec(number)?) };
        let outcome = reactor::on_event(&mut state, event, NOW);
        rows.extend(outcome.rows);
        for effect in outcome.effects {
            let Effect::Direct(session, directive) = effect else { continue };
            let Directive { execution, generation, kind: DirectiveKind::Start(submission, _), .. } =
                *directive
            else {
                continue;
            };
            let start = v1::Start {
                spec: Some(submission.spec.clone().into()),
                owner: Some(submission.owner.clone().into()),
                gpu_cards: None,
            };
            let task = agents::task(execution.task.to_string(), execution.attempt, generation, start)?;
            let kind = Some(v1::agent_message::Kind::Task(task));
            let event = wire::event(session, v1::AgentMessage { kind })?;
            rows.extend(reactor::on_event(&mut state, event, NOW).rows);
        }
    }
    Ok((state, rows))
}

fn fill(file: &Path, state: &State, rows: BTreeSet<Row>) -> Result<()> {
    let mut store = Redb::open(file)?;
    let rows: Vec<_> = rows.into_iter().collect();
    for some in rows.chunks(AT_A_TIME) {
        let ops = some.iter().filter_map(|row| {
            let row = state.row(row);
            Some(Op::Put { key: row.key.into_bytes(), value: row.value? })
        });
        let done = store.txn(&[], &ops.collect::<Vec<_>>())?;
        ensure!(matches!(done, Txn::Committed { .. }), "nothing was compared");
    }
    Ok(())
}

/// A million tasks on ten thousand nodes: until a broker that was stopped answers.
pub(crate) fn start(plan: Plan, report: &mut Report) -> Result<()> {
    let part = if plan.is_quick { PART } else { 1 };
    let (tasks, nodes) = (TASKS / part, NODES / part);
    let (state, rows) = history(tasks, nodes)?;
    let on_nodes = tasks - state.waiting_tasks();
    let mut rig = Rig::stopped()?;
    let file = rig.state_dir().join("store.redb");
    std::fs::remove_file(&file).context("the store of a new broker")?;
    fill(&file, &state, rows)?;
    drop(state);
    let begin = Instant::now();
    rig.resume();
    let seconds = begin.elapsed().as_secs_f64();
    let what = format!("{tasks} tasks ({on_nodes} of them on {nodes} nodes)");
    report.at_most(
        2.0,
        &format!("redb, {what}: from the start of the broker until it answers"),
        seconds,
        "s",
    );
    report.tell(&format!("redb, {what}: memory of the broker after that"), rig.memory()? as f64 / MIB, "MiB");
    report.tell(&format!("redb, {what}: the file"), std::fs::metadata(&file)?.len() as f64 / MIB, "MiB");
    Ok(())
}
