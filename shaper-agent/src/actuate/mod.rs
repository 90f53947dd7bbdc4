//! The one executor: it alone changes a limit.
//!
//! A change is planned as actions that carry what was there before; they are executed in order,
//! each is read back, and when one fails those before it are undone in reverse.

mod device;
mod knob;
mod mechanism;
mod quota;

use serde::{Deserialize, Serialize};
use shaper_common::{
    abi::{PACE_ON, Pace},
    pace,
    pool::Terms,
};
use shaper_core::{
    burst::Quota,
    gpu::CardSet,
    id::BlockDevice,
    limits::{Limit, Limits},
    task::Enforcement,
    units::{BitsPerSec, Bytes, Millicores, Milliwatts, Weight},
};
use shaper_proto::failpoint;

use crate::{
    gpu::{CardError, HolderError, Holders},
    kernel::{
        bpf::{Bpf, BpfError, Refused},
        cgroup::{Cgroup, CgroupError, memory},
        ingress::ClassState,
        v1::{self, V1Error, V1Group},
    },
    manager::{Manager, ManagerError},
};

use self::mechanism::Mechanism;
pub use self::{
    device::{Cost, io_cost, set_io_cost},
    knob::{Knob, UnknownKnob, Value, Values, Wish},
    mechanism::NOT_DIVIDED,
    quota::QuotaFile,
};

/// How what a slot sends is paced.
pub trait Pacing {
    /// What is in force.
    fn pace(&self, slot: u32) -> Pace;

    /// The ceiling of the slot, bytes a second.
    fn ceiling(&self, slot: u32) -> Option<u64>;

    /// What the slot has of the network where that is divided.
    fn terms(&self, slot: u32) -> Option<Terms>;

    /// Changes its guarantee, bytes a second, and its weight.
    fn set_terms(&mut self, slot: u32, guarantee: u64, weight: u32);

    /// Sets a ceiling, or lifts it; `has_sockets` if any may be there that have to be told.
    fn limit(&mut self, slot: u32, ceiling: Option<BitsPerSec>, has_sockets: bool) -> Result<(), BpfError>;

    /// The queue of what the slot receives, if that is limited.
    fn ingress(&self, slot: u32) -> Result<Option<ClassState>, BpfError>;

    /// The device of that queue.
    fn ingress_device(&self) -> &str;

    /// Limits what it receives, or no longer.
    fn limit_ingress(&mut self, slot: u32, limit: Option<BitsPerSec>) -> Result<(), BpfError>;

    /// Whether the kernel admits tasks to GPU cards at all.
    fn admits(&self) -> bool;

    /// The GPU cards that the slot may open; `None`: whatever it could anyway.
    fn cards(&self, slot: u32) -> Option<CardSet>;

    /// Changes that.
    fn admit(&mut self, slot: u32, cards: Option<CardSet>);

    /// What was refused to it.
    fn refused(&self, slot: u32) -> Refused;
}

impl Pacing for Bpf {
    fn pace(&self, slot: u32) -> Pace {
        self.pacing(slot)
    }

    fn ceiling(&self, slot: u32) -> Option<u64> {
        self.egress_ceiling(slot)
    }

    fn terms(&self, slot: u32) -> Option<Terms> {
        self.network_terms(slot)
    }

    fn set_terms(&mut self, slot: u32, guarantee: u64, weight: u32) {
        self.set_network_terms(slot, guarantee, weight);
    }

    fn limit(&mut self, slot: u32, ceiling: Option<BitsPerSec>, has_sockets: bool) -> Result<(), BpfError> {
        self.limit_egress(slot, ceiling, has_sockets)
    }

    fn ingress(&self, slot: u32) -> Result<Option<ClassState>, BpfError> {
        self.ingress(slot)
    }

    fn ingress_device(&self) -> &str {
        self.ingress_device()
    }

    fn limit_ingress(&mut self, slot: u32, limit: Option<BitsPerSec>) -> Result<(), BpfError> {
        self.limit_ingress(slot, limit)
    }

