//! A promised latency, kept by holding back whoever makes the device slow.
//!
//! `io.max` on a task that waits for its latency makes it worse: the kernel lets operations through in slices of up to
//! 100 ms. So the *aggressors* are held: the tasks that load the device most, those without a promise before any with one
//! ([`Aggressor::rank`]). [`Guard::step`] is additive increase, multiplicative decrease, in permille of what an aggressor
//! did when it was first held:
//!
//! - a victim's latency is above its target: what the heaviest aggressors may do is halved, or brought down as far as the
//!   latency has to come down, to an eighth at most; and then nothing for [`PATIENCE`], for the device has to work off its
//!   queue before the next measurement says anything;
//! - below [`CALM`] of the target, or no victim does anything: each second a quarter of what they have is given back, and
//!   at most a tenth of the whole;
//! - at a level at which the promise was broken nobody arrives again for [`MEMORY`]: an eighth below it is where giving
//!   back ends until then;
//! - what is back at the whole is not held any more;
//! - a promise that is broken while everybody is held to [`LEAST`], for [`FUTILE`], is not broken by them: all are let go,
//!   and left alone for [`MEMORY`].
//!
//! Between calm and the target nothing happens: the system rests there.

use std::collections::BTreeMap;

use crate::{limits::Limit, spec::Priority, units::Micros};

/// After a cut, ns.
pub const PATIENCE: u64 = SECOND;
/// Permille of the target below which aggressors are given more.
pub const CALM: u64 = 800;
/// The least that an aggressor is left, permille.
pub const LEAST: u32 = 10;
/// How long it is remembered that holding back was in vain, and at which level a promise was broken, ns.
pub const MEMORY: u64 = 60 * SECOND;
/// How long everybody is held to the least for a promise that is broken all the same, ns.
pub const FUTILE: u64 = 10 * SECOND;
/// So many operations say something about a quantile.
pub const SAMPLES: u64 = 20;
/// Fewer do after as long as this, ns.
pub const LONG: u64 = 2 * SECOND;
/// But not fewer than these.
pub const FEW: u64 = 4;

const SECOND: u64 = 1_000_000_000;
/// Given back in a second at most, permille.
const GIVE: u32 = 100;
/// A victim that has done nothing for as long as this needs no protection, ns.
const SILENT: u64 = 5 * SECOND;
const WHOLE: u32 = 1000;
/// The most that is taken in one cut leaves so much, permille.
const MOST_CUT: u32 = 125;
/// Of all that aggressors do, permille: those are cut that do so much together, the heaviest first.
const HEAVY: u64 = 800;

/// Whether so many operations, since as long ago, say something about a quantile.
pub fn is_enough(operations: u64, elapsed_ns: u64) -> bool {
    operations >= SAMPLES || (elapsed_ns >= LONG && operations >= FEW)
}

/// A task that is promised a latency, on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim<K> {
    /// Which.
    pub key: K,
    /// Its priority.
    pub priority: Priority,
    /// The 99th percentile that is promised.
    pub target: Micros,
    /// What it was since the last time that it was known; `None` of none or too few operations ([`is_enough`]).
    pub latency: Option<Micros>,
}

/// What is done, or may be done, of one lane in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Operations.
    pub operations: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What it may do, a second.
pub type Cap = Use;

/// Somebody who uses the device: a task in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aggressor {
    /// What it did since the last step.
    pub used: Use,
    /// Its priority.
    pub priority: Priority,
    /// Whether it is promised a latency itself.
    pub is_promised: bool,
}

