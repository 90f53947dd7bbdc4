//! What every backend must do. Each test runs on each of them.

use super::{
    Compare, Op, Store, Txn,
    etcd::{Access, Etcd, Place},
    memory::Memory,
    redb::Redb,
};

#[path = "../../tests/etcd_process/mod.rs"]
pub(super) mod etcd_process;

/// A backend that can be closed and opened again.
trait Backend {
    fn open() -> Self;
    fn store(&mut self) -> &mut dyn Store;
}

impl Backend for Memory {
    fn open() -> Memory {
        Memory::default()
    }

    fn store(&mut self) -> &mut dyn Store {
        self
    }
}

struct OnDisk {
    store: Redb,
    directory: tempfile::TempDir,
}

impl Backend for OnDisk {
    fn open() -> OnDisk {
        let directory = tempfile::tempdir().unwrap();
        OnDisk { store: Redb::open(&directory.path().join("store.redb")).unwrap(), directory }
    }

    fn store(&mut self) -> &mut dyn Store {
        &mut self.store
    }
}

impl OnDisk {
    fn reopen(self) -> OnDisk {
        let OnDisk { store, directory } = self;
        drop(store);
        OnDisk { store: Redb::open(&directory.path().join("store.redb")).unwrap(), directory }
    }
}

struct InEtcd {
    store: Etcd,
    // Ends after the store.
    _etcd: etcd_process::Cluster,
}

impl Backend for InEtcd {
    fn open() -> InEtcd {
        let etcd = etcd_process::Cluster::start(1);
        let access = Access { endpoints: etcd.endpoints(), prefix: "/shaper/".into(), ..Access::default() };
        InEtcd { store: Etcd::open(Place::check(access).unwrap(), None).unwrap(), _etcd: etcd }
    }

    fn store(&mut self) -> &mut dyn Store {
        &mut self.store
    }
}

fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.into(), value: value.into() }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

fn absent(key: &str) -> Compare {
    Compare::Absent { key: key.into() }
}

fn written_at(key: &str, revision: u64) -> Compare {
    Compare::WrittenAt { key: key.into(), revision }
}

fn commit(store: &mut dyn Store, ops: &[Op]) -> u64 {
    match store.txn(&[], ops).unwrap() {
        Txn::Committed { revision } => revision,
        Txn::Conflict { key } => panic!("nothing was compared, but {key:?} is in conflict"),
    }
}

fn rows(store: &dyn Store, prefix: &str) -> Vec<(String, String)> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let rows = store.range(prefix.as_bytes()).unwrap();
    rows.into_iter().map(|(key, row)| (text(key), text(row.value))).collect()
}

fn what_is_put_is_got_with_its_revision<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    assert_eq!(store.get(b"a").unwrap(), None);
    let first = commit(store, &[put("a", "1"), put("b", "")]);
    let second = commit(store, &[put("a", "2")]);
    assert!(second > first && first > 0);
    let (a, b) = (store.get(b"a").unwrap().unwrap(), store.get(b"b").unwrap().unwrap());
    assert_eq!((a.value.as_slice(), a.revision), (&b"2"[..], second));
    assert_eq!((b.value.as_slice(), b.revision), (&b""[..], first), "an empty value is a value");
    commit(store, &[delete("a"), delete("never there")]);
    assert_eq!(store.get(b"a").unwrap(), None);
}

fn a_range_is_what_has_the_prefix_in_order<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    commit(
        store,
        &[put("task/b", "2"), put("task0", "x"), put("task/a", "1"), put("tas", "x"), put("u", "x")],
    );
    let expected = [("task/a", "1"), ("task/b", "2")].map(|(key, value)| (key.into(), value.into()));
    assert_eq!(rows(store, "task/"), expected);
    assert_eq!(rows(store, "nothing/"), []);
    assert_eq!(rows(store, "").len(), 5);
    let odd = [&[0u8][..], &[0, 255], &[255, 255], &[255]];
    let ops: Vec<_> = odd.iter().map(|key| Op::Put { key: key.to_vec(), value: vec![0, 255] }).collect();
    commit(store, &ops);
    let keys: Vec<_> = store.range(&[255]).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, [vec![255], vec![255, 255]], "keys are any bytes");
}

