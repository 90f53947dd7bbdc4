//! The GPU cards of this node: taken up as they are found, and told of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use shaper_core::{
    doctor::{Availability, Rung},
    gpu::{CardMemory, CardOffer, CardSet, CardUsage, CharDevice},
    id::TaskId,
    limits::{Limit, LimitsChange},
    units::Bytes,
};

use super::{Node, NodeError, RunRequest, Task};
use crate::{
    config::Config,
    gpu::{self, CardReading, Library, LibraryState, Reader, Table},
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
}

impl Cards {
    /// Takes up what an earlier agent has numbered, and the devices that are named, and begins to ask for more.
    pub(super) fn open(config: &Config, boot_id: &str) -> Result<Cards, NodeError> {
        let table = Table::open(&config.state_dir, boot_id)?;
        let reader = match &config.nvml {
            Library::Off => None,
            library => Some(Reader::start(library.clone()).map_err(|source| NodeError::System {
                verb: "start the thread that asks for GPU cards",
                source,
            })?),
        };
        let mut cards =
            Cards { table, reader, looked_at_ns: 0, troubled: BTreeSet::new(), uses: BTreeMap::new() };
        for path in &config.gpu_devices {
            let failed = |source| NodeError::System { verb: "look at a device of --gpu-device", source };
            let device = gpu::char_device(path).map_err(failed)?;
            let model = gpu::driver(device).unwrap_or_else(|| "unknown".into());
            cards.note(&path.display().to_string(), &model, device);
        }
        Ok(cards)
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
        let Some(reading) = self.cards.reader.as_ref().map(Reader::latest) else { return };
        if std::mem::replace(&mut self.cards.looked_at_ns, reading.at_ns) == reading.at_ns {
            return;
        }
        let mut any_is_new = false;
        for card in &reading.cards {
            if let Some(device) = card.device {
                any_is_new |= self.cards.note(&card.id, &card.model, device);
            }
            self.cards.notice_trouble(card);
        }
        if any_is_new
            && let Some(bpf) = &mut self.bpf
            && let Err(error) = bpf.govern(self.cards.table.cards())
        {
            tracing::error!(error = %launch::chain(&error), "new GPU cards are open to every task");
        }
        let of_tasks: HashMap<&Path, &TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.is_running())
            .map(|(id, task)| (task.record.cgroup.as_path(), id))
            .collect();
        let mut uses: BTreeMap<TaskId, BTreeMap<u32, CardMemory>> = BTreeMap::new();
        for card in &reading.cards {
            let Some(number) = self.cards.table.by_id(&card.id).map(|card| card.number) else { continue };
            for process in card.figures.iter().flat_map(|figures| &figures.processes) {
                let cgroup: Option<PathBuf> =
                    process.cgroup.as_ref().map(|cgroup| self.config.hierarchies.v2.join(cgroup));
                let owner =
                    cgroup.iter().flat_map(|path| path.ancestors()).find_map(|path| of_tasks.get(path));
                let Some(task) = owner else { continue };
                let of_task = uses.entry((*task).clone()).or_default();
                let nothing = CardMemory {
                    number,
                    used: Bytes(0),
                    processes: 0,
                    limit: Limit::Unlimited,
                    enforced_by: None,
                };
                let of_card = of_task.entry(number).or_insert(nothing);
                of_card.used = Bytes(of_card.used.0.saturating_add(process.memory.unwrap_or(Bytes(0)).0));
                of_card.processes += 1;
            }
        }
        self.cards.uses = uses;
    }

    /// What is offered to the broker, and the memory of each: of the cards of one model that are there and have memory, the
    /// model with the most of them.
    pub(super) fn offer_cards(&self) -> Option<(CardOffer, Bytes)> {
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

    /// Refuses cards that are not there, and those that another task has.
    pub(super) fn may_have_cards(&self, id: &TaskId, change: &LimitsChange) -> Result<(), NodeError> {
        let Some(wanted) = change.gpu_cards else { return Ok(()) };
        let known = self.cards.table.cards();
        if let Some(number) = wanted.numbers().find(|number| known.iter().all(|card| card.number != *number))
        {
            let there = CardSet::try_from(known.iter().map(|card| card.number).collect::<Vec<_>>());
            return Err(NodeError::Invalid(format!(
                "gpu_cards: this node has no card {number}; it has {} (see `shaper doctor`)",
                there.unwrap_or_default()
            )));
        }
        let taken = wanted.numbers().find_map(|number| Some((number, self.holder(number, Some(id))?)));
        taken.map_or(Ok(()), |(number, holder)| {
            Err(NodeError::Precondition(format!(
                "gpu_cards: card {number} is granted to task `{holder}`; a card has one task at a time"
            )))
        })
    }

    /// Which task other than this one was granted a card.
    fn holder(&self, number: u32, but: Option<&TaskId>) -> Option<&TaskId> {
        let has_it = |id: &TaskId, task: &Task| {
            let cards = task.record.limits.gpu_cards.unwrap_or_default();
            task.is_held() && but != Some(id) && cards.contains(number)
        };
        self.tasks.iter().find(|(id, task)| has_it(id, task)).map(|(id, _)| id)
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
                    && self.holder(usage.card.number, None).is_none()
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
        } else if !gpu_model.is_empty() {
            return Err(NodeError::Invalid("a model of GPU cards needs a count of them".into()));
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

    /// What a task has of the memory of cards.
    pub(super) fn card_memory(&self, id: &TaskId) -> Vec<CardMemory> {
        self.cards.uses.get(id).into_iter().flat_map(BTreeMap::values).copied().collect()
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
