//! A task: what it asked for, what it may use and uses, and every decision about it.

use shaper_core::{
    gpu::CardSet,
    limits::{Limit, Limits},
    policy::{self, Subject},
    spec::{Decision, Demand, Image},
    task::{TaskStatus, UnixNanos},
    units::{BitsPerSec, Bytes, Millicores},
};

use super::{Page, Trouble, empty, needs, owner, phase, phase_name};
use crate::{
    actor::View,
    reactor::{Phase, query},
    service::own,
    web::{Viewer, Wanted, html::Html},
};

/// Nodes that are told of a decision.
const NODES: usize = 20;

/// What a policy gives it.
struct Setting {
    setting: String,
    policy: String,
    says: String,
    overruled: Vec<String>,
}

/// A task.
pub(in crate::web) struct TaskPage {
    id: String,
    namespace: String,
    name: String,
    owner: String,
    labels: Vec<(String, String)>,
    /// The image that it runs in, and what that is given, or a command.
    command: Vec<String>,
    priority: String,
    phase: &'static str,
    why: String,
    node: Option<String>,
    attempt: u32,
    submitted_at: UnixNanos,
    demand: Demand,
    asked: String,
    cards: CardSet,
    limits: Limits,
    status: Option<TaskStatus>,
    settings: Vec<Setting>,
    decisions: Option<Vec<Decision>>,
}

impl Page for TaskPage {
    const MENU: &'static str = "/tasks";
    const HAS_CHART: bool = true;

