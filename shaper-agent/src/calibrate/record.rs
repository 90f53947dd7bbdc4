//! What was in force on a device before it was first calibrated: `<state-dir>/io-cost@MAJOR:MINOR`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shaper_core::id::BlockDevice;

use super::CalibrateError;
use crate::{
    actuate::{self, Cost},
    durable,
    kernel::{cgroup::Cgroup, disks},
};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Before {
    boot_id: String,
    cost: Cost,
}

const PREFIX: &str = "io-cost@";

fn path(state_dir: &Path, device: BlockDevice) -> PathBuf {
    state_dir.join(format!("{PREFIX}{device}"))
}

fn boot_id() -> Result<String, CalibrateError> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(PATH).map_err(|source| super::file_error("read", PATH, source))?;
    Ok(text.trim().to_owned())
}

/// Writes down what is in force, unless that of this boot is known from before.
pub(super) fn note(state_dir: &Path, device: BlockDevice, cost: &Cost) -> Result<(), CalibrateError> {
    fs::create_dir_all(state_dir).map_err(|source| super::file_error("make", state_dir, source))?;
    let (path, boot_id) = (path(state_dir, device), boot_id()?);
    let known: Option<Before> = durable::read_json(&path)?;
    if known.is_some_and(|known| known.boot_id == boot_id) {
        return Ok(());
    }
    Ok(durable::write_json(&path, &Before { boot_id, cost: *cost }, 0o600)?)
}

/// Puts back what was in force on a device, and says so; `None` if it was never calibrated.
pub(super) fn restore(
    state_dir: &Path,
    root: &Cgroup,
    device: BlockDevice,
) -> Result<Option<String>, CalibrateError> {
    let path = path(state_dir, device);
    let Some(Before { boot_id: of_boot, cost }) = durable::read_json(&path)? else { return Ok(None) };
    // A boot forgets what was in force, and a device that is gone took it along.
    let is_there = of_boot == boot_id()? && disks::all().contains(&device);
    if is_there {
        actuate::set_io_cost(root, device, &cost)?;
    }
    fs::remove_file(&path).map_err(|source| super::file_error("remove", &path, source))?;
    Ok(Some(format!(
        "{} ({device}): io.cost is again as it was before it was calibrated",
        disks::name(device)
    )))
}

/// Puts back what was in force on every device that was calibrated. `mount`: that of cgroup v2.
pub fn restore_all(state_dir: &Path, mount: &Path) -> Result<Vec<String>, CalibrateError> {
    let entries = match fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(super::file_error("list", state_dir, source)),
    };
    let of_name = |name: &str| name.strip_prefix(PREFIX)?.parse::<BlockDevice>().ok();
    let devices: Vec<BlockDevice> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str().and_then(of_name)).collect();
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let root = Cgroup::open(mount, mount)?;
    let mut done = Vec::new();
    for device in devices {
        done.extend(restore(state_dir, &root, device)?);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_was_noted_in_a_boot_stands() {
        let directory = tempfile::tempdir().unwrap();
        let device = BlockDevice { major: 4000, minor: 1 };
        let first = Cost { model: None, qos: None };
        note(directory.path(), device, &first).unwrap();
        let text = fs::read_to_string(path(directory.path(), device)).unwrap();
        note(directory.path(), device, &first).unwrap();
        assert_eq!(fs::read_to_string(path(directory.path(), device)).unwrap(), text);
        // Of another boot it is nobody's any more.
        fs::write(path(directory.path(), device), text.replace(&boot_id().unwrap(), "other")).unwrap();
        note(directory.path(), device, &first).unwrap();
        assert_eq!(fs::read_to_string(path(directory.path(), device)).unwrap(), text);
    }
}
