//! `shaper profile`: what tasks of a name have used, as a profile for the next one.

use shaper_core::document;

use crate::{args::Profile, client::Broker, cluster::MeasuredProfile, error::Error, output};

pub(super) async fn profile(broker: &Broker, args: &Profile) -> Result<(), Error> {
    let Profile { name, namespace } = args;
    let MeasuredProfile { profile, executions, notes } = broker.get_profile(name, namespace).await?;
    let times = if executions == 1 { "execution" } else { "executions" };
    output::remark(&format!("measured in {executions} {times} of {name}"));
    notes.iter().for_each(|note| output::remark(&format!("note: {note}")));
    output::print(&format!("{}\n", document::profile_to_json(&profile)))
}
