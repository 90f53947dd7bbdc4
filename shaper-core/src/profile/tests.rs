use proptest::{collection::vec, prelude::*};

use super::{vpa::Recommender, *};

const MINUTE: Micros = Micros(60_000_000);
const HOUR: f64 = 1.0 / 60.0;

fn sample(used: u64) -> Sample {
    Sample { used, over: MINUTE, at: 0, unmet: Unmet::Nothing }
}

/// One task and the model of its kind, asked after each sample.
struct Task {
    model: Model,
    tracker: Tracker,
    prices: Prices,
    in_force: Option<u64>,
    changes: usize,
    minutes: u64,
}

impl Task {
    fn new(resource: Resource, priority: Priority) -> Task {
        Task {
            model: Model::default(),
            tracker: Tracker::new(resource),
            prices: Prices::of(resource, priority),
            in_force: None,
            changes: 0,
            minutes: 0,
        }
    }

    fn sees(&mut self, sample: &Sample) -> Advice {
        self.minutes += 1;
        let sample = Sample { at: self.minutes * 60_000_000_000, ..*sample };
        self.tracker.observe(&mut self.model, &self.prices, &sample);
        let advice = self.tracker.advise(&self.model, &self.prices, self.in_force, HOUR).unwrap();
        self.changes += usize::from(advice.reason == Reason::Change);
        self.in_force = Some(advice.limit);
        advice
    }

    /// The last advice, after a minute of each of these.
    fn uses(&mut self, used: impl IntoIterator<Item = u64>) -> Advice {
        used.into_iter().map(|used| self.sees(&sample(used))).last().unwrap()
    }
}

#[test]
fn nothing_is_advised_before_anything_was_seen() {
    let model = Model::default();
    let prices = Prices::of(Resource::Cpu, Priority::Medium);
    assert_eq!(Tracker::new(Resource::Cpu).advise(&model, &prices, None, HOUR), None);
    assert!(model.is_empty());
}

#[test]
fn steady_use_gets_a_little_more_than_it_uses_and_no_change() {
    let mut task = Task::new(Resource::Cpu, Priority::Medium);
    task.uses([1000; 24 * 60]);
    task.changes = 0;
    let advice = task.uses([1000; 10 * 24 * 60]);
    assert!((1000..1300).contains(&advice.limit), "{advice:?}");
    assert_eq!(task.changes, 0);
    assert_eq!(advice.reason, Reason::Keep);
    assert!(advice.expected.unserved < 0.01 && advice.expected.unused < 0.25, "{advice:?}");
}

#[test]
fn growth_is_followed_within_two_samples_and_rest_within_hours() {
    let mut task = Task::new(Resource::Cpu, Priority::Medium);
    task.uses([1000; 24 * 60]);
    let up = task.uses([4000; 2]);
    assert_eq!(up.reason, Reason::Change, "{up:?}");
    assert!(up.limit >= 4000, "{up:?}");
    let soon = task.uses([1000; 5]);
    assert!(soon.limit >= 4000, "nothing comes down for five minutes of rest: {soon:?}");
    let later = task.uses([1000; 6 * 60]);
    assert!(later.limit < 2000, "{later:?}");
}

#[test]
fn what_comes_back_every_day_is_remembered() {
    // A job of ten minutes an hour: the hours between are idle.
    let hour = || (0..60).map(|minute| if minute < 10 { 3000 } else { 50 });
    let mut task = Task::new(Resource::Cpu, Priority::High);
    task.uses((0..48).flat_map(|_| hour()));
    let (mut unserved, mut total) = (0, 0);
    for used in (0..24).flat_map(|_| hour()) {
        let limit = task.in_force.unwrap();
        unserved += used.saturating_sub(limit);
        total += used;
        task.sees(&sample(used));
    }
    assert!(unserved * 20 < total, "{unserved} of {total} were not served");
}

#[test]
fn a_higher_priority_has_no_less_room() {
    let limit = |priority| {
        let mut task = Task::new(Resource::Cpu, priority);
        task.uses((0..3000).map(|minute| if minute % 60 == 0 { 2000 } else { 300 + minute % 7 * 40 })).best
    };
    assert!(limit(Priority::High) >= limit(Priority::Medium));
    assert!(limit(Priority::Medium) >= limit(Priority::Low));
    let (high, low) = (limit(Priority::High), limit(Priority::Low));
    assert!(high > low, "{high} and {low}");
}

