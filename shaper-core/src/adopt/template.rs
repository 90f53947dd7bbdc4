//! Names that are made of what was found: `web-${container.name}`.

use std::{fmt, str::FromStr};

use super::{Facts, Place};

/// What a name can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The last component of the path.
    Cgroup,
    /// The unit, without what its name ends in.
    Unit,
    /// The first twelve digits of the container's id.
    ContainerId,
    /// The container's name.
    ContainerName,
    /// The pod's UID.
    PodUid,
    /// The pod's namespace.
    PodNamespace,
    /// The pod's name.
    PodName,
    /// The job's number.
    SlurmJob,
    /// The step.
    SlurmStep,
}

impl Field {
    const ALL: [Field; 9] = [
        Field::Cgroup,
        Field::Unit,
        Field::ContainerId,
        Field::ContainerName,
        Field::PodUid,
        Field::PodNamespace,
        Field::PodName,
        Field::SlurmJob,
        Field::SlurmStep,
    ];

    /// How it is written between `${` and `}`.
    pub fn name(self) -> &'static str {
        match self {
            Field::Cgroup => "cgroup",
            Field::Unit => "unit",
            Field::ContainerId => "container.id",
            Field::ContainerName => "container.name",
            Field::PodUid => "pod.uid",
            Field::PodNamespace => "pod.namespace",
            Field::PodName => "pod.name",
            Field::SlurmJob => "slurm.job",
            Field::SlurmStep => "slurm.step",
        }
    }
}

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTemplate {
    /// `${` without `}`.
    #[error("`${{` is not closed by `}}`")]
    Open,
    /// No field of that name.
    #[error("there is no field `{0}`")]
    Unknown(String),
    /// What is around the fields.
    #[error("`{0}` cannot be in a name: use a-z, A-Z, 0-9, `-`, `_` and `.`, and fields such as ${{cgroup}}")]
    Letter(char),
    /// Nothing.
    #[error("a name has at least one character")]
    Empty,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
}

/// A name with fields in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameTemplate(Vec<Part>);

/// The longest name of a task.
const NAME_MAX: usize = 63;
/// Digits of a container's id that people use.
const SHORT_ID: usize = 12;
/// Digits that tell long names apart.
const DIGEST: usize = 12;

impl NameTemplate {
    /// The last component of the path.
    pub fn cgroup() -> NameTemplate {
        NameTemplate(vec![Part::Field(Field::Cgroup)])
    }

    /// Whether a field is in it.
    pub fn uses(&self, field: Field) -> bool {
        self.0.contains(&Part::Field(field))
    }

    /// Its fields.
    pub fn fields(&self) -> impl Iterator<Item = Field> + '_ {
        self.0.iter().filter_map(|part| match part {
            Part::Field(field) => Some(*field),
            Part::Text(_) => None,
        })
    }

    /// The name. What cannot be in one is `-` there; of one that is too long a digest tells it from others that begin alike.
    pub fn fill(&self, place: &Place<'_>, facts: &Facts) -> String {
        let whole: String = self
            .0
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.clone(),
                Part::Field(field) => value(*field, place, facts),
            })
            .collect();
        let fits = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        let name: String = whole.chars().map(|letter| if fits(letter) { letter } else { '-' }).collect();
        let name = name.trim_matches(|letter: char| !letter.is_ascii_alphanumeric());
        match name.get(..NAME_MAX - DIGEST - 1) {
            Some(start) if name.len() > NAME_MAX => format!("{start}-{:0DIGEST$x}", digest(&whole)),
            _ => name.to_owned(),
        }
    }
}

fn value(field: Field, place: &Place<'_>, facts: &Facts) -> String {
    let container = facts.container.as_ref();
    let pod = facts.pod.as_ref();
    let found = match field {
        Field::Cgroup => Some(place.name),
        Field::Unit => place.unit.map(|unit| unit.rsplit_once('.').map_or(unit, |(name, _)| name)),
        Field::ContainerId => place.container.and_then(|container| container.id.get(..SHORT_ID)),
        Field::ContainerName => container.map(|container| container.name.as_str()),
        Field::PodUid => place.pod.as_ref().map(|pod| pod.uid.as_str()),
        Field::PodNamespace => pod.map(|pod| pod.namespace.as_str()),
        Field::PodName => pod.map(|pod| pod.name.as_str()),
        Field::SlurmJob => place.step.map(|step| step.job),
        Field::SlurmStep => place.step.map(|step| step.step),
    };
    found.unwrap_or_default().to_owned()
}

/// FNV-1a, cut to the digits that are shown.
fn digest(text: &str) -> u64 {
    let whole = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    whole >> (64 - 4 * DIGEST)
}

impl FromStr for NameTemplate {
    type Err = InvalidTemplate;

    fn from_str(text: &str) -> Result<NameTemplate, InvalidTemplate> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (plain, field) = match rest.split_once("${") {
                Some((plain, field)) => (plain, Some(field)),
                None => (rest, None),
            };
            let fits = |letter: &char| letter.is_ascii_alphanumeric() || "-_.".contains(*letter);
            if let Some(bad) = plain.chars().find(|letter| !fits(letter)) {
                return Err(InvalidTemplate::Letter(bad));
            }
            if !plain.is_empty() {
                parts.push(Part::Text(plain.to_owned()));
            }
            let Some(field) = field else { break };
            let (name, after) = field.split_once('}').ok_or(InvalidTemplate::Open)?;
            let known = Field::ALL.into_iter().find(|field| field.name() == name);
            let known = known.ok_or_else(|| InvalidTemplate::Unknown(name.chars().take(64).collect()))?;
            parts.push(Part::Field(known));
            rest = after;
        }
        if parts.is_empty() {
            return Err(InvalidTemplate::Empty);
        }
        Ok(NameTemplate(parts))
    }
}

impl fmt::Display for NameTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Field(field) => write!(f, "${{{}}}", field.name()),
        })
    }
}
