//! Brings a backup into a store: one transaction, which happens whole or not at all, also in etcd, where it is written in
//! parts. What is in the store then is what is in the backup, but for the epoch, which is above that of both.
//!
//! A broker on an older state does not know what happened since. It cannot be told by the program, so the operator is, and
//! has to agree: [`meaning`].

use std::{
    collections::BTreeMap,
    io::{self, BufRead, IsTerminal, Write},
    path::Path,
};

use time::OffsetDateTime;

use super::{Look, UpkeepError, backup::Head, chain, lock, look, read_backup, verify};
use crate::{
    config::{StoreConfig, Stores},
    failpoint,
    reactor::{
        self, State,
        rows::{EPOCH, RowChange},
    },
    store::{Op, SCHEMA, Snapshot, Store, Txn, etcd::Etcd, redb::Redb},
};

/// To what the operator agreed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Consent {
    /// To lose what is in the store.
    pub(super) force: bool,
    /// To the rest.
    pub(super) yes: bool,
}

pub(super) fn restore(
    file: &Path,
    consent: Consent,
    config: &StoreConfig,
    answers: &mut dyn BufRead,
    out: &mut dyn Write,
) -> Result<(), UpkeepError> {
    let backup = read_backup(file)?;
    if backup.head.schema > SCHEMA {
        let (path, found) = (file.to_owned(), backup.head.schema);
        return Err(UpkeepError::NewerSchema { path, found, known: SCHEMA });
    }
    writeln!(out, "{}", title(file, &backup.head, backup.rows.len()))?;
    let place = file.display().to_string();
    let wanted = Snapshot { place, schema: backup.head.schema, rows: backup.rows, leader: None };
    let (mut state, problems) = verify::examine(&wanted);
    verify::count(&state, out)?;
    for problem in &problems {
        writeln!(out, "- {}", chain(problem))?;
    }
    if !problems.is_empty() {
        return Err(UpkeepError::Unusable { path: file.to_owned() });
    }

    let (found, _lock) = match &config.rows {
        Stores::Redb if !config.file().exists() => (None, Some(lock(config)?)),
        _ => {
            let Look { snapshot, lock } = look(config)?;
            (Some(snapshot), lock)
        }
    };
    let found = found.as_ref();
    if let Some(Snapshot { place, leader: Some(leader), .. }) = found {
        return Err(UpkeepError::Led { place: place.clone(), leader: leader.clone() });
    }
    let place = found.map_or_else(|| config.file().display().to_string(), |found| found.place.clone());
    let before = found.map_or(&[][..], |found| &found.rows);
    let replaced = found.map(verify::examine).map(|(state, _)| state).unwrap_or_default();
    if before.iter().all(|(key, _)| key == EPOCH.as_bytes()) {
        writeln!(out, "they go to {place}, which is empty")?;
    } else {
        writeln!(out, "they go to {place}, in place of the {} rows that are there:", before.len())?;
        verify::count(&replaced, out)?;
        if !consent.force {
            return Err(UpkeepError::NotEmpty { place });
        }
    }
    write!(out, "{}", meaning(&state))?;
    if !consent.yes && !agrees(answers, out)? {
        return Err(UpkeepError::NotConfirmed);
    }

    // Above both: of two histories no epoch is the same.
    state.epoch = state.epoch.max(replaced.epoch);
    let mut rows: BTreeMap<_, _> = wanted.rows.into_iter().collect();
    for row in reactor::begin(&mut state).rows {
        let RowChange { key, value } = state.row(&row);
        rows.extend(value.map(|value| (key.into_bytes(), value)));
    }
    let mut store = open(config)?;
    let now = store.range(b"")?.into_iter().map(|(key, row)| (key, row.value)).collect::<Vec<_>>();
    if now != before {
        return Err(UpkeepError::Changed { place });
    }
    let mut ops: Vec<_> = before.iter().map(|(key, _)| Op::Delete { key: key.clone() }).collect();
    ops.extend(rows.iter().map(|(key, value)| Op::Put { key: key.clone(), value: value.clone() }));
    failpoint::hit("before-restore");
    let Txn::Committed { .. } = store.txn(&[], &ops)? else { return Err(UpkeepError::Changed { place }) };
    failpoint::hit("after-restore");
    let now = store.range(b"")?.into_iter().map(|(key, row)| (key, row.value));
    if !now.eq(rows) {
        return Err(UpkeepError::Differs { place });
    }
    writeln!(out, "restored: the broker goes on above epoch {}", state.epoch)?;
    Ok(())
}

fn open(config: &StoreConfig) -> Result<Box<dyn Store>, UpkeepError> {
    Ok(match &config.rows {
        Stores::Memory => return Err(UpkeepError::Memory),
        Stores::Redb => Box::new(Redb::open(&config.file())?),
        Stores::Etcd(etcd) => Box::new(Etcd::open(etcd.place.clone(), None)?),
    })
}

fn title(file: &Path, head: &Head, rows: usize) -> String {
    let made_at =
        i64::try_from(head.made_at).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
    let made_at = made_at.map_or_else(
        || "at an unknown time".to_owned(),
        |at| format!("at {} {:02}:{:02}:{:02} UTC", at.date(), at.hour(), at.minute(), at.second()),
    );
    format!("{}: {rows} rows of {}, schema {}, copied {made_at}", file.display(), head.place, head.schema)
}

/// What it means to go on from a backup.
fn meaning(state: &State) -> String {
    let waiting = state
        .tasks
        .values()
        .filter(|row| row.task.phase.node().is_none() && !row.task.phase.is_over())
        .count();
    let placed = state.tasks.values().filter(|row| row.task.phase.node().is_some()).count();
    format!(
        "If a broker has gone on from these rows after they were copied, then\n\
         - what it acknowledged since is forgotten, and has to be submitted, cancelled and applied again;\n\
         - what runs on a node and is not known is left alone: `shaper get tasks` on each node shows it, and `shaper cancel` \
         there ends it;\n\
         - what waits here ({waiting} tasks) is placed, even if it has run since or runs now: to have nothing run twice, \
         end it on the nodes before the broker is started;\n\
         - what is on a node here ({placed} tasks) and is not there any more counts as lost.\n\
         If none has, nothing is lost.\n"
    )
}

fn agrees(answers: &mut dyn BufRead, out: &mut dyn Write) -> Result<bool, UpkeepError> {
    if !io::stdin().is_terminal() {
        return Ok(false);
    }
    write!(out, "Restore? Say yes: ")?;
    out.flush()?;
    let mut answer = String::new();
    answers.read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}
