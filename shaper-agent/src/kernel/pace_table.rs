//! The tables of the ceilings on what leaves, mapped into the agent: single fields are written while the kernel works on the
//! others. (Replacing a whole value would reset its loop or its clocks and give away a burst.)

use std::{
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

use shaper_common::{
    abi::{Clock, PACE_OFF, PACE_ON, PACE_OPEN, POOL_EGRESS, Pace, PacketCount, Pool, Share},
    clock, pace,
    pool::{Claim, RATE_MAX, TRIM_ONE, Terms},
};
use shaper_core::{task::Traffic, units::Weight};

use super::mapped::{Mapped, monotonic_ns};

/// The mapped arrays.
pub struct PaceTable {
    /// How the sockets of TCP are paced.
    pub(super) pace: Mapped<Pace>,
    /// What holds the rest.
    pub(super) clocks: Mapped<Clock>,
    /// What each slot has of the pool.
    pub(super) shares: Mapped<Share>,
    /// What the slots share.
    pub(super) pools: Mapped<Pool>,
}

impl PaceTable {
    /// The slots in the pool share so many bytes a second.
    pub fn divide(&self, capacity: u64) {
        let pool = |offset| self.pools.word(POOL_EGRESS as usize, offset);
        let _ = pool(offset_of!(Pool, trim)).compare_exchange(0, TRIM_ONE, SeqCst, SeqCst);
        pool(offset_of!(Pool, capacity)).store(capacity.min(RATE_MAX), SeqCst);
    }

    /// Puts the slot into the pool, with nothing but an equal part of it. It stays as it is if it is in.
    pub fn enter(&self, slot: u32) {
        if self.is_shared(slot) {
            return;
        }
        let terms = Terms { guarantee: 0, ceiling: RATE_MAX, weight: Weight::DEFAULT.get() };
        self.shares.clear(slot as usize);
        self.share(slot, offset_of!(Share, ceiling)).store(terms.ceiling, SeqCst);
        self.share(slot, offset_of!(Share, claim)).store(Claim::OPEN.word(), SeqCst);
        self.set_weight(slot, terms.weight);
        self.begin(slot, self.pools.read(POOL_EGRESS as usize).capacity);
        self.is_in(slot).store(1, SeqCst);
    }

    /// Takes the slot out of the pool. A ceiling that it had stays.
    pub fn leave(&self, slot: u32) {
        if let Some(terms) = self.terms(slot) {
            self.is_in(slot).store(0, SeqCst);
            if terms.ceiling < RATE_MAX {
                self.begin(slot, terms.ceiling);
            } else {
                self.open(slot);
            }
        }
    }

    /// What the slot has of the pool, if it is in.
    pub fn terms(&self, slot: u32) -> Option<Terms> {
        let Share { guarantee, ceiling, weight, .. } = self.shares.read(slot as usize);
        self.is_shared(slot).then_some(Terms { guarantee, ceiling, weight })
    }

    /// The ceiling of the slot, bytes a second.
    pub fn ceiling(&self, slot: u32) -> Option<u64> {
        match self.terms(slot) {
            Some(terms) => (terms.ceiling < RATE_MAX).then_some(terms.ceiling),
            None => (self.mode(slot).load(SeqCst) == PACE_ON)
                .then(|| self.word(slot, offset_of!(Pace, rate)).load(SeqCst)),
        }
    }

    /// What the slot may send now, bytes a second, if it is in the pool.
    pub fn granted(&self, slot: u32) -> Option<u64> {
        self.is_shared(slot).then(|| self.word(slot, offset_of!(Pace, rate)).load(SeqCst))
    }

    /// What the slot has in any case, bytes a second.
    pub fn set_guarantee(&self, slot: u32, guarantee: u64) {
        self.share(slot, offset_of!(Share, guarantee)).store(guarantee, SeqCst);
    }

    /// Its part of the rest, relative to the others'.
    pub fn set_weight(&self, slot: u32, weight: u32) {
        self.shares.half(slot as usize, offset_of!(Share, weight)).store(weight, SeqCst);
    }

    /// Gives the slot a ceiling, or another one; the loop goes on where it is.
    pub fn limit(&self, slot: u32, rate: u64) {
        if self.is_shared(slot) {
            // It follows in the next window.
            self.share(slot, offset_of!(Share, ceiling)).store(rate, SeqCst);
        } else {
            self.begin(slot, rate);
        }
    }

    fn begin(&self, slot: u32, rate: u64) {
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
        if self.is_shared(slot) {
            return self.limit(slot, RATE_MAX);
        }
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

    /// Forgets what was held back of whoever had the slot before, and his share.
    pub fn clear(&self, slot: u32) {
        self.off(slot);
        self.clocks.clear(slot as usize);
        self.shares.clear(slot as usize);
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

    fn is_shared(&self, slot: u32) -> bool {
        self.is_in(slot).load(SeqCst) != 0
    }

    fn is_in(&self, slot: u32) -> &AtomicU32 {
        self.shares.half(slot as usize, offset_of!(Share, is_in))
    }

    fn share(&self, slot: u32, offset: usize) -> &AtomicU64 {
        self.shares.word(slot as usize, offset)
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
