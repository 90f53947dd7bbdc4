//! The ledger.

use shaper_core::ledger::{Actor, Cause, Entry, Kind, KnobChange, Outcome};

use super::WireError;
use crate::v1::{
    self,
    ledger_entry::{self, actor::Who},
};

impl From<Entry> for v1::LedgerEntry {
    fn from(entry: Entry) -> v1::LedgerEntry {
        let Entry { number, at, execution, owner, kind, cause, changes, outcome } = entry;
        let kind = match kind {
            Kind::Standing => ledger_entry::Kind::Standing,
            Kind::Transient => ledger_entry::Kind::Transient,
            Kind::Release => ledger_entry::Kind::Release,
            Kind::Summary => ledger_entry::Kind::Summary,
            Kind::SecondWriter => ledger_entry::Kind::SecondWriter,
        };
        let who = match cause.actor {
            Actor::User(uid) => Who::Uid(uid),
            Actor::Broker(epoch) => Who::BrokerEpoch(epoch),
            Actor::Policy(name) => Who::Policy(name),
            Actor::Agent(part) => Who::Agent(part),
            Actor::Process { pid, name } => Who::Process(ledger_entry::Process { pid, name }),
        };
        let change = |KnobChange { knob, before, after }| ledger_entry::Change { knob, before, after };
        v1::LedgerEntry {
            number,
            unix_nanos: at,
            task_id: execution.task.into(),
            attempt: execution.attempt,
            owner: Some(owner.into()),
            kind: kind.into(),
            actor: Some(ledger_entry::Actor { who: Some(who) }),
            reason: cause.reason,
            changes: changes.into_iter().map(change).collect(),
            outcome: match outcome {
                Outcome::Done => Some(ledger_entry::Outcome::Done(true)),
                Outcome::RolledBack(why) => Some(ledger_entry::Outcome::RolledBack(why)),
                Outcome::Failed(why) => Some(ledger_entry::Outcome::Failed(why)),
                Outcome::Unknown => None,
            },
        }
    }
}

impl TryFrom<v1::LedgerEntry> for Entry {
    type Error = WireError;

    fn try_from(wire: v1::LedgerEntry) -> Result<Entry, WireError> {
        let kind = match wire.kind() {
            ledger_entry::Kind::Unspecified => return Err(WireError::Missing("kind")),
            ledger_entry::Kind::Standing => Kind::Standing,
            ledger_entry::Kind::Transient => Kind::Transient,
            ledger_entry::Kind::Release => Kind::Release,
            ledger_entry::Kind::Summary => Kind::Summary,
            ledger_entry::Kind::SecondWriter => Kind::SecondWriter,
        };
        let v1::LedgerEntry {
            number,
            unix_nanos,
            task_id,
            attempt,
            owner,
            kind: _,
            actor,
            reason,
            changes,
            outcome,
        } = wire;
        let actor = match actor.and_then(|actor| actor.who).ok_or(WireError::Missing("actor"))? {
            Who::Uid(uid) => Actor::User(uid),
            Who::BrokerEpoch(epoch) => Actor::Broker(epoch),
            Who::Policy(name) => Actor::Policy(name),
            Who::Agent(part) => Actor::Agent(part),
            Who::Process(ledger_entry::Process { pid, name }) => Actor::Process { pid, name },
        };
        let change = |ledger_entry::Change { knob, before, after }| KnobChange { knob, before, after };
        Ok(Entry {
            number,
            at: unix_nanos,
            execution: super::execution(&task_id, attempt)?,
            owner: super::owner("owner", owner)?,
            kind,
            cause: Cause { actor, reason },
            changes: changes.into_iter().map(change).collect(),
            outcome: match outcome {
                Some(ledger_entry::Outcome::Done(_)) => Outcome::Done,
                Some(ledger_entry::Outcome::RolledBack(why)) => Outcome::RolledBack(why),
                Some(ledger_entry::Outcome::Failed(why)) => Outcome::Failed(why),
                None => Outcome::Unknown,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::task::Owner;

    use super::*;

    #[test]
    fn an_entry_survives_the_wire() {
        let entry = Entry {
            number: 7,
            at: 5,
            execution: "etl.load.2".parse().unwrap(),
            owner: Owner { uid: 1000, gid: 100 },
            kind: Kind::Transient,
            cause: Cause::new(Actor::Broker(3), "start"),
            changes: vec![KnobChange { knob: "cpu".into(), before: "max".into(), after: "0.5 cores".into() }],
            outcome: Outcome::Unknown,
        };
        let process = Actor::Process { pid: 1, name: "systemd".into() };
        for actor in [Actor::User(0), Actor::Policy("p".into()), Actor::Agent("adjust".into()), process] {
            for outcome in [Outcome::Done, Outcome::RolledBack("no".into()), Outcome::Failed("no".into())] {
                let cause = Cause::new(actor.clone(), "set");
                let entry = Entry { cause, outcome, ..entry.clone() };
                assert_eq!(Entry::try_from(v1::LedgerEntry::from(entry.clone())), Ok(entry));
            }
        }
        assert_eq!(Entry::try_from(v1::LedgerEntry::from(entry.clone())), Ok(entry.clone()));
        let wire = v1::LedgerEntry { attempt: 0, ..entry.clone().into() };
        assert!(matches!(Entry::try_from(wire), Err(WireError::Invalid { field: "attempt", .. })));
        let wire = v1::LedgerEntry { actor: None, ..entry.into() };
        assert_eq!(Entry::try_from(wire), Err(WireError::Missing("actor")));
    }
}
