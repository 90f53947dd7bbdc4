//! Whom to end so that a task of a higher priority fits.
//!
//! Never a task of the same priority or a higher one. Of all ways, the one with the fewest victims of medium priority
//! is taken, then that with the fewest victims, then that which loses least work. Ways with one victim are looked for
//! first, then those with two, three, four and more, each only on nodes that so few could make room on: of each node
//! it is kept how much there would be of each resource at most without so many, 64 nodes are compared at once. One
//! and two victims are tried one by one and pair by pair. More are taken greedily, the lowest and youngest first,
//! after which each is reprieved, the highest and oldest first, without whom it fits as well.
//!
//! A victim keeps what it has until it is gone. The task that it makes room for is booked at once
//! ([`Cluster::adopt`]), so that nobody takes the room meanwhile: the books then hold more than there is, and nothing
//! is allocated against them until the victims are off.

use std::{cmp::Reverse, collections::HashMap};

use serde::{Deserialize, Serialize};

use super::{
    cluster::Cluster,
    lanes::{self, Lanes, NOBODY, Units, WIDTH},
    node::{Node, NodeId, PLAIN, Placement},
    scorer::Scorer,
    task::{GpuRequest, Request},
};
use crate::spec::{Demand, Priority};

/// A task that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Its number.
    pub task: u64,
    /// What it reserves.
    pub request: Request,
    /// Where.
    pub at: Placement,
    /// Since when: the later, the less is lost.
    pub since: u64,
}

/// What a preemption costs; less is better, from the first on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    /// Victims of medium priority.
    pub medium: u32,
    /// All victims.
    pub victims: u32,
    /// Time that they have run, together.
    pub lost: u64,
}

/// A way to make room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preemption {
    /// Where the task goes once they are gone.
    pub at: Placement,
    /// Who is to end.
    pub victims: Vec<u64>,
    /// What it costs.
    pub cost: Cost,
}

/// Who was looked at to make room for a task, which `T` names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered<T> {
    /// Tasks of a lower priority, on nodes that suit it.
    pub victims: u32,
    /// On how many nodes they are.
    pub nodes: u32,
    /// On how many of those it would fit without all of them.
    pub suffice: u32,
    /// The first [`NAMED`] of them: those first on whose node they would do, in the order in which they would be taken.
    pub named: Vec<Victim<T>>,
}

/// Victims that are told one by one.
pub const NAMED: usize = 16;

/// A task that was looked at, and what speaks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Victim<T> {
    /// The task.
    pub task: T,
    /// Its node.
    pub node: String,
    /// Its priority: the lower goes first.
    pub priority: Priority,
    /// Since when it runs: of one priority the latest goes first.
    pub since: u64,
    /// What it would free.
    pub frees: Demand,
    /// What of GPUs.
    pub frees_gpu: GpuRequest,
    /// Whether the task would fit without all who are considered on this node.
    pub suffices: bool,
}

impl<T> Default for Considered<T> {
    fn default() -> Considered<T> {
        Considered { victims: 0, nodes: 0, suffice: 0, named: Vec::new() }
    }
}

/// Ways that have as few victims as there can be are compared until there are so many.
pub const WAYS: usize = 4;
/// More tasks than that of one node are not tried in pairs.
const PAIRS: usize = 64;

/// So many victims, or fewer: the last is all.
const COUNTS: [usize; 5] = [1, 2, 3, 4, usize::MAX];

/// What 64 nodes would have free at most without so many of the tasks below a priority: by [`COUNTS`].
type Block = [Lanes; COUNTS.len()];

const EMPTY: Block = [const { Lanes::EMPTY }; COUNTS.len()];

/// The tasks that run, by node.
#[derive(Clone, Debug, Default)]
pub struct Residents {
    nodes: Vec<Vec<Resident>>,
    places: HashMap<u64, NodeId>,
    /// For a medium task, and for a high one.
    blocks: [Vec<Block>; 2],
    /// Nodes that have changed since they were noted there.
    changed: Vec<u32>,
    units: Units,
}

/// The best way so far.
struct Search {
    best: Option<(Cost, usize, Vec<usize>)>,
    /// How many ways there were that had as few victims as there can be, none of medium priority.
    ways: usize,
}

impl Search {
    fn consider(&mut self, cost: Cost, number: usize, victims: Vec<usize>, fewest: usize) {
        self.ways += usize::from(cost.medium == 0 && cost.victims as usize <= fewest);
        if self.best.as_ref().is_none_or(|(least, ..)| cost < *least) {
            self.best = Some((cost, number, victims));
        }
    }
}

