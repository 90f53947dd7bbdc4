//! A node under load, as one reading: what the tests of the command show in every form, also those inside of it. Of
//! its three tasks, one is held back by its limits, one does nothing, and one has the network.

use shaper_core::{
    limits::{Limit, Limits},
    snapshot::{
        CpuUsage, DeviceUsage, Health, IoCount, Latency, MemoryUsage, NetCount, NetUsage, NodeSnapshot,
        Pressure, Source, Sources, TaskSnapshot, UplinkUsage,
    },
    task::{Owner, Traffic},
    units::{BitsPerSec, Bytes, Millicores, Weight},
};

pub(crate) fn snapshot() -> NodeSnapshot {
    NodeSnapshot {
        node: "n1".into(),
        at: 1_763_967_480_000_000_000,
        interval_ns: 1_000_000_000,
        cpus: 8,
        cpu_now: Millicores(3250),
        memory: Bytes(32 << 30),
        memory_available: Bytes(20 << 30),
        cpu_pressure: Some(pressure(1230, 0)),
        memory_pressure: Some(pressure(0, 0)),
        io_pressure: Some(pressure(412, 98)),
        uplinks: UplinkUsage {
            tasks: Traffic { bytes: 5 << 30, packets: 4_000_000 },
            unmanaged: Traffic { bytes: 40 << 20, packets: 50_000 },
            nobody: Traffic { bytes: 12 << 10, packets: 100 },
        },
        sources: Sources {
            cpu: Source::Program,
            run_queue: Source::Program,
            memory: Source::CgroupFile,
            io: Source::Program,
            io_latency: Source::Program,
            network: Source::Program,
            pressure: Source::CgroupFile,
        },
        health: Health {
            events_lost: 0,
            cgroups_without_entry: 0,
            runs_missed: 0,
            io_uncounted: 0,
            agent_cpu_ns: 1_234_000_000,
            agent_memory: Bytes(45 << 20),
        },
        cpu_pool: None,
        gpus: Vec::new(),
        tasks: vec![etl(), idle(), web()],
    }
}

/// What the same node says of itself where it measures little: no kernel programs for IO, and losses.
pub(crate) fn poor_snapshot() -> NodeSnapshot {
    let rich = snapshot();
    NodeSnapshot {
        sources: Sources {
            run_queue: Source::None,
            io: Source::CgroupFile,
            io_latency: Source::None,
            pressure: Source::None,
            ..rich.sources
        },
        health: Health { events_lost: 12, cgroups_without_entry: 3, io_uncounted: 5, ..rich.health },
        cpu_pressure: None,
        memory_pressure: None,
        io_pressure: None,
        tasks: vec![bare()],
        ..rich
    }
}

fn pressure(some: u32, full: u32) -> Pressure {
    Pressure {
        some_avg10: some,
        full_avg10: full,
        some_total_us: u64::from(some) * 1000,
        full_total_us: u64::from(full) * 1000,
    }
}

fn latency(count: u64, p50_ns: u64, p99_ns: u64) -> Option<Latency> {
    Some(Latency { count, p50_ns, p99_ns })
}

fn io(mib_per_sec: u64, operations_per_sec: u64, latency: Option<Latency>) -> IoCount {
    IoCount {
        bytes: mib_per_sec << 30,
        operations: operations_per_sec * 1000,
        bytes_per_sec: mib_per_sec << 20,
        operations_per_sec,
        latency,
    }
}

fn net(bits: u64) -> NetCount {
    NetCount {
        total: Traffic { bytes: bits, packets: bits / 1000 },
        now: BitsPerSec(bits),
        packets_per_sec: bits / 10_000,
        congestion_marks: bits / 1_000_000,
    }
}

