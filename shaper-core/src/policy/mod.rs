//! Which policy gives a task which setting.
//!
//! A policy covers the tasks of its priority in its namespace, as far as its [`Selector`] selects them.
//! Several may cover one task and want the same [`Setting`] of it. One of them wins, by the first of
//! these in which they differ:
//!
//! 1. **Name.** A selector with an exact name comes before one with a pattern, and that before one without.
//! 2. **Labels.** More of them come before fewer.
//! 3. **Pattern.** More characters besides `*` come before fewer.
//! 4. **Policy name**, in the order of its bytes.
//!
//! Names are unique in a set, so two policies always differ in the last, and the order of the set does
//! not matter. Each setting is decided by itself, and a policy that leaves one out has no say in it. Who
//! was overruled, and by which rule, is part of the answer.

mod selector;
#[cfg(test)]
mod tests;

use std::{
    cmp::{Ordering, Reverse},
    collections::BTreeMap,
    fmt,
};

use serde::{Deserialize, Serialize};

pub use selector::{InvalidPattern, NamePattern, Selector};

use crate::{
    limits::Limit,
    spec::{Policy, Priority, TaskSpec},
    units::{Bytes, Millicores},
};

/// What of a task decides which policies cover it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its priority.
    pub priority: Priority,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
}

impl<'a> Subject<'a> {
    /// Of a task.
    pub fn of(spec: &'a TaskSpec) -> Subject<'a> {
        Subject {
            priority: spec.profile.priority,
            namespace: &spec.namespace,
            name: &spec.name,
            labels: &spec.labels,
        }
    }
}

/// Something that a policy says of the tasks that it covers, and that one policy alone can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting {
    /// When others are held back or evicted for them: the whole behavior.
    Eviction,
    /// Whether lower ones end for them where they fit on no node.
    Preemption,
    /// The most CPU that they are granted.
    CpuLimit,
    /// The most memory of a GPU card that they are granted.
    GpuMemoryLimit,
    /// How far down what is reserved for them may come, so that another task has room.
    Floors,
}

impl Setting {
    /// All of them.
    pub const ALL: [Setting; 5] =
        [Setting::Eviction, Setting::Preemption, Setting::CpuLimit, Setting::GpuMemoryLimit, Setting::Floors];

    /// What a policy says of it, for people; `None`: nothing.
    pub fn shown(self, policy: &Policy) -> Option<String> {
        match self {
            Setting::Eviction => policy.eviction_threshold_permille.map(|permille| {
                let others = if policy.preemption_enabled { "hold back or evict" } else { "hold back" };
                let (percent, tenths) = (permille / 10, permille % 10);
                let window = policy.window_millis;
                format!("{others} lower priorities from {percent}.{tenths} % of the CPU over {window} ms")
            }),
            Setting::Preemption => {
                policy.preemption_enabled.then(|| "end lower priorities where they fit on no node".to_owned())
            }
            Setting::CpuLimit => policy.limits.cpu.map(|cpu| format!("at most {cpu} cores")),
            Setting::GpuMemoryLimit => {
                policy.limits.gpu_memory.map(|memory| format!("at most {memory} of a GPU card"))
            }
            Setting::Floors => policy.floors.shown(),
        }
    }

    fn is_in(self, policy: &Policy) -> bool {
        match self {
            Setting::Eviction => policy.eviction_threshold_permille.is_some(),
            Setting::Preemption => policy.preemption_enabled,
            Setting::CpuLimit => policy.limits.cpu.is_some(),
            Setting::GpuMemoryLimit => policy.limits.gpu_memory.is_some(),
            Setting::Floors => policy.floors != PolicyFloors::default(),
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Setting::Eviction => "behavior",
            Setting::Preemption => "behavior.preemption_enabled",
            Setting::CpuLimit => "limits.cpu",
            Setting::GpuMemoryLimit => "limits.gpu_memory_gb",
            Setting::Floors => "floors",
        })
    }
}

/// What a policy limits. `None`: it has no say in that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyLimits {
    /// CPU.
    pub cpu: Option<Millicores>,
    /// Memory of a GPU card.
    #[serde(default)]
    pub gpu_memory: Option<Bytes>,
}

/// How far down what is reserved for a task may come while it runs, so that another task has room. `None`: what it requests
/// stays reserved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFloors {
    /// CPU.
    pub cpu: Option<Millicores>,
    /// Memory.
    pub memory: Option<Bytes>,
}

impl PolicyFloors {
    fn shown(&self) -> Option<String> {
        let PolicyFloors { cpu, memory } = *self;
        let (cpu, memory) = (cpu.map(|cpu| format!("{cpu} cores")), memory.map(|memory| memory.to_string()));
        let floors = match (cpu, memory) {
            (Some(cpu), Some(memory)) => format!("{cpu} and {memory}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return None,
        };
        Some(format!("no less than {floors} reserved, where others need the room"))
    }
}

/// Why one policy comes before another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// It names the task more exactly.
    Name,
    /// It asks for more labels.
    Labels,
    /// Its pattern has more characters besides `*`.
    Pattern,
    /// Its own name comes first.
    PolicyName,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Rule::Name => "names the task more exactly",
            Rule::Labels => "asks for more labels",
            Rule::Pattern => "has the longer pattern",
            Rule::PolicyName => "comes first by its name",
        })
    }
}

