//! Everything that a snapshot says of one task.

use shaper_core::{
    gpu::CardMemory,
    snapshot::{
        CpuUsage, DeviceUsage, Health, IoCount, Latency, MemoryUsage, NetCount, NetUsage, NodeSnapshot,
        Pressure, Source, TaskSnapshot,
    },
    task::{Owner, Traffic, Workload},
    units::{Bytes, Millicores},
};

use super::{
    columns::count,
    figures::{IoTotal, Reading, Way, nanos, or_unknown, permille, quantiles, seconds, some_and_full},
    header::named,
    topic::Topic,
};
use crate::output::printable;
use crate::show::{self, compact, received, used};

/// Room for the names of these topics.
pub(super) const INDENT: usize = 13;

pub(super) fn task(snapshot: &NodeSnapshot, task: &TaskSnapshot) -> Vec<Topic> {
    let TaskSnapshot {
        task_id,
        attempt,
        owner: Owner { uid, gid },
        workload,
        limits,
        cpu,
        memory,
        io,
        io_pressure,
        network,
        gpu_memory,
        preempted_by,
        quota_warnings,
        pressure_alarms,
        files_age_ns,
    } = task;
    let reading = Reading::new(snapshot, task);
    let mut topics = Vec::new();
    let mut field = |name: &str, items: &[String]| topics.push(Topic::new(name, items.to_vec()));
    let mut whose = vec![format!("{task_id} (attempt {attempt})"), format!("uid {uid}, gid {gid}")];
    whose.extend(workload.as_ref().map(|Workload { name, namespace, .. }| format!("{namespace}/{name}")));
    field("Task", &whose);
    let limits: Vec<String> = show::limits(limits)
        .into_iter()
        .map(|show::NamedLimit { resource, limit }| format!("{resource} {limit}"))
        .collect();
    field("Limits", &limits);
    cpu_fields(&reading, cpu, &mut field);
    match memory {
        Some(memory) => memory_fields(&reading, memory, &mut field),
        None => field("Memory", &["-".into()]),
    }
    network_fields(&reading, network, &mut field);
    field("IO", &[stalls(*io_pressure)]);
    for device in io {
        device_fields(&reading, device, &mut field);
    }
    if !gpu_memory.is_empty() {
        let of = |it: &CardMemory| {
            format!("card {}: {} by {} processes", it.number, compact(it.used), it.processes)
        };
        field("GPU memory", &gpu_memory.iter().map(of).collect::<Vec<_>>());
    }
    let preempted_by = preempted_by.as_ref().map(|by| match by.as_str() {
        "" => "preempted last by what is not managed, or not yours".to_owned(),
        by => format!("preempted last by {}", printable(by)),
    });
    let mut alarms = vec![
        format!("{quota_warnings} of a CPU quota almost used up"),
        format!("{pressure_alarms} of memory and IO pressure"),
    ];
    alarms.extend(preempted_by);
    field("Alarms", &alarms);
    field("Files", &[format!("read {} ago", nanos(*files_age_ns))]);
    let sources = named(&snapshot.sources).map(|(name, source)| {
        let by = match source {
            Source::Program => "program",
            Source::CgroupFile => "cgroup file",
            Source::None => "nobody",
        };
        format!("{name}: {by}")
    });
    field("Measured by", &sources);
    let Health { events_lost, cgroups_without_entry, runs_missed, io_uncounted, agent_cpu_ns, agent_memory } =
        snapshot.health;
    field(
        "Agent",
        &[
            format!("{} of CPU", seconds(agent_cpu_ns)),
            format!("{} of memory", compact(agent_memory)),
            format!("{events_lost} events lost"),
            format!("{cgroups_without_entry} cgroups without an entry"),
            format!("{runs_missed} runs of programs missed"),
            format!("{io_uncounted} IO operations not charged"),
        ],
    );
    topics
}

fn cpu_fields(reading: &Reading<'_>, cpu: &CpuUsage, field: &mut impl FnMut(&str, &[String])) {
    // The figures come by way of the reading, which knows what of them is measured.
    let CpuUsage {
        time_ns: _,
        now: _,
        switches_per_sec: _,
        preemptions_per_sec: _,
        preemptions_by_others_per_sec: _,
        throttled_permille: _,
        run_queue: _,
        pressure,
        lent,
        loans,
    } = cpu;
    let now = or_unknown(reading.cpu_now(), |now: Millicores| now.to_string());
    field(
        "CPU",
        &[
            format!("{now}/{} cores", compact(reading.task.limits.cpu)),
            format!("{} in all", or_unknown(reading.cpu_time(), seconds)),
            format!("throttled {}", or_unknown(reading.throttled(), permille)),
            stalls(*pressure),
        ],
    );
    if *loans > 0 {
        field("Lent", &[format!("{lent} cores now"), format!("{loans} times in all")]);
    }
    field(
        "Switches",
        &[
            format!("{} a second", count(reading.switches())),
            format!("preempted {}", count(reading.preemptions())),
            format!("of those by others {}", count(reading.preemptions_by_others())),
        ],
    );
    field("Run queue", &[delay(reading.run_queue())]);
}

