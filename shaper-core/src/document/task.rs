//! The task spec: a profile, a command, and what is around it. A bare profile is a draft of one.

use std::collections::BTreeMap;

use super::{
    error::{DocumentError, quoted},
    profile::{self, BANDWIDTH, CORES, GPU_MEMORY, MEMORY, PROFILE, name},
    read::{Field, Item, Kind, Quantity},
};
use crate::{
    gpu::{CARDS_MAX, CardRequest},
    limits::{Limit, Limits},
    spec::{Credentials, DEFAULT_NAMESPACE, Demand, Image, OnNodeLost, Profile, TaskSpec},
    units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Weight},
};

/// The most retries of a task.
pub const MAX_RETRIES: u32 = 1000;

/// What a task document says, before what it leaves out is filled in: `None` was not said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskDraft {
    /// What the task needs.
    pub profile: Profile,
    /// Program and arguments; not empty.
    pub command: Option<Vec<String>>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute.
    pub cwd: Option<String>,
    /// The history key.
    pub name: Option<String>,
    /// Namespace.
    pub namespace: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Explicit ceilings, none below the request.
    pub limits: Limits,
    /// Whom it runs as.
    pub run_as: Option<Credentials>,
    /// How often it is placed again.
    pub retries: u32,
    /// What becomes of it when its node does not answer.
    pub on_node_lost: OnNodeLost,
    /// GPU cards of its own.
    pub gpus: CardRequest,
    /// What it runs in.
    pub image: Option<Image>,
}

/// A draft names neither a command nor an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the task has no command, and no image that has one")]
pub struct NoCommand;

impl TaskDraft {
    fn new(profile: Profile) -> TaskDraft {
        TaskDraft {
            profile,
            command: None,
            env: BTreeMap::new(),
            cwd: None,
            name: None,
            namespace: None,
            labels: BTreeMap::new(),
            limits: Limits::default(),
            run_as: None,
            retries: 0,
            on_node_lost: OnNodeLost::Wait,
            gpus: CardRequest::default(),
            image: None,
        }
    }

    /// The spec, with defaults for what was not said: the basename of the command or the image as the name, the default
    /// namespace, and `cwd`, unless the image has one of its own.
    pub fn complete(self, cwd: &str) -> Result<TaskSpec, NoCommand> {
        let TaskDraft {
            profile,
            command,
            env,
            cwd: own_cwd,
            name,
            namespace,
            labels,
            limits,
            run_as,
            retries,
            on_node_lost,
            gpus,
            image,
        } = self;
        let command = command.unwrap_or_default();
        let (own_name, cwd) = match (&image, command.first()) {
            (Some(image), _) => (image.base(), ""),
            (None, Some(program)) => (basename(program), cwd),
            (None, None) => return Err(NoCommand),
        };
        let name = name.unwrap_or_else(|| own_name.to_owned());
        Ok(TaskSpec {
            profile,
            command,
            env,
            cwd: own_cwd.unwrap_or_else(|| cwd.to_owned()),
            name,
            namespace: namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            labels,
            limits,
            run_as,
            retries,
            on_node_lost,
            gpus,
            image,
        })
    }
}

/// The most bytes of a name: what a file may have.
const NAME_MAX: usize = 255;

/// What a task is called that does not say so.
fn basename(program: &str) -> &str {
    let name = program.rsplit(['/', '\0']).find(|part| !part.is_empty()).unwrap_or("command");
    let fits = |(at, letter): (usize, char)| Some(at + letter.len_utf8()).filter(|end| *end <= NAME_MAX);
    let end = name.char_indices().map_while(fits).last().unwrap_or(0);
    &name[..end]
}

