//! A memory limit on its way below use.

use shaper_core::{
    shrink::{Outcome, Reason, Status},
    units::Bytes,
};

use super::WireError;
use crate::v1::{
    self,
    shrink::{self as wire, aborted::Reason as WireReason},
};

impl From<Status> for v1::Shrink {
    fn from(status: Status) -> v1::Shrink {
        let Status { target, began_at, used_at_first, used, outcome } = status;
        v1::Shrink {
            target_bytes: target.0,
            began_unix_nanos: began_at,
            used_at_first_bytes: used_at_first.0,
            used_bytes: used.0,
            outcome: outcome.map(|outcome| match outcome {
                Outcome::Done { freed } => wire::Outcome::Done(wire::Done { freed_bytes: freed.0 }),
                Outcome::Aborted { reason, cold } => {
                    wire::Outcome::Aborted(wire::Aborted { cold_bytes: cold.0, reason: Some(reason.into()) })
                }
                Outcome::Ended => wire::Outcome::Ended(true),
            }),
        }
    }
}

impl TryFrom<v1::Shrink> for Status {
    type Error = WireError;

    fn try_from(status: v1::Shrink) -> Result<Status, WireError> {
        let v1::Shrink { target_bytes, began_unix_nanos, used_at_first_bytes, used_bytes, outcome } = status;
        let outcome = outcome.map(|outcome| {
            Ok::<_, WireError>(match outcome {
                wire::Outcome::Done(wire::Done { freed_bytes }) => {
                    Outcome::Done { freed: Bytes(freed_bytes) }
                }
                wire::Outcome::Aborted(wire::Aborted { cold_bytes, reason }) => Outcome::Aborted {
                    reason: reason.ok_or(WireError::Missing("shrink.aborted.reason"))?.into(),
                    cold: Bytes(cold_bytes),
                },
                wire::Outcome::Ended(_) => Outcome::Ended,
            })
        });
        Ok(Status {
            target: Bytes(target_bytes),
            began_at: began_unix_nanos,
            used_at_first: Bytes(used_at_first_bytes),
            used: Bytes(used_bytes),
            outcome: outcome.transpose()?,
        })
    }
}

impl From<Reason> for WireReason {
    fn from(reason: Reason) -> WireReason {
        match reason {
            Reason::Stalled { full_us, some_us, window_us } => {
                WireReason::Stalled(wire::Stalled { full_us, some_us, window_us })
            }
            Reason::WorkingSet { taken, refaulted } => WireReason::WorkingSet(wire::WorkingSet {
                taken_bytes: taken.0,
                refaulted_bytes: refaulted.0,
            }),
            Reason::NotReclaimable { reclaimable } => WireReason::NotReclaimableBytes(reclaimable.0),
            Reason::Outgrown => WireReason::Outgrown(true),
            Reason::NoProgress => WireReason::NoProgress(true),
            Reason::Deadline => WireReason::Deadline(true),
            Reason::OomKill => WireReason::OomKill(true),
            Reason::Failed(text) => WireReason::Failed(text),
            Reason::Cancelled => WireReason::Cancelled(true),
        }
    }
}

impl From<WireReason> for Reason {
    fn from(reason: WireReason) -> Reason {
        match reason {
            WireReason::Stalled(wire::Stalled { full_us, some_us, window_us }) => {
                Reason::Stalled { full_us, some_us, window_us }
            }
            WireReason::WorkingSet(wire::WorkingSet { taken_bytes, refaulted_bytes }) => {
                Reason::WorkingSet { taken: Bytes(taken_bytes), refaulted: Bytes(refaulted_bytes) }
            }
            WireReason::NotReclaimableBytes(bytes) => Reason::NotReclaimable { reclaimable: Bytes(bytes) },
            WireReason::Outgrown(_) => Reason::Outgrown,
            WireReason::NoProgress(_) => Reason::NoProgress,
            WireReason::Deadline(_) => Reason::Deadline,
            WireReason::OomKill(_) => Reason::OomKill,
            WireReason::Failed(text) => Reason::Failed(text),
            WireReason::Cancelled(_) => Reason::Cancelled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_survives_the_wire() {
        let aborted = |reason| Some(Outcome::Aborted { reason, cold: Bytes(5) });
        let outcomes = [
            None,
            Some(Outcome::Ended),
            Some(Outcome::Done { freed: Bytes(4) }),
            aborted(Reason::Stalled { full_us: 1, some_us: 2, window_us: 3 }),
            aborted(Reason::WorkingSet { taken: Bytes(1), refaulted: Bytes(2) }),
            aborted(Reason::NotReclaimable { reclaimable: Bytes(7) }),
            aborted(Reason::Outgrown),
            aborted(Reason::NoProgress),
            aborted(Reason::Deadline),
            aborted(Reason::OomKill),
            aborted(Reason::Failed("no".into())),
            aborted(Reason::Cancelled),
        ];
        for outcome in outcomes {
            let status =
                Status { target: Bytes(1), began_at: 2, used_at_first: Bytes(3), used: Bytes(4), outcome };
            assert_eq!(Status::try_from(v1::Shrink::from(status.clone())), Ok(status));
        }
    }
}
