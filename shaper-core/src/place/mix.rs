//! What tasks are like: shapes, and how often each comes.

use std::{cmp::Reverse, collections::HashMap, hash::Hash};

use super::{
    class::ConstraintId,
    task::{GpuRequest, Request},
};

/// What of a task matters to fragmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// CPU, millicores.
    pub cpu: u64,
    /// Memory, bytes.
    pub memory: u64,
    /// GPUs.
    pub gpu: GpuRequest,
    /// Memory of each of them, bytes.
    pub gpu_memory: u64,
    /// What it says about the node.
    pub constraint: ConstraintId,
}

impl Shape {
    /// That of a task.
    pub fn of(request: &Request) -> Shape {
        let Request { demand, gpu, constraint, priority: _ } = request;
        let (cpu, memory) = (demand.cpu.0, demand.memory.0);
        Shape { cpu, memory, gpu: *gpu, gpu_memory: request.gpu_memory(), constraint: *constraint }
    }
}

/// Shapes, and how often each came.
#[derive(Clone, Debug, Default)]
pub struct TaskMix {
    counts: HashMap<Shape, u64>,
    tasks: u64,
}

impl TaskMix {
    /// Counts a task.
    pub fn add(&mut self, shape: Shape) {
        *self.counts.entry(shape).or_default() += 1;
        self.tasks += 1;
    }

    /// How many were counted.
    pub fn tasks(&self) -> u64 {
        self.tasks
    }

    /// Makes what came long ago count for less: every count is halved, and what came but once is forgotten.
    pub(super) fn halve(&mut self) {
        self.counts.retain(|_, count| {
            *count /= 2;
            *count > 0
        });
        self.tasks = self.counts.values().sum();
    }

    /// All shapes, in no order.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&Shape, u64)> {
        self.counts.iter().map(|(shape, count)| (shape, *count))
    }

    /// Shapes that are one to `alike` together, the most frequent first (of two as frequent the greater), until they
    /// are so many thousandths of all tasks.
    pub(super) fn typical<T: Ord + Hash>(
        &self,
        thousandths: u64,
        alike: impl Fn(&Shape) -> T,
    ) -> Vec<(T, u64)> {
        let mut counts: HashMap<T, u64> = HashMap::new();
        for (shape, count) in self.shapes() {
            *counts.entry(alike(shape)).or_default() += count;
        }
        let mut found: Vec<(T, u64)> = counts.into_iter().collect();
        found.sort_unstable_by(|a, b| (Reverse(a.1), Reverse(&a.0)).cmp(&(Reverse(b.1), Reverse(&b.0))));
        let mut covered = 0;
        let is_enough = |(_, count): &(T, u64)| {
            let enough = covered * 1000 >= self.tasks * thousandths;
            covered += count;
            enough
        };
        let length = found.iter().position(is_enough).unwrap_or(found.len());
        found.truncate(length);
        found
    }
}