const TASK: &[Field] = &[
    Field::required(
        "profile",
        Kind::Fields(PROFILE),
        "{\"task_id\": \"etl-1\", \"resource_demand\": {\"cpu_cores\": 4, \"memory_gb\": 8}, \
         \"priority\": \"medium\"}",
    ),
    Field::optional("command", Kind::Unpublished, "[\"python3\", \"etl.py\"]"),
    Field::optional("env", Kind::Unpublished, "{\"MODE\": \"fast\"}"),
    Field::optional("cwd", Kind::Unpublished, "\"/srv/etl\""),
    Field::optional("name", Kind::Unpublished, "\"etl\""),
    Field::optional("namespace", Kind::Unpublished, "\"default\""),
    Field::optional("labels", Kind::Unpublished, "{\"team\": \"data\"}"),
    Field::optional("limits", Kind::Unpublished, "{\"cpu_cores\": 8}"),
    Field::optional("run_as", Kind::Unpublished, "{\"uid\": 1000, \"gid\": 1000}"),
    Field::optional("retries", Kind::Unpublished, "3"),
    Field::optional("on_node_lost", Kind::Unpublished, "\"rerun\""),
    Field::optional("gpus", Kind::Unpublished, "2"),
    Field::optional("gpu_model", Kind::Unpublished, "\"H100\""),
    Field::optional("image", Kind::Unpublished, "\"docker.io/library/redis:7\""),
];

const LIMITS: &[Field] = &[
    Field::optional("cpu_cores", Kind::Unpublished, "8"),
    Field::optional("memory_gb", Kind::Unpublished, "16"),
    Field::optional("network_bandwidth_mbps", Kind::Unpublished, "100"),
    Field::optional("storage_io_ops", Kind::Unpublished, "500"),
    Field::optional("storage_io_latency_ms", Kind::Unpublished, "5"),
    Field::optional("storage_io_weight", Kind::Unpublished, "100"),
    Field::optional("cpu_weight", Kind::Unpublished, "100"),
    Field::optional("network_weight", Kind::Unpublished, "100"),
    Field::optional("network_ingress_mbps", Kind::Unpublished, "10"),
    Field::optional("reclaim_idle", Kind::Unpublished, "true"),
    Field::optional("gpu_memory_gb", Kind::Unpublished, "40"),
];

const LATENCY: Quantity = Quantity {
    unit: 1000,
    min: Micros::LATENCY_MIN.0,
    max: Micros::LATENCY_MAX.0,
    expected: "a number of milliseconds from 0.1 to 500",
    remedy: "write milliseconds as a plain number, such as 5 or 0.5; leave the field out to promise nothing",
};

const RUN_AS: &[Field] = &[
    Field::required("uid", Kind::Unpublished, "1000"),
    Field::required("gid", Kind::Unpublished, "1000"),
    Field::optional("groups", Kind::Unpublished, "[1000]"),
];

/// A task spec, or a bare profile, which has the fields of one at its root.
pub(super) fn task(root: &Item<'_>) -> Result<TaskDraft, DocumentError> {
    let entries = root.entries("a task spec or a task profile: a mapping of fields")?;
    let has =
        |fields: &[Field]| entries.iter().any(|(name, _)| fields.iter().any(|field| field.name == *name));
    if has(PROFILE) && !has(TASK) {
        return profile::profile(root).map(TaskDraft::new);
    }
    let fields = root.fields("a task spec", TASK)?;
    let profile = profile::profile(fields.required("profile")?)?;
    let limits = fields.map("limits", |item| limits(item, &profile.demand))?.unwrap_or_default();
    let named = |field, what| -> Result<Option<String>, DocumentError> {
        Ok(fields.map(field, |item| name(item, what))?.map(String::from))
    };
    Ok(TaskDraft {
        command: fields.map("command", command)?,
        env: fields.map("env", environment)?.unwrap_or_default(),
        cwd: fields.map("cwd", directory)?,
        name: named("name", "a name")?,
        namespace: named("namespace", "a namespace")?,
        labels: fields.map("labels", labels)?.unwrap_or_default(),
        limits,
        run_as: fields.map("run_as", credentials)?,
        // It fits: at most MAX_RETRIES.
        retries: fields
            .map("retries", |item| item.whole(0, MAX_RETRIES.into(), "a number of retries"))?
            .and_then(|retries| u32::try_from(retries).ok())
            .unwrap_or(0),
        on_node_lost: fields.map("on_node_lost", on_node_lost)?.unwrap_or_default(),
        gpus: cards(
            fields.map("gpus", |item| item.whole(0, CARDS_MAX.into(), "a number of GPU cards"))?,
            fields.optional("gpu_model"),
        )?,
        image: fields.map("image", image)?,
        ..TaskDraft::new(profile)
    })
}

