//! Lending CPU time, from the kernel's warning to the quota (`shaper_core::burst` decides how much, and explains it).
//!
//! A warning comes a tick or two before a quota is used up, so the loan must not wait for whatever the node's thread does
//! just then: starting a task takes as long as its disk. The books are therefore apart, behind a lock that is held for a
//! few microseconds and never over anything that waits; the thread that follows the kernel's events decides and writes in
//! the same wake-up. It writes through the one executor, as everybody does ([`actuate::lend`]), and only what the lease
//! table names by then.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shaper_common::{
    abi::Event,
    hist::{self, Histogram, QUEUE_SHIFT},
};
use shaper_core::{
    burst::{Loan, Pool, Quota, Terms},
    id::TaskId,
    limits::Limit,
    policy::Effective,
    snapshot::{CpuPool, Latency},
    spec::Policy,
    units::{Micros, Millicores},
};

use super::{Node, NodeError, Task, events::warn_ns, not_established};
use crate::{
    actuate::{self, QuotaFile, Target},
    config::BurstPool,
    kernel::{
        bpf::{Bpf, Measure, QuotaWatch},
        cgroup::{
            Open, ReadOnly,
            cpu::{self, CpuStat},
        },
        mapped::monotonic_ns,
    },
    launch,
    lease::Leases,
};

/// A warden that dies is started again, but not more often than this.
const WARDEN_PAUSE_NS: u64 = 1_000_000_000;

/// The loans of this node; a clone is another way to the same.
#[derive(Clone)]
pub(super) struct Lending(Arc<Mutex<Books>>);

struct Books {
    pool: Pool<u32>,
    leases: Leases,
    files: BTreeMap<u32, QuotaFile>,
    watch: QuotaWatch,
    /// Where CPU time is read if the programs' count of it is not believed; all files, or none.
    stats: BTreeMap<u32, Open<CpuStat, ReadOnly>>,
    trusts_programs: bool,
    /// Without one, nothing is lent.
    has_warden: bool,
    takings: u64,
    /// From the warning to the quota read back.
    latency: Histogram,
}

impl Lending {
    /// Opens the books, if this node lends anything.
    fn open(node: &Node, bpf: &Bpf) -> Result<Option<Lending>, NodeError> {
        let capacity = node.config.capacity.cpu;
        let most = match node.config.cpu_burst_pool {
            BurstPool::Off => return Ok(None),
            BurstPool::Auto => capacity,
            BurstPool::AtMost(cores) => cores,
        };
        if !bpf.warns_of_budgets() {
            tracing::warn!(
                "no CPU time is lent: the kernel programs cannot tell when a quota is nearly used up"
            );
            return Ok(None);
        }
        let (leases, taken) = Leases::begin(&Leases::path(node.state_dir()), bpf.slots())?;
        for taken in taken {
            match taken.result {
                Ok(_) => {
                    tracing::info!(cgroup = %taken.cgroup.display(), "what an earlier agent has lent is taken back")
                }
                Err(error) => {
                    tracing::warn!(cgroup = %taken.cgroup.display(), %error, "cannot take back what an earlier agent has lent");
                }
            }
        }
        Ok(Some(Lending(Arc::new(Mutex::new(Books {
            pool: Pool::new(capacity, most),
            takings: leases.takings(),
            leases,
            files: BTreeMap::new(),
            watch: bpf.quota_watch(),
            stats: BTreeMap::new(),
            trusts_programs: bpf.trusts(Measure::Cpu),
            has_warden: false,
            latency: Histogram::default(),
        })))))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Every change of the books is whole before anything that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is lent to a slot.
    pub(super) fn loan(&self, slot: u32) -> Option<Loan> {
        self.books().pool.loan(slot)
    }

    /// The quota that is in force for a slot, lent or not.
    pub(super) fn quota(&self, slot: u32) -> Option<Quota<u32>> {
        self.books().pool.quota(slot)
    }

    /// Ends the loan of a slot, and lends it nothing until it is enrolled again.
    pub(super) fn suspend(&self, slot: u32) {
        let mut books = self.books();
        books.recall(slot);
        books.files.remove(&slot);
    }

    /// Closes the account of a slot; what is in force stays for whoever comes next to restore.
    pub(super) fn withdraw(&self, slot: u32) {
        self.books().withdraw(slot);
    }

    /// The kernel's warning, on the thread that follows its events.
    pub(super) fn warned(&self, event: &Event) {
        self.books().warned(event);
    }
}

fn now_us() -> u64 {
    monotonic_ns() / 1000
}

impl Books {
    fn warned(&mut self, event: &Event) {
        let slot = event.slot;
        if !self.has_warden || !self.files.contains_key(&slot) {
            return;
        }
        let Some(total) = self.total(slot) else { return };
        let Some(quota) = self.pool.on_warning(slot, total, now_us()) else { return };
        self.leases.beat();
        if self.put_in_force(&quota) {
            let took = monotonic_ns().saturating_sub(event.at_ns);
            let bucket = &mut self.latency.counts[hist::index(took, QUEUE_SHIFT)];
            *bucket = bucket.wrapping_add(1);
        } else {
            self.pool.on_refusal(slot);
        }
    }

