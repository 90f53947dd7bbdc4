//! The GPU cards of this node: taken up as they are found, and told of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
    time::Duration,
};

use shaper_core::{
    doctor::{Availability, Rung},
    gpu::{CardMemory, CardOffer, CardSet, CardUsage, CharDevice},
    id::{ExecutionId, TaskId},
    ledger::Cause,
    limits::Limit,
    units::Bytes,
};

use super::{Node, NodeError, RunRequest, Task, card_watch::Over, change::Hold};
use crate::{
    actuate::Wish,
    config::Config,
    gpu::{self, Asked, CardReading, CgroupUse, Facts, Holders, Library, LibraryState, Reader, Table},
    kernel::mapped::monotonic_ns,
    launch,
};

/// Which cards CUDA shows to a program.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";
/// Of a task that has more processes, the open files of so many are looked at.
const PROCESSES_LOOKED_AT: usize = 256;

/// What the node has of its cards.
pub(super) struct Cards {
    pub(super) table: Table,
    reader: Option<Reader>,
    /// [`gpu::Reading::at_ns`] of what was looked at last.
    looked_at_ns: u64,
    /// Cards of which nothing is known now.
    troubled: BTreeSet<String>,
    /// What tasks have of them, by card.
    uses: BTreeMap<TaskId, BTreeMap<u32, CardMemory>>,
    /// What holds tasks to their parts of them.
    pub(super) holders: Holders,
    /// Their regions of the controller dmem, as found when they were first seen.
    regions: BTreeMap<u32, Option<String>>,
    /// What the broker was offered last.
    offered: Option<(CardOffer, Bytes)>,
    /// Tasks that have more of a card than they may …
    pub(super) over: BTreeMap<(ExecutionId, u32), Over>,
    /// … and, of those, who is to free it for others: why.
    pub(super) asked: BTreeMap<ExecutionId, String>,
    /// Errors that the driver told of, by card.
    pub(super) errors: BTreeMap<u32, u64>,
}

impl Cards {
    /// Takes up what an earlier agent has numbered, and the devices that are named, and begins to ask for more.
    pub(super) fn open(config: &Config, boot_id: &str) -> Result<Cards, NodeError> {
        let table = Table::open(&config.state_dir, boot_id)?;
        let reader = match &config.nvml {
            Library::Off => None,
            library => {
                let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
                let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
                let reader = Reader::start(Asked {
                    library: library.clone(),
                    own_cgroup: config.hierarchies.v2.join(own),
                    proc_driver: config.proc_driver.clone(),
                });
                let verb = "start the thread that asks for GPU cards";
                Some(reader.map_err(|source| NodeError::System { verb, source })?)
            }
        };
        let mut cards = Cards {
            table,
            looked_at_ns: 0,
            troubled: BTreeSet::new(),
            uses: BTreeMap::new(),
            holders: Holders::new(reader.as_ref().map(Reader::asker)),
            reader,
            regions: BTreeMap::new(),
            offered: None,
            over: BTreeMap::new(),
            asked: BTreeMap::new(),
            errors: BTreeMap::new(),
        };
        for path in &config.gpu_devices {
            let failed = |source| NodeError::System { verb: "look at a device of --gpu-device", source };
            let device = gpu::char_device(path).map_err(failed)?;
            let model = gpu::driver(device).unwrap_or_else(|| "unknown".into());
            let id = path.display().to_string();
            cards.note(&id, &model, device);
            cards.learn(&config.hierarchies.v2, &id, || gpu::pci(device), Facts::default());
        }
        Ok(cards)
    }

    /// Notes what holds the memory of a card; tells which that is, if it is something else than before.
    fn learn(
        &mut self,
        v2: &Path,
        id: &str,
        pci: impl FnOnce() -> Option<String>,
        facts: Facts,
    ) -> Option<u32> {
        let number = self.table.by_id(id)?.number;
        let region = self.regions.entry(number).or_insert_with(|| gpu::region(v2, pci().as_deref())).clone();
        let facts = Facts { id: id.to_owned(), region, ..facts };
        self.holders.learn(number, facts).then_some(number)
    }

    /// What a task has, by card.
    pub(super) fn uses_of(&self, id: &TaskId) -> BTreeMap<u32, CardMemory> {
        self.uses.get(id).cloned().unwrap_or_default()
    }

    /// What a task has of one card.
    pub(super) fn used(&self, id: &TaskId, number: u32) -> Bytes {
        self.uses.get(id).and_then(|cards| cards.get(&number)).map_or(Bytes(0), |card| card.used)
    }

