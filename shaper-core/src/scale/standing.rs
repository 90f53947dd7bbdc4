//! What is known of one group, and what it is asked next.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::{Group, Nanos};
use crate::{id::TaskId, spec::Demand, task::UnixNanos};

/// Notes that are kept of a group.
pub const NOTES: usize = 64;
/// Kinds of task that an order names, and tasks of each.
pub const WANTS: usize = 8;

const SECOND: Nanos = 1_000_000_000;
/// After the first failure; it doubles with each.
const FIRST_REST: Nanos = 30 * SECOND;
/// It does not become longer.
const LONGEST_REST: Nanos = 1800 * SECOND;

/// Something that happened to a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    /// When.
    pub at: UnixNanos,
    /// What.
    pub text: String,
}

/// For whom nodes are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// How many tasks.
    pub tasks: u32,
    /// What each of them asks for.
    pub demand: Demand,
    /// The first of them.
    pub first: Vec<TaskId>,
}

/// What a provider is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Of the orders of its group: who has carried it out knows it again.
    pub number: u64,
    /// When it was given.
    pub at: UnixNanos,
    /// The size that the group is to have.
    pub target: u32,
    /// What to do.
    pub kind: OrderKind,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OrderKind {
    /// Start nodes.
    Grow {
        /// How many.
        by: u32,
        /// For whom.
        wants: Vec<Wanted>,
    },
    /// Forget nodes that were asked for and did not come.
    Withdraw {
        /// How many.
        nodes: u32,
    },
    /// End a node, on which nothing runs.
    Remove {
        /// Which.
        node: String,
    },
}

/// What came of an order: the size of the group now, if its provider says it; or why nothing came of it.
pub type Outcome = Result<Option<u32>, String>;

/// What a provider says unasked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The size that it works towards.
    pub target: u32,
    /// What went wrong with nodes that it was to start.
    pub errors: Vec<String>,
}

/// What else is known at a time.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Nodes that are here, without those that are to end.
    pub registered: u32,
    /// How many more would help.
    pub more: u32,
    /// For whom.
    pub wants: Vec<Wanted>,
    /// Nodes on which nothing runs, and since when.
    pub idle: Vec<(String, UnixNanos)>,
}

/// What is known of a group. One row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standing {
    /// The size that its provider works towards; `None`: not known yet.
    pub target: Option<u32>,
    /// The latest order's.
    pub number: u64,
    /// The order that is being carried out.
    pub order: Option<Order>,
    /// When it was last enlarged; 0: never.
    pub grown_at: UnixNanos,
    /// Nodes that are part of `target`, and are not waited for any more.
    pub given_up: u32,
    /// Of those, how many are to be withdrawn.
    pub to_withdraw: u32,
    /// In a row.
    pub failures: u32,
    /// It is left alone until then.
    pub rests_until: UnixNanos,
    /// Nodes that are to end, and since when.
    pub leaving: BTreeMap<String, UnixNanos>,
    /// The latest, newest last.
    pub notes: VecDeque<Note>,
    /// What is wrong now.
    pub problem: Option<String>,
    /// Nodes that were here when it was last looked at.
    pub registered: u32,
}

impl Standing {
    fn note(&mut self, at: UnixNanos, text: String) {
        if self.notes.len() == NOTES {
            self.notes.pop_front();
        }
        self.notes.push_back(Note { at, text });
    }

    fn fail(&mut self, now: UnixNanos, text: String) {
        self.failures = self.failures.saturating_add(1);
        let rest = rest(self.failures);
        self.rests_until = now.saturating_add(rest);
        self.note(now, format!("{text}; left alone for {} s", rest / SECOND));
        self.problem = Some(text);
    }

    /// Nodes that were asked for, are not here, and are waited for.
    pub fn coming(&self, registered: u32) -> u32 {
        self.target.unwrap_or(0).saturating_sub(registered).saturating_sub(self.given_up)
    }

