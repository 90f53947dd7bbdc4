//! Groups of nodes that are started and ended: how each stands, who waits for it, and what happened.

use shaper_core::{place::Needs, scale::Note, task::UnixNanos};

use super::{Page, Trouble, empty, needs};
use crate::{
    actor::View,
    reactor::scale::{GroupView, order_text},
    web::{Viewer, Wanted, html::Html},
};

/// Kinds of waiting task that are shown.
const WAITS: usize = 50;
/// Of each group, the latest.
const NOTES: usize = 10;

struct Shown {
    name: String,
    provider: &'static str,
    has: String,
    bounds: (u32, u32),
    target: Option<u32>,
    here: u32,
    coming: u32,
    leaving: usize,
    state: String,
    is_well: bool,
    notes: Vec<Note>,
}

/// The groups.
pub(in crate::web) struct Scale {
    groups: Vec<Shown>,
    waits: Vec<(String, usize, String)>,
}

impl Shown {
    fn of(view: GroupView<'_>, now: UnixNanos) -> Shown {
        let GroupView { group, standing, capacity, .. } = view;
        let rests = standing.resting(now).map(|until| until.saturating_sub(now) / 1_000_000_000);
        let (state, is_well) = match (&standing.order, rests, &standing.problem) {
            (Some(order), _, _) => (format!("asked: {}", order_text(order)), true),
            (None, Some(seconds), problem) => {
                let problem = problem.as_deref().unwrap_or("it failed");
                (format!("left alone for {seconds} s: {problem}"), false)
            }
            (None, None, Some(problem)) => (problem.clone(), false),
            (None, None, None) => ("ready".to_owned(), true),
        };
        Shown {
            name: group.name.clone(),
            provider: group.provider.kind(),
            has: capacity.map_or_else(
                || "not known".to_owned(),
                |capacity| format!("{} cores, {}", capacity.cpu, capacity.memory),
            ),
            bounds: (group.min, group.max),
            target: standing.target,
            here: standing.registered,
            coming: standing.coming(standing.registered),
            leaving: standing.leaving.len(),
            state,
            is_well,
            notes: standing.notes.iter().rev().take(NOTES).cloned().collect(),
        }
    }
}

impl Page for Scale {
    const MENU: &'static str = "/scale";

    fn title(&self) -> String {
        "Scale-out".to_owned()
    }

    fn look(view: &View<'_>, viewer: &Viewer, _wanted: &Wanted) -> Result<Scale, Trouble> {
        if !viewer.may("GetScale") {
            return Err(Trouble::Denied);
        }
        let groups = view.state.scale_groups().map(|group| Shown::of(group, view.now)).collect();
        let waits = view.state.scale.told.iter().take(WAITS);
        let waits = waits.map(|((demand, gpus), told)| {
            (needs(Needs { gpus, ..Needs::of(demand) }), told.tasks, told.text.clone())
        });
        Ok(Scale { groups, waits: waits.collect() })
    }

    fn show(&self, html: &mut Html, now: UnixNanos) {
        if self.groups.is_empty() {
            return empty(
                html,
                "This broker has no nodes started and ended: <code>shaper-broker --scale FILE</code>, as docs/scaling.md says.",
            );
        }
        html.table(
            "Groups of nodes, in the order in which they are asked",
            &["Group", "A node has", "Here", "Coming", "Leaving", "Target", "State"],
        );
        for group in &self.groups {
            html.raw("<tr><th scope=\"row\">").text(&group.name).raw(" (").raw(group.provider).raw(")</th>");
            html.text_cell("A node has", &group.has).text_cell("Here", group.here);
            html.text_cell("Coming", group.coming).text_cell("Leaving", group.leaving);
            let (min, max) = group.bounds;
            let target = group.target.map_or_else(|| "not known".to_owned(), |target| target.to_string());
            html.text_cell("Target", format_args!("{target}, of {min} to {max}"));
            html.cell("State", |html| {
                if group.is_well {
                    html.text(&group.state);
                } else {
                    html.raw("<strong>").text(&group.state).raw("</strong>");
                }
            });
            html.raw("</tr>");
        }
        html.end_table();
        html.raw("<h2>Who waits</h2>");
        if self.waits.is_empty() {
            empty(html, "No task has fitted nowhere for long enough that nodes would be asked for.");
        } else {
            html.table(
                "Tasks that fit nowhere, by what they ask for",
                &["Ask for", "Tasks", "What becomes of them"],
            );
            for (asks, tasks, text) in &self.waits {
                html.raw("<tr>").text_cell("Ask for", asks).text_cell("Tasks", tasks);
                html.text_cell("What becomes of them", text).raw("</tr>");
            }
            html.end_table();
        }
        html.raw("<h2>What happened</h2>");
        html.table("The latest of each group", &["Group", "When", "What"]);
        for group in &self.groups {
            for note in &group.notes {
                html.raw("<tr>").text_cell("Group", &group.name).cell("When", |html| {
                    html.when(note.at, now);
                });
                html.text_cell("What", &note.text).raw("</tr>");
            }
        }
        html.end_table();
    }
}
