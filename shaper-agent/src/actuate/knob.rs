//! What can be turned, what it can hold, and what may be wished of it.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::CardSet,
    id::BlockDevice,
    limits::{Limit, LimitsChange},
    units::{BitsPerSec, Bytes, BytesPerSec, Iops, Micros, Millicores, Milliwatts, Weight},
};

use crate::{
    gpu::MemoryLimit,
    kernel::{
        cgroup::{block::IoLimits, cpu::Bandwidth},
        v1::Shares,
    },
};

/// What can be turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Knob {
    /// CPU time per time.
    Cpu,
    /// Share of a contended CPU, or of an idle one only.
    CpuWeight,
    /// Memory.
    Memory,
    /// Memory, by slowing down.
    MemoryHigh,
    /// Memory that is left alone.
    MemoryLow,
    /// Sent on the wire.
    NetEgress,
    /// Sent in any case, where the network is divided.
    NetGuarantee,
    /// Share of the rest of it.
    NetWeight,
    /// Received on the wire.
    NetIngress,
    /// GPU cards that may be opened.
    GpuCards,
    /// Memory of the GPU card of this number.
    GpuMemory(u32),
    /// Power of the GPU card of this number.
    GpuPower(u32),
    /// Whether its processes stand still.
    Frozen,
    /// Read from and written to a block device.
    IoMax(BlockDevice),
    /// Share of contended block devices, by io.cost.
    IoWeight,
    /// The same where the device's scheduler is BFQ.
    BfqWeight,
}

const IO_MAX: &str = "io_max:";
const GPU_MEMORY: &str = "gpu_memory:";
const GPU_POWER: &str = "gpu_power:";

impl Knob {
    /// Those that a task has one of.
    pub(super) const PLAIN: [Knob; 13] = [
        Knob::Cpu,
        Knob::CpuWeight,
        Knob::Memory,
        Knob::MemoryHigh,
        Knob::MemoryLow,
        Knob::NetEgress,
        Knob::NetGuarantee,
        Knob::NetWeight,
        Knob::NetIngress,
        Knob::GpuCards,
        Knob::Frozen,
        Knob::IoWeight,
        Knob::BfqWeight,
    ];

    /// Whether writing to a cgroup's file of that name may turn it.
    pub fn is_in(self, file: &str) -> bool {
        match self {
            Knob::Cpu => file.starts_with("cpu.max") || file.starts_with("cpu.cfs_"),
            Knob::CpuWeight => ["cpu.weight", "cpu.weight.nice", "cpu.idle", "cpu.shares"].contains(&file),
            Knob::Memory => ["memory.max", "memory.limit_in_bytes"].contains(&file),
            Knob::MemoryHigh => file == "memory.high",
            Knob::MemoryLow => file == "memory.low",
            Knob::NetEgress
            | Knob::NetGuarantee
            | Knob::NetWeight
            | Knob::NetIngress
            | Knob::GpuCards
            | Knob::GpuPower(_) => false,
            Knob::GpuMemory(_) => file == "dmem.max",
            Knob::Frozen => file == "cgroup.freeze",
            Knob::IoMax(_) => file == "io.max" || file.starts_with("blkio.throttle."),
            Knob::IoWeight => file == "io.weight",
            Knob::BfqWeight => file == "io.bfq.weight",
        }
    }

    /// Whether writing to a cgroup's file of that name may turn any.
    pub fn any_is_in(file: &str) -> bool {
        let of_devices = [Knob::IoMax(BlockDevice { major: 0, minor: 0 }), Knob::GpuMemory(0)];
        of_devices.iter().any(|knob| knob.is_in(file)) || Knob::PLAIN.iter().any(|knob| knob.is_in(file))
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Knob::Cpu => "cpu",
            Knob::CpuWeight => "cpu_weight",
            Knob::Memory => "memory",
            Knob::MemoryHigh => "memory_high",
            Knob::MemoryLow => "memory_low",
            Knob::NetEgress => "net_egress",
            Knob::NetGuarantee => "net_egress_guarantee",
            Knob::NetWeight => "net_egress_weight",
            Knob::NetIngress => "net_ingress",
            Knob::GpuCards => "gpu_cards",
            Knob::GpuMemory(card) => return f.pad(&format!("{GPU_MEMORY}{card}")),
            Knob::GpuPower(card) => return f.pad(&format!("{GPU_POWER}{card}")),
            Knob::Frozen => "frozen",
            Knob::IoMax(device) => return f.pad(&format!("{IO_MAX}{device}")),
            Knob::IoWeight => "io_weight",
            Knob::BfqWeight => "io_bfq_weight",
        })
    }
}

