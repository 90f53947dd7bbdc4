//! What can happen between the broker and etcd, with real ones.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
};

use etcd_client::WatchOptions;

use super::*;
use crate::store::conformance::etcd_process::Cluster as Processes;

fn place(endpoints: Vec<String>) -> Place {
    Place::check(Access { endpoints, prefix: "/test/".into(), ..Access::default() }).unwrap()
}

fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.into(), value: value.into() }
}

fn commit(store: &mut Etcd, ops: &[Op]) {
    assert!(matches!(store.txn(&[], ops).unwrap(), Txn::Committed { .. }));
}

fn value(store: &Etcd, key: &str) -> Option<String> {
    store.get(key.as_bytes()).unwrap().map(|row| String::from_utf8(row.value).unwrap())
}

/// How often a key was written.
fn version(store: &Etcd, key: &str) -> i64 {
    store.read(store.key(key)).unwrap().map_or(0, |row| row.version())
}

#[test]
fn who_opens_the_store_is_its_only_writer() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let mut first = Etcd::open(place.clone(), None).unwrap();
    commit(&mut first, &[put("a", "1")]);
    let mut second = Etcd::open(place, None).unwrap();
    let error = first.txn(&[], &[put("a", "2")]).unwrap_err();
    assert!(matches!(error, StoreError::TakenOver { .. }), "{error}");
    assert_eq!(value(&second, "a").as_deref(), Some("1"));
    commit(&mut second, &[put("a", "3")]);
    assert!(first.txn(&[], &[]).is_err(), "and for good");
    assert_eq!(value(&first, "a").as_deref(), Some("3"), "it may still look");
}

#[test]
fn prefixes_are_clusters_of_their_own() {
    let etcd = Processes::start(1);
    let open = |prefix: &str| {
        let access = Access { endpoints: etcd.endpoints(), prefix: prefix.into(), ..Access::default() };
        Etcd::open(Place::check(access).unwrap(), None).unwrap()
    };
    let (mut one, mut other) = (open("/a/"), open("/b/"));
    commit(&mut one, &[put("x", "1")]);
    commit(&mut other, &[put("y", "2")]);
    assert_eq!(one.range(b"").unwrap().len(), 1);
    assert_eq!(value(&other, "x"), None);
}

#[test]
fn a_newer_schema_is_refused_and_left_as_it_is() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let mut store = Etcd::open(place.clone(), None).unwrap();
    let newer = TxnOp::put(store.key("schema"), (SCHEMA + 1).to_string(), None);
    store.always(vec![newer]).unwrap();
    for _ in 0..2 {
        let error = Etcd::open(place.clone(), None).unwrap_err();
        assert!(matches!(error, StoreError::NewerSchema { .. }), "{error}");
    }
    commit(&mut store, &[put("a", "1")]);
}

#[test]
fn more_rows_than_a_page_are_read_whole() {
    let etcd = Processes::start(1);
    let mut store = Etcd::open(place(etcd.endpoints()), None).unwrap();
    let rows: Vec<_> =
        (0..PAGE + 200).map(|number| put(&format!("n/{number:05}"), &number.to_string())).collect();
    commit(&mut store, &rows);
    let found = store.range(b"n/").unwrap();
    assert_eq!(found.len(), rows.len());
    assert!(found.is_sorted_by(|(a, _), (b, _)| a < b));
}

#[test]
fn a_large_transaction_that_was_cut_off_is_finished_or_dropped_whole() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let chunk = |key: &str, value: &str| vec![(key.as_bytes().to_vec(), Some(value.as_bytes().to_vec()))];
    let mut store = Etcd::open(place.clone(), None).unwrap();
    commit(&mut store, &[put("a", "old"), put("b", "old")]);
    for (number, key) in ["a", "b"].into_iter().enumerate() {
        let staged = store.key(&format!("staged/{number:08}"));
        store.always(vec![TxnOp::put(staged, chunk::encode(&chunk(key, "new")), None)]).unwrap();
    }
    let mut store = Etcd::open(place.clone(), None).unwrap();
    assert_eq!((value(&store, "a").as_deref(), value(&store, "b").as_deref()), (Some("old"), Some("old")));
    assert_eq!(store.read_range(store.key("staged/")).unwrap().len(), 0, "nothing is left");

    // Killed between the first chunk and the second.
    for (number, key) in ["a", "b"].into_iter().enumerate() {
        let staged = store.key(&format!("staged/{number:08}"));
        store.always(vec![TxnOp::put(staged, chunk::encode(&chunk(key, "new")), None)]).unwrap();
    }
    store.always(vec![TxnOp::put(store.key("sealed"), "2", None)]).unwrap();
    let staged = store.key("staged/00000000");
    store.carry_out(chunk("a", "new"), &staged).unwrap();
    let store = Etcd::open(place, None).unwrap();
    assert_eq!((value(&store, "a").as_deref(), value(&store, "b").as_deref()), (Some("new"), Some("new")));
    assert_eq!(store.read_range(store.key("staged/")).unwrap().len(), 0);
    assert!(store.read(store.key("sealed")).unwrap().is_none());
}

