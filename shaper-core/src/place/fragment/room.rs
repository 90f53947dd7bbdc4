//! Our rule: keep room for what comes, each kind of task by how scarce its room is, and keep CPU and memory beside
//! free GPUs.
//!
//! **Room.** `room(k, n)` is how much GPU of node `n` tasks of kind `k` could use if no others came: as many tasks as its
//! GPUs, CPU and memory each allow, times what one asks for. With `p(k)` for how often the kind comes and `R(k)` for its
//! room on all nodes, a decision gives up the least of
//!
//! > Σₖ p(k) · log R(k)
//!
//! which for one node is Σₖ w(k) · room(k, n) with w(k) ∝ p(k) / R(k). So a kind that is at home on few nodes weighs
//! more there than one that is at home everywhere. The weights are made anew with each lesson, to a sum of 1.
//!
//! **Stranding.** A kind's own room says nothing of a node that is left with GPUs but without the CPU that the usual mix
//! of tasks wants beside them. With `c` and `m` for the mean CPU and memory of GPU tasks by GPU, what is stranded of the
//! `g` GPUs that node `n` has free is
//!
//! > max(0, g − cpu / c, g − memory / m)
//!
//! and counts twice ([`STRANDED`]): found by trying on the trace "openb", where 1 to 4 make hardly a difference.
//!
//! A task goes where Σₖ w(k) · room(k, n) − 2 · stranded(n) shrinks least, GPUs in thousandths and weights in parts of
//! 2²⁰: exact, without steps. Kinds are those that make up 95 % of the tasks so far; a kind is GPUs, constraint and CPU,
//! and has the mean memory of its tasks.

use std::collections::HashMap;

use super::{Kinds, State, by_gpu};
use crate::place::{
    class::{Classes, ConstraintId},
    mix::{Shape, TaskMix},
    node::{MAX_GPUS, Node, WHOLE},
    task::GpuRequest,
};

/// Thousandths of all tasks that the kinds make up.
const TYPICAL: u64 = 950;
/// The sum of all weights.
const ONE: i64 = 1 << 20;
/// How much more a stranded GPU counts than one that all kinds could use.
const STRANDED: i64 = 2;
/// Growth of one GPU.
pub(super) const GPU: i64 = WHOLE as i64 * ONE;

/// What is expected, and how scarce the room for it is.
#[derive(Clone, Debug)]
pub(super) struct Rooms {
    kinds: Vec<Kind>,
    /// What GPU tasks ask for by GPU: millicores, bytes.
    cpu: u64,
    memory: u64,
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    gpu: GpuRequest,
    constraint: ConstraintId,
    cpu: u64,
    memory: u64,
    weight: i64,
}

/// Kinds of one GPU request that suit a class.
#[derive(Clone, Debug)]
pub(super) struct Group {
    gpu: GpuRequest,
    /// By CPU, ascending.
    kinds: Vec<Kind>,
    /// The most that any of them wants, and all their weights.
    cpu: u64,
    memory: u64,
    weight: i64,
}

impl Group {
    /// Tasks that the GPUs suffice for.
    fn count(&self, whole: u64, parts: &[u16]) -> u64 {
        match self.gpu {
            GpuRequest::None | GpuRequest::Share(0) | GpuRequest::Whole(0) => 0,
            GpuRequest::Share(share) => {
                let of_parts = parts.iter().filter(|free| **free >= share);
                whole * u64::from(WHOLE / share) + of_parts.map(|free| u64::from(free / share)).sum::<u64>()
            }
            GpuRequest::Whole(count) => whole / u64::from(count),
        }
    }
}

impl Rooms {
    pub(super) fn learn(mix: &TaskMix, nodes: &[Node], classes: &Classes) -> Rooms {
        let (mut gpu, mut cpu, mut memory) = (0u128, 0u128, 0u128);
        let mut memories: HashMap<(GpuRequest, ConstraintId, u64), u128> = HashMap::new();
        let alike = |shape: &Shape| (shape.gpu, shape.constraint, shape.cpu);
        for (shape, tasks) in mix.shapes().filter(|(shape, _)| shape.gpu.thousandths() > 0) {
            let tasks = u128::from(tasks);
            gpu += u128::from(shape.gpu.thousandths()) * tasks;
            cpu += u128::from(shape.cpu) * tasks;
            memory += u128::from(shape.memory) * tasks;
            *memories.entry(alike(shape)).or_default() += u128::from(shape.memory) * tasks;
        }
        let by_gpu = |sum: u128| (sum * u128::from(WHOLE) / gpu.max(1)).clamp(1, u64::MAX.into()) as u64;
        let mut kinds: Vec<Kind> = Vec::new();
        for ((gpu, constraint, cpu), tasks) in mix.typical(TYPICAL, alike) {
            let Some(memory) = memories.get(&(gpu, constraint, cpu)) else { continue };
            let memory = (memory / u128::from(tasks)) as u64;
            kinds.push(Kind { gpu, constraint, cpu, memory, weight: tasks as i64 });
        }
        kinds.sort_by_key(|kind| (kind.gpu, kind.cpu, kind.constraint));
        let rooms = Rooms { kinds, cpu: by_gpu(cpu), memory: by_gpu(memory) };
        rooms.weighted(nodes, classes)
    }

