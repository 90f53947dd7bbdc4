//! A store in one file, by redb. A transaction is on the disk when it returns.
//!
//! It goes to the end of a log, in one piece: that is all that a commit waits for. Most rows of a broker are written several
//! times within a second, and many are gone soon after; in a tree each of these would cost a path of pages. What the log has
//! is in memory, too. Each [`GENERATION`] of it is then carried into the tree of rows, by the transactions that follow, a few
//! rows each, in the order of the keys, and only what was not written again meanwhile; then that part of the log is deleted.
//! Whoever opens the file reads the log anew: what of it is already in the rows is there twice, and the same.
//!
//! redb sees bytes only: a row is the eight bytes of its revision, the highest first, and then its value. The table `log` has
//! the transactions by their revisions (`log.rs`), the table `meta` the number `schema`, of what is in the file.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use redb::{
    AccessGuard, Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, TableError, backends::FileBackend,
};

use super::{BackendError, Compare, Op, SCHEMA, Snapshot, Store, StoreError, Txn, Versioned, Visit};

mod image;
mod log;

use image::Image;
use log::{Cut, Frozen, Recent, Record};

const ROWS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("rows");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SCHEMA_KEY: &str = "schema";
/// Of the latest transaction that is not in the log: of one that was too large for it, or of a broker of schema 1.
const REVISION_KEY: &str = "revision";

/// Bytes of the log that are carried into the rows together. There are at most twice as many in the log and in memory, and a
/// transaction.
const GENERATION: usize = 32 << 20;
/// Rows that a transaction carries at least while there are some to be carried.
const CARRIED: usize = 64;

/// How much of the file redb keeps in memory. The broker reads it at its start only.
const CACHE_BYTES: usize = 16 << 20;

/// Rows in a file.
pub struct Redb {
    path: PathBuf,
    database: Database,
    /// Of the latest transaction.
    revision: u64,
    /// What is only in the log.
    recent: Recent,
    /// What is older, and in the log until all of it is in the rows.
    frozen: Option<Frozen>,
    generation: usize,
}

impl std::fmt::Debug for Redb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redb").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Redb {
    /// Opens the file, or makes it. It is readable by its owner only.
    pub fn open(path: &Path) -> Result<Redb, StoreError> {
        Redb::open_with(path, GENERATION)
    }

    /// The same, carrying so many bytes of the log at a time.
    pub fn open_with(path: &Path, generation: usize) -> Result<Redb, StoreError> {
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
        let mut store = Redb::around(path, database, generation);
        store.check_schema()?;
        store.read_log()?;
        Ok(store)
    }

    fn around(path: &Path, database: Database, generation: usize) -> Redb {
        let path = path.to_owned();
        Redb { path, database, revision: 0, recent: Recent::default(), frozen: None, generation }
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
        let mut store = Redb::around(path, database, GENERATION);
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
        store.read_log()?;
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
            transaction.open_table(LOG)?;
            Ok(found)
        })?;
        match found {
            Some(found) if found > SCHEMA => {
                Err(StoreError::NewerSchema { place: self.path.display().to_string(), found, known: SCHEMA })
            }
            _ => Ok(()),
        }
    }

    /// Takes into memory what is in the log.
    fn read_log(&mut self) -> Result<(), StoreError> {
        let (revision, records) = self.read(|| {
            let transaction = self.database.begin_read()?;
            let meta = transaction.open_table(META)?;
            let revision = meta.get(REVISION_KEY)?.map_or(0, |value| value.value());
            let mut records = Vec::new();
            match transaction.open_table(LOG) {
                Ok(log) => {
                    for record in log.range::<u64>(..)? {
                        let (revision, bytes) = record?;
                        records.push(Record { revision: revision.value(), bytes: bytes.value().to_vec() });
                    }
                }
                // It is of schema 1, and only looked at.
                Err(TableError::TableDoesNotExist(_)) => {}
                Err(error) => return Err(error.into()),
            }
            Ok((revision, records))
        })?;
        self.revision = records.last().map_or(revision, |record| record.revision);
        for record in records {
            self.recent.add(record).map_err(|Cut| self.damaged("a record of its log is cut"))?;
        }
        self.freeze_if_due();
        Ok(())
    }

    fn freeze_if_due(&mut self) {
        if self.recent.bytes() >= self.generation && self.frozen.is_none() {
            self.frozen = Some(std::mem::take(&mut self.recent).freeze());
        }
    }

    /// How many rows the next transaction carries from the log, if it has so many operations itself.
    fn to_carry(&self, operations: usize) -> usize {
        let Some(frozen) = &self.frozen else { return 0 };
        let is_late = self.recent.bytes() >= self.generation;
        if is_late { frozen.left() } else { frozen.left().min(operations.max(CARRIED)) }
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

const SHORT: &str = "a row is too short";

/// The revision and the value of a row; `None`: it has less than a revision.
fn split(stored: &[u8]) -> Option<(u64, &[u8])> {
    let (revision, value) = stored.split_first_chunk()?;
    Some((u64::from_be_bytes(*revision), value))
}

fn write_row(
    rows: &mut redb::Table<'_, &'static [u8], &'static [u8]>,
    key: &[u8],
    revision: u64,
    value: Option<&[u8]>,
) -> Result<(), BackendError> {
    match value {
        Some(value) => drop(rows.insert(key, [&revision.to_be_bytes(), value].concat().as_slice())?),
        None => drop(rows.remove(key)?),
    }
    Ok(())
}

/// A row as it is in the tree, or why it cannot be read.
type Stored<'a> = Result<(AccessGuard<'a, &'static [u8]>, AccessGuard<'a, &'static [u8]>), StorageError>;

/// Each row of the tree and of the log, where both have a key that of the log, in the order in which both come. False: one is
/// too short.
fn merge<'a>(
    rows: impl Iterator<Item = Stored<'a>>,
    logged: impl Iterator<Item = (&'a [u8], log::Written<'a>)>,
    is_before: fn(&[u8], &[u8]) -> bool,
    row: &mut Visit<'_>,
) -> Result<bool, BackendError> {
    let mut take = |(key, (revision, value)): (&[u8], log::Written<'_>)| {
        if let Some(value) = value {
            row(key, revision, value);
        }
    };
    let mut logged = logged.peekable();
    for stored in rows {
        let (key, stored) = stored?;
        let key = key.value();
        while let Some(before) = logged.next_if(|(logged, _)| is_before(logged, key)) {
            take(before);
        }
        let Some((revision, value)) = split(stored.value()) else { return Ok(false) };
        // What is in the log is not older.
        match logged.next_if(|(logged, _)| *logged == key) {
            Some(newer) => take(newer),
            None => take((key, (revision, Some(value)))),
        }
    }
    logged.for_each(take);
    Ok(true)
}

