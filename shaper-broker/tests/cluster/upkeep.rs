//! `shaper-broker store …` on what real brokers left, in files and in etcd.

use std::{fs, path::Path, process::Output};

use super::*;
use crate::etcd_process::Cluster;

/// What it printed, with the names of this run's files told apart by `known`.
fn said(output: &Output, known: &[(&Path, &str)]) -> (String, String) {
    let named = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        known.iter().fold(text, |text, (path, name)| text.replace(&path.display().to_string(), name))
    };
    (named(&output.stdout), named(&output.stderr))
}

fn done(output: &Output) -> String {
    let (out, error) = said(output, &[]);
    assert!(output.status.success(), "{}\n{out}{error}", output.status);
    out
}

/// Why it was not done.
fn refused(output: &Output) -> String {
    let (out, error) = said(output, &[]);
    assert_eq!(output.status.code(), Some(1), "{out}{error}");
    error.trim_start_matches("shaper-broker: ").trim_end().to_owned()
}

/// Has a task that waits, one that runs and one that has ended.
async fn fill(broker: &Broker) {
    let mut client = broker.client().await;
    let mut agent = Agent::new("n1", 2000);
    let mut session = attach(&mut agent, broker).await;
    for task in ["ended", "runs"] {
        submit(&mut client, spec(task, 1000)).await.unwrap();
        let start = session.directive().await;
        session.report(agent.start(&start)).await;
        until(&mut client, task, runs_on("n1")).await;
    }
    session.report(agent.end("ended", 1, 0)).await;
    until(&mut client, "ended", ended_with(0)).await;
    submit(&mut client, spec("waits", 3000)).await.unwrap();
}

/// A broker that was stopped after that.
async fn filled(arguments: &[&str]) -> Broker {
    let mut broker = Broker::start_as(arguments, &[]);
    fill(&broker).await;
    assert!(broker.terminate().success());
    broker
}

async fn tasks(broker: &Broker) -> Vec<String> {
    let listed = broker.client().await.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap();
    listed.into_inner().tasks.into_iter().filter_map(|task| Some(task.spec?.profile?.task_id)).collect()
}

const COUNTS: &str = "tasks: 3 (1 pending, 0 starting, 1 running, 1 ended, 0 cancelled)\n\
                      nodes: 1, policies: 0, histories: 1, epoch: 1\n";

