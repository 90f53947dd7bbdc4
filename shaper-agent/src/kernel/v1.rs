//! cgroup v1 controllers of a hybrid host, through cgroups-rs: groups of our own, never the root's
//! files.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags};
use serde::{Deserialize, Serialize};
use shaper_core::{
    id::BlockDevice,
    limits::Limit,
    units::{Bytes, BytesPerSec, Iops, Micros, Millicores, Weight},
};

use super::cgroup::{
    CgroupError, Contents, File, Malformed, Open, ReadOnly, Setting,
    block::IoLimits,
    cpu::{Bandwidth, BandwidthStep, CpuMax},
    file::{Flat, number},
};
use cgroups_rs::{
    CgroupPid,
    fs::{Cgroup, hierarchies::V1},
};

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

/// CPU time in each period.
pub const CPU_QUOTA: File<V1Limit<Micros>> = File::new("cpu.cfs_quota_us");
/// Length of a period.
pub const CPU_PERIOD: File<Micros> = File::new("cpu.cfs_period_us");
/// What of an unused quota is kept for the next periods (5.14).
pub const CPU_BURST: File<Micros> = File::new("cpu.cfs_burst_us");
/// Share of a contended CPU.
pub const CPU_SHARES: File<Shares> = File::new("cpu.shares");
/// Whether it runs only where nobody else would (5.15).
pub const CPU_IDLE: File<bool> = File::new("cpu.idle");
/// What it may use. v1 reclaims, and answers EBUSY rather than kill.
pub const MEMORY_LIMIT: File<V1Limit<Bytes>> = File::new("memory.limit_in_bytes");
/// Bytes a second, then operations: read, written.
pub const IO_RATES: [File<V1Rates, V1Rate>; 4] = [
    File::new("blkio.throttle.read_bps_device"),
    File::new("blkio.throttle.write_bps_device"),
    File::new("blkio.throttle.read_iops_device"),
    File::new("blkio.throttle.write_iops_device"),
];

/// A limit that v1 writes as −1 where there is none, and shows as that or as more than can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V1Limit<T>(pub Limit<T>);

/// Above this there is no limit: v1 shows the largest number of pages.
const BEYOND: u64 = i64::MAX as u64 / 2;

impl Contents for V1Limit<Bytes> {
    fn from_text(text: &str) -> Result<V1Limit<Bytes>, Malformed> {
        match Bytes::from_text(text)? {
            Bytes(BEYOND..) => Ok(V1Limit(Limit::Unlimited)),
            bytes => Ok(V1Limit(Limit::At(bytes))),
        }
    }
}

impl Contents for V1Limit<Micros> {
    fn from_text(text: &str) -> Result<V1Limit<Micros>, Malformed> {
        if text == "-1" {
            return Ok(V1Limit(Limit::Unlimited));
        }
        Micros::from_text(text).map(|micros| V1Limit(Limit::At(micros)))
    }
}

impl<T: Setting> Setting for V1Limit<T> {
    fn text(&self) -> String {
        match &self.0 {
            Limit::Unlimited => "-1".into(),
            Limit::At(value) => value.text(),
        }
    }
}

/// `cpu.shares`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares(pub u64);

impl Shares {
    /// The shares for a `cpu.weight`: 100 corresponds to the default of 1024.
    pub fn of(weight: Weight) -> Shares {
        Shares((u64::from(weight.get()) * 1024 / 100).max(2))
    }
}

impl Contents for Shares {
    fn from_text(text: &str) -> Result<Shares, Malformed> {
        number(text).map(Shares)
    }
}

impl Setting for Shares {
    fn text(&self) -> String {
        self.0.to_string()
    }
}

/// A ceiling for each device that has one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct V1Rates(pub BTreeMap<BlockDevice, u64>);

impl Contents for V1Rates {
    fn from_text(text: &str) -> Result<V1Rates, Malformed> {
        let line = |line: &str| {
            let (device, rate) = line.split_once(' ').ok_or_else(|| Malformed::new(line))?;
            Ok((device.parse().map_err(|_| Malformed::new(line))?, number(rate)?))
        };
        Ok(V1Rates(text.lines().map(line).collect::<Result<_, _>>()?))
    }
}

/// The ceiling of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V1Rate(pub BlockDevice, pub Limit<u64>);

impl Setting for V1Rate {
    fn text(&self) -> String {
        // v1 takes 0 for none.
        format!("{} {}", self.0, self.1.at().unwrap_or(0))
    }
}

