//! A promised latency, kept by holding back whoever makes the device slow.
//!
//! `io.max` on a task that waits for its latency makes it worse: the kernel lets operations through in slices of 100 ms.
//! So the *aggressors* are capped: the tasks that use the device and promise no latency themselves.
//! [`Guard::step`] is additive increase, multiplicative decrease, in permille of what an aggressor did when it was first
//! held:
//!
//! - a victim's latency is above its target: every cap is halved, and then nothing for [`PATIENCE`], for the device has to
//!   work off its queue before the next measurement says anything;
//! - below [`CALM`] of the target, or no victim does anything: a tenth of the whole is given back each second;
//! - a cap that is back at the whole is lifted.
//!
//! Between the two nothing happens: the system rests there.

use std::collections::BTreeMap;

use crate::units::Micros;

/// After a cut, ns.
pub const PATIENCE: u64 = 1_000_000_000;
/// Permille of the target below which aggressors are given more.
pub const CALM: u64 = 800;
/// The least that an aggressor is left, permille.
pub const LEAST: u32 = 10;
/// Given back in a second, permille.
const GIVE: u64 = 100;
/// Fewer operations than this in a step say nothing about a quantile.
pub const SAMPLES: u64 = 20;
/// A victim that has done nothing for as long as this needs no protection, ns.
const SILENT: u64 = 5_000_000_000;
const WHOLE: u32 = 1000;

/// A task that promises a latency, on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// The 99th percentile that is promised.
    pub target: Micros,
    /// What it was since the last step, `None` of none or too few operations ([`SAMPLES`]).
    pub latency: Option<Micros>,
}

/// What an aggressor did on the device since the last step, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Operations.
    pub operations: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What it may do, a second.
pub type Cap = Use;

#[derive(Clone, Copy, Debug)]
struct Held {
    /// What it did when it was first held.
    whole: Use,
    permille: u32,
}

/// The guard of one device: what it remembers of the aggressors, by a key of the caller's.
#[derive(Clone, Debug)]
pub struct Guard<K> {
    held: BTreeMap<K, Held>,
    cut_at: Option<u64>,
    heard_at: Option<u64>,
    stepped_at: Option<u64>,
}

impl<K> Default for Guard<K> {
    fn default() -> Guard<K> {
        Guard { held: BTreeMap::new(), cut_at: None, heard_at: None, stepped_at: None }
    }
}

/// What a step decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A promise is broken: everybody else was cut.
    Cut {
        /// The latency that was measured …
        latency: Micros,
        /// … and promised.
        target: Micros,
    },
    /// Something was given back.
    Given,
    /// Nothing was done.
    Rested,
}

impl<K: Ord + Clone> Guard<K> {
    /// Decides what the aggressors may do from now on; one that is not in the caps is not held.
    pub fn step(
        &mut self,
        victims: &[Victim],
        aggressors: &BTreeMap<K, Use>,
        now_ns: u64,
    ) -> (Verdict, BTreeMap<K, Cap>) {
        let elapsed = now_ns.saturating_sub(self.stepped_at.unwrap_or(now_ns));
        self.stepped_at = Some(now_ns);
        self.held.retain(|key, _| aggressors.contains_key(key));
        let verdict = self.judge(victims, aggressors, elapsed, now_ns);
        let caps = self.held.iter().map(|(key, held)| (key.clone(), held.cap())).collect();
        (verdict, caps)
    }

    fn judge(
        &mut self,
        victims: &[Victim],
        aggressors: &BTreeMap<K, Use>,
        elapsed: u64,
        now_ns: u64,
    ) -> Verdict {
        let measured = victims.iter().filter_map(|victim| Some((victim.latency?, victim.target)));
        // The one whose promise is broken worst, by cross-multiplication.
        let worst = measured.max_by(|a, b| {
            (u128::from(a.0.0) * u128::from(b.1.0)).cmp(&(u128::from(b.0.0) * u128::from(a.1.0)))
        });
        let is_recent = |at: Option<u64>, length| at.is_some_and(|at| now_ns.saturating_sub(at) < length);
        let Some((latency, target)) = worst else {
            // A victim that waits for its first operation is silent as well.
            return if is_recent(self.heard_at, SILENT) { Verdict::Rested } else { self.give(elapsed) };
        };
        self.heard_at = Some(now_ns);
        if latency > target {
            return if is_recent(self.cut_at, PATIENCE) {
                Verdict::Rested
            } else if self.cut(aggressors) {
                self.cut_at = Some(now_ns);
                Verdict::Cut { latency, target }
            } else {
                Verdict::Rested
            };
        }
        let is_calm = u128::from(latency.0) * 1000 < u128::from(target.0) * u128::from(CALM);
        if is_calm && !is_recent(self.cut_at, PATIENCE) { self.give(elapsed) } else { Verdict::Rested }
    }

    /// Halves what every aggressor may do that does anything; whether there was any.
    fn cut(&mut self, aggressors: &BTreeMap<K, Use>) -> bool {
        let mut any = false;
        for (key, used) in aggressors {
            match self.held.get_mut(key) {
                Some(held) if held.permille > LEAST => held.permille = (held.permille / 2).max(LEAST),
                Some(_) => continue,
                None if used.operations > 0 => {
                    self.held.insert(key.clone(), Held { whole: *used, permille: WHOLE / 2 });
                }
                None => continue,
            }
            any = true;
        }
        any
    }

    fn give(&mut self, elapsed: u64) -> Verdict {
        let more = u32::try_from(GIVE * elapsed / 1_000_000_000).unwrap_or(WHOLE);
        if self.held.is_empty() || more == 0 {
            return Verdict::Rested;
        }
        for held in self.held.values_mut() {
            held.permille = held.permille.saturating_add(more);
        }
        self.held.retain(|_, held| held.permille < WHOLE);
        Verdict::Given
    }
}

