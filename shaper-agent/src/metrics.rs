//! What a node tells of itself, as metrics.

use std::sync::{Arc, OnceLock};

use shaper_common::hist::{BUCKETS, QUEUE_SHIFT, upper_ns};
use shaper_core::{
    doctor::Availability,
    gpu::CardUsage,
    limits::Limit,
    snapshot::{DeviceUsage, Pressure, Source, Sources},
    units::{BitsPerSec, Millicores},
};
use shaper_metrics::{Exposition, Family, Value, build_and_process, table::agent as table};

use crate::{
    actor::Handle,
    config::SecondWriter,
    kernel::features,
    meter::Waits,
    node::telemetry::{Reading, TaskReading},
    opener::Opener,
};

/// What the kernel has of what shaper uses: it is probed once, since it does not change.
#[derive(Clone, Default)]
pub struct Ladder(Arc<OnceLock<Vec<(String, bool)>>>);

impl Ladder {
    fn rungs(&self, opener: &Opener) -> &[(String, bool)] {
        self.0.get_or_init(|| {
            let rungs = features::probe(opener).unwrap_or_else(|error| {
                tracing::warn!(%error, "cannot probe the kernel for the metrics");
                Vec::new()
            });
            let is_available = |availability| matches!(availability, Availability::Available);
            rungs.into_iter().map(|rung| (rung.feature, is_available(rung.availability))).collect()
        })
    }
}

/// All that a node has to say now; `None`: its thread does not answer.
pub async fn scrape(node: Handle, ladder: Ladder, opener: Opener) -> Option<Exposition> {
    let reading = node.call(|node| node.reading()).await.ok()?;
    tokio::task::spawn_blocking(move || exposition(&reading, ladder.rungs(&opener))).await.ok()
}

fn cores(cpu: Millicores) -> Value {
    Value::Float(cpu.0 as f64 / 1e3)
}

fn bytes_per_second(rate: BitsPerSec) -> Value {
    Value::Float(rate.0 as f64 / 8.0)
}

fn seconds(ns: u64) -> Value {
    Value::Float(ns as f64 / 1e9)
}

fn is(yes: bool) -> Value {
    Value::Count(yes.into())
}

/// As text.
fn exposition(reading: &Reading, ladder: &[(String, bool)]) -> Exposition {
    let mut exposition = Exposition::default();
    build_and_process(&mut exposition, "shaper-agent");
    for task in &reading.tasks {
        add_task(&mut exposition, task);
    }
    add_machine(&mut exposition, reading);
    add_agent(&mut exposition, reading);
    for (feature, is_available) in ladder {
        exposition.add(&table::AGENT_FEATURE, std::slice::from_ref(feature), &[], is(*is_available));
    }
    exposition
}

/// Adds the series of one task.
struct Of<'a> {
    exposition: &'a mut Exposition,
    labels: Arc<[String]>,
}

impl Of<'_> {
    fn add(&mut self, family: &'static Family, more: &'static [&'static str], value: Value) {
        self.exposition.add_shared(family, &self.labels, more, value);
    }

    fn count(&mut self, family: &'static Family, value: u64) {
        self.add(family, &[], Value::Count(value));
    }

    fn limit<T>(
        &mut self,
        family: &'static Family,
        more: &'static [&'static str],
        limit: Limit<T>,
        value: fn(T) -> Value,
    ) where
        T: Copy,
    {
        if let Some(limit) = limit.at() {
            self.add(family, more, value(limit));
        }
    }
}