#[test]
fn who_is_held_is_given_more_until_it_is_not() {
    let mut task = Task::new(Resource::Cpu, Priority::Medium);
    task.uses([500; 24 * 60]);
    let wanted = 3000_u64;
    for turn in 0.. {
        let limit = task.in_force.unwrap();
        if limit >= wanted {
            break;
        }
        assert!(turn < 30, "still at {limit} after {turn} minutes");
        // All that is seen is the limit, and that it was held for the rest of the time.
        let waited = 1.0 - limit as f64 / wanted as f64;
        task.sees(&Sample { used: limit, over: MINUTE, at: 0, unmet: Unmet::Waited(waited) });
    }
}

#[test]
fn after_a_kill_there_is_more_than_was_used() {
    let mut task = Task::new(Resource::Memory, Priority::Medium);
    let used = 1 << 30;
    task.uses([used; 600]);
    let advice = task.sees(&Sample { used, over: MINUTE, at: 0, unmet: Unmet::Killed });
    assert!(advice.limit >= used * 6 / 5, "{advice:?}");
    let small = Sample { used: 1 << 20, over: MINUTE, at: 0, unmet: Unmet::Killed };
    assert!((small.demand() - 101.0 * 1_048_576.0).abs() < 1.0);
}

#[test]
fn a_new_task_begins_where_its_kind_is() {
    let mut first = Task::new(Resource::Cpu, Priority::Medium);
    first.uses([2000; 600]);
    let mut second = Tracker::new(Resource::Cpu);
    let advice = second.advise(&first.model, &first.prices, None, 0.0).unwrap();
    assert_eq!(advice.reason, Reason::First);
    assert!((2000..2700).contains(&advice.limit), "{advice:?}");
}

#[test]
fn what_was_seen_fades() {
    let mut task = Task::new(Resource::Cpu, Priority::Medium);
    task.uses([8000; 600]);
    assert!((task.model.hours() - 10.0).abs() < 2.0, "{}", task.model.hours());
    task.model.fade(240.0, 24.0);
    assert!(task.model.hours() < 0.02, "{}", task.model.hours());
}

#[test]
fn many_at_once_and_seldom_ones_fade_alike() {
    let prices = Prices::of(Resource::Cpu, Priority::Medium);
    let hours = |tasks: usize, minutes_between: u64| {
        let mut model = Model::default();
        let mut trackers = vec![Tracker::new(Resource::Cpu); tasks];
        for minute in 1..=60 {
            let sample = Sample { at: minute * minutes_between * 60_000_000_000, ..sample(1000) };
            trackers.iter_mut().for_each(|tracker| tracker.observe(&mut model, &prices, &sample));
        }
        model.hours()
    };
    assert!((hours(1, 1) - 1.0).abs() < 0.03, "{}", hours(1, 1));
    assert!((hours(100, 1) - 100.0).abs() < 3.0, "{}", hours(100, 1));
    assert!((hours(1, 10_000) - 1.0).abs() < 0.03, "{}", hours(1, 10_000));
}

#[test]
fn a_model_is_kept_and_a_damaged_one_refused() {
    let mut task = Task::new(Resource::Cpu, Priority::Medium);
    task.uses((0..500).map(|minute| 100 + minute * 7));
    let text = serde_json::to_string(&task.model).unwrap();
    assert_eq!(serde_json::from_str::<Model>(&text).unwrap(), task.model);
    for damaged in [
        r#"{"cells":[[1,2,0.5],[1,2,0.5]],"hour":1.0,"seen_at":0}"#,
        r#"{"cells":[[1,500,0.5]],"hour":1.0,"seen_at":0}"#,
        r#"{"cells":[[1,2,-0.5]],"hour":1.0,"seen_at":0}"#,
        r#"{"cells":[],"hour":0.0,"seen_at":0}"#,
    ] {
        let error = serde_json::from_str::<Model>(damaged).unwrap_err();
        assert!(error.to_string().starts_with("not a model of use"), "{error}");
    }
}

#[test]
fn vpa_is_the_90th_percentile_and_15_per_cent() {
    // 1 core is in the bucket that ends at 0.01·(1.05^37 − 1)/0.05 = 1.0163 cores.
    let mut rule = Recommender::new(Resource::Cpu);
    assert_eq!(rule.target(), None);
    for _ in 0..1000 {
        rule.observe(&sample(1000));
    }
    assert_eq!(rule.target(), Some(1169));
    // Of ten samples, one does not count, and two do.
    let of = |high: usize| {
        let mut rule = Recommender::new(Resource::Cpu);
        let short = Sample { over: Micros(1), ..sample(0) };
        (0..10).for_each(|at| rule.observe(&Sample { used: if at < high { 1000 } else { 100 }, ..short }));
        rule.target().unwrap()
    };
    assert!(of(1) < 150 && of(2) == 1169, "{} {}", of(1), of(2));
}