fn memory_fields(reading: &Reading<'_>, memory: &MemoryUsage, field: &mut impl FnMut(&str, &[String])) {
    let MemoryUsage { now, peak, oom_kills, idle_reclaimed, pressure } = memory;
    let mut items = vec![
        used(Some(*now), &reading.task.limits.memory),
        format!("peak {}", or_unknown(*peak, compact)),
        format!("OOM kills {}", count(*oom_kills)),
        stalls(*pressure),
    ];
    items.extend(idle_reclaimed.map(|bytes| format!("{} were idle and are reclaimed", compact(bytes))));
    field("Memory", &items);
}

fn network_fields(reading: &Reading<'_>, network: &NetUsage, field: &mut impl FnMut(&str, &[String])) {
    let NetUsage {
        egress,
        ingress,
        uplink_egress,
        granted,
        streams_held,
        datagrams_held,
        drops,
        retransmits,
        round_trip: _,
    } = network;
    for (name, way, usage) in [("Sent", Way::Out, egress), ("Received", Way::In, ingress)] {
        let NetCount { total, now: _, packets_per_sec: _, congestion_marks } = usage;
        let now = match way {
            Way::Out => used(reading.net_now(way), &reading.task.limits.net_egress),
            Way::In => {
                or_unknown(reading.net_now(way), |now| received(now, &reading.task.limits.net_ingress))
            }
        };
        field(
            name,
            &[
                now,
                format!("{} packets a second", count(reading.packets(way))),
                traffic(reading, total),
                format!("congestion marks {}", count(reading.traffic(*congestion_marks))),
            ],
        );
    }
    field("By uplinks", &[traffic(reading, uplink_egress)]);
    if let Some(granted) = granted {
        field("May send", &[format!("{granted} now")]);
    }
    if *streams_held != Traffic::default() || *datagrams_held != Traffic::default() {
        field(
            "Held back",
            &[
                format!("datagrams {}", traffic(reading, datagrams_held)),
                format!("TCP {}", traffic(reading, streams_held)),
            ],
        );
    }
    field(
        "TCP",
        &[
            format!("round trip {}", delay(reading.round_trip())),
            format!("retransmits {}", count(*retransmits)),
            format!("drops {}", count(*drops)),
        ],
    );
}

fn traffic(reading: &Reading<'_>, Traffic { bytes, packets }: &Traffic) -> String {
    or_unknown(reading.traffic((*bytes, *packets)), |(bytes, packets)| {
        format!("{} in {packets} packets in all", compact(Bytes(bytes)))
    })
}

fn device_fields(reading: &Reading<'_>, usage: &DeviceUsage, field: &mut impl FnMut(&str, &[String])) {
    let DeviceUsage { device, name, stacked, read, write } = usage;
    let direction = |did: &str, count: &IoCount| {
        let IoCount { bytes, operations, bytes_per_sec: _, operations_per_sec: _, latency } = count;
        let now = or_unknown(reading.io_of(count), |now: IoTotal| {
            format!("{}/s in {} operations", compact(Bytes(now.bytes_per_sec)), now.operations_per_sec)
        });
        let total = format!("{} in {operations} in all", compact(Bytes(*bytes)));
        format!("{did} {now}, {}, {total}", delay(reading.delay(*latency)))
    };
    let (title, number) = if name.is_empty() { (device, "gone") } else { (name, device.as_str()) };
    let mut items = vec![number.to_owned()];
    if *stacked {
        items.push("on other devices, which count the same".to_owned());
    }
    items.extend([direction("read", read), direction("wrote", write)]);
    field(&format!("  {title}"), &items);
}

/// Pressure, with its totals.
fn stalls(pressure: Option<Pressure>) -> String {
    let shown = some_and_full(pressure);
    match pressure {
        None => shown,
        Some(Pressure { some_total_us, full_total_us, .. }) => {
            let total = |micros: u64| seconds(micros.saturating_mul(1000));
            format!("{shown}, {} / {} in all", total(some_total_us), total(full_total_us))
        }
    }
}

