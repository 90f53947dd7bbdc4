//! The file of a backup: lines of JSON, the first of which says what it is, and the last whether it is whole.
//!
//! ```text
//! {"shaper_backup":1,"schema":1,"made_at":1764260000,"place":"/var/lib/shaper-broker/store.redb"}
//! {"key":"meta/epoch","value":"Nw=="}
//! {"rows":1,"sha256":"…"}
//! ```
//!
//! A value is base64: it is copied as it is, and what it means is a matter of the schema. The keys are in their order. The sum is
//! over all bytes before the last line.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ring::digest::{Context, SHA256};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use crate::store::Snapshot;

/// Of this format.
const VERSION: u64 = 1;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The version of the format.
    pub shaper_backup: u64,
    /// What the rows mean.
    pub schema: u64,
    /// When, in seconds since 1970.
    pub made_at: u64,
    /// Of which store.
    pub place: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    value: String,
}

/// The last line.
#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tail {
    rows: u64,
    sha256: String,
}

/// A backup that was read, and is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// What it says of itself.
    pub head: Head,
    /// Keys and values, in the order of the keys.
    pub rows: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why what was read is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Not one of ours.
    #[error("it does not begin as a backup of shaper does")]
    NotABackup,
    /// Of a later program.
    #[error(
        "it is a backup of format {found}, and this program knows {VERSION}: use the newer one that made it"
    )]
    NewerFormat {
        /// What it says.
        found: u64,
    },
    /// Cut off, or changed.
    #[error("it is not whole: {0}; take another backup")]
    NotWhole(&'static str),
    /// Such a line.
    #[error("it is not whole: line {line} is not what was written; take another backup")]
    Line {
        /// From 1.
        line: usize,
    },
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It would be lost.
    #[error("{} exists: choose another name, or say --force to replace it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A key that is no text.
    #[error(
        "a key of the store is no text ({key}), which no broker writes: see `shaper-broker store verify`"
    )]
    Key {
        /// As far as it is one.
        key: String,
    },
    /// A file.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Snapshot {
    /// The backup of these rows.
    pub fn backup(self, made_at: u64) -> Backup {
        let Snapshot { place, schema, rows, leader: _ } = self;
        Backup { head: Head { shaper_backup: VERSION, schema, made_at, place }, rows }
    }
}

impl Backup {
    /// The whole file.
    pub fn encode(&self) -> Result<Vec<u8>, WriteError> {
        let mut lines = Vec::new();
        push(&mut lines, &self.head);
        for (key, value) in &self.rows {
            let key = String::from_utf8(key.clone()).map_err(|error| WriteError::Key {
                key: String::from_utf8_lossy(error.as_bytes()).into_owned(),
            })?;
            push(&mut lines, &Line { key, value: BASE64.encode(value) });
        }
        Ok(sealed(lines))
    }

    /// What [`Backup::encode`] made, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Backup, BackupError> {
        let cut_off = || BackupError::NotWhole("its end is missing");
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let first = lines.next().unwrap_or_default();
        let version: Version = serde_json::from_slice(first).map_err(|_| BackupError::NotABackup)?;
        if version.shaper_backup > VERSION {
            return Err(BackupError::NewerFormat { found: version.shaper_backup });
        }
        let last = lines.next_back().filter(|line| line.ends_with(b"\n")).ok_or_else(cut_off)?;
        let tail: Tail = serde_json::from_slice(last).map_err(|_| cut_off())?;
        let before = &bytes[..bytes.len() - last.len()];
        if sum(before) != tail.sha256 {
            return Err(BackupError::NotWhole("its checksum is another"));
        }
        let head: Head = exact(first, 1)?;
        let mut rows = Vec::new();
        for (number, line) in lines.enumerate() {
            let number = number + 2;
            let Line { key, value } = exact(line, number)?;
            let value = BASE64.decode(value).map_err(|_| BackupError::Line { line: number })?;
            let is_next =
                rows.last().is_none_or(|(before, _): &(Vec<u8>, _)| before.as_slice() < key.as_bytes());
            if !is_next {
                return Err(BackupError::Line { line: number });
            }
            rows.push((key.into_bytes(), value));
        }
        exact::<Tail>(last, rows.len() + 2)?;
        if tail.rows != rows.len() as u64 {
            return Err(BackupError::NotWhole("it has not as many rows as it says"));
        }
        Ok(Backup { head, rows })
    }

    /// Writes the file, for its owner only: whoever finds it under its name finds it whole.
    pub fn write(&self, path: &Path, replace: bool) -> Result<(), WriteError> {
        let failed = |verb, path: &Path| {
            let path = path.to_owned();
            move |source| WriteError::File { verb, path, source }
        };
        if !replace && path.symlink_metadata().is_ok() {
            return Err(WriteError::Exists { path: path.to_owned() });
        }
        let bytes = self.encode()?;
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part = PathBuf::from(name);
        let written = || -> io::Result<()> {
            let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
            let mut writer = BufWriter::new(&file);
            writer.write_all(&bytes)?;
            writer.flush()?;
            file.sync_all()
        };
        let done = written().map_err(failed("write", &part)).and_then(|()| {
            let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
            renameat_with(CWD, &part, CWD, path, flags).map_err(|errno| match errno {
                rustix::io::Errno::EXIST => WriteError::Exists { path: path.to_owned() },
                errno => failed("make", path)(errno.into()),
            })
        });
        if done.is_err() {
            // It may not have been made.
            let _ = fs::remove_file(&part);
        }
        done?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        File::open(directory).and_then(|it| it.sync_all()).map_err(failed("sync", directory))
    }
}

