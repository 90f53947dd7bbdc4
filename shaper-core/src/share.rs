//! How one resource of a node is divided among the tasks that claim it.
//!
//! Think of each task as a vessel. [`divide`] pours the capacity in three rounds, each only from
//! what the round before has left:
//!
//! 1. **Guarantees.** Up to `min(request, limit)`, whether the task wants that much at this moment or
//!    not: a guarantee that first had to be taken back from somebody would be none. Where the
//!    guarantees do not fit, the highest priority is served first.
//! 2. **Demand.** Up to `min(demand, limit)`.
//! 3. **Loan.** What nobody demands is lent, up to `limit`, to those that demand anything at all. A
//!    task with a little more than it uses shows its growth; one without cannot.
//!
//! Within a round the water stands equally high in all vessels, relative to their weights, until a
//! vessel is full; what it cannot take raises the level of the others. That is *weighted max-min
//! fairness*, or water-filling: nobody can be given more without taking from somebody who has less
//! for its weight. Each round starts from an empty floor, so a request is not held against its
//! task: what lies above the guarantees is divided by weight alone.
//!
//! ```text
//!  limit ─ ─ ─ ─                ╷       3. lent
//!               ░░░░    ░░░░    ╷
//!  demand ─ ─ ─ ▒▒▒▒    ▒▒▒▒ ─ ─╷       2. by weight, up to the demand
//!               ▒▒▒▒    ████    ╷
//!  request ─ ─  ████    ████ ─ ─╷       1. guaranteed
//! ```
//!
//! Quantities are integers, and so is every step: the level is a fraction that is never computed,
//! only compared, by cross-multiplication. The units that rounding down leaves go to the largest
//! remainders (Hamilton's method), which keeps the result monotone in every single weight.
//!
//! The cost is one sort a round, O(n log n). The answer depends on the claims alone: reordering them
//! reorders it, except that identical claims may swap the one unit by which they differ.

use std::cmp::Reverse;

use crate::{limits::Limit, spec::Priority};

/// What one task may have, and wants, of the resource. The unit is the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Guaranteed, as far as the limit allows.
    pub request: u64,
    /// Never exceeded.
    pub limit: Limit<u64>,
    /// Its part of what is divided beyond the guarantees, relative to the others'; 0 counts as 1.
    pub weight: u32,
    /// What it would use if it could. Nothing is lent to a task that demands nothing.
    pub demand: u64,
    /// Whose guarantee is kept where not all can be.
    pub priority: Priority,
}

impl Claim {
    fn ceiling(&self, capacity: u64) -> u64 {
        self.limit.at().map_or(capacity, |limit| limit.min(capacity))
    }

    /// Orders claims that rounding would treat alike, by nothing but what they say.
    fn rank(&self) -> impl Ord + use<> {
        let Claim { request, limit, weight, demand, priority } = *self;
        Reverse((priority, weight, request, demand, limit.at()))
    }
}

/// Divides `capacity`: one grant for each claim, in the order of the claims. The grants add up to
/// the capacity, or to all that the claims can take.
pub fn divide(capacity: u64, claims: &[Claim]) -> Vec<u64> {
    let mut division = Division { claims, left: capacity, granted: vec![0; claims.len()] };
    for priority in [Priority::High, Priority::Medium, Priority::Low] {
        division.raise(|claim| match claim.priority == priority {
            true => claim.request.min(claim.ceiling(capacity)),
            false => 0,
        });
    }
    division.raise(|claim| claim.demand.min(claim.ceiling(capacity)));
    division.raise(|claim| if claim.demand > 0 { claim.ceiling(capacity) } else { 0 });
    division.granted
}

struct Division<'a> {
    claims: &'a [Claim],
    left: u64,
    granted: Vec<u64>,
}

/// What a claim can still take in this round.
struct Vessel {
    index: usize,
    room: u64,
    weight: u128,
}

