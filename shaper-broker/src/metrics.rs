//! What a broker tells of itself and the cluster, as metrics.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use shaper_core::spec::{Capacity, DecisionKind};
use shaper_metrics::{Durations, Exposition, Family, Value, build_and_process, table::broker as table};

use crate::{
    actor::{Handle, View},
    config::Stores,
    reactor::{Lacks, State, scale::GroupView},
    standing::Standing,
};

/// Nodes that are told of one by one.
const MOST_NODES: usize = 1000;

/// How long the thread that decides may take to answer: what it does for others comes first.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is counted of commits, since this broker leads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Commits {
    /// How long each took.
    pub took: Durations,
    /// Rows in them.
    pub rows: u64,
}

/// What the reactor counts for the metrics alone, since this broker leads.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Decisions, in the order of [`DecisionKind::ALL`]: each has a series from the beginning.
    pub decisions: [u64; DecisionKind::ALL.len()],
    /// From submission to the first node.
    pub placement: Durations,
    /// Tasks that were asked to make room.
    pub preemptions: u64,
}

impl Tally {
    /// Something was decided.
    pub fn decided(&mut self, kind: DecisionKind) {
        self.decisions[kind as usize] += 1;
    }
}

/// A node.
struct NodeReading {
    name: String,
    is_connected: bool,
    tasks: usize,
    capacity: Capacity,
    reserved: Capacity,
    cpu_used: f64,
}

/// A group of nodes.
struct GroupReading {
    name: String,
    target: Option<u32>,
    here: u32,
    coming: u32,
    leaving: usize,
    max: u32,
    failures: u32,
    waiting: u64,
}

impl GroupReading {
    fn all(state: &State) -> Vec<GroupReading> {
        let wishes = state.scale.wishes();
        let reading = |GroupView { group, standing, .. }: GroupView<'_>| GroupReading {
            name: group.name.clone(),
            target: standing.target,
            here: standing.registered,
            coming: standing.coming(standing.registered),
            leaving: standing.leaving.len(),
            max: group.max,
            failures: standing.failures,
            waiting: wishes.get(&group.name).map_or(0, |wish| wish.tasks),
        };
        state.scale_groups().map(reading).collect()
    }
}

