//! The kernel says who calls, and that decides what they may do.

use std::{os::unix::fs::MetadataExt, path::Path, thread};

use hyper_util::rt::TokioIo;
use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};
use serde_json::{Value, json};
use shaper_core::task::ExitStatus;
use shaper_proto::v1::{self, agent_message, agent_session_client::AgentSessionClient};
use shaper_tests::{
    NOBODY,
    broker::Broker,
    cluster::{Cluster, Load, networks},
};
use tokio::net::UnixStream;
use tokio_stream::StreamExt;
use tonic::{Code, Status, transport::Endpoint};

const OWN: &str = r#"{"profile": {"task_id": "own", "resource_demand": {"cpu_cores": 0.5, "memory_gb": 0.5},
"priority": "low"}, "command": ["/bin/true"], "cwd": "/"}"#;

/// What a session gets that begins with Hello, on a thread of that user.
fn attach_as(uid: u32, socket: &Path) -> Result<v1::BrokerMessage, Status> {
    let socket = socket.to_owned();
    let attach = async move {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://broker").connect_with_connector(connector).await;
        let channel = channel.expect("everybody in the group may connect");
        let hello = v1::Hello {
            node: "impostor".into(),
            boot_id: "boot".into(),
            capacity: Some(v1::Capacity {
                cpu_millicores: 64_000,
                memory_bytes: 1 << 40,
                ..Default::default()
            }),
            ..Default::default()
        };
        let hello = v1::AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) };
        let outgoing = tokio_stream::once(hello).chain(tokio_stream::pending());
        let mut incoming = AgentSessionClient::new(channel).attach(outgoing).await?.into_inner();
        incoming.message().await.map(|message| message.expect("a session says something"))
    };
    let as_user = move || {
        let gid = Gid::from_raw(uid);
        set_thread_groups(&[]).expect("root may");
        set_thread_gid(gid).expect("root may");
        // The last, for it takes away the right to do any of this.
        set_thread_uid(Uid::from_raw(uid)).expect("root may");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(attach)
    };
    thread::spawn(as_user).join().expect("it does not panic")
}

#[test]
fn nobody_submits_as_nobody_sees_no_other_tasks_sets_no_policy_and_is_no_agent() {
    let broker = Broker::start_with(&["--socket-group", "65534"]);
    let socket = broker.socket().metadata().unwrap();
    assert_eq!((socket.gid(), socket.mode() & 0o777), (NOBODY, 0o660));
    let (root, nobody) = (broker.shaper(), broker.shaper_as(NOBODY));
    let of_root = OWN.replace("own", "roots");
    assert_eq!(root.call_with(&["submit", "-"], of_root.as_bytes()).code, 0);

    let as_root = r#""cwd": "/", "run_as": {"uid": 0, "gid": 0}"#;
    for run_as in [as_root, r#""cwd": "/", "run_as": {"uid": 1, "gid": 1}"#] {
        let spec = OWN.replace(r#""cwd": "/""#, run_as);
        let answer = nobody.call_with(&["submit", "-"], spec.as_bytes());
        assert_eq!(answer.code, 2, "{}", answer.stderr);
        assert!(answer.stderr.contains("only uid 0 may run a task as another user"), "{}", answer.stderr);
    }
    assert!(broker.tasks_as(NOBODY).is_empty());
    let answer = nobody.call_with(&["submit", "-"], OWN.as_bytes());
    assert_eq!(answer.code, 0, "{}", answer.stderr);
    let own = broker.tasks_as(NOBODY);
    assert_eq!(own.iter().map(|task| task.id()).collect::<Vec<_>>(), ["own"]);
    assert_eq!((own[0].owner.uid, own[0].owner.gid), (NOBODY, NOBODY));
    assert_eq!(broker.tasks().len(), 2);

    let before = broker.tasks();
    for arguments in [
        &["get", "tasks", "roots"][..],
        &["explain", "roots"],
        &["cancel", "roots", "--now"],
        &["wait", "roots"],
        &["profile", "get", "true"],
    ] {
        let said = nobody.refused(arguments);
        assert!(said.contains("of yours"), "{arguments:?}: {said}");
    }
    let answer = nobody.call_with(&["submit", "-"], of_root.as_bytes());
    assert!(answer.code == 2 && answer.stderr.contains("taken by a task of another user"), "{answer:?}");
    let answer = nobody.call_with(&["apply", "-f", "-"], b"{policy_name: p, priority: high}");
    assert!(
        answer.code == 2 && answer.stderr.contains("may not call /shaper.v1.Broker/ApplyPolicy"),
        "{answer:?}"
    );
    assert_eq!(root.ok(&["get", "policies", "--output", "json"]).trim(), "[]");

    let status = attach_as(NOBODY, &broker.socket()).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(broker.nodes().is_empty(), "{:?}", broker.nodes());
    assert_eq!(broker.tasks(), before);
    // It is the user that was wrong, not what was said.
    attach_as(0, &broker.socket()).unwrap();
}

#[test]
fn others_cannot_even_connect() {
    let broker = Broker::start();
    let said = broker.shaper_as(NOBODY).refused(&["get", "tasks"]);
    assert!(said.contains("only root may"), "{said}");
}

#[test]
fn a_node_starts_nothing_with_roots_ids_whatever_the_broker_says() {
    let networks = networks(1);
    let cluster = Cluster::start(&networks, &["cpu=1,memory=1Gi"]);
    for (id, run_as, told) in [
        ("user", json!({"uid": 0, "gid": 0}), "runs no tasks as root"),
        ("group", json!({"uid": NOBODY, "gid": 0}), "root's group"),
        ("groups", json!({"uid": NOBODY, "gid": NOBODY, "groups": [0]}), "root's group"),
    ] {
        let mut spec: Value = serde_json::from_str(&cluster.spec(id, 0.1, "low", Load::Spin)).unwrap();
        spec["run_as"] = run_as;
        cluster.submit_spec(id, &spec.to_string());
        let task = cluster.broker.wait_until(id, "over", |task| task.ended().is_some());
        let Some(ExitStatus::NotStarted { error, .. }) = task.ended() else { panic!("{task:?}") };
        assert!(error.contains(told) && error.contains("--allow-root-tasks"), "{error}");
    }
}
