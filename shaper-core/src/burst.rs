//! CPU that nobody was promised, lent for a moment to a task that is about to reach its limit.
//!
//! A CPU limit is enforced by the kernel as a quota: so much CPU time in each period of 100 ms. A service that is idle
//! most of the time and then needs more than that in one period is stopped until the next, although it uses less
//! than its limit on average and CPUs are free. So its quota is raised before it is used up, and the limit is kept
//! where its owner means it: as a mean.
//!
//! Three things bound a loan. They are kept by integers alone, and the tests compare each with a simulation of the
//! kernel that knows nothing of this module.
//!
//! # The window: who may be lent anything
//!
//! A task's **ceiling** is a mean over [`WINDOW`], 10 s. Its [`Account`] remembers what it used in each of the last
//! 101 slots of 100 ms: any real window of 10 s lies within 101 of them, if turns come on time. What it uses in 101 slots must not exceed
//! 101 periods' worth of its ceiling. That is the ceiling plus 1 % over 10 s, and just what a plain quota admits.
//!
//! What is used beyond the ceiling has to be made good within the window, after it as well as before it: of the
//! windows that hold a burst, one begins with it. A task that does not rest by itself is therefore made to, but
//! never below three quarters of its ceiling ([`Account::floor`]): a debt is paid back slowly. A quota is *safe* if
//! there is a path from it down to the floor, a quarter at a time, on which every window that is still open stays
//! within its bound:
//!
//! ```text
//!  quota  ┌──────┐
//!         │ loan └──┐ ¾
//!  grant ─┘         └──┐
//!  floor               └──────────────────────────
//!         ├─ this slot, the next … ─────────▶ 101 slots: each window on the way has to fit
//! ```
//!
//! If a quota is safe and the task uses no more than the path says, then the next quota on the path is safe one slot
//! later: it is the same path, less its first step. So the bound holds for good once it holds for each loan, which
//! is what is checked. A step on the path counts double where the quota is written: the kernel refills a quota with
//! each write of it.
//!
//! A task that rests comes back to its grant once it does not take all it is given, or, if it always does, to 99 % of it
//! once it can stay there for good: the write that raises its quota is worth a refill, which is the hundredth.
//!
//! Credit is **earned**. A new account begins as if the task had been at its ceiling, and a slot in which it was made to
//! rest counts as if it had had its whole grant. So a task that takes what it can get is held at its ceiling from its
//! first second, and one that was idle for a while may burst.
//!
//! # The pool: how much there is to lend
//!
//! Of the node's CPUs a twentieth is kept in reserve. The rest, less what was promised, is the pool: a promise is what
//! a task is guaranteed, and what it uses within its limit now. What others use without a limit was not promised
//! to them: there the kernel's weights decide. The pool is measured at each turn; if it has become smaller than what is
//! lent, loans are called in at once, so that what is lent never exceeds it, and whoever is promised something has it.
//!
//! # The loan
//!
//! A warning (the kernel says that the quota is nearly used up) raises the quota by half of the grant, or by what the pool
//! has. A loan that nothing asks for any more is lowered at the turns, by at most a quarter of the quota: a quota that
//! drops below what was used in the running period stops the task until that is paid.
//!
//! A turn is meant to come every 100 ms, and is told the task's CPU time since its beginning. What was used
//! since the last turn is booked when it is seen. So where one turn comes late and the one of 10 s later does not, a window
//! reaches into 102 slots: what is used in those stays within 102 periods' worth, and the bound is 2 %, not 1.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::units::{Micros, Millicores};

/// The period of a CPU quota, µs.
pub const PERIOD: u64 = 100_000;
/// Over how long a ceiling is a mean, µs.
pub const WINDOW: u64 = 100 * PERIOD;
/// Slots that any window lies within.
const SLOTS: usize = (WINDOW / PERIOD) as usize + 1;

impl Millicores {
    /// What this is in a period of a quota.
    pub const fn in_a_period(self) -> Micros {
        Micros(self.0 * (PERIOD / 1000))
    }
}

impl Micros {
    /// CPU time in a period of a quota, as CPU time per time; rounded down.
    pub const fn per_period(self) -> Millicores {
        Millicores(self.0 / (PERIOD / 1000))
    }
}

/// What a task may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Its quota where nothing is lent, in a period.
    pub grant: Micros,
    /// What its mean must not exceed, in a period: at least the grant.
    pub ceiling: Micros,
    /// What nothing of is lent to others even while it does not use it, in a period.
    pub guaranteed: Micros,
    /// How much of its quota the kernel lets it save from period to period (`cpu.max.burst`); at most the grant.
    pub saving: Micros,
}

