//! `shaper-agent calibrate`: measures what a block device can do, and puts that in force as the model of io.cost, so that
//! weights (`--io-weight`) divide the device.
//!
//! ```text
//! checks ──▶ idle? ──▶ reads, one after the other and anywhere ──▶ (writes, to a scratch file) ──▶ model ──▶ in force
//! ```
//!
//! io.cost reckons what each operation costs by a linear model, and lets each cgroup have its weight's part of the device.
//! A model that says more than the device can do divides nothing, for then the device is the bottleneck and not io.cost.
//! So the device is driven at nine tenths of the model ([`DRIVEN`]), always: promised latencies (`--io-latency`) are
//! `shaper_core::io::protect`'s to keep, not io.cost's.
//!
//! What was there before is on disk before anything is written (`record`), and comes back with
//! `shaper-agent calibrate --undo` and with `shaper-agent release --all`. A reboot forgets both.

mod probe;
pub(crate) mod record;

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use shaper_core::{
    id::BlockDevice,
    units::{BytesPerSec, Iops, Micros},
};

pub use record::restore_all;

use crate::{
    actuate::{self, ActuateError, Cost},
    durable,
    kernel::{
        cgroup::{
            Cgroup, CgroupError, Setting,
            block::{self, Control, CostModel, CostQos, OfDevice, PerTenThousand},
        },
        disks,
        hierarchy::Hierarchies,
    },
};
use probe::{Pattern, Rate, Target};

/// What to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The whole device: /dev/sda, sda or 8:0
    #[arg(value_name = "DEVICE")]
    pub device: String,
    /// Also measure writes, in this file, which must not be there: it is made on the device, and removed afterwards.
    /// Without it nothing is written, and writes are taken to cost what reads do
    #[arg(long, value_name = "FILE")]
    pub scratch: Option<PathBuf>,
    /// Size of the scratch file, MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=65_536))]
    pub scratch_size: u64,
    /// Print the model and put nothing in force
    #[arg(long)]
    pub dry_run: bool,
    /// Measure although others use the device: the model is then too low
    #[arg(long)]
    pub force: bool,
    /// Seconds for each measurement
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Operations under way at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub depth: u32,
    /// Measure nothing; put back what was in force before the first calibration
    #[arg(long, conflicts_with_all = ["scratch", "dry_run", "force"])]
    pub undo: bool,
    /// Directory of the agent's state, in which it is noted what was in force before
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shaper")]
    pub state_dir: PathBuf,
}

