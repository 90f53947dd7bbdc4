//! Which cgroups that others made become tasks by themselves: rules, what a path says ([`place`]), and what was learnt of a
//! container or pod beside that. The first rule that matches decides.
//!
//! A name in a path is evidence only where root alone could have made it: whoever was given a cgroup of their own can make
//! `docker-….scope` in it. So all but patterns of paths, which somebody chose, match only below what belongs to root.

mod annotations;
mod glob;
mod place;
mod template;

use std::collections::BTreeMap;

pub use self::{
    annotations::{InvalidAnnotation, PREFIX as ANNOTATION_PREFIX, annotated},
    glob::{Glob, InvalidGlob},
    place::{Container, Place, Pod, Qos, Runtime, Step},
    template::{Field, InvalidTemplate, NameTemplate},
};
use crate::{
    id::TaskId,
    limits::Limits,
    task::{InvalidWorkload, Workload},
};

/// Most rules of one file.
pub const RULES_MAX: usize = 256;

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, by which a task says why it is one.
    pub name: TaskId,
    /// Which cgroups.
    pub select: Select,
    /// What they become.
    pub task: Template,
}

/// Which cgroups a rule takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Select {
    /// Those whose path, from the mount point on, matches.
    Cgroup(Glob),
    /// Those of systemd's units whose name matches.
    Unit(Glob),
    /// Those of containers.
    Container(ContainerSelect),
    /// Those of pods.
    Pod(PodSelect),
    /// Those of Slurm's steps whose `JOB.STEP` matches.
    Slurm(Glob),
}

/// Which containers; what is absent is not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerSelect {
    /// Run by this.
    pub runtime: Option<Runtime>,
    /// Of such a name.
    pub name: Option<Glob>,
    /// Of such an image, as it was named when the container was made.
    pub image: Option<Glob>,
    /// With all of these labels.
    pub labels: BTreeMap<String, String>,
}

impl ContainerSelect {
    /// Whether they are Docker's or Podman's only, which can be asked for names, images and labels.
    pub fn is_asked_for(&self) -> bool {
        matches!(self.runtime, Some(Runtime::Docker | Runtime::Podman))
    }
}

/// Which pods; what is absent is not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSelect {
    /// Of that class.
    pub qos: Option<Qos>,
    /// Of such a UID.
    pub uid: Option<Glob>,
    /// In such a namespace.
    pub namespace: Option<Glob>,
    /// Of such a name.
    pub name: Option<Glob>,
}

/// What is done when others write to the files of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Writers {
    /// It is turned back.
    Hold,
    /// It is theirs.
    Yield,
    /// The task's status says so.
    Report,
}

impl Writers {
    /// Their names.
    pub const NAMES: [&'static str; 3] = ["hold", "yield", "report"];

    /// By its name.
    pub fn parse(name: &str) -> Option<Writers> {
        match name {
            "hold" => Some(Writers::Hold),
            "yield" => Some(Writers::Yield),
            "report" => Some(Writers::Report),
            _ => None,
        }
    }
}

/// What a cgroup becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its task id.
    pub name: NameTemplate,
    /// Its namespace.
    pub namespace: NameTemplate,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Labels of the container that the task has as well, where they can be labels of a task.
    pub container_labels: Vec<String>,
    /// What it may use.
    pub limits: Limits,
    /// What is done when others write to its files; `None`: as with all tasks of the node.
    pub writers: Option<Writers>,
}

/// What is known beyond a path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether root alone could have made the cgroup.
    pub is_roots: bool,
    /// Of the container, if its runtime was asked.
    pub container: Option<ContainerFacts>,
    /// Of the pod, if its namespace and name were found.
    pub pod: Option<PodFacts>,
}

/// What a runtime says of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerFacts {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Whose a UID is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What comes of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice<'r> {
    /// No rule takes it.
    Nobody,
    /// Which rule does cannot be said before the container's runtime was asked.
    AskContainer,
    /// … before namespace and name of the pod are found.
    AskPod,
    /// This one does.
    Taken(&'r Rule),
}

/// The first rule that takes a cgroup.
pub fn choose<'r>(rules: &'r [Rule], place: &Place<'_>, facts: &Facts) -> Choice<'r> {
    for rule in rules {
        match rule.matches(place, facts) {
            Match::No => {}
            Match::Yes => return Choice::Taken(rule),
            Match::AskContainer => return Choice::AskContainer,
            Match::AskPod => return Choice::AskPod,
        }
    }
    Choice::Nobody
}

impl Choice<'_> {
    /// Whether it hangs on root alone having made the cgroup; otherwise somebody chose its path.
    pub fn believes_a_name(&self) -> bool {
        match self {
            Choice::Nobody => false,
            Choice::AskContainer | Choice::AskPod => true,
            Choice::Taken(rule) => !matches!(rule.select, Select::Cgroup(_)),
        }
    }
}

