//! What a task asks for, and what policies say: the domain types behind the profile JSON, the task spec
//! and the policy YAML. (How those documents are read is `crate::document`.)

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    gpu::CardRequest,
    id::TaskId,
    limits::Limits,
    policy::{PolicyFloors, PolicyLimits, Selector},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// Priority of a task. Ordered: `Low < Medium < High`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Batch: the first to be shrunk and evicted.
    Low,
    /// In between.
    Medium,
    /// Services: served first.
    High,
}

impl Priority {
    /// `priority_value` of the seed formula, in thousandths: 1, 0.5 and 0.
    pub const fn value_permille(self) -> u64 {
        match self {
            Priority::Low => 0,
            Priority::Medium => 500,
            Priority::High => 1000,
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Priority::Low => "low",
            Priority::Medium => "medium",
            Priority::High => "high",
        })
    }
}

/// A request: reserved at placement, guaranteed on the node. `None`: not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demand {
    /// CPU.
    pub cpu: Millicores,
    /// Memory.
    pub memory: Bytes,
    /// Memory of one GPU card; of each, if it asks for more.
    pub gpu_memory: Option<Bytes>,
    /// On the wire, for each direction.
    pub network: Option<BitsPerSec>,
    /// Reads plus writes a second, over all devices.
    pub storage_io: Option<Iops>,
}

/// A profile: what a task needs (the JSON of the same name).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The task.
    pub task_id: TaskId,
    /// Its request.
    pub demand: Demand,
    /// Its priority.
    pub priority: Priority,
    /// How long it may run, in seconds, if anybody knows.
    pub estimated_runtime_seconds: Option<u64>,
}

/// Whom a task runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A task to be placed and run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// What it needs.
    pub profile: Profile,
    /// Program and arguments; of a container, those that its image is given, if any.
    pub command: Vec<String>,
    /// Its whole environment; in a container besides the image's.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute; empty in a container: the image's.
    pub cwd: String,
    /// The history key; by default the command's basename.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Explicit ceilings. `Unlimited` here means that none was given: then CPU and network may grow to
    /// the node's free capacity, and memory is limited to the request.
    pub limits: Limits,
    /// Whom it runs as; `None`: its submitter.
    pub run_as: Option<Credentials>,
    /// How often it is placed again after it could not be started or its node was lost for good.
    pub retries: u32,
    /// What becomes of it when its node does not answer.
    #[serde(default)]
    pub on_node_lost: OnNodeLost,
    /// GPU cards that it is to have to itself, besides the memory of one that it may ask for in its profile.
    #[serde(default)]
    pub gpus: CardRequest,
    /// What it runs in; `None`: the node's own file system.
    #[serde(default)]
    pub image: Option<Image>,
}

/// Why a reference to an image was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a reference to an image: [HOST[:PORT]/]PATH[:TAG][@DIGEST] in lower case, such as \
     docker.io/library/redis:7"
)]
pub struct InvalidImage(String);

/// A reference to a container's image, as Docker and Podman take it: it cannot be taken for an option of theirs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Image(String);

impl Image {
    /// The most bytes of one.
    pub const MAX: usize = 512;

    /// The reference as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What tasks of it are called that do not say so: the last part of its path, without tag and digest.
    pub fn base(&self) -> &str {
        let path = self.0.split('@').next().unwrap_or_default();
        let last = path.rsplit('/').next().unwrap_or_default();
        last.split(':').next().unwrap_or_default()
    }

    /// By the grammar of distribution's references (github.com/distribution/reference), without its limits of each part.
    fn is_reference(text: &str) -> bool {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        let is_word = |word: &str, inner: &[u8]| {
            let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
            let bytes = word.as_bytes();
            let is_inner = |byte: &u8| byte.is_ascii_alphanumeric() || inner.contains(byte);
            edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(is_inner)
        };
        let is_path = |part: &str| is_word(part, b"._-") && !part.bytes().any(|it| it.is_ascii_uppercase());
        // A port is followed by a path, a tag is not.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        let mut parts: Vec<&str> = name.split('/').collect();
        let first = parts.first().copied().unwrap_or_default();
        if parts.len() > 1 && (first.contains(['.', ':']) || first == "localhost") {
            parts.remove(0);
            let (host, port) = first.split_once(':').unwrap_or((first, "0"));
            if !is_word(host, b".-") || port.is_empty() || !port.bytes().all(|it| it.is_ascii_digit()) {
                return false;
            }
        }
        // The first byte of a tag may be `_`; nobody misses that.
        let is_tag = |tag: &str| {
            let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            tag.len() <= 128
                && tag.starts_with(|it: char| it.is_ascii_alphanumeric())
                && tag.bytes().all(is_inner)
        };
        let is_digest = |digest: &str| {
            digest.split_once(':').is_some_and(|(algorithm, hex)| {
                is_word(algorithm, b"+._-") && hex.len() >= 32 && hex.bytes().all(|it| it.is_ascii_hexdigit())
            })
        };
        parts.iter().all(|part| is_path(part)) && tag.is_none_or(is_tag) && digest.is_none_or(is_digest)
    }
}

impl FromStr for Image {
    type Err = InvalidImage;

    fn from_str(text: &str) -> Result<Image, InvalidImage> {
        if text.len() <= Image::MAX && Image::is_reference(text) {
            return Ok(Image(text.to_owned()));
        }
        Err(InvalidImage(text.chars().take(64).flat_map(char::escape_default).collect()))
    }
}

impl TryFrom<String> for Image {
    type Error = InvalidImage;

    fn try_from(text: String) -> Result<Image, InvalidImage> {
        text.parse()
    }
}

