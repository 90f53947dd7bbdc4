//! Domain values in the words that several commands use for them.

use std::fmt;

use shaper_core::{
    limits::{Limit, Limits},
    task::{Enforcement, ExitStatus, Owner, Phase, TaskStatus},
    units::{BitsPerSec, Bytes, Millicores, Weight},
};

use crate::{cluster::ClusterPhase, users};

/// `Running`, `Exited(3)`, `Signaled(9)`, `NotStarted` or `Unknown`.
pub(crate) fn phase(phase: &Phase) -> String {
    match phase {
        Phase::Running => "Running".into(),
        Phase::Ended { status, at: _ } => end(status),
    }
}

fn end(status: &ExitStatus) -> String {
    match status {
        ExitStatus::Code(code) => format!("Exited({code})"),
        ExitStatus::Signal(signal) => format!("Signaled({signal})"),
        ExitStatus::NotStarted { .. } => "NotStarted".into(),
        ExitStatus::Unknown => "Unknown".into(),
    }
}

/// `Pending`, `Starting`, `Cancelled`, and what [`phase`] has.
pub(crate) fn cluster_phase(phase: &ClusterPhase) -> String {
    match phase {
        ClusterPhase::Pending { reason: _ } => "Pending".into(),
        ClusterPhase::Starting { node: _ } => "Starting".into(),
        ClusterPhase::Running { node: _ } => "Running".into(),
        ClusterPhase::Ended { status, at: _ } => end(status),
        ClusterPhase::Cancelled => "Cancelled".into(),
    }
}

/// Name of a user, or the number of one who has none here.
pub(crate) fn user(owner: &Owner) -> String {
    users::user_name(owner.uid).unwrap_or_else(|| owner.uid.to_string())
}

/// A quantity without spaces, in a form that the command line takes: `9.8Mbit`, `512MiB`.
pub(crate) fn compact(quantity: impl fmt::Display) -> String {
    quantity.to_string().replace(' ', "").trim_end_matches("/s").to_owned()
}

/// What is used of a limit: `0.48/0.5`, `120MiB/max`.
pub(crate) fn used<T: fmt::Display>(used: Option<T>, limit: &Limit<T>) -> String {
    let used = used.map_or_else(|| "-".into(), compact);
    format!("{used}/{}", compact(limit))
}

/// What is received, and of which limit where there is one: most tasks have none.
pub(crate) fn received(now: BitsPerSec, limit: &Limit<BitsPerSec>) -> String {
    match limit {
        Limit::Unlimited => compact(now),
        limit => used(Some(now), limit),
    }
}

/// What a task uses of its limits now.
pub(crate) struct Now {
    pub(crate) cpu: String,
    pub(crate) memory: String,
    pub(crate) net_out: String,
    pub(crate) net_in: String,
}

impl Now {
    pub(crate) fn of(task: &TaskStatus) -> Now {
        let TaskStatus { usage, limits, .. } = task;
        Now {
            cpu: used(Some(Millicores(usage.cpu_now_millicores)), &limits.cpu),
            memory: used(usage.memory_bytes.map(Bytes), &limits.memory),
            net_out: used(Some(BitsPerSec(usage.egress_now_bps)), &limits.net_egress),
            net_in: received(BitsPerSec(usage.ingress_now_bps), &limits.net_ingress),
        }
    }
}

/// The names that resources have in an [`Enforcement`].
pub(crate) mod resource {
    pub(crate) const CPU: &str = "cpu";
    pub(crate) const CPU_WEIGHT: &str = "cpu_weight";
    pub(crate) const MEMORY: &str = "memory";
    pub(crate) const NET_EGRESS: &str = "net_egress";
    pub(crate) const NET_INGRESS: &str = "net_ingress";
    pub(crate) const GPU_CARDS: &str = "gpu_cards";
    pub(crate) const GPU_MEMORY: &str = "gpu_memory";
    pub(crate) const GPU_POWER: &str = "gpu_power";
    pub(crate) const NET_EGRESS_GUARANTEE: &str = "net_egress_guarantee";
    pub(crate) const NET_EGRESS_WEIGHT: &str = "net_egress_weight";
    pub(crate) const STORAGE_IO: &str = "storage_io";
    pub(crate) const STORAGE_IO_WEIGHT: &str = "storage_io_weight";
    pub(crate) const STORAGE_IO_LATENCY: &str = "storage_io_latency";
}

