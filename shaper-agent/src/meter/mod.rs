//! What the tasks use: the counters of the kernel programs, and beside them the files of the cgroups.
//!
//! Every 100 ms the meter *looks*: it reads the counters of the slots that were active, out of memory that it
//! shares with the programs. Once a second it *takes stock*: the histograms and block IO of what was active in
//! that second, and the files of those cgroups; of the others, a part each second, so that each has its turn
//! within ten. Two stocks make the interval that rates and quantiles are of.
//!
//! Counters never go back while a slot is a task's: a slot is cleared before it is given out again, and forgotten
//! here with its task. What a task has run for since it was switched in is reckoned by the clock until the scheduler's own
//! count of it comes, which may be less (time that a hypervisor took is not the task's): then it stands for a while.

mod alarm;
pub mod files;
pub(crate) mod machine;
mod snapshot;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
};

use shaper_common::{
    abi::{IoKey, IoStat},
    hist::{BUCKETS, Histogram},
};
use shaper_core::{id::BlockDevice, units::Bytes};

use crate::{
    actuate::Target,
    kernel::{
        bpf::{Bpf, BpfError, Counters, Histograms, Measure},
        cgroup::memory::MemoryEvents,
        mapped::monotonic_ns,
    },
};
pub use alarm::{Alarms, Ring};
use files::{Files, Reading};
pub use machine::{Machine, busy_ns, swap_free};

/// A cgroup that does nothing has its files read once in so many seconds.
const TURNS: u64 = 10;

/// The counters of a task at one moment, with what makes quantiles.
#[derive(Clone, Copy, Debug, Default)]
struct Stock {
    counters: Counters,
    histograms: Histograms,
}

/// How long a task waited for CPUs since this agent measures it, by the buckets of the programs: what each holds.
#[derive(Clone, Debug)]
pub struct Waits(pub Box<[u64; BUCKETS]>);

impl Default for Waits {
    fn default() -> Waits {
        Waits(Box::new([0; BUCKETS]))
    }
}

impl Waits {
    /// The programs' own counts wrap.
    fn add(&mut self, now: &Histogram, before: &Histogram) {
        for (sum, grown) in self.0.iter_mut().zip(now.since(before).counts) {
            *sum += u64::from(grown);
        }
    }
}

/// What is known of one task.
struct Metered {
    files: Files,
    /// As of the last look in which it was active.
    counters: Counters,
    /// The most CPU time that was told of, ns.
    cpu_ns_told: Cell<u64>,
    /// Whether it did anything since stock was taken.
    active: bool,
    stock: Stock,
    before: Option<Stock>,
    waits: Waits,
    reading: Reading,
    read_at_ns: u64,
    /// How often its CPU quota was about to be used up.
    quota_warnings: u64,
    /// How often its pressure has rung.
    alarms: u64,
    /// Throttled time when the files were read before, and when that was.
    throttled_before: Option<(u64, u64)>,
}

impl Metered {
    /// The counters of its slot; CPU time by its cgroup's file if the programs are not believed.
    fn count(&self, bpf: &Bpf, slot: u32) -> Counters {
        let counted = counters(bpf, slot, &self.files);
        let cpu_ns = counted.cpu_ns.max(self.cpu_ns_told.get());
        self.cpu_ns_told.set(cpu_ns);
        Counters { cpu_ns, ..counted }
    }

    fn read_files(&mut self) {
        let now = monotonic_ns();
        let before = std::mem::replace(&mut self.reading, self.files.read());
        self.throttled_before = before.throttled_ns.map(|ns| (self.read_at_ns, ns));
        self.read_at_ns = now;
    }
}

/// A block device.
struct Device {
    name: String,
    /// It lies on others, which count the same IO again.
    stacked: bool,
}

/// The meter of a node.
#[derive(Default)]
pub struct Meter {
    tasks: BTreeMap<u32, Metered>,
    looked_at_ns: u64,
    io: BTreeMap<IoKey, IoStat>,
    io_before: BTreeMap<IoKey, IoStat>,
    machine: Option<Machine>,
    machine_before: Option<Machine>,
    stocks: u64,
    devices: HashMap<BlockDevice, Device>,
    alarms: Option<Alarms>,
}

impl Meter {
    /// Begins to measure a task, or goes on with one that an earlier agent had.
    pub fn add(&mut self, bpf: &Bpf, target: &Target) {
        let files = Files::open(target, !bpf.counts_io());
        let counters = counters(bpf, target.slot, &files);
        let reading = files.read();
        let stock = Stock { counters, histograms: bpf.histograms(target.slot) };
        let metered = Metered {
            files,
            counters,
            cpu_ns_told: Cell::new(counters.cpu_ns),
            active: true,
            stock,
            before: None,
            waits: Waits::default(),
            reading,
            read_at_ns: monotonic_ns(),
            quota_warnings: 0,
            alarms: 0,
            throttled_before: None,
        };
        self.tasks.insert(target.slot, metered);
        if let Some(alarms) = &mut self.alarms {
            alarms.set(target.slot, &target.cgroup);
        }
    }

    /// Has the kernel tell of pressure, through these, for each task that is added from now on; `None`: not any more.
    pub fn tell_by(&mut self, alarms: Option<Alarms>) {
        self.alarms = alarms;
    }

    /// The CPU quota of a task is about to be used up.
    pub fn quota_warning(&mut self, slot: u32) {
        if let Some(task) = self.tasks.get_mut(&slot) {
            task.quota_warnings += 1;
        }
    }

    /// The pressure of a task has rung: its files are read at once.
    pub fn alarm(&mut self, slot: u32) {
        if let Some(task) = self.tasks.get_mut(&slot) {
            task.alarms += 1;
            task.read_files();
        }
    }

