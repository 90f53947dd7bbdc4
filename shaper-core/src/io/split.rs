//! One ceiling over many lanes.
//!
//! `io.max` holds each lane's rate exactly (within 1 %), but no sum. [`Split::step`], called every half second with what
//! each lane has done, divides the ceiling anew, as the task's demand moves between devices, reads and writes:
//!
//! ```text
//! done on each lane ──▶ demand of each lane      a lane that its cap stops may want twice as much
//!          └─────────▶ balance of the whole      what was allowed so far, less what was done
//! ceiling + balance ──▶ share::divide ──▶ caps   water-filling by demand; what is over goes to those that are active
//! ```
//!
//! **The balance** makes the sum hold. A lane that was idle must be able to begin at once, so its cap is not taken from
//! the others': an eighth of the ceiling. What a task gains by that is counted, and taken from what is divided next; what
//! it could not use for lack of demand is credited, for a tenth of a second at most, so that nobody saves up a burst. Over
//! ten seconds a task does at most its ceiling and 1 %, however it moves, plus what its lanes can do in one step before they
//! are seen to be active.
//!
//! Rates are whole operations a second: a cap is at least 1, for less is none to the kernel. So a ceiling below the number
//! of active lanes is held by the balance alone, as an average.

use std::collections::BTreeMap;

use super::Lane;
use crate::{limits::Limit, share, spec::Priority, units::Iops};

/// Nanoseconds of a second.
const SECOND: i128 = 1_000_000_000;
/// What was not used is credited for as long as this, ns.
const CREDIT: i128 = SECOND / 10;
/// A debt is forgotten beyond this, ns of the ceiling: a device that was not capped yet can do a lot.
const DEBT: i128 = 4 * SECOND;
/// A lane is idle once it has done nothing for as long as this, ns.
const IDLE: u64 = 2_000_000_000;
/// Of the ceiling: what a lane may do that is idle.
const IDLE_PART: u64 = 8;
/// Caps that change by less than one part in so many are left alone.
const NOISE: u64 = 33;

/// What is remembered of a task with a ceiling.
#[derive(Clone, Debug, Default)]
pub struct Split {
    lanes: BTreeMap<Lane, LaneState>,
    /// What was allowed less what was done: operations times nanoseconds of a second.
    balance: i128,
    stepped_at: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct LaneState {
    /// Its counter at the last step.
    done: u64,
    /// Operations a second that it is believed to want; 0 of an idle one.
    wants: u64,
    active_at: Option<u64>,
    cap: Option<u64>,
}

impl Split {
    /// The caps of all lanes from now on. `done` are counters that only grow, one for each lane that the task could
    /// use; `now_ns` is monotonic. The caps before stand where the change would be noise.
    pub fn step(&mut self, ceiling: Iops, done: &BTreeMap<Lane, u64>, now_ns: u64) -> BTreeMap<Lane, Iops> {
        let elapsed = now_ns.saturating_sub(self.stepped_at.unwrap_or(now_ns));
        self.stepped_at = Some(now_ns);
        self.lanes.retain(|lane, _| done.contains_key(lane));
        let mut total = 0;
        for (lane, count) in done {
            let state = self.lanes.entry(*lane).or_insert(LaneState {
                done: *count,
                wants: 0,
                active_at: None,
                cap: None,
            });
            let operations = count.saturating_sub(state.done);
            state.done = *count;
            total += operations;
            state.observe(operations, elapsed, now_ns);
        }
        self.account(ceiling, total, elapsed);
        self.divide(ceiling)
    }

    /// The caps as of the last step.
    pub fn caps(&self) -> BTreeMap<Lane, Iops> {
        self.lanes.iter().map(|(lane, state)| (*lane, Iops(state.cap.unwrap_or(1)))).collect()
    }

    fn account(&mut self, ceiling: Iops, operations: u64, elapsed: u64) {
        let ceiling = i128::from(ceiling.0);
        self.balance += ceiling * i128::from(elapsed) - i128::from(operations) * SECOND;
        self.balance = self.balance.clamp(-ceiling * DEBT, ceiling * CREDIT);
    }