impl Aggressor {
    /// Whether it may be held for a victim of that priority, and after whom: the lowest rank comes first.
    fn rank(&self, victim: Priority) -> Option<u8> {
        match (self.is_promised, self.priority < victim) {
            (false, _) => Some(0),
            (true, true) => Some(1),
            (true, false) => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Held {
    /// What it did when it was first held.
    whole: Use,
    permille: u32,
    /// At which level the promise was broken last, and when.
    broke: (u32, u64),
}

/// The guard of one device: what it remembers of the aggressors, by a key of the caller's.
#[derive(Clone, Debug)]
pub struct Guard<K> {
    held: BTreeMap<K, Held>,
    cut_at: Option<u64>,
    given_at: Option<u64>,
    heard_at: Option<u64>,
    /// Since when everybody is held to the least in vain.
    vain_since: Option<u64>,
    gave_up_at: Option<u64>,
}

impl<K> Default for Guard<K> {
    fn default() -> Guard<K> {
        Guard {
            held: BTreeMap::new(),
            cut_at: None,
            given_at: None,
            heard_at: None,
            vain_since: None,
            gave_up_at: None,
        }
    }
}

/// What a step decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<V> {
    /// A promise is broken, and others were cut for it.
    Cut(Broken<V>),
    /// A promise is broken, but not by anybody who can be held back: whoever was, is let go.
    Vain(Broken<V>),
    /// Something was given back.
    Given,
    /// Nothing was done.
    Rested,
}

/// A promise that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken<V> {
    /// Whose.
    pub victim: V,
    /// The latency that was measured …
    pub latency: Micros,
    /// … and promised.
    pub target: Micros,
}

impl<K: Ord + Clone> Guard<K> {
    /// Decides what the aggressors may do from now on; one that is not in the caps is not held.
    pub fn step<V: Clone>(
        &mut self,
        victims: &[Victim<V>],
        aggressors: &BTreeMap<K, Aggressor>,
        now_ns: u64,
    ) -> (Verdict<V>, BTreeMap<K, Cap>) {
        self.held.retain(|key, _| aggressors.contains_key(key));
        let verdict = self.judge(victims, aggressors, now_ns);
        let caps = self.held.iter().map(|(key, held)| (key.clone(), held.cap())).collect();
        (verdict, caps)
    }

    fn judge<V: Clone>(
        &mut self,
        victims: &[Victim<V>],
        aggressors: &BTreeMap<K, Aggressor>,
        now_ns: u64,
    ) -> Verdict<V> {
        let measured = victims.iter().filter_map(|victim| Some((victim, victim.latency?)));
        // The one whose promise is broken worst, by cross-multiplication.
        let worst = measured.max_by(|(a, a_latency), (b, b_latency)| {
            let of = |latency: &Micros, other: Micros| u128::from(latency.0) * u128::from(other.0);
            of(a_latency, b.target).cmp(&of(b_latency, a.target))
        });
        let Some((victim, latency)) = worst else {
            self.vain_since = None;
            // A victim that waits for its first operation is silent as well.
            return if is_recent(self.heard_at, SILENT, now_ns) {
                Verdict::Rested
            } else {
                self.give(now_ns)
            };
        };
        self.heard_at = Some(now_ns);
        let target = victim.target;
        if latency > target {
            let broken = Broken { victim: victim.key.clone(), latency, target };
            if is_recent(self.cut_at, PATIENCE, now_ns) || is_recent(self.gave_up_at, MEMORY, now_ns) {
                return Verdict::Rested;
            }
            let part = u128::from(target.0) * u128::from(WHOLE) / u128::from(latency.0.max(1));
            let part = u32::try_from(part).unwrap_or(WHOLE).clamp(MOST_CUT, WHOLE / 2);
            if self.cut(aggressors, victim.priority, part, now_ns) {
                (self.cut_at, self.vain_since) = (Some(now_ns), None);
                return Verdict::Cut(broken);
            }
            let since = *self.vain_since.get_or_insert(now_ns);
            if self.held.is_empty() || now_ns.saturating_sub(since) < FUTILE {
                return Verdict::Rested;
            }
            (self.gave_up_at, self.vain_since) = (Some(now_ns), None);
            self.held.clear();
            return Verdict::Vain(broken);
        }
        self.vain_since = None;
        let is_calm = u128::from(latency.0) * 1000 < u128::from(target.0) * u128::from(CALM);
        if is_calm && !is_recent(self.cut_at, PATIENCE, now_ns) { self.give(now_ns) } else { Verdict::Rested }
    }

