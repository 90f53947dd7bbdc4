//! Room on one node without ending anything: who gives back how much of what is reserved for it.
//!
//! Whoever gives, gives what it does not need, or what a policy says that it can do without; so it matters less how much
//! each gives than how many are disturbed, and who. Lower priorities give first, each of them all that helps before a
//! higher one is asked; among equals, who covers the largest share of what is still lacking. Then whoever turns out not to be needed is left
//! alone, the last chosen first. This is the greedy rule for covering two resources at once: it finds room wherever all
//! together have it, and nobody that it names could be left out; but in rare mixes of CPU and memory fewer might have done.

use crate::{
    spec::Priority,
    units::{Bytes, Millicores},
};

/// An amount of what can be given back by a task that goes on: CPU and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// CPU.
    pub cpu: Millicores,
    /// Memory.
    pub memory: Bytes,
}

impl Amount {
    /// Nothing.
    pub const NONE: Amount = Amount { cpu: Millicores(0), memory: Bytes(0) };

    fn least(self, other: Amount) -> Amount {
        Amount { cpu: self.cpu.min(other.cpu), memory: self.memory.min(other.memory) }
    }

    fn less(self, other: Amount) -> Amount {
        let (cpu, memory) =
            (self.cpu.0.saturating_sub(other.cpu.0), self.memory.0.saturating_sub(other.memory.0));
        Amount { cpu: Millicores(cpu), memory: Bytes(memory) }
    }

    /// Both together.
    pub fn and(self, other: Amount) -> Amount {
        let (cpu, memory) =
            (self.cpu.0.saturating_add(other.cpu.0), self.memory.0.saturating_add(other.memory.0));
        Amount { cpu: Millicores(cpu), memory: Bytes(memory) }
    }

    /// Whether this is all of `lack`.
    pub fn covers_all(self, lack: Amount) -> bool {
        lack.less(self) == Amount::NONE
    }

    /// Which share of `lack` this covers, in millionths: of each resource that is lacking, together.
    fn covers(self, lack: Amount) -> u64 {
        let part = |has: u64, lacks: u64| match lacks {
            0 => 0,
            // At most a million.
            lacks => (u128::from(has.min(lacks)) * 1_000_000 / u128::from(lacks)) as u64,
        };
        part(self.cpu.0, lack.cpu.0) + part(self.memory.0, lack.memory.0)
    }
}

/// A task on the node that can do with less than is reserved for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spare {
    /// Its number; a higher one came later.
    pub task: u64,
    /// Its priority.
    pub priority: Priority,
    /// How much it can give back at most.
    pub most: Amount,
}

/// A task that gives something back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lowered {
    /// Its number.
    pub task: u64,
    /// By how much less is to be reserved for it.
    pub by: Amount,
}

/// Who is to give back how much, so that what is lacking is there: nobody more than it can, and no more than is lacking in
/// all. `None`: all of them together do not have it. What lacks nothing takes nothing.
pub fn lower(lack: Amount, spares: &[Spare]) -> Option<Vec<Lowered>> {
    let mut left = lack;
    let mut open: Vec<&Spare> = spares.iter().collect();
    let mut chosen: Vec<&Spare> = Vec::new();
    while left != Amount::NONE {
        let helpful =
            open.iter().enumerate().filter(|(_, spare)| spare.most.covers(left) > 0 || helps(spare, left));
        let rank = |spare: &Spare| (std::cmp::Reverse(spare.priority), spare.most.covers(left), spare.task);
        let (place, _) = helpful.max_by_key(|(_, spare)| rank(spare))?;
        let spare = open.swap_remove(place);
        left = left.less(spare.most);
        chosen.push(spare);
    }
    // The last chosen covered what nobody before it did, so it is needed; who came before may not be any more.
    for place in (0..chosen.len()).rev() {
        let others = chosen.iter().enumerate().filter(|(at, _)| *at != place);
        let sum = others.fold(Amount::NONE, |sum, (_, spare)| sum.and(spare.most));
        if sum.covers_all(lack) {
            chosen.remove(place);
        }
    }
    let mut left = lack;
    let lowered = chosen.into_iter().map(|spare| {
        let by = spare.most.least(left);
        left = left.less(by);
        Lowered { task: spare.task, by }
    });
    Some(lowered.collect())
}

