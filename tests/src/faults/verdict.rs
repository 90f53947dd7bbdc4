//! Whether what was observed may have happened. It knows no rule of the broker's: only what was promised to those who submit
//! tasks and to those who own nodes.
//!
//! 1. A task that was acknowledged is there in the end and is over, as its node has seen it end.
//! 2. A task comes to its end by itself once, and is started no more after that.
//! 3. At any moment at most one attempt of a task lives, on whichever node.
//! 4. At any moment what lives on a node asks for no more than the node has.
//! 5. An agent obeys no epoch below one that it has obeyed, and none that no broker, or that two, have had.
//! 6. Who asks after an acknowledgement, or after he was told an end, is told no less, by that broker or a later one.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Amount, Entry, Finals, How, Place, Seen, Told};

/// What is wrong, each in words; of what goes on being wrong, the first of it.
pub(super) fn violations(
    entries: &[Entry],
    nodes: &BTreeMap<String, Amount>,
    finals: &Finals,
) -> Vec<String> {
    let mut check = Check { nodes: Some(nodes), ..Check::default() };
    // A broker's log comes by another way than its answers, and may come later.
    for entry in entries {
        if let Seen::Took { by, epoch } = &entry.seen {
            check.took(by, *epoch);
        }
    }
    for (index, entry) in entries.iter().enumerate() {
        check.look(index, &entry.seen);
    }
    check.compare(finals);
    check.found
}

/// A task, as far as the history has come.
#[derive(Default)]
struct Task {
    demand: Amount,
    cancel_asked: bool,
    /// (when, by a broker of which epoch)
    acknowledged: Vec<(usize, u64)>,
    /// The latest attempt that somebody was told, when and by a broker of which epoch.
    told: Vec<(usize, u64, Told)>,
    began: BTreeMap<u32, u32>,
    /// The attempts that were lost with their node.
    lost: BTreeSet<u32>,
    live: BTreeMap<u32, String>,
    /// Those that came to their end by themselves.
    ended: Vec<(u32, i32)>,
}

#[derive(Default)]
struct Check<'a> {
    nodes: Option<&'a BTreeMap<String, Amount>>,
    epochs: BTreeMap<String, u64>,
    taken: BTreeMap<u64, String>,
    obeyed: BTreeMap<String, u64>,
    tasks: BTreeMap<String, Task>,
    overcommitted: BTreeSet<String>,
    found: Vec<String>,
}

