//! The broker's messages.

use std::collections::{BTreeMap, HashMap};

use shaper_core::{
    document::{MAX_RETRIES, MAX_RUNTIME_SECONDS, fits_label},
    gpu::CardRequest,
    id::TaskId,
    limits::Limits,
    policy::{NamePattern, PolicyFloors, PolicyLimits, Selector},
    spec::{
        Capacity, Credentials, Decision, DecisionKind, Demand, Image, NodeVerdict, OnNodeLost, Policy,
        Priority, Profile, TaskSpec,
    },
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

use super::{WireError, bandwidth, cpu, gpu, memory, operations};
use crate::v1;

pub(super) fn in_range(
    field: &'static str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
    expected: &'static str,
) -> Result<u64, WireError> {
    if range.contains(&value) { Ok(value) } else { Err(WireError::OutOfRange { field, value, expected }) }
}

fn invalid(field: &'static str, expected: &'static str) -> WireError {
    WireError::Invalid { field, expected }
}

/// A name that may become part of a path.
fn name(field: &'static str, name: String) -> Result<String, WireError> {
    TaskId::try_from(name)
        .map(String::from)
        .map_err(|_| invalid(field, "a name: 1 to 63 letters, digits, `-`, `_` and `.`"))
}

/// The priority that is meant: medium where none is said.
pub fn priority_or_medium(field: &'static str, wire: i32) -> Result<Priority, WireError> {
    if wire == v1::Priority::Unspecified as i32 { Ok(Priority::Medium) } else { priority(field, wire) }
}

fn priority(field: &'static str, wire: i32) -> Result<Priority, WireError> {
    match v1::Priority::try_from(wire) {
        Ok(v1::Priority::Low) => Ok(Priority::Low),
        Ok(v1::Priority::Medium) => Ok(Priority::Medium),
        Ok(v1::Priority::High) => Ok(Priority::High),
        Ok(v1::Priority::Unspecified) => Err(WireError::Missing(field)),
        Err(_) => Err(invalid(field, "low, medium or high")),
    }
}

impl From<Priority> for v1::Priority {
    fn from(priority: Priority) -> v1::Priority {
        match priority {
            Priority::Low => v1::Priority::Low,
            Priority::Medium => v1::Priority::Medium,
            Priority::High => v1::Priority::High,
        }
    }
}

impl TryFrom<v1::Priority> for Priority {
    type Error = WireError;

    fn try_from(wire: v1::Priority) -> Result<Priority, WireError> {
        priority("priority", wire.into())
    }
}

impl TryFrom<v1::ResourceDemand> for Demand {
    type Error = WireError;

    fn try_from(wire: v1::ResourceDemand) -> Result<Demand, WireError> {
        let v1::ResourceDemand { cpu_millicores, memory_bytes, gpu_memory_bytes, network_bps, storage_iops } =
            wire;
        Ok(Demand {
            cpu: cpu(cpu_millicores)?,
            memory: memory("memory_bytes", memory_bytes)?,
            gpu_memory: gpu_memory_bytes.map(|bytes| memory("gpu_memory_bytes", bytes)).transpose()?,
            network: network_bps.map(|bits| bandwidth("network_bps", bits)).transpose()?,
            storage_io: storage_iops.map(operations).transpose()?,
        })
    }
}

impl From<Demand> for v1::ResourceDemand {
    fn from(demand: Demand) -> v1::ResourceDemand {
        let Demand { cpu, memory, gpu_memory, network, storage_io } = demand;
        v1::ResourceDemand {
            cpu_millicores: cpu.0,
            memory_bytes: memory.0,
            gpu_memory_bytes: gpu_memory.map(|memory| memory.0),
            network_bps: network.map(|bandwidth| bandwidth.0),
            storage_iops: storage_io.map(|iops| iops.0),
        }
    }
}

impl TryFrom<v1::TaskProfile> for Profile {
    type Error = WireError;

    fn try_from(wire: v1::TaskProfile) -> Result<Profile, WireError> {
        let v1::TaskProfile { task_id, demand, priority: wire_priority, estimated_runtime_seconds } = wire;
        if let Some(seconds) = estimated_runtime_seconds {
            let range = 0..=MAX_RUNTIME_SECONDS;
            in_range("estimated_runtime_seconds", seconds, range, "at most 3153600000, 100 years")?;
        }
        Ok(Profile {
            task_id: TaskId::try_from(task_id)?,
            demand: demand.ok_or(WireError::Missing("demand"))?.try_into()?,
            priority: priority("priority", wire_priority)?,
            estimated_runtime_seconds,
        })
    }
}

impl From<Profile> for v1::TaskProfile {
    fn from(profile: Profile) -> v1::TaskProfile {
        let Profile { task_id, demand, priority, estimated_runtime_seconds } = profile;
        v1::TaskProfile {
            task_id: task_id.into(),
            demand: Some(demand.into()),
            priority: v1::Priority::from(priority).into(),
            estimated_runtime_seconds,
        }
    }
}

/// `NAME=VALUE`, each name once.
fn environment(wire: Vec<String>) -> Result<BTreeMap<String, String>, WireError> {
    let mut environment = BTreeMap::new();
    for variable in wire {
        let (name, value) = variable
            .split_once('=')
            .filter(|(name, value)| !name.is_empty() && !name.contains('\0') && !value.contains('\0'))
            .ok_or_else(|| invalid("env", "NAME=VALUE each, without NUL"))?;
        if environment.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(invalid("env", "one value for each name"));
        }
    }
    Ok(environment)
}

