//! The rules by which an agent adopts cgroups: `rules`, each with `name`, `select` and `task`.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    error::{DocumentError, quoted},
    profile::{CORES, name},
    read::{Field, Fields, Item, Kind, Written},
    task::labels,
};
use crate::{
    adopt::{
        ContainerSelect, Glob, NameTemplate, PodSelect, Qos, RULES_MAX, Rule, Runtime, Select, Template,
        Writers,
    },
    limits::{Limit, Limits},
    units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Weight},
};

const fn optional(name: &'static str, example: &'static str) -> Field {
    Field::optional(name, Kind::Unpublished, example)
}

const FILE: &[Field] = &[Field::required(
    "rules",
    Kind::Unpublished,
    "[{\"name\": \"web\", \"select\": {\"unit\": \"nginx.service\"}, \"task\": {\"limits\": {\"net\": \"100mbit\"}}}]",
)];

const RULE: &[Field] = &[
    Field::required("name", Kind::Unpublished, "\"web\""),
    Field::required("select", Kind::Unpublished, "{\"unit\": \"nginx.service\"}"),
    optional("task", "{\"limits\": {\"cpu\": 2}}"),
];

const SELECT: &[Field] = &[
    optional("cgroup", "\"batch.slice/*\""),
    optional("unit", "\"nginx.service\""),
    optional("container", "{\"runtime\": \"docker\"}"),
    optional("pod", "{\"qos\": \"besteffort\"}"),
    optional("slurm", "\"*\""),
];

const CONTAINER: &[Field] = &[
    optional("runtime", "\"docker\""),
    optional("name", "\"web-*\""),
    optional("image", "\"registry/**\""),
    optional("labels", "{\"team\": \"data\"}"),
];

const POD: &[Field] = &[
    optional("qos", "\"besteffort\""),
    optional("uid", "\"*\""),
    optional("namespace", "\"batch\""),
    optional("name", "\"etl-*\""),
];

const TASK: &[Field] = &[
    optional("name", "\"web-${unit}\""),
    optional("namespace", "\"default\""),
    optional("labels", "{\"tier\": \"front\"}"),
    optional("container_labels", "[\"team\"]"),
    optional("limits", "{\"cpu\": 2, \"net\": \"100mbit\"}"),
    optional("writers", "\"yield\""),
];

const LIMITS: &[Field] = &[
    optional("cpu", "2"),
    optional("cpu_weight", "100"),
    optional("memory", "\"512Mi\""),
    optional("net", "\"100mbit\""),
    optional("net_guarantee", "\"10mbit\""),
    optional("net_weight", "100"),
    optional("net_in", "\"100mbit\""),
    optional("io", "500"),
    optional("io_weight", "100"),
    optional("io_latency", "\"5ms\""),
    optional("reclaim_idle", "true"),
];

/// A quantity of the command line's options, which has no schema.
const fn written<T>(
    parse: fn(&str) -> Option<T>,
    expected: &'static str,
    remedy: &'static str,
) -> Written<T> {
    Written { parse, pattern: "", min: "", max: "", expected, remedy }
}

const CPU: Written<Millicores> = written(
    |text| Millicores::parse(text).ok().filter(|cpu| cpu.0 <= CORES.max),
    "a number of cores from 0.01 to 1000000",
    "write cores, such as 2.5, or thousandths of one, such as 250m",
);
const MEMORY: Written<Bytes> = written(
    |text| Bytes::parse(text).ok(),
    "an amount of memory",
    "write it with a unit, such as 512Mi or 1.5Gi",
);
const RATE: Written<BitsPerSec> = written(
    |text| BitsPerSec::parse(text).ok(),
    "a rate on the wire",
    "write it with a unit, such as 100mbit or 1.5gbit",
);
const OPERATIONS: Written<Iops> = written(
    |text| Iops::parse(text).ok(),
    "a number of operations a second",
    "write digits only, such as 500",
);
const WEIGHT: Written<Weight> = written(
    |text| Weight::parse(text).ok(),
    "a weight from 1 to 10000",
    "write a whole number; usual is 100",
);
const LATENCY: Written<Micros> = written(
    |text| Micros::parse_latency(text).ok(),
    "a latency",
    "write it with a unit, such as 5ms or 500us",
);