/// p50 and p99, and of how many.
fn delay(latency: Option<Latency>) -> String {
    let shown = quantiles(latency);
    match latency {
        Some(Latency { count: 1.., .. }) => {
            format!("p50/p99 {shown} of {}", count(latency.map(|latency| latency.count)))
        }
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{fixture, topic::lines},
        *,
    };

    fn text(snapshot: &NodeSnapshot, index: usize) -> String {
        lines(&task(snapshot, &snapshot.tasks[index]), INDENT, 100).join("\n")
    }

    #[test]
    fn every_field_of_a_task() {
        let expected = "\
Task         etl (attempt 2)  uid 1000, gid 100
Limits       cpu 2  cpu_weight 300  memory 512 MiB  net_egress 10 Mbit/s  storage_io max
             storage_io_weight as found  storage_io_latency max
CPU          1.98/2 cores  12.345 s in all  throttled 12.3%
             PSI some 25.10% full 0.00%, 2.510 s / 0.000 s in all
Switches     1200 a second  preempted 30  of those by others 12
Run queue    p50/p99 12µs/1.2ms of 1234
Memory       120MiB/512MiB  peak 256MiB  OOM kills 0
             PSI some 1.20% full 0.04%, 0.120 s / 0.004 s in all
Sent         9.8Mbit/10Mbit  984 packets a second  9.3MiB in 9840 packets in all  congestion marks 9
Received     128kbit  12 packets a second  125KiB in 128 packets in all  congestion marks 0
By uplinks   8.5MiB in 9000 packets in all
Held back    datagrams 1.9MiB in 1400 packets in all  TCP 0B in 0 packets in all
TCP          round trip p50/p99 400µs/2.1ms of 50  retransmits 7  drops 0
IO           PSI some 3.00% full 0.50%, 0.300 s / 0.050 s in all
  nvme0n1    259:0
             read 12MiB/s in 120 operations, p50/p99 90µs/800µs of 120, 12GiB in 120000 in all
             wrote 3MiB/s in 40 operations, p50/p99 300µs/9.5ms of 40, 3GiB in 40000 in all
  8:0        gone  read 0B/s in 0 operations, none, 0B in 0 in all
             wrote 1MiB/s in 10 operations, p50/p99 4ms/25ms of 10, 1GiB in 10000 in all
Alarms       0 of a CPU quota almost used up  0 of memory and IO pressure
Files        read 120ms ago
Measured by  CPU: program  run queue: program  memory: cgroup file  IO: program  IO latency: program
             network: program  pressure: cgroup file
Agent        1.234 s of CPU  45MiB of memory  0 events lost  0 cgroups without an entry
             0 runs of programs missed  0 IO operations not charged";
        assert_eq!(text(&fixture::snapshot(), 0), expected);
    }

    #[test]
    fn where_little_is_measured() {
        let expected = "\
Task         bare (attempt 2)  uid 1000, gid 100
Limits       cpu 2  cpu_weight 300  memory 512 MiB  net_egress 10 Mbit/s  storage_io max
             storage_io_weight as found  storage_io_latency max
CPU          1.98/2 cores  12.345 s in all  throttled -  PSI -
Switches     1200 a second  preempted 30  of those by others 12
Run queue    -
Memory       -
Sent         9.8Mbit/10Mbit  984 packets a second  9.3MiB in 9840 packets in all  congestion marks 9
Received     128kbit  12 packets a second  125KiB in 128 packets in all  congestion marks 0
By uplinks   8.5MiB in 9000 packets in all
Held back    datagrams 1.9MiB in 1400 packets in all  TCP 0B in 0 packets in all
TCP          round trip -  retransmits -  drops -
IO           PSI -
  nvme0n1    259:0  read 12MiB/s in 120 operations, -, 12GiB in 120000 in all
             wrote 3MiB/s in 40 operations, -, 3GiB in 40000 in all
Alarms       0 of a CPU quota almost used up  0 of memory and IO pressure
Files        read 120ms ago
Measured by  CPU: program  run queue: nobody  memory: cgroup file  IO: cgroup file
             IO latency: nobody  network: program  pressure: nobody
Agent        1.234 s of CPU  45MiB of memory  12 events lost  3 cgroups without an entry
             0 runs of programs missed  5 IO operations not charged";
        assert_eq!(text(&fixture::poor_snapshot(), 0), expected);
    }
}
