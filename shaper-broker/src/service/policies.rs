//! The set of policies, for clients: who asks is held to the namespaces and priorities of its identity.

use std::sync::Arc;

use shaper_core::spec::Policy;
use shaper_identity::access::Grant;
use shaper_proto::{convert::WireError, v1};
use tonic::{Request, Response, Status};

use super::{BrokerService, another_answer, breach, caller, covers, grant, invalid};
use crate::{
    reactor::{
        Answer, Event, Task,
        policies::{self, PolicyChange, PolicyRevision},
        state::PolicyRow,
    },
    wire,
};

/// A caller that previews more at once had better ask twice.
const MAX_PREVIEWED: usize = 100;

/// The namespaces whose policies are the caller's to set, if it is no operator.
pub(crate) fn within(grant: Option<&Arc<Grant>>) -> Vec<String> {
    grant.map(|grant| grant.namespaces.clone()).unwrap_or_default()
}

/// A policy that the caller may set, as far as its identity says.
fn permitted(grant: Option<&Arc<Grant>>, policy: v1::Policy) -> Result<Policy, Status> {
    let policy = Policy::try_from(policy).map_err(invalid)?;
    if let Some(grant) = grant {
        grant.permits_policy(&policy).map_err(|error| breach(&error))?;
    }
    Ok(policy)
}

pub(crate) fn is_seen(grant: Option<&Arc<Grant>>, policy: &Policy) -> bool {
    grant.is_none_or(|grant| grant.covers(&policy.namespace).is_ok())
}

pub(super) async fn apply(
    service: &BrokerService,
    request: Request<v1::ApplyPolicyRequest>,
) -> Result<Response<v1::PolicyStatus>, Status> {
    let (caller, grant) = (caller(&request)?, grant(&request)?);
    let policy = request.into_inner().policy.ok_or_else(|| invalid(WireError::Missing("policy")))?;
    let policy = Box::new(permitted(grant.as_ref(), policy)?);
    let within = within(grant.as_ref());
    match service.ask(Event::ApplyPolicy { caller, within, policy }).await? {
        Answer::Policy(policy, revision) => {
            Ok(Response::new(v1::PolicyStatus { policy: Some((*policy).into()), revision }))
        }
        _ => Err(another_answer()),
    }
}

pub(super) async fn list(
    service: &BrokerService,
    request: &Request<v1::ListPoliciesRequest>,
) -> Result<Response<v1::ListPoliciesResponse>, Status> {
    let grant = grant(request)?;
    let policies = service.read(move |view| {
        let is_seen = |row: &&PolicyRow| is_seen(grant.as_ref(), &row.policy);
        Ok(view.state.policies.values().filter(is_seen).map(wire::policy_status).collect())
    });
    Ok(Response::new(v1::ListPoliciesResponse { policies: policies.await? }))
}

pub(super) async fn delete(
    service: &BrokerService,
    request: Request<v1::DeletePolicyRequest>,
) -> Result<Response<v1::PolicyRevision>, Status> {
    let (caller, within) = (caller(&request)?, within(grant(&request)?.as_ref()));
    let v1::DeletePolicyRequest { policy_name: name } = request.into_inner();
    changed(service, Event::DeletePolicy { caller, within, name }).await
}

pub(super) async fn roll_back(
    service: &BrokerService,
    request: Request<v1::RollBackPoliciesRequest>,
) -> Result<Response<v1::PolicyRevision>, Status> {
    let caller = caller(&request)?;
    let v1::RollBackPoliciesRequest { revision } = request.into_inner();
    changed(service, Event::RollBackPolicies { caller, revision }).await
}

async fn changed(service: &BrokerService, event: Event) -> Result<Response<v1::PolicyRevision>, Status> {
    match service.ask(event).await? {
        Answer::Policies(revision) => Ok(Response::new(wire::policy_revision(*revision))),
        _ => Err(another_answer()),
    }
}

pub(super) async fn revisions(
    service: &BrokerService,
    request: &Request<v1::ListPolicyRevisionsRequest>,
) -> Result<Response<v1::ListPolicyRevisionsResponse>, Status> {
    let grant = grant(request)?;
    let revisions = service.read(move |view| {
        let is_theirs = |change: &PolicyChange| {
            let mut policies = change.before.iter().chain(&change.after);
            policies.all(|(policy, _)| is_seen(grant.as_ref(), policy))
        };
        let seen = |revision: &PolicyRevision| {
            let mut revision = revision.clone();
            revision.changes.retain(is_theirs);
            let is_empty = revision.changes.is_empty() && grant.is_some();
            (!is_empty).then(|| wire::policy_revision(revision))
        };
        Ok(view.state.policy_revisions.values().filter_map(seen).collect())
    });
    Ok(Response::new(v1::ListPolicyRevisionsResponse { revisions: revisions.await? }))
}

pub(super) async fn preview(
    service: &BrokerService,
    request: Request<v1::PreviewPoliciesRequest>,
) -> Result<Response<v1::PreviewPoliciesResponse>, Status> {
    let (caller, grant) = (caller(&request)?, grant(&request)?);
    let v1::PreviewPoliciesRequest { policies } = request.into_inner();
    if policies.len() > MAX_PREVIEWED {
        let text =
            format!("{} policies are too many for one preview: at most {MAX_PREVIEWED}", policies.len());
        return Err(Status::invalid_argument(text));
    }
    let policies: Vec<Policy> =
        policies.into_iter().map(|policy| permitted(grant.as_ref(), policy)).collect::<Result<_, _>>()?;
    let within = within(grant.as_ref());
    let tasks = service.read(move |view| {
        let is_seen = |task: &Task| covers(grant.as_ref(), task);
        let preview = policies::preview(view.state, &caller, &within, &policies, is_seen)?;
        Ok(preview.into_iter().map(wire::task_policies).collect())
    });
    Ok(Response::new(v1::PreviewPoliciesResponse { tasks: tasks.await? }))
}
