//! Whether a broker could go on from what is there, and what that is.

use std::io::{self, Write};

use shaper_core::units::Bytes;

use super::{Look, UpkeepError, chain, look};
use crate::{
    config::StoreConfig,
    reactor::{Phase, State, rows::LoadError},
    store::{Snapshot, StoreError},
};

/// Says what is there and all that is wrong with it. False: something is.
pub(super) fn verify(store: &StoreConfig, out: &mut dyn Write) -> Result<bool, UpkeepError> {
    match look(store) {
        Ok(Look { snapshot, lock: _lock }) => Ok(report(&snapshot, out)?),
        Err(UpkeepError::Store(
            error @ (StoreError::Open { .. } | StoreError::Read { .. } | StoreError::Damaged { .. }),
        )) => {
            writeln!(out, "{}", chain(&error))?;
            writeln!(out, "move it away, and restore a backup: `shaper-broker store restore FILE`")?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// What is in a snapshot, and what is wrong with it. False: something is.
pub(super) fn report(snapshot: &Snapshot, out: &mut dyn Write) -> io::Result<bool> {
    let (state, problems) = examine(snapshot);
    let Snapshot { place, schema, rows, leader } = snapshot;
    let bytes = rows.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
    writeln!(out, "{place}: {} rows with {}, schema {schema}", rows.len(), Bytes(bytes))?;
    if let Some(leader) = leader {
        writeln!(out, "the broker at {leader} leads")?;
    }
    count(&state, out)?;
    if problems.is_empty() {
        writeln!(out, "nothing is wrong with them")?;
    } else {
        writeln!(out, "no broker can go on from them:")?;
        for problem in &problems {
            writeln!(out, "- {}", chain(problem))?;
        }
    }
    Ok(problems.is_empty())
}

/// The state that the rows describe, and what is wrong with them.
pub(super) fn examine(snapshot: &Snapshot) -> (State, Vec<LoadError>) {
    State::examine(snapshot.rows.iter().map(|(key, value)| (key.as_slice(), value.as_slice())))
}

/// How much there is of what.
pub(super) fn count(state: &State, out: &mut dyn Write) -> io::Result<()> {
    let [mut pending, mut starting, mut running, mut ended, mut cancelled] = [0; 5];
    for row in state.tasks.values() {
        *match row.task.phase {
            Phase::Pending { .. } | Phase::Nominated { .. } => &mut pending,
            Phase::Starting { .. } => &mut starting,
            Phase::Running { .. } => &mut running,
            Phase::Ended { .. } => &mut ended,
            Phase::Cancelled => &mut cancelled,
        } += 1;
    }
    writeln!(
        out,
        "tasks: {} ({pending} pending, {starting} starting, {running} running, {ended} ended, {cancelled} cancelled)",
        state.tasks.len()
    )?;
    let (nodes, policies, histories) = (state.nodes.len(), state.policies.len(), state.histories.len());
    writeln!(out, "nodes: {nodes}, policies: {policies}, histories: {histories}, epoch: {}", state.epoch)
}
