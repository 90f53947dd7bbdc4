//! Names of which something is known.

use super::{cpu, memory, network, or_dash};
use crate::{
    args::ListFormat,
    client::Broker,
    cluster::KnownProfile,
    error::Error,
    output::{self, Column},
    time,
};

pub(in crate::commands) async fn profiles(broker: &Broker, format: ListFormat) -> Result<(), Error> {
    let profiles = broker.list_profiles().await?;
    super::show(format, &profiles, "profiles", |_| output::table(COLUMNS, profiles.iter().map(row)))
}

const COLUMNS: [Column; 8] = [
    Column::Text("NAMESPACE"),
    Column::Text("NAME"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("NETWORK"),
    Column::Number("FINISHED"),
    Column::Number("MEASURED FOR"),
    Column::Number("LAST"),
];

fn row(profile: &KnownProfile) -> [String; 8] {
    let KnownProfile { namespace, name, executions, hours, demand, seen_at } = profile;
    let now = time::now();
    [
        namespace.clone(),
        name.clone(),
        cpu(demand.cpu),
        memory(demand.memory),
        network(demand.network),
        executions.to_string(),
        format!("{hours:.1}h"),
        or_dash(seen_at.map(|at| time::age(at, now))),
    ]
}
