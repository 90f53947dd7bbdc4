//! What the screen shows, and what keys do to it. Knows neither terminal nor clock.

use std::{sync::Arc, time::Duration};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use shaper_core::{id::TaskId, snapshot::NodeSnapshot};

use super::figures::Reading;
use crate::args::SortKey;

/// Whether there is news of the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Link {
    /// Nothing has come yet.
    #[default]
    Waiting,
    /// The figures are of now.
    Fresh,
    /// It is there and has said nothing for this long.
    Silent(Duration),
    /// It has been away for this long.
    Away(Duration),
}

/// What a key leads to beyond another view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Stay,
    /// Draw all of it: somebody else has written to the terminal.
    Repaint,
    Quit,
}

pub(super) struct View {
    pub(super) sort: SortKey,
    pub(super) wide: bool,
    pub(super) link: Link,
    pub(super) paused: bool,
    pub(super) help: bool,
    pub(super) detail: bool,
    /// Lines of the detail that are above its pane.
    pub(super) scrolled: usize,
    /// What is shown.
    shown: Option<Arc<NodeSnapshot>>,
    /// What came last; not yet shown while paused.
    latest: Option<Arc<NodeSnapshot>>,
    /// The task that somebody has gone to; it is followed wherever it is sorted to.
    selected: Option<TaskId>,
    /// Where the selection is, also once its task is gone.
    position: usize,
}

impl View {
    pub(super) fn new(sort: SortKey, wide: bool) -> View {
        View {
            sort,
            wide,
            link: Link::default(),
            paused: false,
            help: false,
            detail: false,
            scrolled: 0,
            shown: None,
            latest: None,
            selected: None,
            position: 0,
        }
    }

    pub(super) fn snapshot(&self) -> Option<&NodeSnapshot> {
        self.shown.as_deref()
    }

