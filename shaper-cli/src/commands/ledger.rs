//! `shaper ledger`: what was done to tasks, by whom, why, and what came of it.

use shaper_core::ledger::{Entry, Kind, KnobChange, Outcome};

use crate::{
    args::{Ledger, TableFormat},
    client::Client,
    error::Error,
    output::{self, Column},
    time::{Span, Utc},
};

pub(super) async fn ledger(client: &Client, args: &Ledger) -> Result<(), Error> {
    let since = args.since.map_or(0, Span::ago);
    let (entries, notes) = client.ledger(args.id.as_ref(), since).await?;
    for note in notes {
        output::remark(&format!("shaper: {note}"));
    }
    match args.output {
        TableFormat::Json => output::print_json(&entries),
        TableFormat::Yaml => output::print_yaml(&entries),
        TableFormat::Table | TableFormat::Wide if entries.is_empty() => {
            output::remark("nothing is in the ledger");
            Ok(())
        }
        TableFormat::Table => output::print(&table(&entries)),
        TableFormat::Wide => output::print(&wide(&entries)),
    }
}

const COLUMNS: [Column; 6] = [
    Column::Text("TIME"),
    Column::Text("TASK"),
    Column::Text("WHO"),
    Column::Text("CHANGE"),
    Column::Text("OUTCOME"),
    Column::Text("REASON"),
];

fn row(entry: &Entry) -> [String; 6] {
    [
        format!("{:.3}", Utc(entry.at)),
        entry.execution.task.to_string(),
        entry.cause.actor.to_string(),
        changes(entry),
        outcome(entry).into(),
        entry.cause.reason.clone(),
    ]
}

fn table(entries: &[Entry]) -> String {
    output::table(COLUMNS, entries.iter().map(row))
}

fn wide(entries: &[Entry]) -> String {
    let [time, task, who, change, outcome, reason] = COLUMNS;
    let columns = [
        Column::Number("NUMBER"),
        time,
        task,
        Column::Number("ATTEMPT"),
        Column::Number("OWNER"),
        who,
        Column::Text("KIND"),
        change,
        outcome,
        Column::Text("ERROR"),
        reason,
    ];
    let rows = entries.iter().map(|entry| {
        let [time, task, who, change, outcome, reason] = row(entry);
        let error = match &entry.outcome {
            Outcome::RolledBack(why) | Outcome::Failed(why) => why.clone(),
            Outcome::Done | Outcome::Unknown => "-".into(),
        };
        let (number, attempt) = (entry.number.to_string(), entry.execution.attempt.to_string());
        let owner = entry.owner.uid.to_string();
        [number, time, task, attempt, owner, who, kind(entry.kind).into(), change, outcome, error, reason]
    });
    output::table(columns, rows)
}

fn changes(entry: &Entry) -> String {
    if entry.changes.is_empty() {
        return "nothing had to be turned".into();
    }
    let change = |KnobChange { knob, before, after }: &KnobChange| format!("{knob}: {before} → {after}");
    entry.changes.iter().map(change).collect::<Vec<_>>().join("; ")
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Standing => "standing",
        Kind::Transient => "transient",
        Kind::Release => "release",
        Kind::Summary => "summary",
        Kind::SecondWriter => "second writer",
    }
}

fn outcome(entry: &Entry) -> &'static str {
    match entry.outcome {
        Outcome::Done => "done",
        Outcome::RolledBack(_) => "rolled back",
        Outcome::Failed(_) => "failed",
        Outcome::Unknown => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::{
        ledger::{Actor, Cause},
        task::Owner,
    };

    use super::*;

    #[test]
    fn an_entry_is_a_line() {
        let change = |knob: &str, before: &str, after: &str| KnobChange {
            knob: knob.into(),
            before: before.into(),
            after: after.into(),
        };
        let entry = Entry {
            number: 7,
            at: 1_500_000_000,
            execution: "etl.2".parse().unwrap(),
            owner: Owner { uid: 1000, gid: 100 },
            kind: Kind::Standing,
            cause: Cause::new(Actor::User(0), "set"),
            changes: vec![change("cpu", "max", "0.5 cores"), change("memory", "max", "1 GiB")],
            outcome: Outcome::RolledBack("no\u{1b}[2J".into()),
        };
        let shown = table(std::slice::from_ref(&entry));
        let line = shown.lines().nth(1).unwrap();
        let expected = "1970-01-01T00:00:01.500Z  etl   uid 0  cpu: max → 0.5 cores; memory: max → 1 GiB  rolled back  set";
        assert_eq!(line.trim_end(), expected);
        let wide = wide(&[entry]);
        assert!(
            wide.contains("standing") && wide.contains("no\\u{1b}[2J") && !wide.contains('\u{1b}'),
            "{wide}"
        );
    }
}