    /// Memory that a task uses, as last read.
    pub fn memory_used(&self, slot: u32) -> Option<Bytes> {
        self.tasks.get(&slot)?.reading.memory
    }

    /// What has happened to the memory of a task, as of now.
    pub fn memory_events(&self, slot: u32) -> Option<MemoryEvents> {
        self.tasks.get(&slot)?.files.memory_events()
    }

    /// Memory of the machine that could be had without swapping, as of the last stock.
    pub fn memory_available(&self) -> Option<Bytes> {
        self.machine.as_ref().map(|machine| Bytes(machine.memory_available))
    }

    /// Opens the files of a task anew: some were taken away, or are there now, while its cgroup stayed.
    pub fn open_anew(&mut self, bpf: &Bpf, target: &Target) {
        if let Some(task) = self.tasks.get_mut(&target.slot) {
            task.files = Files::open(target, !bpf.counts_io());
            if let Some(alarms) = &mut self.alarms {
                alarms.set(target.slot, &target.cgroup);
            }
        }
    }

    /// Forgets a task.
    pub fn remove(&mut self, slot: u32) {
        self.tasks.remove(&slot);
        if let Some(alarms) = &mut self.alarms {
            alarms.forget(slot);
        }
        self.io.retain(|key, _| key.slot != slot);
        self.io_before.retain(|key, _| key.slot != slot);
    }

    /// Reads the counters of every task that was active since the last look.
    pub fn look(&mut self, bpf: &Bpf) {
        let active = bpf.look();
        self.looked_at_ns = monotonic_ns();
        for slot in active {
            if let Some(task) = self.tasks.get_mut(&slot) {
                task.counters = task.count(bpf, slot);
                task.active = true;
            }
        }
    }

    /// The counters of a task as of now.
    pub fn counters_now(&self, slot: u32, bpf: &Bpf) -> Option<Counters> {
        Some(self.tasks.get(&slot)?.count(bpf, slot))
    }

    /// The counters of a task as of the last look.
    pub fn counters(&self, slot: u32) -> Option<Counters> {
        Some(self.as_of_look(self.tasks.get(&slot)?))
    }

    /// What was not active then had the same counters as before.
    fn as_of_look(&self, task: &Metered) -> Counters {
        Counters { at_ns: task.counters.at_ns.max(self.looked_at_ns), ..task.counters }
    }

    /// The counters of a task one or two seconds ago.
    pub fn counters_before(&self, slot: u32) -> Option<&Counters> {
        let task = self.tasks.get(&slot)?;
        Some(&task.before.as_ref().unwrap_or(&task.stock).counters)
    }

    /// How long the CPU limit has stopped a task so far, ns, as of now.
    pub fn throttled_ns(&self, slot: u32) -> Option<u64> {
        self.tasks.get(&slot)?.files.throttled_ns()
    }

    /// The same as of when its files were read last.
    pub fn throttled_ns_read(&self, slot: u32) -> Option<u64> {
        self.tasks.get(&slot)?.reading.throttled_ns
    }

    /// How long a task waited for CPUs, as of the last stock; `None` where that is not measured.
    pub fn waits(&self, slot: u32, bpf: &Bpf) -> Option<Waits> {
        let task = self.tasks.get(&slot).filter(|_| bpf.trusts(Measure::RunQueue))?;
        Some(task.waits.clone())
    }

    /// The same for a node that measures nothing yet.
    pub fn take_stock_of_machine(&mut self) {
        self.machine_before = self.machine.replace(Machine::read());
    }

    /// Takes stock: once a second, after a look. Returns the slots whose cgroups have gone, or have lost or gained files:
    /// `cgroup.pressure` and the controllers of the cgroup above can be switched at any time.
    pub fn take_stock(&mut self, bpf: &Bpf) -> Result<Vec<u32>, BpfError> {
        self.stocks += 1;
        let counts_pressure = self.machine.is_some_and(|machine| machine.pressure[0].is_some());
        let (turn, looked_at_ns) = (self.stocks % TURNS, self.looked_at_ns);
        let mut doubtful = Vec::new();
        let mut has_io = false;
        for (slot, task) in &mut self.tasks {
            let is_its_turn = u64::from(*slot) % TURNS == turn;
            let histograms = if task.active { bpf.histograms(*slot) } else { task.stock.histograms };
            if task.active {
                task.waits.add(&histograms.run_queue, &task.stock.histograms.run_queue);
            }
            let at_ns = task.counters.at_ns.max(looked_at_ns);
            let stock = Stock { counters: Counters { at_ns, ..task.counters }, histograms };
            task.before = Some(std::mem::replace(&mut task.stock, stock));
            if task.active || is_its_turn {
                task.read_files();
                let lacks_pressure = counts_pressure && is_its_turn && !task.files.have_pressure();
                if task.reading.is_gone || lacks_pressure {
                    doubtful.push(*slot);
                }
            }
            has_io |= task.active;
            task.active = false;
        }
        if has_io && bpf.counts_io() {
            let mut now = bpf.block_io()?;
            now.retain(|key, _| self.tasks.contains_key(&key.slot));
            self.io_before = std::mem::replace(&mut self.io, now);
        } else {
            self.io_before.clone_from(&self.io);
        }
        self.take_stock_of_machine();
        Ok(doubtful)
    }
}

fn counters(bpf: &Bpf, slot: u32, files: &Files) -> Counters {
    let counted = bpf.counters(slot);
    if bpf.trusts(Measure::Cpu) {
        return counted;
    }
    Counters { cpu_ns: files.cpu_ns().unwrap_or(0), ..counted }
}
