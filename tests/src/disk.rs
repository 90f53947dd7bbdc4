//! The VM's disk, with a file system that is new in each test.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    fs::{major, minor, stat},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use tempfile::TempDir;

use crate::{cgroup::read, time::happens};

/// The VM has one; a machine of somebody's does not lose its own to a test.
pub(crate) const DEVICE: &str = "/dev/vda";

/// An empty ext4 on the disk, mounted. Dropping it unmounts it.
pub struct Disk {
    directory: TempDir,
    number: String,
}

impl Disk {
    /// Makes the file system, and mounts it in a directory of its own.
    pub fn format_and_mount() -> Disk {
        assert_vm();
        // Complete from the start: no thread of the kernel's writes to it behind a test's back.
        let options = ["-q", "-F", "-b", "4096", "-N", "1024", "-E", "lazy_itable_init=0", DEVICE];
        let output = Command::new("mkfs.ext4").args(options).output();
        let output = output.unwrap_or_else(|error| panic!("mkfs.ext4: {error}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mkfs.ext4 {DEVICE}: {}", said.trim());

        let directory = tempfile::Builder::new().prefix("shaper-test-disk-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        let mounted = mount(DEVICE, directory.path(), "ext4", MountFlags::empty(), None);
        mounted.unwrap_or_else(|error| panic!("cannot mount {DEVICE}: {error}"));
        let device = stat(directory.path()).expect("it is mounted").st_dev;
        Disk { directory, number: format!("{}:{}", major(device), minor(device)) }
    }

    /// A file on it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its device number, as the files of the io controller have it.
    pub fn number(&self) -> &str {
        &self.number
    }

    /// One of its counts in the io.stat of a cgroup, such as `wbytes`; 0 while there is none.
    pub fn io_stat(&self, group: impl AsRef<Path>, count: &str) -> u64 {
        let stat = read(group, "io.stat");
        let mut lines = stat.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let Some(fields) = lines.find(|fields| fields[0] == self.number) else { return 0 };
        let counts = fields.iter().filter_map(|field| field.split_once('='));
        let found = counts.filter(|(name, _)| *name == count).find_map(|(_, value)| value.parse().ok());
        found.unwrap_or_else(|| panic!("no {count} in io.stat: {fields:?}"))
    }
}

pub(crate) fn assert_vm() {
    assert!(
        std::env::var_os("SHAPER_VM").is_some(),
        "{DEVICE} is written to in the VM only: `cargo xtask vm`"
    );
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What was killed may be writing still, and keeps it busy.
        let mut end = Ok(());
        happens(|| {
            end = unmount(self.path(), UnmountFlags::empty());
            end != Err(Errno::BUSY)
        });
        if let Err(error) = end {
            eprintln!("cannot unmount {DEVICE}: {error}");
        }
    }
}