    /// Makes the weights of how often the kinds come and of what room there is for them.
    fn weighted(mut self, nodes: &[Node], classes: &Classes) -> Rooms {
        let mut rooms = vec![0u64; self.kinds.len()];
        for node in nodes.iter().filter(|node| node.is_open()) {
            let state = State::of(node);
            for (room, kind) in rooms.iter_mut().zip(&self.kinds) {
                if classes.decided(kind.constraint).suits(node.class) {
                    *room += kind.gpu.thousandths() * kind.count(&state, count(kind.gpu, state.shares()));
                }
            }
        }
        // No room at all counts as one GPU.
        let rate = |(kind, room): (&Kind, &u64)| {
            ((u128::from(kind.weight.unsigned_abs()) << 60) / u128::from((*room).max(WHOLE.into()))).max(1)
        };
        let rates: Vec<u128> = self.kinds.iter().zip(&rooms).map(rate).collect();
        let sum = rates.iter().sum::<u128>().max(1);
        for (kind, rate) in self.kinds.iter_mut().zip(rates) {
            kind.weight = (rate * ONE as u128 / sum) as i64;
        }
        self
    }

    /// GPU that the CPU and memory of a node do not suffice for, thousandths.
    fn stranded(&self, node: &State, free: i64) -> i64 {
        let whole = u64::from(WHOLE);
        let by_cpu = node.cpu.saturating_mul(whole) / self.cpu;
        let by_memory = node.memory.saturating_mul(whole) / self.memory;
        (free - by_cpu.min(by_memory).min(i64::MAX as u64) as i64).max(0)
    }
}

/// How many tasks the GPUs suffice for.
fn count(gpu: GpuRequest, shares: &[u16]) -> u64 {
    match gpu {
        GpuRequest::None | GpuRequest::Share(0) | GpuRequest::Whole(0) => 0,
        GpuRequest::Share(share) => shares.iter().map(|free| u64::from(free / share)).sum(),
        GpuRequest::Whole(count) => {
            shares.iter().filter(|free| **free == WHOLE).count() as u64 / u64::from(count)
        }
    }
}

impl Kind {
    /// How many tasks of this kind there is room for, if the GPUs suffice for so many.
    fn count(&self, node: &State, mut count: u64) -> u64 {
        if self.cpu.saturating_mul(count) > node.cpu {
            count = node.cpu / self.cpu;
        }
        if self.memory.saturating_mul(count) > node.memory {
            count = node.memory / self.memory;
        }
        count
    }
}

impl Kinds for Rooms {
    type Group = Group;

    fn constraints(&self) -> impl Iterator<Item = ConstraintId> {
        self.kinds.iter().map(|kind| kind.constraint)
    }

    fn groups(&self, suits: &[bool]) -> Vec<Group> {
        let group = |gpu, kinds: &[Kind]| Group {
            gpu,
            kinds: kinds.to_vec(),
            cpu: kinds.iter().map(|kind| kind.cpu).max().unwrap_or(0),
            memory: kinds.iter().map(|kind| kind.memory).max().unwrap_or(0),
            weight: kinds.iter().map(|kind| kind.weight).sum(),
        };
        by_gpu(&self.kinds, suits, |kind| kind.gpu, group)
    }

    fn loss(&self, groups: &[Group], node: &State) -> i64 {
        let shares = node.shares();
        let free: i64 = shares.iter().map(|share| i64::from(*share)).sum();
        if free == 0 {
            return 0;
        }
        let whole = shares.iter().filter(|share| **share == WHOLE).count() as u64;
        let (mut parts, mut length) = ([0; MAX_GPUS], 0);
        for share in shares.iter().filter(|share| (1..WHOLE).contains(*share)) {
            parts[length] = *share;
            length += 1;
        }
        let mut room = 0;
        for group in groups {
            let count = group.count(whole, &parts[..length]);
            if count == 0 {
                continue;
            }
            let enough = |most: u64, free: u64| most.saturating_mul(count) <= free;
            let tasks = if enough(group.cpu, node.cpu) && enough(group.memory, node.memory) {
                group.weight * count as i64
            } else {
                let kinds = group.kinds.iter().take_while(|kind| kind.cpu <= node.cpu);
                kinds.map(|kind| kind.weight * kind.count(node, count) as i64).sum()
            };
            room += tasks * group.gpu.thousandths() as i64;
        }
        STRANDED * ONE * self.stranded(node, free) - room
    }
}