#[test]
fn a_row_that_is_too_large_is_refused_before_anything_is_written() {
    let etcd = Processes::start(1);
    let mut store = Etcd::open(place(etcd.endpoints()), None).unwrap();
    let limit = store.limits().bytes;
    let error = store.txn(&[], &[put("a", "1"), put("b", &"x".repeat(limit))]).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    assert_eq!(store.range(b"").unwrap().len(), 0);
    commit(&mut store, &[put("b", &"x".repeat(limit - 1))]);
}

#[test]
fn all_that_one_transaction_takes_goes_into_one() {
    let etcd = Processes::start(1);
    let mut store = Etcd::open(place(etcd.endpoints()), None).unwrap();
    let Limits { writes, bytes } = store.limits();
    let value = "x".repeat(bytes / writes - 16);
    let rows: Vec<_> = (0..writes).map(|number| put(&format!("{number:016}"), &value)).collect();
    let before = version(&store, "owner");
    commit(&mut store, &rows);
    assert_eq!(version(&store, "owner"), before + 1, "etcd took it at once");
}

#[test]
fn another_member_is_asked_when_one_is_killed() {
    let mut etcd = Processes::start(3);
    let mut store = Etcd::open(place(etcd.endpoints()), None).unwrap();
    let mut written = 0;
    let mut write = |store: &mut Etcd| {
        written += 1;
        commit(store, &[put("n", &written.to_string())]);
    };
    (0..20).for_each(|_| write(&mut store));
    let endpoint = store.cluster.borrow().endpoint().to_owned();
    let member = etcd.endpoints().iter().position(|it| *it == endpoint).unwrap();
    etcd.kill(member);
    (0..20).for_each(|_| write(&mut store));
    assert_ne!(store.cluster.borrow().endpoint(), endpoint);
    assert_eq!(value(&store, "n").as_deref(), Some("40"));
    assert_eq!(version(&store, "row/n"), 40, "each was written once");
}

#[test]
fn without_a_majority_nothing_is_acknowledged_and_the_error_says_what_to_do() {
    let mut etcd = Processes::start(1);
    let mut store = Etcd::open(place(etcd.endpoints()), None).unwrap();
    etcd.kill(0);
    let error = store.txn(&[], &[put("a", "1")]).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("--etcd-endpoints"), "{error}");
}

#[test]
fn a_leader_whose_lease_is_over_writes_nothing_also_before_another_has_opened_the_store() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let win = |me: &'static str, told: &mut Vec<String>| {
        let tell = |leader: &str| told.push(leader.to_owned());
        runtime.block_on(Leadership::win(place.clone(), me, Duration::from_secs(2), tell)).unwrap()
    };
    let mut told = Vec::new();
    let first = win("one", &mut told);
    assert!(told.is_empty());
    let mut store = Etcd::open(place.clone(), Some(first.fence())).unwrap();
    commit(&mut store, &[put("a", "1")]);
    // Nobody renews the first one's.
    let second = win("two", &mut told);
    assert_eq!(told, ["one"]);
    let error = store.txn(&[], &[put("a", "2")]).unwrap_err();
    assert!(matches!(error, StoreError::NotLeader { .. }), "{error}");
    assert_eq!(value(&store, "a").as_deref(), Some("1"));
    commit(&mut Etcd::open(place.clone(), Some(second.fence())).unwrap(), &[put("a", "3")]);
    runtime.block_on(second.resign());
    win("three", &mut told);
    assert_eq!(told, ["one"], "who resigns is not waited for");
}

#[test]
fn a_lease_is_renewed_until_it_is_gone() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let length = Duration::from_secs(2);
    let mut lead = runtime.block_on(Leadership::win(place.clone(), "one", length, |_| ())).unwrap();
    let kept = runtime.block_on(async { tokio::time::timeout(2 * length, lead.keep()).await });
    assert!(kept.is_err(), "{kept:?}");
    let mut store = Etcd::open(place, Some(lead.fence())).unwrap();
    commit(&mut store, &[put("a", "1")]);
    runtime.block_on(async {
        let mut client = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
        client.lease_revoke(lead.lease()).await.unwrap();
    });
    let lost = runtime.block_on(async { tokio::time::timeout(length, lead.keep()).await }).unwrap();
    assert!(matches!(lost, StoreError::NotLeader { .. }), "{lost}");
}

