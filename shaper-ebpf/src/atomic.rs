//! Atomic operations on shared map values.
//!
//! Always sequentially consistent: LLVM lowers a *relaxed* `fetch_add` whose result is used to a
//! plain add that hands back the addend, without a diagnostic. `cargo xtask build-ebpf` refuses an
//! object that holds an atomic operation without the fetch bit, so a slip here cannot ship.
//! `core::sync::atomic` lacks these operations for the BPF target; hence the intrinsics.

use core::{
    intrinsics::{self, AtomicOrdering::SeqCst},
    ptr,
};

/// Adds and returns the value before.
///
/// # Safety
/// `at` points into a live map value and is aligned to 8.
#[inline(always)]
pub unsafe fn fetch_add(at: *mut u64, value: u64) -> u64 {
    unsafe { intrinsics::atomic_xadd::<u64, u64, { SeqCst }>(at, value) }
}

/// Adds, and leaves no trace of overflow.
///
/// # Safety
/// `at` points into a live map value and is aligned to 4.
#[inline(always)]
pub unsafe fn fetch_add_half(at: *mut u32, value: u32) -> u32 {
    unsafe { intrinsics::atomic_xadd::<u32, u32, { SeqCst }>(at, value) }
}

/// Stores and returns the value before.
///
/// # Safety
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn swap(at: *mut u64, value: u64) -> u64 {
    unsafe { intrinsics::atomic_xchg::<u64, { SeqCst }>(at, value) }
}

/// Stores `new` if the value is `expected`; tells whether it did.
///
/// # Safety
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn compare_exchange(at: *mut u64, expected: u64, new: u64) -> bool {
    unsafe { intrinsics::atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(at, expected, new).1 }
}

/// One load of a word that others write.
///
/// # Safety
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn load<T: Copy>(at: *const T) -> T {
    unsafe { ptr::read_volatile(at) }
}

/// One store to a word that others read.
///
/// # Safety
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn store<T: Copy>(at: *mut T, value: T) {
    unsafe { ptr::write_volatile(at, value) }
}
