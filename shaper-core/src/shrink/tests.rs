//! Conversations with a little kernel: a cgroup that has a hot set, a cold set, a rate at which it takes
//! more, and swap or none. It knows nothing of how the conversation is held.

use proptest::prelude::*;

use super::*;

const TICK_MS: u64 = 100;

/// A cgroup with one busy task, in bytes; time passes in milliseconds.
#[derive(Clone, Debug)]
struct World {
    /// Resident, by how it is used and whether it is backed by a file.
    hot: u64,
    cold: u64,
    /// Part of both that is anonymous, in hundredths.
    anonymous: u64,
    /// Reclaimed, but wanted: the task brings it back as fast as the device gives it.
    missed: u64,
    cold_gone: u64,
    swap_room: u64,
    /// Taken anew a second, cold once it is there, up to so much.
    rate: u64,
    wants: u64,
    /// Hundredths of a chunk that fall on the hot set while there is cold memory.
    clumsiness: u64,
    /// Brought back per millisecond at most.
    device: u64,
    max: Limit<Bytes>,
    high: Limit<Bytes>,
    refaulted: u64,
    full_stall_us: u64,
    progress_ms: u64,
    age_ms: u64,
    oom_kills: u64,
    chunk: Option<u64>,
    /// The least that `memory.max` was ever set below use by; must stay `None`.
    cut: Option<u64>,
}

impl World {
    fn new(hot: u64, cold: u64) -> World {
        World {
            hot,
            cold,
            anonymous: 100,
            missed: 0,
            cold_gone: 0,
            swap_room: u64::MAX / 4,
            rate: 0,
            wants: 0,
            clumsiness: 0,
            device: 64 * KIB,
            max: Limit::Unlimited,
            high: Limit::Unlimited,
            refaulted: 0,
            full_stall_us: 0,
            progress_ms: 0,
            age_ms: 0,
            oom_kills: 0,
            chunk: None,
            cut: None,
        }
    }

    fn used(&self) -> u64 {
        self.hot + self.cold
    }

    fn reclaimable(&self) -> u64 {
        let anonymous = self.used() * self.anonymous / 100;
        self.used() - anonymous + anonymous.min(self.swap_room)
    }

    fn observation(&self) -> Observation {
        Observation {
            used: Bytes(self.used()),
            reclaimable: Bytes(self.reclaimable()),
            refaulted: Bytes(self.refaulted),
            some_stall_us: self.full_stall_us,
            full_stall_us: self.full_stall_us,
            oom_kills: self.oom_kills,
        }
    }

    /// Takes so much away, cold memory by preference; returns what it got.
    fn reclaim(&mut self, bytes: u64) -> u64 {
        let bytes = bytes.min(self.reclaimable());
        let clumsy = (bytes / 100 * self.clumsiness).min(self.hot);
        let from_cold = (bytes - clumsy).min(self.cold);
        let from_hot = (bytes - from_cold).min(self.hot);
        self.cold -= from_cold;
        self.cold_gone += from_cold;
        self.hot -= from_hot;
        self.missed += from_hot;
        let swapped = (from_cold + from_hot) / 100 * self.anonymous;
        self.swap_room -= swapped.min(self.swap_room);
        from_cold + from_hot
    }

    /// Charges memory: above `high` the task reclaims for itself and waits; above `max` somebody dies.
    fn charge(&mut self, bytes: u64) -> bool {
        let over = |limit: Limit<Bytes>, used: u64| {
            limit.at().map_or(0, |Bytes(limit)| (used + bytes).saturating_sub(limit))
        };
        let over_high = over(self.high, self.used());
        let mut waits = false;
        if over_high > 0 {
            waits = true;
            self.reclaim(over_high);
        }
        let over_max = over(self.max, self.used());
        if over_max > 0 {
            waits = true;
            if self.reclaim(over_max) < over_max {
                self.oom_kills += 1;
            }
        }
        waits
    }