/// A quota that is to be in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota<K> {
    /// Whose.
    pub key: K,
    /// In a period.
    pub quota: Micros,
    /// What the kernel may let it save: at most the quota, or the kernel would refuse it.
    pub saving: Micros,
}

/// What is lent to a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loan {
    /// Now, in a period.
    pub lent: Micros,
    /// Whether it has to rest now, to make good what it was lent.
    pub pays_back: bool,
    /// How often it was lent something.
    pub count: u64,
}

/// What a task used in the slots that a window covers; the last is the one of the latest entry.
#[derive(Clone, Debug)]
struct Past {
    slots: [u64; SLOTS],
    last: u64,
}

impl Past {
    /// One in which each slot before `now` had so much.
    fn of(each: u64, now: u64) -> Past {
        Past { slots: [each; SLOTS], last: now / PERIOD }
    }

    fn at(&self, slot: u64) -> usize {
        (slot % SLOTS as u64) as usize
    }

    fn advance(&mut self, now: u64) {
        let slot = now / PERIOD;
        for new in (self.last + 1..=slot).rev().take(SLOTS) {
            self.slots[self.at(new)] = 0;
        }
        self.last = self.last.max(slot);
    }

    fn add(&mut self, used: u64, now: u64) {
        self.advance(now);
        let index = self.at(self.last);
        self.slots[index] += used;
    }

    /// Whether each window that is still open stays within `allowance` if the slots to come go as `path` says, and
    /// within `late` where turns come late and it holds a slot more.
    fn admits(&self, allowance: u64, late: u64, path: impl IntoIterator<Item = u64>) -> bool {
        let mut sum: u64 = self.slots.iter().sum();
        for (ahead, step) in (1..=SLOTS as u64).zip(path) {
            sum += step;
            if sum > late {
                return false;
            }
            // The slot that has this place now is the oldest: the one to come takes it.
            sum -= self.slots[self.at(self.last + ahead)];
            if sum > allowance {
                return false;
            }
        }
        true
    }
}

/// One task.
#[derive(Clone, Debug)]
struct Account {
    terms: Terms,
    quota: u64,
    used: Past,
    /// As `used`, but what it was made to leave counts as used.
    credited: Past,
    /// CPU time in all as of the last turn, and when that was.
    seen: Option<(u64, u64)>,
    /// What it used in a period, as of the last turn.
    usage: u64,
    /// Whether it took all that it was given while it rested.
    is_held: bool,
    warned: bool,
    /// Until then windows are open that hold a loan, or a rest: each write of a quota is a refill. µs.
    open_until: u64,
    count: u64,
}

impl Account {
    fn new(terms: Terms, now: u64) -> Account {
        let past = Past::of(terms.ceiling.0, now);
        Account {
            terms,
            quota: terms.grant.0,
            used: past.clone(),
            credited: past,
            seen: None,
            usage: 0,
            is_held: false,
            warned: false,
            open_until: 0,
            count: 0,
        }
    }

    fn grant(&self) -> u64 {
        self.terms.grant.0
    }

    /// As low as a quota goes to make a loan good: three quarters of the ceiling, or the grant if that is less.
    fn floor(&self) -> u64 {
        (self.terms.ceiling.0 * 3 / 4).min(self.grant()).max(1)
    }

    fn lent(&self) -> u64 {
        self.quota.saturating_sub(self.grant())
    }

    /// Whether its windows stay within their bounds, less `spare`, on this way, as far as `past` goes.
    fn admits(&self, past: &Past, spare: u64, path: impl IntoIterator<Item = u64>) -> bool {
        let allowance = self.terms.ceiling.0 * SLOTS as u64 - spare;
        past.admits(allowance, allowance + self.terms.ceiling.0, path)
    }

    /// From a quota that is written now down to the floor: what may be used in each slot on the way, less what was saved. A
    /// rest is begun by two writes: the kernel must let it save nothing, first.
    fn way_down(&self, from: u64) -> impl Iterator<Item = u64> {
        let (grant, floor) = (self.grant(), self.floor());
        let mut entered = Some(from);
        std::iter::from_fn(move || {
            let Some(quota) = entered else { return Some(floor) };
            entered = match quota {
                _ if quota > grant => Some(grant.max(quota * 3 / 4)),
                _ if quota > floor => Some(floor),
                _ => None,
            };
            Some(if quota > floor { 2 * quota } else { 3 * floor })
        })
    }

