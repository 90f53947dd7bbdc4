//! Snapshots.

use shaper_core::{
    id::TaskId,
    snapshot::{
        CpuPool, CpuUsage, DeviceUsage, Health, IoCount, Latency, MemoryUsage, NetCount, NetUsage,
        NodeSnapshot, Pressure, Source, Sources, TaskSnapshot, UplinkUsage,
    },
    units::{BitsPerSec, Bytes, Millicores},
};

use super::{WireError, owner, traffic};
use crate::v1;

fn to_source(source: Source) -> i32 {
    match source {
        Source::Program => v1::Source::Program,
        Source::CgroupFile => v1::Source::CgroupFile,
        Source::None => v1::Source::None,
    }
    .into()
}

/// An unknown source is a later agent's: nobody whom this program knows.
fn source(wire: i32) -> Source {
    match v1::Source::try_from(wire) {
        Ok(v1::Source::Program) => Source::Program,
        Ok(v1::Source::CgroupFile) => Source::CgroupFile,
        Ok(v1::Source::None | v1::Source::Unspecified) | Err(_) => Source::None,
    }
}

impl From<Sources> for v1::Sources {
    fn from(sources: Sources) -> v1::Sources {
        let Sources { cpu, run_queue, memory, io, io_latency, network, pressure } = sources;
        v1::Sources {
            cpu: to_source(cpu),
            run_queue: to_source(run_queue),
            memory: to_source(memory),
            io: to_source(io),
            io_latency: to_source(io_latency),
            network: to_source(network),
            pressure: to_source(pressure),
        }
    }
}

impl From<v1::Sources> for Sources {
    fn from(wire: v1::Sources) -> Sources {
        let v1::Sources { cpu, run_queue, memory, io, io_latency, network, pressure } = wire;
        Sources {
            cpu: source(cpu),
            run_queue: source(run_queue),
            memory: source(memory),
            io: source(io),
            io_latency: source(io_latency),
            network: source(network),
            pressure: source(pressure),
        }
    }
}

/// Two structs of the same numbers.
macro_rules! same {
    ($($name:ident { $($field:ident),* })*) => {$(
        impl From<$name> for v1::$name {
            fn from(domain: $name) -> v1::$name {
                let $name { $($field),* } = domain;
                v1::$name { $($field),* }
            }
        }

        impl From<v1::$name> for $name {
            fn from(wire: v1::$name) -> $name {
                let v1::$name { $($field),* } = wire;
                $name { $($field),* }
            }
        }
    )*};
}

same! {
    Latency { count, p50_ns, p99_ns }
    Pressure { some_avg10, full_avg10, some_total_us, full_total_us }
}

impl From<CpuUsage> for v1::CpuUsage {
    fn from(usage: CpuUsage) -> v1::CpuUsage {
        let CpuUsage {
            time_ns,
            now,
            switches_per_sec,
            preemptions_per_sec,
            preemptions_by_others_per_sec,
            throttled_permille,
            run_queue,
            pressure,
            lent,
            loans,
        } = usage;
        v1::CpuUsage {
            time_ns,
            now_millicores: now.0,
            switches_per_sec,
            preemptions_per_sec,
            preemptions_by_others_per_sec,
            throttled_permille,
            run_queue: run_queue.map(Into::into),
            pressure: pressure.map(Into::into),
            lent_millicores: lent.0,
            loans,
        }
    }
}

impl From<v1::CpuUsage> for CpuUsage {
    fn from(wire: v1::CpuUsage) -> CpuUsage {
        CpuUsage {
            time_ns: wire.time_ns,
            now: Millicores(wire.now_millicores),
            switches_per_sec: wire.switches_per_sec,
            preemptions_per_sec: wire.preemptions_per_sec,
            preemptions_by_others_per_sec: wire.preemptions_by_others_per_sec,
            throttled_permille: wire.throttled_permille,
            run_queue: wire.run_queue.map(Into::into),
            pressure: wire.pressure.map(Into::into),
            lent: Millicores(wire.lent_millicores),
            loans: wire.loans,
        }
    }
}

