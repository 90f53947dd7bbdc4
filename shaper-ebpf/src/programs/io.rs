//! Block IO by slot, device and direction, from `block_rq_complete` alone: what a device has done, charged to
//! whoever the kernel charges it to, so writeback to whoever made the pages dirty.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use shaper_common::{
    abi::{IoKey, IoStat, SLOT_AGENT},
    hist::{self, Histogram},
};

use crate::{
    atomic,
    kernel::Request,
    maps::{CONTROL, IO_STAT, count, is_on_duty, touch},
    slots,
};

static NOTHING: IoStat = IoStat {
    latency: Histogram { counts: [0; hist::BUCKETS] },
    bytes: 0,
    operations: 0,
    latency_ns: 0,
    untimed: 0,
};

/// Counts a request, or a part of one, that the device has done.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    if !is_on_duty() {
        return 0;
    }
    // SAFETY: the arguments are (request, error, bytes) on every kernel.
    let (request, bytes) = unsafe { (Request::from_ptr(ctx.arg(0)), ctx.arg::<u64>(2) as u32) };
    let Some(cgroup) = request.cgroup() else { return 0 };
    let slot = slots::of_any(cgroup);
    if slot < SLOT_AGENT {
        return 0;
    }
    let key = IoKey { slot, device: request.device(), direction: request.direction() };
    let stat = match IO_STAT.get_ptr_mut(key) {
        Some(stat) => stat,
        None => {
            // Another CPU may have been faster: then its entry is ours as well.
            let _ = IO_STAT.insert(key, &NOTHING, BPF_NOEXIST);
            match IO_STAT.get_ptr_mut(key) {
                Some(stat) => stat,
                None => {
                    if let Some(control) = CONTROL.get_ptr_mut(0) {
                        // SAFETY: an aligned word of a live map value.
                        unsafe { atomic::fetch_add(&raw mut (*control).io_uncounted, 1) };
                    }
                    return 0;
                }
            }
        }
    };
    // SAFETY: a live map value of this CPU; a request that completes while another does is not seen (it is counted
    // as missed by the kernel).
    unsafe {
        (*stat).bytes += bytes as u64;
        if bytes >= request.remaining_bytes() {
            (*stat).operations += request.bios();
            let took = request.took_ns(bpf_ktime_get_ns());
            if took == 0 {
                (*stat).untimed += 1;
            } else {
                (*stat).latency_ns += took;
                count(&raw mut (*stat).latency.counts, took, hist::IO_SHIFT);
            }
        }
    }
    touch(slot);
    0
}

/// Only if the key is not there.
const BPF_NOEXIST: u64 = 1;
