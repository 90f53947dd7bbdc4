//! The ledger: every change of what a task may use, with who wanted it and why, written before it takes effect, and
//! again once it is known what came of it.
//!
//! It is an append-only file of JSON lines, `<state-dir>/ledger/<number>`, of which the last two are kept: a new one
//! begins with what stands for each task, and with what was there before anything was turned. A line is handed to the
//! kernel before the effect, so it outlives the agent; it is brought to the disk within a second, for all changes of
//! that second at once. What must outlive the machine, and nothing here must, is in `task.json`
//! (docs/decisions/0008-the-ledger-is-synced-once-a-second.md).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::{ExecutionId, TaskId},
    ledger::{Actor, Cause, Entry, Kind, KnobChange, Outcome},
    limits::Limits,
    task::{Owner, UnixNanos},
    units::{BitsPerSec, Weight},
};
use shaper_metrics::traces::{self, KeyValue, Period};

use crate::{
    actuate::{Change, Values},
    durable::{self, Error},
};

/// A new file is begun beyond this.
const FILE_MAX: u64 = 8 << 20;
/// Files that are kept.
const FILES: usize = 2;
/// Entries told at once; the newest.
const TOLD_MAX: usize = 5000;

/// What is about to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// To which run of which task.
    pub execution: ExecutionId,
    /// Whose.
    pub owner: Owner,
    /// What kind of change it is.
    pub kind: Kind,
    /// Who wants it, and why.
    pub cause: Cause,
    /// What is turned.
    pub changes: Vec<Change>,
    /// The limits that stand from then on, if they change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// What stands beside them from then on, if that changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Values>,
}

/// What stands for a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Which run of which task.
    pub execution: ExecutionId,
    /// Whose.
    pub owner: Owner,
    /// Its limits.
    pub limits: Limits,
    /// What stands beside them.
    pub standing: Values,
    /// What was there before anything was turned.
    pub baseline: Values,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Intent(Intent),
    /// Of the intent of that number.
    Outcome {
        of: u64,
        outcome: Outcome,
    },
    Summary(Summary),
    /// So many bytes at the end were not whole, and were cut off.
    Torn {
        bytes: u64,
    },
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    number: u64,
    at: UnixNanos,
    said: Said,
}

/// What the ledger says was decided last for a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// The number of the last entry in this.
    pub number: u64,
    /// The limits, if they were changed.
    pub limits: Option<Limits>,
    /// What stands beside them, if that was changed.
    pub standing: Option<Values>,
    /// The same before that entry, if nothing says what came of it.
    pub before: Option<(Option<Limits>, Option<Values>)>,
    /// The numbers of changes that came to nothing.
    pub failed: BTreeSet<u64>,
}

/// The open ledger: one writer.
pub struct Ledger {
    directory: PathBuf,
    file: Arc<fs::File>,
    file_number: u64,
    length: u64,
    next: u64,
    /// What is in the file is not on the disk.
    unsynced: bool,
    syncing: Arc<AtomicBool>,
    /// The latest change, until it is known what came of it; if traces are wanted.
    traced: Option<(u64, Period)>,
}

/// A change that begins, for a trace.
fn period(from: UnixNanos, intent: &Intent) -> Period {
    let Intent { execution, kind, cause, changes, .. } = intent;
    let knobs: Vec<_> = changes.iter().map(|change| change.knob.to_string()).collect();
    let kind_name = match kind {
        Kind::Standing => "standing",
        Kind::Transient => "transient",
        Kind::Release => "release",
        Kind::SecondWriter => "second_writer",
        Kind::Summary => "summary",
    };
    let about = [
        ("shaper.task.id", execution.task.to_string()),
        ("shaper.task.attempt", execution.attempt.to_string()),
        ("shaper.change.kind", kind_name.to_owned()),
        ("shaper.change.by", cause.actor.to_string()),
        ("shaper.change.reason", cause.reason.clone()),
        ("shaper.change.knobs", knobs.join(",")),
    ];
    let about = about.map(|(key, value)| KeyValue::new(key, value)).to_vec();
    Period { name: "change".to_owned(), from, about, ..Period::default() }
}

