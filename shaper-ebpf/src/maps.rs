//! The maps. All but the socket storage are pinned by name, so that a new agent finds them as they
//! are. (A socket that is forgotten is only counted as active once more.)

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray},
};
use shaper_common::abi::{
    CGROUPS, CpuStat, CpuState, NetStat, Pace, PacketCount, SLOT_NOBODY, SLOT_UNMANAGED, SLOTS, SocketState,
};

/// cgroup v2 id → slot, for each managed cgroup and, by `cgroup_mkdir`, for each one below it.
#[map]
pub static CGROUP_SLOT: HashMap<u64, u32> = HashMap::pinned(CGROUPS, 0);

/// What this CPU runs.
#[map]
pub static CPU_STATE: PerCpuArray<CpuState> = PerCpuArray::pinned(1, 0);

/// CPU time by slot.
#[map]
pub static CPU_STAT: PerCpuArray<CpuStat> = PerCpuArray::pinned(SLOTS, 0);

/// Traffic of sockets by slot.
#[map]
pub static NET_STAT: PerCpuArray<NetStat> = PerCpuArray::pinned(SLOTS, 0);

/// Traffic leaving the uplinks by slot.
#[map]
pub static UPLINK_STAT: PerCpuArray<PacketCount> = PerCpuArray::pinned(SLOTS, 0);

/// TCP pacing by slot.
#[map]
pub static PACE: Array<Pace> = Array::pinned(SLOTS, BPF_F_MMAPABLE);

/// What a socket remembers.
#[btf_map]
pub static SOCKET_STATE: SkStorage<SocketState> = SkStorage::new();

/// Entries that `CGROUP_SLOT` had no room for: their cgroups are not measured.
#[map]
pub static SLOT_TABLE_FULL: Array<u64> = Array::pinned(1, 0);

/// The slot of a cgroup id; 0 means that no socket or no full socket was there.
#[inline(always)]
pub fn slot_of(cgroup_id: u64) -> u32 {
    if cgroup_id == 0 {
        return SLOT_NOBODY;
    }
    // SAFETY: the entry is a plain u32; a concurrent change gives the old or the new slot.
    match unsafe { CGROUP_SLOT.get(cgroup_id) } {
        Some(slot) => *slot,
        None => SLOT_UNMANAGED,
    }
}

/// Not used by any program: puts the layout of every struct of the ABI into the object's BTF (the maps
/// above name them in type parameters only), where a test compares it with the agent's.
#[repr(C)]
pub struct Layouts {
    cpu_state: CpuState,
    cpu_stat: CpuStat,
    net_stat: NetStat,
    pace: Pace,
}

#[used]
#[unsafe(no_mangle)]
pub static LAYOUTS: core::mem::MaybeUninit<Layouts> = core::mem::MaybeUninit::zeroed();
