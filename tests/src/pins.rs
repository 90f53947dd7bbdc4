//! The kernel's identities of what an agent pinned.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use aya::programs::{
    links::{FdLink, PinnedLink},
    loaded_links,
};

/// A link, and the program behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Id of the link.
    pub id: u32,
    /// Id of the program.
    pub program: u32,
}

/// The links pinned below `bpffs_dir`, by name.
pub fn links(bpffs_dir: &Path) -> BTreeMap<String, Link> {
    let link = |path: &Path| {
        let pinned = PinnedLink::from_pin(path).map(FdLink::from).and_then(|link| link.info());
        let info = pinned.unwrap_or_else(|error| panic!("the link {}: {error}", path.display()));
        Link { id: info.id(), program: info.program_id() }
    };
    let folder = bpffs_dir.join(format!("v{}/links", shaper_common::abi::LAYOUT));
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("a directory on bpffs can be listed").path());
    paths.map(|path| (name_of(&path), link(&path))).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The ids of every BPF link there is, pinned or held.
pub fn all_link_ids() -> BTreeSet<u32> {
    // One may go between being listed and being opened.
    loaded_links().flatten().map(|link| link.id()).collect()
}

/// The BPF objects that a process holds descriptors of, as `link_id 7`.
pub fn held_by(pid: u32) -> BTreeSet<String> {
    let mut held = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("the process is there").flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        for line in text.lines() {
            if let Some((kind @ ("link_id" | "prog_id" | "map_id"), id)) = line.split_once(':') {
                held.insert(format!("{kind} {}", id.trim()));
            }
        }
    }
    held
}