impl Ledger {
    /// Opens it, and says what was decided for each task. What an agent that died left half written is cut off.
    pub fn open(state_dir: &Path, now: UnixNanos) -> Result<(Ledger, HashMap<ExecutionId, Decided>), Error> {
        let directory = state_dir.join("ledger");
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { operation, path, source }
        };
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(io("make", &directory))?;
        let numbers = file_numbers(&directory)?;
        let file_number = numbers.last().copied().unwrap_or(1);
        let path = file_path(&directory, file_number);
        let (file, length, torn) = open_to_append(&path).map_err(io("open", &path))?;
        durable::sync_directory(&directory)?;
        let (lines, unreadable) = read_lines(&directory)?;
        if unreadable > 0 {
            tracing::warn!(unreadable, "lines of the ledger are not understood: they are left as they are");
        }
        let next = lines.iter().map(|line| line.number).max().unwrap_or(0) + 1;
        let mut ledger = Ledger {
            directory,
            file: Arc::new(file),
            file_number,
            length,
            next,
            unsynced: true,
            syncing: Arc::default(),
            traced: None,
        };
        if torn > 0 {
            tracing::warn!(bytes = torn, "the end of the ledger was not whole: it is cut off");
            ledger.append(now, Said::Torn { bytes: torn })?;
        }
        Ok((ledger, decided(&lines)))
    }

    /// Writes what is about to be done; the number is that of the entry.
    pub fn intend(&mut self, now: UnixNanos, intent: Intent) -> Result<u64, Error> {
        let traced = traces::are_wanted().then(|| period(now, &intent));
        let number = self.append(now, Said::Intent(intent))?;
        self.traced = traced.map(|period| (number, period));
        Ok(number)
    }

    /// Writes what came of the intent `of`.
    pub fn conclude(&mut self, now: UnixNanos, of: u64, outcome: Outcome) -> Result<(), Error> {
        let traced = self.traced.take_if(|(number, _)| *number == of).map(|(_, mut period)| {
            period.to = now;
            if let Outcome::RolledBack(why) | Outcome::Failed(why) = &outcome {
                period.failure = Some(why.clone());
            }
            period
        });
        self.append(now, Said::Outcome { of, outcome })?;
        if let Some(period) = traced {
            period.tell();
        }
        Ok(())
    }

    /// The number that the next entry will have.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// Gives out no number up to this one: a record may carry one whose entry was never written.
    pub fn skip(&mut self, number: u64) {
        self.next = self.next.max(number + 1);
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn append(&mut self, at: UnixNanos, said: Said) -> Result<u64, Error> {
        let number = self.next;
        let path = file_path(&self.directory, self.file_number);
        let line = Line { number, at, said };
        let mut bytes =
            serde_json::to_vec(&line).map_err(|source| Error::Encode { path: path.clone(), source })?;
        bytes.push(b'\n');
        if let Err(source) = (&*self.file).write_all(&bytes) {
            // Half a line would spoil the next.
            if let Err(error) = self.file.set_len(self.length) {
                tracing::error!(%error, "cannot take half a line out of the ledger again");
            }
            return Err(Error::Io { operation: "append to", path, source });
        }
        self.length += bytes.len() as u64;
        self.next += 1;
        self.unsynced = true;
        Ok(number)
    }

    /// Brings what was written since the last time to the disk, on a thread of its own: nobody waits for it.
    pub fn sync(&mut self, runtime: &tokio::runtime::Handle) {
        if !self.unsynced || self.syncing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.unsynced = false;
        let (file, syncing) = (Arc::clone(&self.file), Arc::clone(&self.syncing));
        runtime.spawn_blocking(move || {
            if let Err(error) = file.sync_data() {
                tracing::warn!(%error, "cannot bring the ledger to the disk");
            }
            syncing.store(false, Ordering::Release);
        });
    }

    /// Whether a new file should be begun.
    pub fn is_full(&self) -> bool {
        self.length > FILE_MAX
    }

    /// Begins a new file with what stands, and forgets the oldest.
    pub fn compact(&mut self, now: UnixNanos, summaries: Vec<Summary>) -> Result<(), Error> {
        let number = self.file_number + 1;
        let path = file_path(&self.directory, number);
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { operation, path, source }
        };
        let (file, length, _) = open_to_append(&path).map_err(io("open", &path))?;
        (self.file, self.file_number, self.length) = (Arc::new(file), number, length);
        for summary in summaries {
            self.append(now, Said::Summary(summary))?;
        }
        self.file.sync_data().map_err(io("sync", &path))?;
        durable::sync_directory(&self.directory)?;
        let numbers = file_numbers(&self.directory)?;
        for old in numbers.iter().rev().skip(FILES) {
            let path = file_path(&self.directory, *old);
            fs::remove_file(&path).map_err(io("remove", &path))?;
        }
        Ok(())
    }
}

