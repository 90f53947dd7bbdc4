//! Namespaces: quotas, and who has had how much.
//!
//! Between namespaces the order is that of dominant-resource fairness (Ghodsi et al., NSDI '11): next is the one whose
//! largest share of any resource, by its weight, is the smallest. Shares are of what all nodes have, of CPU, memory and GPUs.

use serde::{Deserialize, Serialize};

use crate::place::Request;

/// CPU in millicores, memory in bytes, GPUs in thousandths.
pub type Amounts = [u64; 3];

/// The names of [`Amounts`].
pub const COUNTED: [&str; 3] = ["cpu", "memory", "gpu"];

/// What a namespace may use at once, and how it weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Quota {
    /// Of each resource; `None`: as much as there is.
    pub most: [Option<u64>; 3],
    /// Twice the weight, twice the share.
    pub weight: u32,
}

impl Default for Quota {
    fn default() -> Quota {
        Quota { most: [None; 3], weight: 1 }
    }
}

/// That a namespace has no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverQuota {
    /// Of which resource: a place in [`COUNTED`].
    pub resource: usize,
    /// What it wants beside what it uses.
    pub wanted: u64,
    /// What it uses.
    pub used: u64,
    /// What it may use.
    pub most: u64,
}

/// What a task counts for.
pub(super) fn amounts(request: &Request) -> Amounts {
    [request.demand.cpu.0, request.demand.memory.0, request.gpu.thousandths()]
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Namespace {
    pub(super) name: String,
    pub(super) quota: Quota,
    pub(super) used: Amounts,
}

impl Namespace {
    pub(super) fn take(&mut self, request: &Request) {
        for (used, amount) in self.used.iter_mut().zip(amounts(request)) {
            *used = used.saturating_add(amount);
        }
    }

    pub(super) fn give_back(&mut self, request: &Request) {
        for (used, amount) in self.used.iter_mut().zip(amounts(request)) {
            *used = used.saturating_sub(amount);
        }
    }

    /// Whether so many more of these are too much.
    pub(super) fn over_quota(&self, request: &Request, count: u32) -> Option<OverQuota> {
        (amounts(request).into_iter().enumerate()).find_map(|(resource, each)| {
            let (wanted, used) = (each.saturating_mul(count.into()), self.used[resource]);
            let most = self.quota.most[resource]?;
            (wanted > 0 && used.saturating_add(wanted) > most).then_some(OverQuota {
                resource,
                wanted,
                used,
                most,
            })
        })
    }

    /// Its dominant share by its weight, in 2^32nds of all there is.
    pub(super) fn share(&self, total: &Amounts) -> u64 {
        let share = |(used, total): (&u64, &u64)| (u128::from(*used) << 32) / u128::from(*total).max(1);
        let dominant = self.used.iter().zip(total).map(share).max().unwrap_or(0);
        u64::try_from(dominant / u128::from(self.quota.weight.max(1))).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dominant_share_is_the_largest_by_weight() {
        let mut namespace = Namespace { used: [9_000, 1, 0], ..Namespace::default() };
        let total = [18_000, 100, 0];
        assert_eq!(namespace.share(&total), 1 << 31);
        namespace.quota.weight = 2;
        assert_eq!(namespace.share(&total), 1 << 30);
        namespace.used[1] = 100;
        assert_eq!(namespace.share(&total), 1 << 31);
    }
}
