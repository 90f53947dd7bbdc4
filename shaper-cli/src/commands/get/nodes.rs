//! Nodes of the cluster: what they have, and what of it is reserved.

use shaper_core::{spec::Capacity, units::Bytes};

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

const WIDE_COLUMNS: [Column; 12] = [
    Column::Text("NAME"),
    Column::Text("STATE"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("GPU MEMORY"),
    Column::Number("NET"),
    Column::Number("IOPS"),
    Column::Number("CPU BUSY"),
    Column::Number("GPUS"),
    Column::Text("GPU MODEL"),
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
        gpu_memory(node),
        of_known(capacity.network.is_some(), |capacity| network(capacity.network)),
        of_known(capacity.storage_io.is_some(), |capacity| iops(capacity.storage_io)),
        format!("{}.{}%", cpu_utilisation_permille / 10, cpu_utilisation_permille % 10),
    ]
}

/// Of all its cards together.
fn gpu_memory(NodeStatus { capacity, reserved, gpus, .. }: &NodeStatus) -> String {
    let cards = gpus.as_ref().map_or(0, |offer| offer.cards.len());
    match capacity.gpu_memory.filter(|_| cards > 0) {
        Some(each) => {
            let all = Bytes(each.0.saturating_mul(cards.into()));
            format!("{}/{}", memory(reserved.gpu_memory.unwrap_or(Bytes(0))), memory(all))
        }
        None => "-".into(),
    }
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

fn wide_row(node: &NodeStatus) -> [String; 12] {
    let [name, state, cpu, memory, gpu, net, iops, busy] = row(node);
    let agent = or_dash(node.agent_socket.as_deref());
    let gpus = node.gpus.as_ref();
    // Those of which somebody has something.
    let cards = gpus.map(|offer| {
        let taken = offer.cards.numbers().filter(|number| node.gpu_cards_taken.contains(*number)).count();
        format!("{taken}/{}", offer.cards.len())
    });
    let (cards, model) = (or_dash(cards.as_deref()), or_dash(gpus.map(|offer| offer.model.as_str())));
    [name, state, cpu, memory, gpu, net, iops, busy, cards, model, agent, node.boot_id.clone()]
}
