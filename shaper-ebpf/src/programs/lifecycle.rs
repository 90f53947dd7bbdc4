//! Cgroups made below a managed one belong to it from their first instant; no race with the agent.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;
use shaper_common::abi::{CGROUPS_INHERITED, CgroupSlot, EVENT_GONE, Event, SLOT_AGENT};

use crate::{
    atomic,
    kernel::Cgroup,
    maps::{CGROUP_SLOT, CONTROL, is_on_duty, tell},
    slots,
};

/// A new cgroup inherits the slot of its parent.
#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    if !is_on_duty() {
        return 0;
    }
    // SAFETY: the arguments are (cgroup, path).
    let cgroup = unsafe { Cgroup::from_ptr(ctx.arg(0)) };
    let Some(parent) = cgroup.parent() else { return 0 };
    let slot = slots::of_any(parent);
    if slot < SLOT_AGENT {
        return 0;
    }
    let Some(control) = CONTROL.get_ptr_mut(0) else { return 0 };
    let id = cgroup.id();
    // SAFETY: aligned words of a live map value.
    unsafe {
        // Part of the table is the agent's: a task that makes cgroups without end leaves room for others'.
        let entry = CgroupSlot { slot, inherited: 1 };
        let has_room = atomic::fetch_add(&raw mut (*control).inherited, 1) < CGROUPS_INHERITED;
        if !has_room || slots::table_of(cgroup).insert(id, entry, 0).is_err() {
            atomic::fetch_add(&raw mut (*control).inherited, MINUS_ONE);
            atomic::fetch_add(&raw mut (*control).without_entry, 1);
        }
    }
    debug!(&ctx, "cgroup {} inherits slot {}", id, slot);
    0
}

/// The agent is told when a cgroup that it manages is removed.
#[btf_tracepoint(function = "cgroup_rmdir")]
pub fn cgroup_rmdir(ctx: BtfTracePointContext) -> i32 {
    if !is_on_duty() {
        return 0;
    }
    // SAFETY: the arguments are (cgroup, path); plain words of a map value.
    unsafe {
        let cgroup = Cgroup::from_ptr(ctx.arg(0));
        let id = cgroup.id();
        if cgroup.is_v2()
            && let Some(entry) = CGROUP_SLOT.get(id)
            && entry.inherited == 0
        {
            tell(&Event { at_ns: bpf_ktime_get_ns(), value: id, kind: EVENT_GONE, slot: entry.slot });
        }
    }
    0
}

/// The entry goes with the last reference to the cgroup, not with its directory: sockets that
/// outlive the directory are still charged.
#[btf_tracepoint(function = "cgroup_release")]
pub fn cgroup_release(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (cgroup, path).
    let cgroup = unsafe { Cgroup::from_ptr(ctx.arg(0)) };
    // Another may come to lie where it was.
    if let Some(control) = CONTROL.get_ptr_mut(0) {
        // SAFETY: an aligned half of a word of a live map value.
        unsafe { atomic::fetch_add_half(&raw mut (*control).generation, 1) };
    }
    let id = cgroup.id();
    let table = slots::table_of(cgroup);
    // SAFETY: plain words, aligned ones of a live map value.
    unsafe {
        let inherited = match table.get(id) {
            Some(entry) => entry.inherited,
            None => return 0,
        };
        // Of two that remove it, the agent being the other, one counts.
        if table.remove(id).is_ok()
            && inherited == 1
            && let Some(control) = CONTROL.get_ptr_mut(0)
        {
            atomic::fetch_add(&raw mut (*control).inherited, MINUS_ONE);
        }
    }
    0
}

/// Added, it takes one away.
const MINUS_ONE: u64 = u64::MAX;
