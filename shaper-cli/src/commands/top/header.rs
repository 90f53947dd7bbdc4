//! What is said above the table: the node, and how far its figures can be trusted.

use shaper_core::{
    gpu::CardUsage,
    snapshot::{Health, NodeSnapshot, Pressure, Source, Sources, UplinkUsage},
    task::Traffic,
    units::{Bytes, Millicores},
};

use super::{
    figures::{or_unknown, seconds, some_and_full},
    topic::Topic,
};
use crate::{show::compact, time::Utc};

/// Room for the names of these topics.
pub(super) const INDENT: usize = 9;

/// What is said of the node.
pub(super) fn node(snapshot: &NodeSnapshot) -> Vec<Topic> {
    let NodeSnapshot {
        node,
        at,
        interval_ns,
        cpus,
        cpu_now,
        memory,
        memory_available,
        cpu_pressure,
        memory_pressure,
        io_pressure,
        uplinks,
        sources,
        health: _,
        cpu_pool,
        gpus,
        tasks,
    } = snapshot;
    let interval = match interval_ns {
        0 => "the first second: no rates yet".into(),
        nanos => format!("rates over {}", seconds(*nanos)),
    };
    let count = match tasks.len() {
        1 => "1 task".into(),
        count => format!("{count} tasks"),
    };
    let busy =
        or_unknown((*interval_ns != 0).then_some(*cpu_now), |Millicores(now)| Millicores(now).to_string());
    let in_use = Bytes(memory.0.saturating_sub(memory_available.0));
    let psi = |pressure: &Option<Pressure>| some_and_full(*pressure);
    let mut topics = vec![
        Topic::new("Node", [node.clone(), Utc(*at).to_string(), interval, count]),
        Topic::new(
            "CPU",
            [
                Some(format!("{busy} of {cpus} busy")),
                cpu_pool
                    .filter(|pool| pool.lent.0 > 0)
                    .map(|pool| format!("{} of {} lent", pool.lent, pool.size)),
                Some(psi(cpu_pressure)),
            ]
            .into_iter()
            .flatten(),
        ),
        Topic::new(
            "Memory",
            [format!("{} of {} in use", compact(in_use), compact(memory)), psi(memory_pressure)],
        ),
        Topic::new("IO", [psi(io_pressure)]),
        Topic::new("Uplinks", sent(uplinks, sources)),
    ];
    topics.extend((!gpus.is_empty()).then(|| Topic::new("GPUs", gpus.iter().map(card))));
    let items = reservations(sources);
    if !items.is_empty() {
        topics.push(Topic::new("Sources", items));
    }
    topics
}

/// A card: how busy it is, and its memory.
fn card(usage: &CardUsage) -> String {
    let CardUsage { card, memory, memory_used, busy_percent, temperature_celsius: _, trouble, errors: _ } =
        usage;
    let name = format!("{}: {}", card.number, card.model);
    if let Some(trouble) = trouble {
        return format!("{name}, {trouble}");
    }
    let busy = busy_percent.map(|percent| format!(", {percent}% busy"));
    let memory =
        memory.zip(*memory_used).map(|(of, used)| format!(", {} of {} in use", compact(used), compact(of)));
    [Some(name), busy, memory].into_iter().flatten().collect()
}

fn sent(uplinks: &UplinkUsage, sources: &Sources) -> Vec<String> {
    if sources.network == Source::None {
        return vec!["-".into()];
    }
    let UplinkUsage { tasks, unmanaged, nobody } = uplinks;
    let bytes = |Traffic { bytes, packets: _ }: &Traffic| compact(Bytes(*bytes));
    let total =
        [tasks, unmanaged, nobody].iter().fold(0u64, |sum, traffic| sum.saturating_add(traffic.bytes));
    vec![
        format!("{} sent in all", compact(Bytes(total))),
        format!("{} by tasks", bytes(tasks)),
        format!("{} by others", bytes(unmanaged)),
        format!("{} without a socket", bytes(nobody)),
    ]
}

