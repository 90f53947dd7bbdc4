//! What is kept for people to look at, and nothing is decided by: the order of the tasks, the latest decisions of the whole
//! cluster, and what running tasks have used. None of it is durable, and all of it is bounded.

use std::collections::{BTreeMap, HashMap, VecDeque};

use shaper_core::{
    id::TaskId,
    limits::Limit,
    spec::{Decision, DecisionKind, Demand},
    task::{TaskStatus, UnixNanos, Usage},
    units::{BitsPerSec, Bytes, Millicores},
};

/// Decisions that are kept.
pub const DECISIONS: usize = 512;
/// Tasks whose use over time is kept. Of those beyond, what has ended first makes room, and nothing that runs.
pub const SERIES: usize = 2048;
/// Samples of each: ten minutes.
pub const SAMPLES: usize = 120;
/// How far two samples are apart at least, ns.
pub const SAMPLE_EVERY: u64 = 5_000_000_000;

/// A decision, as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub struct Noted {
    /// Of all that were noted, from 1.
    pub number: u64,
    /// About which task.
    pub task: TaskId,
    /// When.
    pub at: UnixNanos,
    /// `broker`, or the name of a node.
    pub by: String,
    /// What.
    pub kind: DecisionKind,
    /// Why.
    pub reason: String,
}

/// What a task used between two looks, and what it might use at the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When the second was.
    pub at: UnixNanos,
    /// Mean.
    pub cpu: Millicores,
    /// At the second look.
    pub memory: Option<Bytes>,
    /// Mean, on the wire.
    pub sent: BitsPerSec,
    /// Mean, on the wire.
    pub received: BitsPerSec,
    /// For how much of the time its CPU limit stopped it, thousandths; with several threads each counts.
    pub throttled_permille: Option<u64>,
    /// Reserved.
    pub request: Demand,
    /// In force.
    pub cpu_limit: Limit<Millicores>,
    /// In force.
    pub memory_limit: Limit<Bytes>,
    /// In force.
    pub net_limit: Limit<BitsPerSec>,
    /// Of what the node sends, where it is divided.
    pub net_granted: Option<BitsPerSec>,
}

#[derive(Clone, Debug)]
struct Series {
    attempt: u32,
    last: Usage,
    samples: VecDeque<Sample>,
    is_over: bool,
}

impl Series {
    fn begin(status: &TaskStatus) -> Series {
        Series { attempt: status.attempt, last: status.usage, samples: VecDeque::new(), is_over: false }
    }
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    by_sequence: BTreeMap<u64, TaskId>,
    decisions: VecDeque<Noted>,
    noted: u64,
    series: HashMap<TaskId, Series>,
    /// Those that are over, or were once, in the order in which that came to be.
    over: VecDeque<TaskId>,
}

impl Shown {
    /// A task is there.
    pub(super) fn list(&mut self, sequence: u64, id: TaskId) {
        self.by_sequence.insert(sequence, id);
    }

    /// A task is forgotten.
    pub(super) fn forget(&mut self, sequence: u64, id: &TaskId) {
        self.by_sequence.remove(&sequence);
        self.series.remove(id);
    }

    /// The tasks that were submitted before the one with this sequence, the latest first; `None`: all.
    pub fn tasks_before(&self, sequence: Option<u64>) -> impl Iterator<Item = (u64, &TaskId)> {
        self.by_sequence.range(..sequence.unwrap_or(u64::MAX)).rev().map(|(sequence, id)| (*sequence, id))
    }

    /// Something was decided.
    pub(super) fn note(&mut self, task: &TaskId, decision: &Decision) {
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        self.noted += 1;
        let Decision { at, by, kind, reason, nodes: _ } = decision;
        let (task, by, reason) = (task.clone(), by.clone(), reason.clone());
        self.decisions.push_back(Noted { number: self.noted, task, at: *at, by, kind: *kind, reason });
    }

    /// The latest decisions, the last first.
    pub fn decisions(&self) -> impl Iterator<Item = &Noted> {
        self.decisions.iter().rev()
    }

    /// How many decisions there were.
    pub fn noted(&self) -> u64 {
        self.noted
    }

