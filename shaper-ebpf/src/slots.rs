//! Which slot a cgroup has.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::{
        bpf_get_smp_processor_id,
        generated::{
            bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_sk_storage_get,
            bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
        },
    },
    maps::HashMap,
};
use shaper_common::abi::{
    CgroupSlot, Control, LEVELS_MAX, PAIRS, REMEMBERED, Remembered, SLOT_NOBODY, SLOT_UNMANAGED, SLOTS_MAX,
    SocketSlot,
};

use crate::{
    atomic,
    kernel::{Cgroup, CssSet},
    maps::{CGROUP_SLOT, CONTROL, PACKET_MEMORY, SOCKET_SLOT, SWITCH_MEMORY, V1_SLOT},
};

/// How far up a cgroup without an entry is followed. Tasks that were launched cannot nest deeper, by their
/// `cgroup.max.descendants`.
const HOPS: u32 = 64;

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
    let id = cgroup.id();
    if cgroup.is_v2() { look_up(&CGROUP_SLOT, cgroup, id) } else { look_up(&V1_SLOT, cgroup, id) }
}

/// What this CPU remembers of the cgroup of tasks with `set`, looked up where it remembers nothing or too old a thing.
/// With a thousand active cgroups the way from a task to its cgroup's id and through the table is six cache lines that
/// nobody else needs; this is one. Where it lies follows from where the set does: so the processor need not wait for
/// the set to fetch it.
///
/// # Safety
/// `control` is the only value of [`CONTROL`], `cpu` the number of this CPU, on which nothing else uses
/// [`SWITCH_MEMORY`] meanwhile.
#[inline(always)]
pub unsafe fn remembered(control: *const Control, cpu: u32, set: CssSet) -> Option<*const Remembered> {
    // SAFETY: the caller's promise; live map values.
    unsafe {
        let place = (set.distance(control.cast()).wrapping_mul(GOLDEN) >> (64 - PAIRS.ilog2())) as u32;
        let pair = SWITCH_MEMORY.get_ptr_mut(cpu * PAIRS + place)?;
        let (newer, older) = (&raw mut (*pair).newer, &raw mut (*pair).older);
        let generation = atomic::load(&raw const (*control).generation);
        let cgroup = set.cgroup();
        let distance = cgroup.distance(control.cast());
        if (*newer).cgroup == distance && (*newer).generation == generation {
            return Some(newer);
        }
        if (*older).cgroup == distance && (*older).generation == generation {
            return Some(older);
        }
        // Field by field: a copy of the whole ends LLVM's BPF backend.
        (*older).cgroup = (*newer).cgroup;
        (*older).id = (*newer).id;
        (*older).slot = (*newer).slot;
        (*older).generation = (*newer).generation;
        let id = cgroup.id();
        (*newer).cgroup = distance;
        (*newer).id = id;
        (*newer).slot = of(cgroup, id);
        (*newer).generation = generation;
        Some(newer)
    }
}

/// 2^64 by the golden ratio: the highest bits of a product with it depend on all others.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

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

/// The slot of the cgroup that the running task is in.
#[inline(always)]
pub fn of_current() -> u32 {
    // SAFETY: nothing but the running task is looked at; 0 means that its cgroup is not that deep.
    unsafe {
        if let Some(slot) = entry(&CGROUP_SLOT, bpf_get_current_cgroup_id()) {
            return slot;
        }
        let mut found = SLOT_UNMANAGED;
        if has_overflowed() {
            for level in 1..=LEVELS_MAX as i32 {
                let id = bpf_get_current_ancestor_cgroup_id(level);
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
}

/// The slot of the socket that a packet belongs to.
///
/// What a CPU remembers for this is a word, for a packet may come while another is looked at: the id, the slot, and as
/// much of the generation as there is room for. It is void if the id does not fit.
///
/// # Safety
/// `skb` is the context of the program.
#[inline(always)]
pub unsafe fn of_packet(skb: *mut aya_ebpf::bindings::__sk_buff) -> u32 {
    // SAFETY: the context; 0 means that no socket or no full socket is there. Live map values.
    unsafe {
        let id = bpf_skb_cgroup_id(skb);
        if id == 0 {
            return SLOT_NOBODY;
        }
        let Some(control) = CONTROL.get_ptr(0) else { return SLOT_NOBODY };
        let generation = atomic::load(&raw const (*control).generation) as u64;
        let place = (id.wrapping_mul(GOLDEN) >> (64 - REMEMBERED.ilog2())) as u32;
        let index = bpf_get_smp_processor_id() as u32 * REMEMBERED + place;
        let Some(memory) = PACKET_MEMORY.get_ptr_mut(index) else { return SLOT_NOBODY };
        let known = atomic::load(memory);
        let expected = id << 32 | (generation & GENERATION) << SLOT_BITS;
        if known & !SLOT == expected && id >> 32 == 0 {
            return (known & SLOT) as u32;
        }
        let slot = look_up_packet(skb, id);
        if id >> 32 == 0 {
            atomic::store(memory, expected | slot as u64);
        }
        slot
    }
}

/// Of the word, from its low end.
const SLOT_BITS: u32 = SLOTS_MAX.ilog2();
const SLOT: u64 = (1 << SLOT_BITS) - 1;
const GENERATION: u64 = (1 << (32 - SLOT_BITS)) - 1;

/// Has a socket remember its slot, which it is of now.
///
/// # Safety
/// `socket` is a full socket.
#[inline(always)]
pub unsafe fn remember(socket: *mut bpf_sock, slot: u32) {
    // SAFETY: the caller's promise; live map values, of which any value is as good as the one before.
    unsafe {
        let Some(control) = CONTROL.get_ptr(0) else { return };
        let generation = atomic::load(&raw const (*control).generation);
        let mut fresh = SocketSlot { slot, generation };
        let known = storage(socket, &raw mut fresh, BPF_SK_STORAGE_GET_F_CREATE as u64);
        if !known.is_null() && ((*known).slot != slot || (*known).generation != generation) {
            (*known).generation = generation;
            (*known).slot = slot;
        }
    }
}

/// The slot that a socket remembers.
///
/// # Safety
/// `socket` is a full socket.
#[inline(always)]
pub unsafe fn remembered_by(socket: *mut bpf_sock) -> u32 {
    // SAFETY: the caller's promise; live map values.
    unsafe {
        let Some(control) = CONTROL.get_ptr(0) else { return SLOT_NOBODY };
        let known = storage(socket, null_mut(), 0);
        if known.is_null() || (*known).generation != atomic::load(&raw const (*control).generation) {
            return SLOT_NOBODY;
        }
        (*known).slot
    }
}

/// What a socket remembers of its slot; null: nothing.
///
/// # Safety
/// `socket` is a full socket, `fresh` null or a value.
#[inline(always)]
unsafe fn storage(socket: *mut bpf_sock, fresh: *mut SocketSlot, flags: u64) -> *mut SocketSlot {
    let map = (&raw const SOCKET_SLOT).cast_mut();
    // SAFETY: the caller's promise.
    unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), fresh.cast(), flags) }.cast()
}

/// [`of_packet`] without memory.
///
/// # Safety
/// As for [`of_packet`].
#[inline(always)]
unsafe fn look_up_packet(skb: *mut aya_ebpf::bindings::__sk_buff, id: u64) -> u32 {
    if let Some(slot) = entry(&CGROUP_SLOT, id) {
        return slot;
    }
    let mut found = SLOT_UNMANAGED;
    if has_overflowed() {
        for level in 1..=LEVELS_MAX as i32 {
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