fn add_task(exposition: &mut Exposition, reading: &TaskReading) {
    let TaskReading { usage, submitted, origin, throttled_ns, waits, differing } = reading;
    let (namespace, name) = match submitted {
        Some(submitted) => (submitted.namespace.clone(), submitted.name.clone()),
        None => Default::default(),
    };
    let (task, attempt, uid) =
        (usage.task_id.to_string(), usage.attempt.to_string(), usage.owner.uid.to_string());
    let info = [task.clone(), namespace.clone(), name.clone(), attempt, uid, (*origin).to_owned()];
    exposition.add(&table::TASK_INFO, &info, &[], Value::Info);
    for memory in &usage.gpu_memory {
        let labels = [task.clone(), namespace.clone(), name.clone(), memory.number.to_string()];
        exposition.add(&table::TASK_GPU_MEMORY, &labels, &[], Value::Count(memory.used.0));
        if let (Limit::At(limit), Some(rung)) = (memory.limit, memory.enforced_by) {
            let [task, namespace, name, card] = labels;
            let labels = [task, namespace, name, card, rung.name().to_owned()];
            exposition.add(&table::TASK_GPU_MEMORY_LIMIT, &labels, &[], Value::Count(limit.0));
        }
    }
    let mut of = Of { exposition, labels: Arc::from([task, namespace, name]) };

    of.add(&table::TASK_CPU, &[], seconds(usage.cpu.time_ns));
    if let Some(ns) = throttled_ns {
        of.add(&table::TASK_THROTTLED, &[], seconds(*ns));
    }
    if let Some(waits) = waits {
        of.add(&table::TASK_RUN_QUEUE, &[], run_queue(waits));
    }
    of.add(&table::TASK_LENT, &[], cores(usage.cpu.lent));
    of.count(&table::TASK_LOANS, usage.cpu.loans);
    of.count(&table::TASK_QUOTA_WARNINGS, usage.quota_warnings);
    of.count(&table::TASK_ALARMS, usage.pressure_alarms);
    if let Some(memory) = &usage.memory {
        of.count(&table::TASK_MEMORY, memory.now.0);
        for (family, value) in [
            (&table::TASK_MEMORY_PEAK, memory.peak.map(|peak| peak.0)),
            (&table::TASK_OOM_KILLS, memory.oom_kills),
            (&table::TASK_RECLAIMED, memory.idle_reclaimed.map(|bytes| bytes.0)),
        ] {
            if let Some(value) = value {
                of.count(family, value);
            }
        }
    }
    let memory_pressure = usage.memory.and_then(|memory| memory.pressure);
    for (pressure, some, full) in stalls(usage.cpu.pressure, memory_pressure, usage.io_pressure) {
        of.add(&table::TASK_STALLED, some, seconds(pressure.some_total_us * 1000));
        of.add(&table::TASK_STALLED, full, seconds(pressure.full_total_us * 1000));
    }

    let network = &usage.network;
    for (direction, count) in [(EGRESS, &network.egress), (INGRESS, &network.ingress)] {
        of.add(&table::TASK_NETWORK, direction, Value::Count(count.total.bytes));
        of.add(&table::TASK_PACKETS, direction, Value::Count(count.total.packets));
    }
    if let Some(drops) = network.drops {
        of.count(&table::TASK_DROPS, drops);
    }
    if let Some(segments) = network.retransmits {
        of.count(&table::TASK_RETRANSMITS, segments);
    }
    of.add(&table::TASK_HELD, &["tcp"], Value::Count(network.streams_held.bytes));
    of.add(&table::TASK_HELD, &["other"], Value::Count(network.datagrams_held.bytes));
    if let Some(granted) = network.granted {
        of.add(&table::TASK_GRANT_NETWORK, &[], bytes_per_second(granted));
    }
    type Direction = fn(&DeviceUsage) -> (u64, u64);
    let directions: [(&[&str], Direction); 2] = [
        (&["read"], |device| (device.read.bytes, device.read.operations)),
        (&["write"], |device| (device.write.bytes, device.write.operations)),
    ];
    for (direction, of_device) in directions {
        let counts = usage.io.iter().filter(|device| !device.stacked).map(of_device);
        let (bytes, operations) = counts.fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
        of.add(&table::TASK_IO, direction, Value::Count(bytes));
        of.add(&table::TASK_IO_OPERATIONS, direction, Value::Count(operations));
    }

    let limits = &usage.limits;
    of.limit(&table::TASK_LIMIT_CPU, &[], limits.cpu, cores);
    of.limit(&table::TASK_LIMIT_MEMORY, &[], limits.memory, |bytes| Value::Count(bytes.0));
    of.limit(&table::TASK_LIMIT_NETWORK, EGRESS, limits.net_egress, bytes_per_second);
    of.limit(&table::TASK_LIMIT_NETWORK, INGRESS, limits.net_ingress, bytes_per_second);
    of.limit(&table::TASK_LIMIT_IO, &[], limits.storage_io, |iops| Value::Count(iops.0));
    if let Some(submitted) = submitted {
        of.add(&table::TASK_REQUEST_CPU, &[], cores(submitted.cpu));
        of.count(&table::TASK_REQUEST_MEMORY, submitted.memory.0);
    }
    of.count(&table::TASK_DIFFERS, *differing as u64);
}

const EGRESS: &[&str] = &["egress"];
const INGRESS: &[&str] = &["ingress"];