    /// How many more may be asked for now.
    pub fn may_grow(&self, group: &Group, registered: u32) -> u32 {
        let Some(target) = self.target else { return 0 };
        group.max.saturating_sub(target.max(registered))
    }

    /// Until when it is left alone, if it is.
    pub fn resting(&self, now: UnixNanos) -> Option<UnixNanos> {
        Some(self.rests_until).filter(|until| *until > now)
    }

    /// What is believed of a group whose provider does not say it: it is as large as what was seen of it.
    pub fn assume(&mut self, nodes: u32, now: UnixNanos) {
        if self.target.is_none() {
            self.note(now, format!("began with {nodes}"));
            self.target = Some(nodes);
        }
    }

    /// Its provider says how it is. Whether anything is new.
    pub fn observe(&mut self, observed: Result<Observed, String>, now: UnixNanos) -> bool {
        if self.order.is_some() {
            // It may be of before or of after.
            return false;
        }
        let Observed { target, errors } = match observed {
            Ok(observed) => observed,
            Err(text) => {
                let is_new = self.problem.as_ref() != Some(&text);
                if is_new {
                    self.note(now, text.clone());
                    self.problem = Some(text);
                }
                return is_new;
            }
        };
        let mut is_new = false;
        match self.target {
            None => {
                self.note(now, format!("its provider works towards {target}"));
                self.target = Some(target);
                is_new = true;
            }
            Some(believed) if believed > target => {
                self.target = Some(target);
                self.given_up = self.given_up.saturating_sub(believed - target);
                self.fail(now, format!("its provider works towards {target}, and not towards {believed}"));
                is_new = true;
            }
            Some(believed) if believed < target => {
                self.note(
                    now,
                    format!(
                        "its provider works towards {target} instead of {believed}: somebody else asked it"
                    ),
                );
                self.target = Some(target);
                self.grown_at = now;
                is_new = true;
            }
            Some(_) => {}
        }
        let broken = u32::try_from(errors.len()).unwrap_or(u32::MAX).min(self.coming(self.registered));
        if broken > 0 {
            self.give_up(
                broken,
                now,
                format!("{broken} of its nodes could not be started: {}", errors.join("; ")),
            );
            is_new = true;
        }
        if !is_new && self.failures == 0 && self.problem.take().is_some() {
            is_new = true;
        }
        is_new
    }

    fn give_up(&mut self, nodes: u32, now: UnixNanos, why: String) {
        self.given_up += nodes;
        self.to_withdraw = self.given_up;
        self.fail(now, why);
    }

    /// What to ask next, if anything: then it is asked, and nothing else before it is answered. The second says whether
    /// anything is new.
    pub fn next(&mut self, group: &Group, facts: Facts, now: UnixNanos) -> (Option<Order>, bool) {
        let Facts { registered, more, wants, idle } = facts;
        let mut is_new = self.arrived(registered, now);
        let overdue = |since: UnixNanos| now >= since.saturating_add(group.provision);
        let stays: Vec<_> = self.leaving.iter().filter(|(_, since)| overdue(**since)).collect();
        if let Some(node) = stays.first().map(|(node, _)| (*node).clone()) {
            self.leaving.remove(&node);
            self.fail(now, format!("its provider said that it ended {node}, which is still here"));
            is_new = true;
        }
        if self.order.is_some() {
            return (None, is_new);
        }
        let Some(target) = self.target else { return (None, is_new) };
        let coming = self.coming(registered);
        if coming > 0 && overdue(self.grown_at) {
            let seconds = group.provision / SECOND;
            self.give_up(
                coming,
                now,
                format!("{coming} of the nodes that were asked for did not come within {seconds} s"),
            );
            is_new = true;
        }
        if self.to_withdraw > 0 {
            let nodes = std::mem::take(&mut self.to_withdraw);
            let target = target.saturating_sub(nodes).max(registered);
            return (Some(self.give(now, target, OrderKind::Withdraw { nodes })), true);
        }
        if self.resting(now).is_some() {
            return (None, is_new);
        }
        let coming = self.coming(registered);
        let short = group.min.saturating_sub(registered + coming);
        let by = more.max(short).min(self.may_grow(group, registered));
        let has_rested = |pause: Nanos| self.grown_at == 0 || now >= self.grown_at.saturating_add(pause);
        if by > 0 && has_rested(group.cooldown) {
            let target = target.max(registered) + by;
            return (Some(self.give(now, target, OrderKind::Grow { by, wants })), true);
        }
        let Some(pause) = group.idle else { return (None, is_new) };
        let is_spare = by == 0 && more == 0 && coming == 0 && registered > group.min && target > group.min;
        let longest = idle.into_iter().min_by_key(|(_, since)| *since);
        match longest.filter(|(_, since)| is_spare && has_rested(pause) && now >= since.saturating_add(pause))
        {
            Some((node, _)) => {
                let target = target.saturating_sub(1);
                (Some(self.give(now, target, OrderKind::Remove { node })), true)
            }
            None => (None, is_new),
        }
    }

