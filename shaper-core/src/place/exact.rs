//! Scores as fractions, compared exactly.
//!
//! The seed's order of nodes is that of `(3·cpu_free·memory_total + 2·memory_free·cpu_total) /
//! (cpu_total·memory_total)`, for the priority is the same for every node. Two such fractions are compared
//! by cross-multiplication, with products of 256 bits: capacities up to 2^60 do not overflow. Most pairs
//! differ so much that the first 60 binary digits decide; [`Key`] has those at hand.

use std::cmp::Ordering;

/// A score: `numerator / denominator`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fraction {
    pub(super) numerator: u128,
    pub(super) denominator: u128,
}

impl Fraction {
    pub(super) fn compare(self, other: Fraction) -> Ordering {
        if self.denominator == other.denominator {
            return self.numerator.cmp(&other.numerator);
        }
        product(self.numerator, other.denominator).cmp(&product(other.numerator, self.denominator))
    }
}

/// The 256 bits of `a · b`: the high half, then the low one.
fn product(a: u128, b: u128) -> (u128, u128) {
    const HALF: u32 = 64;
    let split = |it: u128| (it >> HALF, it & u128::from(u64::MAX));
    let ((a_high, a_low), (b_high, b_low)) = (split(a), split(b));
    let low = a_low * b_low;
    // Neither sum can overflow: (2^64 - 1)^2 + 2·(2^64 - 1) = 2^128 - 1.
    let middle = a_high * b_low + (low >> HALF);
    let (carry, middle) = split(middle);
    let middle = a_low * b_high + middle;
    let high = a_high * b_high + carry + (middle >> HALF);
    (high, (middle << HALF) | (low & u128::from(u64::MAX)))
}

/// A denominator, with what divides by it quickly: those of a node do not change while its capacity does not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Divisor {
    denominator: u128,
    /// How far the denominator is to be shifted, to the left if positive, to have [`DIGITS`] + 1 bits.
    shift: i32,
    /// 2^124 by the shifted denominator.
    reciprocal: u64,
}

/// Binary digits behind the point of a [`Key`]'s first comparison.
const DIGITS: u32 = 60;
/// By how much two keys' digits must differ to decide. Each is short of the truth by less than 32 units: the
/// denominator, one more than itself, and the reciprocal lose a part in 2^60 each of at most 5·2^60, the
/// numerator and the product one unit each.
pub(super) const SURE: u64 = 64;

impl Divisor {
    /// For fractions below 8. The denominator is not 0.
    pub(super) fn new(denominator: u128) -> Divisor {
        let bits = u128::BITS - denominator.leading_zeros();
        let shift = DIGITS as i32 + 1 - bits as i32;
        let reciprocal = (1u128 << (2 * DIGITS + 4)) / (u128::from(shifted(denominator, shift)) + 1);
        Divisor { denominator, shift, reciprocal: u64::try_from(reciprocal).unwrap_or(u64::MAX) }
    }

    /// The key of a node with this score.
    pub(super) fn key(&self, numerator: u128, node: u32) -> Key {
        let digits = (u128::from(shifted(numerator, self.shift)) * u128::from(self.reciprocal)) >> 64;
        let score = Fraction { numerator, denominator: self.denominator };
        Key { digits: digits as u64, node, score }
    }
}

fn shifted(value: u128, shift: i32) -> u64 {
    (if shift >= 0 { value << shift } else { value >> -shift }) as u64
}

/// The place of a node in an order: by score, the highest first, then by registration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    /// The score's first binary digits, nearly.
    pub(super) digits: u64,
    pub(super) node: u32,
    score: Fraction,
}

impl Key {
    /// One of which only the digits are known: to put it where they do not have to decide.
    pub(super) fn rough(digits: u64, node: u32) -> Key {
        Key { digits, node, score: Fraction { numerator: 0, denominator: 1 } }
    }

    /// Whether this node comes before `other`.
    pub(super) fn is_before(&self, other: &Key) -> bool {
        match sure(self.digits, other.digits) {
            Some(is_before) => is_before,
            None => match self.score.compare(other.score) {
                Ordering::Greater => true,
                Ordering::Less => false,
                Ordering::Equal => self.node < other.node,
            },
        }
    }
}

/// Whether the node with the digits `a` comes before that with `b`, if those decide.
pub(super) fn sure(a: u64, b: u64) -> Option<bool> {
    (a.abs_diff(b) > SURE).then_some(a > b)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A plain rational, compared by its continued fraction: no product of two of its parts is made.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(in crate::place) struct Rational(u128, u128);

    impl Ord for Rational {
        fn cmp(&self, other: &Rational) -> Ordering {
            let (Rational(a, b), Rational(c, d)) = (*self, *other);
            (a / b).cmp(&(c / d)).then_with(|| match (a % b, c % d) {
                (0, 0) => Ordering::Equal,
                (0, _) => Ordering::Less,
                (_, 0) => Ordering::Greater,
                (left, right) => Rational(d, right).cmp(&Rational(b, left)),
            })
        }
    }

    impl PartialOrd for Rational {
        fn partial_cmp(&self, other: &Rational) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }

    fn gcd(a: u128, b: u128) -> u128 {
        if b == 0 { a } else { gcd(b, a % b) }
    }

    impl Rational {
        pub(in crate::place) fn reduced(a: u128, b: u128) -> Rational {
            let divisor = gcd(a, b);
            Rational(a / divisor, b / divisor)
        }

        /// `3·a + 2·b`.
        pub(in crate::place) fn weighted(Rational(a, b): Rational, Rational(c, d): Rational) -> Rational {
            Rational::reduced(3 * a * d + 2 * c * b, b * d)
        }
    }

    /// Small numbers meet ties, large ones the limits of the arithmetic.
    pub(in crate::place) fn amount() -> impl Strategy<Value = u64> {
        prop_oneof![1u64..8, 1u64..=1 << 60, ((1u64 << 60) - 8)..=1 << 60]
    }

    /// Of one node: what it has of two resources, and what is free.
    fn shape() -> impl Strategy<Value = [u64; 4]> {
        (amount(), amount(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(a, b, c, d, near)| {
            let free = |of: u64, choice: u64| if near { of - choice % of.min(4) } else { choice % (of + 1) };
            [a, b, free(a, c), free(b, d)]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]

        #[test]
        fn a_product_has_all_its_bits(a: u128, b: u128) {
            // Modulo 2^128 by the processor, and modulo 2^64 - 1 by adding the digits.
            let (high, low) = product(a, b);
            prop_assert_eq!(low, a.wrapping_mul(b));
            let digits = |it: u128| ((it >> 64) + (it & u128::from(u64::MAX))) % u128::from(u64::MAX);
            let modulo = u128::from(u64::MAX);
            prop_assert_eq!((digits(high) + digits(low)) % modulo, digits(a) * digits(b) % modulo);
        }

        #[test]
        fn keys_are_in_the_order_of_their_fractions(a in shape(), b in shape()) {
            let of = |[cpus, memories, cpu, memory]: [u64; 4], node: u32| {
                let [cpus, memories, cpu, memory] = [cpus, memories, cpu, memory].map(u128::from);
                let numerator = 3 * cpu * memories + 2 * memory * cpus;
                let score = Rational::weighted(Rational::reduced(cpu, cpus), Rational::reduced(memory, memories));
                (Divisor::new(cpus * memories).key(numerator, node), score)
            };
            let ((first, score), (second, other)) = (of(a, 0), of(b, 1));
            prop_assert_eq!(first.is_before(&second), score >= other);
            prop_assert_eq!(second.is_before(&first), score < other);
        }
    }
}
