//! The published rule: "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient
//! Descent" (Weng et al., ATC '23), as its authors' simulator has it.
//!
//! *Typical* tasks are the most frequent kinds of a mix that make up 95 % of it. A kind is CPU, GPUs and their model:
//! memory is not in it. For a kind, a fragment of a node is what its GPUs have free, all of it where the kind does not
//! fit by CPU, GPUs or model, or asks for no GPU; else that of GPUs that have less free than it asks of one. The node's
//! loss is the mean over the kinds. With `x` for how many GPUs a task would make the loss of a node grow by, the node's
//! score is
//!
//! > ⌊100 / (1 + eˣ)⌋
//!
//! and the highest wins; of the GPUs of a node likewise the first that gives the highest. So growths within one of a
//! hundred steps are equal, and what is the first of equal nodes is outside of the rule (see `docs/decisions/0017`).
//!
//! A loss is kept as the sum over the tasks of the mix, in thousandths of a GPU: all of it in integers.

use super::{Kinds, State, by_gpu};
use crate::place::{
    class::ConstraintId,
    mix::{Shape, TaskMix},
    node::WHOLE,
    task::GpuRequest,
};

/// Thousandths of all tasks that typical kinds make up.
const TYPICAL: u64 = 950;
/// Steps of the curve.
pub(super) const STEPS: i64 = 100;

/// Typical tasks.
#[derive(Clone, Debug)]
pub(super) struct Paper {
    kinds: Vec<Kind>,
    /// Tasks of these and of kinds without a GPU that are typical.
    tasks: i64,
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    cpu: u64,
    gpu: GpuRequest,
    constraint: ConstraintId,
    tasks: i64,
}

/// Kinds of one GPU request that suit a class.
#[derive(Clone, Debug)]
pub(super) struct Group {
    gpu: GpuRequest,
    /// CPU, ascending, and the tasks that want no more of it.
    tasks: Vec<(u64, i64)>,
}

impl Paper {
    pub(super) fn learn(mix: &TaskMix) -> Paper {
        let alike = |shape: &Shape| {
            let Shape { cpu, memory: _, gpu, gpu_memory: _, constraint } = *shape;
            (cpu, gpu, constraint)
        };
        let typical = mix.typical(TYPICAL, alike);
        let tasks = typical.iter().map(|(_, tasks)| *tasks as i64).sum::<i64>();
        let kind = |((cpu, gpu, constraint), tasks): ((u64, GpuRequest, ConstraintId), u64)| Kind {
            cpu,
            gpu,
            constraint,
            tasks: tasks as i64,
        };
        let mut kinds: Vec<Kind> =
            typical.into_iter().map(kind).filter(|kind| kind.gpu != GpuRequest::None).collect();
        kinds.sort_by_key(|kind| (kind.gpu, kind.cpu));
        Paper { kinds, tasks: tasks.max(1) }
    }

    /// The score as steps that are lost: 100 less the paper's, so that the least wins.
    pub(super) fn score(&self, growth: i64) -> i64 {
        // By a GPU, in millionths: rounded up, since what is not exactly at a step is beyond it.
        let growth = growth.saturating_mul(1000);
        let millionths = growth.div_euclid(self.tasks) + i64::from(growth.rem_euclid(self.tasks) > 0);
        // 100 / (1 + e^x) >= k where x <= ln((100 - k) / k).
        STEPS - LOGITS.partition_point(|logit| millionths <= *logit) as i64
    }
}

impl Kinds for Paper {
    type Group = Group;

    fn constraints(&self) -> impl Iterator<Item = ConstraintId> {
        self.kinds.iter().map(|kind| kind.constraint)
    }

    fn groups(&self, suits: &[bool]) -> Vec<Group> {
        let group = |gpu, kinds: &[Kind]| {
            let sum = |sum: &mut i64, kind: &Kind| {
                *sum += kind.tasks;
                Some((kind.cpu, *sum))
            };
            Group { gpu, tasks: kinds.iter().scan(0, sum).collect() }
        };
        by_gpu(&self.kinds, suits, |kind| kind.gpu, group)
    }