    fn admits(&self) -> bool {
        self.admits()
    }

    fn cards(&self, slot: u32) -> Option<CardSet> {
        self.admitted(slot)
    }

    fn admit(&mut self, slot: u32, cards: Option<CardSet>) {
        self.admit(slot, cards);
    }

    fn refused(&self, slot: u32) -> Refused {
        self.refused(slot)
    }
}

/// Where the limits of a task are enforced.
pub struct Target {
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its group in the v1 cpu hierarchy, on a hybrid host.
    pub v1_cpu: Option<V1Group>,
    /// Its group in the v1 memory hierarchy, on a hybrid host.
    pub v1_memory: Option<V1Group>,
    /// Its group in the v1 blkio hierarchy, on a hybrid host: block IO is charged there.
    pub v1_io: Option<V1Group>,
    /// Who else manages its cgroup.
    pub manager: Option<Manager>,
    /// Its slot in the kernel programs' tables.
    pub slot: u32,
    /// Whether anything has run in it that may have opened a socket.
    pub has_sockets: bool,
    /// Whether it shares the node's network with others.
    pub shares_network: bool,
    /// What holds it to its part of GPU cards.
    pub cards: Holders,
}

/// What went wrong with a limit.
#[derive(Debug, thiserror::Error)]
pub enum ActuateError {
    /// Nothing on this host enforces it for this task.
    #[error("{knob}: {reason}")]
    NoMechanism {
        /// The resource.
        knob: Knob,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A limit below what is in use.
    #[error(
        "memory: {wanted} is below what the task uses now ({used}); the kernel would kill it. \
         Let it free memory first, or choose at least that"
    )]
    BelowUse {
        /// The wanted limit.
        wanted: Bytes,
        /// The use.
        used: Bytes,
    },
    /// The kernel took the value and shows another.
    #[error(
        "{knob}: wrote `{wrote}`, but it reads `{reads}`: somebody else changes it, or the kernel rounds it"
    )]
    ReadBack {
        /// The resource.
        knob: Knob,
        /// What was written.
        wrote: Box<Value>,
        /// What is there.
        reads: Box<Value>,
    },
    /// The first failure, and one that befell its undoing.
    #[error("{first}; and undoing {knob} failed too: {undo}")]
    Undo {
        /// Why it had to be undone.
        first: Box<ActuateError>,
        /// What could not be undone.
        knob: Knob,
        /// Why.
        undo: Box<ActuateError>,
    },
    /// A value of another kind of host.
    #[error("{knob}: `{value}` was written down when another cgroup hierarchy had this controller")]
    OtherHierarchy {
        /// The resource.
        knob: Knob,
        /// What was written down.
        value: Box<Value>,
    },
    /// The kernel took what is said of a device, and shows something else.
    #[error("{file} of {device} does not show what was written: somebody else changes it")]
    NotKept {
        /// The device.
        device: BlockDevice,
        /// The file, at the root of cgroup v2.
        file: &'static str,
    },
    /// A block device that is not there.
    #[error("there is no block device {0} (see `lsblk`)")]
    NoDevice(BlockDevice),
    /// A CPU limit above that of a v1 group above, which the kernel refuses. (v2 takes it, and the lower one holds.)
    #[error(
        "cpu: {wanted} cores are more than the {most} that the group above, {group}, may use, and the cpu controller \
         of cgroup v1 refuses that. Choose at most {most}, or raise the limit of that group first"
    )]
    AboveGroup {
        /// The wanted limit.
        wanted: Millicores,
        /// What the group above has.
        most: Millicores,
        /// The group above.
        group: String,
    },
    /// Its manager.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// A v2 file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A v1 file.
    #[error(transparent)]
    V1(#[from] V1Error),
    /// A map.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// A GPU card.
    #[error("gpu: {0}")]
    Card(CardError),
}

impl From<CardError> for ActuateError {
    fn from(error: CardError) -> ActuateError {
        ActuateError::Card(error)
    }
}