#[test]
fn a_leader_that_writes_no_more_is_removed_even_if_its_lease_lives_on() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let length = Duration::from_secs(2);
    let win = |me: &'static str| Leadership::win(place.clone(), me, length, |_| ());
    let first = runtime.block_on(win("one")).unwrap();
    let mut store = Etcd::open(place.clone(), Some(first.fence())).unwrap();
    let lease = first.lease();
    runtime.block_on(async {
        let mut client = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
        let mut others = client.clone();
        tokio::spawn(async move {
            while others.lease_keep_alive(lease).await.is_ok() {
                tokio::time::sleep(length / 4).await;
            }
        });
        tokio::time::timeout(10 * length, win("two")).await.unwrap().unwrap();
        assert!(client.lease_time_to_live(lease, None).await.unwrap().ttl() > 0, "it was not for the lease");
    });
    let error = store.txn(&[], &[put("a", "2")]).unwrap_err();
    assert!(matches!(error, StoreError::NotLeader { .. }), "{error}");
}

#[test]
fn a_leader_that_writes_leads_on_whatever_those_see_who_stand_by() {
    let etcd = Processes::start(1);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let length = Duration::from_secs(2);
    let win =
        |me: &'static str, endpoints: Vec<String>| Leadership::win(place(endpoints), me, length, |_| ());
    runtime.block_on(async {
        let mut first = win("one", etcd.endpoints()).await.unwrap();
        let second = win("two", [vec![silent], etcd.endpoints()].concat());
        tokio::select! {
            lost = first.keep() => panic!("{lost}"),
            won = second => panic!("{won:?}"),
            () = tokio::time::sleep(3 * length) => {}
        }
    });
}

#[test]
fn a_member_that_takes_a_connection_and_never_answers_leaves_time_for_the_others() {
    let etcd = Processes::start(1);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let mut cluster = Cluster::new(place([vec![silent], etcd.endpoints()].concat()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let get = |mut client: etcd_client::Client| async move { client.get("x", None).await };
    // Less than any member is waited for.
    runtime.block_on(cluster.call(Duration::from_secs(1), get)).unwrap();
}

/// What a [`Proxy`] does to the next bytes, and to all that follow on their connection.
const FORWARD: u8 = 0;
const LOSE_ANSWERS: u8 = 1;
const HOLD_REQUESTS: u8 = 2;

/// Stands before etcd, and does once what it is told.
struct Proxy {
    port: u16,
    mode: Arc<AtomicU8>,
    /// What is held goes on when this is dropped.
    release: Option<mpsc::Sender<()>>,
    /// What was held has gone on.
    released: mpsc::Receiver<()>,
}

impl Proxy {
    fn before(etcd: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mode = Arc::new(AtomicU8::new(FORWARD));
        let (release, wait) = mpsc::channel();
        let (done, released) = mpsc::channel();
        let wait = Arc::new(std::sync::Mutex::new(wait));
        let shared = Arc::clone(&mode);
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let server = TcpStream::connect(("127.0.0.1", etcd)).unwrap();
                let (mode, from, to) =
                    (Arc::clone(&shared), server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || answers(from, to, &mode));
                let (mode, wait, done) = (Arc::clone(&shared), Arc::clone(&wait), done.clone());
                thread::spawn(move || requests(client, server, &mode, &wait, &done));
            }
        });
        Proxy { port, mode, release: Some(release), released }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn once(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
    }
}

