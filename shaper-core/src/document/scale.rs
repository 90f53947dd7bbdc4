//! The groups of nodes that a broker may have started and ended: `settle_seconds`, `groups`.

use super::{
    error::{DocumentError, quoted},
    profile::{BANDWIDTH, CORES, MEMORY, name},
    read::{Field, Item, Kind, Quantity},
};
use crate::{
    policy::NamePattern,
    scale::{Group, Nanos, Provider, Scaling},
    spec::Capacity,
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// The most nodes of a group, and groups.
const MOST_NODES: u64 = 10_000;
const MOST_GROUPS: usize = 64;

const SCALING: &[Field] = &[
    Field::optional("settle_seconds", Kind::Unpublished, "10"),
    Field::required(
        "groups",
        Kind::Unpublished,
        "[{\"name\": \"workers\", \"nodes\": \"worker-*\", \"max\": 10, …}]",
    ),
];

const GROUP: &[Field] = &[
    Field::required("name", Kind::Name, "\"workers\""),
    Field::required("nodes", Kind::NamePattern, "\"worker-*\""),
    Field::optional("capacity", Kind::Unpublished, "{\"cpu_cores\": 8, \"memory_gb\": 32}"),
    Field::optional("min", Kind::Unpublished, "0"),
    Field::required("max", Kind::Unpublished, "10"),
    Field::optional("cooldown_seconds", Kind::Unpublished, "30"),
    Field::optional("provision_seconds", Kind::Unpublished, "900"),
    Field::optional("idle_seconds", Kind::Unpublished, "600"),
    Field::optional("timeout_seconds", Kind::Unpublished, "60"),
    Field::required(
        "provider",
        Kind::Unpublished,
        "{\"externalgrpc\": {\"address\": \"https://10.0.0.5:8086\", \"group\": \"workers\"}}",
    ),
];

const CAPACITY: &[Field] = &[
    Field::required("cpu_cores", Kind::Quantity(&CORES), "8"),
    Field::required("memory_gb", Kind::Quantity(&MEMORY), "32"),
    Field::optional("gpu_memory_gb", Kind::Quantity(&MEMORY), "16"),
    Field::optional("network_bandwidth_mbps", Kind::Quantity(&BANDWIDTH), "10000"),
    Field::optional("storage_io_ops", Kind::Whole { min: 1, max: Iops::MAX.0 }, "5000"),
];

const PROVIDERS: &[Field] = &[
    Field::optional(
        "externalgrpc",
        Kind::Unpublished,
        "{\"address\": \"http://127.0.0.1:8086\", \"group\": \"workers\"}",
    ),
    Field::optional(
        "webhook",
        Kind::Unpublished,
        "{\"url\": \"https://hooks/scale\", \"secret_file\": \"/etc/shaper/secret\"}",
    ),
    Field::optional("exec", Kind::Unpublished, "{\"command\": [\"/usr/local/bin/scale\"]}"),
    Field::optional("keda", Kind::Unpublished, "{}"),
];

const EXTERNAL_GRPC: &[Field] = &[
    Field::required("address", Kind::Unpublished, "\"https://10.0.0.5:8086\""),
    Field::required("group", Kind::Unpublished, "\"workers\""),
    Field::optional("ca", Kind::Unpublished, "\"/etc/shaper/provider-ca.pem\""),
    Field::optional("cert", Kind::Unpublished, "\"/etc/shaper/provider-cert.pem\""),
    Field::optional("key", Kind::Unpublished, "\"/etc/shaper/provider-key.pem\""),
];

const WEBHOOK: &[Field] = &[
    Field::required("url", Kind::Unpublished, "\"https://hooks.example.org/scale\""),
    Field::required("secret_file", Kind::Unpublished, "\"/etc/shaper/webhook-secret\""),
    Field::optional("ca", Kind::Unpublished, "\"/etc/shaper/webhook-ca.pem\""),
];

const EXEC: &[Field] = &[Field::required("command", Kind::Unpublished, "[\"/usr/local/bin/scale\"]")];

const SECONDS: u64 = 1_000_000_000;

const fn seconds(min: u64, max: u64, expected: &'static str) -> Quantity {
    Quantity {
        unit: SECONDS,
        min: min * SECONDS / 10,
        max: max * SECONDS,
        expected,
        remedy: "write seconds as a plain number, such as 30",
    }
}

/// The minimum is in tenths of a second.
const SETTLE: Quantity = seconds(0, 3600, "a number of seconds from 0 to 3600");
const PAUSE: Quantity = seconds(0, 86_400, "a number of seconds from 0 to 86400");
const PROVISION: Quantity = seconds(10, 86_400, "a number of seconds from 1 to 86400");
const TIMEOUT: Quantity = seconds(1, 3600, "a number of seconds from 0.1 to 3600");

pub(super) fn scaling(item: &Item<'_>) -> Result<Scaling, DocumentError> {
    let fields = item.fields("a scaling document", SCALING)?;
    let settle = fields.map("settle_seconds", |item| item.quantity(&SETTLE))?.unwrap_or(10 * SECONDS);
    let list = fields.required("groups")?;
    let items = list.list("a list of groups")?;
    if items.is_empty() || items.len() > MOST_GROUPS {
        let error = list.error(format!("must have 1 to {MOST_GROUPS} groups, and has {}", items.len()));
        return Err(error.with_remedy("without any, leave --scale out"));
    }
    let mut groups: Vec<Group> = Vec::with_capacity(items.len());
    for item in &items {
        let group = group(item)?;
        if groups.iter().any(|there| there.name == group.name) {
            let error = item.error(format!("there is a group {} already", quoted(&group.name)));
            return Err(error.with_remedy("give each group a name of its own"));
        }
        groups.push(group);
    }
    Ok(Scaling { settle, groups })
}

fn group(item: &Item<'_>) -> Result<Group, DocumentError> {
    let fields = item.fields("a group", GROUP)?;
    let count = |item: &Item<'_>| item.whole(0, MOST_NODES, "a number of nodes").map(|it| it as u32);
    let min = fields.map("min", count)?.unwrap_or(0);
    let max_item = fields.required("max")?;
    let max = count(max_item)?;
    if max < min || max == 0 {
        let error = max_item.error(format!("must be at least 1, and at least `min`, which is {min}"));
        return Err(error.with_remedy("a group that may have no nodes is left out"));
    }
    let provider_item = fields.required("provider")?;
    let provider = provider(provider_item)?;
    let capacity = fields.map("capacity", capacity)?;
    if capacity.is_none() && !provider.tells() {
        let error = item.error(format!(
            "needs `capacity`: its provider, {}, cannot say what a node has",
            provider.kind()
        ));
        return Err(
            error.with_remedy("add it, such as `\"capacity\": {\"cpu_cores\": 8, \"memory_gb\": 32}`")
        );
    }
    let span = |name: &str, quantity: &Quantity| -> Result<Option<Nanos>, DocumentError> {
        fields.map(name, |item| item.quantity(quantity))
    };
    Ok(Group {
        name: name(fields.required("name")?, "a name of a group")?.into(),
        nodes: nodes(fields.required("nodes")?)?,
        capacity,
        min,
        max,
        cooldown: span("cooldown_seconds", &PAUSE)?.unwrap_or(30 * SECONDS),
        provision: span("provision_seconds", &PROVISION)?.unwrap_or(900 * SECONDS),
        idle: span("idle_seconds", &PAUSE)?,
        timeout: span("timeout_seconds", &TIMEOUT)?.unwrap_or(60 * SECONDS),
        provider,
    })
}

fn nodes(item: &Item<'_>) -> Result<NamePattern, DocumentError> {
    let text = item.text("a name of nodes, or a pattern such as worker-*")?;
    text.parse().map_err(|_| {
        item.error(format!("{} is no name and no pattern of names", quoted(text))).with_remedy(
            "use 1 to 63 characters out of a-z, A-Z, 0-9, `-`, `_` and `.`; `*` stands for any of them",
        )
    })
}

fn capacity(item: &Item<'_>) -> Result<Capacity, DocumentError> {
    let fields = item.fields("the capacity of a node", CAPACITY)?;
    Ok(Capacity {
        cpu: Millicores(fields.required("cpu_cores")?.quantity(&CORES)?),
        memory: Bytes(fields.required("memory_gb")?.quantity(&MEMORY)?),
        gpu_memory: fields.map("gpu_memory_gb", |item| item.quantity(&MEMORY).map(Bytes))?,
        network: fields.map("network_bandwidth_mbps", |item| item.quantity(&BANDWIDTH).map(BitsPerSec))?,
        storage_io: fields.map("storage_io_ops", |item| {
            item.whole(1, Iops::MAX.0, "a number of operations a second").map(Iops)
        })?,
    })
}

fn provider(item: &Item<'_>) -> Result<Provider, DocumentError> {
    let fields = item.fields("a provider", PROVIDERS)?;
    let said = [
        fields.map("externalgrpc", external_grpc)?,
        fields.map("webhook", webhook)?,
        fields.map("exec", exec)?,
        fields.map("keda", |item| item.fields("the provider keda", &[]).map(|_| Provider::Keda))?,
    ];
    let mut said = said.into_iter().flatten();
    match (said.next(), said.next()) {
        (Some(provider), None) => Ok(provider),
        _ => Err(item
            .error("must name one provider")
            .with_remedy("write one of externalgrpc, webhook, exec and keda")),
    }
}

fn external_grpc(item: &Item<'_>) -> Result<Provider, DocumentError> {
    let fields = item.fields("the provider externalgrpc", EXTERNAL_GRPC)?;
    let address = fields.required("address")?;
    let url = url(address)?;
    let (ca, cert, key) = (fields.map("ca", path)?, fields.map("cert", path)?, fields.map("key", path)?);
    if url.starts_with("http://") && (ca.is_some() || cert.is_some() || key.is_some()) {
        return Err(address.error("is plain http, and certificates are named").with_remedy("write https://"));
    }
    if url.starts_with("https://") && ca.is_none() {
        let error = item.error("needs `ca`: the authority that signed the provider's certificate");
        return Err(error.with_remedy("name a file of PEM"));
    }
    if cert.is_some() != key.is_some() {
        return Err(item.error("must have both `cert` and `key`, or neither").with_remedy("add the other"));
    }
    let group = fields.required("group")?.text("what the provider calls the group")?.to_owned();
    Ok(Provider::ExternalGrpc { address: url, group, ca, identity: cert.zip(key) })
}

fn webhook(item: &Item<'_>) -> Result<Provider, DocumentError> {
    let fields = item.fields("the provider webhook", WEBHOOK)?;
    Ok(Provider::Webhook {
        url: url(fields.required("url")?)?,
        secret_file: path(fields.required("secret_file")?)?,
        ca: fields.map("ca", path)?,
    })
}

fn exec(item: &Item<'_>) -> Result<Provider, DocumentError> {
    let fields = item.fields("the provider exec", EXEC)?;
    let list = fields.required("command")?;
    let words = list.list("a program and its arguments, a list of texts")?;
    let command =
        words.iter().map(|word| word.text("a text").map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
    match command.first() {
        Some(program) if program.starts_with('/') => Ok(Provider::Exec { command }),
        _ => Err(list
            .error("must begin with the absolute path of a program")
            .with_remedy("write [\"/usr/local/bin/scale\", \"workers\"]; there is no shell")),
    }
}

fn url(item: &Item<'_>) -> Result<String, DocumentError> {
    let text = item.text("a URL such as https://10.0.0.5:8086")?;
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let has_host = rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
    if has_host && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(text.to_owned());
    }
    Err(item
        .error(format!("{} is no URL of http or https", quoted(text)))
        .with_remedy("write http://HOST:PORT or https://HOST:PORT"))
}

fn path(item: &Item<'_>) -> Result<String, DocumentError> {
    let text = item.text("the absolute path of a file")?;
    if text.starts_with('/') {
        return Ok(text.to_owned());
    }
    Err(item
        .error(format!("{} is not absolute", quoted(text)))
        .with_remedy("write the whole path, such as /etc/shaper/ca.pem"))
}
