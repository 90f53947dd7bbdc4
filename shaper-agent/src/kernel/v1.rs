//! cgroup v1 controllers of a hybrid host, through cgroups-rs: groups of our own, never the root's
//! files.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags};
use shaper_core::units::Bytes;

use cgroups_rs::{
    CgroupPid,
    fs::{Cgroup, cpu::CpuController, hierarchies::V1, memory::MemController},
};

use super::cgroup::{Contents, File, Malformed, Open, ReadOnly, file::Flat};

/// What the CPU quota denied.
pub const CPU_STAT: File<V1CpuStat, ReadOnly> = File::new("cpu.stat");
/// Memory in use.
pub const MEMORY_USAGE: File<Bytes, ReadOnly> = File::new("memory.usage_in_bytes");
/// The most that ever was.
pub const MEMORY_MAX_USAGE: File<Bytes, ReadOnly> = File::new("memory.max_usage_in_bytes");
/// Who was killed for want of memory.
pub const OOM_CONTROL: File<V1OomControl, ReadOnly> = File::new("memory.oom_control");

/// What of `cpu.stat` is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V1CpuStat {
    /// How long the group was stopped by its quota, ns.
    pub throttled_ns: u64,
}

impl Contents for V1CpuStat {
    fn from_text(text: &str) -> Result<V1CpuStat, Malformed> {
        Ok(V1CpuStat { throttled_ns: Flat::new(text).get("throttled_time")? })
    }
}

/// What of `memory.oom_control` is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V1OomControl {
    /// Processes killed (4.13).
    pub kills: u64,
}

impl Contents for V1OomControl {
    fn from_text(text: &str) -> Result<V1OomControl, Malformed> {
        Ok(V1OomControl { kills: Flat::new(text).get("oom_kill")? })
    }
}

/// Length of a CPU quota's period, µs: the kernel's default.
pub const PERIOD_US: u64 = 100_000;

/// What went wrong with a v1 group.
#[derive(Debug, thiserror::Error)]
pub enum V1Error {
    /// A file of it.
    #[error("cannot {verb} the cgroup v1 group {group}: {cause}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The group.
        group: PathBuf,
        /// What went wrong. (cgroups-rs does not make it a source.)
        cause: cgroups_rs::fs::error::Error,
    },
    /// It is not there, or cannot be looked at.
    #[error("cannot find the cgroup v1 group {group}")]
    Gone {
        /// The group.
        group: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It has another controller.
    #[error("the cgroup v1 group {0} has no such controller")]
    NoController(PathBuf),
}

/// A group of one v1 controller.
pub struct V1Group {
    cgroup: Cgroup,
    directory: PathBuf,
    controller: String,
}

impl V1Group {
    /// The group `path` (from the mount point on) of `controller`, made if it is not there.
    pub fn make(mount: &Path, controller: &str, path: &Path) -> Result<V1Group, V1Error> {
        let group = V1Group::open(mount, controller, path);
        group.cgroup.create().map_err(group.error("make"))?;
        Ok(group)
    }

    /// The group `path`, which need not be there.
    pub fn open(mount: &Path, controller: &str, path: &Path) -> V1Group {
        let cgroup =
            Cgroup::load_with_specified_controllers(Box::new(V1::new()), path, vec![controller.to_owned()]);
        V1Group { cgroup, directory: mount.join(path), controller: controller.to_owned() }
    }