    /// Nodes came or went.
    fn arrived(&mut self, registered: u32, now: UnixNanos) -> bool {
        let before = std::mem::replace(&mut self.registered, registered);
        if registered > before {
            let came = registered - before;
            self.given_up = self.given_up.min(self.target.unwrap_or(0).saturating_sub(registered));
            self.to_withdraw = self.to_withdraw.min(self.given_up);
            if self.failures > 0 || self.problem.is_some() {
                self.failures = 0;
                self.rests_until = 0;
                self.problem = None;
            }
            self.note(now, format!("{came} came: {registered} are here"));
        } else if registered < before {
            self.note(now, format!("{} went: {registered} are here", before - registered));
        }
        registered != before
    }

    fn give(&mut self, now: UnixNanos, target: u32, kind: OrderKind) -> Order {
        self.number += 1;
        let order = Order { number: self.number, at: now, target, kind };
        self.order = Some(order.clone());
        order
    }

    /// An order was answered. The order, if it was the one that is being carried out.
    pub fn settle(&mut self, number: u64, outcome: Outcome, now: UnixNanos) -> Option<Order> {
        let order = self.order.take_if(|order| order.number == number)?;
        match (&order.kind, outcome) {
            (OrderKind::Grow { by, .. }, Ok(actual)) => {
                let target = actual.unwrap_or(order.target);
                self.target = Some(target);
                self.grown_at = now;
                if target < order.target {
                    self.fail(
                        now,
                        format!(
                            "its provider was asked for {}, said yes, and works towards {target}",
                            order.target
                        ),
                    );
                } else {
                    self.problem = None;
                    self.note(now, format!("asked for {by} more: {target} in all"));
                }
            }
            (OrderKind::Withdraw { nodes }, Ok(actual)) => {
                self.target = Some(actual.unwrap_or(order.target));
                self.given_up = self.given_up.saturating_sub(*nodes);
                self.note(now, format!("took back the wish for {nodes}: {} in all", order.target));
            }
            (OrderKind::Remove { node }, Ok(actual)) => {
                self.target = Some(actual.unwrap_or(order.target));
                self.leaving.insert(node.clone(), now);
                self.note(now, format!("gave back {node}: {} in all", order.target));
            }
            (OrderKind::Grow { by, .. }, Err(why)) => self.fail(now, format!("asked for {by} more: {why}")),
            (OrderKind::Withdraw { nodes }, Err(why)) => {
                self.note(now, format!("wanted to take back the wish for {nodes}: {why}"));
            }
            (OrderKind::Remove { node }, Err(why)) => {
                self.fail(now, format!("wanted to give back {node}: {why}"))
            }
        }
        Some(order)
    }

    /// A node of it is not there any more.
    pub fn left(&mut self, node: &str) -> bool {
        self.leaving.remove(node).is_some()
    }
}

/// How long a group is left alone after so many failures in a row.
fn rest(failures: u32) -> Nanos {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST_REST << doublings).min(LONGEST_REST)
}