/// What is waited for, with the labels of waiting by some and by all.
fn stalls(
    cpu: Option<Pressure>,
    memory: Option<Pressure>,
    io: Option<Pressure>,
) -> impl Iterator<Item = (Pressure, &'static [&'static str], &'static [&'static str])> {
    let cpu = cpu.map(|cpu| (cpu, &["cpu", "some"][..], &["cpu", "full"][..]));
    let memory = memory.map(|memory| (memory, &["memory", "some"][..], &["memory", "full"][..]));
    let io = io.map(|io| (io, &["io", "some"][..], &["io", "full"][..]));
    [cpu, memory, io].into_iter().flatten()
}

/// Buckets of the kernel programs that make one of the metric: two doublings.
const MERGED: usize = 8;

/// The histogram of waits for a CPU. That of the programs is finer than anybody would want of a thousand tasks.
fn run_queue(Waits(counts): &Waits) -> Value {
    let mut buckets = Vec::new();
    let mut from = 0;
    // The programs' buckets are cut so that a doubling ends with each fourth.
    for end in (MERGED / 2..BUCKETS).step_by(MERGED) {
        let le = upper_ns(end - 1, QUEUE_SHIFT) as f64 / 1e9;
        buckets.push((le, counts[from..end].iter().sum()));
        from = end;
    }
    buckets.push((f64::INFINITY, counts[from..].iter().sum()));
    let middle = |bucket: usize| {
        let below = if bucket == 0 { 0 } else { upper_ns(bucket - 1, QUEUE_SHIFT) };
        (below + upper_ns(bucket, QUEUE_SHIFT)) as f64 / 2e9
    };
    let sum = counts.iter().enumerate().map(|(bucket, count)| *count as f64 * middle(bucket)).sum();
    Value::Histogram { buckets, sum }
}

fn add_machine(exposition: &mut Exposition, reading: &Reading) {
    let machine = &reading.snapshot;
    for (family, value) in [
        (&table::MACHINE_CPUS, Value::Count(machine.cpus.into())),
        (&table::MACHINE_CPU_USED, cores(machine.cpu_now)),
        (&table::MACHINE_MEMORY, Value::Count(machine.memory.0)),
        (&table::MACHINE_MEMORY_AVAILABLE, Value::Count(machine.memory_available.0)),
        (&table::AGENT_CPU, cores(reading.capacity.cpu)),
        (&table::AGENT_MEMORY, Value::Count(reading.capacity.memory.0)),
    ] {
        exposition.add(family, &[], &[], value);
    }
    for gpu in &machine.gpus {
        add_gpu(exposition, gpu);
    }
    if let Some(network) = reading.capacity.network {
        exposition.add(&table::AGENT_NETWORK, &[], &[], bytes_per_second(network));
    }
    for (pressure, some, full) in stalls(machine.cpu_pressure, machine.memory_pressure, machine.io_pressure) {
        exposition.add(&table::MACHINE_STALLED, &[], some, seconds(pressure.some_total_us * 1000));
        exposition.add(&table::MACHINE_STALLED, &[], full, seconds(pressure.full_total_us * 1000));
    }
    let uplinks = &machine.uplinks;
    exposition.add(&table::AGENT_UPLINKS, &[], &["tasks"], Value::Count(uplinks.tasks.bytes));
    exposition.add(&table::AGENT_UPLINKS, &[], &["unmanaged"], Value::Count(uplinks.unmanaged.bytes));
    exposition.add(&table::AGENT_UPLINKS, &[], &["nobody"], Value::Count(uplinks.nobody.bytes));
    if let Some(pool) = &machine.cpu_pool {
        exposition.add(&table::AGENT_POOL, &[], &[], cores(pool.size));
        exposition.add(&table::AGENT_POOL_LENT, &[], &[], cores(pool.lent));
    }
}

fn add_gpu(exposition: &mut Exposition, gpu: &CardUsage) {
    let CardUsage { card, memory, memory_used, busy_percent, temperature_celsius, trouble, errors } = gpu;
    let number = [card.number.to_string()];
    let [of] = number.clone();
    exposition.add(&table::MACHINE_GPU, &[of, card.id.clone(), card.model.clone()], &[], Value::Info);
    exposition.add(&table::MACHINE_GPU_READABLE, &number, &[], is(trouble.is_none()));
    for (family, value) in [
        (&table::MACHINE_GPU_MEMORY, memory.map(|memory| Value::Count(memory.0))),
        (&table::MACHINE_GPU_MEMORY_USED, memory_used.map(|used| Value::Count(used.0))),
        (&table::MACHINE_GPU_BUSY, busy_percent.map(|percent| Value::Float(f64::from(percent) / 100.0))),
        (&table::MACHINE_GPU_TEMPERATURE, temperature_celsius.map(|celsius| Value::Count(celsius.into()))),
        (&table::MACHINE_GPU_ERRORS, Some(Value::Count(*errors))),
    ] {
        if let Some(value) = value {
            exposition.add(family, &number, &[], value);
        }
    }
}