    /// Whether it may go on with the quota that it has. That is not written again, but may be unused so far in the period
    /// that runs.
    fn may_keep(&self) -> bool {
        let first = 2 * self.quota + self.terms.saving.0;
        let path = std::iter::once(first).chain(self.way_down(self.lower()));
        self.admits(&self.used, 0, path)
    }

    /// The next quota on the way down.
    fn lower(&self) -> u64 {
        if self.quota > self.grant() { self.grant().max(self.quota * 3 / 4) } else { self.floor() }
    }

    /// What a task that still takes all it can get comes back to from its rest: a hundredth below the grant, for
    /// the refill that the write of it is worth.
    fn steady(&self) -> u64 {
        (self.grant() / 100 * 99).max(self.floor())
    }

    /// Whether it may have that from now on, whatever it does with it, if what it uses first is `first`.
    fn may_be_steady(&self, first: u64) -> bool {
        self.admits(&self.used, 0, std::iter::once(first).chain(std::iter::repeat(self.steady())))
    }

    /// Whether it may have its grant again; it is not known to need it.
    fn may_have_its_grant(&self) -> bool {
        let mut path = self.way_down(self.grant());
        let first = path.next().unwrap_or(0) + self.grant() + self.terms.saving.0;
        self.admits(&self.used, 0, std::iter::once(first).chain(path))
    }

    /// Books what was used since the last turn.
    fn book(&mut self, total: u64, now: u64) {
        let Some((before, then)) = self.seen.replace((total, now)) else {
            // What it used before it was seen is not known, and was booked as its ceiling.
            return;
        };
        let used = total.saturating_sub(before);
        let elapsed = now.saturating_sub(then).max(1);
        let at = |quota: u64| quota.saturating_mul(elapsed) / PERIOD;
        self.usage = used.saturating_mul(PERIOD) / elapsed;
        self.used.add(used, now);
        self.is_held = self.quota < self.grant() && used >= at(self.quota) / 8 * 7;
        self.credited.add(if self.is_held { used.max(at(self.grant())) } else { used }, now);
    }

    /// The quota of the next slot, by its own past alone.
    fn next(&self, now: u64) -> u64 {
        let grant = self.grant();
        if self.quota > grant {
            if self.warned && self.may_keep() { self.quota } else { self.lower() }
        } else if self.quota < grant {
            let (floor, steady) = (self.floor(), self.steady());
            match self.quota {
                _ if !self.is_held && self.may_have_its_grant() => grant,
                at if at < steady && self.may_be_steady(2 * steady) => steady,
                at if at > floor && !self.may_be_steady(steady) => floor,
                at => at,
            }
        } else if now < self.open_until && !self.may_keep() {
            self.floor()
        } else {
            grant
        }
    }

    /// Whether it may be lent so much, if it has used `pending` since the last turn.
    fn may_borrow(&self, quota: u64, pending: u64) -> bool {
        let mut path = self.way_down(quota);
        let first = path.next().unwrap_or(0) + pending + self.terms.saving.0;
        // A period less than there is: turns do not come to the microsecond.
        self.admits(&self.credited, self.terms.ceiling.0, std::iter::once(first).chain(path))
    }

    /// What nobody else can have of the node.
    fn committed(&self) -> u64 {
        self.usage.min(self.grant()).max(self.terms.guaranteed.0)
    }
}

/// The loans of a node. `K` names its tasks.
#[derive(Clone, Debug)]
pub struct Pool<K> {
    lendable: u64,
    most: u64,
    size: u64,
    accounts: BTreeMap<K, Account>,
}

impl<K: Copy + Ord> Pool<K> {
    /// That of a node with so much CPU, of which at most `most` is lent. Empty until the first turn.
    pub fn new(capacity: Millicores, most: Millicores) -> Pool<K> {
        let capacity = capacity.in_a_period().0;
        Pool {
            lendable: capacity - capacity / 20,
            most: most.in_a_period().0,
            size: 0,
            accounts: BTreeMap::new(),
        }
    }

    /// Opens an account, or changes its terms. Nothing is lent to it then: recall a loan first. Its past is kept as long
    /// as its ceiling stays; with a new one it begins anew, at its ceiling.
    pub fn enrol(&mut self, key: K, terms: Terms, now: u64) {
        let terms =
            Terms { ceiling: terms.ceiling.max(terms.grant), saving: terms.saving.min(terms.grant), ..terms };
        match self.accounts.get_mut(&key) {
            Some(account) if account.terms.ceiling == terms.ceiling => {
                account.terms = terms;
                account.quota = terms.grant.0;
            }
            _ => drop(self.accounts.insert(key, Account::new(terms, now))),
        }
    }