#[cfg(test)]
impl Rooms {
    /// The loss as the formula has it, task by task.
    pub(super) fn plainly(&self, suits: impl Fn(ConstraintId) -> bool, node: &State) -> i64 {
        let room = |kind: &Kind| {
            let (mut left, mut used) = (*node, 0);
            let takes = |free: u16| match kind.gpu {
                GpuRequest::None => None,
                GpuRequest::Share(share) => (free >= share).then_some((share, 1)),
                GpuRequest::Whole(count) => (free == WHOLE).then_some((WHOLE, usize::from(count))),
            };
            loop {
                let fitting: Vec<usize> =
                    (0..left.gpus).filter(|gpu| takes(left.share[*gpu]).is_some()).collect();
                let Some((share, count)) = fitting.first().and_then(|gpu| takes(left.share[*gpu])) else {
                    break;
                };
                if fitting.len() < count || kind.cpu > left.cpu || kind.memory > left.memory {
                    break;
                }
                for gpu in &fitting[..count] {
                    left.share[*gpu] -= share;
                }
                left.cpu -= kind.cpu;
                left.memory -= kind.memory;
                used += i64::from(share) * count as i64;
            }
            used
        };
        let free: i64 = node.shares().iter().map(|share| i64::from(*share)).sum();
        let enough =
            |has: u64, by_gpu: u64| (u128::from(has) * 1000 / u128::from(by_gpu)).min(1 << 40) as i64;
        let stranded = free - free.min(enough(node.cpu, self.cpu)).min(enough(node.memory, self.memory));
        let kinds = self.kinds.iter().filter(|kind| suits(kind.constraint));
        2 * (1 << 20) * stranded - kinds.map(|kind| kind.weight * room(kind)).sum::<i64>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::{
        place::{
            NOTHING,
            class::{Class, Constraint},
            node::{Gpus, NodeSpec},
        },
        spec::Capacity,
        units::{Bytes, Millicores},
    };

    #[test]
    fn a_kind_weighs_more_the_less_room_there_is_for_it() {
        let mut classes = Classes::default();
        let mut node = |model: &str| {
            let class = Class { gpu_model: Some(model.to_owned()), ..Class::default() };
            let spec = NodeSpec {
                name: String::new(),
                capacity: Capacity { cpu: Millicores(8000), memory: Bytes(800), ..NOTHING },
                gpus: Gpus { count: 2, model: None },
                labels: BTreeMap::new(),
                taints: BTreeSet::new(),
            };
            Node::new(&spec, classes.class(class), 0)
        };
        let nodes = [node("a"), node("b"), node("b"), node("b")];
        let any = classes.constraint(&Constraint::default());
        let only_a = Constraint { gpu_models: BTreeSet::from(["a".to_owned()]), ..Constraint::default() };
        let only_a = classes.constraint(&only_a);
        let shape = |memory, gpu, constraint| Shape { cpu: 1000, memory, gpu, gpu_memory: 0, constraint };
        let mut mix = TaskMix::default();
        for memory in [100, 300] {
            mix.add(shape(memory, GpuRequest::Whole(1), any));
            mix.add(shape(memory, GpuRequest::Whole(1), only_a));
        }
        mix.add(shape(40, GpuRequest::None, any));
        let rooms = Rooms::learn(&mix, &nodes, &classes);
        // Two whole GPUs on one node, and eight on four: a quarter of the room has four times the weight.
        let weight = |id| rooms.kinds.iter().find(|kind| kind.constraint == id).unwrap().weight;
        assert_eq!([weight(any), weight(only_a)], [ONE / 5, ONE * 4 / 5]);
        assert!(rooms.kinds.iter().all(|kind| kind.memory == 200), "{rooms:?}");
        assert_eq!((rooms.cpu, rooms.memory), (1000, 200));
        // 500 millicores do for half a GPU of the two.
        let left = State { cpu: 500, ..State::of(&nodes[0]) };
        assert_eq!(rooms.stranded(&left, 2000), 1500);
    }
}
