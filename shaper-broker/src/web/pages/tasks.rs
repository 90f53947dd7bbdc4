//! The tasks, the latest first, filtered and in pages. A page begins where the last ended, so that it costs the same wherever
//! it is.

use std::fmt::Write;

use shaper_core::{id::TaskId, spec::Priority, task::UnixNanos, units::Bytes};

use super::{Page, ROWS, SCAN, Trouble, empty, needs, phase, phase_name};
use crate::{
    actor::View,
    reactor::{Phase, Task},
    web::{
        Viewer, Wanted,
        html::{Encoded, Html},
        query::Query,
    },
};

const PHASES: [&str; 5] = ["pending", "starting", "running", "ended", "cancelled"];
const PRIORITIES: [(&str, Priority); 3] =
    [("high", Priority::High), ("medium", Priority::Medium), ("low", Priority::Low)];

/// Which tasks.
#[derive(Clone, Debug, Default)]
struct Filter {
    phase: Option<String>,
    priority: Option<String>,
    namespace: Option<String>,
    node: Option<String>,
    text: Option<String>,
}

impl Filter {
    fn of(query: &Query) -> Filter {
        let text = |name: &str| query.get(name).map(str::to_owned);
        Filter {
            phase: text("phase"),
            priority: text("priority"),
            namespace: text("namespace"),
            node: text("node"),
            text: text("q"),
        }
    }

    fn passes(&self, task: &Task) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        let spec = task.spec();
        is(&self.phase, phase_name(&task.phase))
            && is(&self.namespace, &spec.namespace)
            && is(&self.node, task.node.as_deref().unwrap_or_default())
            && self.priority.as_ref().is_none_or(|wanted| {
                PRIORITIES.iter().any(|(name, priority)| name == wanted && *priority == task.priority())
            })
            && self.text.as_ref().is_none_or(|text| {
                task.id().as_str().contains(text.as_str()) || spec.name.contains(text.as_str())
            })
    }

    /// As it stands in an address, each with `&` before it.
    fn address(&self) -> String {
        let mut address = String::new();
        for (name, value) in self.fields() {
            // To write to a string does not fail.
            let _ = write!(address, "&{name}={}", Encoded(value));
        }
        address
    }

    fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("phase", &self.phase),
            ("priority", &self.priority),
            ("namespace", &self.namespace),
            ("node", &self.node),
            ("q", &self.text),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }
}

/// A task, in a line.
pub(super) struct Row {
    id: TaskId,
    namespace: String,
    name: String,
    priority: Priority,
    phase: &'static str,
    why: String,
    node: Option<String>,
    asked: String,
    used: Option<String>,
    submitted_at: UnixNanos,
}

impl Row {
    pub(super) fn of(task: &Task) -> Row {
        let spec = task.spec();
        let why = match &task.phase {
            Phase::Pending { reason, .. } => reason.clone(),
            Phase::Nominated { node } => format!("{node} is being cleared for it"),
            Phase::Ended { status, .. } => format!("code {}", status.shell_code()),
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Cancelled => String::new(),
        };
        let used = task.on_node.as_deref().filter(|_| matches!(task.phase, Phase::Running { .. }));
        Row {
            id: task.id().clone(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            priority: task.priority(),
            phase: phase_name(&task.phase),
            why,
            node: task.node.clone(),
            asked: needs(task.needs()),
            used: used.map(|status| {
                let cpu = shaper_core::units::Millicores(status.usage.cpu_now_millicores);
                match status.usage.memory_bytes {
                    Some(memory) => format!("{cpu} cores, {}", Bytes(memory)),
                    None => format!("{cpu} cores"),
                }
            }),
            submitted_at: task.submission.submitted_at,
        }
    }

    pub(super) fn begin(html: &mut Html, caption: &'static str) {
        html.table(
            caption,
            &["Task", "Phase", "Priority", "Namespace", "Node", "Asks for", "Uses", "Submitted"],
        );
    }

    pub(super) fn write(&self, html: &mut Html, now: UnixNanos) {
        html.raw("<tr>").cell("Task", |html| {
            html.link("tasks", self.id.as_str());
            if self.name != self.id.as_str() {
                html.raw(" <small>").text(&self.name).raw("</small>");
            }
        });
        html.cell("Phase", |html| {
            phase(html, self.phase);
            if !self.why.is_empty() {
                html.raw(" <small>").text(&self.why).raw("</small>");
            }
        });
        html.text_cell("Priority", self.priority).text_cell("Namespace", &self.namespace);
        html.cell("Node", |html| match &self.node {
            Some(node) => {
                html.link("nodes", node);
            }
            None => {
                html.raw("–");
            }
        });
        html.text_cell("Asks for", &self.asked);
        html.text_cell("Uses", self.used.as_deref().unwrap_or("–"));
        html.cell("Submitted", |html| {
            html.when(self.submitted_at, now);
        })
        .raw("</tr>");
    }
}

/// The tasks that pass.
pub(in crate::web) struct Tasks {
    filter: Filter,
    rows: Vec<Row>,
    is_first: bool,
    /// Where the next page begins, if there may be more.
    next: Option<u64>,
    /// Not as many as a page has were found among all that one page looks at.
    is_cut: bool,
}

impl Page for Tasks {
    const MENU: &'static str = "/tasks";