impl From<MemoryUsage> for v1::MemoryUsage {
    fn from(usage: MemoryUsage) -> v1::MemoryUsage {
        let MemoryUsage { now, peak, oom_kills, idle_reclaimed, pressure } = usage;
        v1::MemoryUsage {
            now_bytes: now.0,
            peak_bytes: peak.map(|bytes| bytes.0),
            oom_kills,
            idle_reclaimed_bytes: idle_reclaimed.map(|bytes| bytes.0),
            pressure: pressure.map(Into::into),
        }
    }
}

impl From<v1::MemoryUsage> for MemoryUsage {
    fn from(wire: v1::MemoryUsage) -> MemoryUsage {
        let v1::MemoryUsage { now_bytes, peak_bytes, oom_kills, idle_reclaimed_bytes, pressure } = wire;
        MemoryUsage {
            now: Bytes(now_bytes),
            peak: peak_bytes.map(Bytes),
            oom_kills,
            idle_reclaimed: idle_reclaimed_bytes.map(Bytes),
            pressure: pressure.map(Into::into),
        }
    }
}

impl From<IoCount> for v1::IoCount {
    fn from(count: IoCount) -> v1::IoCount {
        let IoCount { bytes, operations, bytes_per_sec, operations_per_sec, latency } = count;
        v1::IoCount { bytes, operations, bytes_per_sec, operations_per_sec, latency: latency.map(Into::into) }
    }
}

impl From<v1::IoCount> for IoCount {
    fn from(wire: v1::IoCount) -> IoCount {
        let v1::IoCount { bytes, operations, bytes_per_sec, operations_per_sec, latency } = wire;
        IoCount { bytes, operations, bytes_per_sec, operations_per_sec, latency: latency.map(Into::into) }
    }
}

impl From<DeviceUsage> for v1::DeviceUsage {
    fn from(usage: DeviceUsage) -> v1::DeviceUsage {
        let DeviceUsage { device, name, stacked, read, write } = usage;
        v1::DeviceUsage { device, name, stacked, read: Some(read.into()), write: Some(write.into()) }
    }
}

impl From<v1::DeviceUsage> for DeviceUsage {
    fn from(wire: v1::DeviceUsage) -> DeviceUsage {
        let v1::DeviceUsage { device, name, stacked, read, write } = wire;
        DeviceUsage {
            device,
            name,
            stacked,
            read: read.map(Into::into).unwrap_or_default(),
            write: write.map(Into::into).unwrap_or_default(),
        }
    }
}

impl From<NetCount> for v1::NetCount {
    fn from(count: NetCount) -> v1::NetCount {
        let NetCount { total, now, packets_per_sec, congestion_marks } = count;
        v1::NetCount { total: Some(total.into()), now_bps: now.0, packets_per_sec, congestion_marks }
    }
}

impl From<v1::NetCount> for NetCount {
    fn from(wire: v1::NetCount) -> NetCount {
        let v1::NetCount { total, now_bps, packets_per_sec, congestion_marks } = wire;
        NetCount { total: traffic(total), now: BitsPerSec(now_bps), packets_per_sec, congestion_marks }
    }
}

impl From<NetUsage> for v1::NetUsage {
    fn from(usage: NetUsage) -> v1::NetUsage {
        let NetUsage {
            egress,
            ingress,
            uplink_egress,
            granted,
            streams_held,
            datagrams_held,
            drops,
            retransmits,
            round_trip,
        } = usage;
        v1::NetUsage {
            egress: Some(egress.into()),
            ingress: Some(ingress.into()),
            uplink_egress: Some(uplink_egress.into()),
            granted_bps: granted.map(|granted| granted.0),
            streams_held: Some(streams_held.into()),
            datagrams_held: Some(datagrams_held.into()),
            drops,
            retransmits,
            round_trip: round_trip.map(Into::into),
        }
    }
}

