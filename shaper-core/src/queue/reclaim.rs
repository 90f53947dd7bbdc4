//! The second ledger: CPU that is reserved and not used, lent to tasks of low priority which say that they make do
//! with it.
//!
//! Of a node it is what it has, less a twentieth, less the peak that those who reserve are predicted to reach, less what
//! was reserved since that was predicted. Without a fresh prediction a reservation counts as if it were used. A
//! prediction that leaves less holds at once, and one that leaves more only if that is an eighth more: who is let in
//! today and ended tomorrow has gained nothing.

use crate::task::UnixNanos;

/// Of one node, in millicores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Reclaimed {
    /// What the node has.
    capacity: u64,
    /// What is reserved there.
    reserved: u64,
    /// What is lent.
    pub(super) used: u64,
    /// The predicted peak, and when it was predicted.
    peak: Option<(u64, UnixNanos)>,
    /// What was reserved since.
    since: u64,
}

impl Reclaimed {
    /// Of a node that has so much.
    pub(super) fn of(capacity: u64) -> Reclaimed {
        Reclaimed { capacity, ..Reclaimed::default() }
    }

    pub(super) fn reserve(&mut self, cpu: u64) {
        self.reserved = self.reserved.saturating_add(cpu);
        self.since = self.since.saturating_add(cpu);
    }

    pub(super) fn give_back(&mut self, cpu: u64) {
        self.reserved = self.reserved.saturating_sub(cpu);
    }

    /// The peak is predicted anew. Whether that changes anything.
    pub(super) fn predict(&mut self, peak: u64, now: UnixNanos, fresh_for: u64) -> bool {
        let before = self.lendable(now, fresh_for);
        let then = Reclaimed { peak: Some((peak, now)), since: 0, ..*self };
        let after = then.lendable(now, fresh_for);
        let holds = after <= before || after - before >= (before / 8).max(1);
        if holds {
            *self = then;
        } else if let Some((_, at)) = &mut self.peak {
            *at = now;
        }
        holds
    }

    /// How much may be lent in all.
    pub(super) fn lendable(&self, now: UnixNanos, fresh_for: u64) -> u64 {
        let taken = match self.peak {
            Some((peak, at)) if now.saturating_sub(at) <= fresh_for => {
                peak.saturating_add(self.since).min(self.reserved.max(peak))
            }
            _ => self.reserved,
        };
        (self.capacity - self.capacity / 20).saturating_sub(taken)
    }

    /// By how much more is lent than may be.
    pub(super) fn excess(&self, now: UnixNanos, fresh_for: u64) -> u64 {
        self.used.saturating_sub(self.lendable(now, fresh_for))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: u64 = 30;

    #[test]
    fn what_is_not_used_is_lent_while_that_is_known() {
        let mut node = Reclaimed::of(1000);
        node.reserve(800);
        assert_eq!(node.lendable(0, FRESH), 150);
        assert!(node.predict(200, 0, FRESH));
        assert_eq!(node.lendable(0, FRESH), 750);
        // What came since has not been seen at work.
        node.reserve(100);
        assert_eq!(node.lendable(1, FRESH), 650);
        node.used = 600;
        assert_eq!(node.excess(1, FRESH), 0);
        // Nothing was heard for too long: reservations count.
        assert_eq!(node.lendable(31, FRESH), 50);
        assert_eq!(node.excess(31, FRESH), 550);
    }

    #[test]
    fn less_holds_at_once_and_more_if_it_is_enough_more() {
        let mut node = Reclaimed::of(1000);
        node.reserve(800);
        assert!(node.predict(400, 0, FRESH));
        assert!(!node.predict(390, 1, FRESH));
        assert_eq!(node.lendable(31, FRESH), 550, "but it is still fresh");
        assert!(node.predict(410, 2, FRESH));
        assert!(node.predict(300, 3, FRESH));
        assert_eq!(node.lendable(3, FRESH), 650);
    }
}
