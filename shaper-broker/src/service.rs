//! The gRPC service for clients: checks what comes in, asks the broker, answers. Streams have modules of their own.

mod events;
mod nodes;
pub(crate) mod policies;
mod submit;
mod ui;
mod watch;

use std::{pin::Pin, sync::Arc};

use shaper_core::{
    id::{InvalidTaskId, TaskId},
    spec::{Credentials, TaskSpec},
};
use shaper_identity::{
    access::{Breach, Grant},
    serve::Asking,
};
use shaper_proto::{
    convert::WireError,
    peer::Caller,
    v1::{self, broker_server::Broker},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    actor::{ActorError, Handle, View},
    reactor::{Answer, Event, Refusal, State, Task, query},
    web::Door,
    wire,
};

/// The service.
pub struct BrokerService {
    broker: Handle,
    /// To the web page, if there is one.
    door: Option<Arc<Door>>,
}

impl BrokerService {
    /// A service in front of a broker.
    pub fn new(broker: Handle) -> BrokerService {
        BrokerService { broker, door: None }
    }

    /// With a web page, to which this is the door.
    pub fn with_door(self, door: Option<Arc<Door>>) -> BrokerService {
        BrokerService { door, ..self }
    }

    async fn ask(&self, event: Event) -> Result<Answer, Status> {
        self.broker.ask(event).await.map_err(unavailable)?.map_err(refused)
    }

    async fn task(&self, event: Event) -> Result<Response<v1::ClusterTask>, Status> {
        match self.ask(event).await? {
            Answer::Task(epoch, task) => Ok(Response::new(wire::cluster_task(epoch, &task))),
            _ => Err(another_answer()),
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        self.broker.read(look).await.map_err(unavailable)?.map_err(refused)
    }
}

fn another_answer() -> Status {
    Status::internal("that is no answer to this")
}

pub(crate) fn unavailable(error: ActorError) -> Status {
    match error {
        ActorError::Stopped => Status::unavailable(error.to_string()),
        ActorError::Busy => Status::resource_exhausted(error.to_string()),
    }
}

fn refused(refusal: Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::NoSuchTask(_)
        | Refusal::NoHistory { .. }
        | Refusal::NoSuchNode(_)
        | Refusal::NoSuchPolicy(_)
        | Refusal::NoSuchRevision { .. } => Status::not_found(text),
        Refusal::NodeAnswers(_) | Refusal::NodeInUse { .. } => Status::failed_precondition(text),
        Refusal::Exists(..) => Status::already_exists(text),
        Refusal::Denied(_) => Status::permission_denied(text),
        Refusal::Invalid(_) => Status::invalid_argument(text),
        Refusal::Full { .. } => Status::resource_exhausted(text),
    }
}

pub(crate) fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// As which user somebody calls: as the kernel says, or the configuration of identities.
fn caller<T>(request: &Request<T>) -> Result<Credentials, Status> {
    let Asking { who, caller, .. } = Asking::of(request)?;
    match caller {
        Some(Caller { uid, gid, groups }) => Ok(Credentials { uid: *uid, gid: *gid, groups: groups.clone() }),
        None => Err(Status::permission_denied(format!("{who} is no user, and has no tasks"))),
    }
}

/// The bounds of a caller who is a submitter.
fn grant<T>(request: &Request<T>) -> Result<Option<Arc<Grant>>, Status> {
    Ok(Asking::of(request)?.grant.clone())
}

fn breach(breach: &Breach) -> Status {
    Status::permission_denied(breach.to_string())
}

/// Whether a task, which is of the caller's user, is in a namespace of its identity.
pub(crate) fn covers(grant: Option<&Arc<Grant>>, task: &Task) -> bool {
    grant.is_none_or(|grant| grant.covers(&task.spec().namespace).is_ok())
}

