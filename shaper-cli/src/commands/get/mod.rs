//! `shaper get`: lists of things.

mod cluster_tasks;
mod events;
mod node_tasks;
mod nodes;
mod policies;
mod profiles;
mod scale;

use serde::Serialize;
use shaper_core::{
    task::TaskStatus,
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

pub(super) use self::{events::events, nodes::nodes, policies::policies, profiles::profiles, scale::scale};
use crate::{
    args::{GetTasks, ListFormat},
    cluster::{ClusterTask, KnownProfile, NodeStatus, PolicyStatus},
    error::Error,
    output,
    servers::Servers,
    show::compact,
};

/// The tasks of the cluster, or those of this node where there is no broker.
pub(super) async fn tasks(servers: &Servers, args: &GetTasks) -> Result<(), Error> {
    match servers.broker_if_any().await? {
        Some(broker) if args.watch => cluster_tasks::watch(&broker, args).await,
        Some(broker) => cluster_tasks::list(&broker, args).await,
        None if args.watch => Err(Error::WatchWithoutBroker),
        None => node_tasks::list(&servers.agent().await?, args).await,
    }
}

/// What has a name, by which other commands know it.
pub(super) trait Named {
    fn name(&self) -> &str;
}

impl Named for TaskStatus {
    fn name(&self) -> &str {
        self.task_id.as_str()
    }
}

impl Named for ClusterTask {
    fn name(&self) -> &str {
        self.spec.profile.task_id.as_str()
    }
}

impl Named for NodeStatus {
    fn name(&self) -> &str {
        &self.name
    }
}

impl Named for PolicyStatus {
    fn name(&self) -> &str {
        &self.policy.policy_name
    }
}

impl Named for KnownProfile {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Shows a list; `table` makes the table of it, the broad one when told so.
pub(super) fn show<T: Serialize + Named>(
    format: ListFormat,
    list: &[T],
    what: &str,
    table: impl FnOnce(bool) -> String,
) -> Result<(), Error> {
    match format {
        ListFormat::Json => output::print_json(&list),
        ListFormat::Yaml => output::print_yaml(&list),
        ListFormat::Name => {
            let lines = list.iter().map(|thing| output::printable(thing.name()) + "\n");
            output::print(&lines.collect::<String>())
        }
        ListFormat::Table | ListFormat::Wide if list.is_empty() => {
            output::remark(&format!("no {what}"));
            Ok(())
        }
        ListFormat::Table => output::print(&table(false)),
        ListFormat::Wide => output::print(&table(true)),
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// Quantities in a cell, without spaces.
fn cpu(amount: Millicores) -> String {
    compact(amount)
}

fn memory(amount: Bytes) -> String {
    compact(amount)
}

fn network(amount: Option<BitsPerSec>) -> String {
    or_dash(amount.map(compact))
}

fn iops(amount: Option<Iops>) -> String {
    or_dash(amount.map(|iops| iops.0))
}
