//! What is learnt of tasks while they run.

use shaper_core::{
    profile::{Model, Resource},
    spec::Priority,
    task::{ExitStatus, Phase as RunPhase},
};

use super::{
    learn::KINDS,
    tests::{Broker, OTHER, SECOND, USER, id, spec, status},
    *,
};

const MIB: u64 = 1 << 20;

/// A broker with a task on a node, which says every second what it has used.
struct Running {
    broker: Broker,
    session: SessionId,
    seconds: u64,
    usage: shaper_core::task::Usage,
}

impl Running {
    fn new() -> Running {
        let mut broker = Broker::new();
        let session = broker.node("n1", 8000);
        broker.submit(spec("t", 1000, Priority::Low, 0));
        Running { broker, session, seconds: 0, usage: Default::default() }
    }

    /// It runs for `seconds`, using so much each second: millicores, bytes, and of its time held by its limit in thousandths.
    fn runs(&mut self, seconds: u64, cpu: u64, memory: u64, held: u64) -> Vec<Row> {
        let mut rows = Vec::new();
        for _ in 0..seconds {
            self.seconds += 1;
            self.broker.now += SECOND;
            self.usage.at_monotonic_ns += SECOND;
            self.usage.cpu_time_ns += cpu * 1_000_000;
            self.usage.cpu_throttled_ns = Some(self.usage.cpu_throttled_ns.unwrap_or(0) + held * 1_000_000);
            self.usage.memory_bytes = Some(memory);
            rows.extend(self.says(RunPhase::Running));
        }
        rows
    }

    fn says(&mut self, phase: RunPhase) -> Vec<Row> {
        let mut status = status("t", 1, phase);
        status.created_at = self.broker.now - self.seconds * SECOND;
        status.usage = self.usage;
        let report =
            Box::new(NodeTask { status, generation: 1, evicted: false, lease_over: false, request: None });
        on_event(&mut self.broker.state, Event::TaskReport { session: self.session, report }, self.broker.now)
            .rows
    }

    fn model(&self, resource: Resource) -> &Model {
        &self.broker.state.kind("default", "sleep").unwrap().models[&resource]
    }

    fn request(&self, resource: Resource) -> u64 {
        let kind = self.broker.state.kind("default", "sleep").unwrap();
        kind.advice(resource, Priority::Medium).unwrap().limit
    }
}

fn close(hours: f64, expected: f64) {
    assert!((hours - expected).abs() <= 0.05 * expected, "{hours} h, not {expected}");
}

#[test]
fn a_running_task_is_booked_minute_by_minute_before_it_ends() {
    let mut task = Running::new();
    task.runs(30, 500, 100 * MIB, 0);
    assert_eq!(task.broker.state.kind("default", "sleep"), None, "a minute is not over");
    task.runs(7200, 500, 100 * MIB, 0);
    close(task.model(Resource::Cpu).hours(), 2.0);
    assert!((500..700).contains(&task.request(Resource::Cpu)), "{}", task.request(Resource::Cpu));
    let memory = task.request(Resource::Memory);
    assert!((100 * MIB..130 * MIB).contains(&memory), "{memory}");
    let measured = query::profile(&task.broker.state, &USER, "default", "sleep", Priority::Medium).unwrap();
    assert_eq!((measured.executions, measured.demand.cpu.0), (0, task.request(Resource::Cpu)));
    assert_eq!(measured.estimates.len(), 4);
    assert!(measured.notes.iter().any(|note| note.starts_with("cpu: measured for")), "{:?}", measured.notes);
    assert!(query::profile(&task.broker.state, &OTHER, "default", "sleep", Priority::Medium).is_err());
    assert_eq!(query::profiles(&task.broker.state, &USER).count(), 1);
    assert_eq!(query::profiles(&task.broker.state, &OTHER).count(), 0);
}

#[test]
fn what_it_was_kept_from_counts() {
    let (mut free, mut held) = (Running::new(), Running::new());
    free.runs(3700, 1000, MIB, 0);
    held.runs(3700, 1000, MIB, 600);
    let (free, held) = (free.request(Resource::Cpu), held.request(Resource::Cpu));
    assert!(held >= free * 3 / 2, "{free} and {held}");
}

#[test]
fn the_end_books_what_is_left_once() {
    let mut task = Running::new();
    task.runs(150, 500, 100 * MIB, 0);
    let at = task.broker.now;
    task.says(RunPhase::Ended { status: ExitStatus::Code(0), at });
    close(task.model(Resource::Cpu).hours(), 150.0 / 3600.0);
    task.says(RunPhase::Ended { status: ExitStatus::Code(0), at });
    close(task.model(Resource::Cpu).hours(), 150.0 / 3600.0);
    assert_eq!(task.broker.state.histories.len(), 1);
}

#[test]
fn one_that_was_cut_short_keeps_what_was_booked() {
    let mut task = Running::new();
    task.runs(150, 500, 100 * MIB, 0);
    task.broker.on(Event::Cancel { caller: USER, task: id("t"), grace_millis: 0 });
    let at = task.broker.now;
    task.says(RunPhase::Ended { status: ExitStatus::Signal(15), at });
    close(task.model(Resource::Cpu).hours(), 120.0 / 3600.0);
}

#[test]
fn models_are_kept_at_most_once_a_minute_and_are_what_is_read_again() {
    let mut task = Running::new();
    let rows = task.runs(660, 500, 100 * MIB, 0);
    let kept = rows.iter().filter(|row| matches!(row, Row::Kind(..))).count();
    assert!((8..=11).contains(&kept), "{kept} times in eleven minutes");
    let row = task.broker.state.row(&Row::Kind("default".into(), "sleep".into()));
    let value = row.value.unwrap();
    assert!(value.len() < 4096, "{}", value.len());
    let again = State::load([(row.key.as_bytes(), value.as_slice())]).unwrap();
    let models = &task.broker.state.kind("default", "sleep").unwrap().models;
    assert_eq!(&again.kind("default", "sleep").unwrap().models, models);
}

#[test]
fn kinds_are_bounded_and_the_oldest_is_forgotten() {
    let mut task = Running::new();
    for number in 0..KINDS {
        let kind = learn::Kind::new("default".into(), format!("old-{number}"));
        task.broker.state.kinds.insert(("default".into(), format!("old-{number}")), kind);
    }
    let rows = task.runs(130, 500, MIB, 0);
    assert_eq!(task.broker.state.kinds.len(), KINDS);
    assert!(task.broker.state.kind("default", "sleep").is_some());
    assert!(rows.contains(&Row::Kind("default".into(), "old-0".into())));
}
