//! All nodes, and decisions about them.

use std::{cmp::Reverse, collections::HashMap};

use serde::{Deserialize, Serialize};

use super::{
    class::{Class, Classes, Constraint, ConstraintId, fold},
    exact::{Divisor, Key},
    fragment::{Fragments, Rule},
    index::{Entry, Index, Keys, Tier, Walk, Wanted},
    lanes::{self, Units},
    mix::TaskMix,
    node::{MAX_GPUS, Node, NodeId, NodeSpec, Placement, Readiness, WHOLE},
    scorer::{self, Largest, Scorer, Scoring},
    task::{GpuRequest, Request},
};

/// Why a node cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum NodeError {
    /// More GPUs than placement keeps.
    #[error("the node {name} has {gpus} GPUs; placement knows at most {MAX_GPUS}")]
    TooManyGpus {
        /// The node.
        name: String,
        /// How many.
        gpus: u8,
    },
    /// The name is taken.
    #[error("there is a node {0} already")]
    Exists(String),
}

/// All nodes, what is taken of them, and the indexes by which one is found. Nothing is ever taken that is not there:
/// [`Cluster::allocate`] refuses it.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub(super) specs: Vec<NodeSpec>,
    pub(super) nodes: Vec<Node>,
    pub(super) classes: Classes,
    by_name: HashMap<String, NodeId>,
    /// One for each capacity of CPU and memory.
    divisors: Vec<Divisor>,
    divisor_of: HashMap<[u64; 2], u32>,
    pub(super) units: Units,
    pub(super) largest: Largest,
    best_fit_divisor: Divisor,
    seed: Index,
    best_fit: Option<Index>,
    fragments: [Option<Fragments>; 2],
}

impl Default for Cluster {
    fn default() -> Cluster {
        Cluster {
            specs: Vec::new(),
            nodes: Vec::new(),
            classes: Classes::default(),
            by_name: HashMap::new(),
            divisors: Vec::new(),
            divisor_of: HashMap::new(),
            units: Units::default(),
            largest: Largest::default(),
            best_fit_divisor: Largest::default().divisor(),
            seed: Index::default(),
            best_fit: None,
            fragments: [None, None],
        }
    }
}

impl Cluster {
    /// Adds a node, behind all others in the order of registration.
    pub fn add(&mut self, spec: NodeSpec) -> Result<NodeId, NodeError> {
        if usize::from(spec.gpus.count) > MAX_GPUS {
            return Err(NodeError::TooManyGpus { name: spec.name, gpus: spec.gpus.count });
        }
        if self.by_name.contains_key(&spec.name) {
            return Err(NodeError::Exists(spec.name));
        }
        let class = Class {
            labels: spec.labels.clone(),
            taints: spec.taints.clone(),
            gpu_model: spec.gpus.model.clone(),
        };
        let capacity = [spec.capacity.cpu.0, spec.capacity.memory.0];
        let divisor = *self.divisor_of.entry(capacity).or_insert_with(|| {
            self.divisors.push(scorer::seed_divisor(capacity));
            (self.divisors.len() - 1) as u32
        });
        let node = Node::new(&spec, self.classes.class(class), divisor);
        let id = NodeId(self.nodes.len() as u32);
        self.by_name.insert(spec.name.clone(), id);
        let (units, largest) = (self.units.to_hold(&node.lanes()), self.largest.with(&node));
        self.specs.push(spec);
        self.nodes.push(node);
        if (units, largest) == (self.units, self.largest) {
            self.refresh(id);
        } else {
            (self.units, self.largest) = (units, largest);
            self.best_fit_divisor = largest.divisor();
            self.refresh_all();
        }
        Ok(id)
    }

    /// The number of a node.
    pub fn node(&self, name: &str) -> Option<NodeId> {
        self.by_name.get(name).copied()
    }

    /// What was said of a node.
    pub fn spec(&self, node: NodeId) -> Option<&NodeSpec> {
        self.specs.get(node.0 as usize)
    }

