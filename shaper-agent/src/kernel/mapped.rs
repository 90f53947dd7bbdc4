//! Array maps in the agent's own memory: read without a system call while the kernel programs write them, and
//! written word by word where the agent has a say.

use std::{
    io,
    marker::PhantomData,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use shaper_common::{
    abi::{
        Admission, Budget, Clock, Control, CpuCount, CpuStat, CpuState, NetStat, Pace, PacketCount, Pool,
        Share,
    },
    hist::Histogram,
};

/// A struct of the maps' layout.
///
/// # Safety
/// It is repr(C), made of integers without padding, and a multiple of 8 bytes long.
pub unsafe trait Words: Copy + Default {}

macro_rules! words {
    ($($name:ty),+) => {$(
        const _: () = assert!(size_of::<$name>() % 8 == 0);
        // SAFETY: the size is asserted here, the rest beside the definition.
        unsafe impl Words for $name {}
    )+};
}

words!(
    Admission,
    Budget,
    Clock,
    Control,
    CpuCount,
    CpuStat,
    CpuState,
    Histogram,
    NetStat,
    Pace,
    PacketCount,
    Pool,
    Share
);

/// A mapped array of `T`, or of `u32` (see [`Mapped::half`]).
pub struct Mapped<T> {
    base: NonNull<u8>,
    entries: usize,
    stride: usize,
    holds: PhantomData<T>,
}

// SAFETY: every access to the mapping is an atomic operation on an aligned word.
unsafe impl<T> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mapped<T> {}

impl<T> Mapped<T> {
    /// Maps the array behind `map`, which must have been made with BPF_F_MMAPABLE and have `entries` entries.
    pub fn map(map: impl AsFd, entries: u32) -> io::Result<Mapped<T>> {
        // The kernel rounds every value up to 8 bytes.
        let (entries, stride) = (entries as usize, size_of::<T>().next_multiple_of(8));
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap(std::ptr::null_mut(), entries * stride, access, MapFlags::SHARED, map, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapped { base, entries, stride, holds: PhantomData })
    }

    fn at(&self, index: usize, offset: usize, length: usize) -> *mut u8 {
        let inside = index < self.entries && offset + length <= self.stride;
        assert!(inside, "entry {index} of {}, bytes {offset} to {}", self.entries, offset + length);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(index * self.stride + offset) }
    }

    /// The aligned word at `offset` of an entry.
    pub fn word(&self, index: usize, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: an aligned u64 in a mapping that lives as long as self; all its writers, here and
        // in the kernel, write whole words.
        unsafe { AtomicU64::from_ptr(self.at(index, offset, 8).cast()) }
    }

    /// The aligned half of a word at `offset` of an entry.
    pub fn half(&self, index: usize, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: as for `word`, of half the size.
        unsafe { AtomicU32::from_ptr(self.at(index, offset, 4).cast()) }
    }
}

impl<T: Words> Mapped<T> {
    /// The entry as it is now: each word is whole, but they need not be of one moment.
    pub fn read(&self, index: usize) -> T {
        self.part(index, 0)
    }

    /// The part of an entry that begins at `offset`, likewise.
    pub fn part<P: Words>(&self, index: usize, offset: usize) -> P {
        let mut value = P::default();
        let into = (&raw mut value).cast::<u64>();
        for word in 0..size_of::<P>() / 8 {
            // SAFETY: within the value, which is a whole number of words (`Words`), aligned as one.
            unsafe { into.add(word).write_unaligned(self.word(index, offset + word * 8).load(Relaxed)) };
        }
        value
    }

    /// Makes an entry zero, word by word.
    pub fn clear(&self, index: usize) {
        for word in 0..size_of::<T>() / 8 {
            self.word(index, word * 8).store(0, Relaxed);
        }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; no reference into it outlives self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.entries * self.stride) };
    }
}

/// `CLOCK_MONOTONIC`, which is also `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
