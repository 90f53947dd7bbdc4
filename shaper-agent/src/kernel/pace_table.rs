//! The tables of the ceilings on what leaves, mapped into the agent: single fields are written while the kernel works on the
//! others. (Replacing a whole value would reset its loop or its clocks and give away a burst.)

use std::{
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

use shaper_common::{
    abi::{Clock, PACE_OFF, PACE_ON, PACE_OPEN, Pace, PacketCount},
    clock, pace,
};
use shaper_core::task::Traffic;

use super::mapped::{Mapped, monotonic_ns};

/// The mapped arrays.
pub struct PaceTable {
    /// How the sockets of TCP are paced.
    pub(super) pace: Mapped<Pace>,
    /// What holds the rest.
    pub(super) clocks: Mapped<Clock>,
}

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
        let price = clock::price(rate);
        self.clock(slot, offset_of!(Clock, credit)).store(clock::credit(price), SeqCst);
        self.clock(slot, offset_of!(Clock, stream_slack)).store(clock::stream_slack(price), SeqCst);
        // Sockets follow one after the other: what they send meanwhile is not held against them.
        self.clock(slot, offset_of!(Clock, streams_due)).store(clock::ticks(monotonic_ns()), SeqCst);
        self.clock(slot, offset_of!(Clock, price)).store(price, SeqCst);
    }

    /// Lifts the ceiling: sockets are opened when they are next met.
    pub fn open(&self, slot: u32) {
        self.clock(slot, offset_of!(Clock, price)).store(0, SeqCst);
        self.mode(slot).store(PACE_OPEN, SeqCst);
    }

    /// Leaves the slot's sockets alone.
    pub fn off(&self, slot: u32) {
        self.clock(slot, offset_of!(Clock, price)).store(0, SeqCst);
        self.mode(slot).store(PACE_OFF, SeqCst);
    }

    /// What was held back of the slot so far, of TCP and of all else.
    pub fn held(&self, slot: u32) -> (Traffic, Traffic) {
        let Clock { streams_held, datagrams_held, .. } = self.clocks.read(slot as usize);
        let traffic = |count: PacketCount| Traffic { bytes: count.bytes, packets: count.packets };
        (traffic(streams_held), traffic(datagrams_held))
    }

    /// Forgets what was held back of whoever had the slot before.
    pub fn clear(&self, slot: u32) {
        self.off(slot);
        self.clocks.clear(slot as usize);
    }

    /// The pacing of the slot as it is now.
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
        self.pace.word(slot as usize, offset)
    }

    fn clock(&self, slot: u32, offset: usize) -> &AtomicU64 {
        self.clocks.word(slot as usize, offset)
    }

    fn half(&self, slot: u32, offset: usize) -> &AtomicU32 {
        self.pace.half(slot as usize, offset)
    }

    fn mode(&self, slot: u32) -> &AtomicU32 {
        self.half(slot, offset_of!(Pace, mode))
    }
}
