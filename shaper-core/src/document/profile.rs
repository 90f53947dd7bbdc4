//! The task profile: `{"task_id": …, "resource_demand": {…}, "priority": …}`.

use super::{
    error::{DocumentError, quoted},
    number::shortest,
    read::{Field, Item, Kind, Quantity},
};
use crate::{
    id::TaskId,
    spec::{Demand, Priority, Profile},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

pub(super) const PROFILE: &[Field] = &[
    Field::required("task_id", Kind::Name, "\"etl-1\""),
    Field::required("resource_demand", Kind::Fields(DEMAND), "{\"cpu_cores\": 4, \"memory_gb\": 8}"),
    Field::required("priority", Kind::Word(&PRIORITIES), "\"medium\""),
    Field::optional("estimated_runtime_seconds", Kind::Whole { min: 0, max: MAX_RUNTIME_SECONDS }, "3600"),
];

pub(super) const DEMAND: &[Field] = &[
    Field::required("cpu_cores", Kind::Quantity(&CORES), "4"),
    Field::required("memory_gb", Kind::Quantity(&MEMORY), "8"),
    Field::optional("gpu_memory_gb", Kind::Quantity(&GPU_MEMORY), "2"),
    Field::optional("network_bandwidth_mbps", Kind::Quantity(&BANDWIDTH), "100"),
    Field::optional("storage_io_ops", Kind::Whole { min: 1, max: Iops::MAX.0 }, "500"),
];

const GIB: u64 = 1 << 30;
const MBIT: u64 = 1_000_000;

pub(super) const CORES: Quantity = Quantity {
    unit: 1000,
    min: Millicores::MIN.0,
    max: 1_000_000_000,
    expected: "a number of cores from 0.01 to 1000000",
    remedy: "write cores as a plain number, such as 4 or 0.5",
};

pub(super) const MEMORY: Quantity = Quantity {
    unit: GIB,
    min: 1,
    // In thousandths of a byte this is still a u64.
    max: 1 << 53,
    expected: "a number of GiB above 0, and at most 8388608",
    remedy: "write GiB as a plain number, such as 8 or 0.5",
};

pub(super) const GPU_MEMORY: Quantity = Quantity {
    remedy: "write GiB as a plain number, such as 2; leave the field out for a task without a GPU",
    ..MEMORY
};

pub(super) const BANDWIDTH: Quantity = Quantity {
    unit: MBIT,
    min: BitsPerSec::MIN.0,
    max: BitsPerSec::MAX.0,
    expected: "a number of Mbit/s from 0.128 to 400000",
    remedy: "write Mbit/s as a plain number, such as 100; leave the field out to ask for none",
};

/// The longest estimate of a run, in seconds: 100 years.
pub const MAX_RUNTIME_SECONDS: u64 = 3_153_600_000;

/// What a name may look like.
pub(super) const NAME_RULE: &str = "use 1 to 63 characters out of a-z, A-Z, 0-9, `-`, `_` and `.`, beginning and \
                                    ending with a letter or digit";

pub(super) const PRIORITIES: [&str; 3] = ["high", "medium", "low"];

pub(super) fn profile(item: &Item<'_>) -> Result<Profile, DocumentError> {
    let fields = item.fields("a task profile", PROFILE)?;
    Ok(Profile {
        task_id: name(fields.required("task_id")?, "a task id")?,
        demand: demand(fields.required("resource_demand")?)?,
        priority: priority(fields.required("priority")?)?,
        estimated_runtime_seconds: fields.map("estimated_runtime_seconds", |item| {
            item.whole(0, MAX_RUNTIME_SECONDS, "a number of seconds")
        })?,
    })
}

pub(super) fn demand(item: &Item<'_>) -> Result<Demand, DocumentError> {
    let fields = item.fields("a resource demand", DEMAND)?;
    Ok(Demand {
        cpu: Millicores(fields.required("cpu_cores")?.quantity(&CORES)?),
        memory: Bytes(fields.required("memory_gb")?.quantity(&MEMORY)?),
        gpu_memory: fields.map("gpu_memory_gb", |item| item.quantity(&GPU_MEMORY).map(Bytes))?,
        network: fields.map("network_bandwidth_mbps", |item| item.quantity(&BANDWIDTH).map(BitsPerSec))?,
        storage_io: fields.map("storage_io_ops", |item| {
            item.whole(1, Iops::MAX.0, "a number of operations a second").map(Iops)
        })?,
    })
}

pub(super) fn priority(item: &Item<'_>) -> Result<Priority, DocumentError> {
    Ok(match item.word(&PRIORITIES)? {
        "high" => Priority::High,
        "medium" => Priority::Medium,
        _ => Priority::Low,
    })
}

/// A name that may become part of a path: of a task, a policy, a namespace.
pub(super) fn name(item: &Item<'_>, what: &str) -> Result<TaskId, DocumentError> {
    let name = item.text(what)?;
    name.parse().map_err(|_| item.error(format!("{} is not {what}", quoted(name))).with_remedy(NAME_RULE))
}

/// The fields of a demand, and their values.
pub(super) fn demand_fields(demand: &Demand) -> [Option<(&'static str, String)>; 5] {
    let Demand { cpu, memory, gpu_memory, network, storage_io } = demand;
    [
        Some(("cpu_cores", shortest(cpu.0, CORES.unit))),
        Some(("memory_gb", shortest(memory.0, GIB))),
        gpu_memory.map(|memory| ("gpu_memory_gb", shortest(memory.0, GIB))),
        network.map(|bandwidth| ("network_bandwidth_mbps", shortest(bandwidth.0, MBIT))),
        storage_io.map(|iops| ("storage_io_ops", iops.0.to_string())),
    ]
}

/// A profile as the JSON that [`profile`](super::profile) reads.
pub fn profile_to_json(profile: &Profile) -> String {
    let Profile { task_id, demand, priority, estimated_runtime_seconds } = profile;
    // A task id has no character that JSON would have to escape.
    let fields = [
        Some(("task_id", format!("\"{task_id}\""))),
        Some(("resource_demand", object(&demand_fields(demand), 1))),
        Some(("priority", format!("\"{priority}\""))),
        estimated_runtime_seconds.map(|seconds| ("estimated_runtime_seconds", seconds.to_string())),
    ];
    object(&fields, 0)
}

fn object(fields: &[Option<(&str, String)>], depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let fields: Vec<String> =
        fields.iter().flatten().map(|(name, value)| format!("{indent}  \"{name}\": {value}")).collect();
    format!("{{\n{}\n{indent}}}", fields.join(",\n"))
}
