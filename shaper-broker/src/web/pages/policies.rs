//! The policies: what each says, whom it covers, how the set came to be; and what another would change.

use shaper_core::{
    document::{self, policy_fields},
    policy::Subject,
    spec::Policy,
    task::UnixNanos,
};

use super::{Page, SCAN, Trouble, empty};
use crate::{
    actor::View,
    reactor::policies::{PolicyRevision, Preview, preview},
    service::policies::{is_seen, within},
    web::{Viewer, Wanted, html::Html},
};

/// Comparisons of a task with a policy for one page, most.
const COMPARISONS: usize = 200_000;
/// Changes that are shown.
const CHANGES: usize = 20;
/// Tasks of a dry run that are shown.
const TASKS: usize = 100;
/// With more policies than this there is no dry run here: each task is compared with all of them.
const TRIED: usize = 100;

struct Shown {
    policy: Policy,
    uid: u32,
    revision: u64,
    covers: usize,
}

/// The policies.
pub(in crate::web) struct Policies {
    policies: Vec<Shown>,
    /// Not all tasks were compared.
    is_cut: bool,
    changes: Vec<PolicyRevision>,
    may_try: bool,
    text: String,
    tried: Option<Result<Vec<Preview>, String>>,
}

impl Page for Policies {
    const MENU: &'static str = "/policies";