impl TryFrom<v1::TaskSpec> for TaskSpec {
    type Error = WireError;

    fn try_from(wire: v1::TaskSpec) -> Result<TaskSpec, WireError> {
        let v1::TaskSpec {
            profile,
            command,
            env,
            cwd,
            name: history_key,
            namespace,
            labels,
            limits,
            run_as,
            retries,
            on_node_lost,
            gpus,
            gpu_model,
            image: wire_image,
        } = wire;
        let profile = Profile::try_from(profile.ok_or(WireError::Missing("profile"))?)?;
        let image = image(wire_image)?;
        match command.first() {
            None if image.is_some() => {}
            None => return Err(WireError::Missing("command")),
            Some(program) if program.is_empty() => return Err(invalid("command", "a program and arguments")),
            Some(_) => {}
        }
        if command.iter().any(|word| word.contains('\0')) {
            return Err(invalid("command", "without NUL"));
        }
        let is_the_images = image.is_some() && cwd.is_empty();
        if !is_the_images && (!cwd.starts_with('/') || cwd.contains('\0')) {
            return Err(invalid("cwd", "an absolute path"));
        }
        // A command's basename, so what a file may be called.
        if history_key.is_empty() || history_key.len() > 255 || history_key.contains(['/', '\0']) {
            return Err(invalid("name", "1 to 255 bytes without `/`"));
        }
        let limits = limits.map(Limits::try_from).transpose()?.unwrap_or_default();
        at_least_the_request(&limits, &profile.demand)?;
        in_range("retries", retries.into(), 0..=MAX_RETRIES.into(), "at most 1000")?;
        Ok(TaskSpec {
            profile,
            command,
            env: environment(env)?,
            cwd,
            name: history_key,
            namespace: name("namespace", namespace)?,
            labels: self::labels("labels", labels)?,
            limits,
            run_as: run_as.map(Credentials::from),
            retries,
            on_node_lost: when_lost(on_node_lost)?,
            gpus: gpu::request(gpus, gpu_model)?,
            image,
        })
    }
}

/// A reference to an image; empty: none.
pub fn image(wire: String) -> Result<Option<Image>, WireError> {
    if wire.is_empty() {
        return Ok(None);
    }
    wire.parse().map(Some).map_err(|_| invalid("image", "[HOST[:PORT]/]PATH[:TAG][@DIGEST]"))
}

fn when_lost(wire: i32) -> Result<OnNodeLost, WireError> {
    match v1::OnNodeLost::try_from(wire) {
        Ok(v1::OnNodeLost::Unspecified | v1::OnNodeLost::Wait) => Ok(OnNodeLost::Wait),
        Ok(v1::OnNodeLost::Rerun) => Ok(OnNodeLost::Rerun),
        Err(_) => Err(invalid("on_node_lost", "wait or rerun")),
    }
}

fn labels(field: &'static str, wire: HashMap<String, String>) -> Result<BTreeMap<String, String>, WireError> {
    if wire.iter().all(|(name, value)| fits_label(name) && !name.is_empty() && fits_label(value)) {
        return Ok(wire.into_iter().collect());
    }
    Err(invalid(field, "up to 63 letters, digits, `-`, `_`, `.` and `/` each"))
}