impl From<v1::NetUsage> for NetUsage {
    fn from(wire: v1::NetUsage) -> NetUsage {
        let v1::NetUsage {
            egress,
            ingress,
            uplink_egress,
            granted_bps,
            streams_held,
            datagrams_held,
            drops,
            retransmits,
            round_trip,
        } = wire;
        NetUsage {
            egress: egress.map(Into::into).unwrap_or_default(),
            ingress: ingress.map(Into::into).unwrap_or_default(),
            uplink_egress: traffic(uplink_egress),
            granted: granted_bps.map(BitsPerSec),
            streams_held: traffic(streams_held),
            datagrams_held: traffic(datagrams_held),
            drops,
            retransmits,
            round_trip: round_trip.map(Into::into),
        }
    }
}

impl From<TaskSnapshot> for v1::TaskSnapshot {
    fn from(task: TaskSnapshot) -> v1::TaskSnapshot {
        let TaskSnapshot {
            task_id,
            attempt,
            owner,
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
        v1::TaskSnapshot {
            task_id: task_id.into(),
            attempt,
            owner: Some(owner.into()),
            workload: workload.map(Into::into),
            limits: Some(limits.into()),
            cpu: Some(cpu.into()),
            memory: memory.map(Into::into),
            io: io.into_iter().map(Into::into).collect(),
            io_pressure: io_pressure.map(Into::into),
            network: Some(network.into()),
            gpu_memory: gpu_memory.into_iter().map(Into::into).collect(),
            preempted_by,
            quota_warnings,
            pressure_alarms,
            files_age_ns,
        }
    }
}

impl TryFrom<v1::TaskSnapshot> for TaskSnapshot {
    type Error = WireError;

    fn try_from(wire: v1::TaskSnapshot) -> Result<TaskSnapshot, WireError> {
        Ok(TaskSnapshot {
            task_id: TaskId::try_from(wire.task_id)?,
            attempt: wire.attempt,
            owner: owner("tasks.owner", wire.owner)?,
            workload: wire.workload.map(TryInto::try_into).transpose()?,
            limits: wire.limits.ok_or(WireError::Missing("tasks.limits"))?.try_into()?,
            cpu: wire.cpu.ok_or(WireError::Missing("tasks.cpu"))?.into(),
            memory: wire.memory.map(Into::into),
            io: wire.io.into_iter().map(Into::into).collect(),
            io_pressure: wire.io_pressure.map(Into::into),
            network: wire.network.ok_or(WireError::Missing("tasks.network"))?.into(),
            gpu_memory: wire.gpu_memory.into_iter().map(Into::into).collect(),
            preempted_by: wire.preempted_by,
            quota_warnings: wire.quota_warnings,
            pressure_alarms: wire.pressure_alarms,
            files_age_ns: wire.files_age_ns,
        })
    }
}

impl From<UplinkUsage> for v1::UplinkUsage {
    fn from(usage: UplinkUsage) -> v1::UplinkUsage {
        let UplinkUsage { tasks, unmanaged, nobody } = usage;
        v1::UplinkUsage {
            tasks: Some(tasks.into()),
            unmanaged: Some(unmanaged.into()),
            nobody: Some(nobody.into()),
        }
    }
}

impl From<v1::UplinkUsage> for UplinkUsage {
    fn from(wire: v1::UplinkUsage) -> UplinkUsage {
        let v1::UplinkUsage { tasks, unmanaged, nobody } = wire;
        UplinkUsage { tasks: traffic(tasks), unmanaged: traffic(unmanaged), nobody: traffic(nobody) }
    }
}

impl From<Health> for v1::Health {
    fn from(health: Health) -> v1::Health {
        let Health {
            events_lost,
            cgroups_without_entry,
            runs_missed,
            io_uncounted,
            agent_cpu_ns,
            agent_memory,
        } = health;
        v1::Health {
            events_lost,
            cgroups_without_entry,
            runs_missed,
            io_uncounted,
            agent_cpu_ns,
            agent_memory_bytes: agent_memory.0,
        }
    }
}

impl From<v1::Health> for Health {
    fn from(wire: v1::Health) -> Health {
        let v1::Health {
            events_lost,
            cgroups_without_entry,
            runs_missed,
            io_uncounted,
            agent_cpu_ns,
            agent_memory_bytes,
        } = wire;
        Health {
            events_lost,
            cgroups_without_entry,
            runs_missed,
            io_uncounted,
            agent_cpu_ns,
            agent_memory: Bytes(agent_memory_bytes),
        }
    }
}

impl From<CpuPool> for v1::CpuPool {
    fn from(pool: CpuPool) -> v1::CpuPool {
        let CpuPool { size, lent, has_warden, latency } = pool;
        v1::CpuPool {
            size_millicores: size.0,
            lent_millicores: lent.0,
            has_warden,
            latency: Some(latency.into()),
        }
    }
}

impl TryFrom<v1::CpuPool> for CpuPool {
    type Error = WireError;

