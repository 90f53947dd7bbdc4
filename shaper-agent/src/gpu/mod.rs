//! The GPU cards of this node: what there is, and who uses it.
//!
//! What NVIDIA's driver says comes through NVML, which may block for as long as the driver pleases: a thread of its own
//! asks, and the node takes what it last said. Cards that no NVML knows are named by their devices (`--gpu-device`). Each
//! card has a number, which it keeps as long as the machine runs, whatever becomes of it or of the agent.

mod holders;
mod nvml;
mod reader;
mod table;

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{major, minor};
use shaper_core::{gpu::CharDevice, units::Bytes};

pub use self::{
    holders::{CardError, Facts, HolderError, Holders, MemoryLimit, region},
    reader::{Asked, PERIOD, Reader},
    table::{Table, TableError},
};

/// Which library is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Library {
    /// `libnvidia-ml.so.1`, if it is there.
    Auto,
    /// None.
    Off,
    /// This one.
    At(PathBuf),
}

impl Library {
    /// `auto`, `off` or a path.
    pub fn parse(text: &str) -> Result<Library, String> {
        match text {
            "auto" => Ok(Library::Auto),
            "off" => Ok(Library::Off),
            path if path.starts_with('/') => Ok(Library::At(path.into())),
            _ => Err("say auto, off, or the absolute path of a libnvidia-ml.so.1".to_owned()),
        }
    }
}

/// What the library said last.
#[derive(Clone, Debug)]
pub struct Reading {
    /// When, `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// Whether it can be asked at all.
    pub library: LibraryState,
    /// The cards that it knows, or has known.
    pub cards: Vec<CardReading>,
    /// Cards that it counts and says nothing of, and why.
    pub unknown: Vec<String>,
}

/// Whether the library can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibraryState {
    /// It was not yet.
    Unasked,
    /// It is not there.
    Absent {
        /// How that was seen.
        evidence: String,
    },
    /// It is there, and does not work.
    Failing {
        /// Why.
        reason: String,
    },
    /// It works.
    Ready {
        /// Version of the driver.
        driver: String,
    },
}

/// A card as the library last spoke of it.
#[derive(Clone, Debug)]
pub struct CardReading {
    /// Its UUID.
    pub id: String,
    /// Its model.
    pub model: String,
    /// Its device; `None` where the driver gives it none.
    pub device: Option<CharDevice>,
    /// Its PCI address, such as `0000:65:00.0`.
    pub pci: Option<String>,
    /// Whether it is a part of a card, cut by the hardware (MIG).
    pub is_part: bool,
    /// What it does, or why that is not known.
    pub figures: Result<Figures, String>,
}

/// An error that the driver told of, by its number (XID).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xid {
    /// The card, by its UUID.
    pub card: String,
    /// The number; `None`: the driver does not know.
    pub code: Option<u64>,
}

/// What a card does.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Its memory.
    pub memory: Bytes,
    /// Of that: what is in use.
    pub memory_used: Bytes,
    /// How busy it is, per cent.
    pub busy_percent: Option<u32>,
    /// Temperature, °C.
    pub temperature_celsius: Option<u32>,
    /// Whether the driver limits its memory by cgroup; else why not.
    pub memory_limits: Result<(), String>,
    /// Who has memory of it: each cgroup once, without those of processes that have ended since.
    pub uses: Vec<CgroupUse>,
}

/// What the processes of a cgroup have of the memory of a card, without those of cgroups below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupUse {
    /// The cgroup of v2, below the mount.
    pub cgroup: Arc<Path>,
    /// How much, as far as the driver says.
    pub memory: Bytes,
    /// How many processes have it.
    pub processes: u32,
}

/// The device behind a path.
pub fn char_device(path: &Path) -> io::Result<CharDevice> {
    let metadata = fs::metadata(path)?;
    if !metadata.file_type().is_char_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a character device"));
    }
    Ok(CharDevice { major: major(metadata.rdev()), minor: minor(metadata.rdev()) })
}

/// The driver of a device by its name in sysfs, such as `amdgpu`.
pub fn driver(device: CharDevice) -> Option<String> {
    let link = fs::read_link(format!("/sys/dev/char/{device}/device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// The PCI address of a device by sysfs.
pub fn pci(device: CharDevice) -> Option<String> {
    let link = fs::read_link(format!("/sys/dev/char/{device}/device")).ok()?;
    let name = link.file_name()?.to_string_lossy().into_owned();
    (name.split(':').count() == 3).then_some(name)
}

/// The number that NVIDIA's devices have had since there were any …
const NVIDIA_MAJOR: u32 = 195;

/// … and the one that they have here.
fn nvidia_major(proc_devices: &str) -> u32 {
    let of_line = |line: &str| {
        let (number, name) = line.trim().split_once(' ')?;
        matches!(name.trim(), "nvidia" | "nvidia-frontend").then(|| number.parse().ok())?
    };
    proc_devices.lines().find_map(of_line).unwrap_or(NVIDIA_MAJOR)
}

/// The number that the devices of the parts of cards have here; 0, which no device has, where there are none.
fn caps_major(proc_devices: &str) -> u32 {
    let of_line = |line: &str| line.trim().strip_suffix(" nvidia-caps")?.parse().ok();
    proc_devices.lines().find_map(of_line).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_a_word_or_an_absolute_path() {
        assert_eq!(Library::parse("auto"), Ok(Library::Auto));
        assert_eq!(Library::parse("off"), Ok(Library::Off));
        assert_eq!(Library::parse("/a/b.so"), Ok(Library::At("/a/b.so".into())));
        assert!(Library::parse("b.so").is_err() && Library::parse("").is_err());
    }

    #[test]
    fn the_major_number_is_the_kernel_s_or_the_usual_one() {
        let listed = "Character devices:\n  1 mem\n 511 nvidia-uvm\n 235 nvidia\n\nBlock devices:\n";
        assert_eq!(nvidia_major(listed), 235);
        assert_eq!(nvidia_major("Character devices:\n195 nvidia-frontend\n"), 195);
        assert_eq!(nvidia_major("Character devices:\n  1 mem\n"), NVIDIA_MAJOR);
        assert_eq!(caps_major("Character devices:\n 195 nvidia\n 237 nvidia-caps\n"), 237);
        assert_eq!(caps_major("Character devices:\n 195 nvidia\n"), 0);
    }

    #[test]
    fn a_device_is_what_its_node_says() {
        assert_eq!(char_device(Path::new("/dev/null")).unwrap(), CharDevice { major: 1, minor: 3 });
        assert!(char_device(Path::new("/proc/self/status")).is_err());
    }
}