fn at_least_the_request(limits: &Limits, demand: &Demand) -> Result<(), WireError> {
    let requested = demand.network.map_or(0, |bandwidth| bandwidth.0);
    let storage_io = demand.storage_io.map_or(0, |operations| operations.0);
    let gpu_memory = demand.gpu_memory.map_or(0, |memory| memory.0);
    for (field, limit, request) in [
        ("limits.cpu_millicores", limits.cpu.at().map(|cpu| cpu.0), demand.cpu.0),
        ("limits.memory_bytes", limits.memory.at().map(|memory| memory.0), demand.memory.0),
        ("limits.net_egress_bps", limits.net_egress.at().map(|bandwidth| bandwidth.0), requested),
        ("limits.net_ingress_bps", limits.net_ingress.at().map(|bandwidth| bandwidth.0), requested),
        ("limits.storage_iops", limits.storage_io.at().map(|operations| operations.0), storage_io),
        ("limits.gpu_memory_bytes", limits.gpu_memory.at().map(|memory| memory.0), gpu_memory),
    ] {
        if let Some(value) = limit.filter(|limit| *limit < request) {
            return Err(WireError::OutOfRange { field, value, expected: "at least the request" });
        }
    }
    Ok(())
}

impl From<TaskSpec> for v1::TaskSpec {
    fn from(spec: TaskSpec) -> v1::TaskSpec {
        let TaskSpec {
            profile,
            command,
            env,
            cwd,
            name,
            namespace,
            labels,
            limits,
            run_as,
            retries,
            on_node_lost,
            gpus: CardRequest { count: gpus, model: gpu_model },
            image,
        } = spec;
        let on_node_lost = match on_node_lost {
            OnNodeLost::Wait => v1::OnNodeLost::Wait,
            OnNodeLost::Rerun => v1::OnNodeLost::Rerun,
        };
        v1::TaskSpec {
            profile: Some(profile.into()),
            command,
            env: env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            cwd,
            name,
            namespace,
            labels: labels.into_iter().collect(),
            limits: Some(limits.into()),
            run_as: run_as.map(v1::Credentials::from),
            retries,
            on_node_lost: on_node_lost.into(),
            gpus,
            gpu_model,
            image: image.map(String::from).unwrap_or_default(),
        }
    }
}

impl From<Credentials> for v1::Credentials {
    fn from(credentials: Credentials) -> v1::Credentials {
        let Credentials { uid, gid, groups } = credentials;
        v1::Credentials { uid, gid, groups }
    }
}

impl From<v1::Credentials> for Credentials {
    fn from(wire: v1::Credentials) -> Credentials {
        let v1::Credentials { uid, gid, groups } = wire;
        Credentials { uid, gid, groups }
    }
}

impl From<Capacity> for v1::Capacity {
    fn from(capacity: Capacity) -> v1::Capacity {
        let Capacity { cpu, memory, gpu_memory, network, storage_io } = capacity;
        v1::Capacity {
            cpu_millicores: cpu.0,
            memory_bytes: memory.0,
            gpu_memory_bytes: gpu_memory.map(|memory| memory.0),
            network_bps: network.map(|bandwidth| bandwidth.0),
            storage_iops: storage_io.map(|iops| iops.0),
        }
    }
}

impl TryFrom<v1::Capacity> for Capacity {
    type Error = WireError;

    /// Of what is reserved there may be nothing, so only what could overflow a sum is refused.
    fn try_from(wire: v1::Capacity) -> Result<Capacity, WireError> {
        let v1::Capacity { cpu_millicores, memory_bytes, gpu_memory_bytes, network_bps, storage_iops } = wire;
        let sane = |field, value| in_range(field, value, 0..=1 << 60, "at most 2^60");
        Ok(Capacity {
            cpu: Millicores(sane("cpu_millicores", cpu_millicores)?),
            memory: Bytes(sane("memory_bytes", memory_bytes)?),
            gpu_memory: gpu_memory_bytes.map(|it| sane("gpu_memory_bytes", it)).transpose()?.map(Bytes),
            network: network_bps.map(|it| sane("network_bps", it)).transpose()?.map(BitsPerSec),
            storage_io: storage_iops.map(|it| sane("storage_iops", it)).transpose()?.map(Iops),
        })
    }
}

impl TryFrom<v1::Policy> for Policy {
    type Error = WireError;