/// Of the blocks; `None`: nobody is below it.
fn level(priority: Priority) -> Option<usize> {
    match priority {
        Priority::Low => None,
        Priority::Medium => Some(0),
        Priority::High => Some(1),
    }
}

impl Residents {
    /// A task runs. It is in the cluster's books already.
    pub fn start(&mut self, resident: Resident) {
        let node = resident.at.node;
        self.places.insert(resident.task, node);
        self.grow(node);
        self.nodes[node.0 as usize].push(resident);
        self.changed(node);
    }

    /// A task runs no more, or is to end and is nobody's victim again. Its books are the caller's.
    pub fn stop(&mut self, task: u64) -> Option<Resident> {
        let node = self.places.remove(&task)?;
        let here = &mut self.nodes[node.0 as usize];
        let at = here.iter().position(|resident| resident.task == task)?;
        let resident = here.swap_remove(at);
        self.changed(node);
        Some(resident)
    }

    /// A node's books changed otherwise.
    pub fn changed(&mut self, node: NodeId) {
        self.grow(node);
        // The same node several times in a row is the common case.
        if self.changed.last() != Some(&node.0) {
            self.changed.push(node.0);
        }
    }

    fn catch_up(&mut self, cluster: &Cluster) {
        if self.units != cluster.units {
            self.units = cluster.units;
            self.changed = (0..self.nodes.len() as u32).collect();
        }
        for node in std::mem::take(&mut self.changed) {
            self.note(cluster, node as usize);
        }
    }

    fn grow(&mut self, node: NodeId) {
        let count = self.nodes.len().max(node.0 as usize + 1);
        self.nodes.resize(count, Vec::new());
        for blocks in &mut self.blocks {
            blocks.resize(count.div_ceil(WIDTH), EMPTY);
        }
    }

    fn note(&mut self, cluster: &Cluster, number: usize) {
        let Some(node) = cluster.nodes.get(number) else { return };
        for (blocks, priority) in self.blocks.iter_mut().zip([Priority::Medium, Priority::High]) {
            let lower = || self.nodes[number].iter().filter(move |it| it.request.priority < priority);
            let mut all = node.clone();
            let mut freed: [Vec<u64>; PLAIN] = Default::default();
            for resident in lower() {
                all.book(&resident.request, resident.at.gpus, true);
                for (freed, amount) in freed.iter_mut().zip(resident.request.plain()) {
                    freed.push(amount);
                }
            }
            let most = all.lanes();
            for freed in &mut freed {
                freed.sort_unstable_by_key(|amount| std::cmp::Reverse(*amount));
            }
            let block = &mut blocks[number / WIDTH];
            for (lanes, count) in block.iter_mut().zip(COUNTS) {
                // Of GPUs, what all would free: that does not add up.
                let mut amounts = most;
                for (resource, freed) in freed.iter().enumerate() {
                    let used = freed
                        .iter()
                        .take(count)
                        .fold(node.used[resource], |used, it| used.saturating_sub(*it));
                    amounts[resource] = match node.total[resource] {
                        u64::MAX => u64::MAX,
                        total => total.saturating_sub(used),
                    };
                }
                lanes.set(
                    number % WIDTH,
                    &if lower().next().is_some() { self.units.round(&amounts) } else { NOBODY },
                );
            }
        }
    }

    /// The cheapest way to make room for a task at `now`, on the nodes that `may`. `None`: no lower task that ends makes
    /// it fit. Of the ways that have as few victims as there can be, the first [`WAYS`] are compared by the work that is
    /// lost.
    pub fn preempt(
        &mut self,
        cluster: &Cluster,
        request: &Request,
        now: u64,
        may: impl Fn(NodeId) -> bool,
    ) -> Option<Preemption> {
        let level = level(request.priority)?;
        self.catch_up(cluster);
        let wanted = request.lanes(&self.units);
        let suits = cluster.classes.decided(request.constraint);
        let suits = |number: &usize| {
            let node = cluster.nodes.get(*number);
            node.is_some_and(|node| node.is_open() && suits.suits(node.class)) && may(NodeId(*number as u32))
        };
        let mut search = Search { best: None, ways: 0 };
        for (which, count) in COUNTS.into_iter().enumerate() {
            for (block, it) in self.blocks[level].iter().enumerate() {
                for number in
                    lanes::each(it[which].mask(&wanted)).map(|place| block * WIDTH + place).filter(suits)
                {
                    for victims in self.ways(&cluster.nodes[number], number, request, count) {
                        let cost = self.cost(number, &victims, now);
                        search.consider(cost, number, victims, count);
                    }
                    if search.ways >= WAYS {
                        break;
                    }
                }
                if search.ways >= WAYS {
                    break;
                }
            }
            // More victims are not better, but for one of medium priority.
            if search.best.as_ref().is_some_and(|(cost, ..)| cost.medium == 0) {
                break;
            }
        }
        let (cost, number, victims) = search.best?;
        let node = self.without(&cluster.nodes[number], number, &victims);
        let at = Cluster::place_on(&node, NodeId(number as u32), request, Scorer::BestFit)?;
        let victims = victims.iter().map(|index| self.nodes[number][*index].task).collect();
        Some(Preemption { at, victims, cost })
    }

