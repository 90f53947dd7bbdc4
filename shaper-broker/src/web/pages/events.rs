//! The latest decisions, of all tasks that may be seen.

use shaper_core::{spec::DecisionKind, task::UnixNanos};

use super::{Page, Trouble, empty};
use crate::{
    actor::View,
    reactor::shown::Noted,
    web::{Viewer, Wanted, html::Html},
};

/// Decisions that are shown.
const EVENTS: usize = 100;

/// The latest decisions.
pub(in crate::web) struct Events {
    events: Vec<Noted>,
    kind: Option<String>,
}

impl Page for Events {
    const MENU: &'static str = "/events";

    fn title(&self) -> String {
        "Events".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<Events, Trouble> {
        if !viewer.may("ExplainTask") {
            return Err(Trouble::Denied);
        }
        let kind = wanted.query.get("kind").map(str::to_owned);
        let is_seen = |noted: &&Noted| match view.state.tasks.get(&noted.task) {
            Some(row) => viewer.sees(&row.task),
            // It is forgotten, and whose it was with it.
            None => viewer.sees_all(),
        };
        let is_wanted = |noted: &&Noted| kind.as_ref().is_none_or(|kind| *kind == noted.kind.to_string());
        let decisions = view.state.shown.decisions();
        let events = decisions.filter(is_wanted).filter(is_seen).take(EVENTS).cloned().collect();
        Ok(Events { events, kind })
    }

    fn still(&self, html: &mut Html) {
        html.raw(
            "<form class=\"filter\" method=\"get\" action=\"/events\"><label>Kind <select name=\"kind\">",
        );
        html.raw("<option value=\"\">any</option>");
        for kind in DecisionKind::ALL {
            html.raw("<option");
            if self.kind.as_ref().is_some_and(|chosen| *chosen == kind.to_string()) {
                html.raw(" selected");
            }
            html.raw(">").text(kind).raw("</option>");
        }
        html.raw("</select></label><button>Filter</button></form>");
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        if self.events.is_empty() {
            return empty(
                html,
                "Nothing was decided since this broker began to lead, or nothing of that kind.",
            );
        }
        html.table("Decisions, the latest first", &["When", "Task", "What", "By", "Why"]);
        for Noted { number: _, task, at, by, kind, reason } in &self.events {
            html.raw("<tr>").cell("When", |html| {
                html.when(*at, now);
            });
            html.cell("Task", |html| {
                html.link("tasks", task.as_str());
            });
            html.text_cell("What", kind).text_cell("By", by).text_cell("Why", reason).raw("</tr>");
        }
        html.end_table();
    }
}