/// One limit of a task, by the name of its resource in [`Enforcement`].
pub(crate) struct NamedLimit {
    pub(crate) resource: &'static str,
    pub(crate) limit: String,
}

/// Every limit there is, with or without a ceiling.
pub(crate) fn limits(limits: &Limits) -> Vec<NamedLimit> {
    // Whether idle memory is taken is no limit: it is shown beside what came of that.
    let Limits {
        cpu,
        cpu_weight,
        memory,
        net_egress,
        storage_io,
        storage_io_weight,
        storage_io_latency,
        reclaim_idle: _,
        net_egress_guarantee,
        net_egress_weight,
        net_ingress,
        gpu_cards,
        gpu_memory,
        gpu_power,
    } = limits;
    let weight =
        |weight: &Option<Weight>| weight.as_ref().map_or_else(|| "as found".into(), ToString::to_string);
    let mut named = vec![
        NamedLimit { resource: resource::CPU, limit: cpu.to_string() },
        NamedLimit { resource: resource::CPU_WEIGHT, limit: weight(cpu_weight) },
        NamedLimit { resource: resource::MEMORY, limit: memory.to_string() },
        NamedLimit { resource: resource::NET_EGRESS, limit: net_egress.to_string() },
        NamedLimit { resource: resource::STORAGE_IO, limit: storage_io.to_string() },
        NamedLimit { resource: resource::STORAGE_IO_WEIGHT, limit: weight(storage_io_weight) },
        NamedLimit { resource: resource::STORAGE_IO_LATENCY, limit: storage_io_latency.to_string() },
    ];
    // These are shown where there are any: a node that does not divide its network, or has no queue of what arrives, has none.
    let shares = [
        (resource::NET_INGRESS, net_ingress.at().map(|it| it.to_string())),
        (resource::GPU_CARDS, gpu_cards.map(|it| it.to_string())),
        (resource::GPU_MEMORY, gpu_memory.at().map(|it| it.to_string())),
        (resource::GPU_POWER, gpu_power.at().map(|it| it.to_string())),
        (resource::NET_EGRESS_GUARANTEE, net_egress_guarantee.map(|it| it.to_string())),
        (resource::NET_EGRESS_WEIGHT, net_egress_weight.map(|it| it.to_string())),
    ];
    for (resource, limit) in shares {
        named.extend(limit.map(|limit| NamedLimit { resource, limit }));
    }
    named
}

/// What holds a resource of a task; more than one mechanism may.
pub(crate) fn enforcement<'a>(
    task: &'a TaskStatus,
    resource: &'a str,
) -> impl Iterator<Item = &'a Enforcement> {
    task.enforcement.iter().filter(move |enforcement| {
        let found = enforcement.resource.as_str();
        found == resource
            // One for each card.
            || found.split_once(':').is_some_and(|(kind, _)| kind == resource)
            || (resource == resource::STORAGE_IO_WEIGHT && matches!(found, "io_weight" | "io_bfq_weight"))
    })
}

/// What holds the block IO of a task, device by device: its ceiling, or others' promises.
pub(crate) fn io_of_devices(task: &TaskStatus) -> impl Iterator<Item = &Enforcement> {
    task.enforcement.iter().filter(|enforcement| enforcement.resource.starts_with("io_max:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_table_shows_can_be_typed_back() {
        assert_eq!(used(Some(Millicores(480)), &Limit::At(Millicores(500))), "0.48/0.5");
        assert_eq!(used(None, &Limit::At(Bytes(1 << 30))), "-/1GiB");
        assert_eq!(used(Some(BitsPerSec(0)), &Limit::Unlimited), "0bit/max");
        let (now, limit) = (BitsPerSec(9_800_000), Limit::At(BitsPerSec(20_000_000)));
        assert_eq!(received(now, &Limit::Unlimited), "9.8Mbit");
        assert_eq!(received(now, &limit), "9.8Mbit/20Mbit");
        assert_eq!(BitsPerSec::parse(&compact(BitsPerSec(9_800_000))), Ok(BitsPerSec(9_800_000)));
        assert_eq!(Bytes::parse(&compact(Bytes(3 << 29))), Ok(Bytes(3 << 29)));
    }
}
