//! What tasks use, booked minute by minute for their kind: those of one namespace and name ([`shaper_core::profile`]).
//!
//! Agents tell every second what their tasks have used in all. From two such reports, a minute apart, follows a sample; what
//! is left when a task ends is one, too. The models are kept, each at most once a minute: a crash forgets a minute.
//! What is known of a running task beside its kind's models is not kept: after a restart it counts as new.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::TaskId,
    profile::{Advice, Model, Prices, Resource, Sample, Tracker, Unmet},
    spec::Priority,
    task::{TaskStatus, UnixNanos, Usage},
    units::Micros,
};

use super::{
    Row, Turn,
    history::{self, History},
    recent::Recent,
    state::{State, TaskRow},
};

/// What agents measure of each task.
pub const MEASURED: [Resource; 4] =
    [Resource::Cpu, Resource::Memory, Resource::NetworkIn, Resource::NetworkOut];
/// Of kinds of tasks. Beyond it, what was not seen for longest is forgotten.
pub const KINDS: usize = 10_000;
const MICROS: u64 = 1_000_000;
/// How long a sample is.
const SAMPLE: Micros = Micros(60 * MICROS);
/// Less says nothing.
const LEAST: Micros = Micros(MICROS);
/// How often the models of a kind are kept.
const KEPT_EVERY: UnixNanos = 60_000_000_000;

/// What was learnt of the tasks of one namespace and name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// Their namespace.
    pub namespace: String,
    /// Their name.
    pub name: String,
    /// By resource.
    pub models: BTreeMap<Resource, Model>,
    /// When it was kept last.
    #[serde(skip)]
    kept_at: UnixNanos,
}

impl Kind {
    /// Of which nothing is known.
    pub fn new(namespace: String, name: String) -> Kind {
        Kind { namespace, name, models: BTreeMap::new(), kept_at: 0 }
    }

    /// When something was learnt last.
    pub fn seen_at(&self) -> UnixNanos {
        self.models.values().map(Model::seen_at).max().unwrap_or(0)
    }

    /// What a new task of this kind should request; nothing where nothing was measured.
    pub fn advice(&self, resource: Resource, priority: Priority) -> Option<Advice> {
        let model = self.models.get(&resource)?;
        Tracker::new(resource).advise(model, &Prices::of(resource, priority), None, 0.0)
    }
}

/// A running task.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    attempt: u32,
    /// What it had used when the last sample ended.
    since: Usage,
    /// Processes of it that had been killed for want of memory by then.
    kills: u64,
    /// The most memory it was seen to use since.
    peak: Option<u64>,
    /// The most that it has used lately.
    pub(super) recent: Recent,
    /// How long all its samples were.
    booked: Micros,
    trackers: [Tracker; MEASURED.len()],
}

impl Watch {
    fn begin(attempt: u32, since: Usage, kills: u64) -> Watch {
        let trackers = MEASURED.map(Tracker::new);
        let recent = Recent::begin(&since);
        Watch { attempt, since, kills, peak: None, recent, booked: Micros(0), trackers }
    }

    /// A sample of each resource, of what was used since the last and until `usage`.
    fn samples(
        &self,
        usage: &Usage,
        over: Micros,
        at: UnixNanos,
        was_killed: bool,
    ) -> [Option<Sample>; MEASURED.len()] {
        let rate = |now: u64, before: u64, scale: u64| {
            let amount = u128::from(now.saturating_sub(before)) * u128::from(scale);
            u64::try_from(amount / u128::from(over.0.max(1))).unwrap_or(u64::MAX)
        };
        let bits = |now: u64, before: u64| rate(now, before, 8 * MICROS);
        let throttled = usage.cpu_throttled_ns.zip(self.since.cpu_throttled_ns).map(|(now, before)| {
            let permille = rate(now, before, 1).min(1000);
            f64::from(u32::try_from(permille).unwrap_or(1000)) / 1000.0
        });
        let held = throttled.filter(|share| *share > 0.0).map_or(Unmet::Nothing, Unmet::Waited);
        let killed = if was_killed { Unmet::Killed } else { Unmet::Nothing };
        MEASURED.map(|resource| {
            let (used, unmet) = match resource {
                // Nanoseconds in a microsecond are thousandths of a core.
                Resource::Cpu => (Some(rate(usage.cpu_time_ns, self.since.cpu_time_ns, 1)), held),
                Resource::Memory => (self.peak.max(usage.memory_bytes), killed),
                Resource::NetworkIn => {
                    (Some(bits(usage.ingress.bytes, self.since.ingress.bytes)), Unmet::Nothing)
                }
                Resource::NetworkOut => {
                    (Some(bits(usage.egress.bytes, self.since.egress.bytes)), Unmet::Nothing)
                }
                Resource::StorageIo | Resource::GpuMemory => (None, Unmet::Nothing),
            };
            used.map(|used| Sample { used, over, at, unmet })
        })
    }
}

impl State {
    /// What was learnt of the tasks of this namespace and name.
    pub fn kind(&self, namespace: &str, name: &str) -> Option<&Kind> {
        self.kinds.get(&(namespace.to_owned(), name.to_owned()))
    }
}

