//! The order of tasks and nodes of the published runs.
//!
//! The published figures are means of ten seeds, 0.03 to 0.1 points of standard error each. So that a difference is one of
//! the rule and not of luck, the arrivals here are the very ones: the simulator draws them from the generator
//! of Go's `math/rand`, which is written down here by its recurrence. From a seed it draws a number that it
//! logs; a shuffle of the tasks; then, if all of them ask for less than 130 % of the GPUs, tasks at random until the next
//! would exceed that, else tasks to leave out; ten numbers, by ten watchers of its client library as they start; and
//! a permutation of the nodes, by which it names them. Of nodes with the same score the first name wins.

use std::sync::OnceLock;

use shaper_core::place::GpuRequest;

use super::data::TaskShape;

/// What happens in a run.
pub(super) struct Stream {
    /// Tasks, as they arrive.
    pub(super) tasks: Vec<usize>,
    /// Nodes, in the order of their names.
    pub(super) nodes: Vec<usize>,
}

/// Numbers that the watchers draw.
const WATCHERS: usize = 10;

/// The run of a seed, until so many thousandths of GPUs have been asked for.
pub(super) fn published(seed: u64, tasks: &[TaskShape], nodes: usize, until: u64) -> Stream {
    let mut random = Go::new(seed);
    random.next();
    let mut order: Vec<usize> = (0..tasks.len()).collect();
    random.shuffle(&mut order);
    let mut asked: u64 = tasks.iter().map(|task| task.gpu.thousandths()).sum();
    if asked > until {
        while asked > until {
            let out = order.remove(random.below(order.len()));
            asked -= tasks[out].gpu.thousandths();
        }
    } else {
        loop {
            let next = random.below(tasks.len());
            // Sic: what it asks for of one GPU.
            let of_one = match tasks[next].gpu {
                GpuRequest::Whole(_) => 1000,
                gpu => gpu.thousandths(),
            };
            if asked + of_one > until {
                break;
            }
            asked += tasks[next].gpu.thousandths();
            order.push(next);
        }
    }
    for _ in 0..WATCHERS {
        random.next();
    }
    let mut names = Vec::with_capacity(nodes);
    for node in 0..nodes {
        let at = random.below(node + 1);
        names.push(node);
        names[node] = names[at];
        names[at] = node;
    }
    let mut by_name = vec![0; nodes];
    for (node, name) in names.into_iter().enumerate() {
        by_name[name] = node;
    }
    Stream { tasks: order, nodes: by_name }
}

/// Terms that the recurrence reaches back, yₙ = yₙ₋₆₀₇ + yₙ₋₂₇₃ mod 2⁶⁴.
const LENGTH: usize = 607;
const TAP: usize = 273;

/// An additive lagged Fibonacci generator.
struct Go {
    /// The last terms: term n at n mod 607.
    terms: [u64; LENGTH],
    next: usize,
}

impl Go {
    fn new(seed: u64) -> Go {
        let cooked = cooked();
        let mut fill = filler(seed, 40, 20);
        let mut terms = [0; LENGTH];
        for (number, cooked) in cooked.iter().enumerate() {
            terms[place(number)] = fill() ^ cooked;
        }
        Go { terms, next: 0 }
    }

    /// 63 bits.
    fn next(&mut self) -> u64 {
        let back = (self.next + LENGTH - TAP) % LENGTH;
        self.terms[self.next] = self.terms[self.next].wrapping_add(self.terms[back]);
        let term = self.terms[self.next];
        self.next = (self.next + 1) % LENGTH;
        term & (u64::MAX >> 1)
    }

    /// From 0 to below `count`, as `Intn` draws it.
    fn below(&mut self, count: usize) -> usize {
        let (all, count) = (1u64 << 31, count as u64);
        let fair = all - all % count;
        loop {
            let drawn = self.next() >> 32;
            if drawn < fair {
                return (drawn % count) as usize;
            }
        }
    }

    /// As `Shuffle` draws it.
    fn shuffle<T>(&mut self, of: &mut [T]) {
        for at in (1..of.len()).rev() {
            let count = at as u64 + 1;
            let unfair = (1u64 << 32) % count;
            let with = loop {
                let product = (self.next() >> 31) * count;
                if product % (1 << 32) >= unfair {
                    break product >> 32;
                }
            };
            of.swap(at, with as usize);
        }
    }
}

/// Where Go's table has the term that is needed so late: from the 333rd downwards.
fn place(number: usize) -> usize {
    (333 + LENGTH - number) % LENGTH
}

/// Numbers that fill a table: each of three of Lehmer's generator (48,271 mod 2³¹ - 1), after twenty that are left out.
fn filler(seed: u64, high: u32, middle: u32) -> impl FnMut() -> u64 {
    let mut at = seed;
    let mut step = move || {
        at = at * 48_271 % ((1 << 31) - 1);
        at
    };
    for _ in 0..20 {
        step();
    }
    move || {
        let high = step() << high;
        let middle = step() << middle;
        high ^ middle ^ step()
    }
}

/// With what a seed is mixed: the table of the same recurrence after 7.8 · 10¹² terms from seed 1. That term is found as
/// the remainder of x to that power by x⁶⁰⁷ - x³³⁴ - 1.
fn cooked() -> &'static [u64; LENGTH] {
    static COOKED: OnceLock<Box<[u64; LENGTH]>> = OnceLock::new();
    COOKED.get_or_init(|| {
        let mut fill = filler(1, 20, 10);
        let mut terms = vec![0u64; 2 * LENGTH];
        for number in 0..LENGTH {
            terms[place(number)] = fill();
        }
        for later in LENGTH..2 * LENGTH {
            terms[later] = terms[later - LENGTH].wrapping_add(terms[later - TAP]);
        }
        let factors = power(7_800_000_000_000);
        let mut table = Box::new([0; LENGTH]);
        for (number, entry) in table.iter_mut().enumerate() {
            // The table is written round and round, and 7.8 · 10¹² terms end within a round.
            let term = (place(number) + LENGTH - (7_800_000_000_000u64 % LENGTH as u64) as usize) % LENGTH;
            let products =
                factors.iter().zip(&terms[term..]).map(|(factor, term)| factor.wrapping_mul(*term));
            *entry = products.fold(0, u64::wrapping_add);
        }
        table
    })
}

/// Coefficients of the remainder of x to a power.
fn power(exponent: u64) -> Vec<u64> {
    let mut result = vec![0u64; LENGTH];
    result[0] = 1;
    for bit in (0..u64::BITS - exponent.leading_zeros()).rev() {
        let mut square = vec![0u64; 2 * LENGTH];
        for (shift, factor) in result.iter().enumerate().filter(|(_, factor)| **factor != 0) {
            for (to, other) in square[shift..].iter_mut().zip(&result) {
                *to = to.wrapping_add(factor.wrapping_mul(*other));
            }
        }
        if exponent >> bit & 1 == 1 {
            square.rotate_right(1);
        }
        for high in (LENGTH..2 * LENGTH).rev() {
            let over = std::mem::take(&mut square[high]);
            for low in [high - LENGTH, high - TAP] {
                square[low] = square[low].wrapping_add(over);
            }
        }
        square.truncate(LENGTH);
        result = square;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_go() {
        let mut random = Go::new(1);
        assert_eq!([random.next(), random.next()], [5_577_006_791_947_779_410, 8_674_665_223_082_153_551]);
    }
}