    /// All nodes, in the order of registration.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// Whether a node takes tasks.
    pub fn readiness(&self, node: NodeId) -> Option<Readiness> {
        self.nodes.get(node.0 as usize).map(|node| node.readiness)
    }

    /// Makes a node take tasks or not. What it has, it keeps.
    pub fn set_readiness(&mut self, node: NodeId, readiness: Readiness) {
        if let Some(it) = self.nodes.get_mut(node.0 as usize) {
            it.readiness = readiness;
            self.refresh(node);
        }
    }

    /// The number of a constraint: looked up once, when a task is submitted.
    pub fn constraint(&mut self, constraint: &Constraint) -> ConstraintId {
        self.classes.constraint(constraint)
    }

    /// The mix of tasks that [`Scorer::Fgd`] packs for.
    pub fn expect(&mut self, mix: &TaskMix) {
        let fragments = self.fragments[0].get_or_insert_with(|| Fragments::new(Rule::Paper));
        fragments.expect(mix);
    }

    /// A task has come: [`Scorer::Fragmentation`] learns the mix from these.
    pub fn learn(&mut self, request: &Request) {
        let fragments = self.fragments[1].get_or_insert_with(|| Fragments::new(Rule::Ours));
        fragments.learn(request);
    }

    /// Makes `best-fit` decisions by an index of their own. Without it all nodes are looked at.
    pub fn index_best_fit(&mut self) {
        self.best_fit = Some(Index::default());
        self.refresh_all();
    }

    /// The best node for a task, and the GPUs there: nothing is taken yet.
    pub fn decide(&mut self, request: &Request, scoring: &Scoring) -> Option<Placement> {
        self.decide_and_tell(request, scoring, &mut Walk::default(), |_| true)
    }

    /// The same among the nodes that `may`, counting what was looked at.
    pub fn decide_and_tell(
        &mut self,
        request: &Request,
        scoring: &Scoring,
        walk: &mut Walk,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        match scoring.alone() {
            Some(Scorer::Seed) => {
                let Cluster { seed, nodes, divisors, classes, units, .. } = self;
                let key = |node| seed_key(nodes, divisors, node);
                let node = Cluster::walk((nodes, classes, units), seed, &key, request, walk, may)?;
                self.place(node, request, Scorer::Seed)
            }
            Some(Scorer::BestFit) => {
                let Cluster { best_fit, nodes, classes, units, largest, best_fit_divisor, .. } = self;
                let key = |node| scorer::best_fit_key(&nodes[node as usize], largest, best_fit_divisor, node);
                let node = match best_fit {
                    Some(index) => Cluster::walk((nodes, classes, units), index, &key, request, walk, may)?,
                    None => self.least_free(request, may)?,
                };
                self.place(node, request, Scorer::BestFit)
            }
            Some(Scorer::Fgd) => self.decide_by_fragments(0, request, may),
            Some(Scorer::Fragmentation) => self.decide_by_fragments(1, request, may),
            None => self.decide_mixed(request, scoring, may),
        }
    }