/// Whether a rule may take what lies below a directory that belongs to somebody other than root.
pub fn looks_below(rules: &[Rule], directory: &str) -> bool {
    rules.iter().any(|rule| match &rule.select {
        Select::Cgroup(glob) => glob.may_match_below(directory),
        Select::Unit(_) | Select::Container(_) | Select::Pod(_) | Select::Slurm(_) => false,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    No,
    Yes,
    AskContainer,
    AskPod,
}

impl Match {
    fn of(is_match: bool) -> Match {
        if is_match { Match::Yes } else { Match::No }
    }
}

fn fits(wanted: Option<&Glob>, text: &str) -> bool {
    wanted.is_none_or(|glob| glob.matches(text))
}

impl Rule {
    fn matches(&self, place: &Place<'_>, facts: &Facts) -> Match {
        if !facts.is_roots && !matches!(self.select, Select::Cgroup(_)) {
            return Match::No;
        }
        match &self.select {
            Select::Cgroup(glob) => Match::of(glob.matches(place.path)),
            Select::Unit(glob) => Match::of(place.unit.is_some_and(|unit| glob.matches(unit))),
            Select::Slurm(glob) => {
                let name = place.step.map(|Step { job, step }| format!("{job}.{step}"));
                Match::of(name.is_some_and(|name| glob.matches(&name)))
            }
            Select::Container(select) => match &place.container {
                Some(container) => self.matches_container(select, container, facts),
                None => Match::No,
            },
            Select::Pod(select) => match &place.pod {
                Some(pod) if place.is_pod() => self.matches_pod(select, pod, facts),
                _ => Match::No,
            },
        }
    }

    fn matches_container(&self, select: &ContainerSelect, container: &Container<'_>, facts: &Facts) -> Match {
        let ContainerSelect { runtime, name, image, labels } = select;
        if runtime.is_some() && *runtime != container.runtime {
            return Match::No;
        }
        let asks = name.is_some() || image.is_some() || !labels.is_empty();
        let uses = self.task.uses(Field::ContainerName) || !self.task.container_labels.is_empty();
        match &facts.container {
            None if asks || uses => Match::AskContainer,
            None => Match::Yes,
            Some(known) => Match::of(
                fits(name.as_ref(), &known.name)
                    && fits(image.as_ref(), &known.image)
                    && labels.iter().all(|(label, value)| known.labels.get(label) == Some(value)),
            ),
        }
    }

    fn matches_pod(&self, select: &PodSelect, pod: &Pod, facts: &Facts) -> Match {
        let PodSelect { qos, uid, namespace, name } = select;
        if qos.is_some_and(|qos| qos != pod.qos) || !fits(uid.as_ref(), &pod.uid) {
            return Match::No;
        }
        let asks = namespace.is_some() || name.is_some();
        let uses = self.task.uses(Field::PodName) || self.task.uses(Field::PodNamespace);
        match &facts.pod {
            None if asks || uses => Match::AskPod,
            None => Match::Yes,
            Some(known) => {
                Match::of(fits(namespace.as_ref(), &known.namespace) && fits(name.as_ref(), &known.name))
            }
        }
    }

    /// The fields that names may use in this rule.
    pub fn fields(select: &Select) -> &'static [Field] {
        match select {
            Select::Cgroup(_) => &[Field::Cgroup],
            Select::Unit(_) => &[Field::Cgroup, Field::Unit],
            // Of others' containers nobody can be asked for the name.
            Select::Container(select) if select.is_asked_for() => {
                &[Field::Cgroup, Field::ContainerId, Field::ContainerName]
            }
            Select::Container(_) => &[Field::Cgroup, Field::ContainerId],
            Select::Pod(_) => &[Field::Cgroup, Field::PodUid, Field::PodNamespace, Field::PodName],
            Select::Slurm(_) => &[Field::Cgroup, Field::SlurmJob, Field::SlurmStep],
        }
    }

    /// The task that a cgroup becomes by this rule.
    pub fn workload(&self, place: &Place<'_>, facts: &Facts) -> Result<Workload, InvalidWorkload> {
        let Template { name, namespace, labels, container_labels, limits: _, writers: _ } = &self.task;
        let (name, namespace) = (name.fill(place, facts), namespace.fill(place, facts));
        let known = facts.container.iter().flat_map(|container| &container.labels);
        // What cannot be a label of a task is none of it.
        let copied = known.filter(|(label, value)| {
            container_labels.contains(label)
                && [label, value].into_iter().all(|text| crate::document::fits_label(text))
        });
        let mut all: BTreeMap<String, String> =
            copied.map(|(label, value)| (label.clone(), value.clone())).collect();
        all.extend(labels.clone());
        Workload::new(&name, &namespace, all)
    }
}

impl Template {
    fn uses(&self, field: Field) -> bool {
        self.name.uses(field) || self.namespace.uses(field)
    }
}

#[cfg(test)]
mod tests;
