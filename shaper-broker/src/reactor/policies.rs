//! The set of policies: what changes it, and how it was before.
//!
//! Every change is a revision, with who made it and when, and what each policy was before and is after. The latest
//! [`REVISIONS`] of them are kept, without a gap, so that the set can be made again what it was after any of them. To go back
//! is a change like any other, and can itself be undone.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::TaskId,
    policy::{self, Given, PolicyFloors, Rule, Setting, Subject},
    spec::{Credentials, Policy},
    task::UnixNanos,
};

use super::{
    Denied, Effect, Phase, Refusal, Reply, Row, State, Task, Turn,
    client::check_name,
    query::{self, is_operator},
    state::PolicyRow,
};

const MAX_POLICIES: usize = 1_000;
/// Of a user other than root.
const MAX_POLICIES_EACH: usize = 50;
/// How many changes of the set are remembered.
pub const REVISIONS: usize = 200;

/// One change of the set of policies: one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRevision {
    /// Which, counted from 1.
    pub revision: u64,
    /// When.
    pub at: UnixNanos,
    /// Who made it.
    pub uid: u32,
    /// Of a rollback: the revision that it went back to.
    pub rolled_back_to: Option<u64>,
    /// By the names of the policies.
    pub changes: Vec<PolicyChange>,
}

/// What became of one policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyChange {
    /// Its name.
    pub name: String,
    /// What it was, and whose; `None`: there was none.
    pub before: Option<(Policy, u32)>,
    /// What it is; `None`: there is none.
    pub after: Option<(Policy, u32)>,
}

/// What policies would give a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The task.
    pub task: TaskId,
    /// Where it is; `None`: it waits.
    pub node: Option<String>,
    /// What it gets.
    pub settings: Vec<Gift>,
}

/// One setting of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gift {
    /// Which.
    pub setting: Setting,
    /// Name of the policy that gives it, and what that says.
    pub by: (String, String),
    /// The names of those that wanted the same, what they say, and what the other has before them.
    pub overruled: Vec<(String, String, Rule)>,
}

impl Turn<'_> {
    pub(super) fn apply_policy(&mut self, caller: &Credentials, within: &[String], policy: Policy) {
        let name = policy.policy_name.clone();
        let applied = may_apply(self.state, caller, within, &policy).map(|()| {
            if self.state.policies.get(&name).is_none_or(|row| row.policy != policy) {
                let after = Some((policy, caller.uid));
                self.change_policies(caller.uid, None, BTreeMap::from([(name.clone(), after)]));
            }
        });
        self.answer = Some(applied.map(|()| Reply::Policy(name)));
    }

    pub(super) fn delete_policy(&mut self, caller: &Credentials, within: &[String], name: &str) {
        let deleted = may_replace(self.state, caller, within, name).and_then(|is_there| match is_there {
            true => Ok(self.change_policies(caller.uid, None, BTreeMap::from([(name.to_owned(), None)]))),
            false => Err(Refusal::NoSuchPolicy(name.to_owned())),
        });
        self.answer = Some(deleted.map(Reply::Policies));
    }

    pub(super) fn roll_back_policies(&mut self, caller: &Credentials, to: u64) {
        let rolled_back = match is_operator(caller) {
            true => self
                .state
                .policies_before(to)
                .map(|wanted| self.change_policies(caller.uid, Some(to), wanted)),
            false => Err(Refusal::Denied(Denied::RollBack)),
        };
        self.answer = Some(rolled_back.map(Reply::Policies));
    }

    /// Makes these policies what they are to be, and of whom, as one revision: which.
    fn change_policies(
        &mut self,
        uid: u32,
        rolled_back_to: Option<u64>,
        wanted: BTreeMap<String, Option<(Policy, u32)>>,
    ) -> u64 {
        self.state.policies_revision += 1;
        let revision = self.state.policies_revision;
        let mut changes = Vec::with_capacity(wanted.len());
        for (name, after) in wanted {
            let row = after.clone().map(|(policy, uid)| PolicyRow { policy, uid, revision });
            let before = match row {
                Some(row) => self.state.policies.insert(name.clone(), row),
                None => self.state.policies.remove(&name),
            };
            let before = before.map(|row| (row.policy, row.uid));
            self.rows.push(Row::Policy(name.clone()));
            changes.push(PolicyChange { name, before, after });
        }
        let makes_room = |of: &Option<(Policy, u32)>| {
            of.as_ref().is_some_and(|(policy, _)| {
                policy.preemption_enabled || policy.floors != PolicyFloors::default()
            })
        };
        if changes.iter().any(|change| makes_room(&change.before) || makes_room(&change.after)) {
            // Room may be made that could not before, or no more.
            self.state.line_up();
            self.look_at_all = true;
        }
        let change = PolicyRevision { revision, at: self.now, uid, rolled_back_to, changes };
        self.state.policy_revisions.insert(revision, change);
        self.rows.push(Row::PolicyRevision(revision));
        while self.state.policy_revisions.len() > REVISIONS
            && let Some((forgotten, _)) = self.state.policy_revisions.pop_first()
        {
            self.rows.push(Row::PolicyRevision(forgotten));
        }
        let sessions: Vec<_> = self.state.sessions.keys().copied().collect();
        for session in sessions {
            let policies = self.policies_for(session);
            self.effects.push(policies);
        }
        revision
    }

    pub(super) fn policies_for(&self, session: super::SessionId) -> Effect {
        let policies = self.state.policies.values().map(|row| row.policy.clone()).collect();
        Effect::Policies(session, self.state.policies_revision, policies)
    }
}

