//! Who of the nodes that fit is best: scorers by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    exact::{Divisor, Key},
    node::Node,
};

/// A rule for which of the nodes that fit is best. The first in the order of registration on a tie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scorer {
    /// The seed formula: most free CPU and memory, as shares of the node's own. It spreads.
    Seed,
    /// Least free CPU and GPU, as shares of the largest node's; CPU and memory where no node has a GPU.
    BestFit,
    /// Fragmentation gradient descent (Weng et al., ATC '23): the most of ⌊100 / (1 + eˣ)⌋, where x is by how many GPUs
    /// there grows what the node's GPUs have free and typical tasks cannot use, a mean over the tasks of a mix
    /// that is told beforehand ([`Cluster::expect`](super::Cluster::expect)).
    Fgd,
    /// Our rule: the least loss, in thousandths of GPUs, of room for each kind of task that has come so far
    /// ([`Cluster::learn`](super::Cluster::learn)), weighed by how often it comes by the room that all nodes have for it;
    /// and twice what CPU or memory would not suffice for of the GPUs that are left free.
    Fragmentation,
}

impl Scorer {
    /// All of them.
    pub const ALL: [Scorer; 4] = [Scorer::Seed, Scorer::BestFit, Scorer::Fgd, Scorer::Fragmentation];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Scorer::Seed => "seed",
            Scorer::BestFit => "best-fit",
            Scorer::Fgd => "fgd",
            Scorer::Fragmentation => "fragmentation",
        }
    }

    /// The order of nodes that it means, if that does not depend on the task.
    pub(super) fn order(self) -> Option<Order> {
        match self {
            Scorer::Seed => Some(Order::Seed),
            Scorer::BestFit => Some(Order::BestFit),
            Scorer::Fgd | Scorer::Fragmentation => None,
        }
    }
}

impl fmt::Display for Scorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Scorers, each with its weight: the node with the highest weighted sum of points wins. One alone decides by its own exact rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scoring(Vec<(Scorer, u32)>);

/// The most points that a scorer gives a node.
pub const POINTS: u64 = 1 << 20;

/// Text that names no scorers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no scorers; write seed, best-fit, fgd or fragmentation, or several with weights, as in seed:2,best-fit:1"
)]
pub struct ParseScoringError(String);

impl Scoring {
    /// This scorer alone.
    pub fn of(scorer: Scorer) -> Scoring {
        Scoring(vec![(scorer, 1)])
    }

    /// Several, with weights. `None` without any of a weight above 0.
    pub fn mixed(parts: impl IntoIterator<Item = (Scorer, u32)>) -> Option<Scoring> {
        let parts: Vec<_> = parts.into_iter().filter(|(_, weight)| *weight > 0).collect();
        (!parts.is_empty()).then_some(Scoring(parts))
    }

    /// The only scorer, if there is one alone.
    pub fn alone(&self) -> Option<Scorer> {
        match self.0[..] {
            [(scorer, _)] => Some(scorer),
            _ => None,
        }
    }

    /// All with their weights.
    pub fn parts(&self) -> &[(Scorer, u32)] {
        &self.0
    }
}

impl FromStr for Scoring {
    type Err = ParseScoringError;

    fn from_str(text: &str) -> Result<Scoring, ParseScoringError> {
        let part = |part: &str| {
            let (name, weight) = match part.split_once(':') {
                Some((name, weight)) => (name.trim(), weight.trim().parse().ok()?),
                None => (part.trim(), 1),
            };
            Scorer::ALL.into_iter().find(|scorer| scorer.name() == name).map(|scorer| (scorer, weight))
        };
        let parts: Option<Vec<_>> = text.split(',').map(part).collect();
        parts.and_then(Scoring::mixed).ok_or_else(|| ParseScoringError(text.to_owned()))
    }
}

impl fmt::Display for Scoring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scorer) = self.alone() {
            return scorer.fmt(f);
        }
        for (index, (scorer, weight)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{scorer}:{weight}")?;
        }
        Ok(())
    }
}

/// An order of all nodes that does not depend on the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Seed,
    BestFit,
}

/// The most that any node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Largest {
    cpu: u64,
    memory: u64,
    gpus: u64,
}

impl Largest {
    pub(super) fn with(self, node: &Node) -> Largest {
        Largest {
            cpu: self.cpu.max(node.total[0]),
            memory: self.memory.max(node.total[1]),
            gpus: self.gpus.max(u64::from(node.gpus) * 1000),
        }
    }

    /// What best fit weighs beside CPU: the largest amount.
    fn beside(&self) -> u64 {
        if self.gpus > 0 { self.gpus } else { self.memory }.max(1)
    }

    /// Twice the product of the largest amounts: what best fit divides by.
    pub(super) fn divisor(&self) -> Divisor {
        Divisor::new(self.full())
    }

    fn full(&self) -> u128 {
        2 * u128::from(self.cpu.max(1)) * u128::from(self.beside())
    }

    /// The more, the less is free.
    fn fullness(&self, node: &Node) -> u128 {
        let beside = if self.gpus > 0 { node.share_free() } else { node.free(1) };
        let left = u128::from(node.free(0)) * u128::from(self.beside())
            + u128::from(beside) * u128::from(self.cpu.max(1));
        self.full().saturating_sub(left)
    }
}

/// What divides the score, by the seed formula, of a node with so much CPU and memory.
pub(super) fn seed_divisor([cpu, memory]: [u64; 2]) -> Divisor {
    Divisor::new((u128::from(cpu) * u128::from(memory)).max(1))
}

/// Three of the share of CPU that is free and two of that of memory: what divides is [`seed_divisor`].
fn seed_numerator(node: &Node) -> u128 {
    let [cpus, memories] = [node.total[0], node.total[1]].map(u128::from);
    let [cpu, memory] = [node.free(0), node.free(1)].map(u128::from);
    3 * cpu * memories + 2 * memory * cpus
}

pub(super) fn seed_key(node: &Node, divisor: &Divisor, number: u32) -> Key {
    divisor.key(seed_numerator(node), number)
}

pub(super) fn best_fit_key(node: &Node, largest: &Largest, divisor: &Divisor, number: u32) -> Key {
    divisor.key(largest.fullness(node), number)
}

/// Points of a node by an order that does not depend on the task.
pub(super) fn points(order: Order, node: &Node, largest: &Largest) -> u64 {
    let share = |part: u128, whole: u128| {
        // Both so small that the product does not overflow.
        let shift = (u128::BITS - whole.leading_zeros()).saturating_sub(100);
        ((part >> shift) * u128::from(POINTS) / (whole >> shift).max(1)) as u64
    };
    match order {
        Order::Seed => {
            let whole = u128::from(node.total[0]) * u128::from(node.total[1]);
            share(seed_numerator(node) / 5, whole)
        }
        Order::BestFit => share(largest.fullness(node), largest.full()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scorers_are_named() {
        for scorer in Scorer::ALL {
            assert_eq!(scorer.name().parse::<Scoring>().unwrap().alone(), Some(scorer));
        }
        let mixed: Scoring = "seed:2, best-fit".parse().unwrap();
        assert_eq!(mixed.parts(), [(Scorer::Seed, 2), (Scorer::BestFit, 1)]);
        assert_eq!(mixed.to_string(), "seed:2,best-fit:1");
        for wrong in ["", "sed", "seed:", "seed:-1", "seed:0", "seed:1,"] {
            assert!(wrong.parse::<Scoring>().is_err(), "{wrong}");
        }
    }
}