fn add_agent(exposition: &mut Exposition, reading: &Reading) {
    let Reading { snapshot, counts, .. } = reading;
    let info = [snapshot.node.clone(), features::release(), reading.cgroups.to_owned()];
    exposition.add(&table::AGENT_INFO, &info, &[], Value::Info);
    exposition.add(&table::AGENT_TASKS, &[], &["running"], Value::Count(reading.running as u64));
    exposition.add(&table::AGENT_TASKS, &[], &["ended"], Value::Count(reading.ended as u64));
    let health = &snapshot.health;
    for (family, value) in [
        (&table::AGENT_SERIES_DROPPED, Value::Count(counts.left_out)),
        (&table::AGENT_POLICIES, Value::Count(reading.policies_revision)),
        (&table::AGENT_FAILURES, Value::Count(counts.failures)),
        (&table::AGENT_LEDGER, Value::Count(reading.ledger_entries)),
        (&table::AGENT_TICK, Value::from(&counts.ticks)),
        (&table::AGENT_STOCKS, Value::Count(reading.stocks)),
        (&table::AGENT_ATTACHED, is(reading.attached)),
        (&table::AGENT_EVENTS_LOST, Value::Count(health.events_lost)),
        (&table::AGENT_RUNS_MISSED, Value::Count(health.runs_missed)),
        (&table::AGENT_IO_UNCOUNTED, Value::Count(health.io_uncounted)),
        (&table::AGENT_WITHOUT_ENTRY, Value::Count(health.cgroups_without_entry)),
    ] {
        exposition.add(family, &[], &[], value);
    }
    if let Some(connected) = reading.connected {
        exposition.add(&table::AGENT_CONNECTED, &[], &[], is(connected));
    }
    // All of them from the beginning: of what was never there nobody can see that it has grown.
    for decision in ["grew", "shrunk", "reclaimed", "evicted"] {
        let count = counts.decisions.get(decision).copied().unwrap_or(0);
        exposition.add(&table::AGENT_DECISIONS, &[decision.to_owned()], &[], Value::Count(count));
    }
    let policy: &[&str] = match reading.second_writer {
        SecondWriter::Hold => &["hold"],
        SecondWriter::Yield => &["yield"],
        SecondWriter::Report => &["report"],
    };
    exposition.add(&table::AGENT_SECOND_WRITES, &[], policy, Value::Count(counts.second_writes));
    for program in &reading.left_out {
        exposition.add(&table::AGENT_LEFT_OUT, std::slice::from_ref(program), &[], Value::Count(1));
    }
    let Sources { cpu, run_queue, memory, io, io_latency, network, pressure } = snapshot.sources;
    for (measure, source) in [
        ("cpu", cpu),
        ("run_queue", run_queue),
        ("memory", memory),
        ("io", io),
        ("io_latency", io_latency),
        ("network", network),
        ("pressure", pressure),
    ] {
        let source = match source {
            Source::Program => "program",
            Source::CgroupFile => "cgroup-file",
            Source::None => "none",
        };
        let labels = [measure.to_owned(), source.to_owned()];
        exposition.add(&table::AGENT_SOURCE, &labels, &[], Value::Count(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buckets_of_waits_are_merged_without_losing_one() {
        let mut counts = [0; BUCKETS];
        for (bucket, count) in counts.iter_mut().enumerate() {
            *count = bucket as u64 + 1;
        }
        let Value::Histogram { buckets, sum } = run_queue(&Waits(Box::new(counts))) else {
            panic!("it is a histogram")
        };
        let in_all = buckets.iter().map(|(_, count)| count).sum::<u64>();
        assert_eq!(in_all, (1..=BUCKETS as u64).sum::<u64>());
        // Where the programs' own buckets end.
        let ends: Vec<u64> = buckets.iter().map(|(le, _)| (le * 1e9).round() as u64).collect();
        assert_eq!(ends[..3], [4 << 10, 16 << 10, 64 << 10]);
        assert_eq!((buckets[0].1, buckets.len(), buckets[8].0), (1 + 2 + 3 + 4, 9, f64::INFINITY));
        assert!(buckets.is_sorted_by(|before, after| before.0 < after.0));
        assert!(sum > 0.0);
    }
}
