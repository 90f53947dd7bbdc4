//! Each promise of the module against a simulation of the kernel, millisecond by millisecond.

use proptest::prelude::*;

use super::*;

const MS: u64 = 1000;
const PERIOD_MS: u64 = PERIOD / MS;
const WINDOW_MS: usize = (WINDOW / MS) as usize;
/// Two ticks of 4 ms: so much before the end of a quota the kernel programs warn.
const TICKS_MS: u64 = 8;

/// A quota as the kernel enforces it (`kernel/sched/fair.c`: `__refill_cfs_bandwidth_runtime`), with the program that
/// warns. All in µs.
struct Task {
    quota: u64,
    saving: u64,
    left: u64,
    /// When its periods begin, ms.
    phase: u64,
    /// What it used since that was filled up.
    used_of_it: u64,
    used: Vec<u64>,
    total: u64,
    stopped: u64,
    /// What it would use, ms by ms.
    wants: Vec<u64>,
}

impl Task {
    fn new(quota: u64, saving: u64, phase: u64, wants: Vec<u64>) -> Task {
        let (used_of_it, used, total, stopped) = (0, Vec::new(), 0, 0);
        Task { quota, saving, left: quota, phase, used_of_it, used, total, stopped, wants }
    }

    fn refill(&mut self) {
        self.left = (self.left + self.quota).min(self.quota + self.saving);
        self.used_of_it = 0;
    }

    /// As the agent writes it: what may be saved is lowered before the quota, and raised after it, each a write.
    fn write(&mut self, Quota { quota, saving, .. }: Quota<usize>) {
        assert!(saving <= quota, "the kernel refuses to save more than the quota");
        if saving.0 < self.saving {
            self.saving = saving.0;
            self.refill();
        }
        self.quota = quota.0;
        self.refill();
        if saving.0 > self.saving {
            self.saving = saving.0;
            self.refill();
        }
    }

    /// One millisecond, with at most `free` of CPU. Tells whether a warning is due.
    fn run(&mut self, now: usize, free: u64) -> bool {
        let now = now as u64;
        if now % PERIOD_MS == self.phase {
            self.refill();
        }
        let wants = self.wants[now as usize].min(free);
        let used = wants.min(self.left);
        self.stopped += u64::from(used < wants);
        self.left -= used;
        self.used.push(used);
        self.total += used;
        let warn = self.quota.saturating_sub(TICKS_MS * MS).max(self.quota / 2);
        let before = self.used_of_it;
        self.used_of_it += used;
        before < warn && self.used_of_it >= warn
    }

    /// The most that was used in any window of 10 s.
    fn worst_window(&self) -> u64 {
        let mut sum = 0;
        let mut worst = 0;
        for (now, used) in self.used.iter().enumerate() {
            sum += used;
            if now >= WINDOW_MS {
                sum -= self.used[now - WINDOW_MS];
            }
            worst = worst.max(sum);
        }
        worst
    }
}

/// A node that runs tasks against a pool. Turns come late by `late[n]` ms, loans take `slow` ms.
struct Node {
    pool: Pool<usize>,
    tasks: Vec<Task>,
    cpus: u64,
    /// The most that was lent beyond what the last turn found there was.
    over: u64,
    lowest_step: u64,
}

impl Node {
    fn new(cpus: u64, most: u64, tasks: Vec<(Terms, Task)>) -> Node {
        let mut pool = Pool::new(Millicores(cpus * 1000), Millicores(most));
        let mut running = Vec::new();
        for (key, (terms, task)) in tasks.into_iter().enumerate() {
            pool.enrol(key, terms, 0);
            running.push(task);
        }
        Node { pool, tasks: running, cpus, over: 0, lowest_step: u64::MAX }
    }

