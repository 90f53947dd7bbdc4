//! The broker of a cluster.

use std::{collections::HashMap, path::Path, time::Duration};

use shaper_core::{
    id::TaskId,
    spec::{Decision, Policy, Priority, TaskSpec},
    task::UnixNanos,
};
use shaper_identity::address::Address;
use shaper_proto::v1::{self, broker_client::BrokerClient};
use tonic::{Code, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{CallError, ConnectError, Failure, Link, Outage, Peer};
use crate::cluster::{
    ClusterTask, Event, KnownProfile, MeasuredProfile, NodeStatus, PolicyRevision, PolicyStatus, Scale,
    TaskPolicies,
};

/// One of several brokers that does not say by then whether it serves is passed over.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to the broker. Clones share it; it connects again by itself when it is next used.
#[derive(Clone)]
pub(crate) struct Broker {
    link: Link,
}

impl Broker {
    /// `tls_dir` is our certificate, for one over TCP.
    pub(crate) async fn connect(address: &Address, tls_dir: Option<&Path>) -> Result<Broker, ConnectError> {
        let link = match address {
            Address::Socket(socket) => Link::connect(Peer::Broker, socket).await?,
            Address::Tls(at) => {
                let directory = tls_dir.ok_or_else(|| ConnectError::NoCertificate(address.to_string()))?;
                Link::connect_with_certificate(Peer::Broker, at, directory).await?
            }
        };
        Ok(Broker { link })
    }

    /// The first of these that says that it serves. A connection stays with it: what is followed across a change of the leader
    /// is asked for again.
    pub(crate) async fn connect_to_leader(
        addresses: &[Address],
        tls_dir: Option<&Path>,
    ) -> Result<Broker, ConnectError> {
        let mut reasons = Vec::new();
        for address in addresses {
            match Broker::connect(address, tls_dir).await {
                Ok(broker) if broker.serves().await => return Ok(broker),
                Ok(_) => reasons.push(format!("{address} stands by, or does not answer")),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(ConnectError::NoLeader(reasons.join("; ")))
    }

    async fn serves(&self) -> bool {
        let request = HealthCheckRequest { service: "shaper.v1.Broker".to_owned() };
        let mut client = HealthClient::new(self.link.channel.clone());
        let answer = tokio::time::timeout(PATIENCE, client.check(request)).await;
        answer.is_ok_and(|answer| {
            answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving)
        })
    }

    fn broker(&self) -> BrokerClient<Channel> {
        BrokerClient::new(self.link.channel.clone())
    }

    /// Submits a task. Outlives the broker: the same task twice is one task.
    pub(crate) async fn submit(&self, spec: TaskSpec) -> Result<ClusterTask, CallError> {
        let operation = format!("submit task `{}`", spec.profile.task_id);
        let request = v1::SubmitTaskRequest { spec: Some(spec.into()) };
        self.link
            .insist(operation, |channel| {
                let request = request.clone();
                async move { BrokerClient::new(channel).submit_task(request).await }
            })
            .await
    }

    pub(crate) async fn get_task(&self, id: &TaskId) -> Result<ClusterTask, CallError> {
        let request = v1::GetClusterTaskRequest { task_id: id.to_string() };
        self.link.read(&format!("get task `{id}`"), self.broker().get_cluster_task(request).await)
    }

    pub(crate) async fn list_tasks(&self) -> Result<Vec<ClusterTask>, CallError> {
        const OPERATION: &str = "list tasks";
        let response = self.broker().list_cluster_tasks(v1::ListClusterTasksRequest {}).await;
        let v1::ListClusterTasksResponse { tasks, revision: _, epoch: _ } =
            self.link.answer(OPERATION, response)?;
        tasks.into_iter().map(|task| self.link.domain(OPERATION, task)).collect()
    }

    /// Asks a task to end. Outlives the broker.
    pub(crate) async fn cancel_task(&self, id: &TaskId, grace: Duration) -> Result<ClusterTask, CallError> {
        let grace_millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = v1::CancelClusterTaskRequest { task_id: id.to_string(), grace_millis };
        self.link
            .insist(format!("cancel task `{id}`"), |channel| {
                let request = request.clone();
                async move { BrokerClient::new(channel).cancel_cluster_task(request).await }
            })
            .await
    }

    /// Why a task is where it is, oldest decision first.
    pub(crate) async fn explain(&self, id: &TaskId) -> Result<Vec<Decision>, CallError> {
        let operation = format!("explain task `{id}`");
        let request = v1::ExplainTaskRequest { task_id: id.to_string() };
        let v1::ExplainTaskResponse { decisions } =
            self.link.answer(&operation, self.broker().explain_task(request).await)?;
        decisions.into_iter().map(|decision| self.link.domain(&operation, decision)).collect()
    }

    pub(crate) async fn list_nodes(&self) -> Result<Vec<NodeStatus>, CallError> {
        const OPERATION: &str = "list nodes";
        let v1::ListNodesResponse { nodes } =
            self.link.answer(OPERATION, self.broker().list_nodes(v1::ListNodesRequest {}).await)?;
        nodes.into_iter().map(|node| self.link.domain(OPERATION, node)).collect()
    }

    /// Has the tasks of a node that is dead placed again: which.
    pub(crate) async fn fence_node(&self, node: &str) -> Result<Vec<String>, CallError> {
        let operation = format!("fence node `{node}`");
        let request = v1::FenceNodeRequest { node: node.to_owned() };
        let v1::FenceNodeResponse { task_ids } =
            self.link.answer(&operation, self.broker().fence_node(request).await)?;
        Ok(task_ids)
    }

    /// Says whether a node takes tasks; of one that is to be drained, what becomes of its tasks.
    pub(crate) async fn cordon_node(
        &self,
        node: &str,
        wish: v1::NodeWish,
        dry_run: bool,
    ) -> Result<Vec<v1::LeavingTask>, CallError> {
        let operation = format!("change node `{node}`");
        let request = v1::CordonNodeRequest { node: node.to_owned(), wish: wish.into(), dry_run };
        let v1::CordonNodeResponse { tasks } =
            self.link.answer(&operation, self.broker().cordon_node(request).await)?;
        Ok(tasks)
    }

    /// Has a node forgotten that is gone for good.
    pub(crate) async fn remove_node(&self, node: &str) -> Result<(), CallError> {
        let operation = format!("remove node `{node}`");
        let request = v1::RemoveNodeRequest { node: node.to_owned() };
        self.link.answer(&operation, self.broker().remove_node(request).await)?;
        Ok(())
    }

    /// The groups of nodes that are started and ended.
    pub(crate) async fn scale(&self) -> Result<Scale, CallError> {
        const OPERATION: &str = "list groups of nodes";
        let scale = self.link.answer(OPERATION, self.broker().get_scale(v1::GetScaleRequest {}).await)?;
        self.link.domain(OPERATION, scale)
    }

    /// Creates or replaces a policy. Outlives the broker: twice the same is once.
    pub(crate) async fn apply_policy(&self, policy: Policy) -> Result<PolicyStatus, CallError> {
        let operation = format!("apply policy `{}`", policy.policy_name);
        let request = v1::ApplyPolicyRequest { policy: Some(policy.into()) };
        self.link
            .insist(operation, |channel| {
                let request = request.clone();
                async move { BrokerClient::new(channel).apply_policy(request).await }
            })
            .await
    }

    pub(crate) async fn list_policies(&self) -> Result<Vec<PolicyStatus>, CallError> {
        const OPERATION: &str = "list policies";
        let v1::ListPoliciesResponse { policies } =
            self.link.answer(OPERATION, self.broker().list_policies(v1::ListPoliciesRequest {}).await)?;
        policies.into_iter().map(|policy| self.link.domain(OPERATION, policy)).collect()
    }

    /// Deletes a policy: the change.
    pub(crate) async fn delete_policy(&self, name: &str) -> Result<PolicyRevision, CallError> {
        let request = v1::DeletePolicyRequest { policy_name: name.to_owned() };
        self.link.read(&format!("delete policy `{name}`"), self.broker().delete_policy(request).await)
    }

    /// The changes of the set of policies, oldest first.
    pub(crate) async fn policy_history(&self) -> Result<Vec<PolicyRevision>, CallError> {
        const OPERATION: &str = "list changes of policies";
        let response = self.broker().list_policy_revisions(v1::ListPolicyRevisionsRequest {}).await;
        let v1::ListPolicyRevisionsResponse { revisions } = self.link.answer(OPERATION, response)?;
        revisions.into_iter().map(|revision| self.link.domain(OPERATION, revision)).collect()
    }

    /// Makes the policies what they were after a revision: the change.
    pub(crate) async fn roll_back_policies(&self, revision: u64) -> Result<PolicyRevision, CallError> {
        let request = v1::RollBackPoliciesRequest { revision };
        let operation = format!("roll back the policies to revision {revision}");
        self.link.read(&operation, self.broker().roll_back_policies(request).await)
    }

    /// What these policies would give the tasks that they cover.
    pub(crate) async fn preview_policies(
        &self,
        policies: Vec<Policy>,
    ) -> Result<Vec<TaskPolicies>, CallError> {
        const OPERATION: &str = "preview policies";
        let policies = policies.into_iter().map(Into::into).collect();
        let response = self.broker().preview_policies(v1::PreviewPoliciesRequest { policies }).await;
        let v1::PreviewPoliciesResponse { tasks } = self.link.answer(OPERATION, response)?;
        Ok(tasks.into_iter().map(Into::into).collect())
    }

    pub(crate) async fn get_profile(
        &self,
        name: &str,
        namespace: &str,
        priority: Priority,
    ) -> Result<MeasuredProfile, CallError> {
        let request = v1::GetProfileRequest {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            priority: v1::Priority::from(priority).into(),
        };
        let operation = format!("get the profile of `{name}` in namespace `{namespace}`");
        self.link.read(&operation, self.broker().get_profile(request).await)
    }

    /// The names of which something is known.
    pub(crate) async fn list_profiles(&self) -> Result<Vec<KnownProfile>, CallError> {
        const OPERATION: &str = "list profiles";
        let response = self.broker().list_profiles(v1::ListProfilesRequest {}).await;
        let v1::ListProfilesResponse { profiles } = self.link.answer(OPERATION, response)?;
        profiles.into_iter().map(|profile| self.link.domain(OPERATION, profile)).collect()
    }

    /// The way to the web page, for the caller alone.
    pub(crate) async fn open_ui(&self) -> Result<Door, CallError> {
        const OPERATION: &str = "open the web page";
        let response = self.broker().open_ui(v1::OpenUiRequest {}).await;
        let v1::OpenUiResponse { url, valid_seconds } = self.link.answer(OPERATION, response)?;
        Ok(Door { url, valid_seconds })
    }

    /// A task, or all of them, as they are and then at every change.
    pub(crate) fn watch<'a>(&'a self, id: Option<&'a TaskId>) -> Watch<'a> {
        Watch { broker: self, id, seen: HashMap::new(), changes: None, outage: Outage::default() }
    }

    /// The latest decisions about all tasks, oldest first.
    pub(crate) async fn events(&self) -> Result<Vec<Event>, CallError> {
        const OPERATION: &str = "list events";
        let request = v1::WatchEventsRequest { follow: false };
        let mut stream = self.link.answer(OPERATION, self.broker().watch_events(request).await)?;
        let mut events = Vec::new();
        while let Some(news) =
            stream.message().await.map_err(|status| self.link.failed(OPERATION, &status))?
        {
            for event in news.events {
                events.push(self.link.domain(OPERATION, event)?);
            }
        }
        Ok(events)
    }

    /// The same, and then each further one.
    pub(crate) fn follow_events(&self) -> Follow<'_> {
        Follow { broker: self, last: (0, 0), stream: None, outage: Outage::default() }
    }

    /// The task once it is over. Outlives the broker.
    pub(crate) async fn wait_task(&self, id: &TaskId) -> Result<ClusterTask, CallError> {
        let mut watch = self.watch(Some(id));
        loop {
            let task = watch.next().await?;
            if task.is_over() {
                return Ok(task);
            }
        }
    }
}

/// Follows decisions, each once, also across restarts of the broker.
pub(crate) struct Follow<'a> {
    broker: &'a Broker,
    /// Number and time of the last that was returned.
    last: (u64, UnixNanos),
    stream: Option<Streaming<v1::WatchEventsResponse>>,
    outage: Outage,
}

