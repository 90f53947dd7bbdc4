//! Intervals on the clock that the agent's reports carry, and waiting for what has no event.

use std::{
    thread,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// Long enough for anything that ends at all, in an emulated machine too.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// `CLOCK_MONOTONIC`, ns.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// From one instant of [`monotonic_ns`] to another.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Its beginning.
    pub from: u64,
    /// Its end.
    pub to: u64,
}

impl Window {
    /// From now on for so long: returns when it is over. For what is defined by time: a rate, or the second
    /// within which a change is in force. What has an event, or can be asked for, is waited for.
    pub fn pass(length: Duration) -> Window {
        let from = monotonic_ns();
        thread::sleep(length);
        Window { from, to: monotonic_ns() }
    }

    /// Its length.
    pub fn seconds(&self) -> f64 {
        (self.to - self.from) as f64 / 1e9
    }
}

/// Returns true once `happened`, or false when it has not within [`PATIENCE`].
pub fn happens(mut happened: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !happened() {
        if start.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Returns once `happened`; panics when it has not within [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, happened: impl FnMut() -> bool) {
    assert!(happens(happened), "not within {PATIENCE:?}: {what}");
}