/// Held back by its CPU limit, reads and writes on two devices.
fn etl() -> TaskSnapshot {
    TaskSnapshot {
        task_id: "etl".parse().unwrap(),
        attempt: 2,
        owner: Owner { uid: 1000, gid: 100 },
        workload: None,
        limits: Limits {
            cpu: Limit::At(Millicores(2000)),
            cpu_weight: Weight::new(300),
            memory: Limit::At(Bytes(512 << 20)),
            net_egress: Limit::At(BitsPerSec(10_000_000)),
            storage_io: Limit::Unlimited,
            storage_io_weight: None,
            storage_io_latency: Limit::Unlimited,
            reclaim_idle: None,
            net_egress_guarantee: None,
            net_egress_weight: None,
            net_ingress: Limit::Unlimited,
            gpu_cards: None,
            gpu_memory: Limit::Unlimited,
            gpu_power: Limit::Unlimited,
        },
        cpu: CpuUsage {
            time_ns: 12_345_678_901,
            now: Millicores(1980),
            switches_per_sec: 1200,
            preemptions_per_sec: 30,
            preemptions_by_others_per_sec: 12,
            throttled_permille: Some(123),
            run_queue: latency(1234, 12_300, 1_230_000),
            pressure: Some(pressure(2510, 0)),
            lent: Millicores(0),
            loans: 0,
        },
        memory: Some(MemoryUsage {
            now: Bytes(120 << 20),
            peak: Some(Bytes(256 << 20)),
            oom_kills: Some(0),
            idle_reclaimed: None,
            pressure: Some(pressure(120, 4)),
        }),
        io: vec![
            DeviceUsage {
                device: "259:0".into(),
                name: "nvme0n1".into(),
                stacked: false,
                read: io(12, 120, latency(120, 90_000, 800_000)),
                write: io(3, 40, latency(40, 300_000, 9_500_000)),
            },
            DeviceUsage {
                device: "8:0".into(),
                name: String::new(),
                stacked: false,
                read: io(0, 0, latency(0, 0, 0)),
                write: io(1, 10, latency(10, 4_000_000, 25_000_000)),
            },
        ],
        io_pressure: Some(pressure(300, 50)),
        network: NetUsage {
            egress: net(9_840_000),
            ingress: net(128_000),
            uplink_egress: Traffic { bytes: 9_000_000, packets: 9000 },
            granted: None,
            streams_held: Traffic::default(),
            datagrams_held: Traffic { bytes: 2_000_000, packets: 1400 },
            drops: Some(0),
            retransmits: Some(7),
            round_trip: latency(50, 400_000, 2_100_000),
        },
        gpu_memory: Vec::new(),
        preempted_by: None,
        quota_warnings: 0,
        pressure_alarms: 0,
        files_age_ns: 120_000_000,
    }
}

/// Nothing happens in it.
fn idle() -> TaskSnapshot {
    TaskSnapshot {
        task_id: "idle".parse().unwrap(),
        attempt: 1,
        owner: Owner { uid: 0, gid: 0 },
        workload: None,
        limits: Limits::default(),
        cpu: CpuUsage {
            throttled_permille: Some(0),
            run_queue: latency(0, 0, 0),
            pressure: Some(pressure(0, 0)),
            ..CpuUsage::default()
        },
        memory: Some(MemoryUsage {
            now: Bytes(1 << 20),
            peak: Some(Bytes(2 << 20)),
            oom_kills: Some(0),
            idle_reclaimed: None,
            pressure: Some(pressure(0, 0)),
        }),
        io: vec![],
        io_pressure: Some(pressure(0, 0)),
        network: NetUsage {
            drops: Some(0),
            retransmits: Some(0),
            round_trip: latency(0, 0, 0),
            ..NetUsage::default()
        },
        gpu_memory: Vec::new(),
        preempted_by: None,
        quota_warnings: 0,
        pressure_alarms: 0,
        files_age_ns: 9_500_000_000,
    }
}

/// Uses less CPU than `etl`, and more of memory and network.
fn web() -> TaskSnapshot {
    let like = idle();
    TaskSnapshot {
        task_id: "web".parse().unwrap(),
        cpu: CpuUsage {
            now: Millicores(250),
            preemptions_by_others_per_sec: 3,
            run_queue: latency(900, 5_000, 42_000_000),
            ..like.cpu
        },
        memory: like.memory.map(|memory| MemoryUsage { now: Bytes(3 << 30), ..memory }),
        network: NetUsage { egress: net(250_000_000), ingress: net(30_000_000), ..like.network },
        ..like
    }
}

/// Nobody can say much of it.
fn bare() -> TaskSnapshot {
    let like = etl();
    TaskSnapshot {
        task_id: "bare".parse().unwrap(),
        cpu: CpuUsage { throttled_permille: None, run_queue: None, pressure: None, ..like.cpu },
        memory: None,
        io: vec![DeviceUsage {
            device: "259:0".into(),
            name: "nvme0n1".into(),
            stacked: false,
            read: io(12, 120, None),
            write: io(3, 40, None),
        }],
        io_pressure: None,
        network: NetUsage { drops: None, retransmits: None, round_trip: None, ..like.network },
        ..like
    }
}
