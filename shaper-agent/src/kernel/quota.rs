//! The files of one task's CPU quota, held open to be written at once: one `pwrite`, and one `pread` to see that it is so.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use shaper_core::units::Micros;

use crate::lease::{Kind, Lease};

/// What went wrong with a quota.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// The kernel refused.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel took it and shows another.
    #[error(
        "wrote `{wrote}` to {path}, but it reads `{reads}`: somebody else changes it, or the kernel rounds it"
    )]
    ReadBack {
        /// The file.
        path: PathBuf,
        /// What was written.
        wrote: String,
        /// What is there.
        reads: String,
    },
}

impl QuotaError {
    /// Whether the cgroup is not there any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, QuotaError::File { source, .. }
            if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ENODEV))
    }
}

/// A file, open, with its name for errors.
struct Named {
    file: File,
    name: &'static str,
}

/// The quota of a task, open.
pub struct QuotaFile {
    directory: PathBuf,
    inode: u64,
    kind: Kind,
    quota: Named,
    /// What may be saved (`cpu.max.burst`, 5.14), and what that file holds.
    burst: Option<(Named, u64)>,
}

impl QuotaFile {
    /// Opens those in `directory`, the cgroup's in the hierarchy that has the cpu controller.
    pub fn open(directory: &Path, kind: Kind) -> Result<QuotaFile, QuotaError> {
        let open = |name: &'static str| {
            let path = directory.join(name);
            let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
            opened.map(|file| Named { file, name }).map_err(|source| QuotaError::File {
                verb: "open",
                path,
                source,
            })
        };
        let inode = std::fs::metadata(directory)
            .map_err(|source| QuotaError::File { verb: "look at", path: directory.to_owned(), source })?
            .ino();
        let quota = open(kind.file())?;
        let burst = match open(match kind {
            Kind::V2 => "cpu.max.burst",
            Kind::V1 => "cpu.cfs_burst_us",
        }) {
            Ok(file) => Some(file),
            Err(error) if error.is_gone() => None,
            Err(error) => return Err(error),
        };
        let mut open = QuotaFile { directory: directory.to_owned(), inode, kind, quota, burst: None };
        if let Some(file) = burst {
            let saved = open.read(&file)?.parse().unwrap_or(0);
            open.burst = Some((file, saved));
        }
        Ok(open)
    }

    /// What the kernel lets the task save now.
    pub fn saving(&self) -> Micros {
        Micros(self.burst.as_ref().map_or(0, |(_, saving)| *saving))
    }

    /// How this is noted, for a quota to be written back.
    pub fn lease(&self, quota: Micros) -> Lease {
        Lease { cgroup: self.directory.clone(), inode: self.inode, kind: self.kind, quota_us: quota.0 }
    }

    /// Puts a quota in force, and what may be saved of it: in the order in which the kernel takes them.
    pub fn set(&mut self, quota: Micros, saving: Micros) -> Result<(), QuotaError> {
        let had = self.saving();
        if saving < had {
            self.set_saving(saving)?;
        }
        self.write(&self.quota, &self.kind.text(quota.0))?;
        if saving > had {
            self.set_saving(saving)?;
        }
        Ok(())
    }

    fn set_saving(&mut self, saving: Micros) -> Result<(), QuotaError> {
        let Some((file, _)) = &self.burst else { return Ok(()) };
        self.write(file, &saving.0.to_string())?;
        if let Some((_, held)) = &mut self.burst {
            *held = saving.0;
        }
        Ok(())
    }

    fn error(&self, verb: &'static str, file: &Named, source: io::Error) -> QuotaError {
        QuotaError::File { verb, path: self.directory.join(file.name), source }
    }

    fn read(&self, file: &Named) -> Result<String, QuotaError> {
        let mut buffer = [0; 64];
        let length = file.file.read_at(&mut buffer, 0).map_err(|source| self.error("read", file, source))?;
        Ok(String::from_utf8_lossy(buffer[..length].trim_ascii_end()).into_owned())
    }

    fn write(&self, file: &Named, text: &str) -> Result<(), QuotaError> {
        // A file of a cgroup takes all or nothing.
        file.file.write_at(text.as_bytes(), 0).map_err(|source| self.error("write", file, source))?;
        let reads = self.read(file)?;
        if reads == text {
            return Ok(());
        }
        Err(QuotaError::ReadBack { path: self.directory.join(file.name), wrote: text.into(), reads })
    }
}
