//! The maps. They are pinned by name, so that a new agent finds them as they are. (The socket storage, which cannot say so
//! itself, is pinned by the agent.)
//!
//! The agent has most of them in its memory and reads without a system call. A map with an entry per slot and
//! CPU is an array that is laid out by CPU; the agent gives it its size before the load.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    helpers::bpf_get_smp_processor_id,
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuHashMap, RingBuf},
};
use core::{arch::asm, ptr::read_volatile};
use shaper_common::{
    abi::{
        Activity, Admission, Budget, CGROUPS, CgroupSlot, Claims, Clock, Control, CpuStat, CpuState,
        EVENT_BYTES, Event, GOVERNED_DEVICES, IO_ENTRIES, IoKey, IoStat, NetStat, PAIRS, POOLS, Pace,
        PacketCount, Pool, REMEMBERED, RememberedPair, SLOT_AGENT, SLOTS, Share, SocketSlot, SocketState,
    },
    hist::{self, BUCKETS, Histogram},
    pool::WINDOWS,
};

use crate::atomic;

/// Slots in the arrays below: what the agent has made them for.
#[unsafe(no_mangle)]
static SLOT_COUNT: u32 = SLOTS;

/// The number of these programs, which the agent gives them.
#[unsafe(no_mangle)]
static INSTANCE: u32 = 0;

/// Whether these programs are those that count. Tracing programs are replaced by attaching the new ones beside the
/// old; they change places at one moment.
#[inline(always)]
pub fn is_on_duty() -> bool {
    control_on_duty().is_some()
}

/// What all programs look at, if these programs are those that count.
#[inline(always)]
pub fn control_on_duty() -> Option<*mut Control> {
    let control = CONTROL.get_ptr_mut(0)?;
    // SAFETY: a word of a live map value; a frozen global.
    let is_on_duty =
        unsafe { atomic::load(&raw const (*control).instance) == read_volatile(&raw const INSTANCE) };
    if is_on_duty { Some(control) } else { None }
}

/// cgroup v2 id → slot, for each managed cgroup and, by `cgroup_mkdir`, for each one below it.
#[map]
pub static CGROUP_SLOT: HashMap<u64, CgroupSlot> = HashMap::pinned(CGROUPS, 0);

/// The same for cgroups of the v1 hierarchy with the blkio controller: ids of it are another number space.
#[map]
pub static V1_SLOT: HashMap<u64, CgroupSlot> = HashMap::pinned(CGROUPS, BPF_F_NO_PREALLOC);

/// What all programs look at.
#[map]
pub static CONTROL: Array<Control> = Array::pinned(1, BPF_F_MMAPABLE);

/// When each slot was last active.
#[map]
pub static ACTIVITY: Array<Activity> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// What each CPU runs, by CPU.
#[map]
pub static CPU_STATE: Array<CpuState> = Array::pinned(1, BPF_F_MMAPABLE);

/// Cgroups whose slots each CPU remembers, by CPU: for `sched_switch` …
#[map]
pub static SWITCH_MEMORY: Array<RememberedPair> = Array::with_max_entries(PAIRS, 0);

/// … and for packets, each in one word ([`crate::slots::of_packet`]).
#[map]
pub static PACKET_MEMORY: Array<u64> = Array::with_max_entries(REMEMBERED, 0);

/// CPU time and run-queue delay, by CPU and slot.
#[map]
pub static CPU_STAT: Array<CpuStat> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// Use of CPU quotas, by slot.
#[map]
pub static BUDGET: Array<Budget> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// Block IO.
#[map]
pub static IO_STAT: PerCpuHashMap<IoKey, IoStat> = PerCpuHashMap::pinned(IO_ENTRIES, BPF_F_NO_PREALLOC);

/// Traffic of sockets, by CPU and slot.
#[map]
pub static NET_STAT: Array<NetStat> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// Round-trip times, by CPU and slot.
#[map]
pub static ROUND_TRIP: Array<Histogram> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// Traffic leaving the uplinks, by CPU and slot.
#[map]
pub static UPLINK_STAT: Array<PacketCount> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// TCP pacing by slot.
#[map]
pub static PACE: Array<Pace> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// The clocks of what no socket paces, by slot.
#[map]
pub static CLOCK: Array<Clock> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// What the slots of a pool share.
#[map]
pub static POOL: Array<Pool> = Array::pinned(POOLS, BPF_F_MMAPABLE);

/// What is claimed of a pool, by pool and window.
#[map]
pub static CLAIMS: Array<Claims> = Array::pinned(POOLS * WINDOWS as u32, BPF_F_MMAPABLE);

