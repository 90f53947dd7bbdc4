//! What of a node does not change with its tasks: labels, taints, the model of its GPUs. Nodes that are alike
//! in this are a *class*, and what a task says about it is a *constraint*, which is decided once for each class.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

/// Keeps tasks away that do not tolerate it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Taint {
    /// Its key.
    pub key: String,
    /// Its value; empty where it has none.
    pub value: String,
}

/// Taints that a task does not mind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// The taint's value; `None`: any.
    pub value: Option<String>,
}

impl Toleration {
    fn covers(&self, taint: &Taint) -> bool {
        self.key == taint.key && self.value.as_ref().is_none_or(|value| *value == taint.value)
    }
}

/// What a task says about the kind of its node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Constraint {
    /// Labels that the node must have, each with one of these values.
    pub labels: BTreeMap<String, BTreeSet<String>>,
    /// Taints that do not matter.
    pub tolerations: BTreeSet<Toleration>,
    /// Models of GPU, one of which the node must have; none: any, or no GPU.
    pub gpu_models: BTreeSet<String>,
}

/// What a constraint has against a class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mismatch {
    /// A label is not there, or has another value.
    Label {
        /// The label.
        key: String,
        /// What it is on the node.
        is: Option<String>,
    },
    /// A taint is not tolerated.
    Taint(Taint),
    /// The GPUs are of another model; `None`: unknown, or there are none.
    GpuModel(Option<String>),
}

/// A kind of node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) taints: BTreeSet<Taint>,
    pub(super) gpu_model: Option<String>,
}

impl Class {
    /// Everything that the constraint has against it.
    pub(super) fn mismatches(&self, constraint: &Constraint) -> Vec<Mismatch> {
        let Constraint { labels, tolerations, gpu_models } = constraint;
        let mut found = Vec::new();
        for (key, values) in labels {
            let is = self.labels.get(key);
            if !is.is_some_and(|value| values.contains(value)) {
                found.push(Mismatch::Label { key: key.clone(), is: is.cloned() });
            }
        }
        let minds = |taint: &&Taint| !tolerations.iter().any(|toleration| toleration.covers(taint));
        found.extend(self.taints.iter().filter(minds).cloned().map(Mismatch::Taint));
        let model = self.gpu_model.as_ref();
        if !gpu_models.is_empty() && !model.is_some_and(|model| gpu_models.contains(model)) {
            found.push(Mismatch::GpuModel(model.cloned()));
        }
        found
    }
}

/// Number of a class.
pub(super) type ClassId = u32;

/// A constraint that the cluster knows: looked up once, when a task is submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConstraintId(pub(super) u32);

/// A constraint, decided for every class.
#[derive(Clone, Debug)]
pub(super) struct Decided {
    pub(super) constraint: Constraint,
    /// One bit for each class.
    suits: Vec<u64>,
    /// The same, folded: a bit that is not set suits no class that has it.
    folded: u64,
    suits_all: bool,
}

impl Decided {
    fn decide(&mut self, class: ClassId, kind: &Class) {
        let word = class as usize / 64;
        self.suits.resize(self.suits.len().max(word + 1), 0);
        if kind.mismatches(&self.constraint).is_empty() {
            self.suits[word] |= 1 << (class % 64);
            self.folded |= 1 << fold(class);
        } else {
            self.suits_all = false;
        }
    }

    pub(super) fn suits(&self, class: ClassId) -> bool {
        self.suits_all || self.suits[class as usize / 64] >> (class % 64) & 1 == 1
    }

    /// For an index: the bits of the classes that suit, unless all do.
    pub(super) fn folded(&self) -> Option<u64> {
        (!self.suits_all).then_some(self.folded)
    }
}

/// The number of a class's bit among 64: with more classes than that, several have the same.
pub(super) fn fold(class: ClassId) -> u8 {
    (class % 64) as u8
}

/// All classes and constraints.
#[derive(Clone, Debug, Default)]
pub(super) struct Classes {
    classes: Vec<Class>,
    numbers: HashMap<Class, ClassId>,
    constraints: Vec<Decided>,
    ids: HashMap<Constraint, ConstraintId>,
}

impl Classes {
    pub(super) fn class(&mut self, class: Class) -> ClassId {
        if let Some(id) = self.numbers.get(&class) {
            return *id;
        }
        let id = self.classes.len() as ClassId;
        for decided in &mut self.constraints {
            decided.decide(id, &class);
        }
        self.classes.push(class.clone());
        self.numbers.insert(class, id);
        id
    }

    pub(super) fn constraint(&mut self, constraint: &Constraint) -> ConstraintId {
        if let Some(id) = self.ids.get(constraint) {
            return *id;
        }
        let id = ConstraintId(self.constraints.len() as u32);
        let mut decided =
            Decided { constraint: constraint.clone(), suits: Vec::new(), folded: 0, suits_all: true };
        for (class, kind) in (0..).zip(&self.classes) {
            decided.decide(class, kind);
        }
        self.constraints.push(decided);
        self.ids.insert(constraint.clone(), id);
        id
    }

    pub(super) fn of(&self, class: ClassId) -> &Class {
        &self.classes[class as usize]
    }

    pub(super) fn decided(&self, id: ConstraintId) -> &Decided {
        &self.constraints[id.0 as usize]
    }
}