fn a_transaction_happens_whole_or_not_at_all<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    let first = commit(store, &[put("a", "1")]);
    let conflict = |key: &str| Txn::Conflict { key: key.into() };
    let ops = [put("a", "9"), put("b", "9")];
    assert_eq!(store.txn(&[absent("b"), absent("a")], &ops).unwrap(), conflict("a"));
    assert_eq!(store.txn(&[written_at("a", first + 1)], &ops).unwrap(), conflict("a"));
    assert_eq!(store.txn(&[written_at("a", first), written_at("b", first)], &ops).unwrap(), conflict("b"));
    assert_eq!(rows(store, ""), [("a".into(), "1".into())]);

    let Txn::Committed { revision } = store.txn(&[written_at("a", first), absent("b")], &ops).unwrap() else {
        panic!("both comparisons hold");
    };
    assert!(revision > first);
    assert_eq!(rows(store, "").len(), 2);
    assert_eq!(store.txn(&[written_at("a", first)], &ops).unwrap(), conflict("a"), "a was written since");
}

fn the_later_write_of_a_key_holds<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    commit(store, &[put("a", "1"), put("a", "2"), put("b", "1"), delete("b"), delete("c"), put("c", "1")]);
    assert_eq!(rows(store, ""), [("a".into(), "2".into()), ("c".into(), "1".into())]);
}

fn revisions_grow_also_by_empty_transactions<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    let revisions: Vec<_> = (0..5).map(|_| commit(store, &[])).collect();
    assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");
}

fn a_transaction_may_be_large<B: Backend>() {
    let mut backend = B::open();
    let store = backend.store();
    let first = commit(store, &[put("a", "1"), put("gone", "1")]);
    let value = "x".repeat(4000);
    let mut ops: Vec<_> = (0..1000).map(|number| put(&format!("row/{number:04}"), &value)).collect();
    ops.push(delete("gone"));
    ops.push(put("row/0000", "last"));
    assert_eq!(store.txn(&[absent("a")], &ops).unwrap(), Txn::Conflict { key: b"a".to_vec() });
    assert_eq!(rows(store, "").len(), 2, "nothing happened");
    let Txn::Committed { revision } = store.txn(&[written_at("a", first)], &ops).unwrap() else {
        panic!("the comparison holds");
    };
    assert_eq!(rows(store, "").len(), 1001);
    assert_eq!(store.get(b"row/0000").unwrap().unwrap().value, b"last");
    for (_, row) in store.range(b"row/").unwrap() {
        assert!(row.revision > first && row.revision <= revision, "{} of {revision}", row.revision);
    }
    let after = store.get(b"row/0500").unwrap().unwrap().revision;
    assert!(matches!(store.txn(&[written_at("row/0500", after)], &[]).unwrap(), Txn::Committed { .. }));
    assert!(commit(store, &[]) > revision);
}

macro_rules! conformance {
    ($($test:ident),* $(,)?) => {
        mod memory { $(#[test] fn $test() { super::$test::<super::Memory>(); })* }
        mod on_disk { $(#[test] fn $test() { super::$test::<super::OnDisk>(); })* }
        mod in_etcd { $(#[test] fn $test() { super::$test::<super::InEtcd>(); })* }
    };
}

conformance!(
    what_is_put_is_got_with_its_revision,
    a_range_is_what_has_the_prefix_in_order,
    a_transaction_happens_whole_or_not_at_all,
    the_later_write_of_a_key_holds,
    revisions_grow_also_by_empty_transactions,
    a_transaction_may_be_large,
);

#[test]
fn a_file_keeps_rows_and_revisions() {
    let mut backend = OnDisk::open();
    let first = commit(backend.store(), &[put("a", "1")]);
    let mut backend = backend.reopen();
    assert_eq!(backend.store().get(b"a").unwrap().unwrap().revision, first);
    assert!(commit(backend.store(), &[put("b", "2")]) > first);
    assert_eq!(rows(backend.reopen().store(), "").len(), 2);
}
