//! The policy: `policy_name`, `priority`, `resource_demand`, `behavior`.

use super::{
    error::DocumentError,
    profile::{demand, name, priority},
    read::{Field, Item, Quantity},
};
use crate::spec::{DEFAULT_NAMESPACE, DEFAULT_WINDOW_MILLIS, Policy};

const POLICY: &[Field] = &[
    Field { name: "policy_name", example: "\"high_priority_tasks\"" },
    Field { name: "priority", example: "\"high\"" },
    Field { name: "namespace", example: "\"default\"" },
    Field { name: "resource_demand", example: "{\"cpu_cores\": 8, \"memory_gb\": 16}" },
    Field { name: "behavior", example: "{\"eviction_threshold\": 0.9, \"preemption_enabled\": true}" },
];

const BEHAVIOR: &[Field] = &[
    Field { name: "eviction_threshold", example: "0.9" },
    Field { name: "preemption_enabled", example: "true" },
    Field { name: "window_seconds", example: "10" },
];

const THRESHOLD: Quantity = Quantity {
    unit: 1000,
    min: 1,
    max: 1000,
    expected: "a share of the node above 0, and at most 1",
    remedy: "write a share such as 0.9 for 90 %",
};

const WINDOW: Quantity = Quantity {
    unit: 1000,
    min: 500,
    max: 3_600_000,
    expected: "a number of seconds from 0.5 to 3600",
    remedy: "write seconds as a plain number, such as 10",
};

pub(super) fn policy(item: &Item<'_>) -> Result<Policy, DocumentError> {
    let fields = item.fields("a policy", POLICY)?;
    let policy = Policy {
        policy_name: name(fields.required("policy_name")?, "a policy name")?.into(),
        priority: priority(fields.required("priority")?)?,
        namespace: fields
            .map("namespace", |item| name(item, "a namespace"))?
            .map_or_else(|| DEFAULT_NAMESPACE.to_owned(), String::from),
        demand: fields.map("resource_demand", demand)?,
        eviction_threshold_permille: None,
        preemption_enabled: false,
        window_millis: DEFAULT_WINDOW_MILLIS,
    };
    let Some(behavior) = fields.optional("behavior") else { return Ok(policy) };
    let behavior = behavior.fields("the behavior of a policy", BEHAVIOR)?;
    let threshold = behavior.map("eviction_threshold", |item| item.quantity(&THRESHOLD))?;
    Ok(Policy {
        // At most 1000.
        eviction_threshold_permille: threshold.and_then(|permille| u32::try_from(permille).ok()),
        preemption_enabled: behavior.map("preemption_enabled", Item::boolean)?.unwrap_or(false),
        window_millis: behavior
            .map("window_seconds", |item| item.quantity(&WINDOW))?
            .unwrap_or(DEFAULT_WINDOW_MILLIS),
        ..policy
    })
}
