//! cgroup v2 directories, by descriptor beneath a root: no path is resolved twice, no symbolic link
//! is followed, and nothing but cgroup2 is ever written to.
//!
//! Each file that shaper reads or writes is a constant of one of the modules below, and its type says what is in
//! it: `cgroup.get(memory::MAX)` is a `Limit<Bytes>`, and `memory::CURRENT` cannot be written. There is no other way
//! to a file.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstatfs, mkdirat, openat, openat2, unlinkat,
};

pub mod block;
pub mod cpu;
pub mod dmem;
pub mod file;
pub mod groups;
pub mod memory;
pub mod pressure;

pub use file::{Contents, File, Malformed, Open, ReadOnly, Setting};

/// What a file system of cgroup v2 calls itself.
pub const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

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
    /// A file of the cgroup says something that is not understood.
    #[error("{path} holds {malformed}; is this a newer kernel?")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was not understood.
        malformed: Malformed,
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

    /// What the kernel answered, if it was asked.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        let (CgroupError::Open { source, .. } | CgroupError::File { source, .. }) = self else {
            return None;
        };
        rustix::io::Errno::from_io_error(source)
    }
}

/// An open cgroup v2 directory.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    path: Arc<Path>,
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

    /// A folder that has files of the same names: for controllers that no kernel here has.
    #[cfg(test)]
    pub fn pretended(path: &Path) -> Cgroup {
        let file = fs::File::open(path).unwrap();
        let id = file.metadata().unwrap().ino();
        Cgroup { directory: file.into(), path: path.into(), id }
    }

    fn from_directory(directory: OwnedFd, path: PathBuf) -> Result<Cgroup, CgroupError> {
        let error = |source: io::Error| CgroupError::Open { path: path.clone(), source };
        let file_system = fstatfs(&directory).map_err(|source| error(source.into()))?;
        if file_system.f_type as i64 != CGROUP2_SUPER_MAGIC {
            return Err(CgroupError::NotACgroup(path));
        }
        let file = fs::File::from(directory);
        // The id that BPF helpers give is the inode number of the directory (kernfs, 64 bit).
        let id = file.metadata().map_err(error)?.ino();
        Ok(Cgroup { directory: file.into(), path: path.into(), id })
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

    /// The processes in this cgroup and in all below it.
    pub fn all_processes(&self) -> Result<Vec<u32>, CgroupError> {
        let mut processes = self.get(groups::PROCESSES)?.0;
        for child in self.children()? {
            processes.extend(child.all_processes()?);
        }
        Ok(processes)
    }

    /// Whether a file is there: a controller is enabled, a kernel has a feature.
    pub fn has<R, W>(&self, file: File<R, W>) -> bool {
        rustix::fs::accessat(&self.directory, file.name(), rustix::fs::Access::EXISTS, AtFlags::empty())
            .is_ok()
    }

    /// What a file says.
    pub fn get<R: Contents, W>(&self, file: File<R, W>) -> Result<R, CgroupError> {
        match self.open_for(file, OFlags::RDONLY)? {
            Some(open) => open.read(),
            None => Err(self.error("read", file.name(), io::ErrorKind::NotFound.into())),
        }
    }

    /// What a file says; `None` where the kernel or the cgroup has no such file.
    pub fn find<R: Contents, W>(&self, file: File<R, W>) -> Result<Option<R>, CgroupError> {
        self.open_for(file, OFlags::RDONLY)?.map(|open| open.read()).transpose()
    }

    /// Writes a file.
    pub fn set<R, W: Setting>(&self, file: File<R, W>, value: &W) -> Result<(), CgroupError> {
        match self.open_for(file, OFlags::WRONLY)? {
            Some(open) => open.write(value),
            None => Err(self.error("write", file.name(), io::ErrorKind::NotFound.into())),
        }
    }

    /// Opens a file to read it again and again; `None` where the kernel or the cgroup has no such file.
    pub fn open_file<R, W>(&self, file: File<R, W>) -> Result<Option<Open<R, W>>, CgroupError> {
        self.open_for(file, OFlags::RDONLY)
    }

    /// Opens a file to read and write it again and again; `None` where there is no such file.
    pub fn open_file_to_write<R, W: Setting>(
        &self,
        file: File<R, W>,
    ) -> Result<Option<Open<R, W>>, CgroupError> {
        // What may only be written, such as memory.reclaim, may not be opened to be read even by root.
        let may_read = rustix::fs::statat(&self.directory, file.name(), AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| Mode::from_raw_mode(stat.st_mode).intersects(Mode::RUSR));
        self.open_for(file, if may_read { OFlags::RDWR } else { OFlags::WRONLY })
    }

    fn open_for<R, W>(&self, file: File<R, W>, access: OFlags) -> Result<Option<Open<R, W>>, CgroupError> {
        match openat(&self.directory, file.name(), access | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
        {
            Ok(fd) => Ok(Some(Open::new(fd, Arc::clone(&self.path), file))),
            // The second: pressure, where the kernel was told not to count it.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(source) => Err(self.error("open", file.name(), source.into())),
        }
    }

    pub(crate) fn error(&self, verb: &'static str, name: &str, source: io::Error) -> CgroupError {
        CgroupError::File { verb, path: self.path.join(name), source }
    }

    /// Whether a process is in it or below it.
    pub fn is_populated(&self) -> Result<bool, CgroupError> {
        Ok(self.get(groups::EVENTS)?.populated)
    }

    /// Its own processes.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        Ok(self.get(groups::PROCESSES)?.0)
    }

    /// Moves a process into it.
    pub fn add(&self, process: u32) -> Result<(), CgroupError> {
        self.set(groups::PROCESSES, &process)
    }

    /// Sends SIGKILL to every process in it and below, those that fork meanwhile included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.set(groups::KILL, &true)
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
                match target.add(process) {
                    Err(error) if error.errno() == Some(rustix::io::Errno::SRCH) => {}
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
        match unlinkat(CWD, &*self.path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(source) => Err(self.error("remove", "", source.into())),
        }
    }

    /// Whether processes may be moved into it: it is the root, or hands no controller down.
    pub fn may_hold_processes(&self) -> bool {
        !self.has(groups::TYPE) || self.get(groups::SUBTREE_CONTROL).is_ok_and(|list| list.0.is_empty())
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