impl From<HolderError> for ActuateError {
    fn from(error: HolderError) -> ActuateError {
        match error {
            HolderError::Card(error) => error.into(),
            HolderError::Cgroup(error) => error.into(),
        }
    }
}

impl ActuateError {
    /// Whether everything is again as it was before.
    pub fn is_undone(&self) -> bool {
        !matches!(self, ActuateError::Undo { .. })
    }

    /// Whether it is for the user to see to.
    pub fn is_refusal(&self) -> bool {
        match self {
            ActuateError::NoMechanism { .. }
            | ActuateError::BelowUse { .. }
            | ActuateError::AboveGroup { .. }
            | ActuateError::Card(_) => true,
            ActuateError::Bpf(BpfError::Ingress(error)) => error.is_refusal(),
            _ => false,
        }
    }

    /// Whether nothing can be said of a GPU card now.
    pub fn is_of_a_card(&self) -> bool {
        matches!(self, ActuateError::Card(CardError::Silent(_) | CardError::Gone { .. }))
    }

    /// Whether the cgroup is not there any more.
    pub fn is_gone(&self) -> bool {
        match self {
            ActuateError::Cgroup(error) | ActuateError::V1(V1Error::Cgroup(error)) => error.is_gone(),
            _ => false,
        }
    }
}

/// One step, with its undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What is turned.
    pub knob: Knob,
    /// What it held.
    pub before: Value,
    /// What it is to hold.
    pub after: Value,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub changes: Vec<Change>,
    /// What the knobs hold then, those that hold it already among them.
    pub in_force: Values,
}

/// What is to be done for `wishes`: nothing for a knob that holds it already.
pub fn plan(target: &Target, pacing: &dyn Pacing, wishes: &[Wish]) -> Result<Plan, ActuateError> {
    let mut plan = Plan::default();
    for wish in wishes {
        let knob = wish.knob();
        // What is put back on a device that is gone went with it.
        if let Wish::Exactly(Knob::IoMax(device), _) | Wish::IoBytes(device, _) = wish
            && !mechanism::is_there(*device)
        {
            continue;
        }
        // It comes back with the network's capacity.
        if matches!(knob, Knob::NetGuarantee | Knob::NetWeight) && !target.shares_network {
            continue;
        }
        let mechanism = Mechanism::of(target, knob)?;
        let before = match mechanism.read(pacing, knob) {
            // What is put back on a card that is gone went with it, too.
            Err(ActuateError::Card(CardError::Gone { .. })) if matches!(wish, Wish::Exactly(..)) => continue,
            before => before?,
        };
        let after = mechanism.value(wish, before);
        plan.in_force.insert(knob, after);
        if before == after {
            continue;
        }
        if let Wish::Memory(Limit::At(wanted)) = *wish
            && let Some(used) = memory_in_use(target)?
            && wanted < used
        {
            return Err(ActuateError::BelowUse { wanted, used });
        }
        plan.changes.push(Change { knob, before, after });
    }
    Ok(plan)
}

/// What a knob holds.
pub fn read(target: &Target, pacing: &dyn Pacing, knob: Knob) -> Result<Value, ActuateError> {
    Mechanism::of(target, knob)?.read(pacing, knob)
}

/// What the knobs hold once `wishes` are granted.
pub fn values(target: &Target, pacing: &dyn Pacing, wishes: &[Wish]) -> Result<Values, ActuateError> {
    let value = |wish: &Wish| {
        let knob = wish.knob();
        let mechanism = Mechanism::of(target, knob)?;
        Ok((knob, mechanism.value(wish, mechanism.read(pacing, knob)?)))
    };
    wishes.iter().map(value).collect()
}

/// Whether anything on this host turns a knob for a task.
pub fn can_turn(target: &Target, knob: Knob) -> bool {
    Mechanism::of(target, knob).is_ok()
}

/// How long a change is meant to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// Until the next: the cgroup's manager is told.
    ForGood,
    /// For a while: it is not.
    ForAWhile,
}

