//! A broker that is only the contract on the wire: it keeps tasks and policies, and a test plays the
//! cluster. A [`Cluster`] outlives its broker.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use shaper_core::spec::{Policy, TaskSpec};
use shaper_proto::{
    convert::WireError,
    v1::{
        self,
        broker_server::{self, BrokerServer},
        cluster_task::Phase,
    },
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport};

use super::{PATIENCE, Server};

/// What the broker was asked for, where a test looks at it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Call {
    Submit(Box<v1::TaskSpec>),
    Watch,
    Cancel { grace_millis: u64 },
    Apply(String),
}

#[derive(Default)]
struct State {
    tasks: BTreeMap<String, v1::ClusterTask>,
    /// Every state of every task.
    changes: Vec<v1::ClusterTask>,
    policies: Vec<v1::PolicyStatus>,
    /// Every change of them.
    policy_revisions: Vec<v1::PolicyRevision>,
    nodes: Vec<v1::NodeStatus>,
    decisions: Vec<v1::Decision>,
    profile: Option<v1::GetProfileResponse>,
    profiles: Vec<v1::ProfileSummary>,
    /// Watchers are told once that they were too slow.
    too_slow: bool,
    not_operator: bool,
    revision: u64,
    calls: Vec<Call>,
}

impl State {
    fn policy_changed(&mut self, change: v1::PolicyChange) -> v1::PolicyRevision {
        let (revision, changes) = (self.revision, vec![change]);
        let change = v1::PolicyRevision { revision, changes, ..Default::default() };
        self.policy_revisions.push(change.clone());
        change
    }
}

/// What the broker has stored, whether or not one runs.
pub(crate) struct Cluster {
    state: Mutex<State>,
    /// Tells tests of changes.
    changed: Condvar,
    /// Tells the broker of changes.
    version: watch::Sender<u64>,
}