#[tokio::test]
async fn a_file_is_checked_copied_and_restored() {
    let (broker, mut other) = (filled(&[]).await, Broker::of(&[]));
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("backup");
    let (file_text, store) = (file.to_str().unwrap(), broker.state_dir().join("store.redb"));
    let before = fs::read(&store).unwrap();
    let into = other.state_dir().join("store.redb");
    let known = [(store.as_path(), "STORE"), (file.as_path(), "FILE"), (into.as_path(), "INTO")];

    let out = said(&broker.store(&["verify"], &[]), &known).0;
    let (first, rest) = out.split_once('\n').unwrap();
    assert!(first.starts_with("STORE: 10 rows with ") && first.ends_with(", schema 2"), "{first}");
    assert_eq!(rest, format!("{COUNTS}nothing is wrong with them\n"));

    let out = said(&broker.store(&["backup", file_text], &[]), &known).0;
    assert!(out.ends_with("nothing is wrong with them\n10 rows are in FILE\n"), "{out}");
    let error = said(&broker.store(&["backup", file_text], &[]), &known).1;
    assert_eq!(error, "shaper-broker: FILE exists: choose another name, or say --force to replace it\n");
    done(&broker.store(&["backup", file_text, "--force"], &[]));
    done(&broker.store(&["verify", "--backup", file_text], &[]));
    assert!(fs::read(&store).unwrap() == before, "who looks changes nothing");

    // Tasks are in the order of submission.
    let rows = done(&broker.store(&["dump", "--prefix", "task/"], &[]));
    for (number, (line, task)) in rows.lines().zip(["ended", "runs", "waits"]).enumerate() {
        let (key, id) = (format!(r#"{{"key":"task/{number:016x}","#), format!(r#""task_id":"{task}""#));
        assert!(line.starts_with(&key) && line.contains(&id), "{line}");
    }
    let rows = done(&broker.store(&["dump", "--prefix", "run/"], &[]));
    assert_eq!(rows.lines().count(), 3);
    assert!(rows.lines().next().unwrap().contains(r#""phase":{"ended":"#), "{rows}");

    let unsure = other.store(&["restore", file_text], &[]);
    assert_eq!(refused(&unsure), "nothing was restored; say --yes when that is what you want");
    let out = said(&unsure, &known).0;
    let (first, rest) = out.split_once('\n').unwrap();
    assert!(first.starts_with("FILE: 10 rows of STORE, schema 2, copied at 20"), "{first}");
    assert_eq!(rest, format!("{COUNTS}they go to INTO, which is empty\n{MEANING}"));
    assert!(!into.exists(), "nothing was made");

    let out = done(&other.store(&["restore", file_text, "--yes"], &[]));
    assert!(out.ends_with("restored: the broker goes on above epoch 2\n"), "{out}");
    other.start_again(&[]);
    assert_eq!(tasks(&other).await, ["ended", "runs", "waits"]);
    // The node has obeyed the other broker.
    let mut agent = Agent::new("n1", 2000);
    agent.highest_epoch = 1;
    attach(&mut agent, &other).await;
    assert_eq!(agent.highest_epoch, 3);
    assert!(other.terminate().success());

    let error = refused(&other.store(&["restore", file_text, "--yes"], &[]));
    assert!(error.contains("is not empty; choose an empty store, or say --force"), "{error}");
    let out = done(&other.store(&["restore", file_text, "--yes", "--force"], &[]));
    assert!(out.contains("in place of the 10 rows that are there:\n"), "{out}");
    assert!(out.ends_with("restored: the broker goes on above epoch 4\n"), "{out}");
}

const MEANING: &str = "\
If a broker has gone on from these rows after they were copied, then
- what it acknowledged since is forgotten, and has to be submitted, cancelled and applied again;
- what runs on a node and is not known is left alone: `shaper get tasks` on each node shows it, and `shaper cancel` there ends it;
- what waits here (1 tasks) is placed, even if it has run since or runs now: to have nothing run twice, end it on the nodes \
before the broker is started;
- what is on a node here (1 tasks) and is not there any more counts as lost.
If none has, nothing is lost.
";

#[tokio::test]
async fn a_file_that_a_broker_has_is_left_to_it_and_one_that_was_killed_is_no_hindrance() {
    let mut broker = Broker::start();
    fill(&broker).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("backup");
    let file = file.to_str().unwrap();
    let pid = broker.pid();
    for arguments in [&["verify"][..], &["dump"], &["backup", file], &["restore", file]] {
        if arguments[0] == "restore" {
            let other = filled(&[]).await;
            done(&other.store(&["backup", file], &[]));
        }
        let error = refused(&broker.store(arguments, &[]));
        assert!(error.contains(&format!("is open in process {pid}, and a file is one process's")), "{error}");
        assert!(error.contains("systemctl stop shaper-broker"), "{error}");
    }
    broker.kill();
    let out = done(&broker.store(&["verify"], &[]));
    assert!(out.contains(COUNTS), "{out}");
}

#[test]
fn what_is_not_there_is_not_made() {
    let broker = Broker::of(&[]);
    let error = refused(&broker.store(&["verify"], &[]));
    assert!(error.starts_with("there is no store at ") && error.contains("say --state-dir DIR"), "{error}");
    assert!(!broker.state_dir().exists());
    let broker = Broker::of(&["--store", "memory"]);
    let error = refused(&broker.store(&["dump"], &[]));
    assert_eq!(error, "--store memory keeps nothing; say --store redb or --store etcd");
}

#[tokio::test]
async fn damage_is_found_and_named() {
    let broker = filled(&[]).await;
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("backup");
    let store = broker.state_dir().join("store.redb");
    done(&broker.store(&["backup", file.to_str().unwrap()], &[]));

    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let other = Broker::of(&[]);
    let error = refused(&other.store(&["restore", file.to_str().unwrap(), "--yes"], &[]));
    assert!(
        error.ends_with("cannot be used: it is not whole: its end is missing; take another backup"),
        "{error}"
    );
    assert!(!other.state_dir().join("store.redb").exists());

    // A file of redb's that is whole, and in it a row that is not.
    {
        use shaper_broker::store::{Op, Store, redb::Redb};
        let put = |key: &[u8], value: &[u8]| Op::Put { key: key.to_vec(), value: value.to_vec() };
        let ops = [put(b"run/0000000000000001", b"\x93"), put(b"node/n1", b"7"), put(b"what/is/this", b"1")];
        Redb::open(&store).unwrap().txn(&[], &ops).unwrap();
    }
    let verified = broker.store(&["verify"], &[]);
    assert_eq!(verified.status.code(), Some(1));
    let out = said(&verified, &[]).0;
    for row in [
        "the row node/n1 is damaged",
        "the row run/0000000000000001 is damaged",
        "the row what/is/this is of no kind",
    ] {
        let line = out.lines().find(|line| line.contains(row));
        assert!(line.is_some_and(|line| line.contains("shaper-broker store restore")), "{row}: {out}");
    }
    let dumped = broker.store(&["dump"], &[]);
    assert_eq!(dumped.status.code(), Some(1));
    assert!(said(&dumped, &[]).0.contains(r#"{"error":"the row node/n1 is damaged"#), "{dumped:?}");
    // It is copied as it is, and not restored.
    let copied = broker.store(&["backup", file.to_str().unwrap(), "--force"], &[]);
    assert_eq!(copied.status.code(), Some(1));
    let error = refused(&other.store(&["restore", file.to_str().unwrap(), "--yes"], &[]));
    assert!(error.starts_with("nothing was restored: no broker could go on"), "{error}");

    let mut bytes = fs::read(&store).unwrap();
    bytes.truncate(bytes.len() / 2);
    fs::write(&store, bytes).unwrap();
    let verified = broker.store(&["verify"], &[]);
    assert_eq!(verified.status.code(), Some(1));
    assert!(said(&verified, &[]).0.contains("move it away, and restore a backup"), "{verified:?}");
}

#[tokio::test]
async fn from_a_file_to_etcd_and_back() {
    let etcd = Cluster::start(1);
    let endpoints = etcd.endpoints().join(",");
    let arguments = ["--store", "etcd", "--etcd-endpoints", &endpoints, "--lease-seconds", "2"];
    let (broker, mut moved) = (filled(&[]).await, Broker::of(&arguments));
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
    done(&broker.store(&["backup", &file("from-redb")], &[]));
    let out = done(&moved.store(&["restore", &file("from-redb"), "--yes"], &[]));
    assert!(out.contains("/shaper/ of etcd at ") && out.contains(", which is empty"), "{out}");
    moved.start_again(&[]);
    moved.wait_to_say(" leading ");
    assert_eq!(tasks(&moved).await, ["ended", "runs", "waits"]);

    // etcd is read while the broker works, and is not written.
    let out = done(&moved.store(&["backup", &file("from-etcd")], &[]));
    assert!(out.contains(" leads\n") && out.contains("epoch: 3\n"), "{out}");
    submit(&mut moved.client().await, spec("still-leads", 1000)).await.unwrap();
    let error = refused(&moved.store(&["restore", &file("from-redb"), "--yes", "--force"], &[]));
    assert!(error.contains("leads on /shaper/ of etcd") && error.contains("stop all brokers"), "{error}");
    submit(&mut moved.client().await, spec("and-still", 1000)).await.unwrap();
    assert!(moved.terminate().success());
    done(&moved.store(&["restore", &file("from-redb"), "--yes", "--force"], &[]));
    let dumped = done(&moved.store(&["dump", "--prefix", "task/"], &[]));
    assert_eq!(dumped.lines().count(), 3, "{dumped}");

    let mut back = Broker::of(&[]);
    done(&back.store(&["restore", &file("from-etcd"), "--yes"], &[]));
    back.start_again(&[]);
    assert_eq!(tasks(&back).await, ["ended", "runs", "waits"]);
}

/// More than etcd takes at once, three times over.
#[cfg(feature = "failpoints")]
const MANY: usize = 300;

/// Wherever it is killed, the store is as it was, or is whole: what is looked at, and what a broker takes over.
#[cfg(feature = "failpoints")]
#[tokio::test]
async fn a_restore_that_is_killed_is_not_there_in_part() {
    let etcd = Cluster::start(1);
    let mut source = Broker::start();
    let mut client = source.client().await;
    for number in 0..MANY {
        submit(&mut client, spec(&format!("t{number}"), 1000)).await.unwrap();
    }
    assert!(source.terminate().success());
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("backup");
    let file = file.to_str().unwrap();
    done(&source.store(&["backup", file], &[]));

    let places = [
        ("before-restore", false),
        ("chunk-staged:1", false),
        ("chunk-staged:3", false),
        ("chunks-sealed", true),
        ("chunk-carried-out:1", true),
        ("chunk-carried-out:3", true),
        ("after-restore", true),
    ];
    let endpoints = etcd.endpoints().join(",");
    for (number, (place, is_there)) in places.into_iter().enumerate() {
        let prefix = format!("/{number}/");
        let in_etcd = [
            "--store",
            "etcd",
            "--etcd-endpoints",
            &endpoints,
            "--etcd-prefix",
            &prefix,
            "--lease-seconds",
            "2",
        ];
        for arguments in [&in_etcd[..], &[]] {
            if arguments.is_empty() && place.starts_with("chunk") {
                continue;
            }
            let mut broker = Broker::of(arguments);
            let output = broker.store(&["restore", file, "--yes"], &[("SHAPER_FAILPOINT", place)]);
            assert!(!output.status.success() && output.status.code().is_none(), "{place}: {output:?}");
            let expected = if is_there { MANY } else { 0 };
            let looked = done(&broker.store(&["verify"], &[]));
            assert!(looked.contains(&format!("tasks: {expected} (")), "{place}: {looked}");
            broker.start_again(&[]);
            if !arguments.is_empty() {
                broker.wait_to_say(" leading ");
            }
            assert_eq!(tasks(&broker).await.len(), expected, "{place}");
            assert!(broker.terminate().success());
            if !is_there {
                done(&broker.store(&["restore", file, "--yes"], &[]));
                let looked = done(&broker.store(&["verify"], &[]));
                assert!(looked.contains(&format!("tasks: {MANY} (")), "{place}: {looked}");
            }
        }
    }
}
