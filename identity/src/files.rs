//! Files that hold keys: whole or not there, and nobody else's to read.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A file or directory that does not do.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {}", path.display())]
pub struct FileError {
    /// What was tried.
    pub verb: &'static str,
    /// With what.
    pub path: PathBuf,
    /// What went wrong.
    pub source: io::Error,
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { verb, path, source }
}

/// Makes a directory that its owner alone may look into.
pub fn private_directory(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed("close to others", path))
}

/// Replaces a file, which is whole and on the disk when this returns.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}.tmp", std::process::id()));
    // What an earlier process of this number left; it is not written to.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        failed("write", path)(source)
    })
}

/// Reads a file of at most `most` bytes.
pub fn read(path: &Path, most: u64) -> Result<String, FileError> {
    let mut text = String::new();
    let file = File::open(path).map_err(failed("read", path))?;
    file.take(most + 1).read_to_string(&mut text).map_err(failed("read", path))?;
    if text.len() as u64 > most {
        return Err(failed("read", path)(io::Error::other(format!("it is longer than {most} bytes"))));
    }
    Ok(text)
}

/// What of a file with a key must not be allowed. One of root's may be its group's to read, for somebody else who reads it:
/// that is how a kubelet hands out a Secret, and whom root puts into the group, root lets read it.
fn too_open(owner: u32, reader: u32) -> u32 {
    if owner == 0 && reader != 0 { 0o037 } else { 0o077 }
}

/// Reads a file with a key in it, which nobody but its owner may be able to, or if that is root, its group.
pub fn read_secret(path: &Path, most: u64) -> Result<String, FileError> {
    let found = fs::metadata(path).map_err(failed("read", path))?;
    let mode = found.permissions().mode();
    if mode & too_open(found.uid(), rustix::process::geteuid().as_raw()) != 0 {
        let (mode, shown) = (mode & 0o7777, path.display());
        let text = format!("others may read it (mode {mode:04o}), and it holds a key: chmod 600 {shown}");
        return Err(failed("use", path)(io::Error::new(io::ErrorKind::PermissionDenied, text)));
    }
    read(path, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_others_may_read_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let (inner, path) = (directory.path().join("a"), directory.path().join("a/key.pem"));
        private_directory(&inner).unwrap();
        assert_eq!(fs::metadata(&inner).unwrap().permissions().mode() & 0o7777, 0o700);
        replace(&path, b"secret", 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(read_secret(&path, 64).unwrap(), "secret");
        for mode in [0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read_secret(&path, 64).unwrap_err();
            assert!(error.source.to_string().contains("chmod 600"), "{error:?}");
        }
        assert!(read(&path, 5).is_err());
        const BROKER: u32 = 975;
        for (mode, owner, reader, is_used) in [
            (0o440, 0, BROKER, true),
            (0o400, 0, 0, true),
            (0o440, 0, 0, false),
            (0o440, BROKER, BROKER, false),
            (0o460, 0, BROKER, false),
            (0o444, 0, BROKER, false),
        ] {
            assert_eq!(mode & too_open(owner, reader) == 0, is_used, "{mode:o} {owner} {reader}");
        }
        assert_eq!(fs::read_dir(&inner).unwrap().count(), 1);
    }
}