/// Why a knob was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a knob of this agent; was it written by a newer one?")]
pub struct UnknownKnob(String);

impl FromStr for Knob {
    type Err = UnknownKnob;

    fn from_str(name: &str) -> Result<Knob, UnknownKnob> {
        if let Some(device) = name.strip_prefix(IO_MAX) {
            return device.parse().map(Knob::IoMax).map_err(|_| UnknownKnob(name.into()));
        }
        for (prefix, of_card) in
            [(GPU_MEMORY, Knob::GpuMemory as fn(u32) -> Knob), (GPU_POWER, Knob::GpuPower)]
        {
            if let Some(card) = name.strip_prefix(prefix) {
                return card.parse().map(of_card).map_err(|_| UnknownKnob(name.into()));
            }
        }
        Knob::PLAIN.into_iter().find(|knob| knob.to_string() == name).ok_or_else(|| UnknownKnob(name.into()))
    }
}

impl TryFrom<String> for Knob {
    type Error = UnknownKnob;

    fn try_from(name: String) -> Result<Knob, UnknownKnob> {
        name.parse()
    }
}

impl From<Knob> for String {
    fn from(knob: Knob) -> String {
        knob.to_string()
    }
}

/// What a knob holds, in the terms of what it is turned by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Quota, period and burst.
    Bandwidth(Bandwidth),
    /// Below every weight.
    Idle,
    /// `cpu.weight`, `io.weight`
    Weight(Weight),
    /// `cpu.shares` of v1.
    Shares(Shares),
    /// A bound of memory.
    Memory(Limit<Bytes>),
    /// Ceilings of a block device.
    Io(IoLimits),
    /// A rate on the wire, in whole bytes.
    Rate(Limit<BitsPerSec>),
    /// Cards that may be opened; `None`: whatever could be without shaper.
    Cards(Option<CardSet>),
    /// Memory of a GPU card.
    CardMemory(MemoryLimit),
    /// Power of a GPU card.
    Power(Milliwatts),
    /// Whether processes stand still.
    Frozen(bool),
}

/// Values of knobs.
pub type Values = BTreeMap<Knob, Value>;

impl Value {
    /// What was there before shaper, after somebody else has changed `ours` to `found`: only what he changed is his.
    #[must_use]
    pub fn with_what_changed(self, ours: &Value, found: &Value) -> Value {
        fn part<T: PartialEq>(before: T, ours: &T, found: T) -> T {
            if found == *ours { before } else { found }
        }
        match (self, ours, *found) {
            (Value::Bandwidth(before), Value::Bandwidth(ours), Value::Bandwidth(found)) => {
                Value::Bandwidth(Bandwidth {
                    max: part(before.max, &ours.max, found.max),
                    burst: part(before.burst, &ours.burst, found.burst),
                })
            }
            (Value::Io(before), Value::Io(ours), Value::Io(found)) => Value::Io(IoLimits {
                read: part(before.read, &ours.read, found.read),
                write: part(before.write, &ours.write, found.write),
                read_operations: part(before.read_operations, &ours.read_operations, found.read_operations),
                write_operations: part(
                    before.write_operations,
                    &ours.write_operations,
                    found.write_operations,
                ),
            }),
            (before, ours, found) => part(before, ours, found),
        }
    }

    /// As the kernel will show it: it keeps whole pages, 32 bits of operations, and whole bytes on the wire.
    #[must_use]
    pub(super) fn as_kept(self) -> Value {
        match self {
            Value::Memory(Limit::At(Bytes(bytes))) => {
                let page = rustix::param::page_size() as u64;
                // The kernel counts pages in a signed word, and takes the largest number for none.
                if bytes >= i64::MAX as u64 / page * page {
                    return Value::Memory(Limit::Unlimited);
                }
                Value::Memory(Limit::At(Bytes(bytes / page * page)))
            }
            Value::Io(limits) => {
                let kept = |limit: Limit<Iops>| match limit {
                    Limit::At(iops) if iops.0 >= u64::from(u32::MAX) => Limit::Unlimited,
                    other => other,
                };
                Value::Io(IoLimits {
                    read_operations: kept(limits.read_operations),
                    write_operations: kept(limits.write_operations),
                    ..limits
                })
            }
            Value::Rate(limit) => Value::Rate(limit.map(|bits| BitsPerSec(bits.bytes_per_sec() * 8))),
            other => other,
        }
    }
}

