//! A view as lines on a screen of some size. Colours and weights only repeat what the text says.

use ratatui::{
    Frame,
    style::{Color, Style, Stylize},
    text::{Line, Span},
    widgets::Paragraph,
};

use super::{
    columns::{Field, fields},
    detail, header,
    topic::{self, Topic},
    view::{Link, View},
};
use crate::{args::SortKey, output::Column};

/// How text is set off.
#[derive(Clone, Copy)]
pub(super) struct Theme {
    pub(super) colours: bool,
}

impl Theme {
    fn colour(self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }

    fn alarm(self) -> Style {
        self.colour(Color::Red).bold().reversed()
    }

    fn notice(self) -> Style {
        self.colour(Color::Yellow).bold()
    }

    fn trouble(self) -> Style {
        self.colour(Color::Yellow)
    }
}

const HELP: [&str; 12] = [
    "q, Esc, Ctrl-C     quit",
    "arrows, j, k       select a task; Home and End the first and the last",
    "PgUp, PgDn         scroll the detail, or ten tasks further",
    "Enter              show or hide all that is known of the selected task",
    "c m i n w a        sort by CPU, memory, IO, network, run-queue wait, name",
    "space              pause; once more goes on",
    "Ctrl-L             draw everything anew",
    "",
    "-     nothing on this kernel measures it, or there has been no second yet",
    "none  it did not happen in the last second, so it has no delay",
    "PSI   share of the last 10 s in which some task, and in which all of them, waited",
    "? or Esc leaves this help.",
];

/// Draws all of it. What was scrolled past the end of the detail is scrolled to its end.
pub(super) fn draw(frame: &mut Frame<'_>, view: &mut View, theme: Theme) {
    let area = frame.area();
    let (width, height) = (usize::from(area.width), usize::from(area.height));
    let Screen { lines, scrolled } = screen(view, theme, width, height);
    view.scrolled = scrolled;
    frame.render_widget(Paragraph::new(lines), area);
}

struct Screen {
    lines: Vec<Line<'static>>,
    scrolled: usize,
}

/// The lines of the screen, at most `height`.
fn screen(view: &View, theme: Theme, width: usize, height: usize) -> Screen {
    let mut lines = above(view, theme, width, height);
    let room = height.saturating_sub(lines.len() + 1);
    let middle = if view.help {
        Screen { lines: help(), scrolled: view.scrolled }
    } else {
        tasks_and_detail(view, theme, width, room)
    };
    lines.extend(middle.lines.into_iter().take(room));
    lines.resize(height.saturating_sub(1), Line::default());
    lines.push(footer(view));
    Screen { lines, scrolled: middle.scrolled }
}

/// What is left for the table and the footer, however much there is to say of the node.
const LINES_FOR_TASKS: usize = 6;

/// The node, and whatever is wrong. What is wrong is never cut for want of room; the node may be.
fn above(view: &View, theme: Theme, width: usize, height: usize) -> Vec<Line<'static>> {
    let mut warnings: Vec<Line<'static>> = Vec::new();
    if let Some(notice) = notice(view.link) {
        let lines = topic::lines(&[notice], header::INDENT, width);
        warnings.extend(lines.into_iter().map(|line| Line::styled(line, theme.notice())));
    }
    let Some(snapshot) = view.snapshot() else { return warnings };
    if let Some(alarm) = header::alarm(&snapshot.health) {
        let lines = topic::lines(&[alarm], header::INDENT, width);
        warnings.extend(lines.into_iter().map(|line| Line::styled(line, theme.alarm())));
    }
    let room = height.saturating_sub(warnings.len() + LINES_FOR_TASKS).max(1);
    let node = topic::lines(&header::node(snapshot), header::INDENT, width);
    let mut lines: Vec<Line<'static>> = node.into_iter().take(room).map(Line::from).collect();
    lines.extend(warnings);
    lines
}

fn notice(link: Link) -> Option<Topic> {
    const OLD: &str = "these are its last figures";
    let items = match link {
        Link::Fresh => return None,
        Link::Waiting => vec!["waiting for the first figures of the agent".into()],
        Link::Silent(time) => vec![format!("no news from the agent for {} s", time.as_secs()), OLD.into()],
        Link::Away(time) => vec![
            format!("the agent went away {} s ago", time.as_secs()),
            OLD.into(),
            "connecting again".into(),
            "if it stays away, start `shaper-agent`".into(),
        ],
    };
    Some(Topic::new("!!", items))
}

fn help() -> Vec<Line<'static>> {
    std::iter::once("").chain(HELP).map(Line::from).collect()
}

