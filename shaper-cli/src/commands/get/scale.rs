//! Groups of nodes that are started and ended as tasks need them, and who waits for them.

use shaper_core::task::UnixNanos;

use super::{cpu, memory, or_dash};
use crate::{
    args::{GetScale, TableFormat},
    client::Broker,
    cluster::{EmptiableNode, Scale, ScaleGroup},
    error::Error,
    output::{self, Column},
    time::{self, Utc},
};

pub(in crate::commands) async fn scale(broker: &Broker, args: &GetScale) -> Result<(), Error> {
    let scale = broker.scale().await?;
    match args.output {
        TableFormat::Json => output::print_json(&scale),
        TableFormat::Yaml => output::print_yaml(&scale),
        TableFormat::Table | TableFormat::Wide if scale.groups.is_empty() => {
            output::remark("no groups of nodes: the broker has none to start and end (--scale)");
            Ok(())
        }
        format => output::print(&text(&scale, format == TableFormat::Wide, time::now())),
    }
}

const COLUMNS: [Column; 8] = [
    Column::Text("GROUP"),
    Column::Text("PROVIDER"),
    Column::Text("NODES"),
    Column::Text("A NODE HAS"),
    Column::Number("HERE"),
    Column::Number("COMING"),
    Column::Number("TARGET"),
    Column::Text("STATE"),
];

fn text(scale: &Scale, wide: bool, now: UnixNanos) -> String {
    let mut text = output::table(COLUMNS, scale.groups.iter().map(|group| row(group, now)));
    for wait in &scale.waits {
        let demand = format!("{} cores, {}", wait.demand.cpu, wait.demand.memory);
        text.push_str(&format!(
            "{} wait for {demand}: {}\n",
            tasks(wait.tasks),
            output::printable(&wait.text)
        ));
    }
    if wide {
        for group in &scale.groups {
            text.push_str(&format!("\n{}:\n", group.name));
            for idle in &group.idle {
                text.push_str(&format!(
                    "  nothing runs on {} for {}\n",
                    idle.node,
                    time::age(idle.since, now)
                ));
            }
            if let Some(EmptiableNode { node, tasks: count, cpu_ns, goes_to }) = &group.emptiable {
                let seconds = cpu_ns / 1_000_000_000;
                text.push_str(&format!(
                    "  {node} could be given back: its {} would fit on {}, and {seconds} s of CPU time be lost at most: \
                     shaper node drain {node}\n",
                    tasks(*count),
                    goes_to.join(", "),
                ));
            }
            for note in &group.notes {
                text.push_str(&format!("  {} {}\n", Utc(note.at), output::printable(&note.text)));
            }
        }
    }
    text
}

fn tasks(count: u32) -> String {
    if count == 1 { "1 task".into() } else { format!("{count} tasks") }
}

fn row(group: &ScaleGroup, now: UnixNanos) -> [String; 8] {
    let has = group.capacity.map(|it| format!("{} cores, {}", cpu(it.cpu), memory(it.memory)));
    [
        group.name.clone(),
        group.provider.clone(),
        group.nodes.clone(),
        or_dash(has),
        group.registered.to_string(),
        group.coming.to_string(),
        format!("{} of {}–{}", or_dash(group.target), group.min, group.max),
        state(group, now),
    ]
}

fn state(group: &ScaleGroup, now: UnixNanos) -> String {
    match (&group.order, group.rests_until, &group.problem) {
        (Some(order), _, _) => format!("Asked: {}", output::printable(&order.text)),
        (None, Some(until), problem) => {
            let seconds = until.saturating_sub(now) / 1_000_000_000;
            format!(
                "Resting for {seconds} s: {}",
                output::printable(problem.as_deref().unwrap_or("it failed"))
            )
        }
        (None, None, Some(problem)) => output::printable(problem),
        (None, None, None) if !group.leaving.is_empty() => format!("Ending: {}", group.leaving.join(", ")),
        (None, None, None) if group.coming > 0 => "Growing".into(),
        (None, None, None) => "Ready".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ScaleNote, ScaleOrder};

    fn group() -> ScaleGroup {
        ScaleGroup {
            name: "workers".into(),
            provider: "exec".into(),
            nodes: "w*".into(),
            capacity: None,
            min: 0,
            max: 4,
            target: Some(2),
            registered: 1,
            coming: 1,
            leaving: Vec::new(),
            order: None,
            rests_until: None,
            failures: 0,
            problem: None,
            notes: vec![ScaleNote { at: 0, text: "asked for 1 more: 2 in all".into() }],
            idle: Vec::new(),
            emptiable: None,
        }
    }

    #[test]
    fn a_group_is_a_line_and_what_happened_is_below() {
        let text = text(&Scale { groups: vec![group()], waits: Vec::new() }, true, 0);
        let lines: Vec<_> = text.lines().collect();
        let [_, row, _, name, note] = lines[..] else { panic!("{text}") };
        assert!(row.contains("2 of 0–4") && row.contains("Growing"), "{row}");
        assert_eq!(name, "workers:");
        assert!(note.starts_with("  1970-01-01") && note.ends_with("asked for 1 more: 2 in all"), "{note}");
    }

    #[test]
    fn what_could_be_given_back_is_said_with_its_cost() {
        let (node, goes_to) = ("w7".to_owned(), vec!["w1".to_owned(), "w2".to_owned()]);
        let emptiable = Some(EmptiableNode { node, tasks: 3, cpu_ns: 120_900_000_000, goes_to });
        let text =
            text(&Scale { groups: vec![ScaleGroup { emptiable, ..group() }], waits: Vec::new() }, true, 0);
        let said = "  w7 could be given back: its 3 tasks would fit on w1, w2, and 120 s of CPU time be lost at most: shaper node \
                    drain w7\n";
        assert!(text.contains(said), "{text}");
    }

    #[test]
    fn what_keeps_it_from_growing_is_its_state() {
        let order = ScaleOrder { number: 1, at: 0, target: 3, text: "1 more, for 2 tasks".into() };
        assert_eq!(state(&ScaleGroup { order: Some(order), ..group() }, 0), "Asked: 1 more, for 2 tasks");
        let problem = Some("no quota".to_owned());
        let resting = ScaleGroup { rests_until: Some(31_000_000_000), problem: problem.clone(), ..group() };
        assert_eq!(state(&resting, 1_000_000_000), "Resting for 30 s: no quota");
        assert_eq!(state(&ScaleGroup { problem, ..group() }, 0), "no quota");
    }
}