impl fmt::Display for Value {
    /// For people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bandwidth(Bandwidth { max, burst }) => {
                match max.cores() {
                    Limit::Unlimited => f.write_str("max")?,
                    Limit::At(cores) => write!(f, "{cores} cores")?,
                }
                if max.period != shaper_period() {
                    write!(f, " (period {} µs)", max.period.0)?;
                }
                // What goes without saying: no burst without a quota, one as large as a quota.
                match (max.quota, burst) {
                    (_, None) | (Limit::Unlimited, Some(Micros(0))) => Ok(()),
                    (Limit::At(quota), Some(burst)) if quota == *burst => Ok(()),
                    (_, Some(Micros(0))) => f.write_str(" (no burst)"),
                    (_, Some(Micros(burst))) => write!(f, " (burst {burst} µs)"),
                }
            }
            Value::Idle => f.write_str("idle"),
            Value::Weight(weight) => weight.fmt(f),
            Value::Shares(shares) => shares.0.fmt(f),
            Value::Memory(limit) => limit.fmt(f),
            Value::Io(IoLimits { read, write, read_operations, write_operations }) => {
                let mut any = false;
                let mut part = |f: &mut fmt::Formatter<'_>, name: &str, limit: Limit<u64>, unit: &str| {
                    let Limit::At(value) = limit else { return Ok(()) };
                    let comma = if std::mem::replace(&mut any, true) { ", " } else { "" };
                    write!(f, "{comma}{name} {value} {unit}")
                };
                part(f, "read", read.map(|rate| rate.0), "B/s")?;
                part(f, "write", write.map(|rate| rate.0), "B/s")?;
                part(f, "read", read_operations.map(|rate| rate.0), "IOPS")?;
                part(f, "write", write_operations.map(|rate| rate.0), "IOPS")?;
                if any { Ok(()) } else { f.write_str("max") }
            }
            Value::Rate(limit) => limit.fmt(f),
            Value::Cards(Some(cards)) => cards.fmt(f),
            Value::Cards(None) => f.write_str("as found"),
            Value::CardMemory(limit) => limit.fmt(f),
            Value::Power(power) => power.fmt(f),
            Value::Frozen(true) => f.write_str("frozen"),
            Value::Frozen(false) => f.write_str("not frozen"),
        }
    }
}

const fn shaper_period() -> Micros {
    crate::kernel::cgroup::cpu::CpuMax::PERIOD
}

/// What a knob is to hold, in whatever terms this host has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// So much CPU time per time, with as much of a burst as the kernel has.
    Cpu(Limit<Millicores>),
    /// This share of a contended CPU.
    CpuWeight(Weight),
    /// CPU only where nobody else would run.
    CpuIdle,
    /// So much memory. Refused below what is in use.
    Memory(Limit<Bytes>),
    /// So much memory before it is slowed down.
    MemoryHigh(Limit<Bytes>),
    /// So much memory that is left alone.
    MemoryLow(Limit<Bytes>),
    /// So much sent.
    NetEgress(Limit<BitsPerSec>),
    /// So much sent in any case.
    NetGuarantee(BitsPerSec),
    /// This share of the rest.
    NetWeight(Weight),
    /// So much received.
    NetIngress(Limit<BitsPerSec>),
    /// These cards.
    GpuCards(CardSet),
    /// So much memory of a card.
    GpuMemory(u32, Limit<Bytes>),
    /// So much power of a card.
    GpuPower(u32, Milliwatts),
    /// That its processes stand still.
    Frozen(bool),
    /// So much of a block device.
    IoMax(BlockDevice, IoLimits),
    /// So many reads and writes of it; its limits of bytes stay.
    IoOperations(BlockDevice, [Limit<Iops>; 2]),
    /// So many bytes read and written of it; its limits of operations stay.
    IoBytes(BlockDevice, [Limit<BytesPerSec>; 2]),
    /// This share of contended block devices, by io.cost.
    IoWeight(Weight),
    /// This share of contended block devices, by BFQ, which knows no weight above 1000.
    BfqWeight(Weight),
    /// What it held before.
    Exactly(Knob, Value),
}