    fn run(&mut self, length: usize, late: &[u64], slow: u64) {
        let mut next_turn = 0;
        let mut turns = 0;
        let mut due: Vec<(u64, Quota<usize>)> = Vec::new();
        for now in 0..length {
            let at = now as u64 * MS;
            let mut free = self.cpus * MS;
            // The least first, each at most a fair part of what is left: max-min, as equal weights have it.
            let mut order: Vec<usize> = (0..self.tasks.len()).collect();
            order.sort_by_key(|key| self.tasks[*key].wants[now].min(self.tasks[*key].left));
            for (place, key) in order.iter().copied().enumerate() {
                let part = free / (order.len() - place) as u64;
                let warned = self.tasks[key].run(now, part);
                free -= self.tasks[key].used[now];
                let total: u64 = self.tasks[key].total;
                if warned && let Some(quota) = self.pool.on_warning(key, Micros(total), at) {
                    due.push((now as u64 + slow, quota));
                }
            }
            due.retain(|(when, quota)| {
                let is_due = *when <= now as u64;
                if is_due {
                    self.tasks[quota.key].write(*quota);
                }
                !is_due
            });
            if now as u64 >= next_turn {
                // The executor is one: what was decided before is written before.
                for (_, quota) in due.drain(..) {
                    self.tasks[quota.key].write(quota);
                }
                let totals: Vec<_> =
                    (self.tasks.iter().enumerate()).map(|(key, task)| (key, Micros(task.total))).collect();
                for quota in self.pool.turn(totals, at) {
                    let before = self.tasks[quota.key].quota;
                    self.lowest_step = self.lowest_step.min(quota.quota.0 * 1000 / before);
                    self.tasks[quota.key].write(quota);
                }
                next_turn = (turns + 1) * PERIOD_MS + late[turns as usize % late.len()];
                turns += 1;
            }
            self.over = self.over.max(self.pool.lent().0.saturating_sub(self.pool.size().0));
        }
    }
}

fn terms(milli: u64, guaranteed: u64) -> Terms {
    let grant = Millicores(milli).in_a_period();
    Terms { grant, ceiling: grant, guaranteed: Millicores(guaranteed).in_a_period(), saving: Micros(0) }
}

fn with_saving(terms: Terms) -> Terms {
    Terms { saving: terms.grant, ..terms }
}

/// Wants `threads` CPUs for `busy` ms of each `every`, a random stretch of each kind at a time.
fn demand(stretches: &[(u64, u64, u64, u64)], length: usize) -> Vec<u64> {
    let mut wants = Vec::with_capacity(length);
    for (threads, busy, every, long) in stretches.iter().cycle() {
        for ms in 0..*long {
            wants.push(if ms % every < *busy { threads * MS } else { 0 });
        }
        if wants.len() >= length {
            break;
        }
    }
    wants.truncate(length);
    wants
}

const LENGTH: usize = 60_000;

fn hog(threads: u64) -> Vec<u64> {
    vec![threads * MS; LENGTH]
}

/// The service of the measurements: two processes that work for 1 ms each 20 ms, and for 12 ms each 200.
fn service(length: usize) -> Vec<u64> {
    let of_one = |now: usize| match now % 200 {
        0..12 => true,
        now => now % 20 == 0,
    };
    (0..length).map(|now| (u64::from(of_one(now)) + u64::from(of_one(now))) * MS).collect()
}

fn simulate(cpus: u64, tasks: Vec<(Terms, Vec<u64>)>) -> Node {
    let tasks = tasks.into_iter().enumerate().map(|(key, (terms, wants))| {
        (terms, Task::new(terms.grant.0, terms.saving.0, key as u64 * 37 % PERIOD_MS, wants))
    });
    let mut node = Node::new(cpus, cpus * 1000, tasks.collect());
    node.run(LENGTH, &[0], 3);
    node
}

