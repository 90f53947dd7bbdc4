//! The policy: `policy_name`, `priority`, `resource_demand`, `behavior`, and what grew around them.

use super::{
    error::{DocumentError, quoted},
    number::shortest,
    profile::{CORES, DEMAND, GPU_MEMORY, MEMORY, PRIORITIES, demand, demand_fields, name, priority},
    read::{Field, Item, Kind, Quantity, Written},
    task::labels,
};
use crate::{
    policy::{NamePattern, PolicyFloors, PolicyLimits, Selector},
    spec::{DEFAULT_NAMESPACE, DEFAULT_WINDOW_MILLIS, Policy},
    units::{Bytes, Millicores},
};

pub(super) const POLICY: &[Field] = &[
    Field::required("policy_name", Kind::Name, "\"high_priority_tasks\"")
        .means("its name, unique in the cluster: 1 to 63 letters, digits, `-`, `_` and `.`", "required"),
    Field::required("priority", Kind::Word(&PRIORITIES), "\"high\"")
        .means("`high`, `medium` or `low`: the priority of the tasks that it covers", "required"),
    Field::optional("namespace", Kind::Name, "\"default\"").means("their namespace", "`default`"),
    Field::optional("selector", Kind::Fields(SELECTOR), "{\"labels\": {\"team\": \"data\"}}"),
    Field::optional("resource_demand", Kind::Fields(DEMAND), "{\"cpu_cores\": 8, \"memory_gb\": 16}")
        .means("as in a task profile (`cpu_cores`, `memory_gb`, …); see above", "none"),
    Field::optional("limits", Kind::Fields(LIMITS), "{\"cpu\": 2.5}"),
    Field::optional("floors", Kind::Fields(FLOORS), "{\"cpu\": 0.5, \"memory_gb\": 1}"),
    Field::optional(
        "behavior",
        Kind::Fields(BEHAVIOR),
        "{\"eviction_threshold\": 0.9, \"preemption_enabled\": true}",
    ),
];

const SELECTOR: &[Field] = &[
    Field::optional("labels", Kind::Labels, "{\"team\": \"data\"}")
        .means("labels that they have, with exactly these values", "any"),
    Field::optional("name", Kind::NamePattern, "\"etl-*\"")
        .means("their name, or a pattern in which `*` stands for any characters, also for none", "any"),
];

const LIMITS: &[Field] = &[
    Field::optional("cpu", Kind::Cores(&CPU), "2.5").means(
        "the most CPU that each is granted: cores (`2.5`) or thousandths of one (`250m`), from 0.01 to 1000000",
        "none",
    ),
    Field::optional("gpu_memory_gb", Kind::Quantity(&GPU_MEMORY), "40").means(
        "the most memory of its GPU card that each may grow to, in GiB, where that is free or lower ones give it back",
        "what it requests",
    ),
];

const FLOORS: &[Field] = &[
    Field::optional("cpu", Kind::Cores(&CPU), "0.5").means(
        "down to how many cores what is reserved for each may come, so that another task has room: as `limits.cpu`",
        "what it requests stays reserved",
    ),
    Field::optional("memory_gb", Kind::Quantity(&MEMORY), "1")
        .means("the same of memory, in GiB", "what it requests stays reserved"),
];

const BEHAVIOR: &[Field] = &[
    Field::optional("eviction_threshold", Kind::Quantity(&THRESHOLD), "0.9")
        .means("CPU utilisation of the node, above 0 and at most 1, that arms the policy", "it never acts"),
    Field::optional("preemption_enabled", Kind::Boolean, "true")
        .means("whether a task of lower priority may be ended for them", "`false`"),
    Field::optional("window_seconds", Kind::Quantity(&WINDOW), "10").means(
        "over which utilisation is averaged, and how long a remedy has before the next: 0.5 to 3600",
        "`10`",
    ),
];

