//! cgroup v2 directories, by descriptor beneath a root: no path is resolved twice, no symbolic link
//! is followed, and nothing but cgroup2 is ever written to.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstatfs, mkdirat, openat, openat2, unlinkat,
};

const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path leaves the hierarchy, passes a symbolic link, or is not there.
    #[error("cannot open the cgroup {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The path is something else.
    #[error("{0} is not a cgroup v2 directory")]
    NotACgroup(PathBuf),
    /// A file of the cgroup could not be read or written.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

impl CgroupError {
    /// Whether the cgroup is not there any more.
    pub fn is_gone(&self) -> bool {
        let (CgroupError::Open { source, .. } | CgroupError::File { source, .. }) = self else {
            return false;
        };
        source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ENODEV)
    }
}

/// An open cgroup v2 directory.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens `path`, which must lie beneath `mount`, the mount point of cgroup v2.
    pub fn open(mount: &Path, path: &Path) -> Result<Cgroup, CgroupError> {
        let error = |source| CgroupError::Open { path: path.to_owned(), source };
        let outside = || {
            error(io::Error::new(io::ErrorKind::InvalidInput, format!("it is not below {}", mount.display())))
        };
        let beneath = path.strip_prefix(mount).map_err(|_| outside())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, mount, flags, Mode::empty()).map_err(|source| error(source.into()))?;
        let directory = if beneath.as_os_str().is_empty() {
            root
        } else {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            openat2(&root, beneath, flags, Mode::empty(), resolve).map_err(|source| error(source.into()))?
        };
        Cgroup::from_directory(directory, path.to_owned())
    }

    fn from_directory(directory: OwnedFd, path: PathBuf) -> Result<Cgroup, CgroupError> {
        let error = |source: io::Error| CgroupError::Open { path: path.clone(), source };
        let file_system = fstatfs(&directory).map_err(|source| error(source.into()))?;
        if file_system.f_type as i64 != CGROUP2_SUPER_MAGIC {
            return Err(CgroupError::NotACgroup(path));
        }
        let file = File::from(directory);
        // The id that BPF helpers give is the inode number of the directory (kernfs, 64 bit).
        let id = file.metadata().map_err(error)?.ino();
        Ok(Cgroup { directory: file.into(), path, id })
    }

    /// Its id, as `bpf_get_current_cgroup_id` gives it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The child `name`, made if it is not there; tells whether it was made.
    pub fn make_child(&self, name: &str) -> Result<(Cgroup, bool), CgroupError> {
        let path = self.path.join(name);
        let made = match mkdirat(&self.directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(source) => return Err(CgroupError::File { verb: "make", path, source: source.into() }),
        };
        Ok((self.child(OsStr::new(name))?, made))
    }

    fn child(&self, name: &OsStr) -> Result<Cgroup, CgroupError> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = openat(&self.directory, name, flags, Mode::empty())
            .map_err(|source| CgroupError::Open { path: path.clone(), source: source.into() })?;
        Cgroup::from_directory(directory, path)
    }

    /// The cgroups directly below.
    pub fn children(&self) -> Result<Vec<Cgroup>, CgroupError> {
        let error = |source: rustix::io::Errno| self.error("list", "", source.into());
        let mut children = Vec::new();
        for entry in Dir::read_from(&self.directory).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = OsStr::new(entry.file_name().to_str().unwrap_or("."));
            if entry.file_type() != FileType::Directory || name == "." || name == ".." {
                continue;
            }
            match self.child(name) {
                Ok(child) => children.push(child),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(children)
    }

    /// This cgroup's id and those of all below it.
    pub fn ids(&self) -> Result<Vec<u64>, CgroupError> {
        let mut ids = vec![self.id];
        for child in self.children()? {
            ids.extend(child.ids()?);
        }
        Ok(ids)
    }

    /// Whether the file `name` is there: a controller is enabled, a kernel has a feature.
    pub fn has(&self, name: &str) -> bool {
        rustix::fs::accessat(&self.directory, name, rustix::fs::Access::EXISTS, AtFlags::empty()).is_ok()
    }

    /// The contents of the file `name`, without the newline at its end.
    pub fn read(&self, name: &str) -> Result<String, CgroupError> {
        let mut text = String::new();
        self.file(name, OFlags::RDONLY)
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(|source| self.error("read", name, source))?;
        text.truncate(text.trim_end_matches('\n').len());
        Ok(text)
    }

    /// Writes the file `name`, in one call as cgroup files want it.
    pub fn write(&self, name: &str, text: &str) -> Result<(), CgroupError> {
        self.file(name, OFlags::WRONLY)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|source| self.error("write", name, source))
    }

    fn file(&self, name: &str, access: OFlags) -> io::Result<File> {
        let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(openat(&self.directory, name, flags, Mode::empty())?))
    }

    fn error(&self, verb: &'static str, name: &str, source: io::Error) -> CgroupError {
        CgroupError::File { verb, path: self.path.join(name), source }
    }

    /// Whether a process is in it or below it.
    pub fn is_populated(&self) -> Result<bool, CgroupError> {
        Ok(self.read("cgroup.events")?.lines().any(|line| line == "populated 1"))
    }

    /// Its own processes.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        Ok(self.read("cgroup.procs")?.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Sends SIGKILL to every process in it and below, those that fork meanwhile included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Moves every process in it and below it to `target`.
    pub fn evacuate(&self, target: &Cgroup) -> Result<(), CgroupError> {
        for child in self.children()? {
            child.evacuate(target)?;
        }
        // A process may fork while it is moved; its child is found by the next look.
        for _ in 0..1000 {
            let processes = self.processes()?;
            if processes.is_empty() {
                break;
            }
            for process in processes {
                match target.write("cgroup.procs", &process.to_string()) {
                    Err(CgroupError::File { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Removes it with all cgroups below it, which must be empty of processes. Gone already is as good.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for child in self.children()? {
            child.remove()?;
        }
        match unlinkat(CWD, &self.path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(source) => Err(self.error("remove", "", source.into())),
        }
    }

    /// Whether processes may be moved into it: it is the root, or hands no controller down.
    pub fn may_hold_processes(&self) -> bool {
        !self.has("cgroup.type") || self.read("cgroup.subtree_control").is_ok_and(|list| list.is_empty())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::hierarchy::Hierarchies;

    fn mount() -> PathBuf {
        Hierarchies::detect().unwrap().expect("cgroup v2 is mounted").v2
    }

    #[test]
    fn what_leaves_the_mount_or_is_no_cgroup_is_refused() {
        let mount = mount();
        assert!(Cgroup::open(&mount, &mount).is_ok());
        assert!(matches!(Cgroup::open(&mount, Path::new("/tmp")), Err(CgroupError::Open { .. })));
        assert!(matches!(Cgroup::open(&mount, &mount.join("../../../tmp")), Err(CgroupError::Open { .. })));
        assert!(matches!(Cgroup::open(Path::new("/"), Path::new("/tmp")), Err(CgroupError::NotACgroup(_))));
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(mount(), directory.path().join("link")).unwrap();
        let opened = Cgroup::open(directory.path(), &directory.path().join("link"));
        assert!(matches!(opened, Err(CgroupError::Open { .. })), "{opened:?}");
    }
}