pub(super) fn rules(root: &Item<'_>) -> Result<Vec<Rule>, DocumentError> {
    let fields = root.fields("a file of adoption rules", FILE)?;
    let list = fields.required("rules")?;
    let items = list.list("a list of rules")?;
    if items.len() > RULES_MAX {
        let error = list.error(format!("has {} rules, and {RULES_MAX} is the most", items.len()));
        return Err(error.with_remedy("say more by patterns"));
    }
    let mut names = BTreeSet::new();
    let mut rules = Vec::new();
    for item in &items {
        let (rule, named) = rule(item)?;
        if !names.insert(rule.name.clone()) {
            return Err(named.with_remedy("give each rule a name of its own"));
        }
        rules.push(rule);
    }
    Ok(rules)
}

/// A rule, and what to say if another has its name.
fn rule(item: &Item<'_>) -> Result<(Rule, DocumentError), DocumentError> {
    let fields = item.fields("a rule", RULE)?;
    let named = fields.required("name")?;
    let select = select(fields.required("select")?)?;
    let task = match fields.optional("task") {
        Some(task) => template(task, &select)?,
        None => plain(&select),
    };
    let rule = Rule { name: name(named, "the name of a rule")?, select, task };
    let twice = named.error(format!("{} is the name of a rule above", quoted(rule.name.as_str())));
    Ok((rule, twice))
}

fn select(item: &Item<'_>) -> Result<Select, DocumentError> {
    const REMEDY: &str = "choose one of cgroup, unit, container, pod, slurm; write a rule for each";
    let fields = item.fields("`select`", SELECT)?;
    let chosen: Vec<&str> =
        SELECT.iter().map(|field| field.name).filter(|name| fields.optional(name).is_some()).collect();
    let [chosen] = chosen.as_slice() else {
        let error = item.error(match chosen.len() {
            0 => "selects nothing".to_owned(),
            _ => format!("has {}, of which it can have one", chosen.join(" and ")),
        });
        return Err(error.with_remedy(REMEDY));
    };
    let one = fields.optional(chosen).ok_or_else(|| item.error("selects nothing").with_remedy(REMEDY))?;
    Ok(match *chosen {
        "cgroup" => Select::Cgroup(path(one)?),
        "unit" => Select::Unit(glob(one)?),
        "slurm" => Select::Slurm(glob(one)?),
        "container" => Select::Container(container(one)?),
        _ => Select::Pod(pod(one)?),
    })
}

fn glob(item: &Item<'_>) -> Result<Glob, DocumentError> {
    const REMEDY: &str = "`*` stands for any characters but `/`, `**` for any, `?` for one";
    let text = item.text("a pattern such as web-*")?;
    let error = || item.error(format!("{} is no pattern", quoted(text))).with_remedy(REMEDY);
    text.parse().map_err(|_| error())
}

/// A pattern of paths, which begin at the mount point.
fn path(item: &Item<'_>) -> Result<Glob, DocumentError> {
    let text = item.text("a pattern of paths such as batch.slice/*")?;
    if text.starts_with('/') || text.ends_with('/') || text.split('/').any(|part| part == "..") {
        let error = item.error(format!("{} is not the path of a cgroup", quoted(text)));
        return Err(error.with_remedy("write it from the mount point of cgroup v2 on, such as batch.slice/*"));
    }
    glob(item)
}

fn container(item: &Item<'_>) -> Result<ContainerSelect, DocumentError> {
    let fields = item.fields("`container`", CONTAINER)?;
    let runtime = fields.map("runtime", |item| Ok(Runtime::parse(item.word(&Runtime::NAMES)?)))?;
    let select = ContainerSelect {
        runtime: runtime.flatten(),
        name: fields.map("name", glob)?,
        image: fields.map("image", glob)?,
        labels: fields.map("labels", container_labels)?.unwrap_or_default(),
    };
    let asks = select.name.is_some() || select.image.is_some() || !select.labels.is_empty();
    if asks && !select.is_asked_for() {
        let error = item.error("names, images and labels are known of Docker's and Podman's containers only");
        return Err(error
            .with_remedy("add `\"runtime\": \"docker\"` or `\"runtime\": \"podman\"`; or select the pod"));
    }
    Ok(select)
}

/// Labels as runtimes have them: any text.
fn container_labels(item: &Item<'_>) -> Result<BTreeMap<String, String>, DocumentError> {
    let label = |(name, item): (&str, Item<'_>)| {
        Ok((name.to_owned(), item.text("the value of a label, which is text")?.to_owned()))
    };
    item.entries("a mapping of names to texts")?.into_iter().map(label).collect()
}

fn pod(item: &Item<'_>) -> Result<PodSelect, DocumentError> {
    let fields = item.fields("`pod`", POD)?;
    let qos = fields.map("qos", |item| Ok(Qos::parse(item.word(&Qos::NAMES)?)))?;
    Ok(PodSelect {
        qos: qos.flatten(),
        uid: fields.map("uid", glob)?,
        namespace: fields.map("namespace", glob)?,
        name: fields.map("name", glob)?,
    })
}

