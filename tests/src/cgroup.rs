//! cgroups: the mounts, the kernel's own count, and groups that a test makes for itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{self, Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use shaper_agent::kernel::hierarchy::{Hierarchies, place_of};

use crate::{
    bins::binary,
    net::{Netns, within},
    time::happens,
};

/// Where the cgroup hierarchies are mounted: v2, then each of v1.
pub fn mounts() -> (PathBuf, Vec<PathBuf>) {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let of = |kind: &str| -> Vec<PathBuf> {
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        fields.filter(|fields| fields[2] == kind).map(|fields| PathBuf::from(fields[1])).collect()
    };
    let v2 = of("cgroup2").into_iter().next();
    (v2.expect("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified"), of("cgroup"))
}

/// A name that no other fixture has.
pub fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("shaper-test-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A file of a cgroup, without the newline at its end.
pub fn read(group: impl AsRef<Path>, file: &str) -> String {
    let path = group.as_ref().join(file);
    let text = fs::read_to_string(&path);
    text.unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim_end().to_owned()
}

/// Writes a file of a cgroup.
pub fn write(group: impl AsRef<Path>, file: &str, value: &str) {
    let path = group.as_ref().join(file);
    fs::write(&path, value).unwrap_or_else(|error| panic!("{value} to {}: {error}", path.display()));
}

/// CPU time of a v2 cgroup by the kernel's own count, which needs no controller.
pub fn cpu_time(group: impl AsRef<Path>) -> Duration {
    let stat = read(group, "cpu.stat");
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Duration::from_micros(micros.and_then(|micros| micros.parse().ok()).expect("cpu.stat has usage_usec"))
}

/// The group that holds the CPU limits of the process `pid`, and whether it is one of v1.
pub fn cpu_group(pid: u32) -> (PathBuf, bool) {
    controller_group(pid, "cpu")
}

/// The group in which `controller` limits the process `pid`, and whether it is one of v1.
pub fn controller_group(pid: u32, controller: &str) -> (PathBuf, bool) {
    let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
    let v1 = hierarchies.v1.iter().find(|(name, _)| name == controller);
    let (controller, mount) =
        v1.map_or((None, &hierarchies.v2), |(name, mount)| (Some(name.as_str()), mount));
    let place = place_of(&pid.to_string(), controller).expect("the process is in every hierarchy");
    (mount.join(place), controller.is_some())
}

/// The groups right below those called `name`, in every hierarchy.
pub fn below(name: &str) -> Vec<PathBuf> {
    let (v2, v1) = mounts();
    let roots = v1.iter().chain([&v2]).flat_map(|mount| named(mount, name));
    let groups = roots.flat_map(|root| fs::read_dir(root).into_iter().flatten().flatten());
    let groups = groups.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    groups.map(|entry| entry.path()).collect()
}

/// The cgroups called `name` below `folder`, however deep.
pub(crate) fn named(folder: &Path, name: &str) -> Box<dyn Iterator<Item = PathBuf>> {
    let name = name.to_owned();
    let folders = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Box::new(folders.flat_map(move |entry| {
        let itself = (entry.file_name() == name.as_str()).then(|| entry.path());
        itself.into_iter().chain(named(&entry.path(), &name))
    }))
}

/// Whether the memory of tasks is limited by a v1 controller on this machine.
pub fn memory_is_v1() -> bool {
    let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
    hierarchies.v1.iter().any(|(controller, _)| controller == "memory")
}

/// The CPU quota of the process `pid` that is in force, µs in each period of 100 ms.
pub fn cpu_quota(pid: u32) -> u64 {
    let text = match cpu_group(pid) {
        (group, true) => read(group, "cpu.cfs_quota_us"),
        (group, false) => read(group, "cpu.max"),
    };
    let quota = text.split(' ').next().and_then(|quota| quota.parse().ok());
    quota.unwrap_or_else(|| panic!("the process {pid} has no quota, but {text}"))
}

/// In how many of the periods of its CPU quota the group of the process `pid` reached it, and how many
/// there were.
pub fn throttled_periods(pid: u32) -> (u64, u64) {
    let stat = read(cpu_group(pid).0, "cpu.stat");
    let count = |name: &str| {
        let count =
            stat.lines().find_map(|line| line.strip_prefix(name)).and_then(|count| count.trim().parse().ok());
        count.unwrap_or_else(|| panic!("no {name} in cpu.stat of the process {pid}"))
    };
    (count("nr_throttled "), count("nr_periods "))
}

/// A v2 cgroup of the test's own, as another manager would have it. Dropping it ends what runs in it.
pub struct TestCgroup {
    path: PathBuf,
}

impl TestCgroup {
    /// A new one below the root.
    pub fn new() -> TestCgroup {
        let path = mounts().0.join(unique_name());
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        TestCgroup { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a cgroup below it.
    pub fn make_child(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }

    /// Runs `test-load` in `group`, from its first instruction on. The caller reaps it.
    pub fn run(group: &Path, namespace: Option<&Netns>, arguments: &[&str]) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(group);
        command.arg(binary("test-load")).args(arguments);
        let child = within(namespace, || command.spawn());
        child.unwrap_or_else(|error| panic!("cannot run test-load in {}: {error}", group.display()))
    }
}

impl Default for TestCgroup {
    fn default() -> TestCgroup {
        TestCgroup::new()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        // What was killed is gone soon, but not at once; a group that stays is seen by its name.
        happens(|| remove(&self.path).is_ok());
    }
}

/// Removes a cgroup, if it is there, with those below it, which must be empty.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