fn tasks_and_detail(view: &View, theme: Theme, width: usize, room: usize) -> Screen {
    let whole = |lines| Screen { lines, scrolled: 0 };
    let Some(snapshot) = view.snapshot() else { return whole(Vec::new()) };
    let readings = view.readings();
    let Some(selected) = readings.get(view.position()) else { return whole(vec![Line::from("no tasks")]) };
    if !view.detail {
        return whole(table(view, theme, width, room));
    }
    let detail = topic::lines(&detail::task(snapshot, selected.task), detail::INDENT, width);
    // Two thirds are for the detail, and what the table does not need.
    let spare = room.saturating_sub(readings.len() + 2);
    let pane = (detail.len() + 1).min(spare.max(room * 2 / 3));
    let mut lines = table(view, theme, width, room - pane);
    lines.resize(room - pane, Line::default());
    let below = pane.saturating_sub(1);
    let first = view.scrolled.min(detail.len().saturating_sub(below));
    let title = match detail.len() - first {
        rest if rest > below => {
            format!("── {} ── {} lines more: PgDn ──", selected.task.task_id, rest - below)
        }
        _ => format!("── {} ──", selected.task.task_id),
    };
    lines.push(Line::from(title).bold());
    lines.extend(detail.into_iter().skip(first).map(Line::from));
    Screen { lines, scrolled: first }
}

/// Room before each column; before the first, it is for the mark of the selected task.
const GAP: usize = 2;

/// The table, with those columns and those tasks for which there is room.
fn table(view: &View, theme: Theme, width: usize, height: usize) -> Vec<Line<'static>> {
    let readings = view.readings();
    let body = height.saturating_sub(1);
    let first = view.position().saturating_sub(body / 2).min(readings.len().saturating_sub(body));
    let columns: Vec<(&'static Field, Vec<String>, usize)> = fields(view.wide)
        .into_iter()
        .map(|field| {
            let cells: Vec<String> = readings.iter().map(|reading| (field.cell)(reading)).collect();
            let longest = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or_default();
            let width = longest.max(field.width).max(field.column.name().len());
            (field, cells, width)
        })
        .collect();
    let kept =
        kept(&columns.iter().map(|(field, _, width)| (field.importance, *width)).collect::<Vec<_>>(), width);
    let columns: Vec<_> =
        columns.iter().zip(kept).filter(|(_, kept)| *kept).map(|(column, _)| column).collect();

    let mut lines = Vec::with_capacity(height);
    let head: Vec<Span<'static>> = columns
        .iter()
        .flat_map(|(field, _, width)| cell(field, field.column.name(), *width, Style::new()))
        .collect();
    lines.push(Line::from(head).bold());
    for index in (first..readings.len()).take(body) {
        let is_selected = index == view.position();
        let mut spans = Vec::new();
        for (field, cells, width) in &columns {
            let text = &cells[index];
            let trouble = field.is_trouble && text.contains(|letter| matches!(letter, '1'..='9'));
            let style = if trouble { theme.trouble() } else { Style::new() };
            spans.extend(cell(field, text, *width, style));
        }
        if is_selected && let Some(mark) = spans.first_mut() {
            *mark = Span::raw("> ");
        }
        let line = Line::from(spans);
        lines.push(if is_selected { line.reversed() } else { line });
    }
    lines
}

/// The text of a cell, with the space before it.
fn cell(field: &Field, text: &str, width: usize, style: Style) -> [Span<'static>; 2] {
    let text = match field.column {
        Column::Text(_) => format!("{text:<width$}"),
        Column::Number(_) => format!("{text:>width$}"),
    };
    [Span::raw(" ".repeat(GAP)), Span::styled(text, style)]
}

/// Which of the columns there is room for: the least important ones are left out, and what stands first never is.
fn kept(columns: &[(u8, usize)], width: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..columns.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(columns[*index].0));
    let mut kept = vec![false; columns.len()];
    let mut used = 0;
    for (rank, index) in order.into_iter().enumerate() {
        used += GAP + columns[index].1;
        if rank > 0 && used > width {
            break;
        }
        kept[index] = true;
    }
    kept
}