/// Turns knobs in order, all or none: when one fails, it and those before it are turned back in reverse.
pub fn execute(
    target: &Target,
    pacing: &mut dyn Pacing,
    changes: &[Change],
    lasts: Lasts,
) -> Result<(), ActuateError> {
    for (index, change) in changes.iter().enumerate() {
        failpoint::hit("actuate-before-write");
        let turned = turn(target, pacing, change.knob, &change.after, lasts);
        failpoint::hit("actuate-after-write");
        let Err(first) = turned else { continue };
        // The one that failed is undone as well: it may have been written and misread. All are tried.
        let mut error = first;
        for done in changes[..=index].iter().rev() {
            failpoint::hit("actuate-before-undo");
            if let Err(undo) = turn(target, pacing, done.knob, &done.before, lasts)
                // What is gone took its values with it.
                && !undo.is_gone()
            {
                error = ActuateError::Undo { first: Box::new(error), knob: done.knob, undo: Box::new(undo) };
            }
        }
        return Err(error);
    }
    Ok(())
}

/// Writes a value, to the cgroup's manager as well, and reads it back.
fn turn(
    target: &Target,
    pacing: &mut dyn Pacing,
    knob: Knob,
    value: &Value,
    lasts: Lasts,
) -> Result<(), ActuateError> {
    let mechanism = Mechanism::of(target, knob)?;
    if let Some(manager) = target.manager.as_ref().filter(|_| lasts == Lasts::ForGood) {
        match manager.tell(knob, value) {
            Ok(_) => {}
            // What it does when it is back is a second writer's.
            Err(error @ ManagerError::Unreachable(_)) => {
                tracing::warn!(%manager, %knob, error = %crate::launch::chain(&error), "a cgroup's manager does not know of a change");
            }
            Err(error) => return Err(error.into()),
        }
        failpoint::hit("actuate-after-telling");
    }
    mechanism.write(pacing, knob, value, target.has_sockets)?;
    let reads = mechanism.read(pacing, knob)?;
    if reads == *value {
        Ok(())
    } else {
        Err(ActuateError::ReadBack { knob, wrote: Box::new(*value), reads: Box::new(reads) })
    }
}

/// Puts a quota in force for a while, and reads it back. The only entry that a thread beside the node's uses: what is to be
/// written back is in the table of leases by then, and the ledger keeps what was there before any limit.
pub fn lend(file: &QuotaFile, quota: &Quota<u32>) -> Result<(), ActuateError> {
    file.set(quota.quota, quota.saving)
}

/// Puts a card's power back that a task had limited which is gone, and reads it back.
pub fn put_power_back(holders: &Holders, card: u32, power: Milliwatts) -> Result<(), ActuateError> {
    holders.set_power(card, power)?;
    let reads = holders.power(card)?;
    if reads == power {
        return Ok(());
    }
    let [wrote, reads] = [power, reads].map(|power| Box::new(Value::Power(power)));
    Err(ActuateError::ReadBack { knob: Knob::GpuPower(card), wrote, reads })
}

