//! A device without a medium (null_blk) that takes its time: each operation as long, and only so many at once, as a disk
//! has it. What it is given at once beyond that waits.

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::mount::{MountFlags, mount};

use crate::{disk::assert_vm, time::eventually};

const CONFIG: &str = "/sys/kernel/config";

/// The device. Dropping it takes it away; nobody may use it then.
pub struct SlowDisk {
    config: PathBuf,
    path: PathBuf,
    number: String,
}

impl SlowDisk {
    /// One that takes `time` for each operation, and does `depth` at once. Everybody may read and write it.
    pub fn new(time: Duration, depth: u32) -> SlowDisk {
        assert_vm();
        let nullb = Path::new(CONFIG).join("nullb");
        if !nullb.exists() {
            let mounted = mount("configfs", CONFIG, "configfs", MountFlags::empty(), None);
            mounted.unwrap_or_else(|error| panic!("cannot mount configfs at {CONFIG}: {error}"));
        }
        let before = devices();
        let config = nullb.join("nullb7");
        fs::create_dir(&config).unwrap_or_else(|error| panic!("{}: {error}", config.display()));
        let nanos = time.as_nanos().to_string();
        let depth = depth.to_string();
        let settings = [
            ("size", "256"), // MiB
            ("queue_mode", "2"),
            ("submit_queues", "1"),
            ("irqmode", "2"),
            ("completion_nsec", &nanos),
            ("hw_queue_depth", &depth),
            ("memory_backed", "0"),
            ("power", "1"),
        ];
        for (name, value) in settings {
            let file = config.join(name);
            fs::write(&file, value).unwrap_or_else(|error| panic!("{value} to {}: {error}", file.display()));
        }
        // Kernels name it differently.
        let name = devices().difference(&before).next().cloned().expect("the device has appeared");
        let path = Path::new("/dev").join(&name);
        eventually("its device file is there", || path.exists());
        fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("it is ours");
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).expect("it is there");
        SlowDisk { config, path, number: number.trim().to_owned() }
    }

    /// Its device file.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Its device number, as the files of the io controller have it.
    pub fn number(&self) -> &str {
        &self.number
    }
}

fn devices() -> BTreeSet<String> {
    let entries = fs::read_dir("/sys/block").expect("sysfs is mounted").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let off = fs::write(self.config.join("power"), "0").and_then(|()| fs::remove_dir(&self.config));
        if let Err(error) = off {
            eprintln!("cannot take {} away: {error}", self.config.display());
        }
    }
}