fn footer(view: &View) -> Line<'static> {
    let sorted = match view.sort {
        SortKey::Cpu => "CPU",
        SortKey::Memory => "memory",
        SortKey::Io => "IO",
        SortKey::Net => "network",
        SortKey::Wait => "run-queue wait",
        SortKey::Name => "name",
    };
    let count = view.readings().len();
    let place = if count == 0 { 0 } else { view.position() + 1 };
    let paused = if view.paused { "PAUSED (space goes on)  " } else { "" };
    Line::from(format!(
        "{paused}task {place} of {count}  by {sorted} (c m i n w a)  Enter detail  ? help  q quit"
    ))
    .reversed()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use ratatui::{
        Terminal,
        backend::TestBackend,
        buffer::Buffer,
        crossterm::event::{KeyCode, KeyEvent},
        style::Modifier,
    };
    use shaper_core::snapshot::NodeSnapshot;

    use super::{super::fixture, *};

    fn view(snapshot: NodeSnapshot) -> View {
        let mut view = View::new(SortKey::Cpu, false);
        view.link = Link::Fresh;
        view.update(Arc::new(snapshot));
        view
    }

    fn drawn(view: &mut View, width: u16, height: u16, colours: bool) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view, Theme { colours })).unwrap();
        terminal.backend().buffer().clone()
    }

    /// The screen as text.
    fn text(view: &mut View, width: u16, height: u16) -> String {
        let buffer = drawn(view, width, height, true);
        let symbols: Vec<&str> = buffer.content.iter().map(|cell| cell.symbol()).collect();
        let lines = symbols.chunks(usize::from(width)).map(|line| line.concat());
        lines.map(|line| format!("{}\n", line.trim_end())).collect()
    }

    fn press(view: &mut View, key: impl Into<KeyEvent>) {
        view.key(key.into());
    }

    #[test]
    fn a_broad_screen_has_every_column() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself
  TASK           CPU  THROTTLED  RUNQ P50/P99  PREEMPT/S         MEMORY      MEM PSI    READ/S   WRITE/S   IOPS R/W   IO P99 R/W         NET OUT    NET IN  RTT P99  RETRANS
> etl         1.98/2      12.3%    12µs/1.2ms         12  120MiB/512MiB   1.20/0.04%     12MiB      4MiB     120/50   800µs/25ms  9.8Mbit/10Mbit   128kbit    2.1ms        7
  web       0.25/max       0.0%      5µs/42ms          3       3GiB/max   0.00/0.00%        0B        0B        0/0         none     250Mbit/max    30Mbit     none        0
  idle         0/max       0.0%          none          0       1MiB/max   0.00/0.00%        0B        0B        0/0         none        0bit/max      0bit     none        0



task 1 of 3  by CPU (c m i n w a)  Enter detail  ? help  q quit
";
        assert_eq!(text(&mut view(fixture::snapshot()), 190, 14), expected);
    }

    #[test]
    fn a_narrow_screen_keeps_what_matters_most() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others
         12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself
  TASK           CPU  THROTTLED  RUNQ P50/P99         MEMORY    READ/S   WRITE/S
> etl         1.98/2      12.3%    12µs/1.2ms  120MiB/512MiB     12MiB      4MiB
  web       0.25/max       0.0%      5µs/42ms       3GiB/max        0B        0B
  idle         0/max       0.0%          none       1MiB/max        0B        0B