/// A setting of a task, and the policy that gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given<'a> {
    /// Which.
    pub setting: Setting,
    /// Who.
    pub policy: &'a Policy,
    /// Who wanted the same, the next best first.
    pub overruled: Vec<Overruled<'a>>,
}

/// A policy that wanted a setting that another one gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overruled<'a> {
    /// Which.
    pub policy: &'a Policy,
    /// What the other one has before it.
    pub rule: Rule,
}

impl Policy {
    /// Whether it is for this task.
    pub fn covers(&self, subject: &Subject<'_>) -> bool {
        self.priority == subject.priority
            && self.namespace == subject.namespace
            && self.selector.selects(subject)
    }
}

/// What these policies, of which no two have one name, give a task: each setting at most once, in order.
pub fn resolve<'a>(policies: impl IntoIterator<Item = &'a Policy>, subject: &Subject<'_>) -> Vec<Given<'a>> {
    let mut covering: Vec<&Policy> = policies.into_iter().filter(|policy| policy.covers(subject)).collect();
    covering.sort_by(|one, other| compare(one, other).0);
    let given = |setting: Setting| {
        let mut wanting = covering.iter().copied().filter(|policy| setting.is_in(policy));
        let policy = wanting.next()?;
        let overruled = wanting.map(|other| Overruled { policy: other, rule: compare(policy, other).1 });
        Some(Given { setting, policy, overruled: overruled.collect() })
    };
    Setting::ALL.into_iter().filter_map(given).collect()
}

/// Which of two comes first, and the rule that says so.
fn compare(one: &Policy, other: &Policy) -> (Ordering, Rule) {
    type Rank = fn(&Selector) -> usize;
    const RANKS: [(Rule, Rank); 3] = [
        (Rule::Name, |selector| match &selector.name {
            Some(pattern) if pattern.is_exact() => 2,
            Some(_) => 1,
            None => 0,
        }),
        (Rule::Labels, |selector| selector.labels.len()),
        (Rule::Pattern, |selector| selector.name.as_ref().map_or(0, NamePattern::literals)),
    ];
    for (rule, rank) in RANKS {
        let order = Reverse(rank(&one.selector)).cmp(&Reverse(rank(&other.selector)));
        if order.is_ne() {
            return (order, rule);
        }
    }
    (one.policy_name.cmp(&other.policy_name), Rule::PolicyName)
}

/// The policy by which lower tasks end for this one where it fits on no node.
pub fn permit<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    subject: &Subject<'_>,
) -> Option<&'a Policy> {
    giving(Setting::Preemption, policies, subject)
}

/// The policy that says how far down what is reserved for a task may come.
pub fn floors<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    subject: &Subject<'_>,
) -> Option<&'a Policy> {
    giving(Setting::Floors, policies, subject)
}

/// The policy that gives a task one setting.
fn giving<'a>(
    setting: Setting,
    policies: impl IntoIterator<Item = &'a Policy>,
    subject: &Subject<'_>,
) -> Option<&'a Policy> {
    let wanting = policies.into_iter().filter(|policy| setting.is_in(policy) && policy.covers(subject));
    wanting.min_by(|one, other| compare(one, other).0)
}

/// What policies give one task, apart from the policies themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effective {
    /// Name of the policy that holds others back and evicts them for it.
    pub eviction: Option<String>,
    /// Name of the policy that ends others for it.
    pub preemption: Option<String>,
    /// The CPU limit that one of them sets.
    pub cpu: Option<Millicores>,
    /// The most memory of a GPU card, by one of them.
    pub gpu_memory: Option<Bytes>,
}

impl Effective {
    /// What these policies give a task.
    pub fn of<'a>(policies: impl IntoIterator<Item = &'a Policy>, spec: &TaskSpec) -> Effective {
        let mut effective = Effective::default();
        for Given { setting, policy, .. } in resolve(policies, &Subject::of(spec)) {
            match setting {
                Setting::Eviction => effective.eviction = Some(policy.policy_name.clone()),
                Setting::Preemption => effective.preemption = Some(policy.policy_name.clone()),
                // The broker's.
                Setting::Floors => {}
                Setting::CpuLimit => effective.cpu = policy.limits.cpu,
                Setting::GpuMemoryLimit => effective.gpu_memory = policy.limits.gpu_memory,
            }
        }
        effective
    }

    /// The CPU limit of a task: the lower of its own and the policy's. What it requests is
    /// guaranteed, so a policy does not go below that.
    pub fn cpu_limit(&self, spec: &TaskSpec) -> Limit<Millicores> {
        let Some(most) = self.cpu else { return spec.limits.cpu };
        let most = most.max(spec.profile.demand.cpu);
        Limit::At(spec.limits.cpu.at().map_or(most, |own| own.min(most)))
    }

    /// The most memory of a card that a task may grow to: the lower of its own limit and the policy's, where there is any;
    /// else what it requests. Never below that.
    pub fn gpu_memory_limit(&self, spec: &TaskSpec) -> Limit<Bytes> {
        let request = spec.profile.demand.gpu_memory;
        let own = spec.limits.gpu_memory.at();
        let least = own.into_iter().chain(self.gpu_memory).min().or(request);
        least.map_or(Limit::Unlimited, |limit| Limit::At(limit.max(request.unwrap_or(Bytes(0)))))
    }
}