/// What a task is called by a rule that does not say.
fn usual_name(select: &Select) -> &'static str {
    match select {
        Select::Cgroup(_) => "${cgroup}",
        Select::Unit(_) => "${unit}",
        Select::Container(_) => "container-${container.id}",
        Select::Pod(_) => "pod-${pod.uid}",
        Select::Slurm(_) => "slurm-${slurm.job}-${slurm.step}",
    }
}

/// A task of which a rule says nothing.
fn plain(select: &Select) -> Template {
    let usual = |text: &str| text.parse::<NameTemplate>().unwrap_or_else(|_| NameTemplate::cgroup());
    Template {
        name: usual(usual_name(select)),
        namespace: usual(crate::spec::DEFAULT_NAMESPACE),
        labels: BTreeMap::new(),
        container_labels: Vec::new(),
        limits: Limits::default(),
        writers: None,
    }
}

fn template(item: &Item<'_>, select: &Select) -> Result<Template, DocumentError> {
    let fields = item.fields("`task`", TASK)?;
    let usual = plain(select);
    let named = |field| fields.map(field, |item| self::named(item, select));
    let writers = fields.map("writers", |item| Ok(Writers::parse(item.word(&Writers::NAMES)?)))?;
    Ok(Template {
        name: named("name")?.unwrap_or(usual.name),
        namespace: named("namespace")?.unwrap_or(usual.namespace),
        labels: fields.map("labels", labels)?.unwrap_or_default(),
        container_labels: fields.map("container_labels", |item| copied(item, select))?.unwrap_or_default(),
        limits: fields.map("limits", limits)?.unwrap_or_default(),
        writers: writers.flatten(),
    })
}

fn named(item: &Item<'_>, select: &Select) -> Result<NameTemplate, DocumentError> {
    let known = Rule::fields(select);
    let remedy = || {
        let known: Vec<String> = known.iter().map(|field| format!("${{{}}}", field.name())).collect();
        let more = match select {
            Select::Container(container) if !container.is_asked_for() => {
                "; with `runtime` docker or podman ${container.name} too"
            }
            _ => "",
        };
        format!("here are known {}{more}", known.join(", "))
    };
    let text = item.text("a name, in which fields such as ${cgroup} can be")?;
    let template: NameTemplate = text.parse().map_err(|error: crate::adopt::InvalidTemplate| {
        item.error(error.to_string()).with_remedy(remedy())
    })?;
    if let Some(field) = template.fields().find(|field| !known.contains(field)) {
        let error = item.error(format!("`{}` is not known of what this rule selects", field.name()));
        return Err(error.with_remedy(remedy()));
    }
    Ok(template)
}

fn copied(item: &Item<'_>, select: &Select) -> Result<Vec<String>, DocumentError> {
    if !matches!(select, Select::Container(container) if container.is_asked_for()) {
        let error = item.error("labels are known of Docker's and Podman's containers only");
        return Err(error.with_remedy("leave it out, or select a container of one of the two"));
    }
    let names = item.list("a list of names of labels")?;
    names.iter().map(|name| Ok(name.text("the name of a label")?.to_owned())).collect()
}

fn limits(item: &Item<'_>) -> Result<Limits, DocumentError> {
    let fields = item.fields("`limits`", LIMITS)?;
    Ok(Limits {
        cpu: ceiling(&fields, "cpu", &CPU)?,
        cpu_weight: fields.map("cpu_weight", |item| item.written(&WEIGHT))?,
        memory: ceiling(&fields, "memory", &MEMORY)?,
        net_egress: ceiling(&fields, "net", &RATE)?,
        storage_io: ceiling(&fields, "io", &OPERATIONS)?,
        storage_io_weight: fields.map("io_weight", |item| item.written(&WEIGHT))?,
        storage_io_latency: ceiling(&fields, "io_latency", &LATENCY)?,
        reclaim_idle: fields.map("reclaim_idle", Item::boolean)?,
        net_egress_guarantee: fields.map("net_guarantee", |item| item.written(&RATE))?,
        net_egress_weight: fields.map("net_weight", |item| item.written(&WEIGHT))?,
        net_ingress: ceiling(&fields, "net_in", &RATE)?,
        gpu_cards: None,
        gpu_memory: Limit::Unlimited,
        gpu_power: Limit::Unlimited,
    })
}

fn ceiling<T>(fields: &Fields<'_, '_>, name: &str, quantity: &Written<T>) -> Result<Limit<T>, DocumentError> {
    Ok(fields.map(name, |item| item.written(quantity))?.map_or(Limit::Unlimited, Limit::At))
}

