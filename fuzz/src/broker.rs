//! What the broker keeps, and what it does with what it is told.

use std::collections::BTreeMap;

use prost::Message;
use shaper_broker::{
    reactor::{Event, SessionId, State, next_wakeup, on_event, rows::RowChange, state::DECISIONS},
    upkeep::backup::{Backup, sealed},
    wire,
};
use shaper_core::{
    spec::{Credentials, Policy, TaskSpec},
    task::UnixNanos,
};
use shaper_proto::v1;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

fn load(rows: &Rows) -> Option<State> {
    State::load(rows.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))).ok()
}

/// Lets something happen, as the broker does: what it writes is what it would find after a crash.
fn happens(state: &mut State, rows: &mut Rows, event: Event, now: UnixNanos) {
    let changed = on_event(state, event, now).rows;
    for RowChange { key, value } in changed.iter().map(|row| state.row(row)) {
        match value {
            Some(value) => drop(rows.insert(key.into_bytes(), value)),
            None => drop(rows.remove(key.as_bytes())),
        }
    }
    let found = load(rows).expect("what the broker writes it can read");
    assert_eq!(found.tasks.len(), state.tasks.len());
    for (id, row) in &found.tasks {
        let mut expected = state.tasks[id].clone();
        // How a task is that runs its node tells anew.
        let on_node = expected.task.on_node.take();
        expected.task.on_node = on_node.filter(|_| expected.task.phase.node().is_none());
        assert_eq!(*row, expected);
        assert!(row.decisions.len() <= DECISIONS);
    }
    assert_eq!(found.policies, state.policies);
    assert_eq!(found.policy_revisions, state.policy_revisions);
    assert_eq!(found.histories, state.histories);
    for (name, node) in &found.nodes {
        assert_eq!(node.reserved, state.nodes[name].reserved, "what is reserved on {name}");
        assert_eq!(node.cards, state.nodes[name].cards, "what of the cards of {name} is");
    }
    let _ = next_wakeup(state);
}

/// A store: of each row the length of its key in a byte, that of its value in two, key and value.
pub fn rows(data: &[u8]) {
    let mut rows = Rows::new();
    let mut rest = data;
    while let Some(([key, high, low], after)) = rest.split_first_chunk() {
        let (key, after) = after.split_at(usize::from(*key).min(after.len()));
        let value = usize::from(u16::from_be_bytes([*high, *low]));
        let (value, after) = after.split_at(value.min(after.len()));
        rest = after;
        rows.insert(key.to_owned(), value.to_owned());
    }
    let Some(mut state) = load(&rows) else { return };
    for history in state.histories.values() {
        let _ = history.measured();
    }
    // It is not only read, but gone on from.
    happens(&mut state, &mut rows, Event::Tick, 1_700_000_000_000_000_000);
}

/// The lines of a backup but for the last, which makes them whole: no mutation would ever find its sum.
pub fn backup(data: &[u8]) {
    assert!(Backup::decode(data).is_err(), "the sum is right, as if by chance");
    let file = sealed(data.to_vec());
    if let Ok(backup) = Backup::decode(&file) {
        assert_eq!(backup.encode().expect("what was read can be written"), file);
    }
}

/// Messages of clients and agents, one after the other: a kind, who, a length of two bytes, and so many.
pub fn reactor(data: &[u8]) {
    let (mut state, mut rows) = (State::default(), Rows::new());
    let mut rest = data;
    let mut now: UnixNanos = 1_700_000_000_000_000_000;
    let mut sessions = 0;
    // Each is followed by a load of everything.
    for _ in 0..24 {
        let Some(([kind, who, high, low], after)) = rest.split_first_chunk() else { break };
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (message, after) = after.split_at(length);
        rest = after;
        now += u64::from(*who) * 100_000_000;
        let caller = Credentials { uid: u32::from(*who % 3), gid: u32::from(*who % 3), groups: Vec::new() };
        let session = SessionId(u64::from(*who).min(sessions));
        let event = match kind % 8 {
            0 => v1::Hello::decode(message).ok().and_then(|hello| wire::hello(hello).ok()).map(|hello| {
                sessions += 1;
                Event::AgentConnected { session: SessionId(sessions), hello: Box::new(hello) }
            }),
            1 => v1::AgentMessage::decode(message).ok().and_then(|it| wire::event(session, it).ok()),
            2 => v1::TaskSpec::decode(message)
                .ok()
                .and_then(|spec| TaskSpec::try_from(spec).ok())
                .map(|spec| Event::Submit { caller, spec: Box::new(spec) }),
            3 => v1::CancelClusterTaskRequest::decode(message).ok().and_then(|cancel| {
                let task = cancel.task_id.parse().ok()?;
                Some(Event::Cancel { caller, task, grace_millis: cancel.grace_millis })
            }),
            4 => v1::Policy::decode(message).ok().and_then(|policy| Policy::try_from(policy).ok()).map(
                |policy| Event::ApplyPolicy {
                    caller,
                    within: vec![policy.namespace.clone()],
                    policy: Box::new(policy),
                },
            ),
            6 => std::str::from_utf8(message).ok().map(|name| Event::DeletePolicy {
                caller,
                within: vec!["default".to_owned()],
                name: name.to_owned(),
            }),
            7 => Some(Event::RollBackPolicies { caller, revision: u64::from(*low) }),
            _ if who % 2 == 0 => Some(Event::Tick),
            _ => Some(Event::AgentGone { session }),
        };
        if let Some(event) = event {
            happens(&mut state, &mut rows, event, now);
        }
    }
}