    /// What a running task has used until now; `request` is reserved for it.
    pub(super) fn sample(&mut self, id: &TaskId, request: &Demand, status: &TaskStatus, at: UnixNanos) {
        let Some(series) = self.series.get_mut(id) else {
            if self.has_room() {
                self.series.insert(id.clone(), Series::begin(status));
            }
            return;
        };
        let usage = &status.usage;
        // Another attempt, or counters that begin anew.
        if series.attempt != status.attempt || usage.cpu_time_ns < series.last.cpu_time_ns {
            *series = Series::begin(status);
            return;
        }
        let over = usage.at_monotonic_ns.saturating_sub(series.last.at_monotonic_ns);
        if over < SAMPLE_EVERY {
            return;
        }
        let rate = |now: u64, before: u64, scale: u64| {
            let amount = u128::from(now.saturating_sub(before)) * u128::from(scale);
            u64::try_from(amount / u128::from(over)).unwrap_or(u64::MAX)
        };
        let bits = |now: u64, before: u64| BitsPerSec(rate(now, before, 8_000_000_000));
        let last = &series.last;
        let throttled = usage.cpu_throttled_ns.zip(last.cpu_throttled_ns);
        let sample = Sample {
            at,
            cpu: Millicores(rate(usage.cpu_time_ns, last.cpu_time_ns, 1000)),
            memory: usage.memory_bytes.map(Bytes),
            sent: bits(usage.egress.bytes, last.egress.bytes),
            received: bits(usage.ingress.bytes, last.ingress.bytes),
            throttled_permille: throttled.map(|(now, before)| rate(now, before, 1000)),
            request: *request,
            cpu_limit: status.limits.cpu,
            memory_limit: status.limits.memory,
            net_limit: status.limits.net_egress,
            net_granted: usage.egress_granted_bps.map(BitsPerSec),
        };
        if series.samples.len() == SAMPLES {
            series.samples.pop_front();
        }
        series.samples.push_back(sample);
        series.last = *usage;
    }

    /// A task is on no node any more. What it used is kept while there is room.
    pub(super) fn end(&mut self, id: &TaskId) {
        if let Some(series) = self.series.get_mut(id)
            && !series.is_over
        {
            series.is_over = true;
            self.over.push_back(id.clone());
            while self.over.len() > SERIES {
                self.drop_first();
            }
        }
    }

    /// What a task used, the oldest first; nothing is known of those beyond [`SERIES`].
    pub fn samples(&self, id: &TaskId) -> impl Iterator<Item = &Sample> {
        self.series.get(id).into_iter().flat_map(|series| &series.samples)
    }

    fn has_room(&mut self) -> bool {
        while self.series.len() >= SERIES && !self.over.is_empty() {
            self.drop_first();
        }
        self.series.len() < SERIES
    }

    /// One of those that are over goes; if it runs again, it stays.
    fn drop_first(&mut self) {
        if let Some(id) = self.over.pop_front()
            && self.series.get(&id).is_some_and(|series| series.is_over)
        {
            self.series.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::task::{Phase, Traffic};

    use super::{
        super::tests::{SECOND, id, status},
        *,
    };

    const REQUEST: Demand = Demand {
        cpu: Millicores(100),
        memory: Bytes(1 << 20),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };

    fn at(task: &str, attempt: u32, second: u64, cpu_time_ns: u64) -> TaskStatus {
        let usage = Usage {
            at_monotonic_ns: second * SECOND,
            cpu_time_ns,
            egress: Traffic { bytes: cpu_time_ns / 8, packets: 0 },
            memory_bytes: Some(4096),
            ..Usage::default()
        };
        TaskStatus { usage, ..status(task, attempt, Phase::Running) }
    }

    #[test]
    fn samples_are_means_five_seconds_apart_and_the_oldest_go() {
        let (mut shown, task) = (Shown::default(), id("t"));
        let seconds = SAMPLE_EVERY / SECOND * (SAMPLES as u64 + 2);
        for second in 0..=seconds {
            // Half a core.
            shown.sample(&task, &REQUEST, &at("t", 1, second, second * SECOND / 2), second * SECOND);
        }
        let samples: Vec<_> = shown.samples(&task).collect();
        assert_eq!(samples.len(), SAMPLES);
        assert!(samples.iter().all(|sample| sample.cpu == Millicores(500)), "{samples:?}");
        assert_eq!(samples[0].sent, BitsPerSec(SECOND / 2));
        assert!(samples.windows(2).all(|two| two[1].at - two[0].at == SAMPLE_EVERY));
        shown.sample(&task, &REQUEST, &at("t", 2, seconds + 1, 0), 0);
        assert_eq!(shown.samples(&task).count(), 0, "another attempt begins anew");
    }

    #[test]
    fn what_is_over_makes_room_and_what_runs_does_not() {
        let mut shown = Shown::default();
        let name = |number: usize| format!("t{number}");
        for number in 0..=SERIES {
            shown.sample(&id(&name(number)), &REQUEST, &at(&name(number), 1, 0, 0), 0);
        }
        assert_eq!(shown.series.len(), SERIES);
        assert!(!shown.series.contains_key(&id(&name(SERIES))), "there was no room for the last");
        shown.end(&id("t7"));
        assert!(shown.series.contains_key(&id("t7")), "it is kept while nobody needs the room");
        shown.sample(&id("new"), &REQUEST, &at("new", 1, 0, 0), 0);
        assert!(!shown.series.contains_key(&id("t7")) && shown.series.contains_key(&id("new")));
        for attempt in 2..10 {
            shown.end(&id("t8"));
            shown.sample(&id("t8"), &REQUEST, &at("t8", attempt, 0, 0), 0);
        }
        shown.sample(&id("newer"), &REQUEST, &at("newer", 1, 0, 0), 0);
        assert!(shown.series.contains_key(&id("t8")), "it runs again");
    }
}