    pub(super) fn take_errors(&self) -> Vec<gpu::Xid> {
        self.reader.as_ref().map(Reader::take_errors).unwrap_or_default()
    }

    /// Takes a card up; tells whether anything of it is new.
    fn note(&mut self, id: &str, model: &str, device: CharDevice) -> bool {
        self.table.note(id, model, device).unwrap_or_else(|error| {
            tracing::error!(card = id, error = %launch::chain(&error), "a GPU card is not taken up");
            false
        })
    }

    fn notice_trouble(&mut self, card: &CardReading) {
        match &card.figures {
            Ok(_) if self.troubled.remove(&card.id) => {
                tracing::info!(card = card.id, "a GPU card is read again");
            }
            Err(error) if self.troubled.insert(card.id.clone()) => {
                tracing::error!(card = card.id, model = card.model, error, "a GPU card cannot be read");
            }
            _ => {}
        }
    }
}

impl Node {
    /// Each second: takes up the cards that were found since, and what tasks use of them.
    pub(super) fn look_at_cards(&mut self) {
        self.note_card_errors();
        let reading = self.cards.reader.as_ref().map(Reader::latest);
        if let Some(reading) = &reading
            && std::mem::replace(&mut self.cards.looked_at_ns, reading.at_ns) == reading.at_ns
        {
            return;
        }
        let found = reading.as_ref().map_or(&[][..], |reading| &reading.cards);
        let (mut any_is_new, mut held_otherwise) = (false, Vec::new());
        for card in found {
            if let Some(device) = card.device {
                any_is_new |= self.cards.note(&card.id, &card.model, device);
            }
            self.cards.notice_trouble(card);
            let limits =
                card.figures.as_ref().map(|figures| figures.memory_limits.clone()).map_err(String::clone);
            // Of one that is lost it is not said any more: it stays as it was.
            let (by_driver, trouble) = match limits {
                Ok(limits) => (Some(limits), None),
                Err(trouble) => (Some(self.cards.holders.by_driver(&card.id)), Some(trouble)),
            };
            let v2 = &self.config.hierarchies.v2;
            let facts = Facts { by_driver, is_part: card.is_part, trouble, ..Facts::default() };
            held_otherwise.extend(self.cards.learn(v2, &card.id, || card.pci.clone(), facts));
        }
        if any_is_new
            && let Some(bpf) = &mut self.bpf
            && let Err(error) = bpf.govern(self.cards.table.cards())
        {
            tracing::error!(error = %launch::chain(&error), "new GPU cards are open to every task");
        }
        if self.cards.table.cards().is_empty() {
            return;
        }
        self.cards.uses = self.card_uses(found);
        let cgroups = self.tasks.values().filter_map(|task| Some(task.target.as_ref()?.cgroup.id()));
        self.cards.holders.retain(&cgroups.collect());
        for number in held_otherwise {
            self.hold_anew(number);
        }
        self.watch_card_memory();
        self.give_power_back();
        if self.news.is_some() && self.cards.offered != self.offer_cards() {
            tracing::info!("this node has other GPU cards to offer: it meets the broker anew");
            self.news = None;
        }
    }

    /// What tasks use of cards: what the driver says of each process, or what is charged to its cgroup.
    fn card_uses(&self, found: &[CardReading]) -> BTreeMap<TaskId, BTreeMap<u32, CardMemory>> {
        let running = || self.tasks.iter().filter(|(_, task)| task.is_running());
        let of_tasks: HashMap<&Path, &TaskId> =
            running().map(|(id, task)| (task.record.cgroup.as_path(), id)).collect();
        let nothing = |number| CardMemory {
            number,
            used: Bytes(0),
            processes: 0,
            limit: Limit::Unlimited,
            enforced_by: None,
        };
        let mut uses: BTreeMap<TaskId, BTreeMap<u32, CardMemory>> = BTreeMap::new();
        for card in found {
            let Some(number) = self.cards.table.by_id(&card.id).map(|card| card.number) else { continue };
            for CgroupUse { cgroup, memory, processes } in
                card.figures.iter().flat_map(|figures| &figures.uses)
            {
                let cgroup = self.config.hierarchies.v2.join(cgroup);
                let Some(task) = cgroup.ancestors().find_map(|path| of_tasks.get(path)) else { continue };
                let of_task = uses.entry((*task).clone()).or_default();
                let of_card = of_task.entry(number).or_insert_with(|| nothing(number));
                of_card.used = Bytes(of_card.used.0.saturating_add(memory.0));
                of_card.processes += processes;
            }
        }
        for (id, task) in running() {
            for number in task.record.limits.gpu_cards.unwrap_or_default().numbers() {
                let charged =
                    task.target.as_ref().and_then(|target| self.cards.holders.used(number, &target.cgroup));
                if let Some(charged) = charged {
                    let of_task = uses.entry(id.clone()).or_default();
                    of_task.entry(number).or_insert_with(|| nothing(number)).used = charged;
                }
            }
        }
        uses
    }