    /// A millisecond of the task: what it misses comes first, then it takes more, then it gets on.
    fn pass(&mut self) {
        self.age_ms += 1;
        let mut waits = false;
        if self.missed > 0 {
            let back = self.missed.min(self.device);
            waits = self.charge(back) || back == self.device;
            self.missed -= back;
            self.hot += back;
            self.refaulted += back;
            self.swap_room += back / 100 * self.anonymous;
        } else if self.wants > 0 {
            let more = self.wants.min(self.rate / 1000);
            waits = self.charge(more);
            self.wants -= more;
            self.cold += more;
        }
        if waits {
            self.full_stall_us += 1000;
        } else {
            self.progress_ms += 1;
        }
    }

    fn carry_out(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Reclaim(Bytes(bytes)) => {
                    assert!(self.chunk.is_none(), "two chunks at once");
                    assert!(*bytes <= CHUNK_MAX, "a chunk of {bytes}");
                    self.chunk = Some(*bytes);
                }
                Action::StopReclaim => assert!(self.chunk.take().is_some(), "nothing to stop"),
                Action::SetHigh(high) => self.high = *high,
                Action::SetMax(max) => {
                    let below = max.at().map_or(0, |Bytes(max)| self.used().saturating_sub(max));
                    if below > 0 {
                        self.cut = Some(below);
                    }
                    self.max = *max;
                }
                Action::Finish(_) => {}
            }
        }
    }
}

/// A conversation in a world.
struct Talk {
    world: World,
    shrink: Shrink,
    before: Before,
    now_ms: u64,
    /// The stall total after each tick, µs.
    stalls: Vec<u64>,
    /// When five ticks were first seen of which a fifth was stalled.
    stalled_at_ms: Option<u64>,
}

impl Talk {
    fn begin(world: World, target: u64) -> Result<Talk, NotReclaimable> {
        let before = Before { max: world.max, high: world.high };
        let now_ms = 1_000_000;
        let shrink = Shrink::begin(Bytes(target), before, Swap::None, &world.observation(), now_ms * MS)?;
        Ok(Talk { world, shrink, before, now_ms, stalls: Vec::new(), stalled_at_ms: None })
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        let actions = on_event(&mut self.shrink, event, self.now_ms * MS);
        assert!(actions.len() <= 4, "{actions:?}");
        self.world.carry_out(&actions);
        actions
    }

    /// One tick of the agent: a chunk takes a fifth of one.
    fn tick(&mut self) -> Vec<Action> {
        for ms in 0..TICK_MS {
            if ms == TICK_MS / 5
                && let Some(chunk) = self.world.chunk.take()
            {
                self.world.reclaim(chunk);
                self.now_ms += ms;
                self.tell(Event::Reclaimed);
                self.now_ms -= ms;
            }
            self.world.pass();
        }
        self.now_ms += TICK_MS;
        let before = self.stalls.len().checked_sub(5).map_or(0, |index| self.stalls[index]);
        self.stalls.push(self.world.full_stall_us);
        if self.world.full_stall_us - before >= 5 * TICK_MS * 1000 / 5 {
            self.stalled_at_ms.get_or_insert(self.now_ms);
        }
        let seen = self.world.observation();
        self.tell(Event::Observed(seen))
    }

    /// To its end, or for a minute; the time that it took, ms.
    fn run_to_end(&mut self) -> Option<u64> {
        let began = self.now_ms;
        while self.shrink.outcome().is_none() {
            if self.stalled_at_ms.is_some_and(|at| self.now_ms - at > 1_000) {
                panic!("stalled for a second and not over: {:?}", self.shrink);
            }
            if self.now_ms - began > 60_000 {
                return None;
            }
            self.tick();
        }
        Some(self.now_ms - began)
    }

    fn assert_restored(&self) {
        assert_eq!((self.world.max, self.world.high), (self.before.max, self.before.high));
    }