    fn try_from(wire: v1::Policy) -> Result<Policy, WireError> {
        let v1::Policy {
            policy_name,
            priority: wire_priority,
            demand,
            eviction_threshold_permille,
            preemption_enabled,
            window_millis,
            namespace,
            selector,
            limits,
            floors,
        } = wire;
        if let Some(permille) = eviction_threshold_permille {
            in_range("eviction_threshold_permille", permille.into(), 1..=1000, "from 1 to 1000")?;
        }
        Ok(Policy {
            policy_name: name("policy_name", policy_name)?,
            priority: priority("priority", wire_priority)?,
            namespace: name("namespace", namespace)?,
            demand: demand.map(Demand::try_from).transpose()?,
            eviction_threshold_permille,
            preemption_enabled,
            window_millis: in_range("window_millis", window_millis, 500..=3_600_000, "from 500 to 3600000")?,
            selector: selector.map(Selector::try_from).transpose()?.unwrap_or_default(),
            limits: limits.map(PolicyLimits::try_from).transpose()?.unwrap_or_default(),
            floors: floors.map(PolicyFloors::try_from).transpose()?.unwrap_or_default(),
        })
    }
}

impl From<Policy> for v1::Policy {
    fn from(policy: Policy) -> v1::Policy {
        let Policy {
            policy_name,
            priority,
            namespace,
            demand,
            eviction_threshold_permille,
            preemption_enabled,
            window_millis,
            selector,
            limits,
            floors,
        } = policy;
        v1::Policy {
            policy_name,
            priority: v1::Priority::from(priority).into(),
            demand: demand.map(v1::ResourceDemand::from),
            eviction_threshold_permille,
            preemption_enabled,
            window_millis,
            namespace,
            selector: Some(selector.into()),
            limits: Some(limits.into()),
            floors: Some(floors.into()),
        }
    }
}

impl TryFrom<v1::PolicySelector> for Selector {
    type Error = WireError;

    fn try_from(wire: v1::PolicySelector) -> Result<Selector, WireError> {
        let v1::PolicySelector { labels, name } = wire;
        let pattern = |text: String| {
            NamePattern::try_from(text).map_err(|_| invalid("selector.name", "a name, or a pattern of names"))
        };
        Ok(Selector {
            labels: self::labels("selector.labels", labels)?,
            name: (!name.is_empty()).then(|| pattern(name)).transpose()?,
        })
    }
}

impl From<Selector> for v1::PolicySelector {
    fn from(Selector { labels, name }: Selector) -> v1::PolicySelector {
        let labels = labels.into_iter().collect();
        v1::PolicySelector { labels, name: name.map(String::from).unwrap_or_default() }
    }
}

impl TryFrom<v1::PolicyLimits> for PolicyLimits {
    type Error = WireError;

    fn try_from(wire: v1::PolicyLimits) -> Result<PolicyLimits, WireError> {
        let v1::PolicyLimits { cpu_millicores, gpu_memory_bytes } = wire;
        Ok(PolicyLimits {
            cpu: cpu_millicores.map(cpu).transpose()?,
            gpu_memory: gpu_memory_bytes.map(|bytes| memory("gpu_memory_bytes", bytes)).transpose()?,
        })
    }
}

impl From<PolicyLimits> for v1::PolicyLimits {
    fn from(PolicyLimits { cpu, gpu_memory }: PolicyLimits) -> v1::PolicyLimits {
        v1::PolicyLimits {
            cpu_millicores: cpu.map(|cpu| cpu.0),
            gpu_memory_bytes: gpu_memory.map(|memory| memory.0),
        }
    }
}

impl TryFrom<v1::PolicyFloors> for PolicyFloors {
    type Error = WireError;

    fn try_from(wire: v1::PolicyFloors) -> Result<PolicyFloors, WireError> {
        let v1::PolicyFloors { cpu_millicores, memory_bytes } = wire;
        Ok(PolicyFloors {
            cpu: cpu_millicores.map(cpu).transpose()?,
            memory: memory_bytes.map(|bytes| memory("floors.memory_bytes", bytes)).transpose()?,
        })
    }
}

impl From<PolicyFloors> for v1::PolicyFloors {
    fn from(PolicyFloors { cpu, memory }: PolicyFloors) -> v1::PolicyFloors {
        v1::PolicyFloors { cpu_millicores: cpu.map(|cpu| cpu.0), memory_bytes: memory.map(|memory| memory.0) }
    }
}