#[cfg(test)]
mod tests {
    use super::super::adoption_rules;
    use super::*;

    const RULES: &str = r#"
rules:
  - name: web
    select: {container: {runtime: docker, labels: {"com.example/team": "web team"}, image: "registry/**"}}
    task:
      name: web-${container.name}
      namespace: shop
      labels: {tier: front}
      container_labels: [team]
      limits: {cpu: 1.5, memory: 512Mi, net: 100mbit, net_in: 10mbit, io: 500, io_latency: 5ms, cpu_weight: 200}
      writers: yield
  - name: best-effort
    select: {pod: {qos: besteffort, namespace: "batch-*"}}
    task: {name: "${pod.namespace}.${pod.name}", limits: {cpu: 500m}}
  - {name: steps, select: {slurm: "*"}}
  - {name: jobs, select: {cgroup: "batch.slice/*"}}
"#;

    #[test]
    fn rules_are_read() {
        let rules = adoption_rules("r.yaml", RULES).unwrap();
        assert_eq!(rules.len(), 4);
        let Template { limits, writers, name, .. } = &rules[0].task;
        assert_eq!((limits.cpu, limits.memory), (Limit::At(Millicores(1500)), Limit::At(Bytes(512 << 20))));
        assert_eq!(
            (limits.net_egress.at(), limits.storage_io.at()),
            (Some(BitsPerSec(100_000_000)), Some(Iops(500)))
        );
        assert_eq!((*writers, name.to_string().as_str()), (Some(Writers::Yield), "web-${container.name}"));
        let Select::Container(web) = &rules[0].select else { panic!("{:?}", rules[0]) };
        assert_eq!(web.labels["com.example/team"], "web team");
        assert_eq!(rules[2].task.name.to_string(), "slurm-${slurm.job}-${slurm.step}");
        assert_eq!(rules[3].task.limits, Limits::default());
        assert_eq!(adoption_rules("r.yaml", "rules: []"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_refused_is_pointed_at() {
        for (old, new, place, said) in [
            (
                "docker",
                "rkt",
                "4:35:rules[0].select.container.runtime",
                "one of docker, podman, containerd, crio",
            ),
            (
                "runtime: docker, ",
                "",
                "4:25:rules[0].select.container",
                "Docker's and Podman's containers only",
            ),
            (
                "${container.name}",
                "${pod.name}",
                "6:13:rules[0].task.name",
                "`pod.name` is not known of what",
            ),
            (
                "{runtime: docker, labels: {\"com.example/team\": \"web team\"}, image: \"registry/**\"}",
                "{runtime: crio}",
                "6:13:rules[0].task.name",
                "`container.name` is not known of what",
            ),
            (
                "{runtime: docker, labels: {\"com.example/team\": \"web team\"}, image: \"registry/**\"}",
                "{}",
                "6:13:rules[0].task.name",
                "with `runtime` docker or podman",
            ),
            ("${container.name}", "${host}", "6:13:rules[0].task.name", "there is no field `host`"),
            ("100mbit", "fast", "10:46:rules[0].task.limits.net", "a rate on the wire"),
            (
                "cpu_weight: 200",
                "cpu_weigth: 200",
                "10:97:rules[0].task.limits.cpu_weigth",
                "did you mean `cpu_weight`",
            ),
            ("writers: yield", "writers: fight", "11:16:rules[0].task.writers", "one of hold, yield, report"),
            ("name: steps", "name: web", "15:12:rules[2].name", "is the name of a rule above"),
            ("slurm: \"*\"", "slurm: \"*\", unit: a", "15:27:rules[2].select", "has unit and slurm"),
            ("{slurm: \"*\"}", "{}", "15:27:rules[2].select", "selects nothing"),
            ("batch.slice/*", "/sys/fs/cgroup/a", "16:35:rules[3].select.cgroup", "not the path of a cgroup"),
            ("batch.slice/*", "../a", "16:35:rules[3].select.cgroup", "not the path of a cgroup"),
            ("batch.slice/*", "", "16:35:rules[3].select.cgroup", "is no pattern"),
            ("best-effort", "best effort", "12:11:rules[1].name", "is not the name of a rule"),
        ] {
            let error = adoption_rules("r.yaml", RULES.replacen(old, new, 1)).unwrap_err();
            let shown = error.to_string();
            assert_eq!(format!("{}:{}:{}", error.line, error.column, error.path), place, "{shown}");
            assert!(shown.contains(said) && shown.contains("\nhelp: "), "{shown}");
        }
    }
}