impl From<Image> for String {
    fn from(image: Image) -> String {
        image.0
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What becomes of a task when its node does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNodeLost {
    /// It is placed again when the node is back without it, or when an operator says that the node is dead.
    #[default]
    Wait,
    /// It is ended on the node once the broker was not heard of there for the broker's task lease, and placed again half as
    /// long after that.
    Rerun,
}

impl OnNodeLost {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            OnNodeLost::Wait => "wait",
            OnNodeLost::Rerun => "rerun",
        }
    }
}

/// The namespace of whoever names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What a node has, or what of it is reserved. `None`: not known, and not filtered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// CPU.
    pub cpu: Millicores,
    /// Memory.
    pub memory: Bytes,
    /// Memory of each of its GPU cards; `None`: it offers none.
    pub gpu_memory: Option<Bytes>,
    /// Of the uplink.
    pub network: Option<BitsPerSec>,
    /// Of all devices.
    pub storage_io: Option<Iops>,
}

/// A policy: for the tasks of its priority in its namespace that its selector selects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its name.
    pub policy_name: String,
    /// Which tasks it covers.
    pub priority: Priority,
    /// In which namespace.
    pub namespace: String,
    /// Their demand where they state none.
    pub demand: Option<Demand>,
    /// Node CPU utilisation, in thousandths, that arms the policy; `None`: it never shrinks or evicts others.
    pub eviction_threshold_permille: Option<u32>,
    /// Whether tasks that it covers may take the place of lower ones: on their node, and where they fit on none.
    pub preemption_enabled: bool,
    /// Over which utilisation is averaged, and how long a remedy has before the next, in milliseconds.
    pub window_millis: u64,
    /// Which of the tasks of its priority and namespace.
    #[serde(default)]
    pub selector: Selector,
    /// What they are granted at most.
    #[serde(default)]
    pub limits: PolicyLimits,
    /// How far down what is reserved for them may come.
    #[serde(default)]
    pub floors: PolicyFloors,
}

/// The window of a policy that names none: 10 s.
pub const DEFAULT_WINDOW_MILLIS: u64 = 10_000;

/// One decision about a task, as it is explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// When.
    pub at: crate::task::UnixNanos,
    /// `broker`, or the name of a node.
    pub by: String,
    /// What.
    pub kind: DecisionKind,
    /// Why, for people, with numbers.
    pub reason: String,
    /// The nodes that were considered.
    pub nodes: Vec<NodeVerdict>,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecisionKind {
    /// Put on a node.
    Placed,
    /// No node fits now.
    Pending,
    /// More nodes were asked for.
    ScaleOut,
    /// May use more than before.
    Grew,
    /// May use less than before.
    Shrunk,
    /// Memory that it did not use was taken away.
    Reclaimed,
    /// Ended, to make room.
    Evicted,
    /// Could not be started.
    Refused,
    /// Over.
    Ended,
    /// Its node does not answer.
    Lost,
    /// Ended by request.
    Cancelled,
}

impl DecisionKind {
    /// All of them, in their order.
    pub const ALL: [DecisionKind; 11] = [
        DecisionKind::Placed,
        DecisionKind::Pending,
        DecisionKind::ScaleOut,
        DecisionKind::Grew,
        DecisionKind::Shrunk,
        DecisionKind::Reclaimed,
        DecisionKind::Evicted,
        DecisionKind::Refused,
        DecisionKind::Ended,
        DecisionKind::Lost,
        DecisionKind::Cancelled,
    ];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            DecisionKind::Placed => "placed",
            DecisionKind::Pending => "pending",
            DecisionKind::ScaleOut => "scale_out",
            DecisionKind::Grew => "grew",
            DecisionKind::Shrunk => "shrunk",
            DecisionKind::Reclaimed => "reclaimed",
            DecisionKind::Evicted => "evicted",
            DecisionKind::Refused => "refused",
            DecisionKind::Ended => "ended",
            DecisionKind::Lost => "lost",
            DecisionKind::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for DecisionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a node was judged for a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeVerdict {
    /// The node.
    pub node: String,
    /// Score of the seed formula, for display only; `None`: not feasible.
    pub score: Option<f64>,
    /// What did not fit, with numbers.
    pub lacking: Vec<String>,
    /// Resources whose capacity the node does not know.
    pub not_checked: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_known_by_their_form() {
        let digest = format!("redis@sha256:{}", "0a".repeat(32));
        for (text, base) in [
            ("redis", "redis"),
            ("redis:7.2-alpine", "redis"),
            ("library/redis", "redis"),
            ("docker.io/library/redis:7", "redis"),
            ("localhost:5000/team/etl__v2.x:Latest", "etl__v2.x"),
            ("registry.example.org/a/b/c", "c"),
            (&digest, "redis"),
        ] {
            let image: Image = text.parse().unwrap();
            assert_eq!((image.as_str(), image.base()), (text, base));
        }
        let long = "a".repeat(Image::MAX + 1);
        for text in [
            "",
            "-v",
            "--privileged",
            "/redis",
            "redis/",
            "a//b",
            "Redis",
            "redis:",
            "redis:-v",
            "redis@",
            "redis@sha256:0",
            "re dis",
            "redis\n",
            "redis\0",
            "host:port/redis",
            "docker.io:/redis",
            "a:b:c",
            "../redis",
            &long,
        ] {
            assert!(text.parse::<Image>().is_err(), "{text:?}");
        }
        assert_eq!("-v /:/host".parse::<Image>().unwrap_err().to_string().find("`-v /:/host`"), Some(0));
    }
}
