//! `shaper explain`: why a task is where it is.

use std::fmt::Write as _;

use shaper_core::spec::{Decision, NodeVerdict};

use crate::{
    args::{Explain, Format},
    client::Broker,
    error::Error,
    output::{self, printable},
    time::Utc,
};

pub(super) async fn explain(broker: &Broker, args: &Explain) -> Result<(), Error> {
    let decisions = broker.explain(&args.id).await?;
    match args.output {
        Format::Json => output::print_json(&decisions),
        Format::Yaml => output::print_yaml(&decisions),
        Format::Text if decisions.is_empty() => {
            output::remark(&format!("nothing was decided about task {} yet", args.id));
            Ok(())
        }
        Format::Text => output::print(&text(&decisions)),
    }
}

/// A line for each decision, and below it one for each node that was considered.
fn text(decisions: &[Decision]) -> String {
    let mut text = String::new();
    let by_width = decisions.iter().map(|decision| printable(&decision.by).chars().count()).max();
    let (by_width, kind_width) = (by_width.unwrap_or(0), "cancelled".len());
    for Decision { at, by, kind, reason, nodes } in decisions {
        let (by, reason) = (printable(by), printable(reason));
        // Writing to a String does not fail.
        let _ = writeln!(text, "{:.3}  {by:by_width$}  {kind:kind_width$}  {reason}", Utc(*at));
        let node_width = nodes.iter().map(|verdict| printable(&verdict.node).chars().count()).max();
        let node_width = node_width.unwrap_or(0);
        for verdict in nodes {
            let node = printable(&verdict.node);
            let _ = writeln!(text, "    {node:node_width$}  {}", printable(&judged(verdict)));
        }
    }
    text
}

fn judged(verdict: &NodeVerdict) -> String {
    let NodeVerdict { node: _, score, lacking, not_checked } = verdict;
    let mut judged = match score {
        Some(score) => format!("fits, score {score:.3}"),
        None if lacking.is_empty() => "does not fit".into(),
        None => format!("does not fit: {}", lacking.join("; ")),
    };
    if !not_checked.is_empty() {
        let _ = write!(judged, " (not checked: {})", not_checked.join(", "));
    }
    judged
}

#[cfg(test)]
mod tests {
    use shaper_core::spec::DecisionKind;

    use super::*;

    #[test]
    fn decisions_are_a_timeline_with_the_nodes_that_were_judged() {
        let verdict = |node: &str, score, lacking: &[&str], not_checked: &[&str]| NodeVerdict {
            node: node.into(),
            score,
            lacking: lacking.iter().map(ToString::to_string).collect(),
            not_checked: not_checked.iter().map(ToString::to_string).collect(),
        };
        let decisions = [
            Decision {
                at: 1_500_000_000,
                by: "broker".into(),
                kind: DecisionKind::Placed,
                reason: "n1 has the highest score".into(),
                nodes: vec![
                    verdict("n1", Some(0.8125), &[], &["storage_io"]),
                    verdict("node-2", None, &["cpu: wants 4 cores, 2 are free", "memory: …"], &[]),
                ],
            },
            Decision {
                at: 2_000_000_000,
                by: "n1".into(),
                kind: DecisionKind::Shrunk,
                reason: "cpu 4 → 2 \u{1b}[31m".into(),
                nodes: vec![],
            },
        ];
        let expected = r"1970-01-01T00:00:01.500Z  broker  placed     n1 has the highest score
    n1      fits, score 0.812 (not checked: storage_io)
    node-2  does not fit: cpu: wants 4 cores, 2 are free; memory: …
1970-01-01T00:00:02.000Z  n1      shrunk     cpu 4 → 2 \u{1b}[31m
";
        assert_eq!(text(&decisions), expected);
    }
}