impl Redb {
    /// A row that is not in the log.
    fn settled(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError> {
        let stored = self.read(|| {
            let rows = self.database.begin_read()?.open_table(ROWS)?;
            Ok(rows.get(key)?.map(|value| value.value().to_vec()))
        })?;
        let decode = |stored: Vec<u8>| {
            let (revision, value) = split(&stored).ok_or_else(|| self.damaged(SHORT))?;
            Ok(Versioned { value: value.to_vec(), revision })
        };
        stored.map(decode).transpose()
    }

    /// A transaction with more than a generation, as a restore is: straight into the rows, after all that is in the log.
    fn txn_past_the_log(&mut self, ops: &[Op]) -> Result<Txn, StoreError> {
        let revision = self.revision + 1;
        self.write_with(|transaction| {
            let mut rows = transaction.open_table(ROWS)?;
            for (key, (revision, value)) in self.logged(b"") {
                write_row(&mut rows, key, revision, value)?;
            }
            for op in ops {
                let (key, value) = op.write();
                write_row(&mut rows, key, revision, value)?;
            }
            transaction.open_table(LOG)?.retain(|_, _| false)?;
            transaction.open_table(META)?.insert(REVISION_KEY, revision)?;
            Ok(())
        })?;
        self.revision = revision;
        (self.recent, self.frozen) = (Recent::default(), None);
        Ok(Txn::Committed { revision })
    }

    /// The rows in the log whose key begins with `prefix`.
    fn logged(&self, prefix: &[u8]) -> BTreeMap<&[u8], log::Written<'_>> {
        // The later of two of a key stays.
        let all = self.frozen.iter().flat_map(Frozen::iter).chain(self.recent.iter());
        all.filter(|(key, _)| key.starts_with(prefix)).collect()
    }
}

impl Store for Redb {
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError> {
        let logged = self.recent.get(key).or_else(|| self.frozen.as_ref()?.get(key));
        match logged {
            Some((revision, value)) => Ok(value.map(|value| Versioned { value: value.to_vec(), revision })),
            None => self.settled(key),
        }
    }

    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError> {
        let mut found = Vec::new();
        let mut take = |key: &[u8], revision, value: &[u8]| {
            found.push((key.to_vec(), Versioned { value: value.to_vec(), revision }));
        };
        let logged = self.logged(prefix).into_iter();
        let whole = self.read(|| {
            let rows = self.database.begin_read()?.open_table(ROWS)?;
            let has_prefix =
                |row: &Stored<'_>| row.as_ref().map_or(true, |(key, _)| key.value().starts_with(prefix));
            let rows = rows.range(prefix..)?.take_while(has_prefix);
            merge(rows, logged, |a, b| a < b, &mut take)
        })?;
        whole.then_some(found).ok_or_else(|| self.damaged(SHORT))
    }