impl State {
    /// What would have to change for the policies to be what they were after a revision.
    fn policies_before(&self, revision: u64) -> Result<BTreeMap<String, Option<(Policy, u32)>>, Refusal> {
        let latest = self.policies_revision;
        let oldest =
            self.policy_revisions.first_key_value().map_or(latest, |(first, _)| first.saturating_sub(1));
        if !(oldest..=latest).contains(&revision) {
            return Err(Refusal::NoSuchRevision { revision, oldest, latest });
        }
        let mut wanted = BTreeMap::new();
        for change in
            self.policy_revisions.range((Excluded(revision), Unbounded)).rev().flat_map(|(_, it)| &it.changes)
        {
            wanted.insert(change.name.clone(), change.before.clone());
        }
        let now = |name: &String| self.policies.get(name).map(|row| (&row.policy, row.uid));
        wanted.retain(|name, then| now(name) != then.as_ref().map(|(policy, uid)| (policy, *uid)));
        Ok(wanted)
    }

    /// The policies as they would be with these.
    fn policies_with<'a>(&'a self, others: &'a [Policy]) -> Vec<&'a Policy> {
        let mut policies: BTreeMap<&str, &Policy> =
            self.policies.iter().map(|(name, row)| (name.as_str(), &row.policy)).collect();
        policies.extend(others.iter().map(|policy| (policy.policy_name.as_str(), policy)));
        policies.into_values().collect()
    }
}

/// What would become of the caller's tasks that wait or run, as far as one of these policies covers them.
pub fn preview(
    state: &State,
    caller: &Credentials,
    within: &[String],
    policies: &[Policy],
    is_seen: impl Fn(&Task) -> bool,
) -> Result<Vec<Preview>, Refusal> {
    policies.iter().try_for_each(|policy| may_apply(state, caller, within, policy))?;
    let set = state.policies_with(policies);
    let mut tasks: Vec<&Task> = query::tasks(state, caller)
        .filter(|task| !matches!(task.phase, Phase::Ended { .. } | Phase::Cancelled))
        .filter(|task| policies.iter().any(|policy| policy.covers(&Subject::of(task.spec()))))
        .filter(|task| is_seen(task))
        .collect();
    tasks.sort_unstable_by_key(|task| task.id());
    let preview = |task: &Task| Preview {
        task: task.id().clone(),
        node: task.phase.node().map(Into::into),
        settings: policy::resolve(set.iter().copied(), &Subject::of(task.spec())).iter().map(gift).collect(),
    };
    Ok(tasks.into_iter().map(preview).collect())
}

fn gift(given: &Given<'_>) -> Gift {
    let setting = given.setting;
    let said = |policy: &Policy| (policy.policy_name.clone(), setting.shown(policy).unwrap_or_default());
    let overruled = given.overruled.iter().map(|other| {
        let (name, says) = said(other.policy);
        (name, says, other.rule)
    });
    Gift { setting, by: said(given.policy), overruled: overruled.collect() }
}

/// A policy covers, shrinks and evicts tasks of its own namespace alone; so who may set it is a matter of that namespace.
fn may_apply(state: &State, caller: &Credentials, within: &[String], policy: &Policy) -> Result<(), Refusal> {
    if !is_operator(caller) && !within.contains(&policy.namespace) {
        return Err(Refusal::Denied(Denied::Policies(policy.namespace.clone())));
    }
    check_name("policy_name", &policy.policy_name).map_err(Refusal::Invalid)?;
    check_name("namespace", &policy.namespace).map_err(Refusal::Invalid)?;
    if may_replace(state, caller, within, &policy.policy_name)? {
        return Ok(());
    }
    if !is_operator(caller) && state.policies_of(caller.uid) >= MAX_POLICIES_EACH {
        let remedy = "delete or replace one of yours that is no longer needed";
        return Err(Refusal::Full { what: "policies of a user", limit: MAX_POLICIES_EACH, remedy });
    }
    if state.policies.len() >= MAX_POLICIES {
        let remedy = "delete or replace one that is no longer needed";
        return Err(Refusal::Full { what: "policies", limit: MAX_POLICIES, remedy });
    }
    Ok(())
}

/// Whether there is a policy of this name; a refusal if it is not the caller's to change.
fn may_replace(state: &State, caller: &Credentials, within: &[String], name: &str) -> Result<bool, Refusal> {
    let Some(PolicyRow { policy: Policy { namespace, .. }, uid, .. }) = state.policies.get(name) else {
        return Ok(false);
    };
    if is_operator(caller) || *uid == caller.uid && within.contains(namespace) {
        return Ok(true);
    }
    let (name, namespace, uid) = (name.to_owned(), namespace.clone(), *uid);
    Err(Refusal::Denied(Denied::PolicyOfOthers { name, namespace, uid }))
}
