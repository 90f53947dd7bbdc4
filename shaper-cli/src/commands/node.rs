//! `shaper node`: whether a node takes tasks, and what an operator knows of it that the broker cannot.

use std::collections::HashSet;

use shaper_proto::v1;

use crate::{
    args::NodeCommand,
    client::Broker,
    cluster::ClusterPhase,
    error::Error,
    output::{self, Column},
    progress::Progress,
    time,
};

pub(super) async fn node(broker: &Broker, args: &NodeCommand) -> Result<(), Error> {
    let text = match args {
        NodeCommand::Fence { node } => fenced(node, &broker.fence_node(node).await?),
        NodeCommand::Cordon { node } => {
            broker.cordon_node(node, v1::NodeWish::Cordoned, false).await?;
            format!("node {node} takes no more tasks\n")
        }
        NodeCommand::Uncordon { node } => {
            broker.cordon_node(node, v1::NodeWish::Open, false).await?;
            format!("node {node} takes tasks\n")
        }
        NodeCommand::Drain { node, dry_run, wait } => {
            let tasks = broker.cordon_node(node, v1::NodeWish::Drained, *dry_run).await?;
            output::print(&drained(node, &tasks, *dry_run, time::now()))?;
            if !*wait {
                return Ok(());
            }
            until_left(broker, node, tasks).await?;
            format!("node {node} has none of them any more\n")
        }
        NodeCommand::Remove { node } => {
            broker.remove_node(node).await?;
            format!("node {node} is forgotten\n")
        }
    };
    output::print(&text)
}

/// Returns when none of these tasks is on a node.
async fn until_left(broker: &Broker, node: &str, tasks: Vec<v1::LeavingTask>) -> Result<(), Error> {
    let total = tasks.len() as u64;
    let mut left: HashSet<String> = tasks.into_iter().map(|task| task.task_id).collect();
    let progress = Progress::of(&format!("tasks have left {node}:"), total);
    let mut watch = broker.watch(None);
    while !left.is_empty() {
        let task = watch.next().await?;
        let is_there = match &task.phase {
            ClusterPhase::Starting { node: on } | ClusterPhase::Running { node: on } => on == node,
            ClusterPhase::Pending { .. } | ClusterPhase::Ended { .. } | ClusterPhase::Cancelled => false,
        };
        if !is_there && left.remove(task.spec.profile.task_id.as_str()) {
            progress.at(total - left.len() as u64, total);
        }
    }
    Ok(())
}

fn fenced(node: &str, tasks: &[String]) -> String {
    match tasks {
        [] => format!("node {node} had no tasks\n"),
        tasks => format!("node {node} had {}: to be placed again\n", output::printable(&tasks.join(", "))),
    }
}

/// `CPU TIME` is what is lost of a task that does not keep what it has done.
const COLUMNS: [Column; 5] = [
    Column::Text("TASK"),
    Column::Text("PRIORITY"),
    Column::Number("THERE FOR"),
    Column::Number("CPU TIME"),
    Column::Text("GOES TO"),
];

fn drained(node: &str, tasks: &[v1::LeavingTask], dry_run: bool, now: u64) -> String {
    let seconds = |nanos: u64| nanos as f64 / 1e9;
    let rows = tasks.iter().map(|task| {
        let priority = shaper_proto::convert::priority_or_medium("priority", task.priority);
        [
            output::printable(&task.task_id),
            priority.map_or_else(|_| "-".into(), |priority| priority.to_string()),
            task.since_unix_nanos.map_or_else(|| "-".into(), |since| time::age(since, now)),
            format!("{:.1}s", seconds(task.cpu_nanos)),
            if task.goes_to.is_empty() { "waits".into() } else { task.goes_to.clone() },
        ]
    });
    let total: u64 = tasks.iter().map(|task| task.cpu_nanos).sum();
    let waits = tasks.iter().filter(|task| task.goes_to.is_empty()).count();
    let verb = if dry_run { "would be" } else { "is" };
    let summary = match tasks.len() {
        0 => format!("node {node} {verb} drained: it has no tasks\n"),
        count => {
            let tasks = if count == 1 { "task" } else { "tasks" };
            let verb_of_waits = if waits == 1 { "fits" } else { "fit" };
            format!(
                "node {node} {verb} drained of {count} {tasks}, {waits} of which {verb_of_waits} nowhere else now; {:.1} s of CPU \
                 time have been used so far\n",
                seconds(total)
            )
        }
    };
    if tasks.is_empty() { summary } else { format!("{}{summary}", output::table(COLUMNS, rows)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_what_becomes_of_which_tasks() {
        assert_eq!(fenced("n1", &["a".into(), "b".into()]), "node n1 had a, b: to be placed again\n");
        assert_eq!(fenced("n1", &[]), "node n1 had no tasks\n");
    }

    #[test]
    fn the_cost_of_a_drain_is_said_before_it_is_done() {
        let task = |id: &str, goes_to: &str| v1::LeavingTask {
            task_id: id.into(),
            priority: v1::Priority::Low.into(),
            since_unix_nanos: Some(0),
            cpu_nanos: 1_500_000_000,
            goes_to: goes_to.into(),
        };
        let text = drained("n1", &[task("a", "n2"), task("b", "")], true, 60_000_000_000);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("n2") && lines[2].contains("waits") && lines[1].contains("1.5s"), "{text}");
        assert_eq!(
            lines[3],
            "node n1 would be drained of 2 tasks, 1 of which fits nowhere else now; 3.0 s of CPU time have been used so far"
        );
        assert_eq!(drained("n1", &[], false, 0), "node n1 is drained: it has no tasks\n");
    }
}
