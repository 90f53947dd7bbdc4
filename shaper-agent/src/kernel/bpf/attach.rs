//! Links and pins of the programs, and their directories below bpffs.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        ProgramError,
        links::{FdLink, LinkError},
    },
};
use shaper_common::abi;

use super::{BpfConfig, BpfError};
use crate::kernel::{ingress::Queue, qdisc, sys};

const BPF_FS_MAGIC: i64 = 0xcafe_4a11_u32 as i64;

/// Removes the uplinks' filters and what is pinned.
pub(super) fn remove_pins(config: &BpfConfig) -> Result<Vec<String>, BpfError> {
    let directory = config.directory.as_path();
    let mut done = Queue::of(directory).remove(&config.state_dir)?;
    for device in qdisc::detach_all_clsact(&config.state_dir)? {
        done.push(format!("uplink {device}: detached (clsact)"));
    }
    remove_layout(&layout_directory(directory))?;
    match fs::remove_dir(directory) {
        // Something of somebody's may be beside ours, and the directory may be a mount point.
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            return Err(BpfError::File { verb: "remove", path: directory.to_owned(), source });
        }
        _ => {}
    }
    done.push(format!("{}: kernel programs detached, pins removed", directory.display()));
    Ok(done)
}

/// Removes the pins of one layout, whereby its programs are detached.
pub(super) fn remove_layout(layout: &Path) -> Result<(), BpfError> {
    // Links first: when the last one is gone, nothing uses the maps any more.
    for part in ["links", "maps"] {
        let part = layout.join(part);
        let error = |source| BpfError::File { verb: "remove", path: part.clone(), source };
        for entry in fs::read_dir(&part).map_err(error)? {
            fs::remove_file(entry.map_err(error)?.path()).map_err(error)?;
        }
        fs::remove_dir(&part).map_err(error)?;
    }
    fs::remove_dir(layout).map_err(|source| BpfError::File {
        verb: "remove",
        path: layout.to_owned(),
        source,
    })
}

/// The directories of other layouts than this agent's.
pub(super) fn other_layouts(directory: &Path) -> Vec<PathBuf> {
    let ours = layout_directory(directory);
    let is_layout = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix('v').unwrap_or_default();
        *path != ours && number.parse::<u32>().is_ok() && path.join("links").is_dir()
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_layout).collect()
}

pub(super) fn failed(verb: &'static str, program: &'static str, source: ProgramError) -> BpfError {
    BpfError::Program { verb, program, source }
}

pub(super) fn program<'a, P>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    object: &Path,
) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let foreign = || BpfError::Foreign { path: object.to_owned(), name };
    let program = ebpf.program_mut(name).ok_or_else(foreign)?;
    program.try_into().map_err(|source| failed("use", name, source))
}

pub(in crate::kernel) fn pin_link<L>(link: L, path: &Path, program: &'static str) -> Result<(), BpfError>
where
    FdLink: TryFrom<L, Error = LinkError>,
{
    let link = FdLink::try_from(link).map_err(|source| BpfError::AyaLink { program, source })?;
    // Dropping the pinned link closes its descriptor only; the pin keeps it attached.
    link.pin(path).map(drop).map_err(|source| BpfError::Link {
        verb: "pin",
        program,
        source: io::Error::other(source),
    })
}

/// Puts `program` behind the link pinned at `pin`, if there is one; tells whether there was.
pub(in crate::kernel) fn replace(
    pin: &Path,
    program: BorrowedFd<'_>,
    name: &'static str,
) -> Result<bool, BpfError> {
    let error = |verb| move |source| BpfError::Link { verb, program: name, source };
    let Some(link) = sys::open_pin(pin).map_err(error("open"))? else { return Ok(false) };
    sys::update_link(link.as_fd(), program).map_err(error("replace the program behind"))?;
    Ok(true)
}

/// A tracing program that is attached and pinned beside the one that it will replace.
pub(super) struct Beside {
    pin: PathBuf,
    fresh: PathBuf,
    name: &'static str,
}

/// Attaches a tracing program beside the one whose link is pinned at `pin`, if there is one. (The program of such a link
/// cannot be replaced.)
pub(super) fn attach_beside(
    pin: PathBuf,
    program: BorrowedFd<'_>,
    name: &'static str,
) -> Result<Beside, BpfError> {
    let error = |verb| move |source| BpfError::Link { verb, program: name, source };
    let link = sys::attach_tracing(program).map_err(error("attach"))?;
    // (A name on bpffs has no dot.)
    let fresh = pin.with_file_name(format!("{name}_new"));
    match fs::remove_file(&fresh) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("unpin")(source)),
        _ => {}
    }
    sys::pin(link.as_fd(), &fresh).map_err(error("pin"))?;
    Ok(Beside { pin, fresh, name })
}

impl Beside {
    /// Detaches the old program.
    pub(super) fn replace(self) -> Result<(), BpfError> {
        fs::rename(&self.fresh, &self.pin).map_err(|source| BpfError::Link {
            verb: "pin",
            program: self.name,
            source,
        })
    }
}

pub(super) fn layout_directory(directory: &Path) -> PathBuf {
    directory.join(format!("v{}", abi::LAYOUT))
}

pub(super) fn links_directory(directory: &Path) -> PathBuf {
    layout_directory(directory).join("links")
}

/// Makes the directories, open to root only; returns that of the maps.
pub(super) fn prepare_directories(directory: &Path) -> Result<PathBuf, BpfError> {
    mount_bpffs_if_missing(directory)?;
    let maps = layout_directory(directory).join("maps");
    for path in [&links_directory(directory), &maps] {
        let error = |source| BpfError::File { verb: "make", path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(error)?;
    }
    let error = |source| BpfError::File { verb: "close to others", path: directory.to_owned(), source };
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).map_err(error)?;
    Ok(maps)
}

/// bpffs is mounted by systemd; elsewhere nobody may have done it.
fn mount_bpffs_if_missing(directory: &Path) -> Result<(), BpfError> {
    const DEFAULT: &str = "/sys/fs/bpf";
    let is_bpffs = |path: &Path| {
        let existing = path.ancestors().find(|path| path.exists())?;
        Some(rustix::fs::statfs(existing).ok()?.f_type as i64 == BPF_FS_MAGIC)
    };
    if is_bpffs(directory) == Some(true) {
        return Ok(());
    }
    if directory.starts_with(DEFAULT) {
        let flags = rustix::mount::MountFlags::NOSUID
            | rustix::mount::MountFlags::NODEV
            | rustix::mount::MountFlags::NOEXEC;
        let mounted = rustix::mount::mount("bpf", DEFAULT, "bpf", flags, None);
        if mounted.is_ok() && is_bpffs(directory) == Some(true) {
            tracing::info!("mounted a BPF file system at {DEFAULT}");
            return Ok(());
        }
    }
    Err(BpfError::NoBpfFs(directory.to_owned()))
}
