//! What a store has acknowledged is there after kill -9, at whatever moment.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use shaper_broker::store::{Op, Store, StoreError, Txn, redb::Redb};

/// Set for the child: the file that it writes to until it is killed.
const FILE: &str = "SHAPER_TEST_STORE";
const ROUNDS: u64 = 12;
/// Rows of one transaction: all or none of them must be there.
const ROWS: u64 = 3;

fn key(number: u64, row: u64) -> Vec<u8> {
    format!("row/{number:012}/{row}").into_bytes()
}

/// The number of the last transaction, each of which must be whole.
fn check(store: &Redb) -> u64 {
    let rows = store.range(b"row/").unwrap();
    assert_eq!(rows.len() as u64 % ROWS, 0, "a transaction is there in part");
    let last = rows.len() as u64 / ROWS;
    for number in 1..=last {
        for row in 0..ROWS {
            let found = store.get(&key(number, row)).unwrap().map(|row| row.value);
            assert_eq!(found, Some(number.to_le_bytes().repeat(100)), "transaction {number}, row {row}");
        }
    }
    last
}

/// Not a test of its own: what the test below starts and kills.
#[test]
fn writes_until_it_is_killed() {
    let Some(file) = env::var_os(FILE) else { return };
    let mut store = Redb::open(Path::new(&file)).unwrap();
    let mut out = std::io::stdout().lock();
    for number in check(&store) + 1.. {
        let put = |row| Op::Put { key: key(number, row), value: number.to_le_bytes().repeat(100) };
        let ops: Vec<_> = (0..ROWS).map(put).collect();
        let Txn::Committed { .. } = store.txn(&[], &ops).unwrap() else { panic!("nothing was compared") };
        writeln!(out, "committed {number}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn nothing_acknowledged_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.redb");
    let mut acknowledged = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "writes_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env(FILE, &file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut killed = false;
        for line in lines {
            let line = line.unwrap();
            // What the harness prints has no end of line before the first of ours.
            let Some((_, number)) = line.split_once("committed ") else { continue };
            let number: u64 = number.parse().unwrap();
            assert_eq!(number, acknowledged + 1, "nothing is written twice");
            acknowledged = number;
            // At another moment each time; what was already said is read to its end.
            if !killed && number.is_multiple_of(17 + 13 * round) {
                let error = Redb::open(&file).unwrap_err();
                assert!(matches!(error, StoreError::Locked { .. }), "another process has it: {error}");
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "the child ended by itself");
        let last = check(&Redb::open(&file).unwrap());
        assert!(last >= acknowledged, "{acknowledged} was acknowledged, {last} is the last there");
        assert!(last <= acknowledged + 1, "one may be there that was not acknowledged");
        acknowledged = last;
    }
}
