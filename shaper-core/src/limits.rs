//! What a task may use.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::gpu::CardSet;
use crate::units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Milliwatts, Weight};

/// A ceiling, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit<T> {
    /// No ceiling.
    #[default]
    Unlimited,
    /// At most this much.
    At(T),
}

impl<T> Limit<T> {
    /// The same ceiling in other terms.
    pub fn map<U>(self, convert: impl FnOnce(T) -> U) -> Limit<U> {
        match self {
            Limit::Unlimited => Limit::Unlimited,
            Limit::At(value) => Limit::At(convert(value)),
        }
    }
}

impl<T: Copy> Limit<T> {
    /// The ceiling, if there is one.
    pub fn at(&self) -> Option<T> {
        match self {
            Limit::Unlimited => None,
            Limit::At(value) => Some(*value),
        }
    }
}

impl<T: Copy + Ord> Limit<T> {
    /// The lower of two ceilings.
    #[must_use]
    pub fn min(self, other: Limit<T>) -> Limit<T> {
        match (self, other) {
            (Limit::At(one), Limit::At(other)) => Limit::At(one.min(other)),
            (Limit::At(only), Limit::Unlimited) | (Limit::Unlimited, Limit::At(only)) => Limit::At(only),
            (Limit::Unlimited, Limit::Unlimited) => Limit::Unlimited,
        }
    }
}

impl<T: fmt::Display> fmt::Display for Limit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Unlimited => f.pad("max"),
            Limit::At(value) => value.fmt(f),
        }
    }
}

/// Everything that shaper limits of one task, or takes from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// CPU time per time (`cpu.max`).
    pub cpu: Limit<Millicores>,
    /// Share of a contended CPU (`cpu.weight`); `None` leaves it as it was found.
    pub cpu_weight: Option<Weight>,
    /// Memory (`memory.max`).
    pub memory: Limit<Bytes>,
    /// Sent on the wire, all TCP sockets together.
    pub net_egress: Limit<BitsPerSec>,
    /// Operations on block devices: reads and writes, of all devices together (`io.max`).
    #[serde(default)]
    pub storage_io: Limit<Iops>,
    /// Share of contended block devices (`io.weight`); `None` leaves it as it was found.
    #[serde(default)]
    pub storage_io_weight: Option<Weight>,
    /// What the 99th percentile of its block IO's latency is promised to be, on each device; others are held back
    /// for it.
    #[serde(default)]
    pub storage_io_latency: Limit<Micros>,
    /// Whether memory that it does not use is taken away ([`crate::idle`]); `None`: as the node does with all.
    #[serde(default)]
    pub reclaim_idle: Option<bool>,
    /// Of what the node sends: what the task has in any case. `None`: nothing.
    #[serde(default)]
    pub net_egress_guarantee: Option<BitsPerSec>,
    /// Its share of the rest, relative to the others'; `None`: [`Weight::DEFAULT`].
    #[serde(default)]
    pub net_egress_weight: Option<Weight>,
    /// Received on the wire through the uplinks, by TCP and UDP together.
    #[serde(default)]
    pub net_ingress: Limit<BitsPerSec>,
    /// GPU cards that it may open. `None`: of one that was launched, none; of one that was adopted, those that it could before.
    #[serde(default)]
    pub gpu_cards: Option<CardSet>,
    /// Memory of each of those cards.
    #[serde(default)]
    pub gpu_memory: Limit<Bytes>,
    /// Power that each of them draws; a card has one limit, so nobody else can have the card.
    #[serde(default)]
    pub gpu_power: Limit<Milliwatts>,
}

/// A change of some limits: what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsChange {
    /// New CPU limit.
    pub cpu: Option<Limit<Millicores>>,
    /// New CPU weight.
    pub cpu_weight: Option<Weight>,
    /// New memory limit.
    pub memory: Option<Limit<Bytes>>,
    /// New network limit.
    pub net_egress: Option<Limit<BitsPerSec>>,
    /// New limit of block IO.
    #[serde(default)]
    pub storage_io: Option<Limit<Iops>>,
    /// New weight of block IO.
    #[serde(default)]
    pub storage_io_weight: Option<Weight>,
    /// New promise of a latency.
    #[serde(default)]
    pub storage_io_latency: Option<Limit<Micros>>,
    /// Whether memory that it does not use is to be taken away.
    #[serde(default)]
    pub reclaim_idle: Option<bool>,
    /// New guarantee of what it can send; 0: none.
    #[serde(default)]
    pub net_egress_guarantee: Option<BitsPerSec>,
    /// New weight of what it sends.
    #[serde(default)]
    pub net_egress_weight: Option<Weight>,
    /// New limit of what it receives.
    #[serde(default)]
    pub net_ingress: Option<Limit<BitsPerSec>>,
    /// New cards, in place of those before.
    #[serde(default)]
    pub gpu_cards: Option<CardSet>,
    /// New limit of the memory of each card.
    #[serde(default)]
    pub gpu_memory: Option<Limit<Bytes>>,
    /// New limit of the power of each card.
    #[serde(default)]
    pub gpu_power: Option<Limit<Milliwatts>>,
}

