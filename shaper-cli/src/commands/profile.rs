//! `shaper profile`: what tasks of a name need, by what they have used.

use shaper_core::{
    document,
    profile::Resource,
    units::{BitsPerSec, Bytes, Millicores},
};
use shaper_proto::v1::ResourceEstimate;

use super::get;
use crate::{
    args::{ProfileCommand, ProfileOf},
    client::Broker,
    cluster::MeasuredProfile,
    error::Error,
    output::{self, Column},
};

pub(super) async fn profile(broker: &Broker, command: &ProfileCommand) -> Result<(), Error> {
    match command {
        ProfileCommand::Get(of) => {
            let MeasuredProfile { profile, executions, notes, estimates: _ } = fetched(broker, of).await?;
            remark(executions, &of.name, &notes);
            output::print(&format!("{}\n", document::profile_to_json(&profile)))
        }
        ProfileCommand::Explain(of) => {
            let MeasuredProfile { executions, notes, estimates, .. } = fetched(broker, of).await?;
            remark(executions, &of.name, &notes);
            if estimates.is_empty() {
                output::remark("nothing was measured while they ran");
                return Ok(());
            }
            output::print(&output::table(COLUMNS, estimates.iter().map(row)))
        }
        ProfileCommand::List { output } => get::profiles(broker, *output).await,
    }
}

async fn fetched(broker: &Broker, of: &ProfileOf) -> Result<MeasuredProfile, Error> {
    let ProfileOf { name, namespace, priority } = of;
    Ok(broker.get_profile(name, namespace, (*priority).into()).await?)
}

fn remark(executions: u64, name: &str, notes: &[String]) {
    let times = if executions == 1 { "execution" } else { "executions" };
    output::remark(&format!("measured in {executions} {times} of {name}"));
    notes.iter().for_each(|note| output::remark(&format!("note: {note}")));
}

const COLUMNS: [Column; 6] = [
    Column::Text("RESOURCE"),
    Column::Number("REQUEST"),
    Column::Number("MEASURED FOR"),
    Column::Number("ABOVE IT"),
    Column::Number("OF ITS USE"),
    Column::Number("UNUSED"),
];

fn row(estimate: &ResourceEstimate) -> [String; 6] {
    let ResourceEstimate { resource, request, hours, touched, unserved, unused } = estimate;
    let request = match Resource::ALL.into_iter().find(|known| known.name() == resource) {
        Some(Resource::Cpu) => Millicores(*request).to_string(),
        Some(Resource::Memory | Resource::GpuMemory) => Bytes(*request).to_string(),
        Some(Resource::NetworkIn | Resource::NetworkOut) => BitsPerSec(*request).to_string(),
        Some(Resource::StorageIo) | None => request.to_string(),
    };
    let percent = |share: &f64| format!("{:.1} %", share * 100.0);
    [resource.clone(), request, format!("{hours:.1} h"), percent(touched), percent(unserved), percent(unused)]
}
