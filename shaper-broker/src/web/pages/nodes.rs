//! The nodes, and one of them.

use shaper_core::task::UnixNanos;

use super::{Page, ROWS, TAKEN, Taken, Trouble, empty, tasks::Row};
use crate::{
    actor::View,
    web::{Viewer, Wanted, html::Html},
};

/// A page of nodes, in the order of registration.
pub(in crate::web) struct Nodes {
    nodes: Vec<Taken>,
    of: usize,
    from: usize,
}

impl Page for Nodes {
    const MENU: &'static str = "/nodes";

    fn title(&self) -> String {
        "Nodes".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<Nodes, Trouble> {
        if !viewer.may("ListNodes") {
            return Err(Trouble::Denied);
        }
        let from = wanted.query.number("from").and_then(|from| usize::try_from(from).ok()).unwrap_or(0);
        let nodes = view.state.nodes_in_order().skip(from).take(ROWS).map(|node| Taken::of(view, node));
        Ok(Nodes { nodes: nodes.collect(), of: view.state.nodes.len(), from })
    }

    fn show(&self, html: &mut Html, _now: UnixNanos) {
        if self.of == 0 {
            return empty(
                html,
                "No node has connected yet. Start an agent on one: <code>shaper-agent --broker …</code>",
            );
        }
        if self.nodes.is_empty() {
            empty(html, "There are fewer nodes than that.");
        } else {
            html.table("Nodes: what is reserved, and what is in use", &TAKEN);
            for node in &self.nodes {
                node.row(html);
            }
            html.end_table();
        }
        html.raw("<nav class=\"paging\" aria-label=\"Paging\">");
        if self.from > 0 {
            let before = self.from.saturating_sub(ROWS);
            html.raw("<a rel=\"prev\"")
                .attribute("href", format_args!("/nodes?from={before}"))
                .raw(">Before</a>");
        }
        let to = self.from.saturating_add(self.nodes.len());
        html.raw("<span>").text(format_args!("{to} of {}", self.of)).raw("</span>");
        if to < self.of {
            html.raw("<a rel=\"next\"").attribute("href", format_args!("/nodes?from={to}")).raw(">Next</a>");
        }
        html.raw("</nav>");
    }
}

/// A node, with those of its tasks that may be seen.
pub(in crate::web) struct NodePage {
    node: Taken,
    boot_id: String,
    agent_socket: String,
    tasks: Vec<Row>,
    more: bool,
}

impl Page for NodePage {
    const MENU: &'static str = "/nodes";

    fn title(&self) -> String {
        format!("Node {}", self.node.name)
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<NodePage, Trouble> {
        if !viewer.may("ListNodes") {
            return Err(Trouble::Denied);
        }
        let node = view.state.nodes.get(&wanted.name).ok_or_else(|| Trouble::NoNode(wanted.name.clone()))?;
        let seen =
            node.tasks.iter().filter_map(|id| view.state.tasks.get(id)).filter(|row| viewer.sees(&row.task));
        let mut tasks: Vec<_> = seen.take(ROWS + 1).map(|row| Row::of(&row.task)).collect();
        let more = tasks.len() > ROWS;
        tasks.truncate(ROWS);
        Ok(NodePage {
            node: Taken::of(view, node),
            boot_id: node.row.boot_id.clone(),
            agent_socket: node.row.agent_socket.clone(),
            tasks,
            more,
        })
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        if !self.node.is_connected {
            html.raw("<p class=\"trouble\">Its agent is not connected: its tasks run on there, as far as is known, and ");
            html.raw("nothing new is placed. If it is dead, say so: <code>shaper node fence ")
                .text(&self.node.name);
            html.raw("</code></p>");
        }
        html.table("What is reserved, and what is in use", &TAKEN);
        self.node.row(html);
        html.end_table();
        html.raw("<dl><dt>Agent</dt><dd><code>")
            .text(&self.agent_socket)
            .raw("</code></dd><dt>Boot</dt><dd><code>");
        html.text(&self.boot_id).raw("</code></dd></dl><h2>Tasks</h2>");
        if self.tasks.is_empty() {
            return empty(html, "No task of yours is on it.");
        }
        Row::begin(html, "Tasks on this node");
        for row in &self.tasks {
            row.write(html, now);
        }
        html.end_table();
        if self.more {
            let address = format!("/tasks?node={}", super::super::html::Encoded(&self.node.name));
            html.raw("<nav class=\"paging\"><a").attribute("href", address).raw(">All of them</a></nav>");
        }
    }
}
