//! The pacing table, mapped into the agent: single fields are written while the kernel works on the
//! others. (Replacing a whole value would reset its loop and give away a burst.)

use std::{
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

use shaper_common::{
    abi::{PACE_OFF, PACE_ON, PACE_OPEN, Pace},
    pace,
};

use super::mapped::{Mapped, monotonic_ns};

/// The mapped array.
pub struct PaceTable(pub(super) Mapped<Pace>);

impl PaceTable {
    /// Gives the slot a ceiling, or another one; the loop goes on where it is.
    pub fn limit(&self, slot: u32, rate: u64) {
        let before = self.read(slot);
        self.word(slot, offset_of!(Pace, rate)).store(rate, SeqCst);
        // A new epoch begins: what was sent and owed under another ceiling is not held against this one.
        self.word(slot, offset_of!(Pace, sent)).store(0, SeqCst);
        self.word(slot, offset_of!(Pace, epoch_start_ns)).store(monotonic_ns(), SeqCst);
        self.word(slot, offset_of!(Pace, debt)).store(pace::START.debt, SeqCst);
        self.half(slot, offset_of!(Pace, aim)).store(pace::START.aim as u32, SeqCst);
        if before.mode != PACE_ON {
            self.half(slot, offset_of!(Pace, gain)).store(pace::START.gain as u32, SeqCst);
            self.word(slot, offset_of!(Pace, active)).store(0, SeqCst);
            self.half(slot, offset_of!(Pace, active_before)).store(0, SeqCst);
            self.word(slot, offset_of!(Pace, epoch)).fetch_add(1, SeqCst);
            self.mode(slot).store(PACE_ON, SeqCst);
        }
    }

    /// Lifts the ceiling: sockets are opened when they are next met.
    pub fn open(&self, slot: u32) {
        self.mode(slot).store(PACE_OPEN, SeqCst);
    }

    /// Leaves the slot's sockets alone.
    pub fn off(&self, slot: u32) {
        self.mode(slot).store(PACE_OFF, SeqCst);
    }

    /// The slot as it is now.
    pub fn read(&self, slot: u32) -> Pace {
        let load = |offset| self.word(slot, offset).load(SeqCst);
        Pace {
            rate: load(offset_of!(Pace, rate)),
            mode: self.mode(slot).load(SeqCst),
            active_before: self.half(slot, offset_of!(Pace, active_before)).load(SeqCst),
            gain: self.half(slot, offset_of!(Pace, gain)).load(SeqCst),
            aim: self.half(slot, offset_of!(Pace, aim)).load(SeqCst),
            debt: load(offset_of!(Pace, debt)),
            epoch_start_ns: load(offset_of!(Pace, epoch_start_ns)),
            epoch: load(offset_of!(Pace, epoch)),
            sent: load(offset_of!(Pace, sent)),
            active: load(offset_of!(Pace, active)),
        }
    }

    fn word(&self, slot: u32, offset: usize) -> &AtomicU64 {
        self.0.word(slot as usize, offset)
    }

    fn half(&self, slot: u32, offset: usize) -> &AtomicU32 {
        self.0.half(slot as usize, offset)
    }

    fn mode(&self, slot: u32) -> &AtomicU32 {
        self.half(slot, offset_of!(Pace, mode))
    }
}