    fn loss(&self, groups: &[Group], node: &State) -> i64 {
        let shares = node.shares();
        let free: i64 = shares.iter().map(|share| i64::from(*share)).sum();
        if free == 0 {
            return 0;
        }
        let most = shares.iter().copied().max().unwrap_or(0);
        let whole = shares.iter().filter(|share| **share == WHOLE).count();
        let mut usable = 0;
        for Group { gpu, tasks } in groups {
            let least = match *gpu {
                GpuRequest::Share(share) if share <= most => share,
                GpuRequest::Whole(count) if usize::from(count) <= whole => WHOLE,
                _ => continue,
            };
            let Some((_, tasks)) = tasks[..tasks.partition_point(|(cpu, _)| *cpu <= node.cpu)].last() else {
                continue;
            };
            let fitting = shares.iter().filter(|share| **share >= least);
            usable += tasks * fitting.map(|share| i64::from(*share)).sum::<i64>();
        }
        self.tasks * free - usable
    }
}

/// ln((100 − k) / k) for k from 1 to 99, in millionths.
const LOGITS: [i64; 99] = [
    4_595_120, 3_891_820, 3_476_099, 3_178_054, 2_944_439, 2_751_535, 2_586_689, 2_442_347, 2_313_635,
    2_197_225, 2_090_741, 1_992_430, 1_900_959, 1_815_290, 1_734_601, 1_658_228, 1_585_627, 1_516_347,
    1_450_010, 1_386_294, 1_324_925, 1_265_666, 1_208_311, 1_152_680, 1_098_612, 1_045_969, 994_623, 944_462,
    895_384, 847_298, 800_119, 753_772, 708_185, 663_294, 619_039, 575_364, 532_217, 489_548, 447_312,
    405_465, 363_965, 322_773, 281_851, 241_162, 200_671, 160_343, 120_144, 80_043, 40_005, 0, -40_005,
    -80_043, -120_144, -160_343, -200_671, -241_162, -281_851, -322_773, -363_965, -405_465, -447_312,
    -489_548, -532_217, -575_364, -619_039, -663_294, -708_185, -753_772, -800_119, -847_298, -895_384,
    -944_462, -994_623, -1_045_969, -1_098_612, -1_152_680, -1_208_311, -1_265_666, -1_324_925, -1_386_294,
    -1_450_010, -1_516_347, -1_585_627, -1_658_228, -1_734_601, -1_815_290, -1_900_959, -1_992_430,
    -2_090_741, -2_197_225, -2_313_635, -2_442_347, -2_586_689, -2_751_535, -2_944_439, -3_178_054,
    -3_476_099, -3_891_820, -4_595_120,
];

#[cfg(test)]
impl Paper {
    /// The loss as the definition has it, kind by kind.
    pub(super) fn plainly(&self, suits: impl Fn(ConstraintId) -> bool, node: &State) -> i64 {
        let free: i64 = node.shares().iter().map(|share| i64::from(*share)).sum();
        let without_gpu = self.tasks - self.kinds.iter().map(|kind| kind.tasks).sum::<i64>();
        let fragment = |kind: &Kind| {
            let (of_one, count) = match kind.gpu {
                GpuRequest::None => unreachable!(),
                GpuRequest::Share(share) => (share, 1),
                GpuRequest::Whole(count) => (WHOLE, usize::from(count)),
            };
            let fits = node.shares().iter().filter(|share| **share >= of_one).count() >= count;
            if fits && kind.cpu <= node.cpu && suits(kind.constraint) {
                node.shares().iter().filter(|share| **share < of_one).map(|share| i64::from(*share)).sum()
            } else {
                free
            }
        };
        without_gpu * free + self.kinds.iter().map(|kind| kind.tasks * fragment(kind)).sum::<i64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_score_is_that_of_the_curve() {
        let paper = Paper { kinds: Vec::new(), tasks: 7 };
        for growth in (-40_000i64..40_000).chain([-100_000, 100_000]) {
            let by = growth as f64 / 1000.0 / 7.0;
            let score = |by: f64| 100 - (100.0 / (1.0 + by.exp())).floor() as i64;
            let near = [score(by - 1e-6), score(by + 1e-6)];
            assert!(near.contains(&paper.score(growth)), "{growth}: {} is not {near:?}", paper.score(growth));
        }
        // No growth is a step, and the least growth is beyond it.
        assert_eq!([-1, 0, 1].map(|growth| paper.score(growth)), [50, 50, 51]);
    }
}
