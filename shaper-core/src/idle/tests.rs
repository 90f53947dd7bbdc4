//! A little kernel: a task has sets of memory, each of which it touches every so often, and reclaim takes what was touched
//! least recently. It knows nothing of how much is asked for.

use proptest::{collection::vec, prelude::*};

use super::*;

/// Memory that is touched as a whole, every `period` seconds; 0: never.
#[derive(Clone, Debug)]
struct Set {
    size: u64,
    period: u64,
    resident: u64,
    touched_at: u64,
}

#[derive(Clone, Debug)]
struct World {
    sets: Vec<Set>,
    /// Brought back in a second at most; whatever comes back stalls the task for its part of that.
    device: u64,
    /// What of a chunk falls on what was touched last, in hundredths.
    clumsiness: u64,
    /// Nothing that is not page cache can go, and this much is.
    reclaimable: Option<u64>,
    /// Some of it waits anyway, µs a second.
    waits_us: u64,
    refaulted: u64,
    some_us: u64,
    second: u64,
}

impl World {
    fn new(sets: &[(u64, u64)]) -> World {
        let set =
            |&(mib, period): &(u64, u64)| Set { size: mib * MIB, period, resident: mib * MIB, touched_at: 0 };
        World {
            sets: sets.iter().map(set).collect(),
            device: 512 * MIB,
            clumsiness: 0,
            reclaimable: None,
            waits_us: 0,
            refaulted: 0,
            some_us: 0,
            second: 0,
        }
    }

    fn used(&self) -> u64 {
        self.sets.iter().map(|set| set.resident).sum()
    }

    fn gone(&self, index: usize) -> u64 {
        self.sets[index].size - self.sets[index].resident
    }

    fn observation(&self) -> Observation {
        Observation {
            used: Bytes(self.used()),
            reclaimable: Bytes(self.reclaimable.unwrap_or(self.used()).min(self.used())),
            refaulted: Bytes(self.refaulted),
            some_stall_us: self.some_us,
            full_stall_us: self.some_us,
            oom_kills: 0,
        }
    }

    fn reclaim(&mut self, bytes: u64) -> u64 {
        let before = self.used();
        let clumsy = bytes / 100 * self.clumsiness;
        let mut order: Vec<usize> = (0..self.sets.len()).collect();
        order.sort_by_key(|index| self.sets[*index].touched_at);
        let mut take = |index: usize, want: u64| {
            let got = want.min(self.sets[index].resident);
            self.sets[index].resident -= got;
            got
        };
        let mut left = bytes - order.last().map_or(0, |last| take(*last, clumsy));
        for index in order {
            left -= take(index, left);
        }
        before - self.used()
    }

    fn pass_second(&mut self) {
        self.second += 1;
        self.some_us += self.waits_us;
        for set in &mut self.sets {
            if set.period == 0 || !self.second.is_multiple_of(set.period) {
                continue;
            }
            set.touched_at = self.second;
            let back = (set.size - set.resident).min(self.device);
            set.resident += back;
            self.refaulted += back;
            self.some_us += back * 1_000_000 / self.device;
        }
    }
}

/// A task and what is remembered of it.
struct Story {
    world: World,
    idle: Idle,
    /// When how much was taken, s.
    taken: Vec<(u64, u64)>,
    used: Vec<u64>,
}

impl Story {
    fn new(world: World) -> Story {
        let idle = Idle::new(&world.observation(), 0);
        Story { world, idle, taken: Vec::new(), used: Vec::new() }
    }

    fn second(&mut self, may_ask: bool) {
        self.world.pass_second();
        let now = self.world.second * SECOND;
        let seen = self.world.observation();
        self.used.push(seen.used.0);
        if !self.idle.is_due(now) {
            return;
        }
        let Some(Bytes(chunk)) = self.idle.observed(&seen, may_ask, now) else { return };
        assert!(may_ask && chunk <= CHUNK_MAX && chunk <= seen.reclaimable.0, "{chunk} of {seen:?}");
        let taken = self.world.reclaim(chunk);
        self.idle.reclaimed(Bytes(taken), now + 10 * MS);
        self.taken.push((self.world.second, taken));
    }

    fn run(mut self, seconds: u64) -> Story {
        for _ in 0..seconds {
            self.second(true);
        }
        self
    }

    fn total(&self) -> u64 {
        self.taken.iter().map(|(_, taken)| taken).sum()
    }

