//! What of a call that the table allows is theirs.

use std::time::Duration;

use shaper_identity::Role;
use shaper_proto::v1::{self, broker_client::BrokerClient};
use tonic::Code;

use crate::harness::{Broker, call};

/// Nothing takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

fn spec(task: &str, namespace: &str, priority: v1::Priority) -> v1::TaskSpec {
    let demand = v1::ResourceDemand { cpu_millicores: 100, memory_bytes: 1 << 20, ..Default::default() };
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: task.into(),
            demand: Some(demand),
            priority: priority.into(),
            estimated_runtime_seconds: None,
        }),
        command: vec!["true".into()],
        cwd: "/".into(),
        name: "true".into(),
        namespace: namespace.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitter_stays_within_its_bounds() {
    let broker = Broker::start();
    let mut etl = BrokerClient::new(broker.connect(Role::Submitter, "etl").await);
    let mut submit = async |spec| etl.submit_task(v1::SubmitTaskRequest { spec: Some(spec) }).await;
    let own = submit(spec("t", "etl", v1::Priority::Medium)).await.unwrap().into_inner();
    assert_eq!(own.owner.map(|owner| owner.uid), Some(1500));
    let as_root = v1::TaskSpec {
        run_as: Some(v1::Credentials { uid: 0, gid: 0, groups: Vec::new() }),
        ..spec("r", "etl", v1::Priority::Low)
    };
    for (spec, told) in [
        (spec("n", "default", v1::Priority::Low), "namespace `default`"),
        (spec("n", "etl.b", v1::Priority::Low), "namespace `etl.b`"),
        (spec("p", "etl", v1::Priority::High), "priority high is above medium"),
        (as_root, "uid 0 is not the uid of this identity"),
    ] {
        let status = submit(spec).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert!(status.message().contains(told), "{status:?}");
        broker.says(&["audit", "refused", "spiffe://lab/submitter/etl", told]).await;
    }
    // What root has submitted, in that namespace too, is not theirs.
    let mut root = BrokerClient::new(broker.connect_locally().await);
    let request = v1::SubmitTaskRequest { spec: Some(spec("of-root", "etl", v1::Priority::Low)) };
    root.submit_task(request).await.unwrap();
    let tasks = etl.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner().tasks;
    let ids: Vec<_> = tasks.iter().filter_map(|task| task.spec.as_ref()?.profile.as_ref()).collect();
    assert_eq!(ids.iter().map(|profile| profile.task_id.as_str()).collect::<Vec<_>>(), ["t"]);
    let cancel = |task: &str| v1::CancelClusterTaskRequest { task_id: task.into(), grace_millis: 0 };
    assert_eq!(etl.cancel_cluster_task(cancel("of-root")).await.unwrap_err().code(), Code::NotFound);
    etl.cancel_cluster_task(cancel("t")).await.unwrap();
    // A submitter that nobody has configured.
    let other = broker.connect(Role::Submitter, "etl2").await;
    let status = call(&other, "/shaper.v1.Broker/ListNodes").await.unwrap_err();
    assert!(
        status.code() == Code::PermissionDenied && status.message().contains("--identities"),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_no_path() {
    let broker = Broker::start();
    let mut root = BrokerClient::new(broker.connect_locally().await);
    for name in ["../../bin/ls", "..", "a/b", "/etc/passwd", "a\0b", "a\nb", ""] {
        let as_task = v1::SubmitTaskRequest { spec: Some(spec(name, "default", v1::Priority::Low)) };
        let in_namespace = v1::SubmitTaskRequest { spec: Some(spec("t", name, v1::Priority::Low)) };
        for request in [as_task, in_namespace] {
            let status = root.submit_task(request).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{name:?}: {status:?}");
        }
        let status = root.apply_policy(policy(name, "default", v1::Priority::Low)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}: {status:?}");
    }
    let tasks = root.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.unwrap().into_inner().tasks;
    assert!(tasks.is_empty(), "{tasks:?}");
}

fn policy(name: &str, namespace: &str, priority: v1::Priority) -> v1::ApplyPolicyRequest {
    let policy = v1::Policy {
        policy_name: name.into(),
        namespace: namespace.into(),
        priority: priority.into(),
        eviction_threshold_permille: Some(900),
        preemption_enabled: true,
        window_millis: 10_000,
        ..Default::default()
    };
    v1::ApplyPolicyRequest { policy: Some(policy) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitters_policies_stay_in_its_namespaces() {
    let broker = Broker::start();
    let mut root = BrokerClient::new(broker.connect_locally().await);
    root.apply_policy(policy("high_tasks", "default", v1::Priority::High)).await.unwrap();
    root.apply_policy(policy("of_root", "etl", v1::Priority::Low)).await.unwrap();
    let mut etl = BrokerClient::new(broker.connect(Role::Submitter, "etl").await);
    etl.apply_policy(policy("own", "etl", v1::Priority::Medium)).await.unwrap();
    for (request, told) in [
        (policy("a", "default", v1::Priority::Low), "namespace `default`"),
        (policy("b", "etl.b", v1::Priority::Low), "namespace `etl.b`"),
        (policy("c", "etl", v1::Priority::High), "priority high is above medium"),
        (policy("high_tasks", "etl", v1::Priority::Low), "`high_tasks` is of namespace `default`"),
        (policy("of_root", "etl", v1::Priority::Low), "`of_root` is of namespace `etl`"),
    ] {
        let status = etl.apply_policy(request).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert!(status.message().contains(told), "{status:?}");
        broker.says(&["audit", "refused", "spiffe://lab/submitter/etl", told]).await;
    }
    let seen = etl.list_policies(v1::ListPoliciesRequest {}).await.unwrap().into_inner().policies;
    let names: Vec<_> =
        seen.iter().filter_map(|status| Some(status.policy.as_ref()?.policy_name.as_str())).collect();
    assert_eq!(names, ["of_root", "own"]);
    let delete = |name: &str| v1::DeletePolicyRequest { policy_name: name.into() };
    for name in ["high_tasks", "of_root"] {
        let status = etl.delete_policy(delete(name)).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    }
    let preview = |request: v1::ApplyPolicyRequest| v1::PreviewPoliciesRequest {
        policies: request.policy.into_iter().collect(),
    };
    let high = preview(policy("c", "etl", v1::Priority::High));
    let status = etl.preview_policies(high).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    etl.preview_policies(preview(policy("own", "etl", v1::Priority::Low))).await.unwrap();
    etl.delete_policy(delete("own")).await.unwrap();
    let history = etl.list_policy_revisions(v1::ListPolicyRevisionsRequest {}).await.unwrap().into_inner();
    let seen = history.revisions.iter().map(|it| (it.revision, it.changes[0].policy_name.as_str()));
    assert_eq!(seen.collect::<Vec<_>>(), [(2, "of_root"), (3, "own"), (4, "own")]);
    // A user of the machine sets none.
    let mut user = BrokerClient::new(broker.connect_as(65534).await);
    let status = user.apply_policy(policy("u", "default", v1::Priority::Low)).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitter_follows_decisions_about_its_own_tasks_alone() {
    let broker = Broker::start();
    let mut root = BrokerClient::new(broker.connect_locally().await);
    let mut etl = BrokerClient::new(broker.connect(Role::Submitter, "etl").await);
    let follow = || v1::WatchEventsRequest { follow: true };
    let (mut of_root, mut of_etl) = (
        root.watch_events(follow()).await.unwrap().into_inner(),
        etl.watch_events(follow()).await.unwrap().into_inner(),
    );
    let submit =
        |name, namespace| v1::SubmitTaskRequest { spec: Some(spec(name, namespace, v1::Priority::Low)) };
    // There are no nodes: that is decided about each of them.
    root.submit_task(submit("first", "default")).await.unwrap();
    etl.submit_task(submit("own", "etl")).await.unwrap();
    root.submit_task(submit("last", "default")).await.unwrap();
    async fn until(
        stream: &mut tonic::Streaming<v1::WatchEventsResponse>,
        last: &str,
    ) -> Vec<(u64, String, String)> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|(_, task, _)| task != last) {
            let news =
                tokio::time::timeout(PATIENCE, stream.message()).await.expect("nothing is said").unwrap();
            let news = news.expect("it goes on");
            assert_eq!(news.missed, 0);
            seen.extend(news.events.into_iter().filter_map(|event| {
                let decision = event.decision?;
                assert!(decision.nodes.is_empty());
                (decision.kind == "pending").then_some((event.number, event.task_id, decision.reason))
            }));
        }
        seen
    }
    let all = until(&mut of_root, "last").await;
    let names: Vec<_> = all.iter().map(|(_, task, _)| task.as_str()).collect();
    assert_eq!(names, ["first", "own", "last"]);
    assert!(all.iter().all(|(_, _, reason)| !reason.is_empty()), "{all:?}");
    assert!(all.is_sorted_by_key(|(number, ..)| *number), "{all:?}");
    assert_eq!(until(&mut of_etl, "own").await, all[1..2]);
    // Without `follow` it ends, with the same.
    let mut list = etl.watch_events(v1::WatchEventsRequest { follow: false }).await.unwrap().into_inner();
    assert_eq!(until(&mut list, "own").await, all[1..2]);
    assert!(list.message().await.unwrap().is_none());
    let mut stranger = BrokerClient::new(broker.connect(Role::Node, "n1").await);
    let status = stranger.watch_events(follow()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
}
