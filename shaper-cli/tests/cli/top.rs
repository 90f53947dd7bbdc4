//! What a node uses: as a table, as JSON, and on a terminal.

use std::io::BufReader;

use rustix::process::Signal;
use shaper_core::{
    snapshot::{Health, NodeSnapshot, TaskSnapshot},
    units::Millicores,
};

use crate::{
    fake::{Call, snapshot},
    host::{Host, line, texts},
    terminal::{Ended, Terminal},
};

/// The first column below the header of the table.
fn tasks(table: &str) -> Vec<&str> {
    let rows = table.lines().skip_while(|line| !line.starts_with("TASK ")).skip(1);
    rows.filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn once_is_a_table_below_the_node() {
    let host = Host::new();
    let _agent = host.start_agent();
    let output = host.shaper(&["top", "--once"]);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stderr, code), ("", Some(0)));
    assert!(
        stdout.starts_with("Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks\n"),
        "{stdout}"
    );
    assert_eq!(tasks(stdout), ["etl", "web", "idle"]);
    assert!(!stdout.contains("!!"), "{stdout}");

    host.node.measure(snapshot::poor_snapshot());
    let output = host.shaper(&["top", "--once"]);
    assert!(texts(&output).0.contains("!!       MEASUREMENT DEGRADED  12 events lost"), "{output:?}");

    host.node.measure(NodeSnapshot { tasks: vec![], ..snapshot::snapshot() });
    let output = host.shaper(&["top", "--once"]);
    assert!(texts(&output).0.ends_with("\n\nno tasks\n"), "{output:?}");
}

#[test]
fn the_order_is_the_callers() {
    let host = Host::new();
    let _agent = host.start_agent();
    for (key, order) in [
        ("cpu", ["etl", "web", "idle"]),
        ("memory", ["web", "etl", "idle"]),
        ("io", ["etl", "idle", "web"]),
        ("net", ["web", "etl", "idle"]),
        ("wait", ["web", "etl", "idle"]),
        ("name", ["etl", "idle", "web"]),
    ] {
        let output = host.shaper(&["top", "--once", "--sort", key]);
        assert_eq!(tasks(texts(&output).0), order, "{key}");
    }
}

#[test]
fn json_is_the_snapshot_itself() {
    let host = Host::new();
    let _agent = host.start_agent();
    for snapshot in [snapshot::snapshot(), snapshot::poor_snapshot()] {
        host.node.measure(snapshot.clone());
        let output = host.shaper(&["top", "--once", "-o", "json"]);
        assert_eq!(serde_json::from_slice::<NodeSnapshot>(&output.stdout).unwrap(), snapshot);
    }
}

#[test]
fn json_goes_on_with_an_object_a_line_across_restarts_of_the_agent() {
    let host = Host::new();
    let agent = host.start_agent();
    let mut top = host.spawn(&["top", "-o", "json"]);
    let next = |output: &mut BufReader<_>| serde_json::from_str::<NodeSnapshot>(&line(output)).unwrap();
    assert_eq!(next(&mut top.stdout), snapshot::snapshot());
    let second = NodeSnapshot { cpu_now: Millicores(1), ..snapshot::snapshot() };
    host.node.measure(second.clone());
    assert_eq!(next(&mut top.stdout), second);

    drop(agent);
    assert_eq!(line(&mut top.stderr), "shaper: the agent went away; waiting for it to come back\n");
    let _agent = host.start_agent();
    assert_eq!(next(&mut top.stdout), second);
}

#[test]
fn who_has_no_terminal_is_told_what_to_do() {
    let host = Host::new();
    let _agent = host.start_agent();
    let said = "shaper: standard output is not a terminal on which figures can be drawn anew: use `shaper top --once` \
                for one table, or `shaper top -o json` for an object a second\n";
    for args in [&["top"][..], &["top", "-o", "wide"]] {
        assert_eq!(texts(&host.shaper(args)), ("", said, Some(2)));
    }
}