fn takes(mode: &AtomicU8, which: u8) -> bool {
    mode.compare_exchange(which, FORWARD, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

fn answers(mut from: TcpStream, mut to: TcpStream, mode: &AtomicU8) {
    let (mut buffer, mut lost) = ([0; 65_536], false);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        lost |= takes(mode, LOSE_ANSWERS);
        if !lost && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
    // The other direction may have closed it.
    let _ = to.shutdown(Shutdown::Both);
}

fn requests(
    mut from: TcpStream,
    mut to: TcpStream,
    mode: &AtomicU8,
    wait: &std::sync::Mutex<mpsc::Receiver<()>>,
    done: &mpsc::Sender<()>,
) {
    let (mut buffer, mut held) = ([0; 65_536], Vec::new());
    let mut holds = false;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        holds |= takes(mode, HOLD_REQUESTS);
        if holds {
            held.extend_from_slice(&buffer[..length]);
        } else if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
    if holds {
        // Until the sender is dropped.
        let _ = wait.lock().unwrap().recv();
        to.write_all(&held).unwrap();
        done.send(()).unwrap();
    } else {
        // etcd may have closed it.
        let _ = to.shutdown(Shutdown::Both);
    }
}

#[test]
fn a_transaction_whose_answer_is_lost_happens_once_and_is_known_to() {
    let etcd = Processes::start(1);
    let proxy = Proxy::before(etcd.ports()[0]);
    let mut store = Etcd::open(place(vec![proxy.endpoint()]), None).unwrap();
    commit(&mut store, &[put("a", "0")]);
    let at = store.get(b"a").unwrap().unwrap().revision;
    proxy.once(LOSE_ANSWERS);
    // Looks at etcd past the proxy, from outside of the owner.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoints = etcd.endpoints();
    let (key, writer) = (
        store.row_key(b"a"),
        thread::spawn(move || {
            let written_at = Compare::WrittenAt { key: b"a".to_vec(), revision: at };
            let done = store.txn(&[written_at], &[put("a", "1")]);
            (store, done)
        }),
    );
    let seen = runtime.block_on(async {
        let mut client = etcd_client::Client::connect(endpoints, None).await.unwrap();
        let since = WatchOptions::new().with_start_revision(at.cast_signed() + 1);
        let mut changes = client.watch(key, Some(since)).await.unwrap();
        loop {
            let message = changes.message().await.unwrap().unwrap();
            if let Some(row) = message.events().first().and_then(|event| event.kv()) {
                assert_eq!(row.value(), b"1");
                return row.mod_revision();
            }
        }
    });
    assert!(!writer.is_finished(), "it happened, and nobody has heard");
    let (mut store, done) = writer.join().unwrap();
    assert_eq!(
        done.unwrap(),
        Txn::Committed { revision: seen.cast_unsigned() },
        "what was seen is what is known"
    );
    assert_eq!(version(&store, "row/a"), 2, "once for 0 and once for 1");
    commit(&mut store, &[put("a", "2")]);
}

#[test]
fn a_transaction_that_arrives_late_does_not_happen_again() {
    let etcd = Processes::start(1);
    let mut proxy = Proxy::before(etcd.ports()[0]);
    let mut store = Etcd::open(place(vec![proxy.endpoint()]), None).unwrap();
    proxy.once(HOLD_REQUESTS);
    // It times out, is sent again on another connection, and happens.
    commit(&mut store, &[put("a", "1")]);
    commit(&mut store, &[put("a", "2")]);
    proxy.release.take();
    proxy.released.recv_timeout(Duration::from_secs(10)).unwrap();
    // A read through etcd's log comes after what etcd had before, and a write goes through it, too.
    commit(&mut store, &[put("b", "1")]);
    assert_eq!(value(&store, "a").as_deref(), Some("2"));
    assert_eq!(version(&store, "row/a"), 2);
}

#[test]
fn a_look_takes_nothing_over_and_counts_what_is_sealed() {
    let etcd = Processes::start(1);
    let place = place(etcd.endpoints());
    assert_eq!(Etcd::look(place.clone()).unwrap().rows, []);
    let mut store = Etcd::open(place.clone(), None).unwrap();
    commit(&mut store, &[put("a", "1"), put("b", "1")]);
    let row = |key: &str, value: &str| (key.as_bytes().to_vec(), value.as_bytes().to_vec());
    assert_eq!(Etcd::look(place.clone()).unwrap().rows, [row("a", "1"), row("b", "1")]);
    let chunk = vec![(b"a".to_vec(), None), (b"c".to_vec(), Some(b"2".to_vec()))];
    let staged = store.key("staged/00000000");
    store.always(vec![TxnOp::put(staged.clone(), chunk::encode(&chunk), None)]).unwrap();
    assert_eq!(Etcd::look(place.clone()).unwrap().rows, [row("a", "1"), row("b", "1")]);
    store.always(vec![TxnOp::put(store.key("sealed"), "1", None)]).unwrap();
    let rows = Etcd::look(place.clone()).unwrap().rows;
    assert_eq!(rows, [row("b", "1"), row("c", "2")]);
    store.carry_out(chunk, &staged).unwrap();
    store.always(vec![TxnOp::delete(store.key("sealed"), None)]).unwrap();
    let snapshot = Etcd::look(place).unwrap();
    assert_eq!((snapshot.rows, snapshot.schema, snapshot.leader), (rows, SCHEMA, None));
    commit(&mut store, &[put("a", "3")]);
}