fn kind(wire: &str) -> Result<DecisionKind, WireError> {
    match DecisionKind::ALL.into_iter().find(|kind| kind.name() == wire) {
        Some(kind) => Ok(kind),
        None if wire.is_empty() => Err(WireError::Missing("kind")),
        None => Err(invalid("kind", "a kind of decision that this version knows")),
    }
}

impl TryFrom<v1::Decision> for Decision {
    type Error = WireError;

    fn try_from(wire: v1::Decision) -> Result<Decision, WireError> {
        let v1::Decision { unix_nanos, by, kind: wire_kind, reason, nodes } = wire;
        Ok(Decision {
            at: unix_nanos,
            by,
            kind: kind(&wire_kind)?,
            reason,
            nodes: nodes.into_iter().map(NodeVerdict::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl From<Decision> for v1::Decision {
    fn from(decision: Decision) -> v1::Decision {
        let Decision { at, by, kind, reason, nodes } = decision;
        v1::Decision {
            unix_nanos: at,
            by,
            kind: kind.to_string(),
            reason,
            nodes: nodes.into_iter().map(v1::NodeVerdict::from).collect(),
        }
    }
}

impl TryFrom<v1::NodeVerdict> for NodeVerdict {
    type Error = WireError;

    fn try_from(wire: v1::NodeVerdict) -> Result<NodeVerdict, WireError> {
        let v1::NodeVerdict { node, score, lacking, not_checked } = wire;
        if score.is_some_and(|score| !score.is_finite()) {
            return Err(invalid("score", "a finite number"));
        }
        Ok(NodeVerdict { node, score, lacking, not_checked })
    }
}

impl From<NodeVerdict> for v1::NodeVerdict {
    fn from(verdict: NodeVerdict) -> v1::NodeVerdict {
        let NodeVerdict { node, score, lacking, not_checked } = verdict;
        v1::NodeVerdict { node, score, lacking, not_checked }
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::{
        limits::Limit,
        units::{Micros, Weight},
    };

    use super::*;

    fn spec() -> TaskSpec {
        TaskSpec {
            profile: Profile {
                task_id: "etl-1".parse().unwrap(),
                demand: Demand {
                    cpu: Millicores(1500),
                    memory: Bytes(1 << 30),
                    gpu_memory: Some(Bytes(1 << 31)),
                    network: Some(BitsPerSec(10_000_000)),
                    storage_io: Some(Iops(500)),
                },
                priority: Priority::High,
                estimated_runtime_seconds: Some(60),
            },
            command: vec!["sh".into(), "-c".into(), "true".into()],
            env: BTreeMap::from([("A".into(), "b=c".into()), ("E".into(), String::new())]),
            cwd: "/srv".into(),
            name: "sh".into(),
            namespace: "default".into(),
            labels: BTreeMap::from([("team".into(), "data".into())]),
            limits: Limits {
                cpu: Limit::At(Millicores(2000)),
                cpu_weight: Weight::new(200),
                memory: Limit::At(Bytes(1 << 30)),
                net_egress: Limit::Unlimited,
                storage_io: Limit::At(Iops(900)),
                storage_io_weight: None,
                storage_io_latency: Limit::At(Micros(2500)),
                reclaim_idle: Some(true),
                net_egress_guarantee: None,
                net_egress_weight: Weight::new(300),
                net_ingress: Limit::Unlimited,
                gpu_cards: None,
                gpu_memory: Limit::At(Bytes(1 << 32)),
                gpu_power: Limit::Unlimited,
            },
            run_as: Some(Credentials { uid: 7, gid: 8, groups: vec![9] }),
            retries: 2,
            on_node_lost: OnNodeLost::Rerun,
            gpus: CardRequest { count: 0, model: "H100".into() },
            image: None,
        }
    }

    fn policy() -> Policy {
        Policy {
            policy_name: "high_priority_tasks".into(),
            priority: Priority::Medium,
            namespace: "batch".into(),
            demand: Some(spec().profile.demand),
            eviction_threshold_permille: Some(900),
            preemption_enabled: true,
            window_millis: 10_000,
            selector: Selector {
                labels: BTreeMap::from([("tier".into(), "gold".into())]),
                name: "etl-*".parse().ok(),
            },
            limits: PolicyLimits { cpu: Some(Millicores(2_500)), gpu_memory: Some(Bytes(1 << 35)) },
            floors: PolicyFloors { cpu: Some(Millicores(500)), memory: Some(Bytes(1 << 30)) },
        }
    }

    #[test]
    fn a_task_spec_survives_the_wire() {
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(spec())), Ok(spec()));
        let image = "docker.io/library/etl:7".parse().ok();
        let given = TaskSpec { image: image.clone(), ..spec() };
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(given.clone())), Ok(given));
        let images = TaskSpec { image, command: Vec::new(), cwd: String::new(), ..spec() };
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(images.clone())), Ok(images));
        let bare = TaskSpec { limits: Limits::default(), run_as: None, env: BTreeMap::new(), ..spec() };
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(bare.clone())), Ok(bare));
        let waits = TaskSpec { on_node_lost: OnNodeLost::Wait, ..spec() };
        assert_eq!(TaskSpec::try_from(v1::TaskSpec::from(waits.clone())), Ok(waits.clone()));
        let unsaid = v1::TaskSpec { on_node_lost: 0, ..spec().into() };
        assert_eq!(TaskSpec::try_from(unsaid), Ok(waits));
    }

    #[test]
    fn a_policy_survives_the_wire() {
        assert_eq!(Policy::try_from(v1::Policy::from(policy())), Ok(policy()));
        let (selector, limits) = Default::default();
        let least = Policy { demand: None, eviction_threshold_permille: None, selector, limits, ..policy() };
        assert_eq!(Policy::try_from(v1::Policy::from(least.clone())), Ok(least.clone()));
        let old = v1::Policy { selector: None, limits: None, ..v1::Policy::from(least.clone()) };
        assert_eq!(Policy::try_from(old), Ok(least));
    }

    #[test]
    fn a_capacity_survives_the_wire_also_where_it_is_nothing() {
        let capacity = Capacity {
            cpu: Millicores(0),
            memory: Bytes(0),
            gpu_memory: None,
            network: Some(BitsPerSec(0)),
            storage_io: Some(Iops(7)),
        };
        assert_eq!(Capacity::try_from(v1::Capacity::from(capacity)), Ok(capacity));
        let wire = v1::Capacity { memory_bytes: u64::MAX, ..v1::Capacity::from(capacity) };
        assert_eq!(field(Capacity::try_from(wire)), "memory_bytes");
    }

    #[test]
    fn every_kind_of_decision_survives_the_wire() {
        for kind in DecisionKind::ALL {
            let decision = Decision {
                at: 5,
                by: "broker".into(),
                kind,
                reason: "n1 has the highest score".into(),
                nodes: vec![
                    NodeVerdict {
                        node: "n1".into(),
                        score: Some(0.75),
                        lacking: vec![],
                        not_checked: vec![],
                    },
                    NodeVerdict {
                        node: "n2".into(),
                        score: None,
                        lacking: vec!["cpu: 1.5 of 1".into()],
                        not_checked: vec!["storage_io".into()],
                    },
                ],
            };
            assert_eq!(Decision::try_from(v1::Decision::from(decision.clone())), Ok(decision));
        }
    }

    fn field<T: std::fmt::Debug>(read: Result<T, WireError>) -> String {
        match read.unwrap_err() {
            WireError::Missing(field)
            | WireError::OutOfRange { field, .. }
            | WireError::Invalid { field, .. } => field.to_owned(),
            WireError::TaskId(_) => "task_id".to_owned(),
            WireError::Workload(_) => "workload".to_owned(),
        }
    }

    #[test]
    fn what_is_wrong_in_a_task_spec_is_named() {
        let broken = |change: fn(&mut v1::TaskSpec)| {
            let mut wire = v1::TaskSpec::from(spec());
            change(&mut wire);
            field(TaskSpec::try_from(wire))
        };
        fn profile(wire: &mut v1::TaskSpec) -> &mut v1::TaskProfile {
            wire.profile.get_or_insert_default()
        }
        fn demand(wire: &mut v1::TaskSpec) -> &mut v1::ResourceDemand {
            profile(wire).demand.get_or_insert_default()
        }
        assert_eq!(broken(|wire| wire.profile = None), "profile");
        assert_eq!(broken(|wire| profile(wire).task_id = "../../x".into()), "task_id");
        assert_eq!(broken(|wire| profile(wire).demand = None), "demand");
        assert_eq!(broken(|wire| profile(wire).priority = 0), "priority");
        assert_eq!(broken(|wire| profile(wire).priority = 9), "priority");
        assert_eq!(broken(|wire| demand(wire).cpu_millicores = 9), "cpu_millicores");
        assert_eq!(broken(|wire| demand(wire).memory_bytes = 0), "memory_bytes");
        assert_eq!(broken(|wire| demand(wire).gpu_memory_bytes = Some(0)), "gpu_memory_bytes");
        assert_eq!(broken(|wire| demand(wire).network_bps = Some(1)), "network_bps");
        assert_eq!(broken(|wire| demand(wire).storage_iops = Some(0)), "storage_iops");
        assert_eq!(broken(|wire| wire.command.clear()), "command");
        assert_eq!(broken(|wire| wire.command[0].clear()), "command");
        assert_eq!(broken(|wire| wire.command.push("a\0b".into())), "command");
        assert_eq!(broken(|wire| wire.env.push("novalue".into())), "env");
        assert_eq!(broken(|wire| wire.env.push("=x".into())), "env");
        assert_eq!(broken(|wire| wire.env.push("A=again".into())), "env");
        assert_eq!(broken(|wire| wire.cwd = "srv".into()), "cwd");
        assert_eq!(broken(|wire| wire.cwd.clear()), "cwd");
        assert_eq!(broken(|wire| wire.image = "--privileged".into()), "image");
        assert_eq!(broken(|wire| wire.name.clear()), "name");
        assert_eq!(broken(|wire| wire.namespace = "a/b".into()), "namespace");
        assert_eq!(broken(|wire| wire.retries = 1001), "retries");
        assert_eq!(broken(|wire| wire.on_node_lost = 3), "on_node_lost");
        assert_eq!(broken(|wire| _ = wire.labels.insert(String::new(), "x".into())), "labels");
        assert_eq!(broken(|wire| _ = wire.labels.insert("x".into(), "\n".into())), "labels");
        let longest = |wire: &mut v1::TaskSpec| profile(wire).estimated_runtime_seconds = Some(u64::MAX);
        assert_eq!(broken(longest), "estimated_runtime_seconds");
        let limits = |change: fn(&mut v1::Limits)| {
            let mut wire = v1::TaskSpec::from(spec());
            change(wire.limits.get_or_insert_default());
            field(TaskSpec::try_from(wire))
        };
        assert_eq!(limits(|limits| limits.cpu_millicores = Some(1000)), "limits.cpu_millicores");
        assert_eq!(limits(|limits| limits.memory_bytes = Some(1)), "limits.memory_bytes");
        assert_eq!(limits(|limits| limits.net_egress_bps = Some(128_000)), "limits.net_egress_bps");
        assert_eq!(limits(|limits| limits.cpu_weight = Some(0)), "cpu_weight");
    }

    #[test]
    fn what_is_wrong_in_a_policy_or_a_decision_is_named() {
        let broken = |change: fn(&mut v1::Policy)| {
            let mut wire = v1::Policy::from(policy());
            change(&mut wire);
            field(Policy::try_from(wire))
        };
        assert_eq!(broken(|wire| wire.policy_name.clear()), "policy_name");
        assert_eq!(broken(|wire| wire.namespace.clear()), "namespace");
        assert_eq!(broken(|wire| wire.priority = 0), "priority");
        assert_eq!(broken(|wire| wire.eviction_threshold_permille = Some(0)), "eviction_threshold_permille");
        assert_eq!(
            broken(|wire| wire.eviction_threshold_permille = Some(1001)),
            "eviction_threshold_permille"
        );
        assert_eq!(broken(|wire| wire.window_millis = 0), "window_millis");
        assert_eq!(broken(|wire| wire.selector.as_mut().unwrap().name = "a b".into()), "selector.name");
        let label = |wire: &mut v1::Policy| {
            wire.selector.as_mut().unwrap().labels.insert(String::new(), "gold".into());
        };
        assert_eq!(broken(label), "selector.labels");
        let cpu = |wire: &mut v1::Policy| wire.limits.as_mut().unwrap().cpu_millicores = Some(9);
        assert_eq!(broken(cpu), "cpu_millicores");
        let decision = v1::Decision { kind: "danced".into(), ..v1::Decision::default() };
        assert_eq!(field(Decision::try_from(decision)), "kind");
        let verdict = v1::NodeVerdict { score: Some(f64::NAN), ..v1::NodeVerdict::default() };
        assert_eq!(field(NodeVerdict::try_from(verdict)), "score");
        assert_eq!(Priority::try_from(v1::Priority::High), Ok(Priority::High));
    }
}