fn stretches() -> impl Strategy<Value = Vec<(u64, u64, u64, u64)>> {
    prop::collection::vec((0u64..5, 1u64..120, 20u64..400, 50u64..12_000), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever a task does, its mean over any 10 s is at most 1 % above its ceiling, or 2 % where turns come late.
    #[test]
    fn the_mean_over_any_window_stays_within_the_ceiling(
        milli in 50u64..2000,
        stretches in stretches(),
        phase in 0..PERIOD_MS,
        late in prop_oneof![Just(vec![0]), prop::collection::vec(0u64..30, 1..20)],
        slow in 0u64..6,
        saves: bool,
    ) {
        let terms = if saves { with_saving(terms(milli, 0)) } else { terms(milli, 0) };
        let task = Task::new(terms.grant.0, terms.saving.0, phase, demand(&stretches, LENGTH));
        let mut node = Node::new(4, 4000, vec![(terms, task)]);
        node.run(LENGTH, &late, slow);
        let allowed = terms.ceiling.0 * 100;
        // What the kernel alone lets a task use: a part of a period at each end, and what it has saved, which a turn that
        // comes late sees late.
        let by_kernel = match (saves, late.iter().all(|late| *late == 0)) {
            (true, _) => allowed / 40,
            (false, true) => allowed / 100,
            (false, false) => allowed / 50,
        };
        let worst = node.tasks[0].worst_window();
        prop_assert!(worst <= allowed + by_kernel, "{} of {allowed}", worst);
    }

    /// What is lent is never more than there is; whoever is promised something has it; no quota drops by more
    /// than a quarter but for the sake of somebody who was promised the difference.
    #[test]
    fn loans_stay_within_the_pool_and_promises_are_kept(
        tasks in prop::collection::vec((50u64..800, stretches()), 1..6),
        late in prop::collection::vec(0u64..30, 1..20),
    ) {
        let cpus = (1000 + tasks.iter().map(|(milli, _)| milli).sum::<u64>()).div_ceil(1000) + 1;
        let run = |most: u64| {
            let neighbour = terms(1000, 1000);
            let mut all = vec![(neighbour, Task::new(neighbour.grant.0, 0, 0, hog(1)))];
            for (milli, stretches) in &tasks {
                let terms = terms(*milli, 0);
                all.push((terms, Task::new(terms.grant.0, 0, 50, demand(stretches, LENGTH))));
            }
            let mut node = Node::new(cpus, most, all);
            node.run(LENGTH, &late, 3);
            node
        };
        let (lending, not_lending) = (run(cpus * 1000), run(0));
        prop_assert_eq!(lending.over, 0);
        let got = |node: &Node| node.tasks[0].used.iter().sum::<u64>();
        let (with, without) = (got(&lending), got(&not_lending));
        prop_assert!(with >= without / 100 * 97, "the neighbour has {} ms, and {} where nothing is lent", with, without);
    }

    /// No quota is lowered by more than a quarter in a turn where there is enough for everybody.
    #[test]
    fn quotas_are_lowered_gently(milli in 50u64..1500, stretches in stretches()) {
        let terms = terms(milli, 0);
        let task = Task::new(terms.grant.0, 0, 50, demand(&stretches, LENGTH));
        let mut node = Node::new(16, 16_000, vec![(terms, task)]);
        node.run(LENGTH, &[0], 3);
        prop_assert!(node.lowest_step >= 749, "lowered to {} ‰", node.lowest_step);
    }
}

#[test]
fn a_hog_is_held_at_its_ceiling_from_its_first_second() {
    let node = simulate(4, vec![(terms(500, 0), hog(4))]);
    assert_eq!(node.pool.loan(0).unwrap().count, 0);
    let used: u64 = node.tasks[0].used.iter().sum();
    assert!(used.abs_diff(LENGTH as u64 * MS / 2) <= 50 * MS, "{used}");
}

#[test]
fn a_service_below_its_ceiling_is_hardly_ever_stopped() {
    let terms = terms(300, 0);
    // Its first 20 s are over when it begins: credit is earned.
    let mut wants = vec![0; 20_000];
    wants.extend(service(LENGTH - 20_000));
    let mut alone = Task::new(terms.grant.0, 0, 0, wants.clone());
    for now in 0..LENGTH {
        alone.run(now, 4 * MS);
    }
    let node = simulate(4, vec![(terms, wants)]);
    let (plain, ours) = (alone.stopped, node.tasks[0].stopped);
    assert!(plain > 150, "the plain quota stops it for {plain} ms only");
    assert!(ours * 100 <= plain, "stopped for {ours} ms, and for {plain} by a plain quota");
}

#[test]
fn a_hog_that_was_idle_bursts_rests_and_comes_back_to_its_ceiling() {
    let mut wants = vec![0; LENGTH];
    wants[20_000..].fill(4 * MS);
    let node = simulate(4, vec![(terms(500, 0), wants)]);
    let used = &node.tasks[0].used;
    let sum = |from: usize, to: usize| used[from..to].iter().sum::<u64>();
    assert!(sum(20_000, 21_000) > 600 * MS, "a burst at first");
    assert!(node.tasks[0].worst_window() <= 5050 * MS);
    // It is never stopped for longer than a rest at three quarters does, and is at its ceiling in the end.
    for from in (22_000..LENGTH - 1000).step_by(100) {
        assert!(sum(from, from + 1000) >= 340 * MS, "{} ms from {from}", sum(from, from + 1000) / MS);
    }
    let end = sum(LENGTH - 10_000, LENGTH);
    assert!(end >= 4900 * MS, "{end}");
    let count = node.pool.loan(0).unwrap().count;
    assert!(count < 40, "{count} loans");
}

#[test]
fn a_promise_is_not_lent_even_while_it_is_not_used() {
    let idle = vec![0; LENGTH];
    let mut wants = vec![0; LENGTH];
    wants[15_000..].fill(2 * MS);
    let node = simulate(2, vec![(terms(1900, 1900), idle), (terms(100, 0), wants)]);
    assert_eq!((node.over, node.pool.loan(1).unwrap().count), (0, 0));
}

#[test]
fn a_new_ceiling_begins_a_new_account_and_a_new_grant_does_not() {
    let mut pool = Pool::new(Millicores(4000), Millicores(4000));
    let ceiling = Terms { ceiling: Micros(60_000), ..terms(300, 0) };
    pool.enrol(0, ceiling, 0);
    for turn in 0..=200 {
        pool.turn([(0, Micros(0))], turn * PERIOD);
    }
    let now = 200 * PERIOD + 50_000;
    pool.enrol(0, Terms { grant: Micros(40_000), ..ceiling }, now);
    let lent = pool.on_warning(0, Micros(0), now).expect("it has rested");
    assert_eq!(lent.quota, Micros(60_000));
    assert_eq!(pool.recall(0).map(|quota| quota.quota), Some(Micros(40_000)));
    assert_eq!(pool.recall(0), None);
    pool.enrol(0, terms(500, 0), now);
    pool.turn([(0, Micros(0))], 201 * PERIOD);
    assert_eq!(pool.on_warning(0, Micros(0), now), None);
}

#[test]
fn nothing_is_lent_without_a_turn_nor_beyond_what_the_operator_allows() {
    let mut pool = Pool::new(Millicores(4000), Millicores(100));
    pool.enrol(0, terms(1000, 0), 0);
    assert_eq!(pool.on_warning(0, Micros(92_000), 0), None);
    for turn in 0..=200 {
        pool.turn([(0, Micros(0))], turn * PERIOD);
    }
    assert_eq!(pool.size(), Micros(10_000));
    let lent = pool.on_warning(0, Micros(92_000), 201 * PERIOD).unwrap();
    assert_eq!(lent.quota, Micros(110_000));
    assert_eq!(pool.on_warning(0, Micros(102_000), 201 * PERIOD), None);
    // It was warned, so the loan stays; then it goes.
    assert_eq!(pool.turn([(0, Micros(0))], 202 * PERIOD), []);
    let ended = pool.turn([(0, Micros(0))], 203 * PERIOD);
    assert_eq!(ended.iter().map(|quota| quota.quota.0).collect::<Vec<_>>(), [100_000]);
}
