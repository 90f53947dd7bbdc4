//! The block devices of this machine, by sysfs.

use std::{fs, path::Path};

use shaper_core::id::BlockDevice;

/// The whole devices that do requests themselves: where one lies on others, its IO is theirs as well.
pub fn all() -> Vec<BlockDevice> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let read = |path: &Path, name: &str| fs::read_to_string(path.join(name)).ok();
    // Without a queue of requests there is nothing that a program could count.
    let does_requests =
        |path: &Path| path.join("mq").exists() && read(path, "size").is_some_and(|size| size.trim() != "0");
    let mut found: Vec<BlockDevice> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| does_requests(path) && !is_stacked(path))
        .filter_map(|path| read(&path, "dev")?.trim().parse().ok())
        .collect();
    found.sort();
    found
}

/// What a device is called, such as `sda`; its number if it is gone.
pub fn name(device: BlockDevice) -> String {
    let target = fs::read_link(format!("/sys/dev/block/{device}")).unwrap_or_default();
    target.file_name().map_or_else(|| device.to_string(), |name| name.to_string_lossy().into_owned())
}

/// The scheduler of a device; `None` of one that has none to choose.
pub fn scheduler(device: BlockDevice) -> Option<String> {
    let list = fs::read_to_string(format!("/sys/dev/block/{device}/queue/scheduler")).ok()?;
    chosen(&list).map(str::to_owned)
}

/// The word in brackets: `mq-deadline [none]`.
fn chosen(list: &str) -> Option<&str> {
    let (_, rest) = list.split_once('[')?;
    rest.split_once(']').map(|(name, _)| name)
}

/// Whether the device with this directory lies on others, or on a file.
pub fn is_stacked(path: &Path) -> bool {
    let has_slaves = fs::read_dir(path.join("slaves")).is_ok_and(|mut slaves| slaves.next().is_some());
    has_slaves || path.join("loop/backing_file").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduler_is_the_word_in_brackets() {
        assert_eq!(chosen("none [mq-deadline] bfq\n"), Some("mq-deadline"));
        assert_eq!(chosen("none"), None);
    }

    #[test]
    fn every_device_is_there_and_lies_on_no_other() {
        for device in all() {
            let path = format!("/sys/dev/block/{device}");
            assert!(Path::new(&path).exists() && !is_stacked(Path::new(&path)), "{path}");
        }
    }
}