    fn error(&self, verb: &'static str) -> impl FnOnce(cgroups_rs::fs::error::Error) -> V1Error {
        let group = self.directory.clone();
        move |cause| V1Error::File { verb, group, cause }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its id in its hierarchy: another number space than that of cgroup v2.
    pub fn id(&self) -> Result<u64, V1Error> {
        let found = std::fs::metadata(&self.directory);
        found
            .map(|found| found.ino())
            .map_err(|source| V1Error::Gone { group: self.directory.clone(), source })
    }

    /// Its controller.
    pub fn controller(&self) -> &str {
        &self.controller
    }

    /// Opens a file to read it again and again; `None` where the kernel has no such file, or the group is gone.
    pub fn open_file<R, W>(&self, file: File<R, W>) -> Option<Open<R, W>> {
        let path = self.directory.join(file.name());
        let fd = rustix::fs::openat(CWD, &path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Some(Open::new(fd, self.directory.as_path().into(), file))
    }

    /// Whether its directory is there.
    pub fn exists(&self) -> bool {
        self.directory.is_dir()
    }

    /// `cpu.cfs_quota_us`, for a period of [`PERIOD_US`]; −1 is no quota.
    pub fn cpu_quota(&self) -> Result<i64, V1Error> {
        self.cpu()?.cfs_quota().map_err(self.error("read cpu.cfs_quota_us of"))
    }

    /// Sets `cpu.cfs_quota_us`.
    pub fn set_cpu_quota(&self, quota_us: i64) -> Result<(), V1Error> {
        self.cpu()?.set_cfs_quota(quota_us).map_err(self.error("write cpu.cfs_quota_us of"))
    }

    /// `cpu.shares`.
    pub fn cpu_shares(&self) -> Result<u64, V1Error> {
        self.cpu()?.shares().map_err(self.error("read cpu.shares of"))
    }

    /// Sets `cpu.shares`.
    pub fn set_cpu_shares(&self, shares: u64) -> Result<(), V1Error> {
        self.cpu()?.set_shares(shares).map_err(self.error("write cpu.shares of"))
    }

    /// `memory.limit_in_bytes`.
    pub fn memory_limit(&self) -> Result<i64, V1Error> {
        Ok(self.memory()?.memory_stat().limit_in_bytes)
    }

    /// Sets `memory.limit_in_bytes`; −1 is no limit. v1 reclaims, and answers EBUSY rather than kill.
    pub fn set_memory_limit(&self, bytes: i64) -> Result<(), V1Error> {
        self.memory()?.set_limit(bytes).map_err(self.error("write memory.limit_in_bytes of"))
    }

    /// `memory.usage_in_bytes`.
    pub fn memory_usage(&self) -> Result<u64, V1Error> {
        Ok(self.memory()?.memory_stat().usage_in_bytes)
    }

    /// `memory.max_usage_in_bytes`.
    pub fn memory_peak(&self) -> Result<u64, V1Error> {
        Ok(self.memory()?.memory_stat().max_usage_in_bytes)
    }

    /// Adds a process.
    pub fn add(&self, process: u32) -> Result<(), V1Error> {
        self.cgroup
            .add_task_by_tgid(CgroupPid::from(u64::from(process)))
            .map_err(self.error("add a process to"))
    }

    /// Moves every process to the group `target`.
    pub fn evacuate(&self, target: &V1Group) -> Result<(), V1Error> {
        // A process may fork while it is moved; its child is found by the next look.
        for _ in 0..1000 {
            let processes = self.cgroup.procs();
            if processes.is_empty() {
                break;
            }
            for process in processes {
                match target.add(process.pid as u32) {
                    // The process may have ended.
                    Err(_) if !Path::new(&format!("/proc/{}", process.pid)).exists() => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Removes the group, which must be empty. Gone already is as good.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn cpu(&self) -> Result<&CpuController, V1Error> {
        self.cgroup.controller_of().ok_or_else(|| V1Error::NoController(self.directory.clone()))
    }

    fn memory(&self) -> Result<&MemController, V1Error> {
        self.cgroup.controller_of().ok_or_else(|| V1Error::NoController(self.directory.clone()))
    }
}

/// `cpu.shares` for a `cpu.weight`: 100 corresponds to the default of 1024.
pub fn shares_of_weight(weight: u32) -> u64 {
    (u64::from(weight) * 1024 / 100).max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_kernel() {
        let text = "nr_periods 5\nnr_throttled 2\nthrottled_time 123456789\nnr_bursts 0\nburst_time 0";
        assert_eq!(V1CpuStat::from_text(text), Ok(V1CpuStat { throttled_ns: 123_456_789 }));
        assert!(V1CpuStat::from_text("nr_periods 5").is_err());
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 2";
        assert_eq!(V1OomControl::from_text(text), Ok(V1OomControl { kills: 2 }));
    }
}
