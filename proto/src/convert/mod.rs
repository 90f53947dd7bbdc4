//! Wire types to domain types and back. What comes from the wire is checked here, once.

mod broker;
pub mod gpu;
mod ledger;
mod memory;
mod shrink;
mod snapshot;

pub use self::broker::{image, priority_or_medium};

use shaper_core::{
    doctor::{Availability, Report, Rung},
    id::{ExecutionId, InvalidTaskId, TaskId},
    limits::{Limit, Limits, LimitsChange},
    task::{
        Enforcement, ExitStatus, InvalidWorkload, Origin, Owner, Phase, TaskStatus, Traffic, Usage, Workload,
    },
    units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Weight},
};

use crate::v1;

/// Why a message was refused; names the field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    /// A quantity outside its range.
    #[error("field `{field}` is {value}, but must be {expected}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What it held.
        value: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// A text or a list that is not what it has to be.
    #[error("field `{field}` must be {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What it has to be.
        expected: &'static str,
    },
    /// A task id that is not one.
    #[error(transparent)]
    TaskId(#[from] InvalidTaskId),
    /// What a task is an execution of.
    #[error(transparent)]
    Workload(#[from] InvalidWorkload),
}

/// One run of a task.
pub fn execution(task_id: &str, attempt: u32) -> Result<ExecutionId, WireError> {
    if attempt == 0 {
        return Err(WireError::Invalid { field: "attempt", expected: "from 1" });
    }
    Ok(ExecutionId { task: task_id.parse()?, attempt })
}

fn cpu(value: u64) -> Result<Millicores, WireError> {
    let milli = Millicores(value);
    if milli < Millicores::MIN || value > 1_000_000_000 {
        return Err(WireError::OutOfRange {
            field: "cpu_millicores",
            value,
            expected: "from 10 (0.01 cores) to 1000000000",
        });
    }
    Ok(milli)
}

fn memory(field: &'static str, value: u64) -> Result<Bytes, WireError> {
    if value == 0 || value > 1 << 60 {
        return Err(WireError::OutOfRange { field, value, expected: "from 1 to 2^60" });
    }
    Ok(Bytes(value))
}

fn bandwidth(field: &'static str, value: u64) -> Result<BitsPerSec, WireError> {
    let bits = BitsPerSec(value);
    if bits < BitsPerSec::MIN || bits > BitsPerSec::MAX {
        return Err(WireError::OutOfRange { field, value, expected: "from 128000 to 400000000000" });
    }
    Ok(bits)
}

fn operations(value: u64) -> Result<Iops, WireError> {
    let operations = Iops(value);
    if value == 0 || operations > Iops::MAX {
        return Err(WireError::OutOfRange { field: "storage_iops", value, expected: "from 1 to 1000000000" });
    }
    Ok(operations)
}

fn latency(value: u64) -> Result<Micros, WireError> {
    let latency = Micros(value);
    if latency < Micros::LATENCY_MIN || latency > Micros::LATENCY_MAX {
        let field = "storage_io_latency_us";
        return Err(WireError::OutOfRange { field, value, expected: "from 100 to 500000" });
    }
    Ok(latency)
}

fn weight(field: &'static str, value: u32) -> Result<Weight, WireError> {
    Weight::new(value).ok_or(WireError::OutOfRange {
        field,
        value: value.into(),
        expected: "from 1 to 10000",
    })
}

fn limit<T>(
    value: Option<u64>,
    read: impl FnOnce(u64) -> Result<T, WireError>,
) -> Result<Limit<T>, WireError> {
    value.map_or(Ok(Limit::Unlimited), |value| read(value).map(Limit::At))
}

fn ceiling<T>(
    field: &'static str,
    ceiling: Option<v1::Ceiling>,
    read: impl FnOnce(u64) -> Result<T, WireError>,
) -> Result<Option<Limit<T>>, WireError> {
    let Some(ceiling) = ceiling else { return Ok(None) };
    match ceiling.kind {
        Some(v1::ceiling::Kind::Unlimited(true)) => Ok(Some(Limit::Unlimited)),
        Some(v1::ceiling::Kind::At(value)) => Ok(Some(Limit::At(read(value)?))),
        Some(v1::ceiling::Kind::Unlimited(false)) | None => Err(WireError::Missing(field)),
    }
}

/// Nothing is a guarantee, too.
fn guarantee(wire: Option<u64>) -> Result<Option<BitsPerSec>, WireError> {
    match wire {
        None | Some(0) => Ok(wire.map(BitsPerSec)),
        Some(bits) => bandwidth("net_egress_guarantee_bps", bits).map(Some),
    }
}

fn to_ceiling<T: Copy>(limit: Option<Limit<T>>, value: impl FnOnce(T) -> u64) -> Option<v1::Ceiling> {
    let kind = match limit? {
        Limit::Unlimited => v1::ceiling::Kind::Unlimited(true),
        Limit::At(at) => v1::ceiling::Kind::At(value(at)),
    };
    Some(v1::Ceiling { kind: Some(kind) })
}

impl TryFrom<v1::Limits> for Limits {
    type Error = WireError;

    fn try_from(wire: v1::Limits) -> Result<Limits, WireError> {
        let v1::Limits {
            cpu_millicores,
            cpu_weight,
            memory_bytes,
            net_egress_bps,
            storage_iops,
            storage_io_weight,
            storage_io_latency_us,
            reclaim_idle,
            net_egress_guarantee_bps,
            net_egress_weight,
            net_ingress_bps,
            gpu_cards,
            gpu_memory_bytes,
            gpu_power_milliwatts,
        } = wire;
        Ok(Limits {
            cpu: limit(cpu_millicores, cpu)?,
            cpu_weight: cpu_weight.map(|it| weight("cpu_weight", it)).transpose()?,
            memory: limit(memory_bytes, |bytes| memory("memory_bytes", bytes))?,
            net_egress: limit(net_egress_bps, |bits| bandwidth("net_egress_bps", bits))?,
            storage_io: limit(storage_iops, operations)?,
            storage_io_weight: storage_io_weight.map(|it| weight("storage_io_weight", it)).transpose()?,
            storage_io_latency: limit(storage_io_latency_us, latency)?,
            reclaim_idle,
            net_egress_guarantee: guarantee(net_egress_guarantee_bps)?,
            net_egress_weight: net_egress_weight.map(|it| weight("net_egress_weight", it)).transpose()?,
            net_ingress: limit(net_ingress_bps, |bits| bandwidth("net_ingress_bps", bits))?,
            gpu_cards: gpu::cards(gpu_cards)?,
            gpu_memory: limit(gpu_memory_bytes, |bytes| memory("gpu_memory_bytes", bytes))?,
            gpu_power: limit(gpu_power_milliwatts, gpu::power)?,
        })
    }
}

impl From<Limits> for v1::Limits {
    fn from(limits: Limits) -> v1::Limits {
        let Limits {
            cpu,
            cpu_weight,
            memory,
            net_egress,
            storage_io,
            storage_io_weight,
            storage_io_latency,
            reclaim_idle,
            net_egress_guarantee,
            net_egress_weight,
            net_ingress,
            gpu_cards,
            gpu_memory,
            gpu_power,
        } = limits;
        v1::Limits {
            cpu_millicores: cpu.at().map(|cpu| cpu.0),
            cpu_weight: cpu_weight.map(Weight::get),
            memory_bytes: memory.at().map(|memory| memory.0),
            net_egress_bps: net_egress.at().map(|bandwidth| bandwidth.0),
            storage_iops: storage_io.at().map(|operations| operations.0),
            storage_io_weight: storage_io_weight.map(Weight::get),
            storage_io_latency_us: storage_io_latency.at().map(|latency| latency.0),
            reclaim_idle,
            net_egress_guarantee_bps: net_egress_guarantee.map(|it| it.0),
            net_egress_weight: net_egress_weight.map(Weight::get),
            net_ingress_bps: net_ingress.at().map(|bandwidth| bandwidth.0),
            gpu_cards: gpu_cards.map(Into::into),
            gpu_memory_bytes: gpu_memory.at().map(|memory| memory.0),
            gpu_power_milliwatts: gpu_power.at().map(|power| power.0),
        }
    }
}

impl TryFrom<v1::LimitsChange> for LimitsChange {
    type Error = WireError;

    fn try_from(wire: v1::LimitsChange) -> Result<LimitsChange, WireError> {
        let v1::LimitsChange {
            cpu_millicores,
            cpu_weight,
            memory_bytes,
            net_egress_bps,
            storage_iops,
            storage_io_weight,
            storage_io_latency_us,
            reclaim_idle,
            net_egress_guarantee_bps,
            net_egress_weight,
            net_ingress_bps,
            gpu_cards,
            gpu_memory_bytes,
            gpu_power_milliwatts,
        } = wire;
        Ok(LimitsChange {
            cpu: ceiling("cpu_millicores", cpu_millicores, cpu)?,
            cpu_weight: cpu_weight.map(|it| weight("cpu_weight", it)).transpose()?,
            memory: ceiling("memory_bytes", memory_bytes, |bytes| memory("memory_bytes", bytes))?,
            net_egress: ceiling("net_egress_bps", net_egress_bps, |bits| bandwidth("net_egress_bps", bits))?,
            storage_io: ceiling("storage_iops", storage_iops, operations)?,
            storage_io_weight: storage_io_weight.map(|it| weight("storage_io_weight", it)).transpose()?,
            storage_io_latency: ceiling("storage_io_latency_us", storage_io_latency_us, latency)?,
            reclaim_idle,
            net_egress_guarantee: guarantee(net_egress_guarantee_bps)?,
            net_egress_weight: net_egress_weight.map(|it| weight("net_egress_weight", it)).transpose()?,
            net_ingress: ceiling("net_ingress_bps", net_ingress_bps, |bits| {
                bandwidth("net_ingress_bps", bits)
            })?,
            gpu_cards: gpu::cards(gpu_cards)?,
            gpu_memory: ceiling("gpu_memory_bytes", gpu_memory_bytes, |bytes| {
                memory("gpu_memory_bytes", bytes)
            })?,
            gpu_power: ceiling("gpu_power_milliwatts", gpu_power_milliwatts, gpu::power)?,
        })
    }
}

impl From<LimitsChange> for v1::LimitsChange {
    fn from(change: LimitsChange) -> v1::LimitsChange {
        let LimitsChange {
            cpu,
            cpu_weight,
            memory,
            net_egress,
            storage_io,
            storage_io_weight,
            storage_io_latency,
            reclaim_idle,
            net_egress_guarantee,
            net_egress_weight,
            net_ingress,
            gpu_cards,
            gpu_memory,
            gpu_power,
        } = change;
        v1::LimitsChange {
            cpu_millicores: to_ceiling(cpu, |cpu| cpu.0),
            cpu_weight: cpu_weight.map(Weight::get),
            memory_bytes: to_ceiling(memory, |memory| memory.0),
            net_egress_bps: to_ceiling(net_egress, |bandwidth| bandwidth.0),
            storage_iops: to_ceiling(storage_io, |operations| operations.0),
            storage_io_weight: storage_io_weight.map(Weight::get),
            storage_io_latency_us: to_ceiling(storage_io_latency, |latency| latency.0),
            reclaim_idle,
            net_egress_guarantee_bps: net_egress_guarantee.map(|it| it.0),
            net_egress_weight: net_egress_weight.map(Weight::get),
            net_ingress_bps: to_ceiling(net_ingress, |bandwidth| bandwidth.0),
            gpu_cards: gpu_cards.map(Into::into),
            gpu_memory_bytes: to_ceiling(gpu_memory, |memory| memory.0),
            gpu_power_milliwatts: to_ceiling(gpu_power, |power| power.0),
        }
    }
}

impl From<Owner> for v1::Credentials {
    fn from(owner: Owner) -> v1::Credentials {
        v1::Credentials { uid: owner.uid, gid: owner.gid, groups: Vec::new() }
    }
}

fn owner(field: &'static str, wire: Option<v1::Credentials>) -> Result<Owner, WireError> {
    let v1::Credentials { uid, gid, groups: _ } = wire.ok_or(WireError::Missing(field))?;
    Ok(Owner { uid, gid })
}

impl From<Traffic> for v1::Traffic {
    fn from(traffic: Traffic) -> v1::Traffic {
        let Traffic { bytes, packets } = traffic;
        v1::Traffic { bytes, packets }
    }
}

fn traffic(wire: Option<v1::Traffic>) -> Traffic {
    wire.map_or_else(Traffic::default, |v1::Traffic { bytes, packets }| Traffic { bytes, packets })
}

impl From<Usage> for v1::Usage {
    fn from(usage: Usage) -> v1::Usage {
        let Usage {
            at_monotonic_ns,
            cpu_time_ns,
            egress,
            ingress,
            uplink_egress,
            memory_bytes,
            cpu_now_millicores,
            egress_now_bps,
            ingress_now_bps,
            egress_granted_bps,
            cpu_throttled_ns,
        } = usage;
        v1::Usage {
            at_monotonic_ns,
            cpu_time_ns,
            egress: Some(egress.into()),
            ingress: Some(ingress.into()),
            uplink_egress: Some(uplink_egress.into()),
            memory_bytes,
            cpu_now_millicores,
            egress_now_bps,
            ingress_now_bps,
            egress_granted_bps,
            cpu_throttled_ns,
        }
    }
}

impl From<v1::Usage> for Usage {
    fn from(wire: v1::Usage) -> Usage {
        Usage {
            at_monotonic_ns: wire.at_monotonic_ns,
            cpu_time_ns: wire.cpu_time_ns,
            egress: traffic(wire.egress),
            ingress: traffic(wire.ingress),
            uplink_egress: traffic(wire.uplink_egress),
            memory_bytes: wire.memory_bytes,
            cpu_now_millicores: wire.cpu_now_millicores,
            egress_now_bps: wire.egress_now_bps,
            ingress_now_bps: wire.ingress_now_bps,
            egress_granted_bps: wire.egress_granted_bps,
            cpu_throttled_ns: wire.cpu_throttled_ns,
        }
    }
}

/// How a task ended, as the wire has it; `None` while it runs.
pub fn exit(phase: &Phase) -> Option<v1::Exit> {
    let Phase::Ended { status, at } = phase else { return None };
    let status = match status.clone() {
        ExitStatus::Code(code) => v1::exit::Status::Code(code),
        ExitStatus::Signal(signal) => v1::exit::Status::Signal(signal),
        ExitStatus::NotStarted { stage, error, code } => {
            v1::exit::Status::NotStarted(v1::exit::NotStarted { stage, error, code })
        }
        ExitStatus::Unknown => v1::exit::Status::Unknown(true),
    };
    Some(v1::Exit { status: Some(status), unix_nanos: *at })
}

impl TryFrom<v1::Exit> for Phase {
    type Error = WireError;

    fn try_from(wire: v1::Exit) -> Result<Phase, WireError> {
        let v1::Exit { status, unix_nanos } = wire;
        let status = match status.ok_or(WireError::Missing("exit.status"))? {
            v1::exit::Status::Code(code) => ExitStatus::Code(code),
            v1::exit::Status::Signal(signal) => ExitStatus::Signal(signal),
            v1::exit::Status::NotStarted(v1::exit::NotStarted { stage, error, code }) => {
                ExitStatus::NotStarted { stage, error, code }
            }
            v1::exit::Status::Unknown(_) => ExitStatus::Unknown,
        };
        Ok(Phase::Ended { status, at: unix_nanos })
    }
}

impl From<Workload> for v1::Workload {
    fn from(Workload { name, namespace, labels }: Workload) -> v1::Workload {
        v1::Workload { name: name.into(), namespace: namespace.into(), labels: labels.into_iter().collect() }
    }
}

impl TryFrom<v1::Workload> for Workload {
    type Error = WireError;

    fn try_from(wire: v1::Workload) -> Result<Workload, WireError> {
        let v1::Workload { name, namespace, labels } = wire;
        Ok(Workload::new(&name, &namespace, labels.into_iter().collect())?)
    }
}

impl From<TaskStatus> for v1::Task {
    fn from(task: TaskStatus) -> v1::Task {
        let TaskStatus {
            task_id,
            attempt,
            owner,
            runs_as,
            origin,
            workload,
            phase,
            pid,
            cgroup,
            created_at,
            limits,
            enforcement,
            usage,
            shrink,
            idle,
            oom_kill,
            notes,
            adopted_by,
        } = task;
        let wire =
            |Enforcement { resource, mechanism, in_force }| v1::Enforcement { resource, mechanism, in_force };
        v1::Task {
            task_id: task_id.into(),
            attempt,
            owner: Some(owner.into()),
            runs_as: Some(runs_as.into()),
            entered: matches!(origin, Origin::Entered { .. }),
            command: match origin {
                Origin::Launched { command } | Origin::Entered { command } => command,
                Origin::Adopted => Vec::new(),
            },
            workload: workload.map(Into::into),
            exit: exit(&phase),
            pid,
            cgroup,
            created_unix_nanos: created_at,
            limits: Some(limits.into()),
            enforcement: enforcement.into_iter().map(wire).collect(),
            usage: Some(usage.into()),
            shrink: shrink.map(Into::into),
            idle: idle.map(Into::into),
            oom_kill: oom_kill.map(Into::into),
            notes,
            adopted_by: adopted_by.map(String::from).unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Task> for TaskStatus {
    type Error = WireError;

    fn try_from(wire: v1::Task) -> Result<TaskStatus, WireError> {
        let domain =
            |v1::Enforcement { resource, mechanism, in_force }| Enforcement { resource, mechanism, in_force };
        Ok(TaskStatus {
            task_id: TaskId::try_from(wire.task_id)?,
            attempt: wire.attempt,
            owner: owner("owner", wire.owner)?,
            runs_as: owner("runs_as", wire.runs_as)?,
            origin: match (wire.entered, wire.command) {
                (true, command) => Origin::Entered { command },
                (false, command) if command.is_empty() => Origin::Adopted,
                (false, command) => Origin::Launched { command },
            },
            workload: wire.workload.map(TryInto::try_into).transpose()?,
            phase: wire.exit.map_or(Ok(Phase::Running), Phase::try_from)?,
            pid: wire.pid,
            cgroup: wire.cgroup,
            created_at: wire.created_unix_nanos,
            limits: wire.limits.ok_or(WireError::Missing("limits"))?.try_into()?,
            enforcement: wire.enforcement.into_iter().map(domain).collect(),
            usage: wire.usage.ok_or(WireError::Missing("usage"))?.into(),
            shrink: wire.shrink.map(TryInto::try_into).transpose()?,
            idle: wire.idle.map(TryInto::try_into).transpose()?,
            oom_kill: wire.oom_kill.map(Into::into),
            notes: wire.notes,
            adopted_by: Some(wire.adopted_by)
                .filter(|rule| !rule.is_empty())
                .map(TaskId::try_from)
                .transpose()?,
        })
    }
}

impl From<Report> for v1::DoctorReport {
    fn from(report: Report) -> v1::DoctorReport {
        use v1::doctor_report::{Rung as Wire, rung::Availability as WireAvailability};
        let Report { kernel, node, cgroups, cgroup_root, bpffs_dir, uplinks, gpus, rungs } = report;
        let wire = |Rung { feature, used_for, availability, degrades_to }| Wire {
            feature,
            used_for,
            availability: Some(match availability {
                Availability::Available => WireAvailability::Available(true),
                Availability::Missing { evidence } => WireAvailability::Missing(evidence),
                Availability::Unusable { reason } => WireAvailability::Unusable(reason),
            }),
            degrades_to,
        };
        let rungs = rungs.into_iter().map(wire).collect();
        v1::DoctorReport { kernel, node, cgroups, cgroup_root, bpffs_dir, uplinks, gpus, rungs }
    }
}

impl TryFrom<v1::DoctorReport> for Report {
    type Error = WireError;

    fn try_from(wire: v1::DoctorReport) -> Result<Report, WireError> {
        use v1::doctor_report::{Rung as Wire, rung::Availability as WireAvailability};
        let domain = |Wire { feature, used_for, availability, degrades_to }| {
            let availability = match availability.ok_or(WireError::Missing("rungs.availability"))? {
                WireAvailability::Available(_) => Availability::Available,
                WireAvailability::Missing(evidence) => Availability::Missing { evidence },
                WireAvailability::Unusable(reason) => Availability::Unusable { reason },
            };
            Ok(Rung { feature, used_for, availability, degrades_to })
        };
        let v1::DoctorReport { kernel, node, cgroups, cgroup_root, bpffs_dir, uplinks, gpus, rungs } = wire;
        let rungs = rungs.into_iter().map(domain).collect::<Result<_, WireError>>()?;
        Ok(Report { kernel, node, cgroups, cgroup_root, bpffs_dir, uplinks, gpus, rungs })
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::{gpu::CardSet, idle, task::OomKill, units::Milliwatts};

    use super::*;

    #[test]
    fn a_task_survives_the_wire() {
        let task = TaskStatus {
            task_id: "etl.load".parse().unwrap(),
            attempt: 2,
            owner: Owner { uid: 1000, gid: 100 },
            runs_as: Owner { uid: 65534, gid: 65534 },
            origin: Origin::Launched { command: vec!["sleep".into(), "1".into()] },
            workload: Some(
                Workload::new("etl.load", "batch", [("framework".into(), "ray".into())].into()).unwrap(),
            ),
            phase: Phase::Ended { status: ExitStatus::Signal(9), at: 5 },
            pid: None,
            cgroup: "/sys/fs/cgroup/shaper/etl.load.2".into(),
            created_at: 4,
            limits: Limits {
                cpu: Limit::At(Millicores(500)),
                cpu_weight: Weight::new(300),
                memory: Limit::Unlimited,
                net_egress: Limit::At(BitsPerSec(1_000_000)),
                storage_io: Limit::At(Iops(500)),
                storage_io_weight: Weight::new(200),
                storage_io_latency: Limit::At(Micros(5000)),
                reclaim_idle: Some(false),
                net_egress_guarantee: Some(BitsPerSec(500_000)),
                net_egress_weight: Weight::new(300),
                net_ingress: Limit::At(BitsPerSec(2_000_000)),
                gpu_cards: Some(CardSet::from_bits(5)),
                gpu_memory: Limit::At(Bytes(1 << 33)),
                gpu_power: Limit::At(Milliwatts(250_000)),
            },
            enforcement: vec![Enforcement {
                resource: "cpu".into(),
                mechanism: "cpu.max".into(),
                in_force: "0.5 cores".into(),
            }],
            usage: Usage { at_monotonic_ns: 7, cpu_time_ns: 1, memory_bytes: Some(3), ..Usage::default() },
            shrink: None,
            idle: Some(idle::Status {
                reclaimed: Bytes(9),
                refaulted: Bytes(8),
                is_cache_only: true,
                state: idle::State::Resting(idle::Why::Pressure { some_us: 7, window_us: 6 }),
            }),
            oom_kill: Some(OomKill { at: 1, limit: Limit::At(Bytes(2)), peak: Some(Bytes(3)), kills: 4 }),
            notes: vec!["note".into()],
            adopted_by: Some("web".parse().unwrap()),
        };
        assert_eq!(TaskStatus::try_from(v1::Task::from(task.clone())), Ok(task));
    }

    #[test]
    fn what_is_out_of_range_is_refused_with_its_field() {
        let limits = v1::Limits { cpu_millicores: Some(1), ..v1::Limits::default() };
        let error = Limits::try_from(limits).unwrap_err().to_string();
        assert_eq!(error, "field `cpu_millicores` is 1, but must be from 10 (0.01 cores) to 1000000000");
        let change = v1::LimitsChange {
            memory_bytes: Some(v1::Ceiling { kind: None }),
            ..v1::LimitsChange::default()
        };
        assert_eq!(LimitsChange::try_from(change), Err(WireError::Missing("memory_bytes")));
    }

    #[test]
    fn a_change_survives_the_wire() {
        let change = LimitsChange {
            cpu: Some(Limit::Unlimited),
            net_egress: Some(Limit::At(BitsPerSec(5_000_000))),
            storage_io: Some(Limit::Unlimited),
            storage_io_weight: Weight::new(300),
            storage_io_latency: Some(Limit::Unlimited),
            reclaim_idle: Some(true),
            net_egress_guarantee: Some(BitsPerSec(0)),
            net_egress_weight: Weight::new(300),
            net_ingress: Some(Limit::Unlimited),
            gpu_cards: Some(CardSet::NONE),
            gpu_memory: Some(Limit::At(Bytes(1 << 33))),
            gpu_power: Some(Limit::Unlimited),
            ..LimitsChange::default()
        };
        assert_eq!(LimitsChange::try_from(v1::LimitsChange::from(change)), Ok(change));
    }
}