impl Held {
    fn cap(&self) -> Cap {
        let part = |whole: u64| (u128::from(whole) * u128::from(self.permille) / u128::from(WHOLE)) as u64;
        Cap { operations: part(self.whole.operations).max(1), bytes: part(self.whole.bytes).max(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP: u64 = 500_000_000;
    const TARGET: Micros = Micros(2_000);

    /// A device: the victim's latency grows with what the aggressors do, as a queue's does.
    struct Model {
        guard: Guard<&'static str>,
        caps: BTreeMap<&'static str, Cap>,
        now: u64,
        /// Operations a second at which the device is full.
        full: u64,
    }

    impl Model {
        fn new(full: u64) -> Model {
            Model { guard: Guard::default(), caps: BTreeMap::new(), now: 0, full }
        }

        fn used(&self, asked: &[(&'static str, u64)]) -> BTreeMap<&'static str, Use> {
            let of = |(key, asked): &(&'static str, u64)| {
                let operations = self.caps.get(key).map_or(*asked, |cap| cap.operations.min(*asked));
                (*key, Use { operations, bytes: operations * 4096 })
            };
            asked.iter().map(of).collect()
        }

        fn latency(&self, asked: &[(&'static str, u64)]) -> Micros {
            let operations: u64 = self.used(asked).values().map(|used| used.operations).sum();
            Micros(200 * self.full / self.full.saturating_sub(operations).max(self.full / 50))
        }

        fn step(&mut self, asked: &[(&'static str, u64)], heard: bool) -> Verdict {
            self.now += STEP;
            let latency = heard.then(|| self.latency(asked));
            let victims = [Victim { target: TARGET, latency }];
            let (verdict, caps) = self.guard.step(&victims, &self.used(asked), self.now);
            self.caps = caps;
            verdict
        }
    }

    #[test]
    fn the_promise_is_kept_and_the_aggressor_is_not_starved() {
        let asked = [("hog", 10_000)];
        let mut model = Model::new(10_000);
        assert!(model.latency(&asked) > TARGET);
        assert!(matches!(model.step(&asked, true), Verdict::Cut { target: TARGET, .. }));
        let mut broken = 0;
        let mut done = 0;
        for _ in 0..120 {
            model.step(&asked, true);
            broken += u32::from(model.latency(&asked) > TARGET);
            done += model.used(&asked)["hog"].operations;
        }
        // It rests below the target: 90 % of the device are 2 ms here, 75 % are calm.
        assert!(broken <= 6, "{broken}");
        assert!(done / 120 > 5_000, "{done}");
    }

    #[test]
    fn who_is_not_needed_to_hold_back_is_let_go() {
        let asked = [("hog", 10_000)];
        let mut model = Model::new(10_000);
        model.step(&asked, true);
        assert_eq!(model.caps.len(), 1);
        // The hog calms down by itself.
        for _ in 0..30 {
            model.step(&[("hog", 100)], true);
        }
        assert!(model.caps.is_empty());
        // And when nobody is there to be protected.
        model.step(&asked, true);
        for _ in 0..30 {
            model.step(&asked, false);
        }
        assert!(model.caps.is_empty());
    }

    #[test]
    fn nobody_is_cut_for_a_latency_that_is_not_theirs() {
        let mut model = Model::new(10_000);
        let victims = [Victim { target: TARGET, latency: Some(Micros(9_000)) }];
        let (verdict, caps) = model.guard.step(&victims, &BTreeMap::new(), STEP);
        assert_eq!((verdict, caps.len()), (Verdict::Rested, 0));
        let idle = BTreeMap::from([("idle", Use::default())]);
        let (verdict, caps) = model.guard.step(&victims, &idle, 2 * STEP);
        assert_eq!((verdict, caps.len()), (Verdict::Rested, 0));
    }

    #[test]
    fn a_task_that_ends_is_forgotten() {
        let mut model = Model::new(1_000);
        model.step(&[("a", 900), ("b", 900)], true);
        assert_eq!(model.caps.len(), 2);
        model.step(&[("b", 900)], true);
        assert_eq!(model.caps.keys().copied().collect::<Vec<_>>(), ["b"]);
    }

    proptest! {
        /// Whatever comes in: nobody has a cap of nothing, nor one above what they did; and cuts keep their distance.
        #[test]
        fn caps_are_within_what_was_done(
            steps in prop::collection::vec((0_u64..100_000, 0_u64..100_000, 1_u64..50_000, any::<bool>()), 1..60),
        ) {
            let mut guard = Guard::default();
            let mut most = BTreeMap::<&str, u64>::new();
            let mut cut_at = None;
            for (index, (a, b, latency, heard)) in steps.into_iter().enumerate() {
                let now = index as u64 * STEP;
                let used = BTreeMap::from([("a", a), ("b", b)]);
                for (key, operations) in &used {
                    let most = most.entry(key).or_default();
                    *most = (*most).max(*operations);
                }
                let used = used.into_iter().map(|(key, operations)| (key, Use { operations, bytes: operations })).collect();
                let victims = [Victim { target: TARGET, latency: heard.then_some(Micros(latency)) }];
                let (verdict, caps) = guard.step(&victims, &used, now);
                if let Verdict::Cut { latency, target } = verdict {
                    prop_assert!(latency > target);
                    prop_assert!(cut_at.is_none_or(|at| now - at >= PATIENCE));
                    cut_at = Some(now);
                }
                for (key, cap) in caps {
                    prop_assert!(cap.operations >= 1 && cap.operations <= most[key].max(1));
                }
            }
        }
    }
}
