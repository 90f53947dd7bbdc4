//! What finished tasks of one name used, and the profile that follows from it.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use shaper_core::{
    profile::{Advice, Expected, Resource},
    spec::{Demand, Priority},
    task::{TaskStatus, Traffic, UnixNanos},
    units::{BitsPerSec, Bytes, Millicores},
};

/// A profile asks for no less memory: what runs for a moment has no peak worth the name.
const MEMORY_FLOOR: Bytes = Bytes(64 << 20);

/// Executions whose numbers are kept.
const RECENT: usize = 8;
/// What is added to the highest measurement, in percent.
const MARGIN_PERCENT: u64 = 15;
/// A new measurement moves a mean by this part of the difference.
const DECAY: u64 = 8;
/// Users that are remembered as having run a task of this name.
const USERS: usize = 64;
/// What was measured for less is not believed against what finished tasks used.
const CONFIDENT_HOURS: f64 = 1.0;
const NANOS: u128 = 1_000_000_000;

/// What one execution used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// CPU time by run time.
    pub cpu: Millicores,
    /// As last seen, which need not be its peak.
    pub memory: Option<Bytes>,
    /// Of the busier direction, by run time.
    pub network: BitsPerSec,
    /// From start to end.
    pub runtime_millis: u64,
}

impl Sample {
    /// What an execution used that ended at `ended_at`.
    pub fn of(status: &TaskStatus, ended_at: UnixNanos) -> Sample {
        let runtime = ended_at.saturating_sub(status.created_at);
        let per_second = |amount: u128| {
            let rate = if runtime == 0 { 0 } else { amount * NANOS / u128::from(runtime) };
            u64::try_from(rate).unwrap_or(u64::MAX)
        };
        let bits = |traffic: Traffic| u128::from(traffic.bytes) * 8;
        let usage = &status.usage;
        Sample {
            // Nanoseconds in a second are thousandths of a core when divided by a million.
            cpu: Millicores(per_second(u128::from(usage.cpu_time_ns)) / 1_000_000),
            memory: usage.memory_bytes.map(Bytes),
            network: BitsPerSec(per_second(bits(usage.egress).max(bits(usage.ingress)))),
            runtime_millis: runtime / 1_000_000,
        }
    }
}

/// A number over all executions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// The highest.
    pub max: u64,
    /// The mean, in which an older execution counts for less.
    pub mean: u64,
}

impl Measure {
    fn add(&mut self, value: u64, is_first: bool) {
        self.max = self.max.max(value);
        self.mean = match is_first {
            true => value,
            false if value >= self.mean => self.mean + (value - self.mean) / DECAY,
            false => self.mean - (self.mean - value) / DECAY,
        };
    }
}

/// What finished tasks of one name used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// Their namespace.
    pub namespace: String,
    /// Their name.
    pub name: String,
    /// How many there were.
    pub executions: u64,
    /// CPU, in thousandths of a core.
    pub cpu: Measure,
    /// Memory, in bytes.
    pub memory: Measure,
    /// Network, in bits a second.
    pub network: Measure,
    /// Run time, in milliseconds.
    pub runtime: Measure,
    /// The latest executions, newest last.
    pub recent: VecDeque<Sample>,
    /// What the latest asked for.
    pub requested: Demand,
    /// Whose they were: these may see it.
    pub users: BTreeSet<u32>,
}

/// A demand that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The demand.
    pub demand: Demand,
    /// The run time.
    pub runtime_seconds: u64,
    /// Executions in the history.
    pub executions: u64,
    /// What was learnt how.
    pub notes: Vec<String>,
    /// Of each resource that was measured while tasks ran: how much of it a new task should request, and why.
    pub estimates: Vec<Estimate>,
}

/// How much of a resource a new task should request, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Of what.
    pub resource: Resource,
    /// How much, in the unit of the resource.
    pub request: u64,
    /// How long tasks were seen to use it, h; what was seen long ago counts for less.
    pub hours: f64,
    /// What is to be expected of a limit at the request.
    pub expected: Expected,
}

impl Measured {
    /// Takes what was learnt of a resource while tasks ran in the place of what those that finished used on average; as long as
    /// that is little, the higher of both.
    pub(super) fn learn(&mut self, resource: Resource, advice: &Advice, hours: f64, priority: Priority) {
        let Advice { limit: request, expected, .. } = *advice;
        self.estimates.push(Estimate { resource, request, hours, expected });
        let demand = &mut self.demand;
        match resource {
            Resource::Cpu if hours < CONFIDENT_HOURS => demand.cpu = demand.cpu.max(Millicores(request)),
            Resource::Cpu => demand.cpu = Millicores(request).max(Millicores::MIN),
            Resource::Memory if self.executions == 0 => demand.memory = Bytes(request).max(MEMORY_FLOOR),
            // A peak that was seen once counts, however short it was.
            Resource::Memory => demand.memory = demand.memory.max(Bytes(request)),
            Resource::NetworkIn | Resource::NetworkOut if BitsPerSec(request) >= BitsPerSec::MIN => {
                demand.network = demand.network.max(Some(BitsPerSec(request)));
            }
            _ => return,
        }
        let Expected { touched: _, unserved, unused } = expected;
        self.notes.push(format!(
            "{}: measured for {hours:.1} h; for a task of {priority} priority {:.1} % of its use is expected above, and {:.0} % of \
             it unused",
            resource.name(),
            unserved * 100.0,
            unused * 100.0
        ));
    }
}