task 1 of 3  by CPU (c m i n w a)  Enter detail  ? help  q quit
";
        assert_eq!(text(&mut view(fixture::snapshot()), 80, 14), expected);
    }

    #[test]
    fn the_detail_is_below_and_scrolls() {
        let mut view = view(fixture::snapshot());
        press(&mut view, KeyCode::Enter);
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself
  TASK           CPU  THROTTLED  RUNQ P50/P99         MEMORY    READ/S   WRITE/S         NET OUT
> etl         1.98/2      12.3%    12µs/1.2ms  120MiB/512MiB     12MiB      4MiB  9.8Mbit/10Mbit
  web       0.25/max       0.0%      5µs/42ms       3GiB/max        0B        0B     250Mbit/max
  idle         0/max       0.0%          none       1MiB/max        0B        0B        0bit/max

── etl ── 9 lines more: PgDn ──
Task         etl (attempt 2)  uid 1000, gid 100
Limits       cpu 2  cpu_weight 300  memory 512 MiB  net_egress 10 Mbit/s  storage_io max
             storage_io_weight as found  storage_io_latency max
CPU          1.98/2 cores  12.345 s in all  throttled 12.3%
             PSI some 25.10% full 0.00%, 2.510 s / 0.000 s in all
Switches     1200 a second  preempted 30  of those by others 12
Run queue    p50/p99 12µs/1.2ms of 1234
Memory       120MiB/512MiB  peak 256MiB  OOM kills 0
             PSI some 1.20% full 0.04%, 0.120 s / 0.004 s in all
Sent         9.8Mbit/10Mbit  984 packets a second  9.3MiB in 9840 packets in all  congestion marks 9
Received     128kbit  12 packets a second  125KiB in 128 packets in all  congestion marks 0
By uplinks   8.5MiB in 9000 packets in all
Held back    datagrams 1.9MiB in 1400 packets in all  TCP 0B in 0 packets in all
TCP          round trip p50/p99 400µs/2.1ms of 50  retransmits 7  drops 0
IO           PSI some 3.00% full 0.50%, 0.300 s / 0.050 s in all
  nvme0n1    259:0
             read 12MiB/s in 120 operations, p50/p99 90µs/800µs of 120, 12GiB in 120000 in all
task 1 of 3  by CPU (c m i n w a)  Enter detail  ? help  q quit
";
        assert_eq!(text(&mut view, 100, 30), expected);
        press(&mut view, KeyCode::PageDown);
        let end = text(&mut view, 100, 30);
        assert!(end.contains("── etl ──\n") && end.contains("IO operations not charged\n"), "{end}");
        press(&mut view, KeyCode::PageDown);
        assert_eq!(text(&mut view, 100, 30), end);
        press(&mut view, KeyCode::PageUp);
        assert_eq!(text(&mut view, 100, 30), expected);
    }

    #[test]
    fn what_is_wrong_is_said_in_words_and_set_off() {
        let mut view = view(fixture::poor_snapshot());
        view.link = Link::Away(Duration::from_millis(12_300));
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  1 task
CPU      3.25 of 8 busy  PSI -
Memory   12GiB of 32GiB in use  PSI -
IO       PSI -
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory from cgroup files: the kernel counts that itself  IO from cgroup files: no program for that runs here
         run queue, IO latency not measured: no program for that runs here
         pressure not measured: the kernel does not count that here  see `shaper doctor`
!!       the agent went away 12 s ago  these are its last figures  connecting again
         if it stays away, start `shaper-agent`
!!       MEASUREMENT DEGRADED  12 events lost: they came faster than they were read
         3 cgroups without an entry: the table is full, they are found by a walk
         5 IO operations not charged: the table is full
  TASK           CPU  THROTTLED  RUNQ P50/P99         MEMORY      MEM PSI    READ/S   WRITE/S         NET OUT    NET IN
> bare        1.98/2          -             -       -/512MiB            -     12MiB      3MiB  9.8Mbit/10Mbit   128kbit




task 1 of 1  by CPU (c m i n w a)  Enter detail  ? help  q quit
";
        assert_eq!(text(&mut view, 120, 20), expected);
        let buffer = drawn(&mut view, 120, 20, true);
        let at = |row| buffer.cell((0, row)).unwrap().style();
        assert_eq!(at(8).fg, Some(Color::Yellow));
        assert_eq!(at(10).fg, Some(Color::Red));
        let plain = drawn(&mut view, 120, 20, false);
        let coloured = plain.content.iter().filter(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        assert_eq!(coloured.count(), 0);
        assert!(plain.cell((0, 10)).unwrap().modifier.contains(Modifier::REVERSED | Modifier::BOLD));
    }

    #[test]
    fn help_takes_the_place_of_the_tasks() {
        let mut view = view(fixture::snapshot());
        press(&mut view, KeyCode::Char('?'));
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself

q, Esc, Ctrl-C     quit
arrows, j, k       select a task; Home and End the first and the last
PgUp, PgDn         scroll the detail, or ten tasks further
Enter              show or hide all that is known of the selected task
c m i n w a        sort by CPU, memory, IO, network, run-queue wait, name
space              pause; once more goes on
Ctrl-L             draw everything anew

-     nothing on this kernel measures it, or there has been no second yet
none  it did not happen in the last second, so it has no delay
PSI   share of the last 10 s in which some task, and in which all of them, waited
? or Esc leaves this help.




task 1 of 3  by CPU (c m i n w a)  Enter detail  ? help  q quit
";
        assert_eq!(text(&mut view, 100, 24), expected);
    }

    #[test]
    fn no_size_is_too_small_and_the_selected_task_is_always_there() {
        let mut many = fixture::snapshot();
        let task = many.tasks[0].clone();
        many.tasks = (0..100)
            .map(|number| {
                let mut task = task.clone();
                task.task_id = format!("t{number:02}").parse().unwrap();
                task
            })
            .collect();
        let mut view = view(many);
        for (presses, id) in [(0, "> t00"), (57, "> t57"), (99, "> t99")] {
            for _ in 0..presses {
                press(&mut view, KeyCode::Down);
            }
            assert!(text(&mut view, 80, 24).contains(id), "{id}");
            press(&mut view, KeyCode::Home);
        }
        for keys in ["", "?"] {
            keys.chars().for_each(|key| press(&mut view, KeyCode::Char(key)));
            press(&mut view, KeyCode::Enter);
            for (width, height) in [(1, 1), (1, 50), (200, 1), (200, 2), (10, 3), (30, 5), (7, 7)] {
                text(&mut view, width, height);
            }
        }
    }

    #[test]
    fn before_the_first_figures_it_says_what_it_waits_for() {
        let mut view = View::new(SortKey::Cpu, false);
        assert!(text(&mut view, 80, 4).starts_with("!!       waiting for the first figures of the agent\n"));
    }
}