/// Lines with the one after them that says that they are whole.
pub fn sealed(mut lines: Vec<u8>) -> Vec<u8> {
    let ends = lines.iter().filter(|byte| **byte == b'\n').count();
    let tail = Tail { rows: ends.saturating_sub(1) as u64, sha256: sum(&lines) };
    push(&mut lines, &tail);
    lines
}

/// What every format of a backup says first.
#[derive(Deserialize)]
struct Version {
    shaper_backup: u64,
}

fn push(bytes: &mut Vec<u8>, line: &impl Serialize) {
    // Encoding fails for maps whose keys are no strings, and lines have none.
    serde_json::to_writer(&mut *bytes, line).expect("a line has a JSON form");
    bytes.push(b'\n');
}

fn sum(bytes: &[u8]) -> String {
    let mut context = Context::new(&SHA256);
    context.update(bytes);
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A line that is written just as [`push`] writes it.
fn exact<'a, T: Serialize + Deserialize<'a>>(line: &'a [u8], number: usize) -> Result<T, BackupError> {
    let damaged = BackupError::Line { line: number };
    let Ok(value) = serde_json::from_slice(line) else { return Err(damaged) };
    let mut written = Vec::new();
    push(&mut written, &value);
    if written == line { Ok(value) } else { Err(damaged) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn backup() -> Backup {
        let rows = vec![
            (b"meta/epoch".to_vec(), b"7".to_vec()),
            (b"node/n1".to_vec(), vec![0, 255, b'\n']),
            ("task/ü\"".as_bytes().to_vec(), vec![]),
        ];
        let place = "/var/lib/shaper-broker/store.redb".to_owned();
        Snapshot { place, schema: 1, rows, leader: None }.backup(1_764_260_000)
    }

    #[test]
    fn the_format_is_as_it_is_documented() {
        let text = String::from_utf8(backup().encode().unwrap()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[..4],
            [
                r#"{"shaper_backup":1,"schema":1,"made_at":1764260000,"place":"/var/lib/shaper-broker/store.redb"}"#,
                r#"{"key":"meta/epoch","value":"Nw=="}"#,
                r#"{"key":"node/n1","value":"AP8K"}"#,
                r#"{"key":"task/ü\"","value":""}"#,
            ]
        );
        assert!(lines[4].starts_with(r#"{"rows":3,"sha256":""#), "{}", lines[4]);
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn what_is_cut_off_or_changed_is_refused() {
        let bytes = backup().encode().unwrap();
        assert_eq!(Backup::decode(&bytes).unwrap(), backup());
        for cut in 0..bytes.len() {
            assert!(Backup::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for (at, bit) in (0..bytes.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(Backup::decode(&changed).is_err(), "bit {bit} of byte {at}");
        }
        for more in ["\n", " ", "x", "{}\n"] {
            let longer = [&bytes, more.as_bytes()].concat();
            assert!(Backup::decode(&longer).is_err(), "{more:?} at its end");
        }
    }

    #[test]
    fn what_is_not_one_and_what_is_newer_are_told_apart() {
        let text = |bytes: &[u8]| Backup::decode(bytes).unwrap_err().to_string();
        assert_eq!(text(b""), "it does not begin as a backup of shaper does");
        assert_eq!(text(b"redb\x1a\n"), "it does not begin as a backup of shaper does");
        assert_eq!(
            text(b"{\"shaper_backup\":2,\"of\":\"the future\"}\n"),
            "it is a backup of format 2, and this program knows 1: use the newer one that made it"
        );
        let whole = backup().encode().unwrap();
        assert_eq!(
            text(&whole[..whole.len() - 1]),
            "it is not whole: its end is missing; take another backup"
        );
    }

    #[test]
    fn keys_out_of_order_are_refused_even_if_the_sum_is_right() {
        let mut odd = backup();
        odd.rows.swap(0, 1);
        let error = Backup::decode(&odd.encode().unwrap()).unwrap_err();
        assert!(matches!(error, BackupError::Line { line: 3 }), "{error}");
        let mut odd = backup();
        odd.rows[0].0 = vec![255];
        assert!(matches!(odd.encode(), Err(WriteError::Key { .. })));
    }

    #[test]
    fn a_file_is_replaced_only_if_that_is_said_and_is_its_owners() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backup");
        backup().write(&path, false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = backup().write(&path, false).unwrap_err().to_string();
        assert!(error.ends_with("exists: choose another name, or say --force to replace it"), "{error}");
        backup().write(&path, true).unwrap();
        assert_eq!(Backup::decode(&fs::read(&path).unwrap()).unwrap(), backup());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
        let error = backup().write(&directory.path().join("no/such"), false).unwrap_err();
        assert!(matches!(error, WriteError::File { verb: "write", .. }), "{error}");
    }

    proptest! {
        #[test]
        fn any_rows_come_back(rows: std::collections::BTreeMap<String, Vec<u8>>, schema: u64, place: String) {
            let rows = rows.into_iter().map(|(key, value)| (key.into_bytes(), value)).collect();
            let backup = Snapshot { place, schema, rows, leader: None }.backup(0);
            prop_assert_eq!(Backup::decode(&backup.encode().unwrap()).unwrap(), backup);
        }

        #[test]
        fn anything_else_is_no_panic(bytes: Vec<u8>) {
            prop_assert!(Backup::decode(&bytes).is_err());
        }
    }
}
