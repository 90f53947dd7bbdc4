//! The plain rule: every node is judged, one after the other. What the rest of [`place`](super) is measured against.
//!
//! A node is feasible when every resource of the demand fits into what is free there (capacity less
//! what is reserved); a resource whose capacity the node does not know is not compared, and the verdict
//! says so. GPU cards are looked at one by one ([`cards`](super::cards)); what a node does not offer it does not
//! have. Of the feasible nodes, the *seed* scorer takes the one with the highest
//!
//! ```text
//! priority_value·0.5 + cpu_free/cpu_total·0.3 + memory_free/memory_total·0.2
//! ```
//!
//! and the first of them on a tie ([`exact`](super::exact) says how that is compared).

use std::{cmp::Ordering, fmt};

use super::{
    cards::{CardBooks, CardShortage, NO_BOOKS, NO_OFFER, Needs},
    exact::Fraction,
};
use crate::{
    gpu::{CardOffer, CardSet},
    spec::{Capacity, Demand, NodeVerdict, Priority},
    units::{BitsPerSec, Bytes, Iops, Millicores},
};

/// A node as placement sees it: in the order of registration, which decides ties.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it has.
    pub capacity: &'a Capacity,
    /// What the tasks there have reserved, without the task to be placed. `None` is nothing. What of its GPU cards is, `cards`
    /// says.
    pub reserved: &'a Capacity,
    /// Its GPU cards.
    pub offer: &'a CardOffer,
    /// What of them is taken.
    pub cards: &'a CardBooks,
    /// Whether it runs containers.
    pub containers: bool,
}

impl<'a> Candidate<'a> {
    /// One without GPU cards, that runs containers.
    pub fn plain(name: &'a str, capacity: &'a Capacity, reserved: &'a Capacity) -> Candidate<'a> {
        Candidate { name, capacity, reserved, offer: &NO_OFFER, cards: &NO_BOOKS, containers: true }
    }
}

/// What was chosen, and how every node was judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Index of the winner; `None`: no node fits.
    pub winner: Option<usize>,
    /// One verdict a node, in the order of the nodes.
    pub verdicts: Vec<NodeVerdict>,
}

/// Chooses a node, and says why.
pub fn choose(needs: Needs<'_>, priority: Priority, nodes: &[Candidate<'_>]) -> Choice {
    let verdicts = nodes.iter().map(|node| judge(needs, priority, node)).collect();
    Choice { winner: best(needs, nodes), verdicts }
}

/// The winner of [`choose`], without the verdicts: nothing is allocated.
pub fn best(needs: Needs<'_>, nodes: &[Candidate<'_>]) -> Option<usize> {
    let mut winner: Option<(usize, Fraction)> = None;
    for (index, node) in nodes.iter().enumerate().filter(|(_, node)| fits(needs, node)) {
        let score = order(node);
        if winner.is_none_or(|(_, best)| score.compare(best) == Ordering::Greater) {
            winner = Some((index, score));
        }
    }
    winner.map(|(index, _)| index)
}

/// Whether the task fits there now.
pub fn fits(needs: Needs<'_>, node: &Candidate<'_>) -> bool {
    runs(needs, node) && compare(needs.demand, node, |_| {}) && node.compare_cards(needs, |_| {})
}

/// Whether it is a node for such tasks at all.
fn runs(needs: Needs<'_>, node: &Candidate<'_>) -> bool {
    node.containers || !needs.container
}

/// Whether the task fits there now with just these GPU cards.
pub fn fits_with(needs: Needs<'_>, cards: CardSet, node: &Candidate<'_>) -> bool {
    runs(needs, node) && compare(needs.demand, node, |_| {}) && node.has_cards(needs, cards)
}

/// Whether the task would fit there if nothing else were there.
pub fn could_ever_hold(needs: Needs<'_>, node: &Candidate<'_>) -> bool {
    fits(needs, &Candidate { reserved: &NOTHING, cards: &NO_BOOKS, ..*node })
}