impl Wish {
    /// What is to be turned.
    pub fn knob(&self) -> Knob {
        match self {
            Wish::Cpu(_) => Knob::Cpu,
            Wish::CpuWeight(_) | Wish::CpuIdle => Knob::CpuWeight,
            Wish::Memory(_) => Knob::Memory,
            Wish::MemoryHigh(_) => Knob::MemoryHigh,
            Wish::MemoryLow(_) => Knob::MemoryLow,
            Wish::NetEgress(_) => Knob::NetEgress,
            Wish::NetGuarantee(_) => Knob::NetGuarantee,
            Wish::NetWeight(_) => Knob::NetWeight,
            Wish::NetIngress(_) => Knob::NetIngress,
            Wish::GpuCards(_) => Knob::GpuCards,
            Wish::GpuMemory(card, _) => Knob::GpuMemory(*card),
            Wish::GpuPower(card, _) => Knob::GpuPower(*card),
            Wish::Frozen(_) => Knob::Frozen,
            Wish::IoMax(device, _) | Wish::IoOperations(device, _) | Wish::IoBytes(device, _) => {
                Knob::IoMax(*device)
            }
            Wish::IoWeight(_) => Knob::IoWeight,
            Wish::BfqWeight(_) => Knob::BfqWeight,
            Wish::Exactly(knob, _) => *knob,
        }
    }

