//! What was taken of idle memory, and what the kernel killed for want of memory.

use shaper_core::{
    idle::{State, Status, Why},
    limits::Limit,
    task::OomKill,
    units::Bytes,
};

use super::WireError;
use crate::v1::{
    self,
    idle_reclaim::{Pressure, State as WireState, WorkingSet},
};

impl From<Status> for v1::IdleReclaim {
    fn from(status: Status) -> v1::IdleReclaim {
        let Status { reclaimed, refaulted, is_cache_only, state } = status;
        let state = match state {
            State::Reclaiming => WireState::Reclaiming(true),
            State::Resting(Why::WorkingSet { taken, refaulted }) => {
                WireState::WorkingSet(WorkingSet { taken_bytes: taken.0, refaulted_bytes: refaulted.0 })
            }
            State::Resting(Why::Pressure { some_us, window_us }) => {
                WireState::Pressure(Pressure { some_us, window_us })
            }
            State::Resting(Why::NotReclaimable) => WireState::NotReclaimable(true),
            State::Resting(Why::Disturbed) => WireState::Disturbed(true),
        };
        v1::IdleReclaim {
            reclaimed_bytes: reclaimed.0,
            refaulted_bytes: refaulted.0,
            is_cache_only,
            state: Some(state),
        }
    }
}

impl TryFrom<v1::IdleReclaim> for Status {
    type Error = WireError;

    fn try_from(wire: v1::IdleReclaim) -> Result<Status, WireError> {
        let v1::IdleReclaim { reclaimed_bytes, refaulted_bytes, is_cache_only, state } = wire;
        let state = match state.ok_or(WireError::Missing("idle.state"))? {
            WireState::Reclaiming(_) => State::Reclaiming,
            WireState::WorkingSet(WorkingSet { taken_bytes, refaulted_bytes }) => {
                State::Resting(Why::WorkingSet {
                    taken: Bytes(taken_bytes),
                    refaulted: Bytes(refaulted_bytes),
                })
            }
            WireState::Pressure(Pressure { some_us, window_us }) => {
                State::Resting(Why::Pressure { some_us, window_us })
            }
            WireState::NotReclaimable(_) => State::Resting(Why::NotReclaimable),
            WireState::Disturbed(_) => State::Resting(Why::Disturbed),
        };
        let (reclaimed, refaulted) = (Bytes(reclaimed_bytes), Bytes(refaulted_bytes));
        Ok(Status { reclaimed, refaulted, is_cache_only, state })
    }
}

impl From<OomKill> for v1::OomKill {
    fn from(kill: OomKill) -> v1::OomKill {
        let OomKill { at, limit, peak, kills } = kill;
        v1::OomKill {
            unix_nanos: at,
            limit_bytes: limit.at().map(|bytes| bytes.0),
            peak_bytes: peak.map(|bytes| bytes.0),
            kills,
        }
    }
}

impl From<v1::OomKill> for OomKill {
    fn from(wire: v1::OomKill) -> OomKill {
        let v1::OomKill { unix_nanos, limit_bytes, peak_bytes, kills } = wire;
        let limit = limit_bytes.map_or(Limit::Unlimited, |bytes| Limit::At(Bytes(bytes)));
        OomKill { at: unix_nanos, limit, peak: peak_bytes.map(Bytes), kills }
    }
}
