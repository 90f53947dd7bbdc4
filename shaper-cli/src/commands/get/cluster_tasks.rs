//! Tasks of the cluster: where they are, and what they asked for.

use shaper_core::{spec::Demand, task::UnixNanos};

use super::{cpu, memory, network, or_dash};
use crate::{
    args::{GetTasks, ListFormat},
    client::Broker,
    cluster::{ClusterPhase, ClusterTask},
    error::Error,
    output::{self, Column, Ledger},
    show, time,
};

pub(super) async fn list(broker: &Broker, args: &GetTasks) -> Result<(), Error> {
    let mut tasks = Vec::with_capacity(args.ids.len());
    if args.ids.is_empty() {
        tasks = broker.list_tasks().await?;
        tasks.sort_by(|a, b| a.spec.profile.task_id.cmp(&b.spec.profile.task_id));
    }
    for id in &args.ids {
        tasks.push(broker.get_task(id).await?);
    }
    super::show(args.output, &tasks, "tasks", |wide| {
        let now = time::now();
        if wide {
            output::table(WIDE_COLUMNS, tasks.iter().map(|task| wide_row(task, now)))
        } else {
            output::table(COLUMNS, tasks.iter().map(|task| row(task, now)))
        }
    })
}

/// A line for each task as it is, and then for each change; it does not end by itself.
pub(super) async fn watch(broker: &Broker, args: &GetTasks) -> Result<(), Error> {
    // The broker watches one or all.
    let one = match args.ids.as_slice() {
        [id] => Some(id),
        _ => None,
    };
    let mut watch = broker.watch(one);
    let (mut ledger, mut wide_ledger) = (Ledger::new(COLUMNS), Ledger::new(WIDE_COLUMNS));
    loop {
        let task = watch.next().await?;
        if !args.ids.is_empty() && !args.ids.contains(&task.spec.profile.task_id) {
            continue;
        }
        let now = time::now();
        match args.output {
            ListFormat::Json => output::print_json_line(&task)?,
            ListFormat::Yaml => output::print_yaml_document(&task)?,
            ListFormat::Name => output::print(&format!("{}\n", task.spec.profile.task_id))?,
            ListFormat::Table => output::print(&ledger.line(&row(&task, now)))?,
            ListFormat::Wide => output::print(&wide_ledger.line(&wide_row(&task, now)))?,
        }
    }
}

const COLUMNS: [Column; 8] = [
    Column::Text("ID"),
    Column::Text("PHASE"),
    Column::Text("NODE"),
    Column::Text("PRIORITY"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("NET"),
    Column::Number("AGE"),
];

/// `NOW` is what is used, as the node last reported it.
const WIDE_COLUMNS: [Column; 15] = [
    Column::Text("ID"),
    Column::Text("PHASE"),
    Column::Text("NODE"),
    Column::Text("PRIORITY"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("NET"),
    Column::Number("AGE"),
    Column::Text("NAME"),
    Column::Text("USER"),
    Column::Number("ATTEMPT"),
    Column::Number("CPU NOW"),
    Column::Number("MEMORY NOW"),
    Column::Number("NET OUT NOW"),
    Column::Text("REASON"),
];

fn row(task: &ClusterTask, now: UnixNanos) -> [String; 8] {
    let profile = &task.spec.profile;
    [
        profile.task_id.to_string(),
        show::cluster_phase(&task.phase),
        or_dash(task.node.as_deref()),
        profile.priority.to_string(),
        cpu(profile.demand.cpu),
        memory(profile.demand.memory),
        network(profile.demand.network),
        time::age(task.submitted_at, now),
    ]
}

fn wide_row(task: &ClusterTask, now: UnixNanos) -> [String; 15] {
    let [id, phase, node, priority, cpu, memory, net, age] = row(task, now);
    let used = task.on_node.as_ref().map(show::Now::of);
    let [cpu_now, memory_now, net_now] = used.map_or_else(
        || ["-", "-", "-"].map(String::from),
        |show::Now { cpu, memory, net_out, net_in: _ }| [cpu, memory, net_out],
    );
    let name = format!("{}/{}", task.spec.namespace, task.spec.name);
    let user = show::user(&task.owner);
    let reason = match &task.phase {
        ClusterPhase::Pending { reason } => reason.clone(),
        _ if task.cancel_requested && !task.is_over() => "is to end".into(),
        _ if !task.is_over() => task.reserved.map_or_else(String::new, |Demand { cpu, memory, .. }| {
            format!("{cpu} cores and {memory} are reserved")
        }),
        _ => String::new(),
    };
    let attempt = task.attempt.to_string();
    [
        id, phase, node, priority, cpu, memory, net, age, name, user, attempt, cpu_now, memory_now, net_now,
        reason,
    ]
}