/// Every kind of figures, and who has them.
pub(super) fn named(sources: &Sources) -> [(&'static str, Source); 7] {
    let Sources { cpu, run_queue, memory, io, io_latency, network, pressure } = *sources;
    [
        ("CPU", cpu),
        ("run queue", run_queue),
        ("memory", memory),
        ("IO", io),
        ("IO latency", io_latency),
        ("network", network),
        ("pressure", pressure),
    ]
}

/// Which figures no kernel program has, and why.
fn reservations(sources: &Sources) -> Vec<String> {
    // What the kernel counts by itself needs no program.
    const KERNELS_OWN: [&str; 2] = ["memory", "pressure"];
    let those = |source: Source, kernels_own: bool| {
        let names: Vec<&str> = named(sources)
            .into_iter()
            .filter(|(name, found)| *found == source && KERNELS_OWN.contains(name) == kernels_own)
            .map(|(name, _)| name)
            .collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let mut items: Vec<String> = [
        (Source::CgroupFile, true, "from cgroup files: the kernel counts that itself"),
        (Source::CgroupFile, false, "from cgroup files: no program for that runs here"),
        (Source::None, false, "not measured: no program for that runs here"),
        (Source::None, true, "not measured: the kernel does not count that here"),
    ]
    .into_iter()
    .filter_map(|(source, kernels_own, why)| Some(format!("{} {why}", those(source, kernels_own)?)))
    .collect();
    let degraded = named(sources).iter().any(|(name, source)| match source {
        Source::Program => false,
        Source::CgroupFile => !KERNELS_OWN.contains(name),
        Source::None => true,
    });
    if degraded {
        items.push("see `shaper doctor`".into());
    }
    items
}

/// What makes these figures less than the truth.
pub(super) fn alarm(health: &Health) -> Option<Topic> {
    let Health {
        events_lost,
        cgroups_without_entry,
        runs_missed,
        io_uncounted,
        agent_cpu_ns: _,
        agent_memory: _,
    } = *health;
    let items: Vec<String> = [
        (events_lost, "events lost: they came faster than they were read"),
        (cgroups_without_entry, "cgroups without an entry: the table is full, they are found by a walk"),
        (runs_missed, "runs of kernel programs missed: something was not counted"),
        (io_uncounted, "IO operations not charged: the table is full"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect();
    (!items.is_empty())
        .then(|| Topic::new("!!", std::iter::once("MEASUREMENT DEGRADED".to_owned()).chain(items)))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{fixture, topic::lines},
        *,
    };

    #[test]
    fn the_node_in_a_few_lines() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself";
        assert_eq!(lines(&node(&fixture::snapshot()), INDENT, usize::MAX).join("\n"), expected);
        assert!(alarm(&fixture::snapshot().health).is_none());
    }

    #[test]
    fn what_is_not_measured_is_said_with_the_reason() {
        let snapshot = NodeSnapshot { interval_ns: 0, ..fixture::poor_snapshot() };
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  the first second: no rates yet  1 task
CPU      - of 8 busy  PSI -
Memory   12GiB of 32GiB in use  PSI -
IO       PSI -
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory from cgroup files: the kernel counts that itself
         IO from cgroup files: no program for that runs here
         run queue, IO latency not measured: no program for that runs here
         pressure not measured: the kernel does not count that here  see `shaper doctor`";
        assert_eq!(lines(&node(&snapshot), INDENT, 90).join("\n"), expected);
        let alarm = alarm(&snapshot.health).unwrap();
        let expected = "\
!!       MEASUREMENT DEGRADED
         12 events lost: they came faster than they were read
         3 cgroups without an entry: the table is full, they are found by a walk
         5 IO operations not charged: the table is full";
        assert_eq!(lines(&[alarm], INDENT, 80).join("\n"), expected);
    }

    #[test]
    fn a_node_cannot_steer_the_terminal() {
        let snapshot = NodeSnapshot { node: "n\u{1b}[2J".into(), ..fixture::snapshot() };
        assert!(lines(&node(&snapshot), INDENT, 80)[0].starts_with(r"Node     n\u{1b}[2J"));
    }
}