    /// Puts a quota in force, the note of it first; tells whether that went well.
    fn put_in_force(&mut self, quota: &Quota<u32>) -> bool {
        let Some(file) = self.files.get(&quota.key) else { return false };
        let is_grant = self.pool.loan(quota.key).is_some_and(|loan| loan.lent.0 == 0 && !loan.pays_back);
        if !is_grant {
            self.leases.set_lent(quota.key, true);
        }
        match actuate::lend(file, quota) {
            Ok(()) => {
                if is_grant {
                    self.leases.set_lent(quota.key, false);
                }
                self.watch.filled_up(quota.key, warn_ns(quota.quota.0 * 1000));
                true
            }
            Err(error) => {
                if !error.is_gone() {
                    tracing::warn!(slot = quota.key, error = %launch::chain(&error), "cannot change a CPU quota for a while");
                }
                false
            }
        }
    }

    /// Every 100 ms: books what was used, and lowers what nobody asks for any more.
    fn turn(&mut self) {
        if self.leases.takings() != self.takings {
            // The warden has taken back what was lent, perhaps while something was being lent.
            self.takings = self.leases.takings();
            let slots: Vec<u32> = self.files.keys().copied().collect();
            for slot in slots {
                self.pool.recall(slot);
            }
            let grants: Vec<Quota<u32>> = self.pool.quotas().collect();
            for grant in grants {
                self.put_in_force(&grant);
            }
        }
        self.leases.beat();
        let totals: Vec<(u32, Micros)> =
            self.files.keys().filter_map(|slot| Some((*slot, self.total(*slot)?))).collect();
        for quota in self.pool.turn(totals, now_us()) {
            self.put_in_force(&quota);
        }
    }

    /// CPU time that a task has used; `None` where its cgroup is gone.
    fn total(&self, slot: u32) -> Option<Micros> {
        if self.trusts_programs {
            return Some(Micros(self.watch.cpu_ns(slot) / 1000));
        }
        self.stats.get(&slot)?.read().ok().map(|stat| stat.usage)
    }

    fn enrol(&mut self, target: &Target, file: QuotaFile, terms: Terms) -> Result<(), NodeError> {
        let slot = target.slot;
        self.leases.note(slot, &file.lease(terms.grant))?;
        if !self.trusts_programs
            && let Some(stat) = target.cgroup.open_file(cpu::STAT)?
        {
            self.stats.insert(slot, stat);
        }
        self.pool.enrol(slot, terms, now_us());
        self.files.insert(slot, file);
        Ok(())
    }

    fn recall(&mut self, slot: u32) {
        if let Some(quota) = self.pool.recall(slot) {
            self.put_in_force(&quota);
        }
    }

    fn withdraw(&mut self, slot: u32) {
        self.pool.withdraw(slot);
        self.leases.forget(slot);
        self.files.remove(&slot);
        self.stats.remove(&slot);
    }
}

/// What a task may be lent on top of: `None` if it has no CPU limit.
fn terms(task: &Task, policies: &[Policy], capacity: Millicores, saving: Micros) -> Option<Terms> {
    let Limit::At(limit) = task.record.limits.cpu else { return None };
    let grant = limit.in_a_period();
    Some(match &task.record.assignment {
        None => Terms { grant, ceiling: grant, guaranteed: Micros(0), saving },
        // What the broker's tasks are granted adds up to what the node has, and is a promise.
        Some(assignment) => {
            let spec = &assignment.spec;
            let ceiling = Effective::of(policies, spec).cpu_limit(spec).at().unwrap_or(capacity);
            Terms { grant, ceiling: ceiling.in_a_period().max(grant), guaranteed: grant, saving }
        }
    })
}

impl Node {
    /// Begins to lend.
    pub(super) fn open_books(&mut self) -> Result<(), NodeError> {
        let bpf = self.bpf.as_ref().ok_or_else(not_established)?;
        self.lending = Lending::open(self, bpf)?;
        Ok(())
    }