impl Follow<'_> {
    /// Those that are new, and how many there were before them that are not known any more.
    pub(crate) async fn next(&mut self) -> Result<(Vec<Event>, u64), CallError> {
        loop {
            match self.news().await {
                Ok((mut events, missed)) => {
                    self.outage = Outage::default();
                    self.broker.link.is_back();
                    // After a loss they come again. Another broker counts anew, and what it decides is later.
                    let (number, at) = self.last;
                    events.retain(|event| event.number > number || event.decision.at > at);
                    if let Some(event) = events.last() {
                        self.last = (event.number, event.decision.at);
                    }
                    return Ok((events, missed));
                }
                Err(error) if error.is_loss() => {
                    self.stream = None;
                    self.broker.link.sit_out(&mut self.outage, error).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn news(&mut self) -> Result<(Vec<Event>, u64), CallError> {
        const OPERATION: &str = "follow events";
        let link = &self.broker.link;
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let request = v1::WatchEventsRequest { follow: true };
                none.insert(link.answer(OPERATION, self.broker.broker().watch_events(request).await)?)
            }
        };
        match stream.message().await {
            Ok(Some(v1::WatchEventsResponse { events, missed })) => {
                let events = events.into_iter().map(|event| link.domain(OPERATION, event));
                Ok((events.collect::<Result<_, _>>()?, missed))
            }
            // It has no end of its own.
            Ok(None) => Err(CallError { operation: OPERATION.into(), failure: Failure::Lost(link.peer) }),
            Err(status) => Err(link.failed(OPERATION, &status)),
        }
    }
}

/// The way to the web page.
pub(crate) struct Door {
    /// Works once.
    pub(crate) url: String,
    /// And for so long.
    pub(crate) valid_seconds: u64,
}

/// Watches tasks, every change once, also across restarts of the broker.
pub(crate) struct Watch<'a> {
    broker: &'a Broker,
    id: Option<&'a TaskId>,
    /// The revision in which each task was returned last.
    seen: HashMap<TaskId, u64>,
    changes: Option<Streaming<v1::ClusterTask>>,
    outage: Outage,
}

