//! The files of an image, as a tar archive that depends on nothing but them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tar::{Builder, EntryType, Header};

/// Files by their path without a slash before it, each once; sorted, and so each directory before what is in it.
#[derive(Default)]
pub(super) struct Layer {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Directory,
    File { mode: u32, data: Vec<u8> },
}

impl Layer {
    pub(super) fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) -> Result<()> {
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            bail!("`{path}` is no path in an image");
        }
        for (end, _) in path.match_indices('/') {
            match self.entries.entry(path[..end].to_owned()).or_insert(Entry::Directory) {
                Entry::Directory => {}
                Entry::File { .. } => bail!("{path} is in something that is no directory"),
            }
        }
        match self.entries.get(path) {
            None => drop(self.entries.insert(path.to_owned(), Entry::File { mode, data })),
            // Two programs need the same library.
            Some(Entry::File { mode: before, data: old }) if (*before, old) == (mode, &data) => {}
            Some(_) => bail!("{path} is in the image already, and not the same"),
        }
        Ok(())
    }

    /// Adds a file of this machine, behind whatever links.
    pub(super) fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, mode, data)
    }

    /// Writes all of it, as of `seconds` after 1970, everything root's.
    pub(super) fn write<W: Write>(&self, seconds: u64, to: W) -> Result<W> {
        let mut archive = Builder::new(to);
        for (path, entry) in &self.entries {
            let (kind, mode, data) = match entry {
                Entry::Directory => (EntryType::Directory, 0o755, &[][..]),
                Entry::File { mode, data } => (EntryType::Regular, *mode, &data[..]),
            };
            append(&mut archive, path, kind, mode, seconds, data)?;
        }
        archive.into_inner().context("cannot write the layer")
    }
}

pub(super) fn append(
    archive: &mut Builder<impl Write>,
    path: &str,
    kind: EntryType,
    mode: u32,
    seconds: u64,
    data: &[u8],
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(seconds);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(data.len() as u64);
    let path = if kind == EntryType::Directory { format!("{path}/") } else { path.to_owned() };
    archive.append_data(&mut header, &path, data).with_context(|| format!("cannot add {path} to an archive"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut layer = Layer::default();
        layer.file("usr/lib/b", 0o755, b"b".to_vec()).unwrap();
        layer.file("usr/bin/a", 0o755, b"a".to_vec()).unwrap();
        layer.file("etc/passwd", 0o644, Vec::new()).unwrap();
        // The same again is nothing new; another is a mistake.
        layer.file("usr/bin/a", 0o755, b"a".to_vec()).unwrap();
        assert!(layer.file("usr/lib/b", 0o755, b"c".to_vec()).is_err());
        for path in ["/usr/x", "../x", "usr//x", "usr/./x", "etc/passwd/x"] {
            assert!(layer.file(path, 0o644, Vec::new()).is_err(), "{path}");
        }

        let written = layer.write(7, Vec::new()).unwrap();
        let mut archive = tar::Archive::new(&written[..]);
        let found: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                let owner = (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap());
                assert_eq!(owner, (0, 0, 7));
                (String::from_utf8(entry.path_bytes().into_owned()).unwrap(), header.mode().unwrap())
            })
            .collect();
        let expected = [
            ("etc/", 0o755),
            ("etc/passwd", 0o644),
            ("usr/", 0o755),
            ("usr/bin/", 0o755),
            ("usr/bin/a", 0o755),
            ("usr/lib/", 0o755),
            ("usr/lib/b", 0o755),
        ];
        assert_eq!(found, expected.map(|(path, mode)| (path.to_owned(), mode)));
    }
}