    /// Who could be ended for a task at all. It looks at every node.
    pub fn considered(&self, cluster: &Cluster, request: &Request) -> Considered<u64> {
        let suits = cluster.classes.decided(request.constraint);
        let (mut found, mut others) = (Considered::default(), Vec::new());
        for (number, node) in cluster.nodes.iter().enumerate().take(self.nodes.len()) {
            let victims = self.candidates(number, request);
            if victims.is_empty() || !node.is_open() || !suits.suits(node.class) {
                continue;
            }
            let suffices = self.fits_without(node, number, &victims, request);
            found.victims += victims.len() as u32;
            found.nodes += 1;
            found.suffice += u32::from(suffices);
            let named = if suffices { &mut found.named } else { &mut others };
            let room = NAMED.saturating_sub(named.len());
            named.extend(victims.iter().take(room).map(|index| {
                let Resident { task, request, at: _, since } = self.nodes[number][*index];
                let node = cluster.specs[number].name.clone();
                let (frees, frees_gpu) = (request.demand, request.gpu);
                Victim { task, node, priority: request.priority, since, frees, frees_gpu, suffices }
            }));
        }
        found.named.extend(others);
        found.named.truncate(NAMED);
        found
    }

    fn cost(&self, number: usize, victims: &[usize], now: u64) -> Cost {
        let mut cost = Cost::default();
        for victim in victims {
            let resident = &self.nodes[number][*victim];
            cost.victims += 1;
            cost.medium += u32::from(resident.request.priority == Priority::Medium);
            cost.lost = cost.lost.saturating_add(now.saturating_sub(resident.since));
        }
        cost
    }

    /// The node once these are gone.
    fn without(&self, node: &Node, number: usize, victims: &[usize]) -> Node {
        let mut node = node.clone();
        for victim in victims {
            let resident = &self.nodes[number][*victim];
            node.book(&resident.request, resident.at.gpus, true);
        }
        node
    }

    fn fits_without(&self, node: &Node, number: usize, victims: &[usize], request: &Request) -> bool {
        self.without(node, number, victims).has(request)
    }

    /// Those who may have to go, in the order in which they are taken: the lowest, then the youngest.
    fn candidates(&self, number: usize, request: &Request) -> Vec<usize> {
        let here = &self.nodes[number];
        let is_lower = |index: &usize| here[*index].request.priority < request.priority;
        let mut lower: Vec<usize> = (0..here.len()).filter(is_lower).collect();
        lower.sort_by_key(|index| {
            let resident = &here[*index];
            (resident.request.priority, Reverse(resident.since), resident.task)
        });
        lower
    }

    /// Ways to make room on a node with so many victims, or with more if it takes more than pairs.
    fn ways(&self, node: &Node, number: usize, request: &Request, count: usize) -> Vec<Vec<usize>> {
        let lower = self.candidates(number, request);
        let fits = |victims: &Vec<usize>| self.fits_without(node, number, victims, request);
        match count {
            1 => lower.into_iter().map(|one| vec![one]).filter(fits).collect(),
            2 if lower.len() <= PAIRS => {
                let pairs = lower.iter().enumerate();
                let pairs =
                    pairs.flat_map(|(at, one)| lower[..at].iter().map(move |other| vec![*other, *one]));
                pairs.filter(fits).collect()
            }
            _ => self.several(node, number, request, &lower).into_iter().collect(),
        }
    }

    fn several(&self, node: &Node, number: usize, request: &Request, lower: &[usize]) -> Option<Vec<usize>> {
        let mut rest = node.clone();
        let mut taken = 0;
        while !rest.has(request) {
            let resident = &self.nodes[number][*lower.get(taken)?];
            rest.book(&resident.request, resident.at.gpus, true);
            taken += 1;
        }
        let mut victims = lower[..taken].to_vec();
        for index in lower[..taken].iter().rev() {
            let resident = &self.nodes[number][*index];
            let mut with = rest.clone();
            with.book(&resident.request, resident.at.gpus, false);
            if with.has(request) {
                rest = with;
                victims.retain(|it| it != index);
            }
        }
        Some(victims)
    }
}