    fn scan_back(&self, row: &mut Visit<'_>) -> Result<(), StoreError> {
        let logged = self.logged(b"").into_iter().rev();
        let whole = self.read(|| {
            let rows = self.database.begin_read()?.open_table(ROWS)?;
            merge(rows.iter()?.rev(), logged, |a, b| a > b, row)
        })?;
        if whole { Ok(()) } else { Err(self.damaged(SHORT)) }
    }

    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError> {
        for compare in compares {
            let written_at = self.get(compare.key())?.map(|row| row.revision);
            if !compare.holds(written_at) {
                return Ok(Txn::Conflict { key: compare.key().to_vec() });
            }
        }
        if log::length(ops) > self.generation {
            return self.txn_past_the_log(ops);
        }
        let record = Record::of(self.revision + 1, ops);
        let carried = self.to_carry(ops.len());
        self.write_with(|transaction| {
            let mut log = transaction.open_table(LOG)?;
            log.insert(record.revision, record.bytes.as_slice())?;
            let Some(frozen) = &self.frozen else { return Ok(()) };
            let mut rows = transaction.open_table(ROWS)?;
            for (key, (revision, value)) in frozen.next(carried) {
                // What was written since is carried later, or need not be.
                if self.recent.contains(key) {
                    continue;
                }
                write_row(&mut rows, key, revision, value)?;
            }
            if frozen.left() == carried
                && let Some(last) = frozen.last()
            {
                log.retain_in(..=last, |_, _| false)?;
            }
            Ok(())
        })?;
        self.revision = record.revision;
        let revision = record.revision;
        if let Some(frozen) = &mut self.frozen {
            frozen.settle(carried);
        }
        self.frozen.take_if(|frozen| frozen.left() == 0);
        self.recent.add(record).map_err(|Cut| self.damaged("a record of its log is cut"))?;
        self.freeze_if_due();
        Ok(Txn::Committed { revision })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::memory::Memory;

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

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = (0..30_u8, proptest::option::of(0..200_usize)).prop_map(|(key, value)| {
            let key = vec![b'k', key / 10, key];
            match value {
                Some(length) => Op::Put { key, value: vec![7; length] },
                None => Op::Delete { key },
            }
        });
        proptest::collection::vec(op, 0..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// What is written and removed at random, in a store that carries all the time, and is opened anew now and then.
        #[test]
        fn the_log_and_the_rows_are_one_store(
            steps in proptest::collection::vec((ops(), prop::bool::weighted(0.1)), 1..60),
            generation in 1..20_000_usize,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("store.redb");
            let (mut store, mut reference) =
                (Redb::open_with(&path, generation).unwrap(), Memory::default());
            for (ops, anew) in steps {
                let done = store.txn(&[], &ops).unwrap();
                prop_assert_eq!(&done, &reference.txn(&[], &ops).unwrap());
                if anew {
                    drop(store);
                    store = Redb::open_with(&path, generation).unwrap();
                }
                let mut back = Vec::new();
                let mut take = |key: &[u8], revision, value: &[u8]| {
                    back.push((key.to_vec(), Versioned { value: value.to_vec(), revision }));
                };
                store.scan_back(&mut take).unwrap();
                back.reverse();
                prop_assert_eq!(back, reference.range(b"").unwrap());
                for prefix in [&b""[..], b"k", b"k\x01"] {
                    prop_assert_eq!(store.range(prefix).unwrap(), reference.range(prefix).unwrap());
                }
                for op in &ops {
                    let (key, _) = op.write();
                    prop_assert_eq!(store.get(key).unwrap(), reference.get(key).unwrap());
                }
            }
            let rows = reference.range(b"").unwrap().into_iter().map(|(key, row)| (key, row.value));
            drop(store);
            prop_assert_eq!(Redb::look(&path).unwrap().rows, rows.collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_was_carried_is_no_more_in_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let mut store = Redb::open_with(&path, 10_000).unwrap();
        for number in 0..1000_u16 {
            let key = number.to_be_bytes().to_vec();
            store.txn(&[], &[Op::Put { key, value: vec![1; 100] }]).unwrap();
        }
        let transaction = store.database.begin_read().unwrap();
        let (log, rows) = (transaction.open_table(LOG).unwrap(), transaction.open_table(ROWS).unwrap());
        let (log, rows) = (log.iter().unwrap().count(), rows.iter().unwrap().count());
        assert!(log < 250 && rows > 700 && rows < 1000, "{log} transactions, {rows} rows");
        assert_eq!(store.range(b"").unwrap().len(), 1000);
    }

    /// A file as a broker of schema 1 left it: rows, and no log.
    #[test]
    fn a_store_without_a_log_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let database = Database::create(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert(SCHEMA_KEY, 1).unwrap();
        meta.insert(REVISION_KEY, 41).unwrap();
        drop(meta);
        let stored = [&40_u64.to_be_bytes()[..], b"1"].concat();
        transaction.open_table(ROWS).unwrap().insert(&b"a"[..], stored.as_slice()).unwrap();
        transaction.commit().unwrap();
        drop(database);

        let rows = vec![(b"a".to_vec(), b"1".to_vec())];
        assert_eq!(Redb::look(&path).unwrap().rows, rows);
        let mut store = Redb::open(&path).unwrap();
        let compare = Compare::WrittenAt { key: b"a".to_vec(), revision: 40 };
        assert_eq!(store.txn(&[compare], &[]).unwrap(), Txn::Committed { revision: 42 });
        assert_eq!(store.get(b"a").unwrap().unwrap().revision, 40);
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