impl Check<'_> {
    fn took(&mut self, by: &str, epoch: u64) {
        if let Some(other) = self.taken.insert(epoch, by.to_owned()) {
            self.found.push(format!("epoch {epoch} was that of {other} and of {by}"));
        }
        self.epochs.insert(by.to_owned(), epoch);
    }

    fn task(&mut self, task: &str) -> &mut Task {
        self.tasks.entry(task.to_owned()).or_default()
    }

    fn look(&mut self, index: usize, seen: &Seen) {
        match seen {
            Seen::Asked { task, demand } => self.task(task).demand = *demand,
            Seen::CancelAsked { task } => self.task(task).cancel_asked = true,
            Seen::Acknowledged { task, by } => {
                if let Some(epoch) = self.epoch_of(by) {
                    self.task(task).acknowledged.push((index, epoch));
                }
            }
            Seen::Read { task, by, since, told } => self.read(index, task, by, *since, told.as_ref()),
            Seen::Obeyed { node, epoch } => self.obeys(node, *epoch, "the greeting"),
            Seen::Accepted { node, task, attempt, epoch } => {
                self.obeys(node, *epoch, &format!("a directive about {task}.{attempt}"));
            }
            Seen::Began { node, task, attempt } => self.began(node, task, *attempt),
            Seen::Over { task, attempt, how } => self.over(task, *attempt, *how),
            Seen::Took { .. }
            | Seen::Serves { .. }
            | Seen::Gone { .. }
            | Seen::Struck { .. }
            | Seen::Mended { .. } => {}
        }
    }

    fn epoch_of(&mut self, by: &str) -> Option<u64> {
        let epoch = self.epochs.get(by).copied();
        if epoch.is_none() {
            self.found.push(format!("{by} answers, and never took over the store"));
        }
        epoch
    }

    fn read(&mut self, index: usize, task: &str, by: &str, since: usize, told: Option<&Told>) {
        let Some(epoch) = self.epoch_of(by) else { return };
        let row = self.tasks.entry(task.to_owned()).or_default();
        let before = |(when, whose): (usize, u64)| when < since && whose <= epoch;
        let Some(told) = told else {
            if row.acknowledged.iter().any(|it| before(*it)) {
                self.found.push(format!("{by} does not know {task}, which was acknowledged before"));
            }
            return;
        };
        for (when, whose, earlier) in &row.told {
            if before((*when, *whose)) && goes_back(earlier, told) {
                self.found.push(format!("{by} says of {task} {told:?}, and before it was {earlier:?}"));
                break;
            }
        }
        row.told.push((index, epoch, told.clone()));
    }

    fn obeys(&mut self, node: &str, epoch: u64, what: &str) {
        let highest = self.obeyed.entry(node.to_owned()).or_default();
        if epoch < *highest {
            self.found.push(format!("{node} obeyed {what} of epoch {epoch} after epoch {highest}"));
        }
        *highest = epoch.max(*highest);
        if !self.taken.contains_key(&epoch) {
            self.found.push(format!("{node} obeyed {what} of epoch {epoch}, which no broker had"));
        }
    }

    fn began(&mut self, node: &str, task: &str, attempt: u32) {
        let row = self.tasks.entry(task.to_owned()).or_default();
        let times = row.began.entry(attempt).or_default();
        *times += 1;
        if *times > 1 && !row.lost.contains(&attempt) {
            self.found.push(format!("{task}.{attempt} was started again, on {node}"));
        }
        if let Some((ended, _)) = row.ended.first() {
            self.found
                .push(format!("{task}.{attempt} was started on {node} after {task}.{ended} came to its end"));
        }
        if let Some((other, there)) = row.live.first_key_value() {
            self.found.push(format!(
                "{task}.{attempt} was started on {node} while {task}.{other} lived on {there}"
            ));
        }
        row.live.insert(attempt, node.to_owned());
        self.weigh(node);
    }

    fn weigh(&mut self, node: &str) {
        let live: Vec<(&String, &Task)> =
            self.tasks.iter().filter(|(_, task)| task.live.values().any(|it| it == node)).collect();
        let sum = live.iter().fold(Amount::default(), |sum, (_, task)| Amount {
            millicores: sum.millicores + task.demand.millicores,
            bytes: sum.bytes + task.demand.bytes,
        });
        let has = self.nodes.and_then(|nodes| nodes.get(node)).copied().unwrap_or_default();
        if (sum.millicores > has.millicores || sum.bytes > has.bytes)
            && self.overcommitted.insert(node.to_owned())
        {
            let names: Vec<_> = live.iter().map(|(name, _)| name.as_str()).collect();
            self.found.push(format!("{node} has {has:?} and runs {sum:?}: {}", names.join(", ")));
        }
    }

    fn over(&mut self, task: &str, attempt: u32, how: How) {
        let row = self.tasks.entry(task.to_owned()).or_default();
        row.live.remove(&attempt);
        match how {
            How::Code(code) => {
                if let Some((earlier, _)) = row.ended.first() {
                    self.found.push(format!("{task} came to its end in attempt {earlier} and in {attempt}"));
                }
                row.ended.push((attempt, code));
            }
            How::Unknown => drop(row.lost.insert(attempt)),
            How::Signal(_) | How::NotStarted => {}
        }
    }

    /// The end of it all: nothing is under way any more.
    fn compare(&mut self, finals: &Finals) {
        for (task, row) in &self.tasks {
            let told = finals.get(task);
            if let Some(attempt) = row.live.keys().next() {
                self.found.push(format!("{task}.{attempt} lives although all is over: {told:?}"));
            }
            let Some(told) = told else {
                if !row.acknowledged.is_empty() {
                    self.found.push(format!("{task} was acknowledged, and is lost"));
                }
                continue;
            };
            if let Some((_, _, earlier)) = row.told.iter().find(|(_, _, earlier)| goes_back(earlier, told)) {
                self.found.push(format!("{task} is {told:?} in the end, and was {earlier:?} before"));
            }
            let agrees = match told.place {
                Place::Ended(How::Code(code)) => row.ended == [(told.attempt, code)],
                // Its own end may have come first.
                Place::Cancelled => row.cancel_asked,
                Place::Ended(_) | Place::Waits | Place::On(_) => false,
            };
            if !agrees {
                self.found.push(format!("{task} is {told:?} in the end; its own ends were {:?}", row.ended));
            }
        }
        for task in finals.keys().filter(|task| !self.tasks.contains_key(*task)) {
            self.found.push(format!("{task} is there, and nobody asked for it"));
        }
    }
}