#[test]
fn vpa_s_samples_count_half_after_a_day() {
    let mut rule = Recommender::new(Resource::Cpu);
    let day = Sample { used: 4000, over: Micros(86_400_000_000), at: 0, unmet: Unmet::Nothing };
    rule.observe(&day);
    // 1/2, 1/4, 1/8: after four days the first weighs 1/16 of the last, and 1/31 of all.
    (0..4).for_each(|_| rule.observe(&Sample { used: 1000, ..day }));
    assert_eq!(rule.target(), Some(1169));
}

/// The cost of a limit for a list of what may be used next, straight from its definition.
fn plain_cost(prices: &Prices, uses: &[(f64, f64)], mean: f64, limit: f64) -> f64 {
    let total: f64 = uses.iter().map(|(_, weight)| weight).sum();
    let of = |&(used, weight): &(f64, f64)| {
        let waste = (1.0 - used / limit).max(0.0);
        let unserved = prices.unserved * (used - limit).max(0.0) / mean;
        let touched = if used > limit { prices.touched } else { 0.0 };
        weight * (waste + unserved + touched)
    };
    uses.iter().map(of).sum::<f64>() / total
}

proptest! {
    /// The advised limit costs no more than any other, by the plain definition over what the model holds.
    #[test]
    fn no_limit_is_cheaper_than_the_best(
        used in vec(10_u64..100_000, 1..60),
        unserved in 0.5_f64..50.0,
        touched in 0.0_f64..10.0,
        other in 10.0_f64..200_000.0,
    ) {
        let prices = Prices { unserved, touched, ..Prices::of(Resource::Cpu, Priority::Medium) };
        let (mut model, mut tracker) = (Model::default(), Tracker::new(Resource::Cpu));
        for &used in &used {
            tracker.observe(&mut model, &prices, &sample(used));
        }
        let outlook = model.outlook(tracker.level()).unwrap();
        let (mean, uses) = (outlook.mean(), outlook.uses());
        let (best, cost) = outlook.cheapest(mean, &prices);
        let plain = plain_cost(&prices, &uses, mean, best);
        prop_assert!((plain - cost).abs() <= 1e-9 * (1.0 + cost), "{plain} is not {cost}");
        // Limits between the ends of buckets may cost less by what a bucket is wide, and no more.
        let other = other / 10.0;
        let cheaper = plain_cost(&prices, &uses, mean, other);
        prop_assert!(cheaper >= cost * 0.9 - 0.05, "{other} costs {cheaper}, {best} costs {cost}");
        let told = prices.cost(&outlook.expected(other, mean));
        prop_assert!((told - cheaper).abs() <= 1e-9 * (1.0 + cheaper), "{told} is not {cheaper}");
    }

    /// Whatever is seen: a limit is at least the least, finite, and no more than a fifth and a bucket above the most that was wanted.
    #[test]
    fn limits_stay_in_bounds(
        used in vec(prop_oneof![0_u64..100, 0_u64..1_000_000, Just(u64::MAX)], 1..400),
        waited in vec(-1.0_f64..2.0, 400),
    ) {
        let mut task = Task::new(Resource::Cpu, Priority::High);
        let mut most = 0.0_f64;
        for (&used, &waited) in used.iter().zip(&waited) {
            let sample = Sample { used, over: MINUTE, at: 0, unmet: Unmet::Waited(waited) };
            most = most.max(sample.demand());
            let advice = task.sees(&sample);
            prop_assert!(advice.limit >= Resource::Cpu.least());
            prop_assert!(advice.limit as f64 <= most.max(10.0) * 1.2156 * 1.05 + 2.0, "{advice:?} after {most}");
            let Expected { touched, unserved, unused } = advice.expected;
            prop_assert!((0.0..=1.0).contains(&touched) && (0.0..=1.0).contains(&unused) && unserved >= 0.0);
        }
    }

    /// A model keeps to its bound, and forgets no time: the lightest counts are booked to their neighbours.
    #[test]
    fn a_model_is_bounded(used in vec(10_u64..1_000_000_000, 500..1500)) {
        let (mut model, mut tracker) = (Model::default(), Tracker::new(Resource::Cpu));
        let forever = Prices { half_life: 1e9, ..Prices::of(Resource::Cpu, Priority::Low) };
        for &used in &used {
            tracker.observe(&mut model, &forever, &sample(used));
        }
        prop_assert!(model.bytes() <= 4096, "{}", model.bytes());
        let hours = used.len() as f64 / 60.0;
        prop_assert!((model.hours() / hours - 1.0).abs() < 1e-3, "{} of {hours}", model.hours());
    }
}
