//! The pacing table, mapped into the agent: single fields are written while the kernel works on the
//! others. (Replacing a whole value would reset its loop and give away a burst.)

use std::{
    io,
    mem::offset_of,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use shaper_common::{
    abi::{PACE_OFF, PACE_ON, PACE_OPEN, Pace, SLOTS},
    pace,
};

/// The mapped array.
pub struct PaceTable {
    base: NonNull<Pace>,
}

// SAFETY: every access to the mapping is an atomic operation on an aligned word.
unsafe impl Send for PaceTable {}

const LENGTH: usize = SLOTS as usize * size_of::<Pace>();

impl PaceTable {
    /// Maps the array map behind `map`, which must have been made with BPF_F_MMAPABLE.
    pub fn map(map: impl AsFd) -> io::Result<PaceTable> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(std::ptr::null_mut(), LENGTH, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, map, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(PaceTable { base })
    }

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

    fn at(&self, slot: u32, offset: usize) -> *mut u8 {
        assert!(slot < SLOTS && offset < size_of::<Pace>(), "slot {slot} is outside the table");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(slot as usize).cast::<u8>().add(offset) }
    }

    fn word(&self, slot: u32, offset: usize) -> &AtomicU64 {
        // SAFETY: an aligned u64 in a mapping that lives as long as self; all its writers, here and
        // in the kernel, write whole words.
        unsafe { AtomicU64::from_ptr(self.at(slot, offset).cast()) }
    }

    fn half(&self, slot: u32, offset: usize) -> &AtomicU32 {
        // SAFETY: as for `word`, of half the size.
        unsafe { AtomicU32::from_ptr(self.at(slot, offset).cast()) }
    }

    fn mode(&self, slot: u32) -> &AtomicU32 {
        self.half(slot, offset_of!(Pace, mode))
    }
}

impl Drop for PaceTable {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; no reference into it outlives self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), LENGTH) };
    }
}

/// `CLOCK_MONOTONIC`, which is also `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