/// How one node stands to a task.
pub fn judge(needs: Needs<'_>, priority: Priority, node: &Candidate<'_>) -> NodeVerdict {
    let (mut lacking, mut not_checked) = (Vec::new(), Vec::new());
    let has_amounts = compare(needs.demand, node, |finding| match finding {
        Finding::Lacks(shortage) => lacking.push(shortage.to_string()),
        Finding::NotChecked(resource) => not_checked.push(resource.to_owned()),
    });
    let has_cards =
        node.compare_cards(needs, |shortage: CardShortage<'_>| lacking.push(shortage.to_string()));
    if !runs(needs, node) {
        lacking.push("containers: its agent runs none (shaper-agent --containers)".to_owned());
    }
    let feasible = has_amounts && has_cards && runs(needs, node);
    let score = feasible.then(|| score(priority, node));
    NodeVerdict { node: node.name.to_owned(), score, lacking, not_checked }
}

/// Nothing at all: an empty node has this reserved.
pub const NOTHING: Capacity =
    Capacity { cpu: Millicores(0), memory: Bytes(0), gpu_memory: None, network: None, storage_io: None };

enum Finding {
    Lacks(Shortage),
    NotChecked(&'static str),
}

/// More is wanted of a resource than is free.
struct Shortage {
    resource: &'static str,
    wanted: u64,
    free: u64,
    total: u64,
    /// How an amount of it reads.
    show: fn(u64) -> String,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { resource, wanted, free, total, show } = *self;
        let unit = match resource {
            "cpu" if wanted == 1000 => " core",
            "cpu" => " cores",
            _ => "",
        };
        write!(f, "{resource}: {}{unit} wanted, {} of {} free", show(wanted), show(free), show(total))
    }
}

/// Compares every resource of the demand but for GPU cards; whether all that were compared fit.
fn compare(demand: &Demand, node: &Candidate<'_>, mut tell: impl FnMut(Finding)) -> bool {
    let reserved = node.reserved;
    // Exhaustive, so that a new resource is compared or does not compile.
    let Demand { cpu, memory, gpu_memory: _, network, storage_io } = *demand;
    let Capacity { cpu: cpus, memory: memories, gpu_memory: _, network: uplink, storage_io: disks } =
        *node.capacity;
    type Show = fn(u64) -> String;
    let (cores, bytes, bits, iops): (Show, Show, Show, Show) = (
        |it| Millicores(it).to_string(),
        |it| Bytes(it).to_string(),
        |it| BitsPerSec(it).to_string(),
        |it| Iops(it).to_string(),
    );
    let bits_of = |it: Option<BitsPerSec>| it.map(|it| it.0);
    let iops_of = |it: Option<Iops>| it.map(|it| it.0);
    let rows = [
        ("cpu", Some(cpu.0), Some(cpus.0), Some(reserved.cpu.0), cores),
        ("memory", Some(memory.0), Some(memories.0), Some(reserved.memory.0), bytes),
        ("network", bits_of(network), bits_of(uplink), bits_of(reserved.network), bits),
        ("storage_io", iops_of(storage_io), iops_of(disks), iops_of(reserved.storage_io), iops),
    ];
    let mut all_fit = true;
    for (resource, wanted, total, taken, show) in rows {
        let Some(wanted) = wanted else { continue };
        let Some(total) = total else {
            tell(Finding::NotChecked(resource));
            continue;
        };
        let free = total.saturating_sub(taken.unwrap_or(0));
        // Of no CPU or memory there is no share: such a node has no score, and takes nothing.
        if wanted > free || (total == 0 && matches!(resource, "cpu" | "memory")) {
            all_fit = false;
            tell(Finding::Lacks(Shortage { resource, wanted, free, total, show }));
        }
    }
    all_fit
}

fn cpu_free(node: &Candidate<'_>) -> u64 {
    node.capacity.cpu.0.saturating_sub(node.reserved.cpu.0)
}

fn memory_free(node: &Candidate<'_>) -> u64 {
    node.capacity.memory.0.saturating_sub(node.reserved.memory.0)
}

/// The seed formula, for display.
fn score(priority: Priority, node: &Candidate<'_>) -> f64 {
    let share = |free: u64, total: u64| free as f64 / total as f64;
    priority.value_permille() as f64 / 1000.0 * 0.5
        + share(cpu_free(node), node.capacity.cpu.0) * 0.3
        + share(memory_free(node), node.capacity.memory.0) * 0.2
}

/// What the score of a feasible node is but for the priority, times ten. For capacities up to 2^60 the numerator is
/// below 5·2^120.
fn order(node: &Candidate<'_>) -> Fraction {
    let [cpu, cpus] = [cpu_free(node), node.capacity.cpu.0].map(u128::from);
    let [memory, memories] = [memory_free(node), node.capacity.memory.0].map(u128::from);
    Fraction { numerator: 3 * cpu * memories + 2 * memory * cpus, denominator: cpus * memories }
}

#[cfg(test)]
mod tests {
    use super::super::{
        cards::NO_CARDS,
        exact::tests::{Rational, amount},
    };
    use super::*;
    use crate::gpu::CardRequest;
    use proptest::prelude::*;

    fn capacity(cpu: u64, memory: u64) -> Capacity {
        Capacity { cpu: Millicores(cpu), memory: Bytes(memory), ..NOTHING }
    }

    fn demand(cpu: u64, memory: u64) -> Demand {
        Demand {
            cpu: Millicores(cpu),
            memory: Bytes(memory),
            gpu_memory: None,
            network: None,
            storage_io: None,
        }
    }

    fn node<'a>(name: &'a str, capacity: &'a Capacity, reserved: &'a Capacity) -> Candidate<'a> {
        Candidate::plain(name, capacity, reserved)
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_highest_score_wins_and_the_first_on_a_tie() {
        let (large, half) = (capacity(4000, 8 * GIB), capacity(2000, 4 * GIB));
        let nodes = [node("a", &large, &half), node("b", &large, &NOTHING), node("c", &half, &NOTHING)];
        let choice = choose(Needs::of(&demand(1000, GIB)), Priority::High, &nodes);
        assert_eq!(choice.winner, Some(1), "b and c are empty, b came first");
        let scores: Vec<_> = choice.verdicts.iter().map(|verdict| verdict.score).collect();
        assert_eq!(scores, [Some(0.75), Some(1.0), Some(1.0)]);
    }

    #[test]
    fn what_does_not_fit_says_by_how_much() {
        let has = Capacity { network: Some(BitsPerSec(1_000_000_000)), ..capacity(2000, 2 * GIB) };
        let taken = Capacity { network: Some(BitsPerSec(950_000_000)), ..capacity(500, 0) };
        let wants = Demand {
            network: Some(BitsPerSec(100_000_000)),
            storage_io: Some(Iops(500)),
            ..demand(3000, 3 * GIB)
        };
        let choice = choose(Needs::of(&wants), Priority::Low, &[node("n", &has, &taken)]);
        let expected = NodeVerdict {
            node: "n".into(),
            score: None,
            lacking: vec![
                "cpu: 3 cores wanted, 1.5 of 2 free".into(),
                "memory: 3 GiB wanted, 2 GiB of 2 GiB free".into(),
                "network: 100 Mbit/s wanted, 50 Mbit/s of 1 Gbit/s free".into(),
            ],
            not_checked: vec!["storage_io".into()],
        };
        assert_eq!(choice, Choice { winner: None, verdicts: vec![expected] });
        assert!(!could_ever_hold(Needs::of(&wants), &node("n", &has, &NOTHING)));
    }

    #[test]
    fn a_container_goes_where_they_are_run() {
        let has = capacity(2000, 2 * GIB);
        let (runs_none, runs_some) =
            (Candidate { containers: false, ..node("a", &has, &NOTHING) }, node("b", &has, &NOTHING));
        let wants = demand(1000, GIB);
        let needs = Needs { container: true, ..Needs::of(&wants) };
        let choice = choose(needs, Priority::Low, &[runs_none, runs_some]);
        assert_eq!(choice.winner, Some(1));
        assert_eq!(
            choice.verdicts[0].lacking,
            ["containers: its agent runs none (shaper-agent --containers)"]
        );
        assert!(!could_ever_hold(needs, &runs_none) && !fits_with(needs, CardSet::NONE, &runs_none));
        assert!(fits(Needs::of(&wants), &runs_none));
    }

    #[test]
    fn what_a_node_does_not_know_does_not_exclude_it() {
        let has = capacity(2000, 2 * GIB);
        let wants = Demand { network: Some(BitsPerSec(1)), ..demand(1000, GIB) };
        let choice = choose(Needs::of(&wants), Priority::Medium, &[node("n", &has, &NOTHING)]);
        assert_eq!(choice.winner, Some(0));
        assert_eq!(choice.verdicts[0].not_checked, ["network"]);
    }

    #[test]
    fn a_node_of_nothing_and_an_overcommitted_one_are_not_feasible() {
        let (nothing, some, more) = (capacity(0, 0), capacity(1000, GIB), capacity(2000, 2 * GIB));
        let nodes = [node("nothing", &nothing, &NOTHING), node("over", &some, &more)];
        assert_eq!(best(Needs::of(&demand(0, 0)), &nodes[..1]), None);
        assert_eq!(best(Needs::of(&demand(10, 1)), &nodes), None);
    }

    #[test]
    fn cards_are_judged_one_by_one() {
        let has = Capacity { gpu_memory: Some(Bytes(80 * GIB)), ..capacity(64_000, 64 * GIB) };
        let offer = CardOffer { model: "NVIDIA A100".into(), cards: CardSet::from_bits(0b1011) };
        let share = |gib: u64| Demand { gpu_memory: Some(Bytes(gib * GIB)), ..demand(1000, GIB) };
        let whole = |count: u32| CardRequest { count, model: String::new() };
        let plain = demand(1000, GIB);
        let mut books = CardBooks::default();
        let lacking = |demand: &Demand, gpus: &CardRequest, offer: &CardOffer, cards: &CardBooks| {
            let node = Candidate { offer, cards, ..node("n", &has, &NOTHING) };
            let needs = Needs { demand, gpus, container: false };
            let verdict = judge(needs, Priority::Low, &node);
            assert_eq!(verdict.score.is_some(), fits(needs, &node));
            assert_eq!(verdict.lacking.is_empty(), verdict.score.is_some());
            (verdict.lacking, node.cards_for(needs).to_string())
        };
        let words = |words: &[&str]| words.iter().map(|it| it.to_string()).collect::<Vec<_>>();

        // One who shares a card joins others, so that whole ones are left.
        assert_eq!(lacking(&share(40), &NO_CARDS, &offer, &books), (Vec::new(), "0".to_owned()));
        books.take(Needs::of(&share(40)), CardSet::from_bits(0b10));
        assert_eq!(lacking(&share(40), &NO_CARDS, &offer, &books), (Vec::new(), "1".to_owned()));
        assert_eq!(lacking(&share(41), &NO_CARDS, &offer, &books), (Vec::new(), "0".to_owned()));
        assert_eq!(lacking(&plain, &whole(2), &offer, &books), (Vec::new(), "0,3".to_owned()));
        assert_eq!(lacking(&plain, &whole(3), &offer, &books).0, ["gpus: 3 wanted, 2 of 3 free"]);
        books.take(Needs { gpus: &whole(2), ..Needs::of(&plain) }, CardSet::from_bits(0b1001));
        assert_eq!(
            lacking(&share(41), &NO_CARDS, &offer, &books).0,
            ["gpu_memory: 41 GiB wanted, 40 GiB of 80 GiB free on one card"]
        );
        assert_eq!(books.memory(Bytes(80 * GIB)), Bytes(200 * GIB), "two are somebody's whole");
        // More than there is of one, whoever has it.
        assert_eq!(
            lacking(&share(81), &NO_CARDS, &offer, &books).0,
            ["gpu_memory: 81 GiB wanted, a card has 80 GiB"]
        );
        let h100 = CardRequest { count: 1, model: "H100".into() };
        assert_eq!(
            lacking(&share(81), &h100, &offer, &books).0,
            words(&[
                "gpu model: `H100` wanted, this node has `NVIDIA A100`",
                "gpu_memory: 81 GiB wanted, a card has 80 GiB",
                "gpus: 1 wanted, 0 of 3 free",
            ])
        );
        books.give(Needs { gpus: &whole(2), ..Needs::of(&plain) }, CardSet::from_bits(0b1001));
        books.give(Needs::of(&share(40)), CardSet::from_bits(0b10));
        assert_eq!(books, NO_BOOKS);

        // Who does not offer any has none, whatever else is said.
        assert_eq!(
            lacking(&share(1), &NO_CARDS, &NO_OFFER, &books).0,
            ["gpu_memory: 1 GiB wanted, none here"]
        );
        assert_eq!(lacking(&plain, &whole(2), &NO_OFFER, &books).0, ["gpus: 2 wanted, none here"]);
        assert_eq!(lacking(&plain, &NO_CARDS, &NO_OFFER, &books), (Vec::new(), "none".to_owned()));
    }

    /// The formula, as plainly as it can be written.
    fn reference(demand: &Demand, nodes: &[(Capacity, Capacity)]) -> Option<usize> {
        let free = |has: u64, taken: u64| u128::from(has.saturating_sub(taken));
        let mut winner: Option<(Rational, usize)> = None;
        for (index, (has, taken)) in nodes.iter().enumerate() {
            let cpu = free(has.cpu.0, taken.cpu.0);
            let memory = free(has.memory.0, taken.memory.0);
            let network = has.network.map(|has| free(has.0, taken.network.map_or(0, |taken| taken.0)));
            let fits = u128::from(demand.cpu.0) <= cpu
                && u128::from(demand.memory.0) <= memory
                && demand.network.is_none_or(|wants| network.is_none_or(|free| u128::from(wants.0) <= free));
            if !fits {
                continue;
            }
            let score = Rational::weighted(
                Rational::reduced(cpu, has.cpu.0.into()),
                Rational::reduced(memory, has.memory.0.into()),
            );
            if winner.is_none_or(|(best, _)| score > best) {
                winner = Some((score, index));
            }
        }
        winner.map(|(_, index)| index)
    }

    fn a_capacity() -> impl Strategy<Value = Capacity> {
        (amount(), amount(), prop::option::of(1u64..8)).prop_map(|(cpu, memory, network)| Capacity {
            network: network.map(BitsPerSec),
            ..capacity(cpu, memory)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_winner_is_that_of_exact_arithmetic(
            nodes in prop::collection::vec((a_capacity(), a_capacity()), 0..12),
            wants in (amount(), amount(), prop::option::of(1u64..8)),
        ) {
            let wants = Demand { network: wants.2.map(BitsPerSec), ..demand(wants.0 / 4, wants.1 / 4) };
            let candidates: Vec<_> =
                nodes.iter().map(|(has, taken)| node("n", has, taken)).collect();
            let choice = choose(Needs::of(&wants), Priority::Medium, &candidates);
            prop_assert_eq!(choice.winner, reference(&wants, &nodes));
            for (verdict, candidate) in choice.verdicts.iter().zip(&candidates) {
                prop_assert_eq!(verdict.score.is_some(), fits(Needs::of(&wants), candidate));
                prop_assert_eq!(verdict.score.is_some(), verdict.lacking.is_empty());
                prop_assert!(verdict.score.is_none_or(|score| (0.25..=0.75 + 1e-9).contains(&score)));
            }
        }
    }
}