impl LimitsChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == LimitsChange::default()
    }
}

impl Limits {
    /// These limits after `change`.
    #[must_use]
    pub fn with(self, change: &LimitsChange) -> Limits {
        Limits {
            cpu: change.cpu.unwrap_or(self.cpu),
            cpu_weight: change.cpu_weight.or(self.cpu_weight),
            memory: change.memory.unwrap_or(self.memory),
            net_egress: change.net_egress.unwrap_or(self.net_egress),
            storage_io: change.storage_io.unwrap_or(self.storage_io),
            storage_io_weight: change.storage_io_weight.or(self.storage_io_weight),
            storage_io_latency: change.storage_io_latency.unwrap_or(self.storage_io_latency),
            reclaim_idle: change.reclaim_idle.or(self.reclaim_idle),
            net_egress_guarantee: change.net_egress_guarantee.or(self.net_egress_guarantee),
            net_egress_weight: change.net_egress_weight.or(self.net_egress_weight),
            net_ingress: change.net_ingress.unwrap_or(self.net_ingress),
            gpu_cards: change.gpu_cards.or(self.gpu_cards),
            gpu_memory: change.gpu_memory.unwrap_or(self.gpu_memory),
            gpu_power: change.gpu_power.unwrap_or(self.gpu_power),
        }
    }

    /// These limits with no ceiling of CPU, memory, network and block IO above that of `ceilings`; all else as it is.
    #[must_use]
    pub fn at_most(self, ceilings: &Limits) -> Limits {
        Limits {
            cpu: self.cpu.min(ceilings.cpu),
            memory: self.memory.min(ceilings.memory),
            net_egress: self.net_egress.min(ceilings.net_egress),
            net_ingress: self.net_ingress.min(ceilings.net_ingress),
            storage_io: self.storage_io.min(ceilings.storage_io),
            ..self
        }
    }

    /// The change that leads from no limits to these.
    pub fn as_change(&self) -> LimitsChange {
        fn set<T: Copy>(limit: Limit<T>) -> Option<Limit<T>> {
            limit.at().map(Limit::At)
        }
        LimitsChange {
            cpu: set(self.cpu),
            cpu_weight: self.cpu_weight,
            memory: set(self.memory),
            net_egress: set(self.net_egress),
            storage_io: set(self.storage_io),
            storage_io_weight: self.storage_io_weight,
            storage_io_latency: set(self.storage_io_latency),
            reclaim_idle: self.reclaim_idle,
            net_egress_guarantee: self.net_egress_guarantee,
            net_egress_weight: self.net_egress_weight,
            net_ingress: set(self.net_ingress),
            gpu_cards: self.gpu_cards,
            gpu_memory: set(self.gpu_memory),
            gpu_power: set(self.gpu_power),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_touches_only_what_it_names() {
        let before = Limits {
            cpu: Limit::At(Millicores(500)),
            memory: Limit::At(Bytes(1 << 30)),
            ..Limits::default()
        };
        let change = LimitsChange { cpu: Some(Limit::Unlimited), ..LimitsChange::default() };
        let after = before.with(&change);
        assert_eq!(after, Limits { cpu: Limit::Unlimited, ..before });
        assert_eq!(Limits::default().with(&before.as_change()), before);
        assert!(Limits::default().as_change().is_empty());
    }

    #[test]
    fn unlimited_is_a_word_not_a_number() {
        assert_eq!(Limit::<Bytes>::Unlimited.to_string(), "max");
        assert_eq!(serde_json::to_string(&Limit::At(Bytes(5))).unwrap(), r#"{"at":5}"#);
        assert_eq!(serde_json::to_string(&Limit::<Bytes>::Unlimited).unwrap(), r#""unlimited""#);
    }
}
