//! What a store has acknowledged is there after kill -9, at whatever moment.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod etcd_process;

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use shaper_broker::store::{
    Op, Store, StoreError, Txn,
    etcd::{Access, Etcd, Place},
    redb::Redb,
};

/// Set for the child: the file, or the endpoint of etcd, that it writes to until it is killed.
const STORE: &str = "SHAPER_TEST_STORE";
/// Set for the child: how many rows a transaction has.
const ROWS: &str = "SHAPER_TEST_ROWS";

/// Of the log of a file: so little that some of it is carried into the rows at each moment.
const GENERATION: usize = 40_000;

fn open(place: &str) -> Box<dyn Store> {
    if place.starts_with("http://") {
        let endpoints = vec![place.to_owned()];
        let place = Place::check(Access { endpoints, prefix: "/crash/".into(), ..Access::default() });
        Box::new(Etcd::open(place.unwrap(), None).unwrap())
    } else {
        Box::new(Redb::open_with(Path::new(place), GENERATION).unwrap())
    }
}

fn key(number: usize, row: usize) -> Vec<u8> {
    format!("row/{number:012}/{row:04}").into_bytes()
}

fn value(number: usize) -> Vec<u8> {
    number.to_le_bytes().repeat(100)
}

/// The number of the last transaction, each of which must be whole.
fn check(store: &dyn Store, rows: usize) -> usize {
    let found = store.range(b"row/").unwrap();
    assert_eq!(found.len() % rows, 0, "a transaction is there in part");
    let last = found.len() / rows;
    let expected = (1..=last).flat_map(|number| (0..rows).map(move |row| (key(number, row), value(number))));
    for ((key, row), (expected, value)) in found.into_iter().zip(expected) {
        assert!(key == expected && row.value == value, "{} is wrong", String::from_utf8_lossy(&expected));
    }
    last
}

/// Not a test of its own: what the tests below start and kill.
#[test]
fn writes_until_it_is_killed() {
    let Ok(place) = env::var(STORE) else { return };
    let rows = env::var(ROWS).unwrap().parse().unwrap();
    let mut store = open(&place);
    let mut out = std::io::stdout().lock();
    for number in check(store.as_ref(), rows) + 1.. {
        let put = |row| Op::Put { key: key(number, row), value: value(number) };
        let ops: Vec<_> = (0..rows).map(put).collect();
        let Txn::Committed { .. } = store.txn(&[], &ops).unwrap() else { panic!("nothing was compared") };
        writeln!(out, "committed {number}").unwrap();
        out.flush().unwrap();
    }
}

/// Kills a writer as often as `kill_at` has numbers: when it has acknowledged so many in its life.
fn nothing_acknowledged_is_lost(
    place: &str,
    rows: usize,
    kill_at: impl Iterator<Item = usize>,
    before_kill: impl Fn(),
) {
    let mut acknowledged = 0;
    for kill_at in kill_at {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "writes_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env(STORE, place)
            .env(ROWS, rows.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut killed, begun) = (false, acknowledged);
        for line in lines {
            let line = line.unwrap();
            // What the harness prints has no end of line before the first of ours.
            let Some((_, number)) = line.split_once("committed ") else { continue };
            let number: usize = number.parse().unwrap();
            assert_eq!(number, acknowledged + 1, "nothing is written twice");
            acknowledged = number;
            // At another moment each time; what was already said is read to its end.
            if !killed && number - begun == kill_at {
                before_kill();
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "the child ended by itself");
        let last = check(open(place).as_ref(), rows);
        assert!(last >= acknowledged, "{acknowledged} was acknowledged, {last} is the last there");
        assert!(last <= acknowledged + 1, "one may be there that was not acknowledged");
        acknowledged = last;
    }
}

#[test]
fn of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.redb");
    let place = file.to_str().unwrap();
    nothing_acknowledged_is_lost(place, 3, (0..12).map(|round| 17 + 13 * round), || {
        let error = Redb::open(&file).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "another process has it: {error}");
    });
}

#[test]
fn of_etcd() {
    let etcd = etcd_process::Cluster::start(1);
    nothing_acknowledged_is_lost(&etcd.endpoints()[0], 3, (0..6).map(|round| 5 + 7 * round), || {});
}

/// A transaction of so many rows takes several of etcd's, and the writer is killed somewhere among them.
#[test]
fn of_etcd_when_a_transaction_is_large() {
    let etcd = etcd_process::Cluster::start(1);
    nothing_acknowledged_is_lost(&etcd.endpoints()[0], 400, (0..12).map(|round| 1 + round % 3), || {});
}