    /// Something else holds the memory of a card from here on: it is told of the limits.
    fn hold_anew(&mut self, number: u32) {
        let ids: Vec<TaskId> = self.holders_of(number, None).map(|(id, _)| id.clone()).collect();
        let cause = Cause::agent("cards", format!("what holds the memory of card {number} is another"));
        for id in ids {
            let Ok(task) = self.task(&id) else { continue };
            let Limit::At(memory) = task.record.limits.gpu_memory else { continue };
            if task.target.is_none() {
                continue;
            }
            let wish = [Wish::GpuMemory(number, Limit::At(memory))];
            if let Err(error) = self.hold_knobs(&id, &wish, Hold::Standing, &cause) {
                tracing::warn!(task = %id, card = number, error = %launch::chain(&error), "cannot hold a task to its part of a card");
            }
        }
    }

    /// Has a task that has more of a card than it may free it, or end.
    pub(super) fn ask_to_free(&mut self, id: &TaskId, why: String) {
        if let Some(task) = self.tasks.get(id) {
            let execution = &task.record.execution;
            self.cards.asked.insert(execution.clone(), why);
            // It has a grace from here on, whatever it had too much of before.
            self.cards.over.retain(|(over, _), _| over != execution);
        }
    }

    /// What the broker is told that there is, when they meet.
    pub(super) fn offer(&mut self) -> Option<(CardOffer, Bytes)> {
        self.cards.offered = self.offer_cards();
        self.cards.offered.clone()
    }

    /// What is offered to the broker, and the memory of each: of the cards of one model that are there and have memory, the
    /// model with the most of them.
    fn offer_cards(&self) -> Option<(CardOffer, Bytes)> {
        let mut by_model = BTreeMap::<String, (Vec<u32>, Bytes)>::new();
        for CardUsage { card, memory, trouble, .. } in self.card_usages() {
            let (Some(memory), None) = (memory, trouble) else { continue };
            let (numbers, least) = by_model.entry(card.model).or_insert((Vec::new(), memory));
            numbers.push(card.number);
            *least = memory.min(*least);
        }
        let (model, (numbers, memory)) =
            by_model.into_iter().max_by_key(|(_, (numbers, _))| numbers.len())?;
        Some((CardOffer { model, cards: CardSet::try_from(numbers).ok()? }, memory))
    }

    /// Chooses as many cards as a task is to have, and tells it which.
    pub(super) fn choose_cards(&self, request: &mut RunRequest) -> Result<(), NodeError> {
        let RunRequest { gpus, gpu_model, limits, env, .. } = request;
        if *gpus > 0 {
            if limits.gpu_cards.is_some() {
                return Err(NodeError::Invalid("name cards, or how many: not both".into()));
            }
            let usages = self.card_usages();
            let fits = |usage: &&CardUsage| {
                usage.card.model.contains(gpu_model.as_str())
                    && usage.trouble.is_none()
                    && self.holders_of(usage.card.number, None).next().is_none()
            };
            let free: Vec<u32> = usages.iter().filter(fits).map(|usage| usage.card.number).collect();
            let wanted = *gpus as usize;
            if free.len() < wanted {
                let model =
                    if gpu_model.is_empty() { String::new() } else { format!(" of a model `{gpu_model}`") };
                return Err(NodeError::Exhausted(format!(
                    "of the {} GPU cards of this node {} are free{model}, and {wanted} are wanted (see `shaper top`)",
                    usages.len(),
                    free.len()
                )));
            }
            let chosen = CardSet::try_from(free[..wanted].to_vec());
            limits.gpu_cards = Some(chosen.map_err(|error| NodeError::Invalid(error.to_string()))?);
        } else if let (None, Limit::At(memory)) = (limits.gpu_cards, limits.gpu_memory) {
            limits.gpu_cards = Some(self.choose_card(memory, gpu_model)?);
        } else if !gpu_model.is_empty() {
            return Err(NodeError::Invalid(
                "a model of GPU cards needs a count of them, or a part of the memory of one".into(),
            ));
        }
        let cards = limits.gpu_cards.unwrap_or_default();
        let granted = self.cards.table.cards().iter().filter(|card| cards.contains(card.number));
        let visible: Vec<&str> =
            granted.map(|card| card.id.as_str()).filter(|id| !id.starts_with('/')).collect();
        if !visible.is_empty() && env.iter().all(|(name, _)| name != VISIBLE) {
            env.push((VISIBLE.into(), visible.join(",")));
        }
        Ok(())
    }

