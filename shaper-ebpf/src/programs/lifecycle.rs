//! Cgroups made below a managed one belong to it from their first instant; no race with the agent.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;

use crate::{
    atomic,
    kernel::Cgroup,
    maps::{CGROUP_SLOT, SLOT_TABLE_FULL},
};

/// A new cgroup inherits the slot of its parent.
#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (cgroup, path).
    let cgroup = unsafe { Cgroup::from_ptr(ctx.arg(0)) };
    if !cgroup.is_v2() {
        return 0;
    }
    let Some(parent) = cgroup.parent() else { return 0 };
    // SAFETY: the entry is a plain u32.
    let Some(slot) = (unsafe { CGROUP_SLOT.get(parent.id()) }) else { return 0 };
    let slot = *slot;
    let id = cgroup.id();
    if CGROUP_SLOT.insert(id, slot, 0).is_err() {
        if let Some(count) = SLOT_TABLE_FULL.get_ptr_mut(0) {
            // SAFETY: a live map value of 8 bytes.
            unsafe { atomic::fetch_add(count, 1) };
        }
    }
    debug!(&ctx, "cgroup {} inherits slot {}", id, slot);
    0
}

/// The entry goes with the last reference to the cgroup, not with its directory: sockets that
/// outlive the directory are still charged.
#[btf_tracepoint(function = "cgroup_release")]
pub fn cgroup_release(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (cgroup, path).
    let cgroup = unsafe { Cgroup::from_ptr(ctx.arg(0)) };
    if cgroup.is_v2() {
        let _ = CGROUP_SLOT.remove(cgroup.id());
    }
    0
}