/// The share of each slot in the pool.
#[map]
pub static SHARE: Array<Share> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// The class of the queue in which what arrives for a slot waits; 0: it does not. Written by the agent.
#[map]
pub static INGRESS_CLASS: Array<u64> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// Devices of GPU cards ([`shaper_common::abi::device_key`]), and the number of each card. Written by the agent.
#[map]
pub static GOVERNED: HashMap<u64, u32> = HashMap::pinned(GOVERNED_DEVICES, 0);

/// Which of them each slot may open.
#[map]
pub static ADMISSION: Array<Admission> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// What a socket remembers.
#[btf_map]
pub static SOCKET_STATE: SkStorage<SocketState> = SkStorage::new();

/// The slot of a socket of UDP, for whoever meets it without its cgroup.
#[btf_map]
pub static SOCKET_SLOT: SkStorage<SocketSlot> = SkStorage::new();

/// What the agent is told at once: seldom, and never per packet or switch.
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(EVENT_BYTES, 0);

/// The entry of a slot on this CPU, in a map that is laid out by CPU.
#[inline(always)]
pub fn of_slot<T>(map: &Array<T>, slot: u32) -> Option<*mut T> {
    // SAFETY: the number of this CPU.
    map.get_ptr_mut(first_of(unsafe { bpf_get_smp_processor_id() } as u32) + slot)
}

/// Where the entries of a CPU begin in a map that is laid out by CPU.
#[inline(always)]
pub fn first_of(cpu: u32) -> u32 {
    // SAFETY: a frozen global.
    cpu * unsafe { read_volatile(&raw const SLOT_COUNT) }
}

/// Counts a duration of a slot, on this CPU.
///
/// # Safety
/// Nothing else on this CPU writes the map meanwhile: a count could be lost then.
#[inline(always)]
pub unsafe fn record(map: &Array<Histogram>, slot: u32, ns: u64, shift: u32) {
    if let Some(histogram) = of_slot(map, slot) {
        // SAFETY: a live map value, and the caller's promise.
        unsafe { count(&raw mut (*histogram).counts, ns, shift) };
    }
}

/// Counts a duration.
///
/// # Safety
/// `counts` is in a live map value, which nothing else on this CPU writes meanwhile.
#[inline(always)]
pub unsafe fn count(counts: *mut [u32; BUCKETS], ns: u64, shift: u32) {
    let mut index = hist::index(ns, shift);
    // SAFETY: one instruction on one register. The compiler knows that the index is in bounds and would leave the
    // mask out, but the verifier must see it.
    unsafe {
        asm!("{0} &= {1}", inout(reg) index, const BUCKETS - 1, options(pure, nomem, nostack, preserves_flags));
    }
    // SAFETY: the index is in bounds.
    unsafe {
        let count = counts.cast::<u32>().add(index);
        *count = (*count).wrapping_add(1);
    }
}

/// The class of a slot in the queue of what arrives; 0: that is not limited.
#[inline(always)]
pub fn class_of_slot(slot: u32) -> u32 {
    if slot <= SLOT_AGENT {
        return 0;
    }
    match INGRESS_CLASS.get_ptr(slot) {
        // SAFETY: a word of a live map value.
        Some(class) => unsafe { atomic::load(class) as u32 },
        None => 0,
    }
}

/// Notes that a slot was active since the agent last looked.
#[inline(always)]
pub fn touch(slot: u32) {
    if slot < SLOT_AGENT {
        return;
    }
    if let (Some(control), Some(activity)) = (CONTROL.get_ptr(0), ACTIVITY.get_ptr_mut(slot)) {
        // SAFETY: live map values, of whose words any value is as good as the one before.
        unsafe {
            let epoch = atomic::load(&raw const (*control).epoch);
            if atomic::load(activity) != epoch {
                atomic::store(activity, epoch);
            }
        }
    }
}

/// Tells the agent.
#[inline(always)]
pub fn tell(event: &Event) {
    if EVENTS.output::<Event>(event, 0).is_err()
        && let Some(control) = CONTROL.get_ptr_mut(0)
    {
        // SAFETY: an aligned word of a live map value.
        unsafe { atomic::fetch_add(&raw mut (*control).events_lost, 1) };
    }
}

/// Not used by any program: puts the layout of every struct of the ABI into the object's BTF (the maps
/// above name them in type parameters only), where a test compares it with the agent's.
#[repr(C)]
pub struct Layouts {
    cgroup_slot: CgroupSlot,
    control: Control,
    cpu_state: CpuState,
    cpu_stat: CpuStat,
    budget: Budget,
    event: Event,
    io_key: IoKey,
    io_stat: IoStat,
    net_stat: NetStat,
    pace: Pace,
    clock: Clock,
    pool: Pool,
    claims: Claims,
    share: Share,
    socket_slot: SocketSlot,
    admission: Admission,
}

#[used]
#[unsafe(no_mangle)]
pub static LAYOUTS: core::mem::MaybeUninit<Layouts> = core::mem::MaybeUninit::zeroed();