    /// Takes back what is lent, and lends nothing any more.
    pub(super) fn close_books(&mut self) {
        let Some(lending) = self.lending.take() else { return };
        let mut books = lending.books();
        let slots: Vec<u32> = books.files.keys().copied().collect();
        for slot in slots {
            books.recall(slot);
            books.withdraw(slot);
        }
        books.has_warden = false;
        drop(books);
        self.warden = None;
    }

    /// A turn of the loans, and of what has to be there for them.
    pub(super) fn turn_loans(&mut self) {
        let Some(lending) = self.lending.clone() else { return };
        let wants_warden = {
            let mut books = lending.books();
            books.turn();
            !books.has_warden && !books.files.is_empty()
        };
        let may_start = self.warden_at_ns.is_none_or(|at| at + WARDEN_PAUSE_NS <= monotonic_ns());
        if wants_warden && may_start {
            self.warden_at_ns = Some(monotonic_ns());
            match self.start_warden(&lending) {
                Ok(warden) => {
                    self.warden = Some(warden);
                    lending.books().has_warden = true;
                }
                Err(error) => {
                    tracing::warn!(error = %launch::chain(&error), "no CPU time is lent: there is no shaper-warden to take it back");
                }
            }
        }
    }

    fn start_warden(&self, lending: &Lending) -> Result<Warden, NodeError> {
        let system = |verb| move |source: io::Error| NodeError::System { verb, source };
        let ground = self.ground.as_ref().ok_or_else(not_established)?;
        let (cgroup, v1_cpu) = ground.warden()?;
        let epoch = lending.books().leases.epoch();
        let child = Command::new(&self.config.warden)
            .arg(Leases::path(self.state_dir()))
            .args([epoch.to_string(), std::process::id().to_string()])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(system("start shaper-warden"))?;
        let pid = child.id();
        // It is not reaped yet, so its pid is its own.
        let warden = Warden { pid, fd: launch::pidfd(pid).map_err(system("open a pidfd of shaper-warden"))? };
        cgroup.add(pid)?;
        if let Some(group) = v1_cpu {
            group.add(pid)?;
        }
        let ends = warden.fd.try_clone().map_err(system("watch shaper-warden"))?;
        let handle = self.handle.clone();
        self.runtime.spawn(async move {
            if let Err(error) = launch::ended(ends).await {
                tracing::warn!(%error, "cannot wait for shaper-warden");
            }
            handle.tell(move |node| node.warden_is_over(epoch)).await;
        });
        Ok(warden)
    }

    fn warden_is_over(&mut self, epoch: u64) {
        let Some(lending) = &self.lending else { return };
        let mut books = lending.books();
        if books.leases.epoch() != epoch {
            return;
        }
        tracing::warn!("shaper-warden has ended: nothing is lent until there is another");
        books.has_warden = false;
        let slots: Vec<u32> = books.files.keys().copied().collect();
        for slot in slots {
            books.recall(slot);
        }
        drop(books);
        self.warden = None;
        self.turn_loans();
    }

    /// Opens, changes or closes the account of a task, by the limit that it has now.
    pub(super) fn enrol(&self, id: &TaskId) -> Result<(), NodeError> {
        let Some(lending) = &self.lending else { return Ok(()) };
        let task = self.task(id)?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let Some(file) = QuotaFile::open(target)? else { return Ok(()) };
        match terms(task, &self.policies, self.config.capacity.cpu, file.saving()?) {
            Some(terms) => lending.books().enrol(target, file, terms),
            None => {
                lending.books().withdraw(target.slot);
                Ok(())
            }
        }
    }

    /// The pool, as it is told.
    pub(super) fn cpu_pool(&self) -> Option<CpuPool> {
        let books = self.lending.as_ref()?.books();
        let latency = &books.latency;
        Some(CpuPool {
            size: books.pool.size().per_period(),
            lent: books.pool.lent().per_period(),
            has_warden: books.has_warden,
            latency: Latency {
                count: latency.total(),
                p50_ns: latency.quantile_ns(500, QUEUE_SHIFT),
                p99_ns: latency.quantile_ns(990, QUEUE_SHIFT),
            },
        })
    }
}

/// The process that takes back what is lent if this one cannot. Dropping this ends it.
pub(super) struct Warden {
    pid: u32,
    fd: OwnedFd,
}

impl Warden {
    /// Its pid.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        // One that has ended is fine. It is reaped by whoever waits for it.
        let _ = rustix::process::pidfd_send_signal(&self.fd, rustix::process::Signal::KILL);
    }
}
