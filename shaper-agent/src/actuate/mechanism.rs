//! How a knob is turned for a task: one place for each, in v2 where the controller is, else in v1.

use std::path::Path;

use shaper_core::{
    id::BlockDevice,
    limits::Limit,
    units::{BitsPerSec, Bytes, Micros, Weight},
};

use super::{ActuateError, Knob, Pacing, Target, Value, Wish};
use crate::{
    gpu::{Holders, MemoryLimit},
    kernel::{
        cgroup::{
            Cgroup, File,
            block::{self, IoLimits, IoWeight, OfDevice, SetIoWeight},
            cpu::{self, Bandwidth, CpuMax, CpuShare},
            groups, memory,
        },
        v1::{self, Shares, V1Error, V1Group, V1Limit},
    },
};

/// How a knob is turned for a task.
pub(super) enum Mechanism<'a> {
    Cgroup(&'a Cgroup),
    V1(&'a V1Group),
    Pacing(u32),
    Queue(u32),
    Admission(u32),
    CardMemory { holders: &'a Holders, cgroup: &'a Cgroup, card: u32 },
    CardPower { holders: &'a Holders, card: u32 },
}

/// A file of cgroup v2 that holds a bound of memory.
fn memory_file(knob: Knob) -> File<Limit<Bytes>> {
    match knob {
        Knob::MemoryHigh => memory::HIGH,
        Knob::MemoryLow => memory::LOW,
        _ => memory::MAX,
    }
}

/// A file of cgroup v2 that holds a share of block devices.
fn io_weight_file(knob: Knob) -> File<IoWeight, SetIoWeight> {
    if knob == Knob::BfqWeight { block::BFQ_WEIGHT } else { block::WEIGHT }
}

/// Why there is no guarantee and no weight.
pub const NOT_DIVIDED: &str = "this node does not divide its network among its tasks: start its agent with \
                                      --capacity network=RATE, what they can send together";

/// Why no card is granted.
const NO_ADMISSION: &str = "this kernel does not take the program that admits tasks to cards (`shaper doctor` says why): \
                            nothing would keep others from them";

/// What BFQ takes for the most.
const BFQ_MAX: u32 = 1000;

impl<'a> Mechanism<'a> {
    pub(super) fn of(target: &'a Target, knob: Knob) -> Result<Mechanism<'a>, ActuateError> {
        let cgroup = &target.cgroup;
        let (is_in_v2, v1) = match knob {
            Knob::NetEgress | Knob::NetGuarantee | Knob::NetWeight => {
                return Ok(Mechanism::Pacing(target.slot));
            }
            Knob::NetIngress => return Ok(Mechanism::Queue(target.slot)),
            Knob::GpuCards => return Ok(Mechanism::Admission(target.slot)),
            Knob::GpuMemory(card) => {
                return Ok(Mechanism::CardMemory { holders: &target.cards, cgroup, card });
            }
            Knob::GpuPower(card) => return Ok(Mechanism::CardPower { holders: &target.cards, card }),
            Knob::Frozen => (cgroup.has(groups::FREEZE), &None),
            Knob::Cpu => (cgroup.has(cpu::MAX), &target.v1_cpu),
            Knob::CpuWeight => (cgroup.has(cpu::WEIGHT), &target.v1_cpu),
            Knob::Memory => (cgroup.has(memory::MAX), &target.v1_memory),
            // v1 has nothing that does the same.
            Knob::MemoryHigh => (cgroup.has(memory::HIGH), &None),
            Knob::MemoryLow => (cgroup.has(memory::LOW), &None),
            Knob::IoWeight | Knob::BfqWeight => (cgroup.has(io_weight_file(knob)), &None),
            Knob::IoMax(_) => (cgroup.has(block::MAX), &target.v1_io),
        };
        if is_in_v2 {
            return Ok(Mechanism::Cgroup(cgroup));
        }
        if let Some(group) = v1 {
            return Ok(Mechanism::V1(group));
        }
        // A cgroup that was removed has no file at all: that is said, and not that this host lacks something.
        cgroup.is_populated()?;
        Err(ActuateError::NoMechanism {
            knob,
            reason: "no controller of this host reaches this cgroup (see `shaper doctor`); on a hybrid host only \
                     launched tasks have one: start it with `shaper run`",
        })
    }

    /// By its usual name.
    pub(super) fn name(&self, knob: Knob) -> &'static str {
        match (self, knob) {
            (Mechanism::Cgroup(_), Knob::Cpu) => cpu::MAX.name(),
            (Mechanism::Cgroup(_), Knob::CpuWeight) => cpu::WEIGHT.name(),
            (Mechanism::Cgroup(_), Knob::IoMax(_)) => block::MAX.name(),
            (Mechanism::Cgroup(_), Knob::IoWeight | Knob::BfqWeight) => io_weight_file(knob).name(),
            (Mechanism::Cgroup(_), Knob::Frozen) => groups::FREEZE.name(),
            (Mechanism::Cgroup(_), _) => memory_file(knob).name(),
            (Mechanism::V1(_), Knob::CpuWeight) => "v1 cpu.shares",
            (Mechanism::V1(_), Knob::Memory) => "v1 memory.limit_in_bytes",
            (Mechanism::V1(_), Knob::IoMax(_)) => "v1 blkio.throttle",
            (Mechanism::V1(_), _) => "v1 cpu.cfs_quota_us",
            (Mechanism::Pacing(_), Knob::NetGuarantee | Knob::NetWeight) => "pool",
            (Mechanism::Pacing(_), _) => "tcp-pacing",
            (Mechanism::Queue(_), _) => "ifb-htb",
            (Mechanism::Admission(_), _) => "cgroup-device",
            (Mechanism::CardMemory { holders, cgroup, card }, _) => holders.rung(*card, cgroup).name(),
            (Mechanism::CardPower { .. }, _) => "nvml",
        }
    }

    /// What the knob will hold when a wish is granted. `before`: what it holds.
    pub(super) fn value(&self, wish: &Wish, before: Value) -> Value {
        let value = match (*wish, self) {
            (Wish::Cpu(limit), _) => {
                let max = CpuMax::of(limit);
                // As much as the quota: over ten seconds that is a hundredth.
                let of_quota = max.quota.at().unwrap_or(Micros(0));
                let has_burst = matches!(before, Value::Bandwidth(Bandwidth { burst: Some(_), .. }));
                Value::Bandwidth(Bandwidth { max, burst: has_burst.then_some(of_quota) })
            }
            (Wish::CpuWeight(weight), Mechanism::V1(_)) => Value::Shares(Shares::of(weight)),
            (Wish::CpuWeight(weight) | Wish::IoWeight(weight) | Wish::NetWeight(weight), _) => {
                Value::Weight(weight)
            }
            (Wish::BfqWeight(weight), _) => {
                Value::Weight(Weight::new(weight.get().min(BFQ_MAX)).unwrap_or(weight))
            }
            (Wish::CpuIdle, _) => Value::Idle,
            (Wish::Memory(limit) | Wish::MemoryHigh(limit) | Wish::MemoryLow(limit), _) => {
                Value::Memory(limit)
            }
            (Wish::NetEgress(limit) | Wish::NetIngress(limit), _) => Value::Rate(limit),
            (Wish::GpuCards(cards), _) => Value::Cards(Some(cards)),
            (Wish::GpuMemory(_, limit), Mechanism::CardMemory { holders, cgroup, card }) => {
                Value::CardMemory(holders.as_kept(*card, cgroup, limit))
            }
            (Wish::GpuMemory(_, limit), _) => Value::CardMemory(MemoryLimit { guaranteed: Bytes(0), limit }),
            (Wish::GpuPower(_, power), _) => Value::Power(power),
            (Wish::Frozen(frozen), _) => Value::Frozen(frozen),
            (Wish::NetGuarantee(rate), _) => Value::Rate(Limit::At(rate)),
            (Wish::IoMax(_, limits), _) => Value::Io(limits),
            (Wish::IoOperations(_, [read_operations, write_operations]), _) => {
                let bytes = if let Value::Io(before) = before { before } else { IoLimits::default() };
                Value::Io(IoLimits { read_operations, write_operations, ..bytes })
            }
            (Wish::IoBytes(_, [read, write]), _) => {
                let operations = if let Value::Io(before) = before { before } else { IoLimits::default() };
                Value::Io(IoLimits { read, write, ..operations })
            }
            (Wish::Exactly(_, value), _) => value,
        };
        value.as_kept()
    }

    pub(super) fn read(&self, pacing: &dyn Pacing, knob: Knob) -> Result<Value, ActuateError> {
        Ok(match (self, knob) {
            (Mechanism::Pacing(slot), Knob::NetGuarantee) => {
                let guarantee = pacing.terms(*slot).map_or(0, |terms| terms.guarantee);
                Value::Rate(Limit::At(BitsPerSec(guarantee * 8)))
            }
            (Mechanism::Pacing(slot), Knob::NetWeight) => {
                let weight = pacing.terms(*slot).and_then(|terms| Weight::new(terms.weight));
                Value::Weight(weight.unwrap_or(Weight::DEFAULT))
            }
            (Mechanism::Pacing(slot), _) => Value::Rate(match pacing.ceiling(*slot) {
                Some(bytes) => Limit::At(BitsPerSec(bytes * 8)),
                None => Limit::Unlimited,
            }),
            (Mechanism::Queue(slot), _) => Value::Rate(match pacing.ingress(*slot)? {
                Some(class) => Limit::At(BitsPerSec(class.rate * 8)),
                None => Limit::Unlimited,
            }),
            (Mechanism::Admission(slot), _) => Value::Cards(pacing.cards(*slot)),
            (Mechanism::CardMemory { holders, cgroup, card }, _) => {
                Value::CardMemory(holders.memory(*card, cgroup)?)
            }
            (Mechanism::CardPower { holders, card }, _) => Value::Power(holders.power(*card)?),
            (Mechanism::Cgroup(cgroup), Knob::Frozen) => Value::Frozen(cgroup.get(groups::FREEZE)?),
            (Mechanism::Cgroup(cgroup), Knob::Cpu) => Value::Bandwidth(cgroup.bandwidth()?),
            (Mechanism::V1(group), Knob::Cpu) => Value::Bandwidth(group.bandwidth()?),
            (Mechanism::Cgroup(cgroup), Knob::CpuWeight) => match cgroup.cpu_share()? {
                CpuShare::Idle => Value::Idle,
                CpuShare::At(weight) => Value::Weight(weight),
            },
            (Mechanism::V1(group), Knob::CpuWeight) => match group.find(v1::CPU_IDLE)? {
                Some(true) => Value::Idle,
                _ => Value::Shares(group.get(v1::CPU_SHARES)?),
            },
            (Mechanism::Cgroup(cgroup), Knob::IoMax(device)) => {
                Value::Io(cgroup.get(block::MAX)?.get(&device).copied().unwrap_or_default())
            }
            (Mechanism::V1(group), Knob::IoMax(device)) => Value::Io(group.io_limits(device)?),
            (Mechanism::Cgroup(cgroup), Knob::IoWeight | Knob::BfqWeight) => {
                Value::Weight(cgroup.get(io_weight_file(knob))?.default)
            }
            (Mechanism::Cgroup(cgroup), _) => Value::Memory(cgroup.get(memory_file(knob))?),
            (Mechanism::V1(group), _) => Value::Memory(group.get(v1::MEMORY_LIMIT)?.0),
        })
    }

    pub(super) fn write(
        &self,
        pacing: &mut dyn Pacing,
        knob: Knob,
        value: &Value,
        has_sockets: bool,
    ) -> Result<(), ActuateError> {
        match (self, *value) {
            (Mechanism::Pacing(slot), value) if matches!(knob, Knob::NetGuarantee | Knob::NetWeight) => {
                let Some(mut terms) = pacing.terms(*slot) else {
                    return Err(ActuateError::NoMechanism { knob, reason: NOT_DIVIDED });
                };
                match value {
                    Value::Rate(limit) => {
                        terms.guarantee = limit.at().unwrap_or(BitsPerSec(0)).bytes_per_sec();
                    }
                    Value::Weight(weight) => terms.weight = weight.get(),
                    value => return Err(ActuateError::OtherHierarchy { knob, value: Box::new(value) }),
                }
                pacing.set_terms(*slot, terms.guarantee, terms.weight);
            }
            (Mechanism::Pacing(slot), Value::Rate(limit)) => pacing.limit(*slot, limit.at(), has_sockets)?,
            (Mechanism::Queue(slot), Value::Rate(limit)) => pacing.limit_ingress(*slot, limit.at())?,
            (Mechanism::Admission(_), Value::Cards(Some(_))) if !pacing.admits() => {
                return Err(ActuateError::NoMechanism { knob, reason: NO_ADMISSION });
            }
            (Mechanism::Admission(slot), Value::Cards(cards)) => pacing.admit(*slot, cards),
            (Mechanism::CardMemory { holders, cgroup, card }, Value::CardMemory(limit)) => {
                holders.set_memory(*card, cgroup, limit)?;
            }
            (Mechanism::CardPower { holders, card }, Value::Power(power)) => {
                holders.set_power(*card, power)?
            }
            (Mechanism::Cgroup(cgroup), Value::Frozen(frozen)) => cgroup.set(groups::FREEZE, &frozen)?,
            (Mechanism::Cgroup(cgroup), Value::Bandwidth(bandwidth)) => cgroup.set_bandwidth(&bandwidth)?,
            (Mechanism::V1(group), Value::Bandwidth(bandwidth)) => {
                group.set_bandwidth(&bandwidth).map_err(|error| explained(group, &bandwidth, error))?;
            }
            (Mechanism::Cgroup(cgroup), Value::Idle) => cgroup.set_cpu_share(CpuShare::Idle)?,
            (Mechanism::V1(group), Value::Idle) => group.set(v1::CPU_IDLE, &true)?,
            (Mechanism::Cgroup(cgroup), Value::Weight(weight))
                if matches!(knob, Knob::IoWeight | Knob::BfqWeight) =>
            {
                cgroup.set(io_weight_file(knob), &SetIoWeight::Default(weight))?;
            }
            (Mechanism::Cgroup(cgroup), Value::Weight(weight)) => {
                cgroup.set_cpu_share(CpuShare::At(weight))?;
            }
            (Mechanism::V1(group), Value::Shares(shares)) => {
                // An idle group refuses shares.
                if group.find(v1::CPU_IDLE)? == Some(true) {
                    group.set(v1::CPU_IDLE, &false)?;
                }
                group.set(v1::CPU_SHARES, &shares)?;
            }
            (Mechanism::Cgroup(cgroup), Value::Memory(limit)) => cgroup.set(memory_file(knob), &limit)?,
            (Mechanism::V1(group), Value::Memory(limit)) => group.set(v1::MEMORY_LIMIT, &V1Limit(limit))?,
            (_, Value::Io(limits)) => {
                if let Knob::IoMax(device) = knob {
                    self.write_io(device, &limits)?;
                }
            }
            // Written down on another kind of host: a hierarchy has moved since.
            (_, value) => return Err(ActuateError::OtherHierarchy { knob, value: Box::new(value) }),
        }
        Ok(())
    }

    fn write_io(&self, device: BlockDevice, limits: &IoLimits) -> Result<(), ActuateError> {
        let written = match self {
            Mechanism::Cgroup(cgroup) => {
                cgroup.set(block::MAX, &OfDevice(device, *limits)).map_err(ActuateError::from)
            }
            Mechanism::V1(group) => group.set_io_limits(device, limits).map_err(ActuateError::from),
            Mechanism::Pacing(_)
            | Mechanism::Queue(_)
            | Mechanism::Admission(_)
            | Mechanism::CardMemory { .. }
            | Mechanism::CardPower { .. } => Ok(()),
        };
        match written {
            // A device that is gone took its limits with it.
            Err(_) if *limits == IoLimits::default() && !is_there(device) => Ok(()),
            Err(_) if !is_there(device) => Err(ActuateError::NoDevice(device)),
            other => other,
        }
    }
}

/// Why a v1 group did not take a quota, where that can be told.
fn explained(group: &V1Group, wanted: &Bandwidth, error: V1Error) -> ActuateError {
    if error.errno() == Some(rustix::io::Errno::INVAL)
        && let Limit::At(wanted) = wanted.max.cores()
        && let Some((above, most)) = group.limit_above()
        && wanted > most
    {
        return ActuateError::AboveGroup { wanted, most, group: above.display().to_string() };
    }
    error.into()
}

/// Whether a block device is there.
pub(super) fn is_there(device: BlockDevice) -> bool {
    Path::new(&format!("/sys/dev/block/{device}")).exists()
}
