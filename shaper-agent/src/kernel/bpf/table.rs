//! The table cgroup id → slot, from the agent's side.

use std::{io, mem::offset_of, os::fd::AsFd, sync::atomic::Ordering::SeqCst};

use aya::maps::{HashMap, IterableMap, MapData, MapError};
use shaper_common::abi::{CgroupSlot, Control, IoKey};

use super::{Abi, Bpf, BpfError};
use crate::kernel::{mapped::Mapped, sys};

type Table = HashMap<MapData, u64, Abi<CgroupSlot>>;

/// Of the cgroups that are below one when it comes under management, so many get an entry each. The others are
/// found by their ancestors.
const ENTRIES_MAX: usize = 16_384;

impl Bpf {
    /// Makes `slot` the account of this cgroup, from zero.
    pub fn assign(&mut self, slot: u32, cgroup_id: u64) -> Result<(), BpfError> {
        self.forget_cgroups(slot)?;
        self.clear(slot)?;
        self.join(slot, &[cgroup_id])
    }

    /// Lets these cgroups share the account `slot`.
    pub fn join(&mut self, slot: u32, cgroup_ids: &[u64]) -> Result<(), BpfError> {
        let (with, without) = cgroup_ids.split_at(cgroup_ids.len().min(ENTRIES_MAX));
        for id in with {
            insert(&mut self.cgroup_slot, &self.control, "CGROUP_SLOT", *id, slot)?;
        }
        self.control.word(0, offset_of!(Control, without_entry)).fetch_add(without.len() as u64, SeqCst);
        self.table_changed();
        // What runs now was looked up before.
        self.switch_cpus(|state| with.contains(&state.cgroup_id) && state.slot != slot);
        Ok(())
    }

    /// Charges block IO of a cgroup of the v1 hierarchy to `slot` as well.
    pub fn join_v1(&mut self, slot: u32, cgroup_id: u64) -> Result<(), BpfError> {
        insert(&mut self.v1_slot, &self.control, "V1_SLOT", cgroup_id, slot)
    }

    /// Lifts the ceiling of a slot and forgets its cgroups. The sockets are opened first.
    pub fn retire(&mut self, slot: u32) -> Result<(), BpfError> {
        self.pace.leave(slot);
        self.limit_egress(slot, None, true)?;
        self.limit_ingress(slot, None)?;
        self.watch_budget(slot, None)?;
        self.forget_cgroups(slot)?;
        self.admission.admission.clear(slot as usize);
        self.pace.off(slot);
        // What runs on is charged to the slot when it is next switched out: by then it may be another's.
        self.switch_cpus(|state| state.slot == slot);
        Ok(())
    }

    /// The cgroups in the table, and whose account each is.
    pub fn entries(&self) -> Result<Vec<(u64, u32)>, BpfError> {
        let mut entries = Vec::new();
        for_each(&self.cgroup_slot, "CGROUP_SLOT", |id, CgroupSlot { slot, .. }| entries.push((id, slot)))?;
        Ok(entries)
    }

    /// Takes these out of the table: they are of no cgroup of their account.
    pub fn take_out(&mut self, ids: &[u64]) -> Result<(), BpfError> {
        for id in ids {
            remove(&mut self.cgroup_slot, &self.control, "CGROUP_SLOT", *id)?;
        }
        self.table_changed();
        // What runs now was looked up before.
        self.switch_cpus(|state| ids.contains(&state.cgroup_id));
        Ok(())
    }

    /// What CPUs remember of the table is void.
    fn table_changed(&self) {
        self.control.half(0, offset_of!(Control, generation)).fetch_add(1, SeqCst);
    }

    fn forget_cgroups(&mut self, slot: u32) -> Result<(), BpfError> {
        let forgotten = forget(&mut self.cgroup_slot, &self.control, "CGROUP_SLOT", slot)?
            + forget(&mut self.v1_slot, &self.control, "V1_SLOT", slot)?;
        if forgotten > 0 {
            self.table_changed();
        }
        Ok(())
    }

    fn clear(&mut self, slot: u32) -> Result<(), BpfError> {
        for cpu in 0..self.cpus {
            let index = cpu * self.slots as usize + slot as usize;
            self.cpu_stat.clear(index);
            self.net_stat.clear(index);
            self.round_trip.clear(index);
            self.uplink_stat.clear(index);
        }
        self.activity.half(slot as usize, 0).store(0, SeqCst);
        self.pace.clear(slot);
        self.admission.admission.clear(slot as usize);
        let error = |source| BpfError::Map { map: "IO_STAT", source };
        let keys: Vec<IoKey> = self.io_stat.keys().filter_map(Result::ok).map(|Abi(key)| key).collect();
        for key in keys.into_iter().filter(|key| key.slot == slot) {
            match self.io_stat.remove(&Abi(key)) {
                Err(found) if !is_missing(&found) => return Err(error(found)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn insert(
    table: &mut Table,
    control: &Mapped<Control>,
    map: &'static str,
    id: u64,
    slot: u32,
) -> Result<(), BpfError> {
    let was_inherited = matches!(table.get(&id, 0), Ok(Abi(CgroupSlot { inherited: 1, .. })));
    let entry = Abi(CgroupSlot { slot, inherited: 0 });
    table.insert(id, entry, 0).map_err(|source| BpfError::Map { map, source })?;
    if was_inherited {
        control.word(0, offset_of!(Control, inherited)).fetch_sub(1, SeqCst);
    }
    Ok(())
}

/// Removes the entries of a slot; tells how many.
fn forget(
    table: &mut Table,
    control: &Mapped<Control>,
    map: &'static str,
    slot: u32,
) -> Result<u64, BpfError> {
    let mut forgotten = 0;
    loop {
        let mut entries: Vec<u64> = Vec::new();
        for_each(table, map, |id, entry| {
            if entry.slot == slot {
                entries.push(id);
            }
        })?;
        if entries.is_empty() {
            return Ok(forgotten);
        }
        forgotten += entries.len() as u64;
        // A child that was made meanwhile is found by the next round.
        for id in entries {
            remove(table, control, map, id)?;
        }
    }
}

fn for_each(table: &Table, map: &'static str, mut show: impl FnMut(u64, CgroupSlot)) -> Result<(), BpfError> {
    sys::for_each_entry(table.map().fd().as_fd(), 8, 8, |key, value| {
        let id = u64::from_ne_bytes(key.try_into().unwrap_or_default());
        let [slot, inherited] =
            [0, 4].map(|at| u32::from_ne_bytes(value[at..][..4].try_into().unwrap_or_default()));
        show(id, CgroupSlot { slot, inherited });
    })
    .map_err(|source| BpfError::Entries { map, source })
}

fn remove(table: &mut Table, control: &Mapped<Control>, map: &'static str, id: u64) -> Result<(), BpfError> {
    let was_inherited = matches!(table.get(&id, 0), Ok(Abi(CgroupSlot { inherited: 1, .. })));
    match table.remove(&id) {
        Ok(()) if was_inherited => {
            control.word(0, offset_of!(Control, inherited)).fetch_sub(1, SeqCst);
        }
        // cgroup_release may have been faster.
        Err(source) if !is_missing(&source) => return Err(BpfError::Map { map, source }),
        _ => {}
    }
    Ok(())
}

pub(super) fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}