/// How many cards, and of which model. A model alone is one of memory of a card.
fn cards(count: Option<u64>, model: Option<&Item<'_>>) -> Result<CardRequest, DocumentError> {
    let model = model.map(|item| argument(item, "a part of the name of a GPU's model")).transpose()?;
    // It fits: at most CARDS_MAX.
    let count = count.and_then(|count| u32::try_from(count).ok()).unwrap_or(0);
    Ok(CardRequest { count, model: model.unwrap_or_default().to_owned() })
}

fn image(item: &Item<'_>) -> Result<Image, DocumentError> {
    let text = item.text("a reference to a container's image")?;
    text.parse().map_err(|_| {
        let error = item.error(format!("{} is not a reference to an image", quoted(text)));
        error.with_remedy(
            "write [HOST[:PORT]/]PATH[:TAG][@DIGEST] in lower case, such as docker.io/library/redis:7",
        )
    })
}

fn on_node_lost(item: &Item<'_>) -> Result<OnNodeLost, DocumentError> {
    let known = [OnNodeLost::Wait, OnNodeLost::Rerun];
    let word = item.word(&known.map(OnNodeLost::name))?;
    Ok(known.into_iter().find(|it| it.name() == word).unwrap_or_default())
}

/// Text that can be handed to a program.
fn argument<'a>(item: &Item<'a>, expected: &str) -> Result<&'a str, DocumentError> {
    let text = item.text(expected)?;
    if text.contains('\0') {
        let error = item.error("has a NUL character in it, which no program can be given");
        return Err(error.with_remedy("leave the NUL out"));
    }
    Ok(text)
}

fn command(item: &Item<'_>) -> Result<Vec<String>, DocumentError> {
    const EXPECTED: &str = "a list of the program and its arguments";
    const REMEDY: &str =
        "write a list, such as [\"python3\", \"etl.py\"]; a shell is a program: [\"sh\", \"-c\", \"…\"]";
    let words = item.list(EXPECTED).map_err(|error| error.with_remedy(REMEDY))?;
    let Some(program) = words.first() else {
        return Err(item.error("is empty").with_remedy(REMEDY));
    };
    let path = argument(program, "the name of a program")?;
    if path.is_empty() || path.ends_with('/') {
        let error = program.error(format!("{} is not the name of a program", quoted(path)));
        return Err(error.with_remedy(REMEDY));
    }
    words.iter().map(|word| argument(word, "an argument, which is text").map(str::to_owned)).collect()
}

fn environment(item: &Item<'_>) -> Result<BTreeMap<String, String>, DocumentError> {
    let variables = item.entries("the environment: a mapping of names to texts")?;
    let variable = |(name, item): (&str, Item<'_>)| {
        if name.is_empty() || name.contains(['=', '\0']) {
            let error = item.error(format!("{} is not the name of a variable", quoted(name)));
            return Err(error.with_remedy("a name is not empty, and has no `=` in it"));
        }
        Ok((name.to_owned(), argument(&item, "a text")?.to_owned()))
    };
    variables.into_iter().map(variable).collect()
}

fn directory(item: &Item<'_>) -> Result<String, DocumentError> {
    let path = argument(item, "a directory")?;
    if !path.starts_with('/') {
        let error = item.error(format!("{} is not an absolute path", quoted(path)));
        return Err(error.with_remedy("write the whole path, from `/` on"));
    }
    Ok(path.to_owned())
}

/// Whether a text may be the value of a label, and, unless it is empty, the name of one.
pub fn fits_label(text: &str) -> bool {
    text.len() <= 63 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
}

pub(super) fn labels(item: &Item<'_>) -> Result<BTreeMap<String, String>, DocumentError> {
    const RULE: &str =
        "use up to 63 characters out of a-z, A-Z, 0-9, `-`, `_`, `.` and `/`; a name has at least one";
    let label = |(name, item): (&str, Item<'_>)| {
        let value = item.text("the value of a label, which is text")?;
        for (text, fits) in [(name, fits_label(name) && !name.is_empty()), (value, fits_label(value))] {
            if !fits {
                return Err(item.error(format!("{} cannot be in a label", quoted(text))).with_remedy(RULE));
            }
        }
        Ok((name.to_owned(), value.to_owned()))
    };
    let entries = item.entries("a mapping of names to texts").map_err(|error| match error.remedy {
        Some(_) => error,
        None => error.with_remedy("write each as a name and a text, such as {\"team\": \"data\"}"),
    });
    entries?.into_iter().map(label).collect()
}

