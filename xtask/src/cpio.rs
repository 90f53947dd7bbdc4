//! Writes cpio archives in the `newc` format, which the kernel unpacks as its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// Entries and file data begin at multiples of this.
const ALIGN: usize = 4;

/// An archive being written to `W`. Everything in it belongs to root.
pub(crate) struct Archive<W> {
    out: W,
    entries: u32,
    directories: BTreeSet<String>,
    files: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, entries: 0, directories: BTreeSet::new(), files: BTreeSet::new() }
    }

    /// Whether a file of this absolute path is in the archive.
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.files.contains(path)
    }

    /// Adds a directory and its parents, those that are not there yet.
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
        for parent in ends.map(|end| &path[..end]) {
            if parent.len() > 1 && self.directories.insert(parent.to_owned()) {
                self.entry(parent, S_IFDIR | 0o755, &[])?;
            }
        }
        Ok(())
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let Some((parent, _)) = path.rsplit_once('/') else { bail!("{path} is no absolute path") };
        if !self.files.insert(path.to_owned()) {
            bail!("{path} is already in the archive");
        }
        self.directory(parent)?;
        self.entry(path, S_IFREG | mode, data)
    }

    /// Adds the file at `from` on this machine, executable.
    pub(crate) fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, 0o755, &data)
    }

    pub(crate) fn finish(mut self) -> Result<W> {
        self.entry("/TRAILER!!!", 0, &[])?;
        self.out.flush().context("cannot write the archive")?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entries += 1;
        write_entry(&mut self.out, self.entries, path, mode, data)
            .with_context(|| format!("cannot add {path} to the archive"))
    }
}

fn write_entry(out: &mut impl Write, inode: u32, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
    let name = path.trim_start_matches('/');
    let size = u32::try_from(data.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let name_size =
        u32::try_from(name.len() + 1).map_err(|_| io::Error::from(io::ErrorKind::InvalidFilename))?;
    let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
    let (uid, gid, mtime, device, check) = (0, 0, 0, 0, 0);
    let fields: [u32; 13] =
        [inode, mode, uid, gid, links, mtime, size, device, device, device, device, name_size, check];

    let mut header = String::from("070701");
    for field in fields {
        header.push_str(&format!("{field:08x}"));
    }
    out.write_all(header.as_bytes())?;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, header.len() + name.len() + 1)?;
    out.write_all(data)?;
    pad(out, data.len())
}

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; ALIGN][..written.next_multiple_of(ALIGN) - written])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An independent reading of the format: (name, mode, data) of every entry.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |n: usize| {
                let hex = std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(hex, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1]).unwrap().to_owned();
            let data = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode, archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.file("/lib/a/b", 0o644, b"12345").unwrap();
        archive.directory("/lib/a").unwrap();
        archive.file("/empty", 0o600, b"").unwrap();
        assert!(archive.contains("/lib/a/b") && !archive.contains("/lib"));
        let bytes = archive.finish().unwrap();
        let expected = [
            ("init", 0o100_755, &b"#!/bin/sh\n"[..]),
            ("lib", 0o040_755, b""),
            ("lib/a", 0o040_755, b""),
            ("lib/a/b", 0o100_644, b"12345"),
            ("empty", 0o100_600, b""),
        ];
        assert_eq!(
            entries(&bytes),
            expected.map(|(name, mode, data)| (name.to_owned(), mode, data.to_vec()))
        );
    }

    #[test]
    fn a_file_is_added_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/init", 0o755, b"").unwrap();
        assert!(archive.file("/init", 0o755, b"").is_err());
        assert!(archive.file("init", 0o755, b"").is_err());
    }
}