    fn why(&self) -> Why {
        match &self.idle.state {
            State::Resting(why) => why.clone(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_cold_goes_and_what_is_hot_stays() {
    let story = Story::new(World::new(&[(40, 1), (60, 0)])).run(600);
    assert_eq!(story.world.gone(1), 60 * MIB);
    assert!(matches!(story.why(), Why::WorkingSet { .. }), "{:?}", story.idle);
    // What was needed came back at once, and was a small part.
    assert!(story.world.refaulted <= 8 * MIB, "{}", Bytes(story.world.refaulted));
    assert_eq!(story.idle.status(false).reclaimed, Bytes(story.total()));
}

#[test]
fn a_task_that_uses_all_it_has_is_left_alone() {
    let story = Story::new(World::new(&[(64, 1)])).run(3600);
    assert!(story.total() <= 8 * MIB, "{} in an hour", Bytes(story.total()));
    // And ever less often.
    let gaps: Vec<u64> = story.taken.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(gaps.is_sorted() && gaps.last().is_some_and(|gap| *gap >= 600), "{gaps:?}");
}

#[test]
fn what_is_needed_once_in_a_minute_is_missed_in_time() {
    let story = Story::new(World::new(&[(40, 1), (60, 60)])).run(1800);
    // A third of what would come and go if that taught nothing.
    assert!(story.world.refaulted <= 30 * 25 * MIB / 3, "{}", Bytes(story.world.refaulted));
    // At no time was more gone than a minute may cost.
    let least = story.used.iter().min().unwrap();
    assert!(*least >= 74 * MIB, "{}", Bytes(*least));
}

#[test]
fn a_task_that_waits_for_memory_is_not_touched() {
    let mut world = World::new(&[(40, 1), (60, 0)]);
    world.waits_us = 1100;
    let story = Story::new(world.clone()).run(600);
    assert_eq!(story.total(), 0);
    assert!(matches!(story.why(), Why::Pressure { .. }), "{:?}", story.idle);
    world.waits_us = 900;
    assert!(Story::new(world).run(600).total() >= 60 * MIB);
}

#[test]
fn without_swap_page_cache_alone_goes() {
    let mut world = World::new(&[(40, 1), (60, 0)]);
    world.reclaimable = Some(0);
    let story = Story::new(world).run(600);
    assert_eq!((story.total(), story.why()), (0, Why::NotReclaimable));
    let text = story.idle.status(true).to_string();
    assert_eq!(
        text,
        "0 B reclaimed; none now: there is nothing that could be taken (page cache alone: there is no swap for \
         anonymous memory)"
    );
}

#[test]
fn a_task_that_was_disturbed_has_its_rest_and_a_little_one_is_not_worth_it() {
    let mut story = Story::new(World::new(&[(40, 1), (200, 0)])).run(20);
    assert!(story.total() > 0);
    let (before, now) = (story.total(), story.world.second);
    story.idle.disturb(now * SECOND);
    let story = story.run(29);
    assert_eq!((story.total(), story.why()), (before, Why::Disturbed));
    assert!(story.run(10).total() > before);
    assert_eq!(Story::new(World::new(&[(3, 0)])).run(600).total(), 0);
}

#[test]
fn a_kernel_that_takes_nothing_is_not_asked_again_at_once() {
    let mut story = Story::new(World::new(&[(100, 0)]));
    story.world.clumsiness = 0;
    for second in 1..=600 {
        let seen = story.world.observation();
        if story.idle.observed(&seen, true, second * SECOND).is_some() {
            story.taken.push((second, 0));
            story.idle.reclaimed(Bytes(0), second * SECOND);
        }
    }
    assert!((1..=8).contains(&story.taken.len()), "{:?}", story.taken);
    assert_eq!(story.why(), Why::NotReclaimable);
}

#[test]
fn one_chunk_at_a_time() {
    let world = World::new(&[(100, 0)]);
    let mut idle = Idle::new(&world.observation(), 0);
    let asked =
        (1..=60).filter(|second| idle.observed(&world.observation(), true, second * SECOND).is_some());
    assert_eq!(asked.count(), 1);
    assert!(idle.is_under_way());
}

proptest! {
    /// Whatever the task is like: never more than a quarter in a minute, and what is used all the time is hardly ever
    /// gone; and what it has to bring back within twenty minutes is less than a quarter a minute.
    #[test]
    fn it_is_gentle(
        sets in vec((0..400u64, prop_oneof![Just(0), Just(1), 2..200u64]), 1..5),
        clumsiness in 0..10u64,
        device in 64..2048u64,
        busy in vec(any::<bool>(), 1..50),
    ) {
        let world = World { clumsiness, device: device * MIB, ..World::new(&sets) };
        let mut story = Story::new(world);
        for second in 0..1200 {
            story.second(!busy[second % busy.len()]);
        }
        for (index, (from, _)) in story.taken.iter().enumerate() {
            let within = story.taken[index..].iter().take_while(|(at, _)| at - from < 60);
            let taken: u64 = within.map(|(_, taken)| taken).sum();
            let used = story.used[(*from as usize).saturating_sub(60)..*from as usize].iter().max().unwrap();
            prop_assert!(taken <= used / 4 + 2 * CHUNK_MIN, "{} of {}", Bytes(taken), Bytes(*used));
        }
        for (index, (_, period)) in sets.iter().enumerate() {
            if *period == 1 {
                prop_assert!(story.world.gone(index) <= CHUNK_MAX);
            }
        }
        let wanted: u64 = sets.iter().map(|(mib, _)| mib * MIB).sum();
        let most = 3 * wanted + 32 * CHUNK_MIN;
        prop_assert!(story.world.refaulted <= most, "{} of {}", Bytes(story.world.refaulted), Bytes(wanted));
    }

    /// What nobody touches goes, all of it but for a chunk.
    #[test]
    fn it_finds_what_is_cold(hot in 8..200u64, cold in 8..200u64) {
        let story = Story::new(World::new(&[(hot, 1), (cold, 0)])).run(2400);
        prop_assert!(story.world.gone(1) + 8 * MIB >= cold * MIB, "{}", Bytes(story.world.gone(1)));
    }
}