impl Cluster {
    pub(crate) fn new() -> Arc<Cluster> {
        Arc::new(Cluster { state: Mutex::default(), changed: Condvar::new(), version: watch::Sender::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let outcome = change(&mut self.state());
        self.changed.notify_all();
        self.version.send_modify(|version| *version += 1);
        outcome
    }

    pub(crate) fn add(&self, mut task: v1::ClusterTask) {
        self.update(|state| {
            state.revision += 1;
            task.revision = state.revision;
            let id = task.spec.as_ref().and_then(|spec| spec.profile.as_ref()).unwrap().task_id.clone();
            state.changes.push(task.clone());
            state.tasks.insert(id, task);
        });
    }

    /// The task goes on to another phase; on a node it has an attempt.
    pub(crate) fn go_on(&self, id: &str, phase: Phase) {
        let mut task = self.find(id).unwrap();
        match &phase {
            Phase::StartingOn(node) => {
                task.attempt += 1;
                task.node.clone_from(node);
            }
            Phase::RunningOn(node) => task.node.clone_from(node),
            Phase::Pending(_) | Phase::Ended(_) | Phase::Cancelled(_) => {}
        }
        self.add(v1::ClusterTask { phase: Some(phase), ..task });
    }

    pub(crate) fn add_node(&self, node: v1::NodeStatus) {
        self.update(|state| state.nodes.push(node));
    }

    pub(crate) fn decide(&self, decision: v1::Decision) {
        self.update(|state| state.decisions.push(decision));
    }

    pub(crate) fn measure(&self, profile: v1::GetProfileResponse) {
        self.update(|state| state.profile = Some(profile));
    }

    pub(crate) fn know(&self, profile: v1::ProfileSummary) {
        self.update(|state| state.profiles.push(profile));
    }

    pub(crate) fn outrun_watchers(&self) {
        self.update(|state| state.too_slow = true);
    }

    pub(crate) fn demote_caller(&self) {
        self.update(|state| state.not_operator = true);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// Waits until the broker has been called like this.
    pub(crate) fn await_call(&self, is_meant: impl Fn(&Call) -> bool) {
        let missing = |state: &mut State| !state.calls.iter().any(&is_meant);
        let (state, timeout) = self.changed.wait_timeout_while(self.state(), PATIENCE, missing).unwrap();
        assert!(!timeout.timed_out(), "no such call among {:?}", state.calls);
    }

    fn find(&self, id: &str) -> Result<v1::ClusterTask, Status> {
        let found = self.state().tasks.get(id).cloned();
        found.ok_or_else(|| Status::not_found(format!("the broker knows no task `{id}`")))
    }

    fn called(&self, call: Call) {
        self.update(|state| state.calls.push(call));
    }
}

pub(crate) fn start(cluster: &Arc<Cluster>, socket: &Path) -> Server {
    let service = BrokerServer::new(Service(cluster.clone()));
    Server::start(socket, transport::Server::builder().add_service(service))
}

struct Service(Arc<Cluster>);

fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl broker_server::Broker for Service {
    async fn submit_task(
        &self,
        request: Request<v1::SubmitTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        self.0.called(Call::Submit(Box::new(spec.clone())));
        let id = TaskSpec::try_from(spec.clone()).map_err(invalid)?.profile.task_id.to_string();
        match self.0.find(&id) {
            Ok(task) if task.spec == Some(spec.clone()) => return Ok(Response::new(task)),
            Ok(_) => {
                let message =
                    format!("there is a task `{id}` with another spec: choose another task_id for this one");
                return Err(Status::already_exists(message));
            }
            Err(_) => self.0.add(task(spec)),
        }
        self.0.find(&id).map(Response::new)
    }

    async fn get_cluster_task(
        &self,
        request: Request<v1::GetClusterTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        self.0.find(&request.into_inner().task_id).map(Response::new)
    }

    async fn list_cluster_tasks(
        &self,
        _: Request<v1::ListClusterTasksRequest>,
    ) -> Result<Response<v1::ListClusterTasksResponse>, Status> {
        let state = self.0.state();
        let tasks = state.tasks.values().cloned().collect();
        Ok(Response::new(v1::ListClusterTasksResponse { tasks, revision: state.revision, epoch: 1 }))
    }

    type SubmitTasksStream = ReceiverStream<Result<v1::SubmitTasksResponse, Status>>;

    async fn submit_tasks(
        &self,
        _: Request<Streaming<v1::SubmitTasksRequest>>,
    ) -> Result<Response<Self::SubmitTasksStream>, Status> {
        Err(Status::unimplemented("no command submits by stream"))
    }

    type WatchClusterTasksStream = ReceiverStream<Result<v1::ClusterTask, Status>>;

    async fn watch_cluster_tasks(
        &self,
        request: Request<v1::WatchClusterTasksRequest>,
    ) -> Result<Response<Self::WatchClusterTasksStream>, Status> {
        let id = request.into_inner().task_id;
        if !id.is_empty() {
            self.0.find(&id)?;
        }
        let (sender, receiver) = mpsc::channel(1);
        let cluster = self.0.clone();
        tokio::spawn(async move {
            let mut version = cluster.version.subscribe();
            let is_meant = |task: &v1::ClusterTask| {
                let profile = task.spec.as_ref().and_then(|spec| spec.profile.as_ref());
                id.is_empty() || profile.is_some_and(|profile| profile.task_id == id)
            };
            let (mut pending, mut seen): (Vec<_>, _) = {
                let state = cluster.state();
                (state.tasks.values().filter(|task| is_meant(task)).cloned().collect(), state.changes.len())
            };
            cluster.called(Call::Watch);
            loop {
                version.mark_unchanged();
                let too_slow = {
                    let mut state = cluster.state();
                    pending.extend(state.changes[seen..].iter().filter(|task| is_meant(task)).cloned());
                    seen = state.changes.len();
                    std::mem::take(&mut state.too_slow)
                };
                if too_slow {
                    let _ = sender.send(Err(Status::out_of_range("too slow: list again"))).await;
                    return;
                }
                for task in pending.drain(..) {
                    if sender.send(Ok(task)).await.is_err() {
                        return;
                    }
                }
                if version.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_cluster_task(
        &self,
        request: Request<v1::CancelClusterTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        let v1::CancelClusterTaskRequest { task_id, grace_millis } = request.into_inner();
        self.0.called(Call::Cancel { grace_millis });
        let task = self.0.find(&task_id)?;
        self.0.add(v1::ClusterTask { cancel_requested: true, ..task });
        self.0.find(&task_id).map(Response::new)
    }

    async fn explain_task(
        &self,
        request: Request<v1::ExplainTaskRequest>,
    ) -> Result<Response<v1::ExplainTaskResponse>, Status> {
        self.0.find(&request.into_inner().task_id)?;
        Ok(Response::new(v1::ExplainTaskResponse { decisions: self.0.state().decisions.clone() }))
    }

    type WatchEventsStream = ReceiverStream<Result<v1::WatchEventsResponse, Status>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let follow = request.into_inner().follow;
        let (sender, receiver) = mpsc::channel(1);
        let cluster = self.0.clone();
        tokio::spawn(async move {
            let (mut version, mut seen) = (cluster.version.subscribe(), 0);
            loop {
                version.mark_unchanged();
                let decisions = cluster.state().decisions[seen..].to_vec();
                let events = decisions.into_iter().map(|decision| {
                    seen += 1;
                    v1::Event { number: seen as u64, task_id: "etl".into(), decision: Some(decision) }
                });
                let news = v1::WatchEventsResponse { events: events.collect(), missed: 0 };
                if sender.send(Ok(news)).await.is_err() || !follow || version.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(v1::ListNodesResponse { nodes: self.0.state().nodes.clone() }))
    }

    async fn fence_node(
        &self,
        request: Request<v1::FenceNodeRequest>,
    ) -> Result<Response<v1::FenceNodeResponse>, Status> {
        let v1::FenceNodeRequest { node } = request.into_inner();
        match node.as_str() {
            "gone" => Ok(Response::new(v1::FenceNodeResponse { task_ids: vec!["a".into(), "b".into()] })),
            _ => Err(Status::failed_precondition(format!("node `{node}` answers"))),
        }
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::CordonNodeResponse>, Status> {
        let request = request.into_inner();
        let task = v1::LeavingTask {
            task_id: "etl".into(),
            priority: v1::Priority::Low.into(),
            cpu_nanos: 1_500_000_000,
            ..v1::LeavingTask::default()
        };
        let drains = request.wish() == v1::NodeWish::Drained;
        let has_it = request.dry_run || request.node == "full";
        let tasks = if drains && has_it { vec![task] } else { Vec::new() };
        Ok(Response::new(v1::CordonNodeResponse { tasks }))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        match request.into_inner().node.as_str() {
            "gone" => Ok(Response::new(v1::RemoveNodeResponse {})),
            node => Err(Status::failed_precondition(format!("node `{node}` answers: stop its agent first"))),
        }
    }

    async fn get_scale(
        &self,
        _: Request<v1::GetScaleRequest>,
    ) -> Result<Response<v1::GetScaleResponse>, Status> {
        Ok(Response::new(v1::GetScaleResponse::default()))
    }

    async fn apply_policy(
        &self,
        request: Request<v1::ApplyPolicyRequest>,
    ) -> Result<Response<v1::PolicyStatus>, Status> {
        let policy = request.into_inner().policy.unwrap_or_default();
        self.0.called(Call::Apply(policy.policy_name.clone()));
        Policy::try_from(policy.clone()).map_err(invalid)?;
        let status = self.0.update(|state| {
            if state.not_operator {
                return Err(Status::permission_denied("only root may apply policies"));
            }
            state.revision += 1;
            let key = |policy: &v1::Policy| (policy.namespace.clone(), policy.policy_name.clone());
            state.policies.retain(|other| other.policy.as_ref().map(key) != Some(key(&policy)));
            let status = v1::PolicyStatus { policy: Some(policy.clone()), revision: state.revision };
            state.policies.push(status.clone());
            let name = policy.policy_name.clone();
            state.policy_changed(v1::PolicyChange { policy_name: name, before: None, after: Some(policy) });
            Ok(status)
        })?;
        Ok(Response::new(status))
    }

    async fn list_policies(
        &self,
        _: Request<v1::ListPoliciesRequest>,
    ) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        Ok(Response::new(v1::ListPoliciesResponse { policies: self.0.state().policies.clone() }))
    }

    async fn delete_policy(
        &self,
        request: Request<v1::DeletePolicyRequest>,
    ) -> Result<Response<v1::PolicyRevision>, Status> {
        let v1::DeletePolicyRequest { policy_name } = request.into_inner();
        let change = self.0.update(|state| {
            let named = |status: &v1::PolicyStatus| {
                status.policy.as_ref().is_some_and(|policy| policy.policy_name == policy_name)
            };
            let place = state.policies.iter().position(named)?;
            let before = state.policies.remove(place).policy;
            state.revision += 1;
            Some(state.policy_changed(v1::PolicyChange { policy_name, before, after: None }))
        });
        change.map(Response::new).ok_or_else(|| Status::not_found("there is no such policy"))
    }

    async fn list_policy_revisions(
        &self,
        _: Request<v1::ListPolicyRevisionsRequest>,
    ) -> Result<Response<v1::ListPolicyRevisionsResponse>, Status> {
        let revisions = self.0.state().policy_revisions.clone();
        Ok(Response::new(v1::ListPolicyRevisionsResponse { revisions }))
    }

    async fn roll_back_policies(
        &self,
        request: Request<v1::RollBackPoliciesRequest>,
    ) -> Result<Response<v1::PolicyRevision>, Status> {
        let v1::RollBackPoliciesRequest { revision } = request.into_inner();
        Ok(Response::new(v1::PolicyRevision {
            revision: revision + 1,
            rolled_back_to: Some(revision),
            ..Default::default()
        }))
    }

    async fn preview_policies(
        &self,
        request: Request<v1::PreviewPoliciesRequest>,
    ) -> Result<Response<v1::PreviewPoliciesResponse>, Status> {
        let setting = |policy: v1::Policy| v1::PolicySetting {
            setting: "limits.cpu".into(),
            policy: policy.policy_name,
            says: "at most 2 cores".into(),
            overruled: Vec::new(),
        };
        let settings = request.into_inner().policies.into_iter().map(setting).collect();
        let task = v1::TaskPolicies { task_id: "etl".into(), node: "n1".into(), settings };
        Ok(Response::new(v1::PreviewPoliciesResponse { tasks: vec![task] }))
    }

    async fn get_profile(
        &self,
        request: Request<v1::GetProfileRequest>,
    ) -> Result<Response<v1::GetProfileResponse>, Status> {
        let v1::GetProfileRequest { name, namespace, priority: _ } = request.into_inner();
        let found = self.0.state().profile.clone();
        found.map(Response::new).ok_or_else(|| {
            Status::not_found(format!("no task of name `{name}` has finished in namespace `{namespace}`"))
        })
    }

    async fn list_profiles(
        &self,
        _: Request<v1::ListProfilesRequest>,
    ) -> Result<Response<v1::ListProfilesResponse>, Status> {
        let profiles = self.0.state().profiles.clone();
        Ok(Response::new(v1::ListProfilesResponse { profiles }))
    }

    async fn open_ui(&self, _: Request<v1::OpenUiRequest>) -> Result<Response<v1::OpenUiResponse>, Status> {
        let url = "http://127.0.0.1:9780/open?code=00ff".to_owned();
        Ok(Response::new(v1::OpenUiResponse { url, valid_seconds: 120 }))
    }
}

/// A task that was submitted by root an hour ago and is nowhere.
pub(crate) fn task(spec: v1::TaskSpec) -> v1::ClusterTask {
    v1::ClusterTask {
        spec: Some(spec),
        owner: Some(v1::Credentials::default()),
        phase: Some(Phase::Pending(v1::cluster_task::Pending { reason: "no node fits: cpu".into() })),
        submitted_unix_nanos: super::task("x").created_at,
        ..v1::ClusterTask::default()
    }
}

/// What `sleep` would be submitted as.
pub(crate) fn spec(id: &str) -> v1::TaskSpec {
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: id.into(),
            demand: Some(v1::ResourceDemand {
                cpu_millicores: 1500,
                memory_bytes: 2 << 30,
                network_bps: Some(10_000_000),
                ..v1::ResourceDemand::default()
            }),
            priority: v1::Priority::High.into(),
            estimated_runtime_seconds: Some(60),
        }),
        command: vec!["/bin/sleep".into(), "1".into()],
        cwd: "/".into(),
        name: "sleep".into(),
        namespace: "default".into(),
        ..v1::TaskSpec::default()
    }
}

/// A node that is connected.
pub(crate) fn node(name: &str, agent_socket: &Path) -> v1::NodeStatus {
    let capacity = v1::Capacity {
        cpu_millicores: 8000,
        memory_bytes: 16 << 30,
        network_bps: Some(1_000_000_000),
        ..v1::Capacity::default()
    };
    let reserved = v1::Capacity { cpu_millicores: 1500, memory_bytes: 2 << 30, ..v1::Capacity::default() };
    v1::NodeStatus {
        name: name.into(),
        connected: true,
        capacity: Some(capacity),
        reserved: Some(v1::Capacity { network_bps: Some(10_000_000), ..reserved }),
        cpu_utilisation_permille: 425,
        agent_socket: agent_socket.to_str().unwrap().into(),
        boot_id: "b1".into(),
        ..v1::NodeStatus::default()
    }
}