    /// Leaves so much, permille, of what they may do to the heaviest aggressors of the first rank of which there is any that
    /// is left more than the least; whether there was one.
    fn cut(&mut self, aggressors: &BTreeMap<K, Aggressor>, victim: Priority, part: u32, now_ns: u64) -> bool {
        for rank in 0..=1 {
            let of_rank = aggressors.iter().filter(|(key, aggressor)| {
                let can_be_cut = match self.held.get(key) {
                    Some(held) => held.permille > LEAST,
                    None => aggressor.used.operations > 0,
                };
                aggressor.rank(victim) == Some(rank) && can_be_cut
            });
            let heavy = heaviest(of_rank);
            for (key, used) in &heavy {
                let held = self.held.entry((*key).clone()).or_insert(Held {
                    whole: *used,
                    permille: WHOLE,
                    broke: (WHOLE, now_ns),
                });
                held.broke = (held.permille, now_ns);
                held.permille = (held.permille * part / WHOLE).max(LEAST);
            }
            if !heavy.is_empty() {
                return true;
            }
        }
        false
    }

    fn give<V>(&mut self, now_ns: u64) -> Verdict<V> {
        if self.held.is_empty() || is_recent(self.given_at, SECOND, now_ns) {
            return Verdict::Rested;
        }
        self.given_at = Some(now_ns);
        let mut any = false;
        for held in self.held.values_mut() {
            let (level, at) = held.broke;
            let most = if is_recent(Some(at), MEMORY, now_ns) { level - level / 8 } else { WHOLE };
            let more = (held.permille / 4).clamp(LEAST / 2, GIVE);
            let permille = held.permille.saturating_add(more).min(most).max(held.permille);
            any |= permille != held.permille;
            held.permille = permille;
        }
        self.held.retain(|_, held| held.permille < WHOLE);
        if any { Verdict::Given } else { Verdict::Rested }
    }
}

fn is_recent(at: Option<u64>, length: u64, now_ns: u64) -> bool {
    at.is_some_and(|at| now_ns.saturating_sub(at) < length)
}

/// Those that do most: so many that together they do [`HEAVY`] of it, and whoever does as much as the last of them.
/// How much one does is its part of all operations and its part of all bytes.
fn heaviest<'a, K: 'a>(of: impl Iterator<Item = (&'a K, &'a Aggressor)>) -> Vec<(&'a K, Use)> {
    let all: Vec<(&K, Use)> = of.map(|(key, aggressor)| (key, aggressor.used)).collect();
    let sum = |part: fn(&Use) -> u64| all.iter().map(|(_, used)| u128::from(part(used))).sum::<u128>().max(1);
    let (operations, bytes) = (sum(|used| used.operations), sum(|used| used.bytes));
    let load = |used: &Use| {
        let part = |value: u64, of: u128| u64::try_from(u128::from(value) * 1000 / of).unwrap_or(1000);
        part(used.operations, operations) + part(used.bytes, bytes)
    };
    let mut loads: Vec<u64> = all.iter().map(|(_, used)| load(used)).collect();
    loads.sort_unstable_by(|a, b| b.cmp(a));
    let enough = loads.iter().sum::<u64>() * HEAVY / 1000;
    let mut together = 0;
    let least = loads.into_iter().find(|load| {
        together += load;
        together >= enough
    });
    let is_heavy = |used: &Use| least.is_some_and(|least| load(used) >= least);
    all.into_iter().filter(|(_, used)| is_heavy(used)).collect()
}

impl Held {
    fn cap(&self) -> Cap {
        let part = |whole: u64| (u128::from(whole) * u128::from(self.permille) / u128::from(WHOLE)) as u64;
        Cap { operations: part(self.whole.operations).max(1), bytes: part(self.whole.bytes).max(PIECE) }
    }
}

/// Fewer bytes a second would stop an operation of the usual size for longer than a second.
const PIECE: u64 = 4096;

/// The lower of two ceilings, as two that both hold.
pub fn lowest<T: Copy + Ord>(a: Limit<T>, b: Limit<T>) -> Limit<T> {
    match (a, b) {
        (Limit::At(a), Limit::At(b)) => Limit::At(a.min(b)),
        (Limit::Unlimited, other) | (other, Limit::Unlimited) => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP: u64 = 500_000_000;
    const TARGET: Micros = Micros(2_000);

    fn victim(latency: Option<Micros>) -> Victim<&'static str> {
        Victim { key: "reader", priority: Priority::Medium, target: TARGET, latency }
    }

    fn aggressor(operations: u64) -> Aggressor {
        Aggressor {
            used: Use { operations, bytes: operations * 4096 },
            priority: Priority::Medium,
            is_promised: false,
        }
    }

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

        fn used(&self, asked: &[(&'static str, u64)]) -> BTreeMap<&'static str, Aggressor> {
            let of = |(key, asked): &(&'static str, u64)| {
                let operations = self.caps.get(key).map_or(*asked, |cap| cap.operations.min(*asked));
                (*key, aggressor(operations))
            };
            asked.iter().map(of).collect()
        }

        fn operations(&self, asked: &[(&'static str, u64)]) -> u64 {
            self.used(asked).values().map(|aggressor| aggressor.used.operations).sum()
        }

        fn latency(&self, asked: &[(&'static str, u64)]) -> Micros {
            let free = self.full.saturating_sub(self.operations(asked));
            Micros(200 * self.full / free.max(self.full / 50))
        }

        fn step(&mut self, asked: &[(&'static str, u64)], heard: bool) -> Verdict<&'static str> {
            self.now += STEP;
            let latency = heard.then(|| self.latency(asked));
            let (verdict, caps) = self.guard.step(&[victim(latency)], &self.used(asked), self.now);
            self.caps = caps;
            verdict
        }
    }

    #[test]
    fn the_promise_is_kept_and_the_aggressor_is_not_starved() {
        let asked = [("hog", 10_000)];
        let mut model = Model::new(10_000);
        assert!(model.latency(&asked) > TARGET);
        let broken = Broken { victim: "reader", latency: Micros(10_000), target: TARGET };
        assert_eq!(model.step(&asked, true), Verdict::Cut(broken));
        let mut broken = 0;
        let mut done = 0;
        for _ in 0..240 {
            model.step(&asked, true);
            broken += u32::from(model.latency(&asked) > TARGET);
            done += model.operations(&asked);
        }
        // It rests below the target: 90 % of the device are 2 ms here, 87 % is where giving back ends.
        assert!(broken <= 4, "{broken}");
        assert!(done / 240 > 7_000, "{done}");
    }

    #[test]
    fn what_broke_the_promise_is_not_tried_again_at_once() {
        // Already a hundredth of what the hog wants is too much.
        let asked = [("hog", 100_000)];
        let mut model = Model::new(4_000);
        let mut cuts = 0;
        for _ in 0..120 {
            cuts += u32::from(matches!(model.step(&asked, true), Verdict::Cut(_)));
        }
        // Three on the way down, and a few where it rests.
        assert!((3..=6).contains(&cuts), "{cuts}");
        assert!(model.latency(&asked) <= TARGET && model.operations(&asked) >= 1_000);
    }

    #[test]
    fn who_is_not_needed_to_hold_back_is_let_go() {
        let asked = [("hog", 10_000)];
        let mut model = Model::new(10_000);
        model.step(&asked, true);
        assert_eq!(model.caps.len(), 1);
        // The hog calms down by itself.
        for _ in 0..150 {
            model.step(&[("hog", 100)], true);
        }
        assert!(model.caps.is_empty());
        // And when nobody is there to be protected.
        model.step(&asked, true);
        for _ in 0..150 {
            model.step(&asked, false);
        }
        assert!(model.caps.is_empty());
    }

    #[test]
    fn nobody_is_cut_for_a_latency_that_is_not_theirs() {
        let mut model = Model::new(10_000);
        let victims = [victim(Some(Micros(9_000)))];
        let (verdict, caps) = model.guard.step(&victims, &BTreeMap::new(), STEP);
        assert_eq!((verdict, caps.len()), (Verdict::Rested, 0));
        let idle = BTreeMap::from([("idle", aggressor(0))]);
        let (verdict, caps) = model.guard.step(&victims, &idle, 2 * STEP);
        assert_eq!((verdict, caps.len()), (Verdict::Rested, 0));
        // Somebody who does a little, whom it would not help to stop: he is let go again, and left alone.
        let little = BTreeMap::from([("little", aggressor(50))]);
        let mut verdicts = Vec::new();
        for step in 3..120 {
            let (verdict, caps) = model.guard.step(&victims, &little, step * STEP);
            verdicts.push((verdict, caps.len()));
        }
        let vain = verdicts.iter().filter(|(verdict, _)| matches!(verdict, Verdict::Vain(_))).count();
        assert_eq!((vain, verdicts.last()), (1, Some(&(Verdict::Rested, 0))));
    }

    #[test]
    fn who_has_no_promise_is_held_first_and_who_has_one_of_a_high_priority_never() {
        let promised =
            |operations, priority| Aggressor { is_promised: true, priority, ..aggressor(operations) };
        let mut aggressors = BTreeMap::from([
            ("batch", aggressor(100)),
            ("low", promised(5_000, Priority::Low)),
            ("equal", promised(5_000, Priority::Medium)),
        ]);
        let mut guard = Guard::default();
        let broken = [victim(Some(Micros(9_000)))];
        let mut now = 0;
        let mut step = |guard: &mut Guard<&'static str>, aggressors: &BTreeMap<&'static str, Aggressor>| {
            now += PATIENCE;
            guard.step(&broken, aggressors, now).1.into_keys().collect::<Vec<_>>()
        };
        // Down to the least of the one without, then the other.
        for _ in 0..3 {
            assert_eq!(step(&mut guard, &aggressors), ["batch"]);
        }
        assert_eq!(step(&mut guard, &aggressors), ["batch", "low"]);
        aggressors.remove("low");
        assert_eq!(step(&mut guard, &aggressors), ["batch"]);
    }

    #[test]
    fn the_heaviest_are_held_by_operations_or_bytes() {
        let used = |operations, bytes| Aggressor { used: Use { operations, bytes }, ..aggressor(0) };
        let names = |aggressors: &[(&'static str, Aggressor)]| -> Vec<&'static str> {
            heaviest(aggressors.iter().map(|(key, aggressor)| (key, aggressor)))
                .into_iter()
                .map(|it| *it.0)
                .collect()
        };
        let (many, large) = (used(9_000, 36 << 20), used(300, 300 << 20));
        assert_eq!(
            names(&[("many", many), ("large", large), ("little", used(50, 200 << 10))]),
            ["many", "large"]
        );
        // Of equals none is more to blame.
        assert_eq!(names(&[("a", many), ("b", many), ("c", many)]), ["a", "b", "c"]);
        assert_eq!(names(&[]), Vec::<&str>::new());
    }

    #[test]
    fn a_task_that_ends_is_forgotten() {
        let mut model = Model::new(1_000);
        model.step(&[("a", 900), ("b", 900)], true);
        assert_eq!(model.caps.len(), 2);
        model.step(&[("b", 900)], true);
        assert_eq!(model.caps.keys().copied().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn few_operations_say_something_after_a_while() {
        assert!(is_enough(20, 1) && !is_enough(19, LONG - 1));
        assert!(is_enough(4, LONG) && !is_enough(3, u64::MAX));
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
                let used = BTreeMap::from([("a", aggressor(a)), ("b", aggressor(b))]);
                for (key, aggressor) in &used {
                    let most = most.entry(key).or_default();
                    *most = (*most).max(aggressor.used.operations);
                }
                let victims = [victim(heard.then_some(Micros(latency)))];
                let (verdict, caps) = guard.step(&victims, &used, now);
                if let Verdict::Cut(Broken { latency, target, .. }) = verdict {
                    prop_assert!(latency > target);
                    prop_assert!(cut_at.is_none_or(|at| now - at >= PATIENCE));
                    cut_at = Some(now);
                }
                for (key, cap) in caps {
                    prop_assert!(cap.operations >= 1 && cap.operations <= most[key].max(1));
                }
            }
        }

        /// Two ceilings that both hold are one.
        #[test]
        fn the_lower_holds(a in 0_u64..9, b in 0_u64..9) {
            prop_assert_eq!(lowest(Limit::At(a), Limit::At(b)), Limit::At(a.min(b)));
            prop_assert_eq!(lowest(Limit::Unlimited, Limit::At(b)), Limit::At(b));
            prop_assert_eq!(lowest(Limit::At(a), Limit::Unlimited), Limit::At(a));
        }
    }
}
