//! The whole life of a task that is over, as a trace: how long it waited and for what, on which nodes it was, and each
//! decision about it.

use shaper_core::{
    spec::{Decision, DecisionKind},
    task::ExitStatus,
};
use shaper_metrics::traces::{KeyValue, Moment, Period};

use crate::reactor::{Phase, state::TaskRow};

/// The life of a task, if that is over. Of the decisions, the row has the latest.
pub(crate) fn life(row: &TaskRow) -> Option<Period> {
    let TaskRow { task, decisions } = row;
    let last = decisions.back().map(|decision| decision.at);
    let (to, failure) = match &task.phase {
        Phase::Ended { status, at } => (*at, failure(status)),
        Phase::Cancelled => (last?, None),
        Phase::Pending { .. } | Phase::Nominated { .. } | Phase::Starting { .. } | Phase::Running { .. } => {
            return None;
        }
    };
    let (spec, owner, submission) = (task.spec(), task.owner(), &task.submission);
    let about = [
        ("shaper.task.id", task.id().to_string()),
        ("shaper.task.name", spec.name.clone()),
        ("shaper.task.namespace", spec.namespace.clone()),
        ("shaper.task.priority", spec.profile.priority.to_string()),
        ("shaper.task.attempts", task.attempt.to_string()),
        ("enduser.id", owner.uid.to_string()),
    ];
    let about = about.map(|(key, value)| KeyValue::new(key, value)).to_vec();
    let moments = decisions.iter().map(moment).collect();
    let mut parts = parts(submission.submitted_at, to, decisions.iter());
    if let (Some(node), Some(last)) = (&task.node, parts.iter_mut().rfind(|part| part.name == ON_A_NODE)) {
        last.about.push(KeyValue::new("shaper.node", node.clone()));
    }
    let name = "task".to_owned();
    Some(Period { name, from: submission.submitted_at, to, failure, about, moments, parts })
}

fn failure(status: &ExitStatus) -> Option<String> {
    match status {
        ExitStatus::Code(0) => None,
        ExitStatus::Code(code) => Some(format!("exit code {code}")),
        ExitStatus::Signal(signal) => Some(format!("signal {signal}")),
        ExitStatus::NotStarted { stage, error, code: _ } => Some(format!("not started: {stage}: {error}")),
        ExitStatus::Unknown => Some("nobody saw its end".to_owned()),
    }
}

fn moment(decision: &Decision) -> Moment {
    let Decision { at, by, kind, reason, nodes: _ } = decision;
    let about = [("shaper.decision.by", by), ("shaper.decision.reason", reason)];
    let about = about.map(|(key, value)| KeyValue::new(key, value.clone())).to_vec();
    Moment { at: *at, name: kind.to_string(), about }
}

const ON_A_NODE: &str = "on a node";

/// In turn it waits and is on a node. It has left one when it waits again or is on another: a node that is lost may be back with
/// it, and who is asked to end has not ended yet.
fn parts<'a>(from: u64, to: u64, decisions: impl Iterator<Item = &'a Decision>) -> Vec<Period> {
    let mut parts: Vec<Period> = Vec::new();
    let waits = |from| Period { name: "waits".to_owned(), from, ..Period::default() };
    let (mut now, mut why) = (waits(from), None);
    for Decision { at, kind, reason, .. } in decisions {
        let next = match kind {
            DecisionKind::Placed => Period { name: ON_A_NODE.to_owned(), from: *at, ..Period::default() },
            DecisionKind::Pending if now.name == ON_A_NODE => waits(*at),
            DecisionKind::Evicted | DecisionKind::Refused | DecisionKind::Lost => {
                why = Some(reason.clone());
                continue;
            }
            DecisionKind::Pending
            | DecisionKind::ScaleOut
            | DecisionKind::Grew
            | DecisionKind::Shrunk
            | DecisionKind::Reclaimed
            | DecisionKind::Ended
            | DecisionKind::Cancelled => continue,
        };
        (now.to, now.failure) = (*at, why.take());
        parts.push(std::mem::replace(&mut now, next));
    }
    now.to = to;
    // What began when it was over is none.
    parts.extend((now.to > now.from).then_some(now));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(at: u64, kind: DecisionKind) -> Decision {
        Decision { at, by: "broker".into(), kind, reason: format!("because of {at}"), nodes: Vec::new() }
    }

    #[test]
    fn it_waits_and_is_on_nodes_in_turn() {
        let decisions = [
            decision(2, DecisionKind::Pending),
            decision(5, DecisionKind::Placed),
            decision(6, DecisionKind::Grew),
            decision(7, DecisionKind::Evicted),
            decision(9, DecisionKind::Pending),
            decision(11, DecisionKind::Placed),
            decision(12, DecisionKind::Lost),
            decision(14, DecisionKind::Grew),
            decision(20, DecisionKind::Ended),
        ];
        let parts = parts(1, 20, decisions.iter());
        let shown: Vec<_> = parts.iter().map(|it| (it.name.as_str(), it.from, it.to)).collect();
        let expected = [("waits", 1, 5), ("on a node", 5, 9), ("waits", 9, 11), ("on a node", 11, 20)];
        assert_eq!(shown, expected);
        let failures: Vec<_> = parts.iter().map(|it| it.failure.as_deref()).collect();
        assert_eq!(failures, [None, Some("because of 7"), None, None], "the lost node was back with it");
    }
}