    fn walk(
        (nodes, classes, units): (&[Node], &Classes, &Units),
        index: &mut Index,
        keys: &impl Keys,
        request: &Request,
        walk: &mut Walk,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<NodeId> {
        let decided = classes.decided(request.constraint);
        let amounts = lanes::row(&request.lanes(units));
        let wanted = Wanted::new(amounts, decided.folded(), request.tier());
        let found = index.first(&wanted, keys, walk, |number| {
            let node = &nodes[number as usize];
            decided.suits(node.class) && node.has(request) && may(NodeId(number))
        });
        found.map(NodeId)
    }

    /// Whether a task fits on a node now.
    pub fn fits(&self, node: NodeId, request: &Request) -> bool {
        self.nodes.get(node.0 as usize).is_some_and(|node| {
            node.is_open() && self.classes.decided(request.constraint).suits(node.class) && node.has(request)
        })
    }

    fn least_free(&self, request: &Request, may: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let mut best: Option<Key> = None;
        for id in self.ids().filter(|id| self.fits(*id, request)) {
            let key = self.best_fit_key(id);
            if best.is_none_or(|best| key.is_before(&best)) && may(id) {
                best = Some(key);
            }
        }
        best.map(|key| NodeId(key.node))
    }

    fn best_fit_key(&self, node: NodeId) -> Key {
        let it = &self.nodes[node.0 as usize];
        scorer::best_fit_key(it, &self.largest, &self.best_fit_divisor, node.0)
    }

    fn decide_by_fragments(
        &mut self,
        which: usize,
        request: &Request,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        let rule = if which == 0 { Rule::Paper } else { Rule::Ours };
        let fragments = self.fragments[which].get_or_insert_with(|| Fragments::new(rule));
        fragments.best(&self.nodes, &self.classes, request, may)
    }

    /// Every node that fits gets points of each scorer.
    fn decide_mixed(
        &mut self,
        request: &Request,
        scoring: &Scoring,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Placement> {
        let mut best: Option<(u64, Placement)> = None;
        for id in self.ids().filter(|id| may(*id)) {
            if !self.fits(id, request) {
                continue;
            }
            let (mut points, mut place) = (0, None);
            for (scorer, weight) in scoring.parts() {
                let (given, at) = self.points(*scorer, id, request)?;
                points += given * u64::from(*weight);
                place = place.or(at);
            }
            let of_parts =
                || scoring.parts().first().and_then(|(scorer, _)| self.place(id, request, *scorer));
            let Some(place) = place.or_else(of_parts) else { continue };
            if best.is_none_or(|(most, _)| points > most) {
                best = Some((points, place));
            }
        }
        best.map(|(_, placement)| placement)
    }

    /// Points of a node that fits, and where on it the task would go, if the scorer has a say in that.
    pub(super) fn points(
        &mut self,
        scorer: Scorer,
        id: NodeId,
        request: &Request,
    ) -> Option<(u64, Option<Placement>)> {
        let node = self.nodes.get(id.0 as usize)?;
        if let Some(order) = scorer.order() {
            return Some((scorer::points(order, node, &self.largest), None));
        }
        let (which, rule) = if scorer == Scorer::Fgd { (0, Rule::Paper) } else { (1, Rule::Ours) };
        let fragments = self.fragments[which].get_or_insert_with(|| Fragments::new(rule));
        let (points, gpus) = fragments.points(&self.nodes, &self.classes, request, id.0 as usize)?;
        Some((points, Some(Placement { node: id, gpus })))
    }

    /// The GPUs of a node that a task could share, or have alone.
    pub fn sharable(&self, id: NodeId, request: &Request) -> impl Iterator<Item = u8> {
        let node = self.nodes.get(id.0 as usize);
        let numbers = node.map_or(0..0, Node::gpu_numbers);
        let may = move |gpu: &usize| node.is_some_and(|node| node.may_share(*gpu, request));
        numbers.filter(may).map(|gpu| gpu as u8)
    }

    /// The GPUs of a node that a task would have there if it leaves others as whole as can be, whatever else is free; `None`:
    /// there are none for it.
    pub fn pack(&self, id: NodeId, request: &Request) -> Option<Placement> {
        let at = self.place(id, request, Scorer::BestFit)?;
        let is_enough = |count: u8| at.gpus.count_ones() == u32::from(count);
        match request.gpu {
            GpuRequest::Whole(count) => is_enough(count).then_some(at),
            GpuRequest::None | GpuRequest::Share(_) => Some(at),
        }
    }

    /// The GPUs on a node that fits: the first that do, or by best fit the one with the least to spare.
    pub(super) fn place(&self, id: NodeId, request: &Request, scorer: Scorer) -> Option<Placement> {
        Cluster::place_on(self.nodes.get(id.0 as usize)?, id, request, scorer)
    }

    pub(super) fn place_on(node: &Node, id: NodeId, request: &Request, scorer: Scorer) -> Option<Placement> {
        let gpus = match request.gpu {
            GpuRequest::Whole(count) => node.whole_gpus(count),
            GpuRequest::None if request.gpu_memory() == 0 || node.gpus == 0 => 0,
            GpuRequest::None | GpuRequest::Share(_) => {
                let mut fitting = node.gpu_numbers().filter(|gpu| node.may_share(*gpu, request));
                let gpu = match scorer {
                    Scorer::BestFit => {
                        fitting.min_by_key(|gpu| (Reverse(node.taken[*gpu]), node.gpu_memory_free(*gpu)))
                    }
                    Scorer::Seed | Scorer::Fgd | Scorer::Fragmentation => fitting.next(),
                };
                1 << gpu?
            }
        };
        Some(Placement { node: id, gpus })
    }

    /// Takes what the task reserves. False, and nothing is taken, if it is not there.
    #[must_use]
    pub fn allocate(&mut self, request: &Request, at: Placement) -> bool {
        let Some(node) = self.nodes.get_mut(at.node.0 as usize) else { return false };
        if !node.has_here(request, at.gpus) {
            return false;
        }
        node.book(request, at.gpus, false);
        self.refresh(at.node);
        true
    }

    /// Takes what a task reserves that runs there already, whether it is there or not: what runs is a fact.
    pub fn adopt(&mut self, request: &Request, at: Placement) {
        if let Some(node) = self.nodes.get_mut(at.node.0 as usize) {
            node.book(request, at.gpus, false);
            self.refresh(at.node);
        }
    }

    /// Gives back what [`Cluster::allocate`] or [`Cluster::adopt`] took.
    pub fn release(&mut self, request: &Request, at: Placement) {
        if let Some(node) = self.nodes.get_mut(at.node.0 as usize) {
            node.book(request, at.gpus, true);
            self.refresh(at.node);
        }
    }

    fn refresh(&mut self, id: NodeId) {
        let number = id.0 as usize;
        let node = &self.nodes[number];
        for fragments in self.fragments.iter_mut().flatten() {
            fragments.touch(number);
        }
        if !node.is_open() {
            self.seed.remove(id.0);
            if let Some(index) = &mut self.best_fit {
                index.remove(id.0);
            }
            return;
        }
        let amounts = node.lanes();
        let (free, tier) = (lanes::row(&self.units.round(&amounts)), Tier::of(amounts[5], amounts[6]));
        let class = fold(node.class);
        let (nodes, divisors) = (&self.nodes, &self.divisors);
        let keys = |node| seed_key(nodes, divisors, node);
        self.seed.set(&Entry { key: keys(id.0), free, class, tier }, &keys);
        if let Some(index) = &mut self.best_fit {
            let (largest, divisor) = (&self.largest, &self.best_fit_divisor);
            let keys = |node| scorer::best_fit_key(&nodes[node as usize], largest, divisor, node);
            index.set(&Entry { key: keys(id.0), free, class, tier }, &keys);
        }
    }

    /// After what all keys depend on has changed.
    fn refresh_all(&mut self) {
        self.seed = Index::default();
        self.best_fit = self.best_fit.take().map(|_| Index::default());
        for id in self.ids() {
            self.refresh(id);
        }
    }

    /// What is taken of a node: CPU and memory, and thousandths of GPUs.
    pub fn taken(&self, node: NodeId) -> Option<Taken> {
        let node = self.nodes.get(node.0 as usize)?;
        let gpus = u64::from(node.gpus) * u64::from(WHOLE);
        Some(Taken { cpu: node.used[0], memory: node.used[1], gpu: gpus - node.share_free() })
    }
}

fn seed_key(nodes: &[Node], divisors: &[Divisor], node: u32) -> Key {
    let it = &nodes[node as usize];
    scorer::seed_key(it, &divisors[it.divisor as usize], node)
}

/// What is taken of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Millicores.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
    /// Thousandths of GPUs.
    pub gpu: u64,
}