/// One look at the state: nothing in it grows with the number of tasks.
struct Reading {
    epoch: u64,
    tasks: [(&'static str, usize); 5],
    lacks: Lacks,
    /// For how long the task waits that was submitted first, ns.
    waiting_longest: u64,
    connected: usize,
    lost: usize,
    /// Of the nodes that are connected.
    capacity: Sum,
    reserved: Sum,
    nodes: Vec<NodeReading>,
    left_out: u64,
    sessions: usize,
    policies: usize,
    policies_revision: u64,
    cordoned: usize,
    groups: Vec<GroupReading>,
    tally: Tally,
    commits: Commits,
}

/// What many nodes have.
#[derive(Clone, Copy, Default)]
struct Sum {
    millicores: u64,
    memory: u64,
    network: u64,
}

impl Sum {
    fn add(&mut self, of: &Capacity) {
        self.millicores += of.cpu.0;
        self.memory += of.memory.0;
        self.network += of.network.map_or(0, |network| network.0);
    }
}

impl Reading {
    fn of(view: &View<'_>) -> Reading {
        let State { epoch, policies_revision, .. } = *view.state;
        let state = view.state;
        let [nominated, starting, running] = state.assigned_tasks();
        let open = state.open_tasks();
        let (mut capacity, mut reserved, mut connected, mut cordoned) =
            (Sum::default(), Sum::default(), 0, 0);
        for node in state.nodes_in_order().filter(|node| node.session.is_some()) {
            connected += 1;
            cordoned += usize::from(!node.takes_work());
            capacity.add(&node.row.capacity);
            reserved.add(&node.reserved);
        }
        let nodes = state.nodes_in_order().take(MOST_NODES).map(|node| NodeReading {
            name: node.row.name.clone(),
            is_connected: node.session.is_some(),
            tasks: node.tasks.len(),
            capacity: node.row.capacity,
            reserved: node.reserved,
            cpu_used: node.row.capacity.cpu.0 as f64 / 1e3 * f64::from(node.cpu_utilisation_permille) / 1e3,
        });
        Reading {
            epoch,
            tasks: [
                ("pending", state.waiting_tasks()),
                ("nominated", nominated),
                ("starting", starting),
                ("running", running),
                ("over", state.tasks.len().saturating_sub(open)),
            ],
            lacks: state.lacks(),
            waiting_longest: state.waits_longest().map_or(0, |since| view.now.saturating_sub(since)),
            connected,
            lost: state.nodes.len() - connected,
            capacity,
            reserved,
            nodes: nodes.collect(),
            left_out: state.nodes.len().saturating_sub(MOST_NODES) as u64,
            sessions: state.sessions.len(),
            policies: state.policies.len(),
            policies_revision,
            cordoned,
            groups: GroupReading::all(state),
            tally: state.tally.clone(),
            commits: *view.commits,
        }
    }
}

/// What a broker remembers from one scrape to the next.
#[derive(Default)]
pub struct LeftOut(AtomicU64);

impl LeftOut {
    fn add(&self, nodes: u64) -> u64 {
        self.0.fetch_add(nodes, Ordering::Relaxed) + nodes
    }
}

/// All that a broker has to say now; `None`: the thread that decides does not answer.
pub async fn scrape(
    broker: Handle,
    standing: Standing,
    store: &'static str,
    left_out: Arc<LeftOut>,
) -> Option<Exposition> {
    let mut exposition = Exposition::default();
    build_and_process(&mut exposition, "shaper-broker");
    exposition.add(&table::BROKER_INFO, &[store.to_owned()], &[], Value::Info);
    let leads = standing == Standing::Leads;
    exposition.add(&table::LEADS, &[], &[], Value::Count(leads.into()));
    if leads {
        // As many as wait now, this one not counted.
        let queued = broker.queued();
        let read = tokio::time::timeout(PATIENCE, broker.read(Reading::of)).await;
        let reading = read.ok()?.ok()?;
        let left_out = left_out.add(reading.left_out);
        add(&mut exposition, reading, queued, left_out);
    }
    Some(exposition)
}

/// How the store is called.
pub fn store(rows: &Stores) -> &'static str {
    match rows {
        Stores::Memory => "memory",
        Stores::Redb => "redb",
        Stores::Etcd(_) => "etcd",
    }
}

fn add(exposition: &mut Exposition, reading: Reading, queued: usize, left_out: u64) {
    let count = |count: usize| Value::Count(count as u64);
    let cores = |millicores: u64| Value::Float(millicores as f64 / 1e3);
    for (phase, tasks) in reading.tasks {
        exposition.add(&table::TASKS, &[phase.to_owned()], &[], count(tasks));
    }
    let Lacks { nodes, large_nodes, room, backoff, unknown } = reading.lacks;
    for (lack, tasks) in [
        ("nodes", nodes),
        ("large-nodes", large_nodes),
        ("room", room),
        ("backoff", backoff),
        ("unknown", unknown),
    ] {
        exposition.add(&table::WAITING, &[lack.to_owned()], &[], count(tasks));
    }
    exposition.add(&table::NODES, &[], &["connected"], count(reading.connected));
    exposition.add(&table::NODES, &[], &["cordoned"], count(reading.cordoned));
    exposition.add(&table::NODES, &[], &["lost"], count(reading.lost));
    for group in reading.groups {
        let labels: Arc<[String]> = Arc::from([group.name]);
        let nodes = &table::SCALE_NODES;
        exposition.add_shared(nodes, &labels, &["here"], Value::Count(group.here.into()));
        exposition.add_shared(nodes, &labels, &["coming"], Value::Count(group.coming.into()));
        exposition.add_shared(nodes, &labels, &["leaving"], count(group.leaving));
        if let Some(target) = group.target {
            exposition.add_shared(&table::SCALE_TARGET, &labels, &[], Value::Count(target.into()));
        }
        for (family, value) in [
            (&table::SCALE_MAX, group.max.into()),
            (&table::SCALE_FAILURES, group.failures.into()),
            (&table::SCALE_WAITING, group.waiting),
        ] {
            exposition.add_shared(family, &labels, &[], Value::Count(value));
        }
    }
    let (capacity, reserved) = (reading.capacity, reading.reserved);
    let single: [(&'static Family, Value); 17] = [
        (&table::WAITING_LONGEST, Value::Float(reading.waiting_longest as f64 / 1e9)),
        (&table::EPOCH, Value::Count(reading.epoch)),
        (&table::SESSIONS, count(reading.sessions)),
        (&table::CPU, cores(capacity.millicores)),
        (&table::CPU_RESERVED, cores(reserved.millicores)),
        (&table::MEMORY, Value::Count(capacity.memory)),
        (&table::MEMORY_RESERVED, Value::Count(reserved.memory)),
        (&table::NETWORK, Value::Float(capacity.network as f64 / 8.0)),
        (&table::NETWORK_RESERVED, Value::Float(reserved.network as f64 / 8.0)),
        (&table::NODE_SERIES_DROPPED, Value::Count(left_out)),
        (&table::PLACEMENT, Value::from(&reading.tally.placement)),
        (&table::PREEMPTIONS, Value::Count(reading.tally.preemptions)),
        (&table::COMMIT, Value::from(&reading.commits.took)),
        (&table::ROWS, Value::Count(reading.commits.rows)),
        (&table::QUEUE, count(queued)),
        (&table::POLICIES, count(reading.policies)),
        (&table::POLICIES_REVISION, Value::Count(reading.policies_revision)),
    ];
    for (family, value) in single {
        exposition.add(family, &[], &[], value);
    }
    for (kind, decided) in DecisionKind::ALL.into_iter().zip(reading.tally.decisions) {
        exposition.add(&table::DECISIONS, &[kind.to_string()], &[], Value::Count(decided));
    }
    for node in reading.nodes {
        let labels = Arc::from([node.name]);
        for (family, value) in [
            (&table::NODE_CONNECTED, Value::Count(node.is_connected.into())),
            (&table::NODE_TASKS, count(node.tasks)),
            (&table::NODE_CPU, cores(node.capacity.cpu.0)),
            (&table::NODE_CPU_RESERVED, cores(node.reserved.cpu.0)),
            (&table::NODE_CPU_USED, Value::Float(node.cpu_used)),
            (&table::NODE_MEMORY, Value::Count(node.capacity.memory.0)),
            (&table::NODE_MEMORY_RESERVED, Value::Count(node.reserved.memory.0)),
        ] {
            exposition.add_shared(family, &labels, &[], value);
        }
    }
}
