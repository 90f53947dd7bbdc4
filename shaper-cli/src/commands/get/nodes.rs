//! Nodes of the cluster: what they have, and what of it is reserved.

use shaper_core::spec::Capacity;

use super::{cpu, iops, memory, network, or_dash};
use crate::{
    args::GetNodes,
    client::Broker,
    cluster::NodeStatus,
    error::Error,
    output::{self, Column},
};

pub(in crate::commands) async fn nodes(broker: &Broker, args: &GetNodes) -> Result<(), Error> {
    let nodes = broker.list_nodes().await?;
    super::show(args.output, &nodes, "nodes", |wide| {
        if wide {
            output::table(WIDE_COLUMNS, nodes.iter().map(wide_row))
        } else {
            output::table(COLUMNS, nodes.iter().map(row))
        }
    })
}

/// Reserved of what there is, and how busy the CPUs are.
const COLUMNS: [Column; 8] = [
    Column::Text("NAME"),
    Column::Text("STATE"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("GPU MEMORY"),
    Column::Number("NET"),
    Column::Number("IOPS"),
    Column::Number("CPU BUSY"),
];

const WIDE_COLUMNS: [Column; 10] = [
    Column::Text("NAME"),
    Column::Text("STATE"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("GPU MEMORY"),
    Column::Number("NET"),
    Column::Number("IOPS"),
    Column::Number("CPU BUSY"),
    Column::Text("AGENT"),
    Column::Text("BOOT"),
];

fn row(node: &NodeStatus) -> [String; 8] {
    let NodeStatus { name, capacity, reserved, cpu_utilisation_permille, .. } = node;
    let of = |amount: fn(&Capacity) -> String| format!("{}/{}", amount(reserved), amount(capacity));
    // What a node does not know of itself is not compared.
    let of_known = |known: bool, amount| if known { of(amount) } else { "-".into() };
    [
        name.clone(),
        state(node).into(),
        of(|capacity| cpu(capacity.cpu)),
        of(|capacity| memory(capacity.memory)),
        of_known(capacity.gpu_memory.is_some(), |capacity| memory(capacity.gpu_memory.unwrap_or(NO_MEMORY))),
        of_known(capacity.network.is_some(), |capacity| network(capacity.network)),
        of_known(capacity.storage_io.is_some(), |capacity| iops(capacity.storage_io)),
        format!("{}.{}%", cpu_utilisation_permille / 10, cpu_utilisation_permille % 10),
    ]
}

/// A node that is away takes no tasks either.
fn state(node: &NodeStatus) -> &'static str {
    match (node.connected, &node.cordoned_by) {
        (false, _) => "Away",
        (true, None) => "Connected",
        (true, Some(_)) if node.drains => "Draining",
        (true, Some(_)) => "Cordoned",
    }
}

const NO_MEMORY: shaper_core::units::Bytes = shaper_core::units::Bytes(0);

fn wide_row(node: &NodeStatus) -> [String; 10] {
    let [name, state, cpu, memory, gpu, net, iops, busy] = row(node);
    let agent = or_dash(node.agent_socket.as_deref());
    [name, state, cpu, memory, gpu, net, iops, busy, agent, node.boot_id.clone()]
}