    fn title(&self) -> String {
        "Policies".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<Policies, Trouble> {
        if !viewer.may("ListPolicies") {
            return Err(Trouble::Denied);
        }
        let (state, grant) = (view.state, viewer.grant.as_ref());
        let rows = state.policies.values().filter(|row| is_seen(grant, &row.policy));
        let mut policies: Vec<_> = rows
            .map(|row| Shown { policy: row.policy.clone(), uid: row.uid, revision: row.revision, covers: 0 })
            .collect();
        let most = SCAN.min(COMPARISONS / policies.len().max(1));
        let mut is_cut = false;
        for (looked_at, (_, id)) in (0..).zip(state.shown.tasks_before(None)) {
            if looked_at == most {
                is_cut = true;
                break;
            }
            let row = state.tasks.get(id).filter(|row| !row.task.phase.is_over() && viewer.sees(&row.task));
            let Some(row) = row else { continue };
            let subject = Subject::of(row.task.spec());
            for shown in policies.iter_mut().filter(|shown| shown.policy.covers(&subject)) {
                shown.covers += 1;
            }
        }
        let changes = if viewer.may("ListPolicyRevisions") {
            // Of a revision, what is theirs; of others nothing is told, not even that it was.
            let theirs = |revision: &PolicyRevision| {
                let mut revision = revision.clone();
                revision.changes.retain(|change| {
                    let mut policies = change.before.iter().chain(&change.after);
                    policies.all(|(policy, _)| is_seen(grant, policy))
                });
                (grant.is_none() || !revision.changes.is_empty()).then_some(revision)
            };
            state.policy_revisions.values().rev().filter_map(theirs).take(CHANGES).collect()
        } else {
            Vec::new()
        };
        let may_try = viewer.may("PreviewPolicies");
        let text = wanted.query.get("policy").unwrap_or_default().to_owned();
        let tried = (may_try && !text.is_empty()).then(|| tried(view, viewer, &text));
        Ok(Policies { policies, is_cut, changes, may_try, text, tried })
    }

    fn still(&self, html: &mut Html) {
        if !self.may_try {
            return;
        }
        html.raw("<details class=\"try\"");
        if self.tried.is_some() {
            html.raw(" open");
        }
        html.raw("><summary>Dry run: what would a policy change?</summary><form method=\"get\" action=\"/policies\">");
        html.raw("<label>A policy, in YAML or JSON; nothing is applied<br><textarea name=\"policy\" rows=\"10\" required>");
        html.text(&self.text).raw("</textarea></label><button>Try</button></form>");
        match &self.tried {
            None => {}
            Some(Err(error)) => {
                html.raw("<pre class=\"trouble\" role=\"alert\">").text(error).raw("</pre>");
            }
            Some(Ok(tasks)) if tasks.is_empty() => {
                empty(html, "It would cover no task that waits or runs.");
            }
            Some(Ok(tasks)) => {
                html.raw("<p>It would cover ").text(tasks.len()).raw(" tasks that wait or run.</p>");
                html.table("What they would get", &["Task", "Node", "Setting", "From", "Says"]);
                for task in tasks.iter().take(TASKS) {
                    for gift in &task.settings {
                        html.raw("<tr>").cell("Task", |html| {
                            html.link("tasks", task.task.as_str());
                        });
                        html.text_cell("Node", task.node.as_deref().unwrap_or("waits"));
                        html.text_cell("Setting", gift.setting).text_cell("From", &gift.by.0);
                        html.text_cell("Says", &gift.by.1).raw("</tr>");
                    }
                }
                html.end_table();
                if tasks.len() > TASKS {
                    html.raw("<p class=\"note\">The first ").text(TASKS).raw(" are shown.</p>");
                }
            }
        }
        html.raw("</details>");
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        if self.policies.is_empty() {
            empty(html, "There are no policies. Apply one: <code>shaper apply -f policy.yaml</code>");
        } else {
            html.table("Policies in force", &["Policy", "Covers", "Says", "Set by", "Revision"]);
            for Shown { policy, uid, revision, covers } in &self.policies {
                html.raw("<tr><th scope=\"row\">").text(&policy.policy_name).raw("</th>");
                html.text_cell("Covers", format_args!("{covers} tasks that wait or run"));
                html.cell("Says", |html| {
                    html.raw("<ul class=\"fields\">");
                    for (field, value) in policy_fields(policy) {
                        html.raw("<li><code>").text(field).raw("</code>: ").text(value).raw("</li>");
                    }
                    html.raw("</ul>");
                });
                html.text_cell("Set by", format_args!("uid {uid}"))
                    .text_cell("Revision", revision)
                    .raw("</tr>");
            }
            html.end_table();
            if self.is_cut {
                html.raw("<p class=\"note\">Only the latest tasks were compared with them.</p>");
            }
        }
        html.raw("<h2>Changes</h2>");
        if self.changes.is_empty() {
            return empty(html, "The set was never changed, as far as is known.");
        }
        html.table("Changes of the set, the latest first", &["Revision", "When", "By", "What"]);
        for PolicyRevision { revision, at, uid, rolled_back_to, changes } in &self.changes {
            html.raw("<tr>").text_cell("Revision", revision).cell("When", |html| {
                html.when(*at, now);
            });
            html.text_cell("By", format_args!("uid {uid}")).cell("What", |html| {
                if let Some(to) = rolled_back_to {
                    html.raw("back to revision ").text(to).raw(": ");
                }
                for change in changes {
                    let what = match (&change.before, &change.after) {
                        (None, _) => "created",
                        (Some(_), Some(_)) => "replaced",
                        (Some(_), None) => "deleted",
                    };
                    html.text(&change.name).raw(" ").raw(what).raw(" ");
                }
            });
            html.raw("</tr>");
        }
        html.end_table();
    }
}

/// What a policy would give; else why it is none, or not theirs to set.
fn tried(view: &View<'_>, viewer: &Viewer, text: &str) -> Result<Vec<Preview>, String> {
    // The look is on the broker's thread.
    if view.state.tasks.len() > SCAN || view.state.policies.len() > TRIED {
        return Err(format!(
            "with more than {SCAN} tasks or {TRIED} policies nothing is tried here: `shaper apply --dry-run=server -f FILE` does"
        ));
    }
    let policy = document::policy("policy", text).map_err(|error| error.to_string())?;
    if let Some(grant) = &viewer.grant {
        grant.permits_policy(&policy).map_err(|breach| breach.to_string())?;
    }
    let within = within(viewer.grant.as_ref());
    let sees = |task: &crate::reactor::Task| viewer.sees(task);
    preview(view.state, &viewer.caller, &within, &[policy], sees).map_err(|refusal| refusal.to_string())
}
