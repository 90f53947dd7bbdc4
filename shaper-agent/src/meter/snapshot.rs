//! Snapshots: two stocks, as rates and quantiles.

use std::{fs, path::PathBuf};

use shaper_common::{
    abi::{IO_READ, IO_WRITE, IoKey, IoStat, SLOT_NOBODY},
    hist::{Histogram, IO_SHIFT, QUEUE_SHIFT, RTT_SHIFT},
};
use shaper_core::{
    id::BlockDevice,
    snapshot::{
        CpuUsage, DeviceUsage, Health, IoCount, Latency, MemoryUsage, NetCount, NetUsage, NodeSnapshot,
        Source, Sources, TaskSnapshot, UplinkUsage,
    },
    task::{Traffic, UnixNanos},
    units::{BitsPerSec, Bytes, Millicores},
};

use super::{Device, Meter, Metered};
use crate::{
    kernel::{
        bpf::{Bpf, Counters, Measure},
        disks,
        mapped::monotonic_ns,
    },
    record::Record,
};

/// Growth over an interval, a second.
#[derive(Clone, Copy)]
struct Per(u64);

impl Per {
    fn second(self, now: u64, before: u64, scale: u64) -> u64 {
        let grown = u128::from(now.saturating_sub(before)) * u128::from(scale) * 1_000_000_000;
        let rate = grown.checked_div(u128::from(self.0)).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

fn latency(now: &Histogram, before: &Histogram, shift: u32) -> Latency {
    let since = now.since(before);
    Latency {
        count: since.total(),
        p50_ns: since.quantile_ns(500, shift),
        p99_ns: since.quantile_ns(990, shift),
    }
}

/// The latency of block IO; none where operations were done and not one was timed, as while the device's `queue/iostats`
/// is 0.
fn io_latency(now: &IoStat, before: &IoStat) -> Option<Latency> {
    let latency = latency(&now.latency, &before.latency, IO_SHIFT);
    (latency.count > 0 || now.untimed == before.untimed).then_some(latency)
}

impl Meter {
    /// The node as of the last stock, without tasks.
    pub fn node(&self, node: &str, bpf: Option<&Bpf>, at: UnixNanos) -> NodeSnapshot {
        let machine = self.machine.unwrap_or_default();
        let before = self.machine_before;
        let interval_ns = before.map_or(0, |before| machine.at_ns.saturating_sub(before.at_ns));
        let busy_before = before.map_or(machine.busy_ns, |before| before.busy_ns);
        let control = bpf.map(Bpf::control).unwrap_or_default();
        let [cpu_pressure, memory_pressure, io_pressure] = machine.pressure;
        let nothing = Traffic::default();
        NodeSnapshot {
            node: node.into(),
            at,
            interval_ns,
            cpus: machine.cpus,
            // CPU time a second, in thousandths.
            cpu_now: Millicores(Per(interval_ns).second(machine.busy_ns, busy_before, 1) / 1_000_000),
            memory: Bytes(machine.memory),
            memory_available: Bytes(machine.memory_available),
            cpu_pressure,
            memory_pressure,
            io_pressure,
            uplinks: bpf.map_or(
                UplinkUsage { tasks: nothing, unmanaged: nothing, nobody: nothing },
                Bpf::uplink_usage,
            ),
            sources: self.sources(bpf),
            health: Health {
                events_lost: control.events_lost,
                cgroups_without_entry: control.without_entry,
                runs_missed: bpf.map_or(0, Bpf::runs_missed),
                io_uncounted: control.io_uncounted,
                agent_cpu_ns: machine.agent_cpu_ns,
                agent_memory: Bytes(machine.agent_memory),
            },
            cpu_pool: None,
            gpus: Vec::new(),
            tasks: Vec::new(),
        }
    }

    /// Who measures what here.
    fn sources(&self, bpf: Option<&Bpf>) -> Sources {
        let program = |there: bool| if there { Source::Program } else { Source::None };
        let file = |there: bool| if there { Source::CgroupFile } else { Source::None };
        let any = |has: fn(&Metered) -> bool| self.tasks.values().any(has);
        let counts_io = bpf.is_some_and(Bpf::counts_io);
        Sources {
            cpu: match bpf {
                Some(bpf) if bpf.trusts(Measure::Cpu) => Source::Program,
                other => file(other.is_some()),
            },
            run_queue: program(bpf.is_some_and(|bpf| bpf.trusts(Measure::RunQueue))),
            memory: file(any(|task| task.reading.memory.is_some())),
            io: if counts_io { Source::Program } else { file(any(|task| task.reading.io.is_some())) },
            io_latency: program(counts_io),
            network: program(bpf.is_some()),
            pressure: file(any(|task| task.reading.cpu_pressure.is_some())),
        }
    }

    /// A task as of the last stock; `None` if it is not measured.
    pub fn task(
        &mut self,
        slot: u32,
        bpf: &Bpf,
        record: &Record,
        name_of: impl FnOnce(u32) -> String,
    ) -> Option<TaskSnapshot> {
        let io = self.devices(slot, bpf);
        let task = self.tasks.get(&slot)?;
        let before = task.before.unwrap_or(task.stock);
        let (now, then) = (&task.stock.counters, &before.counters);
        let per = Per(now.at_ns.saturating_sub(then.at_ns));
        let reading = &task.reading;
        let throttled_permille = reading.throttled_ns.map(|now| {
            let permille = task.throttled_before.map_or(0, |(at, before)| {
                Per(task.read_at_ns.saturating_sub(at)).second(now, before, 1) / 1_000_000
            });
            u32::try_from(permille).unwrap_or(u32::MAX)
        });
        Some(TaskSnapshot {
            task_id: record.execution.task.clone(),
            attempt: record.execution.attempt,
            owner: record.owner,
            workload: record.workload.clone(),
            limits: record.limits,
            cpu: CpuUsage {
                time_ns: now.cpu_ns,
                now: Millicores(per.second(now.cpu_ns, then.cpu_ns, 1) / 1_000_000),
                switches_per_sec: per.second(now.switches, then.switches, 1),
                preemptions_per_sec: per.second(now.preemptions, then.preemptions, 1),
                preemptions_by_others_per_sec: per.second(
                    now.preemptions_by_others,
                    then.preemptions_by_others,
                    1,
                ),
                throttled_permille,
                run_queue: bpf.trusts(Measure::RunQueue).then(|| {
                    latency(&task.stock.histograms.run_queue, &before.histograms.run_queue, QUEUE_SHIFT)
                }),
                pressure: reading.cpu_pressure,
                lent: Millicores(0),
                loans: 0,
            },
            memory: reading.memory.map(|now| MemoryUsage {
                now,
                peak: reading.memory_peak,
                oom_kills: reading.oom_kills,
                idle_reclaimed: None,
                pressure: reading.memory_pressure,
            }),
            io,
            io_pressure: reading.io_pressure,
            network: NetUsage {
                drops: bpf.counts_drops().then_some(now.drops),
                ..network(now, then, per, task, &before.histograms.round_trip)
            },
            gpu_memory: Vec::new(),
            preempted_by: (now.preempted_by != SLOT_NOBODY).then(|| name_of(now.preempted_by)),
            quota_warnings: task.quota_warnings,
            pressure_alarms: task.alarms,
            files_age_ns: monotonic_ns().saturating_sub(task.read_at_ns),
        })
    }

    /// Block IO of a task by device.
    fn devices(&mut self, slot: u32, bpf: &Bpf) -> Vec<DeviceUsage> {
        let Some(task) = self.tasks.get(&slot) else { return Vec::new() };
        let counters = (&task.stock.counters, task.before.as_ref().map(|before| &before.counters));
        let per = Per(counters.1.map_or(0, |before| counters.0.at_ns.saturating_sub(before.at_ns)));
        let mut found: Vec<(BlockDevice, IoCount, IoCount)> = Vec::new();
        if bpf.counts_io() {
            let of_slot = IoKey { slot, ..IoKey::default() }..IoKey { slot: slot + 1, ..IoKey::default() };
            for (key, now) in self.io.range(of_slot) {
                let nothing = IoStat::default();
                let before = self.io_before.get(key).unwrap_or(&nothing);
                let count = IoCount {
                    bytes: now.bytes,
                    operations: now.operations,
                    bytes_per_sec: per.second(now.bytes, before.bytes, 1),
                    operations_per_sec: per.second(now.operations, before.operations, 1),
                    latency: io_latency(now, before),
                };
                let of = BlockDevice::from_kernel(key.device);
                if found.last().is_none_or(|(device, ..)| *device != of) {
                    found.push((of, IoCount::default(), IoCount::default()));
                }
                let Some((_, read, write)) = found.last_mut() else { continue };
                match key.direction {
                    IO_READ => *read = count,
                    IO_WRITE => *write = count,
                    _ => {}
                }
            }
        } else {
            let count = |bytes, operations| IoCount { bytes, operations, ..IoCount::default() };
            for (device, io) in task.reading.io.iter().flatten() {
                found.push((*device, count(io.read, io.reads), count(io.written, io.writes)));
            }
        }
        let usage = |(number, read, write): (BlockDevice, IoCount, IoCount)| {
            let device = self.devices.entry(number).or_insert_with(|| Device::of(number));
            DeviceUsage {
                device: number.to_string(),
                name: device.name.clone(),
                stacked: device.stacked,
                read,
                write,
            }
        };
        found.into_iter().map(usage).collect()
    }
}

fn network(
    now: &Counters,
    then: &Counters,
    per: Per,
    task: &Metered,
    round_trip_before: &Histogram,
) -> NetUsage {
    let count = |now: Traffic, then: Traffic, congestion_marks| NetCount {
        total: now,
        now: BitsPerSec(per.second(now.bytes, then.bytes, 8)),
        packets_per_sec: per.second(now.packets, then.packets, 1),
        congestion_marks,
    };
    NetUsage {
        egress: count(now.egress, then.egress, now.egress_marks),
        ingress: count(now.ingress, then.ingress, now.ingress_marks),
        uplink_egress: now.uplink_egress,
        granted: now.granted.map(|bytes| BitsPerSec(bytes * 8)),
        streams_held: now.streams_held,
        datagrams_held: now.datagrams_held,
        drops: None,
        retransmits: Some(now.retransmits),
        round_trip: Some(latency(&task.stock.histograms.round_trip, round_trip_before, RTT_SHIFT)),
    }
}

impl Device {
    /// What sysfs says of it: nothing once it is gone.
    fn of(number: BlockDevice) -> Device {
        let path = PathBuf::from(format!("/sys/dev/block/{number}"));
        let target = fs::read_link(&path).unwrap_or_default();
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Device { name, stacked: disks::is_stacked(&path) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_interval_and_none_without_one() {
        assert_eq!(Per(500_000_000).second(30, 10, 8), 320);
        assert_eq!(Per(0).second(30, 10, 8), 0);
        assert_eq!(Per(1).second(u64::MAX, 0, 8), u64::MAX);
        // A count that went back is not a rate.
        assert_eq!(Per(1_000_000_000).second(10, 30, 1), 0);
    }

    #[test]
    fn what_was_not_timed_has_no_latency() {
        let timed = |count, untimed| {
            let mut stat = IoStat { untimed, ..IoStat::default() };
            stat.latency.counts[5] = count;
            stat
        };
        let count = |now, before| io_latency(&now, &before).map(|latency| latency.count);
        assert_eq!(count(timed(7, 0), timed(3, 0)), Some(4));
        // Nothing was done: that is known.
        assert_eq!(count(timed(3, 9), timed(3, 9)), Some(0));
        assert_eq!(count(timed(3, 9), timed(3, 1)), None);
        assert_eq!(count(timed(4, 9), timed(3, 1)), Some(1));
    }
}