/// What went wrong with a v1 group.
#[derive(Debug, thiserror::Error)]
pub enum V1Error {
    /// Making it, or moving processes to it.
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
    /// A value in a file of it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl V1Error {
    /// What the kernel answered to a read or a write of a file.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        if let V1Error::Cgroup(error) = self { error.errno() } else { None }
    }
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
        let group = V1Group::at(mount, controller, path);
        group.cgroup.create().map_err(group.error("make"))?;
        Ok(group)
    }

    /// The group `path`, which need not be there.
    pub fn at(mount: &Path, controller: &str, path: &Path) -> V1Group {
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
        self.open(file, OFlags::RDONLY).ok()
    }

    /// Opens a file to read and write it again and again; `None` where the kernel has no such file.
    pub fn open_file_to_write<R, W: Setting>(&self, file: File<R, W>) -> Result<Option<Open<R, W>>, V1Error> {
        self.open_if_there(file, OFlags::RDWR)
    }

    fn open_if_there<R, W>(&self, file: File<R, W>, access: OFlags) -> Result<Option<Open<R, W>>, V1Error> {
        match self.open(file, access) {
            Ok(open) => Ok(Some(open)),
            Err(V1Error::Cgroup(error)) if error.is_gone() && self.exists() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open<R, W>(&self, file: File<R, W>, access: OFlags) -> Result<Open<R, W>, V1Error> {
        let path = self.directory.join(file.name());
        match rustix::fs::openat(CWD, &path, access | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(fd) => Ok(Open::new(fd, self.directory.as_path().into(), file)),
            Err(errno) => Err(CgroupError::Open { path, source: errno.into() }.into()),
        }
    }

    /// Whether its directory is there.
    pub fn exists(&self) -> bool {
        self.directory.is_dir()
    }

    /// What a file says.
    pub fn get<R: Contents, W>(&self, file: File<R, W>) -> Result<R, V1Error> {
        Ok(self.open(file, OFlags::RDONLY)?.read()?)
    }

    /// What a file says; `None` where the kernel has none.
    pub fn find<R: Contents, W>(&self, file: File<R, W>) -> Result<Option<R>, V1Error> {
        let open = self.open_if_there(file, OFlags::RDONLY)?;
        Ok(open.map(|open| open.read()).transpose()?)
    }

    /// Writes a file.
    pub fn set<R, W: Setting>(&self, file: File<R, W>, value: &W) -> Result<(), V1Error> {
        Ok(self.open(file, OFlags::WRONLY)?.write(value)?)
    }

    /// Quota, period and burst.
    pub fn bandwidth(&self) -> Result<Bandwidth, V1Error> {
        let max = CpuMax { quota: self.get(CPU_QUOTA)?.0, period: self.get(CPU_PERIOD)? };
        Ok(Bandwidth { max, burst: self.find(CPU_BURST)? })
    }

    /// Sets them, in the order that the kernel takes: quota and period are two files, and what is between two writes may
    /// not be more than the group above has.
    pub fn set_bandwidth(&self, to: &Bandwidth) -> Result<(), V1Error> {
        let from = self.bandwidth()?;
        for step in to.steps(&from) {
            match step {
                BandwidthStep::Max(max) => {
                    if max.period > from.max.period {
                        self.set(CPU_PERIOD, &max.period)?;
                    }
                    if max.quota != from.max.quota {
                        self.set(CPU_QUOTA, &V1Limit(max.quota))?;
                    }
                    if max.period < from.max.period {
                        self.set(CPU_PERIOD, &max.period)?;
                    }
                }
                BandwidthStep::Burst(burst) => self.set(CPU_BURST, &burst)?,
            }
        }
        Ok(())
    }

    /// The lowest CPU limit of the groups above, and whose it is.
    pub fn limit_above(&self) -> Option<(PathBuf, Millicores)> {
        let limit = |directory: &Path| -> Option<Limit<Millicores>> {
            let read = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
            let quota = V1Limit::<Micros>::from_text(read(CPU_QUOTA.name())?.trim_end()).ok()?.0;
            let period = Micros::from_text(read(CPU_PERIOD.name())?.trim_end()).ok()?;
            Some(CpuMax { quota, period }.cores())
        };
        let above = self.directory.ancestors().skip(1);
        // The root has no such files.
        let limits = above.map_while(|directory| Some((directory, limit(directory)?)));
        let limited = limits.filter_map(|(directory, limit)| Some((directory.to_owned(), limit.at()?)));
        limited.min_by_key(|(_, limit)| *limit)
    }

    /// The ceilings of a device.
    pub fn io_limits(&self, device: BlockDevice) -> Result<IoLimits, V1Error> {
        let rate = |index: usize| -> Result<Limit<u64>, V1Error> {
            let rates = self.get(IO_RATES[index])?;
            Ok(rates.0.get(&device).copied().map_or(Limit::Unlimited, Limit::At))
        };
        Ok(IoLimits {
            read: rate(0)?.map(BytesPerSec),
            write: rate(1)?.map(BytesPerSec),
            read_operations: rate(2)?.map(Iops),
            write_operations: rate(3)?.map(Iops),
        })
    }

    /// Sets the ceilings of a device.
    pub fn set_io_limits(&self, device: BlockDevice, limits: &IoLimits) -> Result<(), V1Error> {
        let IoLimits { read, write, read_operations, write_operations } = *limits;
        let bytes = [read, write].map(|limit| limit.map(|BytesPerSec(bytes)| bytes));
        let operations = [read_operations, write_operations].map(|limit| limit.map(|Iops(iops)| iops));
        for (file, limit) in IO_RATES.into_iter().zip(bytes.into_iter().chain(operations)) {
            self.set(file, &V1Rate(device, limit))?;
        }
        Ok(())
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

    #[test]
    fn no_limit_has_three_forms() {
        let bytes = V1Limit::<Bytes>::from_text;
        assert_eq!(bytes("9223372036854771712"), Ok(V1Limit(Limit::Unlimited)));
        assert_eq!(bytes("1048576"), Ok(V1Limit(Limit::At(Bytes(1 << 20)))));
        assert!(bytes("-2").is_err());
        let micros = V1Limit::<Micros>::from_text;
        assert_eq!(micros("-1"), Ok(V1Limit(Limit::Unlimited)));
        assert_eq!(micros("50000"), Ok(V1Limit(Limit::At(Micros(50_000)))));
        assert_eq!(V1Limit(Limit::<Micros>::Unlimited).text(), "-1");
        let device = BlockDevice { major: 8, minor: 0 };
        assert_eq!(V1Rates::from_text("8:0 5\n7:1 6").unwrap().0[&device], 5);
        assert_eq!(V1Rate(device, Limit::Unlimited).text(), "8:0 0");
        assert!(V1Rates::from_text("8:0").is_err());
    }

    #[test]
    fn shares_of_a_weight() {
        assert_eq!(Shares::of(Weight::DEFAULT), Shares(1024));
        assert_eq!(Shares::of(Weight::new(1).unwrap()), Shares(10));
    }
}