fn file_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}"))
}

fn file_numbers(directory: &Path) -> Result<Vec<u64>, Error> {
    let error = |source| Error::Io { operation: "list", path: directory.to_owned(), source };
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory).map_err(error)? {
        // What has another name is not ours to judge.
        numbers.extend(entry.map_err(error)?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The file, how much of it is whole, and how much behind that was cut off.
fn open_to_append(path: &Path) -> io::Result<(fs::File, u64, u64)> {
    let mut file = fs::OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let torn = bytes.len() - whole;
    if torn > 0 {
        file.set_len(whole as u64)?;
        file.seek(io::SeekFrom::End(0))?;
    }
    Ok((file, whole as u64, torn as u64))
}

/// All lines of all files, oldest first, and how many were not understood. A last line that is being written is left
/// out.
fn read_lines(directory: &Path) -> Result<(Vec<Line>, usize), Error> {
    let (mut lines, mut unreadable) = (Vec::new(), 0);
    for number in file_numbers(directory)? {
        let path = file_path(directory, number);
        let text = match fs::read(&path) {
            Ok(bytes) => bytes,
            // It was the oldest, a moment ago.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::Io { operation: "read", path, source }),
        };
        unreadable += parse(&text, &mut lines);
    }
    Ok((lines, unreadable))
}

/// Adds the whole lines of a file to `lines`, and says how many others there are.
fn parse(text: &[u8], lines: &mut Vec<Line>) -> usize {
    let mut unreadable = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        match serde_json::from_slice(line) {
            Ok(line) => lines.push(line),
            Err(_) => unreadable += 1,
        }
    }
    unreadable
}

/// Reads a file of whatever content, for [`crate::fuzz`]: what stands, what is told, and what is understood as it would be
/// written.
pub(crate) fn examine(text: &[u8]) -> (HashMap<ExecutionId, Decided>, Vec<Entry>, Vec<u8>) {
    let mut lines = Vec::new();
    let unreadable = parse(text, &mut lines);
    let mut written = Vec::new();
    for line in &lines {
        written.extend(serde_json::to_vec(line).unwrap_or_default());
        written.push(b'\n');
    }
    let decided = decided(&lines);
    (decided, tell(lines, unreadable, &Query::default()).0, written)
}

/// What stands for each task after all lines: an intent counts unless it is said to have failed.
fn decided(lines: &[Line]) -> HashMap<ExecutionId, Decided> {
    let outcomes: HashMap<u64, &Outcome> = lines
        .iter()
        .filter_map(|line| match &line.said {
            Said::Outcome { of, outcome } => Some((*of, outcome)),
            _ => None,
        })
        .collect();
    let mut decided: HashMap<ExecutionId, Decided> = HashMap::new();
    for line in lines {
        let intent = match &line.said {
            Said::Intent(intent) if intent.kind == Kind::Standing => intent,
            Said::Summary(Summary { execution, limits, standing, .. }) => {
                let stands = Decided {
                    number: line.number,
                    limits: Some(*limits),
                    standing: Some(standing.clone()),
                    ..Decided::default()
                };
                decided.insert(execution.clone(), stands);
                continue;
            }
            _ => continue,
        };
        let of_task = decided.entry(intent.execution.clone()).or_default();
        let outcome = outcomes.get(&line.number);
        if let Some(Outcome::RolledBack(_) | Outcome::Failed(_)) = outcome {
            of_task.failed.insert(line.number);
            continue;
        }
        of_task.before = outcome.is_none().then(|| (of_task.limits, of_task.standing.clone()));
        of_task.number = line.number;
        of_task.limits = intent.limits.or(of_task.limits);
        if intent.standing.is_some() {
            of_task.standing.clone_from(&intent.standing);
        }
    }
    decided
}

/// Whose entries are wanted.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Of this task only.
    pub task: Option<TaskId>,
    /// Of this user's tasks only.
    pub owner: Option<u32>,
    /// Not older.
    pub since: UnixNanos,
}

