//! The cluster at a glance.

use std::collections::BTreeMap;

use shaper_core::task::UnixNanos;

use super::{Page, SCAN, TAKEN, Taken, Trouble, empty, phase, phase_name, tasks::Row};
use crate::{
    actor::View,
    reactor::{Lacks, Phase},
    web::{Viewer, Wanted, html::Html},
};

/// Ended or cancelled: not told apart where they are only counted.
const OVER: &str = "over";
/// Nodes that are shown.
const NODES: usize = 12;
/// Tasks that wait, and are shown.
const WAITING: usize = 10;

/// The cluster.
pub(in crate::web) struct Overview {
    /// How many tasks are in which phase.
    phases: BTreeMap<&'static str, usize>,
    /// What those that wait lack: for who sees all of them.
    lacks: Option<Lacks>,
    waiting: Vec<Row>,
    /// Not all tasks were looked at.
    is_cut: bool,
    nodes: Vec<Taken>,
    connected: usize,
    of: usize,
}

impl Page for Overview {
    const MENU: &'static str = "/";

    fn title(&self) -> String {
        "Overview".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, _wanted: &Wanted) -> Result<Overview, Trouble> {
        if !viewer.may("ListClusterTasks") || !viewer.may("ListNodes") {
            return Err(Trouble::Denied);
        }
        let state = view.state;
        let (mut phases, mut waiting, mut is_cut) = (BTreeMap::new(), Vec::new(), false);
        if viewer.sees_all() {
            let [nominated, starting, running] = state.assigned_tasks();
            let over = state.tasks.len().saturating_sub(state.open_tasks());
            for (name, count) in [
                ("pending", state.waiting_tasks() + nominated),
                ("starting", starting),
                ("running", running),
                (OVER, over),
            ] {
                phases.insert(name, count);
            }
        }
        for (looked_at, (_, id)) in (0..).zip(state.shown.tasks_before(None)) {
            let has_all =
                viewer.sees_all() && (waiting.len() == WAITING || state.waiting_tasks() == waiting.len());
            if has_all || looked_at == SCAN {
                is_cut = !has_all;
                break;
            }
            let Some(row) = state.tasks.get(id).filter(|row| viewer.sees(&row.task)) else { continue };
            if !viewer.sees_all() {
                *phases.entry(phase_name(&row.task.phase)).or_default() += 1;
            }
            if matches!(row.task.phase, Phase::Pending { .. }) && waiting.len() < WAITING {
                waiting.push(Row::of(&row.task));
            }
        }
        Ok(Overview {
            phases,
            lacks: viewer.sees_all().then(|| state.lacks()),
            waiting,
            is_cut,
            nodes: state.nodes_in_order().take(NODES).map(|node| Taken::of(view, node)).collect(),
            connected: state.nodes.values().filter(|node| node.session.is_some()).count(),
            of: state.nodes.len(),
        })
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        html.raw("<ul class=\"counts\" aria-label=\"Tasks by phase\">");
        for (name, count) in &self.phases {
            let address = if *name == OVER { "/tasks".to_owned() } else { format!("/tasks?phase={name}") };
            html.raw("<li><a").attribute("href", address).raw("><b>").text(count).raw("</b> ");
            phase(html, name);
            html.raw("</a></li>");
        }
        html.raw("<li><a href=\"/nodes\"><b>").text(self.connected).raw("</b> of ").text(self.of);
        html.raw(" nodes connected</a></li></ul>");

        html.raw("<h2>Nodes</h2>");
        if self.nodes.is_empty() {
            empty(
                html,
                "No node has connected yet. Start an agent on one: <code>shaper-agent --broker …</code>",
            );
        } else {
            html.table("What is reserved on the nodes, and what is in use", &TAKEN);
            for node in &self.nodes {
                node.row(html);
            }
            html.end_table();
            if self.of > self.nodes.len() {
                html.raw("<nav class=\"paging\"><a href=\"/nodes\">All ")
                    .text(self.of)
                    .raw(" nodes</a></nav>");
            }
        }

        html.raw("<h2>Waiting</h2>");
        if let Some(Lacks { nodes, large_nodes, room, backoff, unknown }) = self.lacks
            && nodes + large_nodes + room + backoff + unknown > 0
        {
            html.raw("<ul class=\"lacks\">");
            for (count, lack) in [
                (nodes, "for a node"),
                (large_nodes, "for a larger node than there is"),
                (room, "for room"),
                (backoff, "until they may go back to a node"),
                (unknown, "to be looked at"),
            ] {
                if count > 0 {
                    html.raw("<li>").text(count).raw(" ").raw(lack).raw("</li>");
                }
            }
            html.raw("</ul>");
        }
        if self.waiting.is_empty() {
            empty(html, "No task waits.");
        } else {
            Row::begin(html, "Tasks that wait, and why: the latest");
            for row in &self.waiting {
                row.write(html, now);
            }
            html.end_table();
        }
        if self.is_cut {
            html.raw("<p class=\"note\">Only the latest ").text(SCAN).raw(" tasks were looked at.</p>");
        }
    }
}