/// Why a device was not calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// No such device.
    #[error("there is no block device `{0}` (see `lsblk`)")]
    NoDevice(String),
    /// A part of one.
    #[error(
        "{0} is a partition, and io.cost is of whole devices; name the device that it is on (see `lsblk`)"
    )]
    Partition(String),
    /// One that lies on others, or has no queue.
    #[error("{0} does no requests itself: it lies on others, and io.cost is in force on those (see `lsblk`)")]
    Stacked(String),
    /// The kernel cannot.
    #[error(
        "{0} is not there: the kernel has no io.cost (CONFIG_BLK_CGROUP_IOCOST), or the io controller is not in cgroup \
         v2 (`shaper doctor` says). Weights work with the scheduler bfq all the same"
    )]
    NoIoCost(PathBuf),
    /// No cgroup v2.
    #[error("no cgroup v2 is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")]
    NoCgroup2,
    /// Others use it.
    #[error(
        "{device} is busy: others did {operations} operations in a second, and kept it busy for {busy_ms} ms of it. Stop \
         them, or say --force and take a model that is too low"
    )]
    Busy {
        /// The device.
        device: String,
        /// What was done.
        operations: u64,
        /// For how long.
        busy_ms: u64,
    },
    /// Too small a device.
    #[error("{device} has {size} bytes, too few to measure anything on")]
    Small {
        /// The device.
        device: String,
        /// Its size.
        size: u64,
    },
    /// The scratch file is elsewhere.
    #[error(
        "{file} would not be on {device}: name a new file in a file system that is directly on the device"
    )]
    Elsewhere {
        /// The scratch file.
        file: PathBuf,
        /// The device.
        device: String,
    },
    /// A file, or the device.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Nothing was ever calibrated.
    #[error("{0} was never calibrated, as far as {1} knows")]
    NothingToUndo(String, PathBuf),
    /// The root cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// What is put in force.
    #[error(transparent)]
    Actuate(#[from] ActuateError),
    /// What is written down.
    #[error(transparent)]
    Record(#[from] durable::Error),
}

/// How much of the model the device is driven at, of 10,000.
const DRIVEN: PerTenThousand = PerTenThousand(9_000);
/// io.cost reckons anew twice in each of these, as for any device that does not turn.
const LATENCY: Micros = Micros(25_000);
/// Busy for longer than this in a second, a device is not measured, ms.
const BUSY_MS: u64 = 50;
/// A device of less is not measured.
const SMALL: u64 = 16 << 20;

/// Calibrates a device, or takes that back. `say` is told what happens meanwhile; what is returned is for the user.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<String, CalibrateError> {
    let device = whole_device(&options.device)?;
    let hierarchies = Hierarchies::detect()
        .map_err(|source| file_error("read", "/proc/self/mountinfo", source))?
        .ok_or(CalibrateError::NoCgroup2)?;
    let mount = &hierarchies.v2;
    let root = Cgroup::open(mount, mount)?;
    if !root.has(block::COST_MODEL) {
        return Err(CalibrateError::NoIoCost(mount.join(block::COST_MODEL.name())));
    }
    let name = disks::name(device);
    if options.undo {
        let undone = record::restore(&options.state_dir, &root, device)?;
        return undone.ok_or(CalibrateError::NothingToUndo(name, options.state_dir.clone()));
    }
    // Before anything is measured.
    let scratch = options.scratch.as_deref().map(|file| on_device(file, device)).transpose()?;
    let size = size_of(device)?;
    if size < SMALL {
        return Err(CalibrateError::Small { device: name, size });
    }
    if !options.force {
        say("watching whether others use the device");
        idle(device, &name)?;
    }
    let before = actuate::io_cost(&root, device)?;
    // io.cost would hold back what it is to be measured by.
    let is_in_force = before.qos.is_some_and(|qos| qos.enable);
    if is_in_force {
        record::note(&options.state_dir, device, &before)?;
        let off = before.qos.map(|qos| CostQos { enable: false, ..qos });
        actuate::set_io_cost(&root, device, &Cost { qos: off, ..before })?;
    }
    let measured = measure(options, device, size, scratch, say);
    let model = match measured {
        Ok(model) => model,
        Err(error) => {
            if is_in_force {
                actuate::set_io_cost(&root, device, &before)?;
            }
            return Err(error);
        }
    };
    let qos = CostQos {
        enable: true,
        control: Control::User,
        read_percentile: PerTenThousand(0),
        read_latency: LATENCY,
        write_percentile: PerTenThousand(0),
        write_latency: LATENCY,
        min: DRIVEN,
        max: DRIVEN,
    };
    let mut text = format!("{name} ({device})\n");
    // Writing to a String does not fail.
    let _ = writeln!(text, "io.cost.model  {}", OfDevice(device, model).text());
    let _ = writeln!(text, "io.cost.qos    {}", OfDevice(device, qos).text());
    if scratch.is_none() {
        text +=
            "Writes were not measured, and are taken to cost what reads do; --scratch FILE measures them.\n";
    }
    if options.dry_run {
        if is_in_force {
            actuate::set_io_cost(&root, device, &before)?;
        }
        text += "Nothing was put in force (--dry-run).\n";
        return Ok(text);
    }
    record::note(&options.state_dir, device, &before)?;
    if let Err(error) = actuate::set_io_cost(&root, device, &Cost { model: Some(model), qos: Some(qos) }) {
        actuate::set_io_cost(&root, device, &before)?;
        return Err(error.into());
    }
    text += "In force until the next boot: `--io-weight` divides the device. `shaper-agent calibrate --undo` and \
             `shaper-agent release --all` put back what was there.\n";
    Ok(text)
}

fn measure(
    options: &Options,
    device: BlockDevice,
    size: u64,
    scratch: Option<&Path>,
    say: &mut dyn FnMut(&str),
) -> Result<CostModel, CalibrateError> {
    let (depth, time) = (options.depth, Duration::from_secs(options.seconds));
    let reads = Target::device(device, size)?;
    let read = three(&reads, depth, time, "read", say)?;
    let write = match scratch {
        Some(path) => {
            say("making the scratch file");
            three(&Target::scratch(path, options.scratch_size << 20)?, depth, time, "write", say)?
        }
        None => read,
    };
    let both = |part: fn(&Three) -> u64| [part(&read), part(&write)];
    Ok(CostModel {
        control: Control::User,
        bytes: both(|it| it.bytes).map(BytesPerSec),
        sequential: both(|it| it.sequential).map(Iops),
        random: both(|it| it.random).map(Iops),
    })
}

/// What the model wants to know of one direction, a second.
#[derive(Clone, Copy)]
struct Three {
    bytes: u64,
    sequential: u64,
    random: u64,
}

fn three(
    target: &Target,
    depth: u32,
    time: Duration,
    verb: &str,
    say: &mut dyn FnMut(&str),
) -> Result<Three, CalibrateError> {
    let mut rate = |pattern: Pattern, what: &str| -> Result<Rate, CalibrateError> {
        say(&format!("{verb}s {what}, {depth} at once, for {} s", time.as_secs()));
        let rate = target.rate(pattern, depth, time)?;
        say(&format!("  {} operations and {} bytes a second", rate.operations, rate.bytes));
        Ok(rate)
    };
    Ok(Three {
        random: rate(Pattern::Random, "of 4 KiB anywhere")?.operations,
        sequential: rate(Pattern::Sequential, "of 4 KiB in sequence")?.operations,
        bytes: rate(Pattern::Large, "of 256 KiB in sequence")?.bytes,
    })
}