fn limits(item: &Item<'_>, request: &Demand) -> Result<Limits, DocumentError> {
    let fields = item.fields("the limits of a task", LIMITS)?;
    let at_least = |item: &Item<'_>, limit: u64, request: u64, shown: String| {
        if limit >= request {
            return Ok(limit);
        }
        let error = item.error(format!("is below the request, which is {shown}"));
        Err(error.with_remedy("raise the limit, lower the request, or leave the limit out"))
    };
    let cpu = fields.map("cpu_cores", |item| {
        at_least(item, item.quantity(&CORES)?, request.cpu.0, format!("{} cores", request.cpu))
    })?;
    let memory = fields.map("memory_gb", |item| {
        at_least(item, item.quantity(&MEMORY)?, request.memory.0, request.memory.to_string())
    })?;
    let gpu_memory = fields.map("gpu_memory_gb", |item| {
        let requested = request.gpu_memory.unwrap_or(Bytes(0));
        at_least(item, item.quantity(&GPU_MEMORY)?, requested.0, requested.to_string())
    })?;
    // What is requested is meant for each direction.
    let network = |name| {
        fields.map(name, |item| {
            let requested = request.network.unwrap_or(BitsPerSec(0));
            at_least(item, item.quantity(&BANDWIDTH)?, requested.0, requested.to_string())
        })
    };
    let operations = fields.map("storage_io_ops", |item| {
        let requested = request.storage_io.unwrap_or(Iops(0));
        let limit = item.whole(1, Iops::MAX.0, "a number of operations a second")?;
        at_least(item, limit, requested.0, requested.to_string())
    })?;
    let latency = fields.map("storage_io_latency_ms", |item| item.quantity(&LATENCY))?;
    let weight = |name| -> Result<Option<Weight>, DocumentError> {
        let weight = fields.map(name, |item| item.whole(1, 10_000, "a weight"))?;
        Ok(weight.and_then(|weight| u32::try_from(weight).ok()).and_then(Weight::new))
    };
    fn limit<T>(value: Option<u64>, unit: impl FnOnce(u64) -> T) -> Limit<T> {
        value.map_or(Limit::Unlimited, |value| Limit::At(unit(value)))
    }
    Ok(Limits {
        cpu: limit(cpu, Millicores),
        cpu_weight: weight("cpu_weight")?,
        memory: limit(memory, Bytes),
        net_egress: limit(network("network_bandwidth_mbps")?, BitsPerSec),
        storage_io: limit(operations, Iops),
        storage_io_weight: weight("storage_io_weight")?,
        storage_io_latency: limit(latency, Micros),
        reclaim_idle: fields.map("reclaim_idle", Item::boolean)?,
        // The request is guaranteed.
        net_egress_guarantee: None,
        net_egress_weight: weight("network_weight")?,
        net_ingress: limit(network("network_ingress_mbps")?, BitsPerSec),
        // Which cards there are, a node knows, and no document.
        gpu_cards: None,
        gpu_memory: limit(gpu_memory, Bytes),
        gpu_power: Limit::Unlimited,
    })
}

fn credentials(item: &Item<'_>) -> Result<Credentials, DocumentError> {
    let fields = item.fields("whom a task runs as", RUN_AS)?;
    // The last one means nobody, to the kernel.
    let id = |item: &Item<'_>, what: &str| {
        let id = item.whole(0, u64::from(u32::MAX) - 1, what)?;
        u32::try_from(id).map_err(|_| item.mismatch(what))
    };
    let groups = fields.map("groups", |item| {
        item.list("a list of group ids")?.iter().map(|item| id(item, "a group id")).collect()
    })?;
    Ok(Credentials {
        uid: id(fields.required("uid")?, "a user id")?,
        gid: id(fields.required("gid")?, "a group id")?,
        groups: groups.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::basename;

    #[test]
    fn a_task_is_called_by_its_program_as_far_as_a_name_goes() {
        assert_eq!(basename("/usr/bin/python3"), "python3");
        assert_eq!(basename("run.sh/"), "run.sh");
        assert_eq!(basename("//"), "command");
        assert_eq!(basename(&"x".repeat(300)), "x".repeat(255));
        assert_eq!(basename(&"ü".repeat(300)), "ü".repeat(127), "whole letters");
    }
}
