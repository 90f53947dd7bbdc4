//! The one executor: it alone changes a limit.
//!
//! A change is planned as actions that carry what was there before; they are executed in order,
//! each is read back, and when one fails those before it are undone in reverse.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use shaper_common::{abi::PACE_ON, pace};
use shaper_core::{
    limits::{Limit, Limits, LimitsChange},
    task::Enforcement,
    units::{BitsPerSec, Bytes, Millicores, Weight},
};

use crate::kernel::{
    bpf::{Bpf, BpfError},
    cgroup::{
        Cgroup, CgroupError, Contents, Malformed, Setting,
        cpu::{self, CpuMax, CpuWeight},
        memory,
    },
    v1::{PERIOD_US, V1Error, V1Group, shares_of_weight},
};

/// What can be turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Knob {
    /// CPU time per time.
    Cpu,
    /// Share of a contended CPU.
    CpuWeight,
    /// Memory.
    Memory,
    /// Sent on the wire.
    NetEgress,
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Knob::Cpu => "cpu",
            Knob::CpuWeight => "cpu_weight",
            Knob::Memory => "memory",
            Knob::NetEgress => "net_egress",
        })
    }
}

/// Values of knobs as the kernel writes them, to be written back as they are.
pub type Raw = BTreeMap<Knob, String>;

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
    /// Its slot in the kernel programs' tables.
    pub slot: u32,
    /// Whether anything has run in it that may have opened a socket.
    pub has_sockets: bool,
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
        wrote: String,
        /// What is there.
        reads: String,
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
    /// What is in the ledger is not a value of its knob.
    #[error("the ledger holds {0}; the agent that wrote it may have been a newer one")]
    Ledger(Malformed),
    /// A v2 file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A v1 file.
    #[error(transparent)]
    V1(#[from] V1Error),
    /// A map.
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

/// One step, with its undo.
#[derive(Debug, PartialEq, Eq)]
struct Action {
    knob: Knob,
    before: String,
    after: String,
}

/// How a knob is turned for a task.
enum Mechanism<'a> {
    Cgroup(&'a Cgroup),
    V1Cpu(&'a V1Group),
    V1Memory(&'a V1Group),
    Pacing,
}

impl Mechanism<'_> {
    fn name(&self, knob: Knob) -> &'static str {
        match (self, knob) {
            (Mechanism::Cgroup(_), Knob::CpuWeight) => cpu::WEIGHT.name(),
            (Mechanism::Cgroup(_), Knob::Memory) => memory::MAX.name(),
            (Mechanism::Cgroup(_), _) => cpu::MAX.name(),
            (Mechanism::V1Cpu(_), Knob::CpuWeight) => "v1 cpu.shares",
            (Mechanism::V1Cpu(_), _) => "v1 cpu.cfs_quota_us",
            (Mechanism::V1Memory(_), _) => "v1 memory.limit_in_bytes",
            (Mechanism::Pacing, _) => "tcp-pacing",
        }
    }
}

/// Adds to the ledger what each knob holds that `change` would turn and that was not turned before.
pub fn note_baseline(
    target: &Target,
    bpf: &Bpf,
    change: &LimitsChange,
    ledger: &mut Raw,
) -> Result<(), ActuateError> {
    for Action { knob, before, .. } in plan(target, bpf, change)? {
        ledger.entry(knob).or_insert(before);
    }
    Ok(())
}

/// Changes limits of a task, all or none.
pub fn apply(target: &Target, bpf: &mut Bpf, change: &LimitsChange) -> Result<(), ActuateError> {
    let actions = plan(target, bpf, change)?;
    execute(target, bpf, &actions)
}

/// The change that brings a task from whatever is in force to `limits`: a knob that is in the ledger was
/// turned, so no limit means that it is lifted.
pub fn whole_change(limits: &Limits, ledger: &Raw) -> LimitsChange {
    let mut change = limits.as_change();
    if ledger.contains_key(&Knob::Cpu) {
        change.cpu = Some(limits.cpu);
    }
    if ledger.contains_key(&Knob::Memory) {
        change.memory = Some(limits.memory);
    }
    if ledger.contains_key(&Knob::NetEgress) {
        change.net_egress = Some(limits.net_egress);
    }
    change
}

/// Puts values back that were read before.
pub fn restore(target: &Target, bpf: &mut Bpf, values: &Raw) -> Result<(), ActuateError> {
    for (knob, value) in values.iter().rev() {
        if read(target, bpf, *knob)? != *value {
            write(target, bpf, *knob, value)?;
        }
    }
    Ok(())
}

/// What holds each limit that is in force, as read back now.
pub fn enforcement(target: &Target, bpf: &Bpf) -> Result<Vec<Enforcement>, ActuateError> {
    let mut found = Vec::new();
    for knob in [Knob::Cpu, Knob::CpuWeight, Knob::Memory, Knob::NetEgress] {
        let Ok(mechanism) = mechanism(target, knob) else { continue };
        let mut in_force = shown(knob, &read(target, bpf, knob)?);
        let pace = bpf.pacing(target.slot);
        if knob == Knob::NetEgress && pace.mode == PACE_ON {
            let active = pace.active.max(pace.active_before.into());
            let share = BitsPerSec(pace::share(pace.rate, pace.gain.into(), pace.aim.into(), active) * 8);
            in_force = format!("{in_force}, {active} active sockets at {share}");
            if active * pace::SHARE_MIN > pace.rate {
                in_force += " (the least that keeps a socket alive: together they exceed the limit)";
            }
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
    match mechanism(target, Knob::Memory) {
        Ok(Mechanism::Cgroup(cgroup)) => Ok(Some(cgroup.get(memory::CURRENT)?)),
        Ok(Mechanism::V1Memory(group)) => Ok(Some(Bytes(group.memory_usage()?))),
        _ => Ok(None),
    }
}

/// The most memory that was ever in use, where the kernel counts it; else what is in use.
pub fn memory_peak(target: &Target) -> Result<Option<Bytes>, ActuateError> {
    match mechanism(target, Knob::Memory) {
        Ok(Mechanism::Cgroup(cgroup)) if cgroup.has(memory::PEAK) => Ok(Some(cgroup.get(memory::PEAK)?)),
        Ok(Mechanism::V1Memory(group)) => Ok(Some(Bytes(group.memory_peak()?))),
        _ => memory_in_use(target),
    }
}

fn mechanism(target: &Target, knob: Knob) -> Result<Mechanism<'_>, ActuateError> {
    let (has_file, v1) = match knob {
        Knob::NetEgress => return Ok(Mechanism::Pacing),
        Knob::Cpu => (target.cgroup.has(cpu::MAX), target.v1_cpu.as_ref().map(Mechanism::V1Cpu)),
        Knob::CpuWeight => (target.cgroup.has(cpu::WEIGHT), target.v1_cpu.as_ref().map(Mechanism::V1Cpu)),
        Knob::Memory => (target.cgroup.has(memory::MAX), target.v1_memory.as_ref().map(Mechanism::V1Memory)),
    };
    if has_file {
        return Ok(Mechanism::Cgroup(&target.cgroup));
    }
    v1.ok_or(ActuateError::NoMechanism {
        knob,
        reason: "no controller of this host reaches this cgroup (see `shaper doctor`); on a hybrid host only \
                 launched tasks have one: start it with `shaper run`",
    })
}

fn plan(target: &Target, bpf: &Bpf, change: &LimitsChange) -> Result<Vec<Action>, ActuateError> {
    let LimitsChange { cpu, cpu_weight, memory, net_egress } = *change;
    let mut actions = Vec::new();
    let mut add = |knob, encode: &dyn Fn(&Mechanism<'_>) -> String| -> Result<(), ActuateError> {
        let after = encode(&mechanism(target, knob)?);
        let before = read(target, bpf, knob)?;
        if before != after {
            actions.push(Action { knob, before, after });
        }
        Ok(())
    };
    if let Some(weight) = cpu_weight {
        add(Knob::CpuWeight, &|mechanism| encode_weight(weight, mechanism))?;
    }
    if let Some(limit) = cpu {
        add(Knob::Cpu, &|mechanism| encode_cpu(limit, mechanism))?;
    }
    if let Some(limit) = memory {
        if let (Limit::At(wanted), Some(used)) = (limit, memory_in_use(target)?)
            && wanted < used
        {
            return Err(ActuateError::BelowUse { wanted, used });
        }
        add(Knob::Memory, &|mechanism| encode_memory(limit, mechanism))?;
    }
    if let Some(limit) = net_egress {
        add(Knob::NetEgress, &|_| encode_bandwidth(limit))?;
    }
    Ok(actions)
}

fn execute(target: &Target, bpf: &mut Bpf, actions: &[Action]) -> Result<(), ActuateError> {
    for (index, action) in actions.iter().enumerate() {
        let Err(first) = write(target, bpf, action.knob, &action.after) else { continue };
        // The one that failed is undone as well: it may have been written and misread. All are tried.
        let mut error = first;
        for done in actions[..=index].iter().rev() {
            if let Err(undo) = write(target, bpf, done.knob, &done.before) {
                error = ActuateError::Undo { first: Box::new(error), knob: done.knob, undo: Box::new(undo) };
            }
        }
        return Err(error);
    }
    Ok(())
}

fn encode_cpu(limit: Limit<Millicores>, mechanism: &Mechanism<'_>) -> String {
    let max = CpuMax::of(limit);
    match mechanism {
        Mechanism::V1Cpu(_) => max.quota.at().map_or("-1".into(), |quota| quota.text()),
        _ => max.text(),
    }
}

fn encode_weight(weight: Weight, mechanism: &Mechanism<'_>) -> String {
    match mechanism {
        Mechanism::V1Cpu(_) => shares_of_weight(weight.get()).to_string(),
        _ => weight.to_string(),
    }
}

/// The kernel keeps whole pages.
fn encode_memory(limit: Limit<Bytes>, mechanism: &Mechanism<'_>) -> String {
    let page = rustix::param::page_size() as u64;
    let bytes = limit.at().map(|Bytes(bytes)| bytes / page * page);
    let unlimited = if matches!(mechanism, Mechanism::V1Memory(_)) { "-1" } else { "max" };
    bytes.map_or(unlimited.into(), |bytes| bytes.to_string())
}

const NOT_PACED: &str = "off";

fn encode_bandwidth(limit: Limit<BitsPerSec>) -> String {
    limit.at().map_or(NOT_PACED.into(), |bits| bits.bytes_per_sec().to_string())
}

fn read(target: &Target, bpf: &Bpf, knob: Knob) -> Result<String, ActuateError> {
    Ok(match (mechanism(target, knob)?, knob) {
        (Mechanism::Cgroup(cgroup), Knob::CpuWeight) => match cgroup.get(cpu::WEIGHT)? {
            CpuWeight::At(weight) => weight.text(),
            CpuWeight::Idle => "0".into(),
        },
        (Mechanism::Cgroup(cgroup), Knob::Memory) => cgroup.get(memory::MAX)?.text(),
        (Mechanism::Cgroup(cgroup), _) => cgroup.get(cpu::MAX)?.text(),
        (Mechanism::V1Cpu(group), Knob::CpuWeight) => group.cpu_shares()?.to_string(),
        (Mechanism::V1Cpu(group), _) => group.cpu_quota()?.to_string(),
        (Mechanism::V1Memory(group), _) => match group.memory_limit()? {
            // v1 shows "no limit" as the largest number of pages.
            limit if !(0..i64::MAX / 2).contains(&limit) => "-1".into(),
            limit => limit.to_string(),
        },
        (Mechanism::Pacing, _) => {
            let pace = bpf.pacing(target.slot);
            if pace.mode == PACE_ON { pace.rate.to_string() } else { NOT_PACED.into() }
        }
    })
}

/// Writes a value and reads it back.
fn write(target: &Target, bpf: &mut Bpf, knob: Knob, value: &str) -> Result<(), ActuateError> {
    let number = || value.parse::<i64>().unwrap_or(-1);
    match (mechanism(target, knob)?, knob) {
        (Mechanism::Cgroup(cgroup), Knob::CpuWeight) => cgroup.set(cpu::WEIGHT, &parse(value)?)?,
        (Mechanism::Cgroup(cgroup), Knob::Memory) => cgroup.set(memory::MAX, &parse(value)?)?,
        (Mechanism::Cgroup(cgroup), _) => cgroup.set(cpu::MAX, &parse(value)?)?,
        (Mechanism::V1Cpu(group), Knob::CpuWeight) => group.set_cpu_shares(value.parse().unwrap_or(1024))?,
        (Mechanism::V1Cpu(group), _) => group.set_cpu_quota(number())?,
        (Mechanism::V1Memory(group), _) => group.set_memory_limit(number())?,
        (Mechanism::Pacing, _) => {
            let ceiling = value.parse().ok().map(|bytes: u64| BitsPerSec(bytes * 8));
            bpf.limit_egress(target.slot, ceiling, target.has_sockets)?;
        }
    }
    let reads = read(target, bpf, knob)?;
    if reads == value { Ok(()) } else { Err(ActuateError::ReadBack { knob, wrote: value.into(), reads }) }
}

fn parse<T: Contents>(value: &str) -> Result<T, ActuateError> {
    T::from_text(value).map_err(ActuateError::Ledger)
}

/// A raw value for people.
fn shown(knob: Knob, raw: &str) -> String {
    let number = raw.split(' ').next().and_then(|text| text.parse::<u64>().ok());
    let Some(number) = number else {
        return match knob {
            Knob::NetEgress => "max".into(),
            _ if raw == "-1" || raw.starts_with("max") => "max".into(),
            _ => raw.into(),
        };
    };
    match knob {
        Knob::Cpu => {
            let period = raw.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(PERIOD_US);
            format!("{} cores", Millicores(number * 1000 / period))
        }
        Knob::CpuWeight => raw.into(),
        Knob::Memory => Bytes(number).to_string(),
        Knob::NetEgress => BitsPerSec(number * 8).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_values_are_shown_for_people() {
        assert_eq!(shown(Knob::Cpu, "50000 100000"), "0.5 cores");
        assert_eq!(shown(Knob::Cpu, "20000 50000"), "0.4 cores");
        assert_eq!(shown(Knob::Cpu, "max 100000"), "max");
        assert_eq!(shown(Knob::Cpu, "-1"), "max");
        assert_eq!(shown(Knob::Memory, "1073741824"), "1 GiB");
        assert_eq!(shown(Knob::NetEgress, "12500000"), "100 Mbit/s");
        assert_eq!(shown(Knob::NetEgress, "off"), "max");
        assert_eq!(shown(Knob::CpuWeight, "300"), "300");
    }

    #[test]
    fn limits_are_encoded_as_the_kernel_shows_them() {
        assert_eq!(encode_cpu(Limit::At(Millicores(250)), &Mechanism::Pacing), "25000 100000");
        assert_eq!(encode_cpu(Limit::Unlimited, &Mechanism::Pacing), "max 100000");
        assert_eq!(encode_memory(Limit::At(Bytes((1 << 20) + 5)), &Mechanism::Pacing), "1048576");
        assert_eq!(encode_bandwidth(Limit::At(BitsPerSec(8_000_007))), "1000000");
        assert_eq!(shares_of_weight(100), 1024);
        assert_eq!(shares_of_weight(1), 10);
    }
}