impl Division<'_> {
    /// One round: raises every grant towards `upto`, as far as what is left allows.
    fn raise(&mut self, upto: impl Fn(&Claim) -> u64) {
        let mut vessels: Vec<Vessel> = (self.claims.iter().zip(&self.granted).enumerate())
            .map(|(index, (claim, granted))| Vessel {
                index,
                room: upto(claim).saturating_sub(*granted),
                weight: claim.weight.max(1).into(),
            })
            .filter(|vessel| vessel.room > 0)
            .collect();

        // Those that are full first come first. A vessel is full if the level that all the remaining
        // water would have in all the remaining vessels, left / weights, reaches its room / weight.
        vessels.sort_by(|a, b| (u128::from(a.room) * b.weight).cmp(&(u128::from(b.room) * a.weight)));
        let mut weights: u128 = vessels.iter().map(|vessel| vessel.weight).sum();
        let mut full = 0;
        for Vessel { index, room, weight } in &vessels {
            if u128::from(*room) * weights > u128::from(self.left) * weight {
                break;
            }
            self.give(*index, *room);
            weights -= weight;
            full += 1;
        }

        // The others stand at the same level, rounded down ...
        let water = u128::from(self.left);
        let mut open: Vec<(u128, usize)> = Vec::with_capacity(vessels.len() - full);
        for Vessel { index, weight, .. } in vessels.drain(full..) {
            let share = water * weight / weights;
            // Less than the room, or the vessel would be full: so it fits, and one more unit too.
            self.give(index, u64::try_from(share).unwrap_or(u64::MAX));
            open.push((water * weight % weights, index));
        }
        // ... and what rounding has left, less than a unit each, goes to the largest remainders.
        open.sort_by_key(|(remainder, index)| (Reverse(*remainder), self.claims[*index].rank(), *index));
        for (_, index) in open {
            let unit = self.left.min(1);
            self.give(index, unit);
        }
    }

    fn give(&mut self, index: usize, amount: u64) {
        self.granted[index] += amount;
        self.left -= amount;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn claim(request: u64, demand: u64) -> Claim {
        Claim { request, limit: Limit::Unlimited, weight: 1, demand, priority: Priority::Medium }
    }

    #[test]
    fn nothing_is_divided_among_nobody() {
        assert!(divide(1000, &[]).is_empty());
        assert_eq!(divide(0, &[claim(5, 5), claim(0, 0)]), [0, 0]);
    }

    #[test]
    fn a_guarantee_is_kept_for_a_task_that_sleeps() {
        assert_eq!(divide(1000, &[claim(600, 0), claim(200, 5000)]), [600, 400]);
    }

    #[test]
    fn guarantees_that_do_not_fit_are_kept_by_priority() {
        let [high, medium, low] = [Priority::High, Priority::Medium, Priority::Low]
            .map(|priority| Claim { priority, ..claim(500, 500) });
        assert_eq!(divide(1200, &[low, medium, high]), [200, 500, 500]);
        assert_eq!(divide(700, &[low, high, medium, medium]), [0, 500, 100, 100]);
    }

    #[test]
    fn what_a_full_vessel_cannot_take_raises_the_others() {
        assert_eq!(divide(1000, &[claim(0, 100), claim(0, 900), claim(0, 900)]), [100, 450, 450]);
        let heavy = Claim { weight: 3, ..claim(0, 900) };
        assert_eq!(divide(1000, &[claim(0, 100), claim(0, 900), heavy]), [100, 225, 675]);
    }

    #[test]
    fn a_request_is_not_held_against_its_task() {
        assert_eq!(divide(1000, &[claim(600, 1000), claim(200, 1000)]), [700, 300]);
    }

    #[test]
    fn what_nobody_demands_is_lent_up_to_the_limit() {
        let limited = Claim { limit: Limit::At(350), ..claim(100, 200) };
        assert_eq!(divide(1000, &[limited, claim(100, 200), claim(100, 0)]), [350, 550, 100]);
    }

    #[test]
    fn rounding_loses_nothing_and_is_fair() {
        assert_eq!(divide(10, &[claim(0, 9), claim(0, 9), claim(0, 9)]), [4, 3, 3]);
        let heavy = Claim { weight: 2, ..claim(0, 9) };
        // 2.5 and 5: the heavier has no remainder, so the spare unit stays with a light one.
        assert_eq!(divide(10, &[claim(0, 9), heavy, claim(0, 9)]), [3, 5, 2]);
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let huge = Claim { weight: u32::MAX, priority: Priority::High, ..claim(u64::MAX, u64::MAX) };
        let grants = divide(u64::MAX, &[huge, huge, claim(u64::MAX, u64::MAX)]);
        assert_eq!(grants, [u64::MAX / 2 + 1, u64::MAX / 2, 0]);
    }

    // ---- a reference that shares no idea with the code above but the three rounds

    /// Pours drop by drop, `DROPS` to a unit, always where the water stands lowest.
    const DROPS: u64 = 512;

    fn pour(water: &mut u64, rooms: &[u64], weights: &[u32]) -> Vec<u64> {
        let mut filled = vec![0u64; rooms.len()];
        while *water > 0 {
            let open = (0..rooms.len()).filter(|index| filled[*index] < rooms[*index]);
            let weight = |index: usize| u64::from(weights[index].max(1));
            let Some(lowest) = open.min_by(|a, b| (filled[*a] * weight(*b)).cmp(&(filled[*b] * weight(*a))))
            else {
                break;
            };
            filled[lowest] += 1;
            *water -= 1;
        }
        filled
    }

    /// The same division, in drops.
    fn reference(capacity: u64, claims: &[Claim]) -> Vec<u64> {
        let mut water = capacity * DROPS;
        let weights: Vec<u32> = claims.iter().map(|claim| claim.weight).collect();
        let mut granted = vec![0u64; claims.len()];
        let mut round = |levels: Vec<u64>| {
            let rooms: Vec<u64> = levels
                .iter()
                .zip(&granted)
                .map(|(level, has)| (level * DROPS).saturating_sub(*has))
                .collect();
            let filled = pour(&mut water, &rooms, &weights);
            granted.iter_mut().zip(filled).for_each(|(has, more)| *has += more);
        };
        let ceiling = |claim: &Claim| claim.limit.at().unwrap_or(capacity).min(capacity);
        for priority in [Priority::High, Priority::Medium, Priority::Low] {
            let guarantee = |claim: &Claim| match claim.priority == priority {
                true => claim.request.min(ceiling(claim)),
                false => 0,
            };
            round(claims.iter().map(guarantee).collect());
        }
        round(claims.iter().map(|claim| claim.demand.min(ceiling(claim))).collect());
        round(claims.iter().map(|claim| if claim.demand > 0 { ceiling(claim) } else { 0 }).collect());
        granted
    }

    fn priority() -> impl Strategy<Value = Priority> {
        prop_oneof![Just(Priority::Low), Just(Priority::Medium), Just(Priority::High)]
    }

    fn any_claim(most: u64) -> impl Strategy<Value = Claim> {
        let limit = prop_oneof![Just(Limit::Unlimited), (0..=most).prop_map(Limit::At)];
        (0..=most, limit, 0..9u32, 0..=most, priority()).prop_map(
            |(request, limit, weight, demand, priority)| Claim { request, limit, weight, demand, priority },
        )
    }

    fn sum(values: impl IntoIterator<Item = u64>) -> u128 {
        values.into_iter().map(u128::from).sum()
    }

    proptest! {
        #[test]
        fn agrees_with_pouring_drop_by_drop(capacity in 0..60u64, claims in vec(any_claim(40), 0..7)) {
            for (grant, drops) in divide(capacity, &claims).iter().zip(reference(capacity, &claims)) {
                let (low, high) = (drops / DROPS, drops.div_ceil(DROPS));
                prop_assert!((low.saturating_sub(1)..=high + 1).contains(grant), "{grant} is not about {drops} drops");
                prop_assert!((grant * DROPS).abs_diff(drops) <= DROPS + 16, "{grant} is not {drops} drops");
            }
        }

        #[test]
        fn keeps_its_promises(capacity in 0..5_000u64, claims in vec(any_claim(2_000), 0..12)) {
            let grants = divide(capacity, &claims);
            let ceiling = |claim: &Claim| claim.limit.at().unwrap_or(capacity).min(capacity);
            let guarantee = |claim: &Claim| claim.request.min(ceiling(claim));
            let demand = |claim: &Claim| guarantee(claim).max(claim.demand.min(ceiling(claim)));

            // Exact: all that can be taken is given, and no more.
            let takes = |claim: &Claim| if claim.demand > 0 { ceiling(claim) } else { guarantee(claim) };
            let total = sum(grants.iter().copied());
            prop_assert_eq!(total, sum(claims.iter().map(takes)).min(capacity.into()));

            let guarantees_fit = sum(claims.iter().map(guarantee)) <= capacity.into();
            let demands_fit = sum(claims.iter().map(demand)) <= capacity.into();
            for (claim, grant) in claims.iter().zip(&grants) {
                prop_assert!(claim.limit.at().is_none_or(|limit| *grant <= limit));
                prop_assert!(!guarantees_fit || *grant >= guarantee(claim));
                prop_assert!(!demands_fit || *grant >= demand(claim));
                // Nothing is lent while a demand is not met.
                prop_assert!(demands_fit || *grant <= demand(claim));
            }
            // Where a guarantee is broken, nobody of lower priority gets anything.
            for (claim, grant) in claims.iter().zip(&grants).filter(|(claim, grant)| **grant < guarantee(claim)) {
                for (other, granted) in claims.iter().zip(&grants) {
                    prop_assert!(other.priority >= claim.priority || *granted == 0, "{grant} of {claim:?}");
                }
            }
            // Equal claims get equal shares.
            for (one, a) in claims.iter().zip(&grants) {
                for (other, b) in claims.iter().zip(&grants).filter(|(other, _)| *other == one) {
                    prop_assert!(a.abs_diff(*b) <= 1, "{one:?} got {a} and {other:?} {b}");
                }
            }
        }

        #[test]
        fn more_weight_never_gives_less(
            capacity in 0..500u64, claims in vec(any_claim(200), 1..8), index in any::<prop::sample::Index>(), more in 1..9u32,
        ) {
            let index = index.index(claims.len());
            let mut heavier = claims.clone();
            heavier[index].weight += more;
            prop_assert!(divide(capacity, &heavier)[index] >= divide(capacity, &claims)[index]);
        }

        #[test]
        fn the_order_of_the_claims_does_not_matter(
            capacity in 0..500u64, (claims, shuffled) in vec(any_claim(60), 0..9)
                .prop_flat_map(|claims| (Just(claims.clone()), Just(claims).prop_shuffle())),
        ) {
            let sorted = |claims: &[Claim]| {
                let mut all: Vec<_> = claims.iter().zip(divide(capacity, claims)).collect();
                all.sort_by_key(|(claim, grant)| (claim.rank(), *grant));
                all.into_iter().map(|(claim, grant)| (*claim, grant)).collect::<Vec<_>>()
            };
            prop_assert_eq!(sorted(&claims), sorted(&shuffled));
        }

        #[test]
        fn no_numbers_overflow(capacity: u64, claims in vec(any_claim(u64::MAX), 0..6), weight: u32) {
            let claims: Vec<Claim> = claims.into_iter().map(|claim| Claim { weight, ..claim }).collect();
            prop_assert!(sum(divide(capacity, &claims)) <= capacity.into());
        }
    }
}