/// Whether it has anything of what is lacking, be it less than a millionth.
fn helps(spare: &Spare, lack: Amount) -> bool {
    spare.most.least(lack) != Amount::NONE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amount(cpu: u64, memory: u64) -> Amount {
        Amount { cpu: Millicores(cpu), memory: Bytes(memory) }
    }

    fn spare(task: u64, priority: Priority, cpu: u64, memory: u64) -> Spare {
        Spare { task, priority, most: amount(cpu, memory) }
    }

    fn lowered(task: u64, cpu: u64, memory: u64) -> Lowered {
        Lowered { task, by: amount(cpu, memory) }
    }

    #[test]
    fn the_one_that_has_enough_gives_it_and_no_more() {
        let spares = [
            spare(1, Priority::Low, 500, 0),
            spare(2, Priority::Low, 3000, 0),
            spare(3, Priority::Low, 800, 0),
        ];
        assert_eq!(lower(amount(1000, 0), &spares), Some(vec![lowered(2, 1000, 0)]));
        assert_eq!(lower(amount(0, 0), &spares), Some(Vec::new()));
        assert_eq!(lower(amount(4301, 0), &spares), None);
        assert_eq!(lower(amount(1000, 1), &spares), None, "nobody has memory to give");
    }

    #[test]
    fn lower_priorities_give_first_and_among_equals_who_came_later() {
        let spares = [
            spare(1, Priority::Medium, 4000, 0),
            spare(2, Priority::Low, 600, 0),
            spare(3, Priority::Low, 600, 0),
        ];
        assert_eq!(lower(amount(500, 0), &spares), Some(vec![lowered(3, 500, 0)]));
        let both = vec![lowered(3, 600, 0), lowered(2, 100, 0)];
        assert_eq!(lower(amount(700, 0), &spares), Some(both));
    }

    #[test]
    fn who_is_not_needed_after_all_is_left_alone() {
        // The first choice covers the most of both, and then two others cover all of it.
        let spares = [
            spare(1, Priority::Low, 600, 600),
            spare(2, Priority::Low, 1000, 0),
            spare(3, Priority::Low, 0, 1000),
        ];
        let both = vec![lowered(3, 0, 1000), lowered(2, 1000, 0)];
        assert_eq!(lower(amount(1000, 1000), &spares), Some(both));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn room_is_found_wherever_it_is_and_nobody_is_asked_in_vain(
            lack in (0u64..3000, 0u64..3000),
            spares in prop::collection::vec((0u8..3, 0u64..1200, 0u64..1200), 0..9),
        ) {
            const PRIORITIES: [Priority; 3] = [Priority::Low, Priority::Medium, Priority::High];
            let lack = amount(lack.0, lack.1);
            let spares: Vec<_> = (1..).zip(spares)
                .map(|(task, (priority, cpu, memory))| spare(task, PRIORITIES[usize::from(priority)], cpu, memory))
                .collect();
            let all = spares.iter().fold(Amount::NONE, |sum, spare| sum.and(spare.most));
            let found = lower(lack, &spares);
            prop_assert_eq!(found.is_some(), lack.less(all) == Amount::NONE);
            let Some(found) = found else { return Ok(()) };
            let sum = found.iter().fold(Amount::NONE, |sum, lowered| sum.and(lowered.by));
            prop_assert_eq!(sum, lack);
            let of = |task: u64| spares.iter().find(|spare| spare.task == task).unwrap();
            for Lowered { task, by } in &found {
                prop_assert_eq!(of(*task).most.least(*by), *by, "more than it has");
                prop_assert_ne!(*by, Amount::NONE);
                let others = found.iter().filter(|other| other.task != *task);
                let others = others.fold(Amount::NONE, |sum, other| sum.and(of(other.task).most));
                prop_assert_ne!(lack.less(others), Amount::NONE, "without {} there is room, too", task);
            }
            // Those of higher priorities give only where the lower ones have not all of it.
            for priority in PRIORITIES {
                let lower = spares.iter().filter(|spare| spare.priority <= priority);
                let lower = lower.fold(Amount::NONE, |sum, spare| sum.and(spare.most));
                if lack.less(lower) == Amount::NONE {
                    prop_assert!(found.iter().all(|lowered| of(lowered.task).priority <= priority));
                }
            }
        }

        #[test]
        fn hardly_ever_more_are_disturbed_than_would_have_to_be(
            lack in (1u64..3000, 1u64..3000),
            spares in prop::collection::vec((0u64..1200, 0u64..1200), 1..9),
        ) {
            let lack = amount(lack.0, lack.1);
            let spares: Vec<_> =
                (1..).zip(spares).map(|(task, (cpu, memory))| spare(task, Priority::Low, cpu, memory)).collect();
            let fewest = (0u32..1 << spares.len())
                .filter(|set| {
                    let some = spares.iter().enumerate().filter(|(at, _)| set & 1 << at != 0);
                    lack.less(some.fold(Amount::NONE, |sum, (_, spare)| sum.and(spare.most))) == Amount::NONE
                })
                .map(u32::count_ones)
                .min();
            let found = lower(lack, &spares);
            prop_assert_eq!(found.is_some(), fewest.is_some());
            if let (Some(found), Some(fewest)) = (found, fewest) {
                prop_assert!(found.len() <= fewest as usize + 1, "{} for {}", found.len(), fewest);
            }
        }
    }
}
