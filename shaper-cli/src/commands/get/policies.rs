//! Policies of the cluster.

use shaper_core::spec::Policy;

use super::{cpu, memory, or_dash};
use crate::{
    args::GetPolicies,
    client::Broker,
    cluster::PolicyStatus,
    error::Error,
    output::{self, Column},
};

pub(in crate::commands) async fn policies(broker: &Broker, args: &GetPolicies) -> Result<(), Error> {
    let policies = broker.list_policies().await?;
    super::show(args.output, &policies, "policies", |wide| {
        if wide {
            output::table(WIDE_COLUMNS, policies.iter().map(wide_row))
        } else {
            output::table(COLUMNS, policies.iter().map(row))
        }
    })
}

const COLUMNS: [Column; 7] = [
    Column::Text("NAME"),
    Column::Text("NAMESPACE"),
    Column::Text("PRIORITY"),
    Column::Number("EVICTS ABOVE"),
    Column::Text("PREEMPTS"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
];

const WIDE_COLUMNS: [Column; 12] = [
    Column::Text("NAME"),
    Column::Text("NAMESPACE"),
    Column::Text("PRIORITY"),
    Column::Number("EVICTS ABOVE"),
    Column::Text("PREEMPTS"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Text("SELECTS"),
    Column::Number("CPU LIMIT"),
    Column::Text("FLOORS"),
    Column::Number("WINDOW"),
    Column::Number("REVISION"),
];

fn row(status: &PolicyStatus) -> [String; 7] {
    let Policy {
        policy_name,
        priority,
        namespace,
        demand,
        eviction_threshold_permille,
        preemption_enabled,
        window_millis: _,
        selector: _,
        limits: _,
        floors: _,
    } = &status.policy;
    let percent = |permille: u32| format!("{}.{}%", permille / 10, permille % 10);
    [
        policy_name.clone(),
        namespace.clone(),
        priority.to_string(),
        or_dash(eviction_threshold_permille.map(percent)),
        if *preemption_enabled { "yes" } else { "no" }.into(),
        or_dash(demand.map(|demand| cpu(demand.cpu))),
        or_dash(demand.map(|demand| memory(demand.memory))),
    ]
}

fn wide_row(status: &PolicyStatus) -> [String; 12] {
    let [name, namespace, priority, threshold, preempts, cpu, memory] = row(status);
    let Policy { selector, limits, floors, window_millis, .. } = &status.policy;
    let labels = selector.labels.iter().map(|(label, value)| format!("{label}={value}"));
    let selects: Vec<String> = selector.name.iter().map(ToString::to_string).chain(labels).collect();
    let selects = or_dash((!selects.is_empty()).then(|| selects.join(",")));
    let limit = or_dash(limits.cpu.map(super::cpu));
    let floors: Vec<String> =
        floors.cpu.map(super::cpu).into_iter().chain(floors.memory.map(super::memory)).collect();
    let floors = or_dash((!floors.is_empty()).then(|| floors.join(", ")));
    let (window, revision) = (format!("{window_millis}ms"), status.revision.to_string());
    [name, namespace, priority, threshold, preempts, cpu, memory, selects, limit, floors, window, revision]
}