impl History {
    /// A history without executions.
    pub fn new(namespace: String, name: String, requested: Demand) -> History {
        History {
            namespace,
            name,
            executions: 0,
            cpu: Measure::default(),
            memory: Measure::default(),
            network: Measure::default(),
            runtime: Measure::default(),
            recent: VecDeque::new(),
            requested,
            users: BTreeSet::new(),
        }
    }

    /// One execution more.
    pub fn add(&mut self, sample: Sample, requested: Demand, user: u32) {
        let is_first = self.executions == 0;
        self.executions += 1;
        self.requested = requested;
        self.cpu.add(sample.cpu.0, is_first);
        self.network.add(sample.network.0, is_first);
        self.runtime.add(sample.runtime_millis, is_first);
        if let Some(memory) = sample.memory {
            self.memory.add(memory.0, self.memory == Measure::default());
        }
        self.knows(user);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(sample);
    }

    /// Notes whose tasks these are. True: it was not known.
    pub(super) fn knows(&mut self, user: u32) -> bool {
        self.users.len() < USERS && self.users.insert(user)
    }

    /// The highest of the recent executions and a margin.
    pub fn measured(&self) -> Measured {
        if self.recent.is_empty() {
            return Measured {
                demand: Demand { network: None, ..self.requested },
                runtime_seconds: 0,
                executions: self.executions,
                notes: vec![
                    "none has finished yet: what was not measured is what the first asked for".to_owned(),
                ],
                estimates: Vec::new(),
            };
        }
        let with_margin = |value: u64| {
            let value = u128::from(value) * u128::from(100 + MARGIN_PERCENT);
            u64::try_from(value.div_ceil(100)).unwrap_or(u64::MAX)
        };
        let highest = |of: fn(&Sample) -> u64| with_margin(self.recent.iter().map(of).max().unwrap_or(0));
        let memory = self.recent.iter().filter_map(|sample| sample.memory).max();
        let network = BitsPerSec(highest(|sample| sample.network.0));
        let runtime_millis = highest(|sample| sample.runtime_millis);
        let mut notes = vec![
            format!(
                "each number is the highest of the last {} executions and {MARGIN_PERCENT} %",
                self.recent.len()
            ),
            "cpu: mean of each execution, from its CPU time".to_owned(),
        ];
        notes.push(match memory {
            Some(_) => {
                format!("memory: the peak that the kernel counted, but at least {MEMORY_FLOOR}: a little more is no waste, and less could kill")
            }
            None => "memory: not measured; this is what the latest execution asked for".to_owned(),
        });
        notes.push(if network >= BitsPerSec::MIN {
            "network: mean of each execution's busier direction".to_owned()
        } else {
            "network: too little to state".to_owned()
        });
        Measured {
            demand: Demand {
                cpu: Millicores(highest(|sample| sample.cpu.0)).max(Millicores::MIN),
                memory: memory
                    .map_or(self.requested.memory, |memory| Bytes(with_margin(memory.0)).max(MEMORY_FLOOR)),
                gpu_memory: None,
                network: (network >= BitsPerSec::MIN).then_some(network),
                storage_io: None,
            },
            runtime_seconds: runtime_millis.div_ceil(1000),
            executions: self.executions,
            notes,
            estimates: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Demand = Demand {
        cpu: Millicores(1000),
        memory: Bytes(1 << 30),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };

    fn sample(cpu: u64, memory: Option<u64>, network: u64) -> Sample {
        Sample {
            cpu: Millicores(cpu),
            memory: memory.map(Bytes),
            network: BitsPerSec(network),
            runtime_millis: 10_000,
        }
    }

    #[test]
    fn a_profile_is_the_highest_of_the_last_eight_and_a_margin() {
        let mut history = History::new("default".into(), "etl".into(), ASKED);
        history.add(sample(4000, Some(1 << 30), 0), ASKED, 1000);
        for _ in 0..8 {
            history.add(sample(1000, Some(100 << 20), 1_000_000), ASKED, 1000);
        }
        let measured = history.measured();
        assert_eq!(measured.demand.cpu, Millicores(1150), "the one with 4 cores was the ninth last");
        assert_eq!(measured.demand.memory, Bytes(115 << 20));
        assert_eq!(measured.demand.network, Some(BitsPerSec(1_150_000)));
        assert_eq!((measured.executions, measured.runtime_seconds), (9, 12));
        assert_eq!(history.cpu.max, 4000);
        assert!((1000..4000).contains(&history.cpu.mean), "{}", history.cpu.mean);
        assert!(measured.notes.iter().any(|note| note.contains("the peak")));
    }

    #[test]
    fn what_was_not_measured_is_not_made_up() {
        let mut history = History::new("default".into(), "etl".into(), ASKED);
        history.add(sample(0, None, 10), ASKED, 1000);
        let measured = history.measured();
        assert_eq!(measured.demand, Demand { cpu: Millicores::MIN, ..ASKED });
        assert!(measured.notes.iter().any(|note| note.contains("memory: not measured")));
    }
}