/// Reads what is wanted, oldest first, with remarks for the reader. Beside a writer, too.
pub fn read(directory: &Path, query: &Query) -> Result<(Vec<Entry>, Vec<String>), Error> {
    let (lines, unreadable) = read_lines(directory)?;
    Ok(tell(lines, unreadable, query))
}

fn tell(lines: Vec<Line>, unreadable: usize, query: &Query) -> (Vec<Entry>, Vec<String>) {
    let (mut entries, mut notes) = (BTreeMap::new(), Vec::new());
    let is_wanted = |execution: &ExecutionId, owner: &Owner, at: UnixNanos| {
        at >= query.since
            && query.task.as_ref().is_none_or(|task| *task == execution.task)
            && query.owner.is_none_or(|uid| uid == owner.uid)
    };
    for Line { number, at, said } in lines {
        match said {
            Said::Intent(intent) if is_wanted(&intent.execution, &intent.owner, at) => {
                entries.insert(number, entry(number, at, intent));
            }
            Said::Summary(summary) if is_wanted(&summary.execution, &summary.owner, at) => {
                entries.insert(number, summary_entry(number, at, summary));
            }
            Said::Outcome { of, outcome } => {
                if let Some(entry) = entries.get_mut(&of) {
                    entry.outcome = outcome;
                }
            }
            Said::Torn { bytes } if at >= query.since => {
                notes.push(format!("before entry {number}, {bytes} bytes were not whole and were cut off"));
            }
            Said::Intent(_) | Said::Summary(_) | Said::Torn { .. } => {}
        }
    }
    if unreadable > 0 {
        notes.push(format!("{unreadable} lines are not understood and left out"));
    }
    let mut entries: Vec<Entry> = entries.into_values().collect();
    if entries.len() > TOLD_MAX {
        let left_out = entries.len() - TOLD_MAX;
        entries.drain(..left_out);
        notes.push(format!("{left_out} older entries are left out: name a task, or use --since"));
    }
    (entries, notes)
}

fn entry(number: u64, at: UnixNanos, intent: Intent) -> Entry {
    let changes = intent.changes.iter().map(|change| KnobChange {
        knob: change.knob.to_string(),
        before: change.before.to_string(),
        after: change.after.to_string(),
    });
    Entry {
        number,
        at,
        execution: intent.execution,
        owner: intent.owner,
        kind: intent.kind,
        cause: intent.cause,
        changes: changes.collect(),
        outcome: Outcome::Unknown,
    }
}

fn summary_entry(number: u64, at: UnixNanos, summary: Summary) -> Entry {
    let Summary { execution, owner, limits, standing, baseline } = summary;
    let stands = |knob| match (knob, standing.get(&knob)) {
        (crate::actuate::Knob::Cpu, _) => limits.cpu.to_string(),
        (crate::actuate::Knob::Memory, _) => limits.memory.to_string(),
        (crate::actuate::Knob::NetEgress, _) => limits.net_egress.to_string(),
        (crate::actuate::Knob::NetIngress, _) => limits.net_ingress.to_string(),
        (crate::actuate::Knob::GpuCards, _) => {
            limits.gpu_cards.map_or("as before".into(), |cards| cards.to_string())
        }
        (crate::actuate::Knob::GpuMemory(_), _) => limits.gpu_memory.to_string(),
        (crate::actuate::Knob::GpuPower(_), _) => limits.gpu_power.to_string(),
        (crate::actuate::Knob::NetGuarantee, _) => {
            limits.net_egress_guarantee.unwrap_or(BitsPerSec(0)).to_string()
        }
        (crate::actuate::Knob::NetWeight, _) => {
            limits.net_egress_weight.unwrap_or(Weight::DEFAULT).to_string()
        }
        (crate::actuate::Knob::CpuWeight, None) => {
            limits.cpu_weight.map_or("as before".into(), |weight| weight.to_string())
        }
        (_, Some(value)) => value.to_string(),
        (_, None) => "as before".into(),
    };
    let changes = baseline.iter().map(|(knob, before)| KnobChange {
        knob: knob.to_string(),
        before: before.to_string(),
        after: stands(*knob),
    });
    Entry {
        number,
        at,
        execution,
        owner,
        kind: Kind::Summary,
        cause: Cause::new(Actor::Agent("ledger".into()), "older entries are no longer kept"),
        changes: changes.collect(),
        outcome: Outcome::Done,
    }
}

