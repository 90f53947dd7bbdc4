//! Files that survive a power loss: whole and new, or whole and old, never half.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use serde::{Serialize, de::DeserializeOwned};

/// Why a file was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was done to it.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The value has no JSON form.
    #[error("encode the content of {}", path.display())]
    Encode {
        /// The file that was to be written.
        path: PathBuf,
        /// What serde said.
        source: serde_json::Error,
    },
    /// The file's content is not what it should be.
    #[error("parse {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where in the file, and what was expected there.
        source: serde_json::Error,
    },
    /// The path ends in no file name.
    #[error("{} does not name a file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
}

impl Error {
    fn io(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Io { operation, path: path.to_owned(), source: source.into() }
    }
}

/// Two writers of one path in one process must not meet in a temporary file.
static SERIAL: AtomicU64 = AtomicU64::new(0);

const TEMPORARY: &str = ".tmp";

/// Replaces `path` by `bytes`, and returns once that is on the disk. Readers see the old file or
/// the new one. Permissions are `mode`, whatever the umask.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let directory = replace(path, bytes, mode, Sync::Now)?;
    rustix::fs::fsync(&directory).map_err(|errno| Error::io("sync the directory of", path, errno))
}

/// [`write`] of a value as one line of JSON.
pub fn write_json<T: Serialize>(path: &Path, value: &T, mode: u32) -> Result<(), Error> {
    write(path, &line_of(path, value)?, mode)
}

/// The same for what no power loss leaves a use for: readers see the old file or the new one, also after the writer has died, and
/// the kernel brings it to the disk when it will. A power loss before that may leave the old file, an empty one, or none.
pub fn write_json_for_this_boot<T: Serialize>(path: &Path, value: &T, mode: u32) -> Result<(), Error> {
    replace(path, &line_of(path, value)?, mode, Sync::Never).map(drop)
}

/// When a file's content is on the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sync {
    /// When it has its name.
    Now,
    /// When the kernel brings it there.
    Never,
}

fn line_of<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, Error> {
    let mut bytes =
        serde_json::to_vec(value).map_err(|source| Error::Encode { path: path.to_owned(), source })?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Puts a new file in the place of another; the directory that they are in.
fn replace(path: &Path, bytes: &[u8], mode: u32, sync: Sync) -> Result<OwnedFd, Error> {
    let name = path.file_name().ok_or_else(|| Error::NotAFile { path: path.to_owned() })?;
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let at = open_directory(directory)?;

    let (temporary, file) = create_temporary(&at, directory, name)?;
    let written = fill(file, bytes, mode, sync).and_then(|()| {
        rustix::fs::renameat(&at, &temporary, &at, name)
            .map_err(|errno| ("rename a temporary file to", errno.into()))
    });
    if let Err((operation, source)) = written {
        // The first error is the one to report; what stays behind, `sweep` removes.
        let _ = rustix::fs::unlinkat(&at, &temporary, AtFlags::empty());
        return Err(Error::Io { operation, path: path.to_owned(), source });
    }
    Ok(at)
}

/// Reads what [`write_json`] wrote. A file that does not exist is `None`; an empty one is an error.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::io("open", path, errno)),
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|source| Error::io("read", path, source))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|source| Error::Parse { path: path.to_owned(), source })
}

/// Removes the temporary files that writers left in `directory` when they died. Only for the one
/// process that may write there: a temporary file in use cannot be told from an abandoned one.
pub fn sweep(directory: &Path) -> Result<(), Error> {
    let failed = |source| Error::io("list", directory, source);
    let at = open_directory(directory)?;
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name.as_bytes().starts_with(b".") && name.as_bytes().ends_with(TEMPORARY.as_bytes()) {
            match rustix::fs::unlinkat(&at, &name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(Error::io("remove", &directory.join(name), errno)),
            }
        }
    }
    Ok(())
}

/// Makes the names in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), Error> {
    rustix::fs::fsync(open_directory(directory)?)
        .map_err(|errno| Error::io("sync the directory", directory, errno))
}

fn open_directory(directory: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|errno| Error::io("open the directory", directory, errno))
}

/// A new file next to `name`. A name that is taken was left by a process of our pid that died (in
/// a container every agent may be pid 1), so the next one is tried; nothing is ever written to it.
fn create_temporary(at: &OwnedFd, directory: &Path, name: &OsStr) -> Result<(OsString, File), Error> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}.{serial}{TEMPORARY}", std::process::id()));
        match rustix::fs::openat(at, &temporary, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => return Ok((temporary, file.into())),
            Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(Error::io("create", &directory.join(temporary), errno)),
        }
    }
}

fn fill(mut file: File, bytes: &[u8], mode: u32, sync: Sync) -> Result<(), (&'static str, io::Error)> {
    file.write_all(bytes).map_err(|error| ("write a temporary file for", error))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))
        .map_err(|errno| ("set the mode of", errno.into()))?;
    if sync == Sync::Now {
        file.sync_all().map_err(|error| ("sync a temporary file for", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_written_for_this_boot_is_read_at_once_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        for value in 1..3 {
            write_json_for_this_boot(&path, &value, 0o600).unwrap();
            assert_eq!(read_json::<u32>(&path).unwrap(), Some(value));
        }
        assert_eq!(names(directory.path()), ["record"]);
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_json(&path, &vec![1, 2, 3], 0o600).unwrap();
        write_json(&path, &vec![4], 0o640).unwrap();
        assert_eq!(read_json::<Vec<u8>>(&path).unwrap(), Some(vec![4]));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(names(directory.path()), ["state.json"]);
    }

    #[test]
    fn leftovers_of_a_crash_are_neither_used_nor_in_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "untouched").unwrap();
        // The names that the next writes of this process would take; one leads elsewhere.
        let next = SERIAL.load(Ordering::Relaxed);
        for serial in next..next + 64 {
            let leftover = directory.path().join(format!(".state.json.{}.{serial}.tmp", std::process::id()));
            match serial % 2 {
                0 => std::fs::write(leftover, "{\"half\":").unwrap(),
                _ => std::os::unix::fs::symlink(&victim, leftover).unwrap(),
            }
        }
        write_json(&path, &7, 0o600).unwrap();
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(7));
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
        sweep(directory.path()).unwrap();
        assert_eq!(names(directory.path()), ["state.json", "victim"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("occupied");
        std::fs::create_dir(&path).unwrap();
        let error = write(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("occupied"), "{error}");
        assert_eq!(names(directory.path()), ["occupied"]);
    }

    #[test]
    fn absent_is_not_the_same_as_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
        std::fs::write(&path, "").unwrap();
        let error = read_json::<u32>(&path).unwrap_err();
        assert!(matches!(&error, Error::Parse { .. }) && error.to_string().contains("state.json"));
    }
}
