//! Which slot a cgroup has.

use aya_ebpf::{
    helpers::generated::{bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    maps::HashMap,
};
use shaper_common::abi::{CgroupSlot, SLOT_NOBODY, SLOT_UNMANAGED};

use crate::{
    atomic,
    kernel::Cgroup,
    maps::{CGROUP_SLOT, CONTROL, V1_SLOT},
};

/// How far up a cgroup without an entry is followed. Tasks cannot nest deeper: `cgroup.max.depth` of theirs is less.
const HOPS: u32 = 64;
/// A managed cgroup is at most this deep. (The agent adopts none that is deeper.)
const LEVELS: i32 = 16;

/// The entry of an id.
#[inline(always)]
fn entry(table: &HashMap<u64, CgroupSlot>, id: u64) -> Option<u32> {
    // SAFETY: plain words; a concurrent change gives the old or the new slot.
    unsafe { table.get(id) }.map(|entry| entry.slot)
}

/// The table of a cgroup's hierarchy.
#[inline(always)]
pub fn table_of(cgroup: Cgroup) -> &'static HashMap<u64, CgroupSlot> {
    if cgroup.is_v2() { &CGROUP_SLOT } else { &V1_SLOT }
}

/// Whether there are cgroups below managed ones that have no entry.
#[inline(always)]
fn has_overflowed() -> bool {
    match CONTROL.get_ptr(0) {
        // SAFETY: a word of a live map value.
        Some(control) => unsafe { atomic::load(&raw const (*control).without_entry) != 0 },
        None => false,
    }
}

/// The slot of a cgroup, of whichever hierarchy.
#[inline(always)]
pub fn of_any(cgroup: Cgroup) -> u32 {
    if cgroup.is_v2() {
        look_up(&CGROUP_SLOT, cgroup, cgroup.id())
    } else {
        look_up(&V1_SLOT, cgroup, cgroup.id())
    }
}

/// The slot of a cgroup of the v2 hierarchy, whose id the caller knows.
#[inline(always)]
pub fn of(cgroup: Cgroup, id: u64) -> u32 {
    look_up(&CGROUP_SLOT, cgroup, id)
}

/// That of the cgroup, or where the table has overflowed of the nearest ancestor that has one.
#[inline(always)]
fn look_up(table: &HashMap<u64, CgroupSlot>, mut cgroup: Cgroup, id: u64) -> u32 {
    if let Some(slot) = entry(table, id) {
        return slot;
    }
    if has_overflowed() {
        for _ in 0..HOPS {
            let Some(parent) = cgroup.parent() else { return SLOT_UNMANAGED };
            if let Some(slot) = entry(table, parent.id()) {
                return slot;
            }
            cgroup = parent;
        }
    }
    SLOT_UNMANAGED
}

/// The slot of the socket that a packet belongs to.
///
/// # Safety
/// `skb` is the context of the program.
#[inline(always)]
pub unsafe fn of_packet(skb: *mut aya_ebpf::bindings::__sk_buff) -> u32 {
    // SAFETY: the context; 0 means that no socket or no full socket is there.
    let id = unsafe { bpf_skb_cgroup_id(skb) };
    if id == 0 {
        return SLOT_NOBODY;
    }
    if let Some(slot) = entry(&CGROUP_SLOT, id) {
        return slot;
    }
    let mut found = SLOT_UNMANAGED;
    if has_overflowed() {
        for level in 1..=LEVELS {
            // SAFETY: the context; 0 means that the cgroup is not that deep.
            let id = unsafe { bpf_skb_ancestor_cgroup_id(skb, level) };
            if id == 0 {
                break;
            }
            if let Some(slot) = entry(&CGROUP_SLOT, id) {
                found = slot;
            }
        }
    }
    found
}