    fn title(&self) -> String {
        format!("Task {}", self.id)
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<TaskPage, Trouble> {
        if !viewer.may("GetClusterTask") {
            return Err(Trouble::Denied);
        }
        let id = wanted.name.parse().map_err(|_| Trouble::NoTask(wanted.name.clone()))?;
        let task = own(view, &viewer.caller, viewer.grant.as_ref(), &id)?;
        let spec = task.spec();
        let why = match &task.phase {
            Phase::Pending { reason, .. } => reason.clone(),
            Phase::Nominated { node } => format!("{node} is being cleared for it"),
            Phase::Ended { status, .. } => format!("code {}", status.shell_code()),
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Cancelled => String::new(),
        };
        let is_seen = |policy: &&shaper_core::spec::Policy| {
            crate::service::policies::is_seen(viewer.grant.as_ref(), policy)
        };
        let settings = if viewer.may("ListPolicies") && !task.phase.is_over() {
            let policies = view.state.policies.values().map(|row| &row.policy).filter(is_seen);
            policy::resolve(policies, &Subject::of(spec))
                .iter()
                .map(|given| Setting {
                    setting: given.setting.to_string(),
                    policy: given.policy.policy_name.clone(),
                    says: given.setting.shown(given.policy).unwrap_or_default(),
                    overruled: given
                        .overruled
                        .iter()
                        .map(|it| format!("{} ({})", it.policy.policy_name, it.rule))
                        .collect(),
                })
                .collect()
        } else {
            Vec::new()
        };
        let explains = viewer.may("ExplainTask");
        let decisions =
            explains.then(|| query::explain(view.state, &viewer.caller, &id, view.now)).transpose()?;
        Ok(TaskPage {
            id: id.to_string(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            owner: owner(task.owner()),
            labels: spec.labels.clone().into_iter().collect(),
            command: spec.image.iter().map(Image::to_string).chain(spec.command.iter().cloned()).collect(),
            priority: task.priority().to_string(),
            phase: phase_name(&task.phase),
            why,
            node: task.node.clone(),
            attempt: task.attempt,
            submitted_at: task.submission.submitted_at,
            demand: *task.demand(),
            asked: needs(task.needs()),
            cards: task.cards,
            limits: spec.limits,
            status: task.on_node.as_deref().cloned(),
            settings,
            decisions,
        })
    }

    fn still(&self, html: &mut Html) {
        html.raw("<section class=\"charts\" aria-label=\"Use over time\"");
        html.attribute("data-usage", format_args!("/tasks/{}/usage", super::super::html::Encoded(&self.id)));
        html.raw("><noscript><p class=\"note\">The charts take JavaScript; the table has the same figures, as they are ");
        html.raw("now.</p></noscript></section>");
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        html.raw("<p>");
        phase(html, self.phase);
        html.raw(" ").text(&self.why);
        if let Some(node) = &self.node {
            html.raw(" on ").link("nodes", node).raw(", attempt ").text(self.attempt);
            if !self.cards.is_empty() {
                html.raw(", GPU cards ").text(self.cards);
            }
        }
        html.raw("</p>");
        self.figures(html);
        self.about(html, now);
        self.given(html);
        self.decided(html, now);
    }
}

impl TaskPage {
    fn figures(&self, html: &mut Html) {
        html.table(
            "Request, limit, grant and use",
            &["Resource", "Request", "Limit", "In force", "Used now", "Held by"],
        );
        let status = self.status.as_ref();
        let force = status.map(|status| status.limits);
        let usage = status.filter(|_| self.phase == "running").map(|status| status.usage);
        let none = || "–".to_owned();
        let held = |resource: &str| {
            let found =
                status.and_then(|status| status.enforcement.iter().find(|it| it.resource == resource));
            found.map_or_else(none, |it| format!("{}: {}", it.mechanism, it.in_force))
        };
        let cores = |cpu: Millicores| format!("{cpu} cores");
        fn limit<T: Copy>(limit: Limit<T>, shown: impl Fn(T) -> String) -> String {
            match limit {
                Limit::Unlimited => "none".to_owned(),
                Limit::At(value) => shown(value),
            }
        }
        let granted = |force: Limits| match usage.and_then(|usage| usage.egress_granted_bps) {
            Some(granted) => format!("{} granted", BitsPerSec(granted)),
            None => limit(force.net_egress, |rate: BitsPerSec| rate.to_string()),
        };
        let rows: [(&'static str, [String; 5]); 4] = [
            (
                "CPU",
                [
                    cores(self.demand.cpu),
                    limit(self.limits.cpu, cores),
                    force.map_or_else(none, |force| limit(force.cpu, cores)),
                    usage.map_or_else(none, |usage| cores(Millicores(usage.cpu_now_millicores))),
                    held("cpu"),
                ],
            ),
            (
                "Memory",
                [
                    self.demand.memory.to_string(),
                    limit(self.limits.memory, |memory: Bytes| memory.to_string()),
                    force.map_or_else(none, |force| limit(force.memory, |memory: Bytes| memory.to_string())),
                    usage
                        .and_then(|usage| usage.memory_bytes)
                        .map_or_else(none, |memory| Bytes(memory).to_string()),
                    held("memory"),
                ],
            ),
            (
                "Network, sent",
                [
                    self.demand.network.map_or_else(none, |network| network.to_string()),
                    limit(self.limits.net_egress, |rate: BitsPerSec| rate.to_string()),
                    force.map_or_else(none, granted),
                    usage.map_or_else(none, |usage| BitsPerSec(usage.egress_now_bps).to_string()),
                    held("net_egress"),
                ],
            ),
            (
                "IO",
                [
                    self.demand.storage_io.map_or_else(none, |io| io.to_string()),
                    limit(self.limits.storage_io, |io: shaper_core::units::Iops| io.to_string()),
                    force.map_or_else(none, |force| {
                        limit(force.storage_io, |io: shaper_core::units::Iops| io.to_string())
                    }),
                    none(),
                    held("storage_io"),
                ],
            ),
        ];
        for (resource, [request, limit, force, used, by]) in rows {
            html.raw("<tr><th scope=\"row\">").raw(resource).raw("</th>");
            html.text_cell("Request", request).text_cell("Limit", limit).text_cell("In force", force);
            html.text_cell("Used now", used).text_cell("Held by", by).raw("</tr>");
        }
        html.end_table();
        if let Some(status) = status {
            for note in status.oom_kill.iter().map(ToString::to_string).chain(status.notes.iter().cloned()) {
                html.raw("<p class=\"note\">").text(note).raw("</p>");
            }
        }
    }

    fn about(&self, html: &mut Html, now: UnixNanos) {
        html.raw("<dl><dt>Name</dt><dd>").text(&self.name).raw("</dd><dt>Namespace</dt><dd>");
        html.text(&self.namespace).raw("</dd><dt>Priority</dt><dd>").text(&self.priority);
        html.raw("</dd><dt>Owner</dt><dd>").text(&self.owner).raw("</dd><dt>Asks for</dt><dd>");
        html.text(&self.asked).raw("</dd><dt>Submitted</dt><dd>").when(self.submitted_at, now);
        html.raw("</dd><dt>Command</dt><dd><code>").text(self.command.join(" ")).raw("</code></dd>");
        if !self.labels.is_empty() {
            html.raw("<dt>Labels</dt><dd>");
            for (name, value) in &self.labels {
                html.raw("<code>").text(name).raw("=").text(value).raw("</code> ");
            }
            html.raw("</dd>");
        }
        html.raw("</dl>");
    }

    fn given(&self, html: &mut Html) {
        if self.settings.is_empty() {
            return;
        }
        html.raw("<h2>Policies</h2>")
            .table("What policies give it", &["Setting", "Policy", "Says", "Overruled"]);
        for Setting { setting, policy, says, overruled } in &self.settings {
            html.raw("<tr>")
                .text_cell("Setting", setting)
                .text_cell("Policy", policy)
                .text_cell("Says", says);
            html.text_cell("Overruled", overruled.join(", ")).raw("</tr>");
        }
        html.end_table();
    }

    fn decided(&self, html: &mut Html, now: UnixNanos) {
        html.raw("<h2>Decisions</h2>");
        let Some(decisions) = &self.decisions else {
            return empty(html, "Your role may not ask for explanations.");
        };
        if decisions.is_empty() {
            return empty(html, "Nothing was decided yet.");
        }
        html.table("Decisions, the latest first", &["When", "What", "By", "Why"]);
        for Decision { at, by, kind, reason, nodes } in decisions.iter().rev() {
            html.raw("<tr>").cell("When", |html| {
                html.when(*at, now);
            });
            html.text_cell("What", kind).text_cell("By", by).cell("Why", |html| {
                html.text(reason);
                if nodes.is_empty() {
                    return;
                }
                html.raw("<details><summary>").text(nodes.len()).raw(" nodes considered</summary><ul>");
                for verdict in nodes.iter().take(NODES) {
                    html.raw("<li>").text(&verdict.node).raw(": ");
                    match verdict.score {
                        Some(score) => {
                            html.text(format_args!("fits, score {score:.3}"));
                        }
                        None => {
                            html.text(verdict.lacking.join("; "));
                        }
                    }
                    html.raw("</li>");
                }
                html.raw("</ul></details>");
            });
            html.raw("</tr>");
        }
        html.end_table();
    }
}