    fn try_from(wire: v1::CpuPool) -> Result<CpuPool, WireError> {
        Ok(CpuPool {
            size: Millicores(wire.size_millicores),
            lent: Millicores(wire.lent_millicores),
            has_warden: wire.has_warden,
            latency: wire.latency.ok_or(WireError::Missing("cpu_pool.latency"))?.into(),
        })
    }
}

impl From<NodeSnapshot> for v1::NodeSnapshot {
    fn from(snapshot: NodeSnapshot) -> v1::NodeSnapshot {
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
            health,
            cpu_pool,
            gpus,
            tasks,
        } = snapshot;
        v1::NodeSnapshot {
            node,
            unix_nanos: at,
            interval_ns,
            cpus,
            cpu_now_millicores: cpu_now.0,
            memory_bytes: memory.0,
            memory_available_bytes: memory_available.0,
            cpu_pressure: cpu_pressure.map(Into::into),
            memory_pressure: memory_pressure.map(Into::into),
            io_pressure: io_pressure.map(Into::into),
            uplinks: Some(uplinks.into()),
            sources: Some(sources.into()),
            health: Some(health.into()),
            cpu_pool: cpu_pool.map(Into::into),
            gpus: gpus.into_iter().map(Into::into).collect(),
            tasks: tasks.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::NodeSnapshot> for NodeSnapshot {
    type Error = WireError;

    fn try_from(wire: v1::NodeSnapshot) -> Result<NodeSnapshot, WireError> {
        Ok(NodeSnapshot {
            node: wire.node,
            at: wire.unix_nanos,
            interval_ns: wire.interval_ns,
            cpus: wire.cpus,
            cpu_now: Millicores(wire.cpu_now_millicores),
            memory: Bytes(wire.memory_bytes),
            memory_available: Bytes(wire.memory_available_bytes),
            cpu_pressure: wire.cpu_pressure.map(Into::into),
            memory_pressure: wire.memory_pressure.map(Into::into),
            io_pressure: wire.io_pressure.map(Into::into),
            uplinks: wire.uplinks.ok_or(WireError::Missing("uplinks"))?.into(),
            sources: wire.sources.ok_or(WireError::Missing("sources"))?.into(),
            health: wire.health.ok_or(WireError::Missing("health"))?.into(),
            cpu_pool: wire.cpu_pool.map(TryInto::try_into).transpose()?,
            gpus: wire.gpus.into_iter().map(TryInto::try_into).collect::<Result<_, WireError>>()?,
            tasks: wire.tasks.into_iter().map(TryInto::try_into).collect::<Result<_, WireError>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::{
        gpu::{Card, CardMemory, CardUsage, CharDevice, Rung},
        limits::Limits,
        task::{Owner, Traffic, Workload},
    };

    use super::*;

    fn snapshot() -> NodeSnapshot {
        let latency = Latency { count: 3, p50_ns: 4, p99_ns: 5 };
        let pressure = Pressure { some_avg10: 6, full_avg10: 7, some_total_us: 8, full_total_us: 9 };
        let traffic = Traffic { bytes: 10, packets: 11 };
        let count = IoCount {
            bytes: 12,
            operations: 13,
            bytes_per_sec: 14,
            operations_per_sec: 15,
            latency: Some(latency),
        };
        let net = NetCount { total: traffic, now: BitsPerSec(16), packets_per_sec: 17, congestion_marks: 18 };
        NodeSnapshot {
            node: "n1".into(),
            at: 1,
            interval_ns: 2,
            cpus: 3,
            cpu_now: Millicores(4),
            memory: Bytes(5),
            memory_available: Bytes(6),
            cpu_pressure: Some(pressure),
            memory_pressure: None,
            io_pressure: Some(Pressure::default()),
            uplinks: UplinkUsage { tasks: traffic, unmanaged: Traffic::default(), nobody: traffic },
            sources: Sources {
                cpu: Source::Program,
                run_queue: Source::Program,
                memory: Source::CgroupFile,
                io: Source::None,
                io_latency: Source::None,
                network: Source::Program,
                pressure: Source::CgroupFile,
            },
            health: Health {
                events_lost: 1,
                cgroups_without_entry: 2,
                runs_missed: 9,
                io_uncounted: 3,
                agent_cpu_ns: 4,
                agent_memory: Bytes(5),
            },
            cpu_pool: Some(CpuPool { size: Millicores(1), lent: Millicores(2), has_warden: true, latency }),
            gpus: vec![CardUsage {
                card: Card {
                    number: 1,
                    id: "GPU-1".into(),
                    model: "A card".into(),
                    device: CharDevice { major: 195, minor: 1 },
                },
                memory: Some(Bytes(8)),
                memory_used: Some(Bytes(7)),
                busy_percent: Some(6),
                temperature_celsius: None,
                trouble: Some("lost".into()),
                errors: 3,
            }],
            tasks: vec![TaskSnapshot {
                task_id: "a".parse().unwrap(),
                attempt: 1,
                owner: Owner { uid: 1, gid: 2 },
                workload: Some(Workload::new("a", "", Default::default()).unwrap()),
                limits: Limits::default(),
                cpu: CpuUsage {
                    time_ns: 1,
                    now: Millicores(2),
                    switches_per_sec: 3,
                    preemptions_per_sec: 4,
                    preemptions_by_others_per_sec: 5,
                    throttled_permille: Some(0),
                    run_queue: Some(latency),
                    pressure: Some(pressure),
                    lent: Millicores(6),
                    loans: 7,
                },
                memory: Some(MemoryUsage {
                    now: Bytes(1),
                    peak: None,
                    oom_kills: Some(0),
                    idle_reclaimed: Some(Bytes(4096)),
                    pressure: Some(pressure),
                }),
                io: vec![DeviceUsage {
                    device: "8:0".into(),
                    name: "sda".into(),
                    stacked: true,
                    read: count,
                    write: count,
                }],
                io_pressure: None,
                network: NetUsage {
                    egress: net,
                    ingress: net,
                    uplink_egress: traffic,
                    granted: Some(BitsPerSec(7_000_000)),
                    streams_held: traffic,
                    datagrams_held: traffic,
                    drops: Some(1),
                    retransmits: None,
                    round_trip: Some(latency),
                },
                gpu_memory: vec![CardMemory {
                    number: 1,
                    used: Bytes(7),
                    processes: 2,
                    limit: shaper_core::limits::Limit::At(Bytes(9)),
                    enforced_by: Some(Rung::NvmlCgroup),
                }],
                preempted_by: Some("other".into()),
                quota_warnings: 5,
                pressure_alarms: 6,
                files_age_ns: 7,
            }],
        }
    }

    #[test]
    fn a_snapshot_survives_the_wire() {
        let snapshot = snapshot();
        assert_eq!(NodeSnapshot::try_from(v1::NodeSnapshot::from(snapshot.clone())), Ok(snapshot));
    }

    #[test]
    fn what_must_be_there_is_asked_for() {
        let wire = v1::NodeSnapshot { health: None, ..snapshot().into() };
        assert_eq!(NodeSnapshot::try_from(wire), Err(WireError::Missing("health")));
    }
}