impl Turn<'_> {
    /// Books what a running task has used, once a minute of it is there.
    pub(super) fn watch(&mut self, id: &TaskId, status: &TaskStatus) {
        let (usage, kills) = (status.usage, status.oom_kill.map_or(0, |kill| kill.kills));
        if let Some(row) = self.state.tasks.get(id) {
            self.state.shown.sample(id, row.task.request(), status, self.now);
        }
        let watches = &mut self.state.watches;
        let watch = watches.entry(id.clone()).or_insert_with(|| Watch::begin(status.attempt, usage, kills));
        // Another attempt, or counters that begin anew.
        if watch.attempt != status.attempt || usage.cpu_time_ns < watch.since.cpu_time_ns {
            *watch = Watch::begin(status.attempt, usage, kills);
        }
        watch.peak = watch.peak.max(usage.memory_bytes);
        watch.recent.see(&usage);
        let over = Micros(usage.at_monotonic_ns.saturating_sub(watch.since.at_monotonic_ns) / 1000);
        if over >= SAMPLE {
            self.book(id, &usage, over, kills, self.now);
        }
    }

    /// Books what is left when an attempt has ended by itself. Of one that was cut short only what was booked counts.
    pub(super) fn watch_end(&mut self, id: &TaskId, status: &TaskStatus, ended_at: UnixNanos) {
        let (usage, kills) = (status.usage, status.oom_kill.map_or(0, |kill| kill.kills));
        let watches = &mut self.state.watches;
        // What it had used before it was first heard of is of this attempt, too.
        let watch =
            watches.entry(id.clone()).or_insert_with(|| Watch::begin(status.attempt, Usage::default(), 0));
        if watch.attempt != status.attempt || usage.cpu_time_ns < watch.since.cpu_time_ns {
            *watch = Watch::begin(status.attempt, Usage::default(), 0);
        }
        if watch.booked == Micros(0) {
            watch.since = Usage { cpu_throttled_ns: usage.cpu_throttled_ns.map(|_| 0), ..Usage::default() };
        }
        let ran = Micros(ended_at.saturating_sub(status.created_at) / 1000);
        let left = Micros(ran.0.saturating_sub(watch.booked.0));
        if left >= LEAST || watch.booked == Micros(0) && left > Micros(0) {
            self.book(id, &usage, left, kills, ended_at);
        }
        self.state.watches.remove(id);
    }

    fn book(&mut self, id: &TaskId, usage: &Usage, over: Micros, kills: u64, at: UnixNanos) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let Some(watch) = self.state.watches.get_mut(id) else { return };
        let key = (task.spec().namespace.clone(), task.spec().name.clone());
        let samples = watch.samples(usage, over, at, kills > watch.kills);
        let kind =
            self.state.kinds.entry(key.clone()).or_insert_with(|| Kind::new(key.0.clone(), key.1.clone()));
        for ((resource, sample), tracker) in MEASURED.iter().zip(samples).zip(&mut watch.trackers) {
            if let Some(sample) = sample {
                let model = kind.models.entry(*resource).or_default();
                tracker.observe(model, &Prices::of(*resource, task.priority()), &sample);
            }
        }
        watch.since = *usage;
        watch.kills = kills;
        watch.peak = None;
        watch.booked.0 += over.0;
        if self.now.saturating_sub(kind.kept_at) >= KEPT_EVERY {
            kind.kept_at = self.now;
            self.rows.push(Row::Kind(key.0.clone(), key.1.clone()));
        }
        // Whose it is, and what it asked for, is known of a service that never ends, too.
        let (requested, user) = (*task.demand(), task.owner().uid);
        let history = self.state.histories.entry(key.clone());
        let history = history.or_insert_with(|| History::new(key.0.clone(), key.1.clone(), requested));
        if history.knows(user) {
            self.rows.push(Row::History(key.0, key.1));
        }
        self.forget_kinds();
    }

    /// Keeps the kinds of tasks to their bound.
    fn forget_kinds(&mut self) {
        while self.state.kinds.len() > KINDS {
            let oldest =
                self.state.kinds.iter().min_by_key(|(_, kind)| kind.seen_at()).map(|(key, _)| key.clone());
            let Some(key) = oldest else { return };
            self.state.kinds.remove(&key);
            self.state.histories.remove(&key);
            self.rows.push(Row::Kind(key.0.clone(), key.1.clone()));
            self.rows.push(Row::History(key.0, key.1));
        }
    }
}

/// What tasks of a kind need: from what was measured of them, or from what those that finished used.
pub fn measured(history: &History, kind: Option<&Kind>, priority: Priority) -> history::Measured {
    let mut measured = history.measured();
    let Some(kind) = kind else { return measured };
    for resource in MEASURED {
        if let (Some(advice), Some(model)) = (kind.advice(resource, priority), kind.models.get(&resource)) {
            measured.learn(resource, &advice, model.hours(), priority);
        }
    }
    measured
}