/// Whether what was told later cannot follow what was told before.
fn goes_back(earlier: &Told, later: &Told) -> bool {
    later.attempt < earlier.attempt || earlier.place.is_over() && earlier != later
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DEMAND: Amount = Amount { millicores: 600, bytes: 1 << 30 };

    fn asked(task: &str) -> Seen {
        Seen::Asked { task: task.into(), demand: DEMAND }
    }

    fn acknowledged(task: &str, by: &str) -> Seen {
        Seen::Acknowledged { task: task.into(), by: by.into() }
    }

    fn read(task: &str, by: &str, since: usize, told: Option<Told>) -> Seen {
        Seen::Read { task: task.into(), by: by.into(), since, told }
    }

    fn took(by: &str, epoch: u64) -> Seen {
        Seen::Took { by: by.into(), epoch }
    }

    fn obeyed(node: &str, epoch: u64) -> Seen {
        Seen::Obeyed { node: node.into(), epoch }
    }

    fn accepted(node: &str, task: &str, attempt: u32, epoch: u64) -> Seen {
        Seen::Accepted { node: node.into(), task: task.into(), attempt, epoch }
    }

    fn began(node: &str, task: &str, attempt: u32) -> Seen {
        Seen::Began { node: node.into(), task: task.into(), attempt }
    }

    fn over(task: &str, attempt: u32, how: How) -> Seen {
        Seen::Over { task: task.into(), attempt, how }
    }

    fn told(attempt: u32, place: Place) -> Told {
        Told { attempt, place }
    }

    fn ended(attempt: u32, code: i32) -> Told {
        told(attempt, Place::Ended(How::Code(code)))
    }

    /// The violations of a history on two nodes with one core and four GiB each.
    fn of(seen: Vec<Seen>, finals: &[(&str, Told)]) -> Vec<String> {
        let entries: Vec<_> =
            (0..).zip(seen).map(|(at, seen)| Entry { at: Duration::from_secs(at), seen }).collect();
        let nodes = ["n1", "n2"].map(|node| (node.to_owned(), Amount { millicores: 1000, bytes: 4 << 30 }));
        let finals = finals.iter().map(|(task, told)| ((*task).to_owned(), told.clone())).collect();
        violations(&entries, &BTreeMap::from(nodes), &finals)
    }

    /// What is found, which must be one thing.
    #[track_caller]
    fn one(seen: Vec<Seen>, finals: &[(&str, Told)], wanted: &str) {
        let found = of(seen, finals);
        assert!(found.len() == 1 && found[0].contains(wanted), "{wanted:?}: {found:#?}");
    }

    /// A task from its submission to its end, under two brokers.
    fn good() -> Vec<Seen> {
        vec![
            took("b1.1", 1),
            obeyed("n1", 1),
            asked("t"),
            acknowledged("t", "b1.1"),
            accepted("n1", "t", 1, 1),
            began("n1", "t", 1),
            took("b2.1", 2),
            read("t", "b2.1", 7, Some(told(1, Place::On("n1".into())))),
            obeyed("n1", 2),
            over("t", 1, How::Code(3)),
            read("t", "b2.1", 10, Some(ended(1, 3))),
        ]
    }

    #[test]
    fn what_may_be_is_not_found_fault_with() {
        assert_eq!(of(good(), &[("t", ended(1, 3))]), Vec::<String>::new());
        // One that was never acknowledged may be there or not.
        let unanswered = || vec![took("b1.1", 1), asked("t")];
        assert_eq!(of(unanswered(), &[]), Vec::<String>::new());
        one(unanswered(), &[("t", told(0, Place::Waits))], "in the end");
        // Evicted on one node and run on the other; and lost with its node, and started there again.
        for how in [How::Signal(9), How::Unknown] {
            let twice = [asked("t"), began("n1", "t", 1), over("t", 1, how), began("n2", "t", 2)];
            let seen = twice.into_iter().chain([over("t", 2, How::Code(0))]).collect();
            assert_eq!(of(seen, &[("t", ended(2, 0))]), Vec::<String>::new());
        }
        let again = vec![
            asked("t"),
            began("n1", "t", 1),
            over("t", 1, How::Unknown),
            began("n1", "t", 1),
            over("t", 1, How::Code(0)),
        ];
        assert_eq!(of(again, &[("t", ended(1, 0))]), Vec::<String>::new());
        // Its own end and the wish for it, at the same time.
        let cancel = Seen::CancelAsked { task: "t".into() };
        let seen = vec![asked("t"), began("n1", "t", 1), cancel, over("t", 1, How::Code(0))];
        assert_eq!(of(seen, &[("t", told(1, Place::Cancelled))]), Vec::<String>::new());
    }

    #[test]
    fn a_task_that_was_acknowledged_and_is_lost_is_found() {
        one(
            vec![took("b1.1", 1), asked("t"), acknowledged("t", "b1.1")],
            &[],
            "t was acknowledged, and is lost",
        );
        // Also where the broker that acknowledged it was no longer the one that led.
        let fenced = vec![took("b1.1", 1), asked("t"), took("b2.1", 2), acknowledged("t", "b1.1")];
        one(fenced, &[], "t was acknowledged, and is lost");
    }

    #[test]
    fn an_end_that_did_not_happen_is_found() {
        let mut unread = good();
        unread.pop();
        one(unread, &[("t", ended(1, 0))], "its own ends were [(1, 3)]");
        one(vec![asked("t")], &[("t", ended(1, 0))], "its own ends were []");
        one(vec![asked("t")], &[("t", told(0, Place::Cancelled))], "its own ends were []");
        one(vec![asked("t")], &[("t", told(1, Place::Ended(How::Unknown)))], "in the end");
        one(vec![], &[("u", ended(1, 0))], "nobody asked for it");
        one(vec![asked("t"), began("n1", "t", 1)], &[], "t.1 lives although all is over");
    }

    #[test]
    fn a_task_that_runs_again_after_its_end_is_found() {
        let mut seen = good();
        seen.extend([began("n2", "t", 2), over("t", 2, How::Signal(9))]);
        one(seen.clone(), &[("t", ended(1, 3))], "t.2 was started on n2 after t.1 came to its end");
        seen.pop();
        seen.push(over("t", 2, How::Code(3)));
        assert!(of(seen, &[("t", ended(2, 3))]).iter().any(|it| it.contains("in attempt 1 and in 2")));
        let killed = vec![asked("t"), began("n1", "t", 1), over("t", 1, How::Signal(9)), began("n1", "t", 1)];
        let killed = killed.into_iter().chain([over("t", 1, How::Code(0))]).collect();
        one(killed, &[("t", ended(1, 0))], "t.1 was started again, on n1");
    }

    #[test]
    fn two_attempts_that_live_at_the_same_time_are_found() {
        let seen = vec![
            asked("t"),
            began("n1", "t", 1),
            began("n2", "t", 2),
            over("t", 1, How::Signal(9)),
            over("t", 2, How::Code(0)),
        ];
        one(seen, &[("t", ended(2, 0))], "t.2 was started on n2 while t.1 lived on n1");
    }

    #[test]
    fn a_node_that_is_overcommitted_is_found() {
        let both = |second: &str| {
            vec![
                asked("t"),
                asked("u"),
                began("n1", "t", 1),
                began(second, "u", 1),
                over("t", 1, How::Code(0)),
                over("u", 1, How::Code(0)),
            ]
        };
        let finals = [("t", ended(1, 0)), ("u", ended(1, 0))];
        assert_eq!(of(both("n2"), &finals), Vec::<String>::new());
        one(both("n1"), &finals, "n1 has");
    }

    #[test]
    fn a_directive_of_a_fenced_leader_is_found() {
        let after = |late: Seen| vec![took("b1.1", 1), took("b2.1", 2), obeyed("n1", 2), late];
        one(
            after(accepted("n1", "t", 1, 1)),
            &[],
            "n1 obeyed a directive about t.1 of epoch 1 after epoch 2",
        );
        one(after(obeyed("n1", 1)), &[], "n1 obeyed the greeting of epoch 1 after epoch 2");
        // Of another node, which has not heard of the new one yet, it is not wrong.
        assert_eq!(of(after(accepted("n2", "t", 1, 1)), &[]), Vec::<String>::new());
        one(after(obeyed("n1", 3)), &[], "which no broker had");
        one(vec![took("b1.1", 1), took("b2.1", 1)], &[], "epoch 1 was that of b1.1 and of b2.1");
    }

    #[test]
    fn an_answer_that_forgets_is_found() {
        let told_before = |late: Seen| {
            let mut seen = good();
            seen.push(late);
            seen
        };
        let finals = [("t", ended(1, 3))];
        let running = Some(told(1, Place::On("n1".into())));
        one(told_before(read("t", "b2.1", 11, None)), &finals, "b2.1 does not know t");
        one(told_before(read("t", "b2.1", 11, running.clone())), &finals, "and before it was");
        let waits = Some(told(0, Place::Waits));
        let mut seen = good();
        seen.insert(8, read("t", "b2.1", 8, waits));
        one(seen, &finals, "and before it was");
        // One that was asked before may answer after; and one that leads no more may not know it yet.
        assert_eq!(of(told_before(read("t", "b2.1", 9, running.clone())), &finals), Vec::<String>::new());
        assert_eq!(of(told_before(read("t", "b1.1", 11, running)), &finals), Vec::<String>::new());
        one(told_before(read("t", "b3.1", 11, None)), &finals, "b3.1 answers, and never took over");
    }
}
