//! The latest decisions about all tasks, and those that come.

use shaper_core::spec::Decision;

use crate::{
    args::{GetEvents, TableFormat},
    client::Broker,
    cluster::Event,
    error::Error,
    output::{self, Column, Ledger, printable},
    time::{Span, Utc},
};

pub(in crate::commands) async fn events(broker: &Broker, args: &GetEvents) -> Result<(), Error> {
    let oldest = args.since.map_or(0, Span::ago);
    let is_wanted = |Event { task_id, decision, .. }: &Event| {
        decision.at >= oldest
            && (args.tasks.is_empty() || args.tasks.contains(task_id))
            && (args.kinds.is_empty() || args.kinds.contains(&decision.kind))
    };
    if !args.watch {
        let mut events = broker.events().await?;
        events.retain(is_wanted);
        return match args.output {
            TableFormat::Json => output::print_json(&events),
            TableFormat::Yaml => output::print_yaml(&events),
            TableFormat::Table | TableFormat::Wide if events.is_empty() => {
                output::remark("nothing of that kind was decided since the broker began to lead");
                Ok(())
            }
            TableFormat::Table | TableFormat::Wide => {
                output::print(&output::table(COLUMNS, events.iter().map(|event| row(event, args.output))))
            }
        };
    }
    let mut follow = broker.follow_events();
    let mut ledger = Ledger::new(COLUMNS);
    loop {
        let (events, missed) = follow.next().await?;
        if missed > 0 {
            output::warn(&format!(
                "{missed} decisions were missed: they came faster than they could be shown"
            ));
        }
        for event in events.iter().filter(|event| is_wanted(event)) {
            match args.output {
                TableFormat::Json => output::print_json_line(event)?,
                TableFormat::Yaml => output::print_yaml_document(event)?,
                TableFormat::Table | TableFormat::Wide => {
                    output::print(&ledger.line(&row(event, args.output)))?;
                }
            }
        }
    }
}

const COLUMNS: [Column; 5] = [
    Column::Text("TIME"),
    Column::Text("TASK"),
    Column::Text("WHAT"),
    Column::Text("BY"),
    Column::Text("WHY"),
];

fn row(Event { task_id, decision, .. }: &Event, format: TableFormat) -> [String; 5] {
    let Decision { at, by, kind, reason, nodes: _ } = decision;
    let at = match format {
        TableFormat::Wide => format!("{:.3}", Utc(*at)),
        _ => Utc(*at).to_string(),
    };
    [at, task_id.to_string(), kind.to_string(), printable(by), printable(reason)]
}
