//! A store in one file, by redb. A transaction is on the disk when it returns.
//!
//! redb sees bytes only: a row is the eight bytes of its revision, the highest first, and then its
//! value. The table `meta` has two numbers: `schema`, of what is in the file, and `revision`, of the
//! latest transaction.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, backends::FileBackend,
};

use super::{BackendError, Compare, Op, SCHEMA, Snapshot, Store, StoreError, Txn, Versioned};

mod image;

use image::Image;

const ROWS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("rows");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SCHEMA_KEY: &str = "schema";
const REVISION_KEY: &str = "revision";

/// How much of the file redb keeps in memory. The broker reads it at its start only.
const CACHE_BYTES: usize = 16 << 20;

/// Rows in a file.
pub struct Redb {
    path: PathBuf,
    database: Database,
}

impl std::fmt::Debug for Redb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redb").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Redb {
    /// Opens the file, or makes it. It is readable by its owner only.
    pub fn open(path: &Path) -> Result<Redb, StoreError> {
        let io = |error| cannot_open(path, StorageError::Io(error).into());
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let opened = FileBackend::new(file)
            .and_then(|backend| Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend));
        let database = opened.map_err(|error| cannot_open(path, error))?;
        let store = Redb { path: path.to_owned(), database };
        store.check_schema()?;
        Ok(store)
    }

    /// All that is in the file, which stays as it is. Every page that is in use is compared with its checksum.
    pub fn look(path: &Path) -> Result<Snapshot, StoreError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|error| cannot_open(path, StorageError::Io(error).into()))?;
        let empty = file.metadata().is_ok_and(|metadata| metadata.len() == 0);
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
        let opened = Image::of(file).and_then(|image| builder.create_with_backend(image));
        let database = opened.map_err(|error| cannot_open(path, error))?;
        let store = Redb { path: path.to_owned(), database };
        let place = path.display().to_string();
        if empty {
            return Ok(Snapshot { place, schema: SCHEMA, rows: Vec::new(), leader: None });
        }
        let schema = store.read(|| {
            let meta = store.database.begin_read()?.open_table(META)?;
            Ok(meta.get(SCHEMA_KEY)?.map(|value| value.value()))
        })?;
        let schema = schema.ok_or_else(|| store.damaged("it has no schema"))?;
        if schema > SCHEMA {
            return Err(StoreError::NewerSchema { place, found: schema, known: SCHEMA });
        }
        let rows = store.range(b"")?.into_iter().map(|(key, row)| (key, row.value)).collect();
        Ok(Snapshot { place, schema, rows, leader: None })
    }

    /// Refuses what a newer program wrote. From here on an older one refuses what this one writes.
    fn check_schema(&self) -> Result<(), StoreError> {
        let found = self.write_with(|transaction| {
            let mut meta = transaction.open_table(META)?;
            let found = meta.get(SCHEMA_KEY)?.map(|value| value.value());
            if found.is_none_or(|found| found < SCHEMA) {
                meta.insert(SCHEMA_KEY, SCHEMA)?;
            }
            transaction.open_table(ROWS)?;
            Ok(found)
        })?;
        match found {
            Some(found) if found > SCHEMA => {
                Err(StoreError::NewerSchema { place: self.path.display().to_string(), found, known: SCHEMA })
            }
            _ => Ok(()),
        }
    }

    /// One transaction, committed unless `work` fails.
    fn write_with<T>(
        &self,
        work: impl FnOnce(&redb::WriteTransaction) -> Result<T, BackendError>,
    ) -> Result<T, StoreError> {
        let attempt = || {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        };
        attempt().map_err(|source| StoreError::Write { path: self.path.clone(), source })
    }

    fn decode(&self, stored: &[u8]) -> Result<Versioned, StoreError> {
        let (revision, value) =
            stored.split_first_chunk().ok_or_else(|| self.damaged("a row is too short"))?;
        Ok(Versioned { value: value.to_vec(), revision: u64::from_be_bytes(*revision) })
    }

    fn damaged(&self, what: &'static str) -> StoreError {
        StoreError::Damaged { place: self.path.display().to_string(), what }
    }

    fn read<T>(&self, work: impl FnOnce() -> Result<T, BackendError>) -> Result<T, StoreError> {
        work().map_err(|source| StoreError::Read { path: self.path.clone(), source })
    }
}

fn cannot_open(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            StoreError::Locked { path }
        }
        error => StoreError::Open { path, source: error.into() },
    }
}

/// The revision of a row, as long as the row is whole.
fn revision_of(stored: &[u8]) -> Option<u64> {
    stored.first_chunk().map(|revision| u64::from_be_bytes(*revision))
}