    /// The tasks in their order.
    pub(super) fn readings(&self) -> Vec<Reading<'_>> {
        self.snapshot().map(|snapshot| Reading::sorted(snapshot, self.sort)).unwrap_or_default()
    }

    /// Where the selected task is among them.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn update(&mut self, snapshot: Arc<NodeSnapshot>) {
        self.latest = Some(snapshot);
        if !self.paused {
            self.show_latest();
        }
    }

    fn show_latest(&mut self) {
        self.shown.clone_from(&self.latest);
        self.follow();
    }

    /// Finds the selected task where it is now; another one takes its place when it is gone.
    fn follow(&mut self) {
        let readings = self.readings();
        let found = readings.iter().position(|reading| Some(&reading.task.task_id) == self.selected.as_ref());
        let (position, last) = (found.unwrap_or(self.position), readings.len().saturating_sub(1));
        if found.is_none() && self.selected.is_some() {
            self.selected = None;
            self.scrolled = 0;
        }
        self.position = position.min(last);
    }

    fn select(&mut self, position: usize) {
        let readings = self.readings();
        let position = position.min(readings.len().saturating_sub(1));
        let selected = readings.get(position).map(|reading| reading.task.task_id.clone());
        if selected != self.selected {
            self.scrolled = 0;
        }
        (self.position, self.selected) = (position, selected);
    }

    fn sort(&mut self, key: SortKey) {
        self.sort = key;
        self.follow();
    }

    pub(super) fn key(&mut self, key: KeyEvent) -> Flow {
        const PAGE: usize = 10;
        if key.kind == KeyEventKind::Release {
            return Flow::Stay;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Flow::Quit,
                KeyCode::Char('l') => Flow::Repaint,
                _ => Flow::Stay,
            };
        }
        match key.code {
            KeyCode::Char('q') => return Flow::Quit,
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Esc => return Flow::Quit,
            KeyCode::Char('?') => self.help = !self.help,
            KeyCode::Char('c') => self.sort(SortKey::Cpu),
            KeyCode::Char('m') => self.sort(SortKey::Memory),
            KeyCode::Char('i') => self.sort(SortKey::Io),
            KeyCode::Char('n') => self.sort(SortKey::Net),
            KeyCode::Char('w') => self.sort(SortKey::Wait),
            KeyCode::Char('a') => self.sort(SortKey::Name),
            KeyCode::Char(' ') => {
                self.paused = !self.paused;
                if !self.paused {
                    self.show_latest();
                }
            }
            KeyCode::Enter => {
                self.detail = !self.detail;
                self.scrolled = 0;
                // The detail stays with its task.
                self.select(self.position);
            }
            KeyCode::Down | KeyCode::Char('j') => self.select(self.position + 1),
            KeyCode::Up | KeyCode::Char('k') => self.select(self.position.saturating_sub(1)),
            KeyCode::PageDown if self.detail => self.scrolled += PAGE,
            KeyCode::PageUp if self.detail => self.scrolled = self.scrolled.saturating_sub(PAGE),
            KeyCode::PageDown => self.select(self.position + PAGE),
            KeyCode::PageUp => self.select(self.position.saturating_sub(PAGE)),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        Flow::Stay
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture, *};

    fn view() -> View {
        let mut view = View::new(SortKey::Cpu, false);
        view.update(Arc::new(fixture::snapshot()));
        view
    }

    fn press(view: &mut View, keys: &str) {
        for key in keys.chars() {
            assert_eq!(view.key(KeyCode::Char(key).into()), Flow::Stay);
        }
    }

    fn selected(view: &View) -> &str {
        view.readings()[view.position()].task.task_id.as_str()
    }

    #[test]
    fn keys_end_it() {
        let control = |letter| KeyEvent::new(KeyCode::Char(letter), KeyModifiers::CONTROL);
        for key in [KeyCode::Char('q').into(), KeyCode::Esc.into(), control('c')] {
            assert_eq!(view().key(key), Flow::Quit);
        }
        assert_eq!(view().key(control('l')), Flow::Repaint);
        let mut view = view();
        press(&mut view, "?");
        assert_eq!((view.key(KeyCode::Esc.into()), view.help), (Flow::Stay, false));
    }

    #[test]
    fn the_selection_follows_its_task() {
        let mut view = view();
        press(&mut view, "j");
        assert_eq!(selected(&view), "web");
        press(&mut view, "m");
        assert_eq!((selected(&view), view.position()), ("web", 0));
        press(&mut view, "jjjj");
        assert_eq!(selected(&view), "idle", "the last");
        press(&mut view, "k");
        assert_eq!(selected(&view), "etl");
    }

    #[test]
    fn who_has_selected_nothing_stays_at_the_top() {
        let mut view = view();
        assert_eq!(selected(&view), "etl");
        press(&mut view, "n");
        assert_eq!(selected(&view), "web");
    }

    #[test]
    fn when_the_selected_task_is_gone_its_neighbour_is_selected() {
        let mut view = view();
        press(&mut view, "jj");
        let mut snapshot = fixture::snapshot();
        snapshot.tasks.retain(|task| task.task_id.as_str() != "idle");
        view.update(Arc::new(snapshot));
        assert_eq!(selected(&view), "web");
        view.update(Arc::new(NodeSnapshot { tasks: vec![], ..fixture::snapshot() }));
        press(&mut view, "jk");
        assert_eq!((view.position(), view.readings().len()), (0, 0));
    }

    #[test]
    fn paused_it_keeps_the_figures_and_then_shows_the_latest() {
        let mut view = view();
        press(&mut view, " ");
        view.update(Arc::new(NodeSnapshot { node: "n2".into(), ..fixture::snapshot() }));
        assert_eq!(view.snapshot().map(|snapshot| snapshot.node.as_str()), Some("n1"));
        press(&mut view, " ");
        assert_eq!(view.snapshot().map(|snapshot| snapshot.node.as_str()), Some("n2"));
    }
}