    /// Closes an account.
    pub fn withdraw(&mut self, key: K) {
        self.accounts.remove(&key);
    }

    /// Ends a loan, or a rest, of a task at once. `None`: it has its grant.
    pub fn recall(&mut self, key: K) -> Option<Quota<K>> {
        let account = self.accounts.get_mut(&key)?;
        let had = std::mem::replace(&mut account.quota, account.terms.grant.0);
        (had != account.quota).then(|| account.in_force(key))
    }

    /// The kernel says that a task has nearly used up its quota; it has used `total` since its beginning. What it may have
    /// now; `None`: nothing more.
    pub fn on_warning(&mut self, key: K, total: Micros, now: u64) -> Option<Quota<K>> {
        let room = self.size.saturating_sub(self.lent().0);
        let account = self.accounts.get_mut(&key)?;
        account.warned = true;
        let step = (account.grant() / 2).min(room);
        // A turn has to come first: without one its use is not known.
        let (seen, _) = account.seen?;
        if account.quota < account.grant() || step < least(account.grant()) {
            return None;
        }
        account.used.advance(now);
        account.credited.advance(now);
        let quota = account.quota + step;
        if !account.may_borrow(quota, total.0.saturating_sub(seen)) {
            return None;
        }
        account.quota = quota;
        account.count += 1;
        account.open_until = now + WINDOW + PERIOD;
        Some(account.in_force(key))
    }

    /// The raised quota could not be written: the task has what it had before the loan.
    pub fn on_refusal(&mut self, key: K) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.quota = account.terms.grant.0;
        }
    }

    /// A turn: what each task has used in all by now. Returns the quotas that change.
    pub fn turn(&mut self, totals: impl IntoIterator<Item = (K, Micros)>, now: u64) -> Vec<Quota<K>> {
        for (key, total) in totals {
            if let Some(account) = self.accounts.get_mut(&key) {
                account.book(total.0, now);
            }
        }
        let committed: u64 = self.accounts.values().map(Account::committed).sum();
        self.size = self.lendable.saturating_sub(committed).min(self.most);
        let mut next: BTreeMap<K, u64> =
            self.accounts.iter().map(|(key, account)| (*key, account.next(now))).collect();
        let lent = |next: &BTreeMap<K, u64>| -> u64 {
            next.iter().map(|(key, quota)| quota.saturating_sub(self.accounts[key].grant())).sum()
        };
        let wanted = lent(&next);
        if wanted > self.size {
            for (key, quota) in &mut next {
                let account = &self.accounts[key];
                if *quota > account.grant() {
                    let part = (*quota - account.grant()) as u128 * self.size as u128 / wanted as u128;
                    // Written in any case, so it has to be at least the step that the path allows for.
                    *quota = account.lower().min(account.grant() + part as u64);
                }
            }
        }
        let mut changed = Vec::new();
        for (key, account) in &mut self.accounts {
            account.warned = false;
            if account.quota != account.grant() {
                account.open_until = now + WINDOW + PERIOD;
            }
            if account.quota != next[key] {
                account.quota = next[key];
                changed.push(account.in_force(*key));
            }
        }
        changed
    }

    /// How much there is to lend, of which some is lent; in a period.
    pub fn size(&self) -> Micros {
        Micros(self.size)
    }

    /// What is lent to all tasks together, in a period.
    pub fn lent(&self) -> Micros {
        Micros(self.accounts.values().map(Account::lent).sum())
    }

    /// The quota that is in force for a task, lent or not; `None` if it has no account.
    pub fn quota(&self, key: K) -> Option<Quota<K>> {
        self.accounts.get(&key).map(|account| account.in_force(key))
    }

    /// What is lent to a task; `None` if it has no account.
    pub fn loan(&self, key: K) -> Option<Loan> {
        let account = self.accounts.get(&key)?;
        Some(Loan {
            lent: Micros(account.lent()),
            pays_back: account.quota < account.grant(),
            count: account.count,
        })
    }

    /// Everybody's quota, as it should be in force.
    pub fn quotas(&self) -> impl Iterator<Item = Quota<K>> {
        self.accounts.iter().map(|(key, account)| account.in_force(*key))
    }
}

impl Account {
    fn in_force<K>(&self, key: K) -> Quota<K> {
        // Whoever rests saves nothing: it would be used on top of what it comes back to.
        let saving = if self.quota < self.grant() { 0 } else { self.terms.saving.0 };
        Quota { key, quota: Micros(self.quota), saving: Micros(saving) }
    }
}

/// A loan of less is not worth a write.
fn least(grant: u64) -> u64 {
    (grant / 20).max(1000)
}