impl Store for Redb {
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError> {
        let stored = self.read(|| {
            let rows = self.database.begin_read()?.open_table(ROWS)?;
            Ok(rows.get(key)?.map(|value| value.value().to_vec()))
        })?;
        stored.map(|stored| self.decode(&stored)).transpose()
    }

    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError> {
        let stored = self.read(|| {
            let rows = self.database.begin_read()?.open_table(ROWS)?;
            let mut found = Vec::new();
            for row in rows.range(prefix..)? {
                let (key, value) = row?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                found.push((key.value().to_vec(), value.value().to_vec()));
            }
            Ok(found)
        })?;
        stored.into_iter().map(|(key, value)| Ok((key, self.decode(&value)?))).collect()
    }

    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError> {
        self.write_with(|transaction| {
            let mut rows = transaction.open_table(ROWS)?;
            for compare in compares {
                let written_at = rows.get(compare.key())?.and_then(|stored| revision_of(stored.value()));
                if !compare.holds(written_at) {
                    // Committing a transaction without changes writes nothing of ours.
                    return Ok(Txn::Conflict { key: compare.key().to_vec() });
                }
            }
            let mut meta = transaction.open_table(META)?;
            let revision = meta.get(REVISION_KEY)?.map_or(0, |value| value.value()) + 1;
            meta.insert(REVISION_KEY, revision)?;
            for op in ops {
                match op {
                    Op::Put { key, value } => {
                        let stored = [&revision.to_be_bytes(), value.as_slice()].concat();
                        rows.insert(key.as_slice(), stored.as_slice())?;
                    }
                    Op::Delete { key } => {
                        rows.remove(key.as_slice())?;
                    }
                }
            }
            Ok(Txn::Committed { revision })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_schema_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let store = Redb::open(&path).unwrap();
        store
            .write_with(|transaction| {
                transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA + 1)?;
                Ok(())
            })
            .unwrap();
        drop(store);
        let error = Redb::open(&path).unwrap_err();
        let (newer, ours) = (SCHEMA + 1, SCHEMA);
        assert!(
            matches!(error, StoreError::NewerSchema { found, known, .. } if (found, known) == (newer, ours)),
            "{error}"
        );
        let error = Redb::open(&path).unwrap_err();
        assert!(error.to_string().contains("start the newer broker"), "still refused: {error}");
    }

    #[test]
    fn an_older_schema_is_raised() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let store = Redb::open(&path).unwrap();
        let older = |transaction: &redb::WriteTransaction| {
            transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA - 1)?;
            Ok(())
        };
        store.write_with(older).unwrap();
        drop(store);
        assert_eq!(Redb::look(&path).unwrap().schema, SCHEMA - 1);
        drop(Redb::open(&path).unwrap());
        assert_eq!(Redb::look(&path).unwrap().schema, SCHEMA);
    }

    #[test]
    fn a_second_opener_is_told_who_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let first = Redb::open(&path).unwrap();
        let error = Redb::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        assert!(error.to_string().contains("another broker is running"), "{error}");
        drop(first);
        Redb::open(&path).unwrap();
    }

    #[test]
    fn what_is_no_database_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        fs::write(&path, "something else").unwrap();
        assert!(matches!(Redb::open(&path), Err(StoreError::Open { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "something else");
    }

    /// A file with some rows in it, as a broker that was stopped leaves it, and the rows.
    fn filled(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
        let row = |number: u8| (vec![b'a', number], vec![number; 500]);
        let mut store = Redb::open(path).unwrap();
        for number in 0..20 {
            let (key, value) = row(number);
            store.txn(&[], &[Op::Put { key, value }]).unwrap();
        }
        (0..20).map(row).collect()
    }

    #[test]
    fn a_look_changes_nothing_not_even_a_file_that_was_not_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let rows = filled(&path);
        let before = fs::read(&path).unwrap();
        assert_eq!(Redb::look(&path).unwrap().rows, rows);
        assert!(fs::read(&path).unwrap() == before);
        // As it is on the disk while it is open: a copy, since the file is one opener's.
        let store = Redb::open(&path).unwrap();
        let copy = directory.path().join("copy.redb");
        fs::copy(&path, &copy).unwrap();
        assert!(matches!(Redb::look(&path), Err(StoreError::Locked { .. })));
        drop(store);
        let before = fs::read(&copy).unwrap();
        assert_eq!(Redb::look(&copy).unwrap().rows, rows);
        assert!(fs::read(&copy).unwrap() == before);

        assert!(matches!(Redb::look(&directory.path().join("none")), Err(StoreError::Open { .. })));
        fs::write(&path, "").unwrap();
        assert_eq!(Redb::look(&path).unwrap().rows, []);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn damage_is_an_error_or_does_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let rows = filled(&path);
        let whole = fs::read(&path).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        let (mut found, mut harmless) = (0, 0);
        for at in (0..used).step_by(64) {
            let mut changed = whole.clone();
            changed[at] ^= 1 << (at / 64 % 8);
            fs::write(&path, &changed).unwrap();
            match Redb::look(&path) {
                Ok(snapshot) => {
                    assert_eq!(snapshot.rows, rows, "a bit of byte {at}");
                    harmless += 1;
                }
                Err(_) => found += 1,
            }
            fs::write(&path, &whole[..at]).unwrap();
            // Nothing at all is an empty store.
            assert!(at == 0 || Redb::look(&path).is_err(), "cut at {at}");
        }
        println!("{found} flipped bits were found, {harmless} were in what is not used");
        assert!(found > 0);
    }
}