/// What every knob that was ever turned should hold: the limits; else what was decided for good; else what it held
/// before. A memory limit that only a shrink had turned so far is noted as one that stands (`node/memory.rs`). Where block IO has a ceiling, any division of it holds, so that which is in force stays until the next; bytes are
/// no part of it.
pub fn decided(limits: &Limits, standing: &Values, baseline: &Values) -> Vec<Wish> {
    let of_card = |number| limits.gpu_cards.is_some_and(|cards| cards.contains(number));
    let wish = |(knob, before): (&Knob, &Value)| match knob {
        Knob::Cpu => Some(Wish::Cpu(limits.cpu)),
        Knob::Memory => Some(match (limits.memory, standing.get(&Knob::Memory)) {
            (Limit::Unlimited, Some(value)) => Wish::Exactly(Knob::Memory, *value),
            (limit, _) => Wish::Memory(limit),
        }),
        Knob::NetEgress => Some(Wish::NetEgress(limits.net_egress)),
        Knob::NetIngress => Some(Wish::NetIngress(limits.net_ingress)),
        Knob::GpuCards if limits.gpu_cards.is_some() => limits.gpu_cards.map(Wish::GpuCards),
        Knob::GpuMemory(card) if of_card(*card) && limits.gpu_memory != Limit::Unlimited => {
            Some(Wish::GpuMemory(*card, limits.gpu_memory))
        }
        Knob::GpuPower(card) if of_card(*card) && limits.gpu_power != Limit::Unlimited => {
            limits.gpu_power.at().map(|power| Wish::GpuPower(*card, power))
        }
        Knob::NetGuarantee => Some(Wish::NetGuarantee(limits.net_egress_guarantee.unwrap_or(BitsPerSec(0)))),
        Knob::NetWeight => Some(Wish::NetWeight(limits.net_egress_weight.unwrap_or(Weight::DEFAULT))),
        Knob::IoMax(device) if limits.storage_io != Limit::Unlimited => {
            match standing.get(knob).unwrap_or(before) {
                Value::Io(own) => Some(Wish::IoBytes(*device, [own.read, own.write])),
                _ => None,
            }
        }
        other => {
            let by_limit = match other {
                Knob::CpuWeight => limits.cpu_weight.map(Wish::CpuWeight),
                Knob::IoWeight => limits.storage_io_weight.map(Wish::IoWeight),
                Knob::BfqWeight => limits.storage_io_weight.map(Wish::BfqWeight),
                _ => None,
            };
            let standing = standing.get(other).map(|value| Wish::Exactly(*other, *value));
            standing.or(by_limit).or(Some(Wish::Exactly(*other, *before)))
        }
    };
    baseline.iter().filter_map(wish).collect()
}

/// The wishes that put values back which were read before, last first.
pub fn as_before(values: &Values) -> Vec<Wish> {
    values.iter().rev().map(|(knob, value)| Wish::Exactly(*knob, *value)).collect()
}

/// What holds each limit that is in force, as read back now. `turned`: knobs that are told of because they were ever
/// turned.
pub fn enforcement(
    target: &Target,
    pacing: &dyn Pacing,
    turned: &Values,
) -> Result<Vec<Enforcement>, ActuateError> {
    let always = [Knob::Cpu, Knob::CpuWeight, Knob::Memory, Knob::NetEgress];
    let more = turned.keys().filter(|knob| !always.contains(knob));
    let mut found = Vec::new();
    for knob in always.iter().chain(more).copied() {
        let Ok(mechanism) = Mechanism::of(target, knob) else { continue };
        let mut in_force = match mechanism.read(pacing, knob) {
            // The rest is told all the same.
            Err(error) if error.is_of_a_card() => error.to_string(),
            value => value?.to_string(),
        };
        let pace = pacing.pace(target.slot);
        if knob == Knob::NetEgress && pace.mode == PACE_ON {
            let active = pace.active.max(pace.active_before.into());
            let share = BitsPerSec(pace::share(pace.rate, pace.gain.into(), pace.aim.into(), active) * 8);
            in_force = format!("{in_force}, {active} active sockets at {share}");
            if let Some(terms) = pacing.terms(target.slot) {
                let guarantee = match terms.guarantee {
                    0 => String::new(),
                    bytes => format!("{} in any case and ", BitsPerSec(bytes * 8)),
                };
                let granted = BitsPerSec(pace.rate * 8);
                in_force +=
                    &format!("; of the node's {guarantee}a weight of {}: now {granted}", terms.weight);
            }
            if active * pace::SHARE_MIN > pace.rate {
                in_force += " (the least that keeps a socket alive: together they exceed the limit)";
            }
        }
        if knob == Knob::NetIngress
            && let Some(ClassState { dropped, waiting, .. }) = pacing.ingress(target.slot)?
        {
            let device = pacing.ingress_device();
            in_force += &format!(
                " in a queue of {device}: {} wait, {dropped} buffers dropped",
                Bytes(waiting.into())
            );
        }
        if knob == Knob::GpuCards
            && let Refused { count: 1.., .. } = pacing.refused(target.slot)
        {
            let Refused { count, card } = pacing.refused(target.slot);
            in_force += &format!("; {count} opens of others refused, the last of card {card}");
        }
        found.push(Enforcement {
            resource: knob.to_string(),
            mechanism: mechanism.name(knob).into(),
            in_force,
        });
    }
    Ok(found)
}