fn start(host: &Host) -> Terminal {
    let terminal = Terminal::start(host.command(&["top"]), 190, 30);
    terminal.await_text("> etl");
    terminal
}

#[test]
fn on_a_terminal_it_follows_the_node_and_the_keys() {
    let host = Host::new();
    let _agent = host.start_agent();
    let mut terminal = start(&host);
    terminal.press("m");
    terminal.await_text("by memory");
    terminal.await_text("> web");
    terminal.press("j\r");
    terminal.await_text("── etl ──");
    terminal.await_text("  nvme0n1    259:0");

    terminal.press(" ");
    terminal.await_text("PAUSED");
    host.node.measure(NodeSnapshot { cpu_now: Millicores(7125), ..snapshot::snapshot() });
    terminal.press("?");
    terminal.await_text("Ctrl-C");
    terminal.press("? ");
    terminal.await_text("7.125 of 8 busy");

    terminal.resize(60, 20);
    terminal.await_screen("fewer columns", |screen| screen.contains("> etl") && !screen.contains("RETRANS"));
    terminal.press("q");
    assert_eq!(terminal.end().quietly(), Some(0));
}

#[test]
fn an_agent_that_goes_away_is_awaited_with_its_last_figures_on_the_screen() {
    let host = Host::new();
    let agent = host.start_agent();
    let mut terminal = start(&host);
    drop(agent);
    terminal.await_text("the agent went away");
    terminal.await_text("> etl");
    let health = Health { io_uncounted: 5, ..snapshot::snapshot().health };
    host.node.measure(NodeSnapshot { health, ..snapshot::snapshot() });
    let _agent = host.start_agent();
    terminal.await_text("MEASUREMENT DEGRADED  5 IO operations not charged");
    terminal.await_screen("no notice", |screen| !screen.contains("went away"));
    terminal.press("\u{3}");
    assert_eq!(terminal.end().quietly(), Some(0));
}

#[test]
fn a_signal_gives_the_terminal_back() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let host = Host::new();
        let _agent = host.start_agent();
        let terminal = start(&host);
        terminal.signal(signal);
        assert_eq!(terminal.end().quietly(), Some(code));
    }
}

#[test]
fn who_wants_no_colours_gets_none() {
    let host = Host::new();
    let _agent = host.start_agent();
    for (no_color, coloured) in [("", true), ("1", false)] {
        let mut command = host.command(&["top"]);
        command.env("NO_COLOR", no_color);
        let mut terminal = Terminal::start(command, 190, 30);
        terminal.await_text("> etl");
        terminal.press("q");
        assert_eq!(terminal.end(), Ended { code: Some(0), said: String::new(), coloured });
    }
}

#[test]
fn a_terminal_that_nobody_reads_can_be_left() {
    let host = Host::new();
    let mut many = snapshot::snapshot();
    let task = many.tasks[0].clone();
    let named = |number| TaskSnapshot { task_id: format!("t{number}").parse().unwrap(), ..task.clone() };
    many.tasks = (0..500).map(named).collect();
    host.node.measure(many);
    let _agent = host.start_agent();
    // More is drawn at once than a pty holds, of which this much is read.
    let mut terminal = Terminal::start_unread(host.command(&["top", "-o", "wide"]), 500, 500, 8192);
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.end_unread(), Some(143));
}

#[test]
fn an_agent_that_refuses_ends_it_with_its_words_and_the_terminal_is_given_back() {
    let host = Host::new();
    host.node.refuse_snapshots();
    let _agent = host.start_agent();
    let terminal = Terminal::start(host.command(&["top"]), 80, 24);
    let said = "shaper: cannot read what the node uses: nobody measures here";
    let Ended { code, said: found, .. } = terminal.end();
    assert_eq!((code, found.as_str()), (Some(2), said));
    assert_eq!(host.node.calls(), [Call::WatchSnapshots]);
}