    /// Cards that processes of a task have open without a grant: they were opened before.
    pub(super) fn open_before(&self, task: &Task) -> Vec<String> {
        let (Some(cards), Some(target)) = (task.record.limits.gpu_cards, &task.target) else {
            return Vec::new();
        };
        let mut found = BTreeMap::<u32, Vec<u32>>::new();
        for pid in target.cgroup.all_processes().unwrap_or_default().into_iter().take(PROCESSES_LOOKED_AT) {
            for device in open_devices(pid) {
                let card = self.cards.table.cards().iter().find(|card| card.device == device);
                if let Some(card) = card.filter(|card| !cards.contains(card.number)) {
                    let pids = found.entry(card.number).or_default();
                    if pids.last() != Some(&pid) {
                        pids.push(pid);
                    }
                }
            }
        }
        let told = |(number, pids): (u32, Vec<u32>)| {
            let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
            format!(
                "card {number} was opened before the grant by process {}, which keeps it until it closes it: only a new \
                 open is refused. End the process to take the card from it",
                pids.join(", ")
            )
        };
        found.into_iter().map(told).collect()
    }

    /// The cards as they were last read.
    pub(super) fn card_usages(&self) -> Vec<CardUsage> {
        let reader = self.cards.reader.as_ref();
        let reading = reader.map(Reader::latest);
        let silent = reader.and_then(|reader| reader.silent_for(monotonic_ns()));
        let usage = |card: &shaper_core::gpu::Card| {
            let found = reading.iter().flat_map(|reading| &reading.cards).find(|found| found.id == card.id);
            let figures = found.and_then(|found| found.figures.as_ref().ok());
            let is_named = self.config.gpu_devices.iter().any(|path| path.as_os_str() == card.id.as_str());
            let trouble = match found {
                Some(_) if silent.is_some() => silent.map(silence),
                Some(CardReading { figures: Err(error), .. }) => Some(error.clone()),
                Some(_) => None,
                None if is_named => None,
                None => Some("it was there in this boot, and is not found now".into()),
            };
            CardUsage {
                card: card.clone(),
                memory: figures.map(|figures| figures.memory),
                memory_used: figures.map(|figures| figures.memory_used),
                busy_percent: figures.and_then(|figures| figures.busy_percent),
                temperature_celsius: figures.and_then(|figures| figures.temperature_celsius),
                trouble,
                errors: self.cards.errors.get(&card.number).copied().unwrap_or(0),
            }
        };
        self.cards.table.cards().iter().map(usage).collect()
    }

    /// A row for the library, if it is wanted.
    pub(super) fn nvml_rung(&self) -> Option<Rung> {
        let reader = self.cards.reader.as_ref()?;
        let reading = reader.latest();
        let availability = match (reader.silent_for(monotonic_ns()), &reading.library) {
            (Some(silent), _) => Availability::Unusable { reason: silence(silent) },
            (None, LibraryState::Unasked) => Availability::Unusable { reason: "it is asked just now".into() },
            (None, LibraryState::Absent { evidence }) => Availability::Missing { evidence: evidence.clone() },
            (None, LibraryState::Failing { reason }) => Availability::Unusable { reason: reason.clone() },
            (None, LibraryState::Ready { .. }) if !reading.unknown.is_empty() => {
                Availability::Unusable { reason: reading.unknown.join("; ") }
            }
            (None, LibraryState::Ready { .. }) => Availability::Available,
        };
        Some(Rung {
            feature: "nvml".into(),
            used_for: "NVIDIA's cards: what there is, and what tasks use of their memory".into(),
            availability,
            degrades_to: "no such card is known; others are named with --gpu-device".into(),
        })
    }
}

/// The character devices that a process has open.
fn open_devices(pid: u32) -> BTreeSet<CharDevice> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| gpu::char_device(&entry.path()).ok()).collect()
}

fn silence(silent: Duration) -> String {
    format!("NVML has not answered for {} s: the driver may hang (see `dmesg`)", silent.as_secs())
}