impl Watch<'_> {
    /// The next task that is not as it was.
    pub(crate) async fn next(&mut self) -> Result<ClusterTask, CallError> {
        loop {
            match self.change().await {
                Ok(task) => {
                    self.outage = Outage::default();
                    self.broker.link.is_back();
                    let seen = self.seen.insert(task.spec.profile.task_id.clone(), task.revision);
                    if seen != Some(task.revision) {
                        return Ok(task);
                    }
                }
                // We were too slow: the tasks as they are now come again.
                Err(error) if error.code() == Some(Code::OutOfRange) => {
                    self.changes = None;
                    let delay = self.outage.delay().ok_or(error)?;
                    tokio::time::sleep(delay).await;
                }
                Err(error) if error.is_loss() => {
                    self.changes = None;
                    self.broker.link.sit_out(&mut self.outage, error).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn change(&mut self) -> Result<ClusterTask, CallError> {
        let operation = || match self.id {
            Some(id) => format!("watch task `{id}`"),
            None => "watch tasks".to_owned(),
        };
        let link = &self.broker.link;
        let changes = match &mut self.changes {
            Some(changes) => changes,
            none => {
                let task_id = self.id.map(ToString::to_string).unwrap_or_default();
                let request = v1::WatchClusterTasksRequest { task_id, from: None };
                let response = self.broker.broker().watch_cluster_tasks(request).await;
                none.insert(link.answer(operation(), response)?)
            }
        };
        match changes.message().await {
            Ok(Some(task)) => link.domain(operation(), task),
            // A watch has no end of its own.
            Ok(None) => Err(CallError { operation: operation(), failure: Failure::Lost(link.peer) }),
            Err(status) => Err(link.failed(operation(), &status)),
        }
    }
}
