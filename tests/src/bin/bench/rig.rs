//! The machine, and places in it for what is measured: cgroups, a cable, a file.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::programs::loaded_programs;
use shaper_agent::kernel::{
    features,
    hierarchy::{Hierarchies, place_of},
    v1::V1Group,
};
use shaper_tests::{
    cgroup::unique_name,
    net::{DEVICE, NetPair, Netns},
};
use tempfile::TempDir;

/// The CPU that is measured on: the last, which has the fewest interrupts.
pub(crate) fn cpu() -> usize {
    std::thread::available_parallelism().map_or(0, |cpus| cpus.get() - 1)
}

/// Where figures are measured: on this host, or in the VM on a series of kernels.
pub(crate) fn place() -> String {
    if std::env::var_os("SHAPER_VM").is_none() {
        return "host".to_owned();
    }
    let release = features::release();
    format!("vm {}", release.splitn(3, '.').take(2).collect::<Vec<_>>().join("."))
}

/// What a reader of the figures must know about this machine.
pub(crate) fn describe() -> Result<String> {
    let hierarchies = hierarchies()?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let load = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    let others = loaded_programs().flatten().filter(|program| program.name_as_str() == Some("sched_switch"));
    Ok(format!(
        "{}: kernel {}, {} CPUs ({}), {} cgroups, load {}, {} sched_switch programs of others",
        place(),
        features::release(),
        cpu() + 1,
        model.map_or("unknown", |(_, name)| name),
        hierarchies.name(),
        load.split(' ').next().unwrap_or("unknown"),
        others.count(),
    ))
}

pub(crate) fn hierarchies() -> Result<Hierarchies> {
    Hierarchies::detect().context("cannot read /proc/self/mountinfo")?.context("no cgroup v2 is mounted")
}

/// The id that the kernel programs know a cgroup by.
pub(crate) fn id(group: &Path) -> Result<u64> {
    let found = fs::metadata(group).with_context(|| format!("cannot look at {}", group.display()))?;
    Ok(found.ino())
}

/// A group of the v1 controller for block IO, where that is not one of v2.
pub(crate) struct IoGroup(V1Group);

impl IoGroup {
    pub(crate) fn make() -> Result<Option<IoGroup>> {
        let hierarchies = hierarchies()?;
        let Some((controller, mount)) = hierarchies.v1.iter().find(|(name, _)| name == "blkio") else {
            return Ok(None);
        };
        let place = place_of("self", Some(controller)).context("cannot read /proc/self/cgroup")?;
        Ok(Some(IoGroup(V1Group::make(mount, controller, &place.join(unique_name()))?)))
    }

    pub(crate) fn directory(&self) -> &Path {
        self.0.directory()
    }

    pub(crate) fn id(&self) -> Result<u64> {
        Ok(self.0.id()?)
    }
}

impl Drop for IoGroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("bench: cannot remove {}: {error}", self.directory().display());
        }
    }
}

/// A file on the disk that the build is on, for direct reads.
pub(crate) struct OnDisk {
    _directory: TempDir,
    path: PathBuf,
}

/// More than a disk's own cache of reads ahead.
const FILE_BYTES: usize = 64 << 20;
const PART: usize = 1 << 16;

impl OnDisk {
    pub(crate) fn make() -> Result<OnDisk> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let place = program.parent().unwrap_or(Path::new("/"));
        let directory = TempDir::new_in(place)
            .with_context(|| format!("cannot make a directory in {}", place.display()))?;
        let path = directory.path().join("data");
        let write = || -> Result<()> {
            let mut file = File::create(&path)?;
            // Not zeros, which a disk need not read.
            for part in 1..=FILE_BYTES / PART {
                file.write_all(&[part as u8; PART])?;
            }
            Ok(file.sync_all()?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(OnDisk { _directory: directory, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Address and port of the far end's receivers.
pub(crate) const FAR: &str = "10.99.0.2:5001";

/// A cable whose ends know each other: nothing but what is sent passes it.
pub(crate) fn quiet_cable() -> Result<NetPair> {
    let pair = NetPair::new();
    for (end, last) in [(&pair.near, 1), (&pair.far, 2)] {
        quieten(end, DEVICE, last)?;
    }
    know(&pair.near, "10.99.0.2", DEVICE, 2);
    know(&pair.far, "10.99.0.1", DEVICE, 1);
    Ok(pair)
}

/// Gives a device an address that is known beforehand, and no IPv6, which talks by itself.
pub(crate) fn quieten(namespace: &Netns, device: &str, last: u8) -> Result<()> {
    namespace.ip(&["link", "set", device, "address", &mac(last)]);
    let switch = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    match namespace.within(|| fs::write(&switch, "1")) {
        // No IPv6 here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("cannot write {switch}")),
    }
}

/// Tells a namespace where an address is, so that it need not ask.
pub(crate) fn know(namespace: &Netns, address: &str, device: &str, last: u8) {
    let at = mac(last);
    namespace.ip(&["neighbour", "replace", address, "lladdr", &at, "dev", device, "nud", "permanent"]);
}

fn mac(last: u8) -> String {
    format!("02:00:00:00:99:{last:02x}")
}

/// Bytes that a device has received and sent, by its own count.
pub(crate) fn device_bytes(namespace: &Netns, device: &str) -> Result<(u64, u64)> {
    let text = namespace.within(|| fs::read_to_string("/proc/thread-self/net/dev"));
    let text = text.context("cannot read /proc/thread-self/net/dev")?;
    let counts = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let field = |index: usize| counts?.split_whitespace().nth(index)?.parse().ok();
    field(0).zip(field(8)).with_context(|| format!("no counts of {device} in /proc/net/dev"))
}

/// Flushes what is dirty, so that writeback does not fall into a measurement.
pub(crate) fn settle_disk(file: &Path) -> Result<()> {
    let file = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    rustix::fs::syncfs(file.as_fd()).context("cannot flush the file system")
}