    fn aborted_for(&self) -> &Reason {
        match self.shrink.outcome() {
            Some(Outcome::Aborted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn cold_memory_goes_and_the_limit_is_in_force_within_seconds() {
    let mut talk = Talk::begin(World::new(24 * MIB, 40 * MIB), 40 * MIB).unwrap();
    let took = talk.run_to_end().unwrap();
    assert!(took < 5_000, "{took} ms");
    assert!(matches!(talk.shrink.outcome(), Some(Outcome::Done { .. })), "{:?}", talk.shrink);
    assert_eq!((talk.world.max, talk.world.high), (Limit::At(Bytes(40 * MIB)), Limit::Unlimited));
    assert_eq!(talk.world.progress_ms, talk.world.age_ms);
}

#[test]
fn a_working_set_above_the_target_is_left_alone() {
    let mut talk = Talk::begin(World::new(48 * MIB, 16 * MIB), 32 * MIB).unwrap();
    talk.run_to_end().unwrap();
    assert!(
        matches!(talk.aborted_for(), Reason::Stalled { .. } | Reason::WorkingSet { .. }),
        "{:?}",
        talk.shrink
    );
    talk.assert_restored();
    let Some(Outcome::Aborted { cold, .. }) = talk.shrink.outcome() else { unreachable!() };
    assert!(cold.0 >= 15 * MIB, "{cold} of the cold 16 MiB were found");
}

#[test]
fn what_nobody_can_take_is_refused_with_numbers() {
    let mut world = World::new(24 * MIB, 40 * MIB);
    world.swap_room = 0;
    let refused = Talk::begin(world.clone(), 40 * MIB).err().unwrap();
    assert_eq!((refused.used, refused.reclaimable), (Bytes(64 * MIB), Bytes(0)));
    let text = refused.to_string();
    assert!(text.contains("it uses 64 MiB, of which 0 B at most") && text.contains("no swap"), "{text}");
    // The least that it names is taken.
    world.anonymous = 50;
    let least = Talk::begin(world.clone(), 16 * MIB).err().unwrap().least;
    assert!(Talk::begin(world, least.0).is_ok());
}

#[test]
fn swap_that_fills_up_is_noticed() {
    let mut world = World::new(10 * MIB, 54 * MIB);
    world.swap_room = 40 * MIB;
    let mut talk = Talk::begin(world, 32 * MIB).unwrap();
    talk.tick();
    talk.world.swap_room = 0;
    talk.run_to_end().unwrap();
    assert!(matches!(talk.aborted_for(), Reason::NotReclaimable { .. }), "{:?}", talk.shrink);
    talk.assert_restored();
}

#[test]
fn a_task_that_grows_slowly_is_shrunk_and_one_that_grows_fast_is_not_stopped() {
    let mut world = World::new(16 * MIB, 48 * MIB);
    (world.rate, world.wants) = (2 * MIB, 6 * MIB);
    let mut slow = Talk::begin(world.clone(), 32 * MIB).unwrap();
    slow.run_to_end().unwrap();
    assert!(matches!(slow.shrink.outcome(), Some(Outcome::Done { .. })), "{:?}", slow.shrink);

    (world.rate, world.wants) = (4096 * MIB, 1 << 50);
    let mut fast = Talk::begin(world, 32 * MIB).unwrap();
    fast.run_to_end().unwrap();
    assert!(
        matches!(fast.aborted_for(), Reason::Outgrown | Reason::Stalled { .. } | Reason::NoProgress),
        "{:?}",
        fast.shrink
    );
    fast.assert_restored();
}

#[test]
fn a_target_may_change_on_the_way() {
    for (first, second) in [(48, 40), (40, 56)] {
        for ticks in [0, 3, 9, 14] {
            let mut talk = Talk::begin(World::new(24 * MIB, 40 * MIB), first * MIB).unwrap();
            for _ in 0..ticks {
                talk.tick();
            }
            if talk.shrink.outcome().is_some() {
                continue;
            }
            talk.tell(Event::Retargeted(Bytes(second * MIB)));
            talk.run_to_end().unwrap();
            assert_eq!(talk.world.max, Limit::At(Bytes(second * MIB)), "{first} {second} {ticks}");
            assert_eq!(talk.world.high, Limit::Unlimited);
        }
    }
}

#[test]
fn it_ends_with_its_task_and_when_it_is_called_off() {
    let mut talk = Talk::begin(World::new(24 * MIB, 40 * MIB), 40 * MIB).unwrap();
    talk.tick();
    assert_ne!(talk.world.high, Limit::Unlimited);
    talk.tell(Event::Cancelled);
    talk.assert_restored();

    let mut talk = Talk::begin(World::new(24 * MIB, 40 * MIB), 40 * MIB).unwrap();
    talk.tick();
    assert_eq!(talk.tell(Event::Ended), [Action::Finish(Outcome::Ended)]);
    assert!(talk.tell(Event::Observed(Observation::default())).is_empty());
}

#[test]
fn a_failure_puts_back_what_there_was() {
    let mut world = World::new(24 * MIB, 40 * MIB);
    (world.max, world.high) = (Limit::At(Bytes(128 * MIB)), Limit::At(Bytes(100 * MIB)));
    let mut talk = Talk::begin(world, 40 * MIB).unwrap();
    while talk.world.max == talk.before.max {
        talk.tick();
    }
    let actions = talk.tell(Event::Failed("memory.high: no".into()));
    assert_eq!(actions[0], Action::SetMax(talk.before.max));
    talk.assert_restored();
}

#[test]
fn a_limit_above_use_comes_down_without_reclaim_or_not_at_all() {
    let mut world = World::new(24 * MIB, 8 * MIB);
    (world.max, world.high) = (Limit::At(Bytes(128 * MIB)), Limit::At(Bytes(120 * MIB)));
    let mut talk = Talk::begin(world.clone(), 48 * MIB).unwrap();
    talk.shrink = talk.shrink.without_reclaim();
    talk.run_to_end().unwrap();
    assert!(matches!(talk.shrink.outcome(), Some(Outcome::Done { .. })), "{:?}", talk.shrink);
    assert_eq!((talk.world.max, talk.world.used()), (Limit::At(Bytes(48 * MIB)), 32 * MIB));

    (world.rate, world.wants) = (512 * MIB, 64 * MIB);
    let mut talk = Talk::begin(world, 48 * MIB).unwrap();
    talk.shrink = talk.shrink.without_reclaim();
    talk.run_to_end().unwrap();
    assert!(matches!(talk.aborted_for(), Reason::Outgrown | Reason::Stalled { .. }), "{:?}", talk.shrink);
    talk.assert_restored();
}

#[test]
fn counters_may_begin_anew() {
    let mut talk = Talk::begin(World::new(24 * MIB, 40 * MIB), 40 * MIB).unwrap();
    talk.world.full_stall_us = 0;
    talk.tick();
    let mut seen = talk.world.observation();
    (seen.full_stall_us, seen.some_stall_us, seen.refaulted) = (60_000, 60_000, Bytes(1));
    talk.tell(Event::Observed(seen));
    // From 60 ms to 20 ms: begun anew.
    (seen.full_stall_us, seen.some_stall_us, seen.refaulted) = (20_000, 20_000, Bytes(0));
    talk.tell(Event::Observed(seen));
    assert!(talk.shrink.outcome().is_none(), "{:?}", talk.shrink);
}

fn world() -> impl Strategy<Value = World> {
    let sizes = (1..96u64, 0..96u64, 0..=100u64);
    let rest =
        (prop_oneof![Just(0), 0..64u64], 0..64u64, 0..60u64, 1..256u64, prop_oneof![Just(0), 0..256u64]);
    (sizes, rest).prop_map(|((hot, cold, anonymous), (rate, wants, clumsiness, device, swap))| World {
        anonymous,
        rate: rate * MIB,
        wants: wants * MIB,
        clumsiness,
        device: device * 4 * KIB,
        swap_room: swap * MIB,
        ..World::new(hot * MIB, cold * MIB)
    })
}

fn limit() -> impl Strategy<Value = Limit<Bytes>> {
    prop_oneof![Just(Limit::Unlimited), (200..400u64).prop_map(|mib| Limit::At(Bytes(mib * MIB)))]
}

proptest! {
    /// Whatever the task is like: no limit below use, nobody killed, an end, and everything as it was or as
    /// it should be.
    #[test]
    fn it_ends_well(
        world in world(),
        max in limit(),
        high in limit(),
        target in 1..160u64,
        disturbance in prop::option::of((0..20usize, 1..160u64, 0..4u8)),
    ) {
        let world = World { max, high, ..world };
        prop_assume!(target * MIB < world.used());
        let Ok(mut talk) = Talk::begin(world, target * MIB) else { return Ok(()) };
        let mut target = target;
        if let Some((ticks, other, kind)) = disturbance {
            for _ in 0..ticks {
                talk.tick();
            }
            let is_over = talk.shrink.outcome().is_some();
            match kind {
                0 if !is_over => {
                    target = other;
                    talk.tell(Event::Retargeted(Bytes(other * MIB)));
                }
                1 => drop(talk.tell(Event::Cancelled)),
                2 => drop(talk.tell(Event::Refused)),
                3 => drop(talk.tell(Event::Failed("no".into()))),
                _ => {}
            }
        }
        prop_assert!(talk.run_to_end().is_some(), "no end: {:?}", talk.shrink);
        prop_assert_eq!(talk.world.cut, None);
        prop_assert!(talk.world.chunk.is_none());
        match talk.shrink.outcome() {
            // A refusal out of the blue leaves a limit behind that was in fact written.
            Some(Outcome::Done { .. }) => {
                prop_assert_eq!((talk.world.max, talk.world.high), (Limit::At(Bytes(target * MIB)), high));
            }
            Some(Outcome::Aborted { .. }) if disturbance.is_none_or(|(_, _, kind)| kind != 2) => {
                talk.assert_restored();
            }
            _ => {}
        }
        let (world, shrink) = (talk.world.clone(), talk.shrink.clone());
        prop_assert!(talk.tick().is_empty());
        prop_assert_eq!(&talk.shrink, &shrink);
        prop_assert_eq!((talk.world.max, talk.world.high), (world.max, world.high));
    }

    /// Where the target leaves room for what is hot and for what is still to come, it is reached, and the task hardly
    /// notices; where the hot set alone is larger, it is not.
    #[test]
    fn it_tells_cold_from_hot(hot in 8..48u64, cold in 16..96u64, clumsiness in 0..10u64, part in 20..80u64) {
        let world = World { clumsiness, ..World::new(hot * MIB, cold * MIB) };
        let target = (hot + cold * part / 100) * MIB;
        let mut talk = Talk::begin(world.clone(), target).unwrap();
        let took = talk.run_to_end();
        let (progress, age) = (talk.world.progress_ms, talk.world.age_ms);
        prop_assert!(took.is_some_and(|took| took <= 10_000), "{:?}", talk.shrink);
        let is_done = matches!(talk.shrink.outcome(), Some(Outcome::Done { .. }));
        prop_assert!(is_done, "{:?}", talk.shrink);
        prop_assert!(progress * 10 >= age * 9, "{} of {}", progress, age);

        let mut talk = Talk::begin(world, hot * MIB * 3 / 4).unwrap();
        prop_assert!(talk.run_to_end().is_some());
        let is_aborted = matches!(talk.shrink.outcome(), Some(Outcome::Aborted { .. }));
        prop_assert!(is_aborted, "{:?}", talk.shrink);
        talk.assert_restored();
    }
}