    /// The wishes that a change of limits amounts to.
    pub fn of(change: &LimitsChange) -> Vec<Wish> {
        // What holds block IO follows from what is done, and from the devices: `node/block_io.rs`, `node/io_latency.rs`.
        let LimitsChange {
            cpu,
            cpu_weight,
            memory,
            net_egress,
            storage_io: _,
            storage_io_weight: _,
            storage_io_latency: _,
            reclaim_idle: _,
            net_egress_guarantee,
            net_egress_weight,
            net_ingress,
            gpu_cards,
            // These go by the cards: `node/card_limits.rs`.
            gpu_memory: _,
            gpu_power: _,
        } = *change;
        let wishes = [
            cpu_weight.map(Wish::CpuWeight),
            cpu.map(Wish::Cpu),
            memory.map(Wish::Memory),
            net_egress.map(Wish::NetEgress),
            net_egress_guarantee.map(Wish::NetGuarantee),
            net_egress_weight.map(Wish::NetWeight),
            net_ingress.map(Wish::NetIngress),
            gpu_cards.map(Wish::GpuCards),
        ];
        wishes.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::cgroup::cpu::CpuMax;

    fn bandwidth(quota: Limit<Micros>, burst: Option<u64>) -> Value {
        let max = CpuMax { quota, period: CpuMax::PERIOD };
        Value::Bandwidth(Bandwidth { max, burst: burst.map(Micros) })
    }

    #[test]
    fn a_knob_is_its_name() {
        let device = BlockDevice { major: 8, minor: 16 };
        for knob in [
            Knob::Cpu,
            Knob::CpuWeight,
            Knob::MemoryHigh,
            Knob::IoMax(device),
            Knob::BfqWeight,
            Knob::GpuMemory(3),
            Knob::GpuPower(63),
            Knob::Frozen,
        ] {
            assert_eq!(knob.to_string().parse(), Ok(knob));
        }
        assert_eq!(Knob::IoMax(device).to_string(), "io_max:8:16");
        for unknown in
            ["", "cpus", "io_max", "io_max:8", "io_max:8:16:1", "gpu_memory", "gpu_memory:", "gpu_power:x"]
        {
            assert!(unknown.parse::<Knob>().is_err(), "{unknown}");
        }
        let values = Values::from([(Knob::IoMax(device), Value::Io(IoLimits::default()))]);
        let json = serde_json::to_string(&values).unwrap();
        assert_eq!(serde_json::from_str::<Values>(&json).unwrap(), values);
    }

    #[test]
    fn a_knob_knows_its_files() {
        let device = BlockDevice { major: 8, minor: 16 };
        for (file, knob) in [
            ("cpu.max", Knob::Cpu),
            ("cpu.max.burst", Knob::Cpu),
            ("cpu.cfs_quota_us", Knob::Cpu),
            ("cpu.idle", Knob::CpuWeight),
            ("memory.max", Knob::Memory),
            ("io.max", Knob::IoMax(device)),
            ("blkio.throttle.read_bps_device", Knob::IoMax(device)),
            ("dmem.max", Knob::GpuMemory(0)),
            ("cgroup.freeze", Knob::Frozen),
        ] {
            let holders = Knob::PLAIN.into_iter().chain([Knob::IoMax(device), Knob::GpuMemory(0)]);
            assert_eq!(holders.filter(|knob| knob.is_in(file)).collect::<Vec<_>>(), [knob], "{file}");
            assert!(Knob::any_is_in(file));
        }
        for other in
            ["cpu.stat", "cgroup.procs", "memory.current", "memory.swap.max", "io.stat", "cpu.uclamp.max"]
        {
            assert!(!Knob::any_is_in(other), "{other}");
        }
    }

    #[test]
    fn values_are_shown_for_people() {
        let at = |quota| Limit::At(Micros(quota));
        assert_eq!(bandwidth(at(50_000), None).to_string(), "0.5 cores");
        assert_eq!(bandwidth(at(50_000), Some(50_000)).to_string(), "0.5 cores");
        assert_eq!(bandwidth(at(50_000), Some(0)).to_string(), "0.5 cores (no burst)");
        assert_eq!(bandwidth(at(50_000), Some(20_000)).to_string(), "0.5 cores (burst 20000 µs)");
        assert_eq!(bandwidth(Limit::Unlimited, Some(0)).to_string(), "max");
        let short = Bandwidth { max: CpuMax { quota: at(20_000), period: Micros(50_000) }, burst: None };
        assert_eq!(Value::Bandwidth(short).to_string(), "0.4 cores (period 50000 µs)");
        assert_eq!(Value::Memory(Limit::At(Bytes(1 << 30))).to_string(), "1 GiB");
        assert_eq!(Value::Rate(Limit::At(BitsPerSec(100_000_000))).to_string(), "100 Mbit/s");
        assert_eq!(Value::Rate(Limit::Unlimited).to_string(), "max");
        assert_eq!(Value::Weight(Weight::DEFAULT).to_string(), "100");
        let io = IoLimits {
            write: Limit::At(BytesPerSec(1024)),
            read_operations: Limit::At(Iops(5)),
            ..IoLimits::default()
        };
        assert_eq!(Value::Io(io).to_string(), "write 1024 B/s, read 5 IOPS");
        assert_eq!(Value::Io(IoLimits::default()).to_string(), "max");
    }

    #[test]
    fn only_what_somebody_changed_is_his() {
        let at = |quota| Limit::At(Micros(quota));
        let (before, ours) = (bandwidth(Limit::Unlimited, Some(0)), bandwidth(at(50_000), Some(50_000)));
        let found = bandwidth(at(60_000), Some(50_000));
        assert_eq!(before.with_what_changed(&ours, &found), bandwidth(at(60_000), Some(0)));
        let found = bandwidth(at(50_000), Some(20_000));
        assert_eq!(before.with_what_changed(&ours, &found), bandwidth(Limit::Unlimited, Some(20_000)));
        let io = |read, write| {
            let at = |rate| Limit::At(BytesPerSec(rate));
            Value::Io(IoLimits { read: at(read), write: at(write), ..IoLimits::default() })
        };
        assert_eq!(io(1, 2).with_what_changed(&io(10, 20), &io(10, 30)), io(1, 30));
        let weight = |weight| Value::Weight(Weight::try_from(weight).unwrap());
        assert_eq!(weight(1).with_what_changed(&weight(2), &weight(3)), weight(3));
        assert_eq!(weight(1).with_what_changed(&Value::Idle, &Value::Idle), weight(1));
    }

    #[test]
    fn the_kernel_keeps_whole_pages_and_bytes() {
        let kept = |bytes| Value::Memory(Limit::At(Bytes(bytes))).as_kept();
        assert_eq!(kept((1 << 20) + 5), Value::Memory(Limit::At(Bytes(1 << 20))));
        assert_eq!(kept(u64::MAX), Value::Memory(Limit::Unlimited));
        let rate = Value::Rate(Limit::At(BitsPerSec(8_000_007))).as_kept();
        assert_eq!(rate, Value::Rate(Limit::At(BitsPerSec(8_000_000))));
        let many = IoLimits { read_operations: Limit::At(Iops(1 << 40)), ..IoLimits::default() };
        assert_eq!(Value::Io(many).as_kept(), Value::Io(IoLimits::default()));
    }
}