const CPU: Written<Millicores> = Written {
    parse: |text| Millicores::parse(text).ok().filter(|cpu| cpu.0 <= CORES.max),
    pattern: r"^([0-9]+(\.[0-9]{1,3})?|[0-9]+m)$",
    min: "0.01",
    max: "1000000",
    expected: "a number of cores from 0.01 to 1000000",
    remedy: "write cores, such as 2.5, or thousandths of one, such as 250m",
};

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
        selector: fields.map("selector", selector)?.unwrap_or_default(),
        limits: fields.map("limits", limits)?.unwrap_or_default(),
        floors: fields.map("floors", floors)?.unwrap_or_default(),
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

fn selector(item: &Item<'_>) -> Result<Selector, DocumentError> {
    let fields = item.fields("the selector of a policy", SELECTOR)?;
    Ok(Selector {
        labels: fields.map("labels", labels)?.unwrap_or_default(),
        name: fields.map("name", pattern)?,
    })
}

fn pattern(item: &Item<'_>) -> Result<NamePattern, DocumentError> {
    const REMEDY: &str =
        "use 1 to 63 characters out of a-z, A-Z, 0-9, `-`, `_` and `.`; `*` stands for any of them";
    let text = item.text("a name, or a pattern such as etl-*")?;
    let error = || item.error(format!("{} is no name and no pattern of names", quoted(text)));
    text.parse().map_err(|_| error().with_remedy(REMEDY))
}

fn limits(item: &Item<'_>) -> Result<PolicyLimits, DocumentError> {
    let fields = item.fields("`limits`", LIMITS)?;
    Ok(PolicyLimits {
        cpu: fields.map("cpu", |item| item.written(&CPU))?,
        gpu_memory: fields.map("gpu_memory_gb", |item| item.quantity(&GPU_MEMORY).map(Bytes))?,
    })
}

fn floors(item: &Item<'_>) -> Result<PolicyFloors, DocumentError> {
    let fields = item.fields("`floors`", FLOORS)?;
    Ok(PolicyFloors {
        cpu: fields.map("cpu", |item| item.written(&CPU))?,
        memory: fields.map("memory_gb", |item| item.quantity(&MEMORY).map(Bytes))?,
    })
}

/// The fields of a policy by their paths, and the values that a document would give them. What is as it would be without the
/// field is left out; so is the name.
pub fn policy_fields(policy: &Policy) -> Vec<(String, String)> {
    let Policy {
        policy_name: _,
        priority,
        namespace,
        demand,
        eviction_threshold_permille: threshold,
        preemption_enabled,
        window_millis,
        selector: Selector { labels, name },
        limits: PolicyLimits { cpu, gpu_memory },
        floors,
    } = policy;
    let mut fields = vec![("priority".to_owned(), priority.to_string())];
    let mut add = |path: &str, value: Option<String>| {
        fields.extend(value.map(|value| (path.to_owned(), value)));
    };
    add("namespace", (namespace != DEFAULT_NAMESPACE).then(|| namespace.clone()));
    for (label, value) in labels {
        add(&format!("selector.labels.{label}"), Some(value.clone()));
    }
    add("selector.name", name.as_ref().map(ToString::to_string));
    for (field, value) in demand.iter().flat_map(|demand| demand_fields(demand).into_iter().flatten()) {
        add(&format!("resource_demand.{field}"), Some(value));
    }
    add("limits.cpu", cpu.map(|cpu| cpu.to_string()));
    add("limits.gpu_memory_gb", gpu_memory.map(|memory| shortest(memory.0, GPU_MEMORY.unit)));
    add("floors.cpu", floors.cpu.map(|cpu| cpu.to_string()));
    add("floors.memory_gb", floors.memory.map(|memory| shortest(memory.0, MEMORY.unit)));
    let threshold = threshold.map(|permille| shortest(permille.into(), THRESHOLD.unit));
    add("behavior.eviction_threshold", threshold);
    add("behavior.preemption_enabled", preemption_enabled.then(|| "true".to_owned()));
    let window = (*window_millis != DEFAULT_WINDOW_MILLIS).then(|| shortest(*window_millis, WINDOW.unit));
    add("behavior.window_seconds", window);
    fields
}
