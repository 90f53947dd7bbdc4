//! `shaper set`: changes limits of a running task.

use std::{pin::pin, time::Duration};

use shaper_core::{
    id::TaskId,
    limits::LimitsChange,
    shrink::{Outcome, Status},
    task::TaskStatus,
};

use crate::{
    args::{Format, Set},
    client::Client,
    error::Error,
    output::{self, printable},
    progress::Progress,
    show::{self, resource},
};

/// How often it is looked how far memory has come down.
const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn set(client: &Client, args: &Set) -> Result<(), Error> {
    let change = LimitsChange::from(args.limits);
    let before = client.get_task(&args.id).await?;
    let setting = client.set_limits(&args.id, change, args.wait);
    let after = if args.wait { watched(client, &args.id, setting).await? } else { setting.await? };
    match args.output {
        Format::Text => output::print(&text(&change, &before, &after)),
        Format::Json => output::print_json(&after),
        Format::Yaml => output::print_yaml(&after),
    }?;
    match after.shrink {
        Some(shrink) if args.wait && change.memory.is_some() && was_given_up(&shrink) => {
            Err(Error::NotShrunk(args.id.clone()))
        }
        _ => Ok(()),
    }
}

/// Shows meanwhile how far the memory of the task has come down.
async fn watched<T>(client: &Client, id: &TaskId, setting: impl Future<Output = T>) -> T {
    let progress = Progress::of_bytes(&format!("reclaiming memory of {id}"));
    let mut setting = pin!(setting);
    let mut looks = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            done = &mut setting => return done,
            _ = looks.tick(), if progress.is_seen() => {}
        }
        // That it cannot be seen says nothing of the change.
        if let Ok(TaskStatus { shrink: Some(shrink), .. }) = client.get_task(id).await {
            let Status { target, used_at_first, used, .. } = shrink;
            let of = used_at_first.0.saturating_sub(target.0);
            progress.at(used_at_first.0.saturating_sub(used.0).min(of), of);
        }
    }
}

fn was_given_up(shrink: &Status) -> bool {
    matches!(shrink.outcome, Some(Outcome::Aborted { .. } | Outcome::Ended))
}

/// A line for each limit that was to change, and for each note that the change brought.
fn text(change: &LimitsChange, before: &TaskStatus, after: &TaskStatus) -> String {
    let LimitsChange {
        cpu,
        cpu_weight,
        memory,
        net_egress,
        storage_io,
        storage_io_weight,
        storage_io_latency,
        reclaim_idle,
        net_egress_guarantee,
        net_egress_weight,
        net_ingress,
        gpu_cards,
        gpu_memory,
        gpu_power,
    } = change;
    let named = [
        (resource::CPU, cpu.is_some()),
        (resource::CPU_WEIGHT, cpu_weight.is_some()),
        (resource::MEMORY, memory.is_some()),
        (resource::NET_EGRESS, net_egress.is_some()),
        (resource::NET_INGRESS, net_ingress.is_some()),
        (resource::GPU_CARDS, gpu_cards.is_some()),
        (resource::GPU_MEMORY, gpu_memory.is_some()),
        (resource::GPU_POWER, gpu_power.is_some()),
        (resource::NET_EGRESS_GUARANTEE, net_egress_guarantee.is_some()),
        (resource::NET_EGRESS_WEIGHT, net_egress_weight.is_some()),
        (resource::STORAGE_IO, storage_io.is_some()),
        (resource::STORAGE_IO_WEIGHT, storage_io_weight.is_some()),
        (resource::STORAGE_IO_LATENCY, storage_io_latency.is_some()),
    ];
    let mut lines = Vec::new();
    for (resource, _) in named.into_iter().filter(|(_, named)| *named) {
        let mechanisms: Vec<&str> =
            show::enforcement(after, resource).map(|enforcement| enforcement.mechanism.as_str()).collect();
        let by = if mechanisms.is_empty() { String::new() } else { format!(" ({})", mechanisms.join(", ")) };
        lines.push(format!("{resource}: {} → {}{by}", in_force(before, resource), in_force(after, resource)));
    }
    if let Some(reclaim) = reclaim_idle {
        let does = if *reclaim { "is taken away" } else { "stays" };
        lines.push(format!("memory that it does not use {does}"));
    }
    if let Some(shrink) = after.shrink.as_ref().filter(|_| after.shrink != before.shrink) {
        lines.push(format!("memory: {shrink}"));
    }
    let new_notes = after.notes.iter().filter(|note| !before.notes.contains(note));
    lines.extend(new_notes.map(|note| format!("note: {note}")));
    lines.iter().map(|line| format!("{}\n", printable(line))).collect()
}

/// What holds a resource, as read back; where nothing does, the limit that the agent keeps for it.
fn in_force(task: &TaskStatus, resource: &str) -> String {
    let read_back: Vec<&str> =
        show::enforcement(task, resource).map(|enforcement| enforcement.in_force.as_str()).collect();
    if !read_back.is_empty() {
        return read_back.join(" + ");
    }
    let limit = show::limits(&task.limits).into_iter().find(|limit| limit.resource == resource);
    limit.map_or_else(String::new, |limit| limit.limit)
}