/// Memory in use, where a controller says so.
pub fn memory_in_use(target: &Target) -> Result<Option<Bytes>, ActuateError> {
    match Mechanism::of(target, Knob::Memory) {
        Ok(Mechanism::Cgroup(cgroup)) => Ok(Some(cgroup.get(memory::CURRENT)?)),
        Ok(Mechanism::V1(group)) => Ok(Some(group.get(v1::MEMORY_USAGE)?)),
        _ => Ok(None),
    }
}

/// The most memory that was ever in use, where the kernel counts it; else what is in use.
pub fn memory_peak(target: &Target) -> Result<Option<Bytes>, ActuateError> {
    let peak = match Mechanism::of(target, Knob::Memory) {
        Ok(Mechanism::Cgroup(cgroup)) => cgroup.find(memory::PEAK)?,
        Ok(Mechanism::V1(group)) => group.find(v1::MEMORY_MAX_USAGE)?,
        _ => None,
    };
    match peak {
        None => memory_in_use(target),
        peak => Ok(peak),
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::units::{BytesPerSec, Iops};

    use super::*;
    use crate::kernel::cgroup::block::IoLimits;

    #[test]
    fn what_was_turned_stands_at_its_limit_or_at_what_was_decided_or_as_it_was() {
        let memory = |bytes| Value::Memory(Limit::At(Bytes(bytes)));
        let weight = Value::Weight(Weight::DEFAULT);
        let limits = Limits { cpu: Limit::At(Millicores(500)), ..Limits::default() };
        let baseline = Values::from([
            (Knob::Cpu, weight),
            (Knob::CpuWeight, weight),
            (Knob::MemoryHigh, memory(1)),
            (Knob::MemoryLow, memory(2)),
            (Knob::NetEgress, weight),
        ]);
        let standing = Values::from([(Knob::MemoryLow, memory(3)), (Knob::IoWeight, weight)]);
        let expected = [
            Wish::Cpu(limits.cpu),
            Wish::Exactly(Knob::CpuWeight, weight),
            Wish::Exactly(Knob::MemoryHigh, memory(1)),
            Wish::Exactly(Knob::MemoryLow, memory(3)),
            Wish::NetEgress(Limit::Unlimited),
        ];
        assert_eq!(decided(&limits, &standing, &baseline), expected);
        let of_memory = Values::from([(Knob::Memory, memory(4))]);
        let noted = decided(&Limits::default(), &of_memory, &of_memory);
        assert_eq!(noted, [Wish::Exactly(Knob::Memory, memory(4))]);
        let limited = Limits { memory: Limit::At(Bytes(5)), ..Limits::default() };
        assert_eq!(decided(&limited, &of_memory, &of_memory), [Wish::Memory(Limit::At(Bytes(5)))]);
        let disk = Knob::IoMax(BlockDevice { major: 8, minor: 0 });
        let of_disk = Values::from([(disk, Value::Io(IoLimits::default()))]);
        let back = Wish::Exactly(disk, Value::Io(IoLimits::default()));
        assert_eq!(decided(&limits, &Values::new(), &of_disk), [back]);
        let capped = Limits { storage_io: Limit::At(Iops(100)), ..limits };
        let own = IoLimits { read: Limit::At(BytesPerSec(5)), ..IoLimits::default() };
        let of_disk = Values::from([(disk, Value::Io(own))]);
        let bytes = Wish::IoBytes(BlockDevice { major: 8, minor: 0 }, [own.read, own.write]);
        assert_eq!(decided(&capped, &Values::new(), &of_disk), [bytes]);
        let heavy = Limits { cpu_weight: Some(Weight::MAX), ..limits };
        assert_eq!(decided(&heavy, &Values::new(), &baseline)[1], Wish::CpuWeight(Weight::MAX));
    }
}