    fn title(&self) -> String {
        "Tasks".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<Tasks, Trouble> {
        if !viewer.may("ListClusterTasks") {
            return Err(Trouble::Denied);
        }
        let filter = Filter::of(&wanted.query);
        let before = wanted.query.number("before");
        let (mut rows, mut next, mut is_cut) = (Vec::with_capacity(ROWS), None, false);
        for (looked_at, (sequence, id)) in (0..).zip(view.state.shown.tasks_before(before)) {
            if rows.len() == ROWS || looked_at == SCAN {
                // Those before the one after the last that was looked at.
                next = Some(sequence.saturating_add(1));
                is_cut = rows.len() < ROWS;
                break;
            }
            let Some(row) = view.state.tasks.get(id) else { continue };
            if viewer.sees(&row.task) && filter.passes(&row.task) {
                rows.push(Row::of(&row.task));
            }
        }
        Ok(Tasks { filter, rows, is_first: before.is_none(), next, is_cut })
    }

    fn still(&self, html: &mut Html) {
        html.raw("<form class=\"filter\" method=\"get\" action=\"/tasks\" role=\"search\">");
        html.raw("<label>Name or id <input type=\"search\" name=\"q\"");
        html.attribute("value", self.filter.text.as_deref().unwrap_or_default()).raw("></label>");
        select(html, "Phase", "phase", self.filter.phase.as_deref(), PHASES);
        let priorities = PRIORITIES.map(|(name, _)| name);
        select(html, "Priority", "priority", self.filter.priority.as_deref(), priorities);
        html.raw("<label>Namespace <input name=\"namespace\"");
        html.attribute("value", self.filter.namespace.as_deref().unwrap_or_default()).raw("></label>");
        html.raw("<label>Node <input name=\"node\"");
        html.attribute("value", self.filter.node.as_deref().unwrap_or_default()).raw("></label>");
        html.raw("<button>Filter</button> <a href=\"/tasks\">All</a></form>");
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        if self.rows.is_empty() {
            match (self.filter.fields().next().is_some() || !self.is_first, self.is_cut) {
                (_, true) => {
                    empty(html, "None of those that were looked at passes the filter; there are older ones.")
                }
                (true, false) => empty(html, "No task passes this filter."),
                (false, false) => {
                    empty(html, "There are no tasks yet. Submit one: <code>shaper submit task.yaml</code>");
                }
            }
        } else {
            Row::begin(html, "Tasks, the latest first");
            for row in &self.rows {
                row.write(html, now);
            }
            html.end_table();
        }
        html.raw("<nav class=\"paging\" aria-label=\"Paging\">");
        let filter = self.filter.address();
        if !self.is_first {
            let address = format!("/tasks?{}", filter.trim_start_matches('&'));
            html.raw("<a").attribute("href", address).raw(">Latest</a>");
        }
        if let Some(next) = self.next {
            html.raw("<a rel=\"next\"").attribute("href", format_args!("/tasks?before={next}{filter}"));
            html.raw(">Older</a>");
        }
        html.raw("</nav>");
    }
}

fn select<const N: usize>(
    html: &mut Html,
    label: &'static str,
    name: &'static str,
    chosen: Option<&str>,
    options: [&'static str; N],
) {
    html.raw("<label>")
        .raw(label)
        .raw(" <select")
        .attribute("name", name)
        .raw("><option value=\"\">any</option>");
    for option in options {
        html.raw("<option");
        if chosen == Some(option) {
            html.raw(" selected");
        }
        html.raw(">").raw(option).raw("</option>");
    }
    html.raw("</select></label>");
}
