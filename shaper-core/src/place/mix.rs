//! What tasks are like: shapes, and how often each comes.

use std::collections::HashMap;

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

    /// The shapes that come most often, until they are so many thousandths of all; the most frequent first.
    pub fn typical(&self, thousandths: u64) -> Vec<(Shape, u64)> {
        let mut shapes: Vec<_> = self.counts.iter().map(|(shape, count)| (*shape, *count)).collect();
        shapes.sort_unstable_by_key(|(shape, count)| (std::cmp::Reverse(*count), *shape));
        let mut covered = 0;
        let mut is_enough = |count: u64| {
            let enough = covered * 1000 >= self.tasks * thousandths;
            covered += count;
            enough
        };
        let length = shapes.iter().position(|(_, count)| is_enough(*count)).unwrap_or(shapes.len());
        shapes.truncate(length);
        shapes
    }
}