#[cfg(test)]
mod tests {
    use shaper_core::{
        limits::Limit,
        units::{Bytes, Millicores},
    };

    use super::*;
    use crate::actuate::{Knob, Value};

    fn intent(task: &str, kind: Kind, milli: u64) -> Intent {
        let memory = |bytes| Value::Memory(Limit::At(Bytes(bytes)));
        Intent {
            execution: format!("{task}.1").parse().unwrap(),
            owner: Owner { uid: 1000, gid: 100 },
            kind,
            cause: Cause::new(Actor::User(0), "set"),
            changes: vec![Change { knob: Knob::Memory, before: memory(4096), after: memory(8192) }],
            limits: (milli > 0).then(|| Limits { cpu: Limit::At(Millicores(milli)), ..Limits::default() }),
            standing: None,
        }
    }

    fn file(directory: &Path) -> PathBuf {
        file_path(&directory.join("ledger"), 1)
    }

    fn all(directory: &Path) -> (Vec<Entry>, Vec<String>) {
        read(&directory.join("ledger"), &Query::default()).unwrap()
    }

    #[test]
    fn what_was_decided_is_known_to_the_next_agent() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, decided) = Ledger::open(directory.path(), 1).unwrap();
        assert!(decided.is_empty());
        for (milli, outcome) in
            [(500, Some(Outcome::Done)), (600, Some(Outcome::RolledBack("no".into()))), (700, None)]
        {
            let number = ledger.intend(milli, intent("a", Kind::Standing, milli)).unwrap();
            if let Some(outcome) = outcome {
                ledger.conclude(milli, number, outcome).unwrap();
            }
        }
        // Without an outcome it may have been done: it is decided. What is lent is not.
        ledger.intend(800, intent("a", Kind::Transient, 800)).unwrap();
        let failed = ledger.intend(900, intent("b", Kind::Standing, 900)).unwrap();
        ledger.conclude(900, failed, Outcome::Failed("no".into())).unwrap();
        drop(ledger);

        let (ledger, decided) = Ledger::open(directory.path(), 2).unwrap();
        let of_a = &decided[&"a.1".parse().unwrap()];
        assert_eq!(of_a.limits.unwrap().cpu, Limit::At(Millicores(700)));
        assert_eq!(of_a.number, 5);
        // Should that be impossible, what was decided before it holds.
        let before = of_a.before.as_ref().and_then(|(limits, _)| *limits);
        assert_eq!(before.map(|limits| limits.cpu), Some(Limit::At(Millicores(500))));
        assert_eq!(of_a.failed, BTreeSet::from([3]));
        let of_b = &decided[&"b.1".parse().unwrap()];
        assert_eq!(of_b, &Decided { failed: BTreeSet::from([failed]), ..Decided::default() });
        assert_eq!(ledger.next_number(), 9);
        let (entries, notes) = all(directory.path());
        let outcomes: Vec<_> = entries.iter().map(|entry| (entry.number, entry.outcome.clone())).collect();
        let expected = [
            (1, Outcome::Done),
            (3, Outcome::RolledBack("no".into())),
            (5, Outcome::Unknown),
            (6, Outcome::Unknown),
            (7, Outcome::Failed("no".into())),
        ];
        assert_eq!(outcomes, expected);
        assert_eq!(entries[0].changes[0].before, "4 KiB");
        assert!(notes.is_empty());
    }

    #[test]
    fn a_torn_end_is_cut_off_and_told_wherever_it_is_torn() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path());
        let (mut ledger, _) = Ledger::open(directory.path(), 1).unwrap();
        ledger.intend(1, intent("a", Kind::Standing, 500)).unwrap();
        let whole = fs::read(&path).unwrap();
        ledger.intend(2, intent("b", Kind::Standing, 600)).unwrap();
        let both = fs::read(&path).unwrap();
        for cut in [whole.len() + 1, whole.len() + 40, both.len() - 1] {
            fs::write(&path, &both[..cut]).unwrap();
            // A reader beside it does not stumble, and an agent goes on behind what is whole.
            assert_eq!(all(directory.path()).0.len(), 1);
            let (mut ledger, decided) = Ledger::open(directory.path(), 3).unwrap();
            assert_eq!(decided.len(), 1, "cut at {cut}");
            ledger.intend(4, intent("c", Kind::Standing, 700)).unwrap();
            let (entries, notes) = all(directory.path());
            let tasks: Vec<&str> = entries.iter().map(|entry| entry.execution.task.as_str()).collect();
            assert_eq!(tasks, ["a", "c"]);
            let cut_off =
                format!("before entry 2, {} bytes were not whole and were cut off", cut - whole.len());
            assert_eq!(notes, [cut_off]);
        }
        // A line in the middle that is no line is passed over.
        let spoilt = [b"{\"number\":nonsense\n".to_vec(), both].concat();
        fs::write(&path, spoilt).unwrap();
        let (entries, notes) = all(directory.path());
        assert_eq!((entries.len(), notes), (2, vec!["1 lines are not understood and left out".into()]));
    }

    #[test]
    fn it_is_bounded_and_loses_no_baseline() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(directory.path(), 1).unwrap();
        let number = ledger.intend(1, intent("a", Kind::Standing, 500)).unwrap();
        ledger.conclude(1, number, Outcome::Done).unwrap();
        let summary = Summary {
            execution: "a.1".parse().unwrap(),
            owner: Owner { uid: 1000, gid: 100 },
            limits: Limits { cpu: Limit::At(Millicores(500)), ..Limits::default() },
            standing: Values::new(),
            baseline: Values::from([(Knob::Cpu, Value::Memory(Limit::Unlimited))]),
        };
        for round in 2..6 {
            ledger.compact(round, vec![summary.clone()]).unwrap();
        }
        assert_eq!(file_numbers(&directory.path().join("ledger")).unwrap(), [4, 5]);
        let (entries, _) = all(directory.path());
        assert_eq!(entries.len(), 2);
        let expected = KnobChange { knob: "cpu".into(), before: "max".into(), after: "0.5".into() };
        assert_eq!((entries[1].kind, &entries[1].changes[0]), (Kind::Summary, &expected));
        // What stands is known from the summary, too.
        let (_, decided) = Ledger::open(directory.path(), 9).unwrap();
        assert_eq!(decided[&"a.1".parse().unwrap()].limits, Some(summary.limits));
        // Numbers go on.
        let next = ledger.next_number();
        drop(ledger);
        assert_eq!(Ledger::open(directory.path(), 9).unwrap().0.next_number(), next);
    }

    #[test]
    fn others_see_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(directory.path(), 1).unwrap();
        ledger.intend(10, intent("a", Kind::Standing, 500)).unwrap();
        ledger.intend(20, intent("b", Kind::Standing, 500)).unwrap();
        let count = |query| read(ledger.directory(), &query).unwrap().0.len();
        assert_eq!(count(Query { owner: Some(1000), ..Query::default() }), 2);
        assert_eq!(count(Query { owner: Some(1001), ..Query::default() }), 0);
        assert_eq!(count(Query { task: "b".parse().ok(), ..Query::default() }), 1);
        assert_eq!(count(Query { since: 11, ..Query::default() }), 1);
    }
}