fn task_id(text: &str) -> Result<TaskId, Status> {
    text.parse().map_err(|error: InvalidTaskId| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl Broker for BrokerService {
    async fn submit_task(
        &self,
        request: Request<v1::SubmitTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let spec = request.into_inner().spec.ok_or_else(|| invalid(WireError::Missing("spec")))?;
        let spec = Box::new(TaskSpec::try_from(spec).map_err(invalid)?);
        if let Some(grant) = grant {
            grant.permits(&spec).map_err(|error| breach(&error))?;
        }
        self.task(Event::Submit { caller, spec }).await
    }

    type SubmitTasksStream = Pin<Box<dyn Stream<Item = Result<v1::SubmitTasksResponse, Status>> + Send>>;

    async fn submit_tasks(
        &self,
        request: Request<Streaming<v1::SubmitTasksRequest>>,
    ) -> Result<Response<Self::SubmitTasksStream>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let stream = submit::outcomes(self.broker.clone(), caller, grant, request.into_inner());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_cluster_task(
        &self,
        request: Request<v1::GetClusterTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let id = task_id(&request.get_ref().task_id)?;
        let task = move |view: &View<'_>| {
            own(view, &caller, grant.as_ref(), &id).map(|task| wire::cluster_task(view.state.epoch, task))
        };
        Ok(Response::new(self.read(task).await?))
    }

    async fn list_cluster_tasks(
        &self,
        request: Request<v1::ListClusterTasksRequest>,
    ) -> Result<Response<v1::ListClusterTasksResponse>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let list = move |view: &View<'_>| {
            let mut tasks: Vec<_> =
                query::tasks(view.state, &caller).filter(|task| covers(grant.as_ref(), task)).collect();
            tasks.sort_unstable_by_key(|task| task.id());
            let State { epoch, revision, .. } = *view.state;
            let tasks = tasks.into_iter().map(|task| wire::cluster_task(epoch, task)).collect();
            Ok(v1::ListClusterTasksResponse { tasks, revision, epoch })
        };
        Ok(Response::new(self.read(list).await?))
    }

    type WatchClusterTasksStream = Pin<Box<dyn Stream<Item = Result<v1::ClusterTask, Status>> + Send>>;

    async fn watch_cluster_tasks(
        &self,
        request: Request<v1::WatchClusterTasksRequest>,
    ) -> Result<Response<Self::WatchClusterTasksStream>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let id = match request.get_ref().task_id.as_str() {
            "" => None,
            id => Some(task_id(id)?),
        };
        let from = request.into_inner().from;
        let watcher = watch::Watcher { caller, grant, id };
        Ok(Response::new(Box::pin(watcher.begin(&self.broker, from).await?)))
    }

    async fn cancel_cluster_task(
        &self,
        request: Request<v1::CancelClusterTaskRequest>,
    ) -> Result<Response<v1::ClusterTask>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let v1::CancelClusterTaskRequest { task_id: id, grace_millis } = request.into_inner();
        let task = task_id(&id)?;
        if grant.is_some() {
            // What a task is stays as it is: between this and the event nothing changes its namespace.
            let (caller, task) = (caller.clone(), task.clone());
            self.read(move |view| own(view, &caller, grant.as_ref(), &task).map(|_| ())).await?;
        }
        self.task(Event::Cancel { caller, task, grace_millis }).await
    }

    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<v1::WatchEventsResponse, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let follower = events::Follower { caller: caller(&request)?, grant: grant(&request)? };
        let stream = follower.begin(self.broker.clone(), request.into_inner().follow).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn explain_task(
        &self,
        request: Request<v1::ExplainTaskRequest>,
    ) -> Result<Response<v1::ExplainTaskResponse>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let id = task_id(&request.get_ref().task_id)?;
        let explain = move |view: &View<'_>| {
            own(view, &caller, grant.as_ref(), &id)?;
            query::explain(view.state, &caller, &id, view.now)
        };
        let decisions = self.read(explain).await?.into_iter().map(Into::into).collect();
        Ok(Response::new(v1::ExplainTaskResponse { decisions }))
    }

    async fn list_nodes(
        &self,
        _request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let list = |view: &View<'_>| Ok(view.state.nodes_in_order().map(wire::node_status).collect());
        Ok(Response::new(v1::ListNodesResponse { nodes: self.read(list).await? }))
    }

    async fn fence_node(
        &self,
        request: Request<v1::FenceNodeRequest>,
    ) -> Result<Response<v1::FenceNodeResponse>, Status> {
        let caller = caller(&request)?;
        let v1::FenceNodeRequest { node } = request.into_inner();
        match self.ask(Event::FenceNode { caller, node }).await? {
            Answer::Fenced(tasks) => {
                let task_ids = tasks.into_iter().map(Into::into).collect();
                Ok(Response::new(v1::FenceNodeResponse { task_ids }))
            }
            _ => Err(another_answer()),
        }
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::CordonNodeResponse>, Status> {
        nodes::cordon(self, request).await
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        nodes::remove(self, request).await
    }

    async fn get_scale(
        &self,
        _request: Request<v1::GetScaleRequest>,
    ) -> Result<Response<v1::GetScaleResponse>, Status> {
        Ok(Response::new(self.read(|view| Ok(wire::scale(view.state, view.now))).await?))
    }

    async fn apply_policy(
        &self,
        request: Request<v1::ApplyPolicyRequest>,
    ) -> Result<Response<v1::PolicyStatus>, Status> {
        policies::apply(self, request).await
    }

    async fn list_policies(
        &self,
        request: Request<v1::ListPoliciesRequest>,
    ) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        policies::list(self, &request).await
    }

    async fn delete_policy(
        &self,
        request: Request<v1::DeletePolicyRequest>,
    ) -> Result<Response<v1::PolicyRevision>, Status> {
        policies::delete(self, request).await
    }

    async fn list_policy_revisions(
        &self,
        request: Request<v1::ListPolicyRevisionsRequest>,
    ) -> Result<Response<v1::ListPolicyRevisionsResponse>, Status> {
        policies::revisions(self, &request).await
    }

    async fn roll_back_policies(
        &self,
        request: Request<v1::RollBackPoliciesRequest>,
    ) -> Result<Response<v1::PolicyRevision>, Status> {
        policies::roll_back(self, request).await
    }

    async fn preview_policies(
        &self,
        request: Request<v1::PreviewPoliciesRequest>,
    ) -> Result<Response<v1::PreviewPoliciesResponse>, Status> {
        policies::preview(self, request).await
    }

    async fn get_profile(
        &self,
        request: Request<v1::GetProfileRequest>,
    ) -> Result<Response<v1::GetProfileResponse>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let v1::GetProfileRequest { name, namespace, priority } = request.into_inner();
        let priority = shaper_proto::convert::priority_or_medium("priority", priority)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if let Some(grant) = grant {
            grant.covers(&namespace).map_err(|error| breach(&error))?;
        }
        let measured = {
            let name = name.clone();
            self.read(move |view| query::profile(view.state, &caller, &namespace, &name, priority)).await?
        };
        let profile = v1::TaskProfile {
            // Whoever submits it chooses an id; the name will do where it is one.
            task_id: if name.parse::<TaskId>().is_ok() { name } else { String::new() },
            demand: Some(measured.demand.into()),
            priority: v1::Priority::from(priority).into(),
            estimated_runtime_seconds: Some(measured.runtime_seconds).filter(|seconds| *seconds > 0),
        };
        let (executions, notes) = (measured.executions, measured.notes);
        let estimates = measured.estimates.into_iter().map(wire::estimate).collect();
        Ok(Response::new(v1::GetProfileResponse { profile: Some(profile), executions, notes, estimates }))
    }

    async fn list_profiles(
        &self,
        request: Request<v1::ListProfilesRequest>,
    ) -> Result<Response<v1::ListProfilesResponse>, Status> {
        let (caller, grant) = (caller(&request)?, grant(&request)?);
        let profiles = self
            .read(move |view| {
                let covered = query::profiles(view.state, &caller).filter(|(history, _)| {
                    grant.as_ref().is_none_or(|grant| grant.covers(&history.namespace).is_ok())
                });
                Ok::<_, Refusal>(
                    covered.map(|(history, kind)| wire::profile_summary(history, kind)).collect(),
                )
            })
            .await?;
        Ok(Response::new(v1::ListProfilesResponse { profiles }))
    }

    async fn open_ui(
        &self,
        request: Request<v1::OpenUiRequest>,
    ) -> Result<Response<v1::OpenUiResponse>, Status> {
        ui::open(self, &request)
    }
}

/// A task that the caller may see, in a namespace of its identity.
pub(crate) fn own<'a>(
    view: &View<'a>,
    caller: &Credentials,
    grant: Option<&Arc<Grant>>,
    id: &TaskId,
) -> Result<&'a Task, Refusal> {
    let task = &query::task(view.state, caller, id)?.task;
    if covers(grant, task) { Ok(task) } else { Err(Refusal::NoSuchTask(id.clone())) }
}