fn file_error(verb: &'static str, path: impl Into<PathBuf>, source: io::Error) -> CalibrateError {
    CalibrateError::File { verb, path: path.into(), source }
}

/// A whole device that does requests itself, by its file, name or number.
fn whole_device(text: &str) -> Result<BlockDevice, CalibrateError> {
    let none = || CalibrateError::NoDevice(text.to_owned());
    let device = match text.parse::<BlockDevice>() {
        Ok(device) => device,
        Err(_) => {
            let path = if text.contains('/') { PathBuf::from(text) } else { Path::new("/dev").join(text) };
            let metadata = fs::metadata(path).map_err(|_| none())?;
            if !metadata.file_type().is_block_device() {
                return Err(none());
            }
            of_number(metadata.rdev())
        }
    };
    let path = sysfs(device);
    if !path.exists() {
        return Err(none());
    }
    if path.join("partition").exists() {
        return Err(CalibrateError::Partition(text.to_owned()));
    }
    if !disks::all().contains(&device) {
        return Err(CalibrateError::Stacked(text.to_owned()));
    }
    Ok(device)
}

fn of_number(number: u64) -> BlockDevice {
    BlockDevice { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
}

fn sysfs(device: BlockDevice) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{device}"))
}

fn size_of(device: BlockDevice) -> Result<u64, CalibrateError> {
    const SECTOR: u64 = 512;
    let path = sysfs(device).join("size");
    let text = fs::read_to_string(&path).map_err(|source| file_error("read", &path, source))?;
    let sectors = text.trim().parse::<u64>();
    Ok(sectors.map_err(|error| file_error("read", path, io::Error::other(error)))? * SECTOR)
}

/// A file that is to be made directly on a device, or on a partition of it.
fn on_device(file: &Path, device: BlockDevice) -> Result<&Path, CalibrateError> {
    let elsewhere = || CalibrateError::Elsewhere { file: file.to_owned(), device: disks::name(device) };
    if file.exists() {
        return Err(file_error("make", file, io::ErrorKind::AlreadyExists.into()));
    }
    let parent = file.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let metadata = fs::metadata(parent).map_err(|source| file_error("look at", parent, source))?;
    let of_file = of_number(metadata.dev());
    if of_file == device {
        return Ok(file);
    }
    let partition = fs::canonicalize(sysfs(of_file)).map_err(|_| elsewhere())?;
    let whole =
        partition.parent().map(|whole| whole.join("dev")).and_then(|path| fs::read_to_string(path).ok());
    let is_on_it = whole.and_then(|number| number.trim().parse::<BlockDevice>().ok()) == Some(device);
    if is_on_it { Ok(file) } else { Err(elsewhere()) }
}

/// Watches for a second whether a device is used.
fn idle(device: BlockDevice, name: &str) -> Result<(), CalibrateError> {
    let path = sysfs(device).join("stat");
    let read = || -> Result<(u64, u64), CalibrateError> {
        let text = fs::read_to_string(&path).map_err(|source| file_error("read", &path, source))?;
        Ok(done_and_busy(&text))
    };
    let (done_before, busy_before) = read()?;
    thread::sleep(Duration::from_secs(1));
    let (done, busy) = read()?;
    let (operations, busy_ms) = (done.saturating_sub(done_before), busy.saturating_sub(busy_before));
    if busy_ms > BUSY_MS {
        return Err(CalibrateError::Busy { device: name.to_owned(), operations, busy_ms });
    }
    Ok(())
}

/// Reads and writes that were done, and for how many milliseconds anything was under way
/// (Documentation/block/stat.rst).
fn done_and_busy(stat: &str) -> (u64, u64) {
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or(0);
    (field(0) + field(4), field(9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_whole_device_is_refused_with_its_reason() {
        for text in ["", "no-such-device", "/dev/null", "4000:1"] {
            assert!(matches!(whole_device(text), Err(CalibrateError::NoDevice(_))), "{text}");
        }
    }

    #[test]
    fn the_counts_of_a_device() {
        let stat = "  100 2 800 30   50 6 400 80    1   120   110    0 0 0 0   0 0\n";
        assert_eq!(done_and_busy(stat), (150, 120));
        assert_eq!(done_and_busy(""), (0, 0));
    }

    #[test]
    fn a_scratch_file_must_be_new_and_on_the_device() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = BlockDevice { major: 4000, minor: 1 };
        let file = directory.path().join("scratch");
        assert!(matches!(on_device(&file, nowhere), Err(CalibrateError::Elsewhere { .. })));
        fs::write(&file, "").unwrap();
        assert!(matches!(on_device(&file, nowhere), Err(CalibrateError::File { verb: "make", .. })));
    }
}
