//! The programs that are measured, loaded by the agent's own loader, in a place of their own.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use aya::{maps::MapInfo, programs::loaded_programs};
use shaper_agent::{
    kernel::bpf::{Bpf, BpfConfig},
    opener::{self, Opener},
};
use shaper_common::abi::{LAYOUT, SLOT_FIRST};
use shaper_tests::{
    bins::bpf_object,
    cgroup::{mounts, unique_name},
};
use tempfile::TempDir;

use crate::rig;

/// `BPF_OBJ_NAME_LEN` without the end.
const NAME_MAX: usize = 15;

/// Our programs, attached for as long as this lives.
pub(crate) struct Kernel {
    bpf: Option<Bpf>,
    directory: PathBuf,
    _state: TempDir,
    next_slot: u32,
}

impl Kernel {
    /// With room for so many slots, counting on these devices.
    pub(crate) fn establish(slots: u32, uplinks: &[&str]) -> Result<Kernel> {
        let state = TempDir::new().context("cannot make a temporary directory")?;
        let directory = Path::new("/sys/fs/bpf").join(unique_name());
        let bpf = Bpf::establish(BpfConfig {
            object: bpf_object(),
            directory: directory.clone(),
            cgroup_mount: mounts().0,
            uplinks: uplinks.iter().map(|&device| device.to_owned()).collect(),
            slots,
            state_dir: state.path().to_owned(),
            debug: false,
            network: None,
            opener: Opener::at(opener::SOCKET.into()),
        })?;
        Ok(Kernel { bpf: Some(bpf), directory, _state: state, next_slot: SLOT_FIRST })
    }

    pub(crate) fn bpf(&mut self) -> Result<&mut Bpf> {
        self.bpf.as_mut().context("the kernel programs are gone")
    }

    /// Makes these cgroups one account, and returns its slot.
    pub(crate) fn manage(&mut self, groups: &[impl AsRef<Path>]) -> Result<u32> {
        let slot = self.next_slot;
        self.next_slot += 1;
        let ids = groups.iter().map(|group| rig::id(group.as_ref())).collect::<Result<Vec<_>>>()?;
        self.bpf()?.join(slot, &ids)?;
        Ok(slot)
    }

    /// The id of one of our programs: that of its name which has our map. (Other agents may be on this machine.)
    pub(crate) fn program(&self, name: &str) -> Result<u32> {
        let pin = self.directory.join(format!("v{LAYOUT}/maps/CONTROL"));
        let control =
            MapInfo::from_pin(&pin).with_context(|| format!("cannot look at {}", pin.display()))?.id();
        // The kernel keeps the beginning of a name.
        let kept = &name[..name.len().min(NAME_MAX)];
        let mut named = loaded_programs().flatten().filter(|program| program.name_as_str() == Some(kept));
        let ours = named
            .find(|program| program.map_ids().is_ok_and(|ids| ids.is_some_and(|ids| ids.contains(&control))));
        Ok(ours.with_context(|| format!("the kernel has no program {name} of ours"))?.id())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(bpf) = self.bpf.take()
            && let Err(error) = bpf.remove()
        {
            eprintln!("bench: cannot remove the kernel programs: {error}");
        }
    }
}

/// What a program has cost so far, by the kernel's own count.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) time: Duration,
    pub(crate) runs: u64,
}

impl Spent {
    pub(crate) fn of(program: u32) -> Result<Spent> {
        let info = loaded_programs().flatten().find(|info| info.id() == program);
        let info = info.with_context(|| format!("the kernel has no program {program}"))?;
        Ok(Spent { time: info.run_time(), runs: info.run_count() })
    }

    /// Nanoseconds of each run since then.
    pub(crate) fn each_since(self, before: Spent) -> f64 {
        (self.time - before.time).as_nanos() as f64 / (self.runs - before.runs) as f64
    }
}

/// What our program costs more than one that does nothing, on the same events.
pub(crate) struct Compared {
    /// Nanoseconds, with the clock that measures them.
    pub(crate) gross: f64,
    pub(crate) net: f64,
}

/// Watches two programs of one hook while `run` goes on.
pub(crate) fn compare(ours: u32, empty: u32, run: impl FnOnce() -> Result<()>) -> Result<Compared> {
    let before = (Spent::of(ours)?, Spent::of(empty)?);
    run()?;
    let after = (Spent::of(ours)?, Spent::of(empty)?);
    let gross = after.0.each_since(before.0);
    Ok(Compared { gross, net: gross - after.1.each_since(before.1) })
}