    fn divide(&mut self, ceiling: Iops) -> BTreeMap<Lane, Iops> {
        // What is owed or owned is settled within about a second.
        let settle = i64::try_from(self.balance / SECOND).unwrap_or(i64::MAX);
        let budget = ceiling.0.saturating_add_signed(settle).max(ceiling.0 / 8).max(1);
        let claims: Vec<share::Claim> = self
            .lanes
            .values()
            .map(|lane| share::Claim {
                request: 0,
                limit: Limit::At(budget),
                weight: 1,
                demand: lane.wants,
                priority: Priority::Medium,
            })
            .collect();
        let shares = share::divide(budget, &claims);
        let caps: Vec<u64> = (self.lanes.values().zip(shares))
            .map(|(lane, share)| if lane.wants > 0 { share.max(1) } else { (budget / IDLE_PART).max(1) })
            .collect();
        let is_noise = |(lane, cap): (&LaneState, &u64)| {
            lane.cap.is_some_and(|before| before.abs_diff(*cap) <= before / NOISE)
        };
        if !self.lanes.values().zip(&caps).all(is_noise) {
            for (lane, cap) in self.lanes.values_mut().zip(caps) {
                lane.cap = Some(cap);
            }
        }
        self.caps()
    }
}

impl LaneState {
    fn observe(&mut self, operations: u64, elapsed: u64, now_ns: u64) {
        if elapsed == 0 {
            return;
        }
        let rate = u128::from(operations) * SECOND.unsigned_abs() / u128::from(elapsed);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        if operations > 0 {
            self.active_at = Some(now_ns);
        }
        let Some(active_at) = self.active_at else { return };
        if now_ns.saturating_sub(active_at) >= IDLE {
            self.wants = 0;
            self.active_at = None;
            return;
        }
        // A cap hides what is wanted beyond it. The device counts whole operations, in slices of 100 ms: what is
        // nearly the cap is the cap.
        let is_stopped = self.cap.is_some_and(|cap| rate.saturating_mul(10) >= cap.saturating_mul(9));
        let seen = if is_stopped { rate.saturating_mul(2) } else { rate.saturating_mul(5) / 4 };
        // Up at once, down by a quarter a step.
        self.wants = seen.max(self.wants - self.wants / 4).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Direction;
    use super::*;
    use crate::id::BlockDevice;
    use proptest::prelude::*;

    const STEP_MS: u64 = 500;

    fn lanes() -> Vec<Lane> {
        let lane = |minor, direction| Lane { device: BlockDevice { major: 8, minor }, direction };
        (0..2).flat_map(|minor| [Direction::Read, Direction::Write].map(|way| lane(minor, way))).collect()
    }

    /// A device and a task: what each lane does is the least of what is asked of it and of its cap, which is held
    /// exactly, over the fractions of operations that remain.
    struct Model {
        split: Split,
        ceiling: Iops,
        now_ms: u64,
        done: BTreeMap<Lane, u64>,
        fractions: BTreeMap<Lane, u64>,
        caps: BTreeMap<Lane, Iops>,
        /// In each step.
        history: Vec<u64>,
    }

    impl Model {
        fn new(ceiling: u64) -> Model {
            let done: BTreeMap<Lane, u64> = lanes().into_iter().map(|lane| (lane, 7)).collect();
            let mut split = Split::default();
            let caps = split.step(Iops(ceiling), &done, 0);
            let ceiling = Iops(ceiling);
            Model { split, ceiling, now_ms: 0, fractions: BTreeMap::new(), done, caps, history: Vec::new() }
        }

        /// One step in which each lane is asked for so many operations a second.
        fn run(&mut self, asked: &[u64]) {
            let mut sum = 0;
            for (lane, asked) in lanes().into_iter().zip(asked) {
                let rate = (*asked).min(self.caps[&lane].0);
                let fraction = self.fractions.entry(lane).or_default();
                *fraction += rate * STEP_MS;
                let whole = *fraction / 1000;
                *fraction %= 1000;
                *self.done.get_mut(&lane).unwrap() += whole;
                sum += whole;
            }
            self.history.push(sum);
            self.now_ms += STEP_MS;
            self.caps = self.split.step(self.ceiling, &self.done, self.now_ms * 1_000_000);
        }

        /// Operations a second, on average over steps.
        fn rate(&self, steps: std::ops::Range<usize>) -> f64 {
            let seconds = steps.len() as f64 * STEP_MS as f64 / 1000.0;
            self.history[steps].iter().sum::<u64>() as f64 / seconds
        }
    }

    #[test]
    fn the_total_is_reached_wherever_the_demand_is_and_goes() {
        for ceiling in [40, 100, 500, 20_000] {
            let mut model = Model::new(ceiling);
            let all = 10 * ceiling;
            let phases =
                [[all, 0, 0, 0], [0, all, 0, 0], [all, all, all, all], [all, all / 40, 0, 0], [0, 0, all, 3]];
            for asked in phases {
                let begin = model.history.len();
                for _ in 0..24 {
                    model.run(&asked);
                }
                let rate = model.rate(begin + 4..begin + 24) / ceiling as f64;
                assert!((0.97..1.03).contains(&rate), "{ceiling}, {asked:?}: {rate}");
            }
        }
    }

    #[test]
    fn equal_lanes_are_equal_and_an_idle_one_can_begin() {
        let mut model = Model::new(800);
        for _ in 0..10 {
            model.run(&[5000, 5000, 0, 0]);
        }
        let caps: Vec<u64> = lanes().iter().map(|lane| model.caps[lane].0).collect();
        assert!(caps[0].abs_diff(caps[1]) <= caps[0] / 20, "{caps:?}");
        assert!(caps[2] >= 90 && caps[3] >= 90, "{caps:?}");
    }

    #[test]
    fn steady_demand_changes_nothing() {
        let mut model = Model::new(1000);
        for _ in 0..20 {
            model.run(&[9000, 300, 0, 0]);
        }
        let before = model.caps.clone();
        for _ in 0..20 {
            model.run(&[9000, 300, 0, 0]);
            assert_eq!(model.caps, before);
        }
    }

    #[test]
    fn a_device_that_goes_away_leaves_its_part_to_the_others() {
        let mut split = Split::default();
        let mut done: BTreeMap<Lane, u64> = lanes().into_iter().map(|lane| (lane, 0)).collect();
        for step in 0..10 {
            split.step(Iops(400), &done, step * STEP_MS * 1_000_000);
            done.values_mut().for_each(|count| *count += 50);
        }
        done.retain(|lane, _| lane.device.minor == 0);
        let caps = split.step(Iops(400), &done, 10 * STEP_MS * 1_000_000);
        assert_eq!(caps.len(), 2);
        assert!(caps.values().map(|cap| cap.0).sum::<u64>() >= 380, "{caps:?}");
    }

    proptest! {
        /// However the demand moves: over any ten seconds no more than the ceiling, 1 % of credit, and what idle lanes
        /// can do before they are seen.
        #[test]
        fn the_total_holds(
            ceiling in 20_u64..5_000,
            phases in prop::collection::vec((prop::array::uniform4(0_u64..4), 1_usize..12), 1..20),
        ) {
            let mut model = Model::new(ceiling);
            for (asked, steps) in phases {
                let asked = asked.map(|times| times * ceiling);
                for _ in 0..steps {
                    model.run(&asked);
                }
            }
            const WINDOW: usize = 20;
            for begin in 0..model.history.len().saturating_sub(WINDOW) {
                let rate = model.rate(begin..begin + WINDOW) / ceiling as f64;
                // One step of three lanes with an eighth each is 2 % of ten seconds; caps are whole.
                let whole = 4.0 / ceiling as f64;
                prop_assert!(rate <= 1.03 + whole, "{rate} from step {begin}");
            }
        }
    }
}
