//! The GPU cards of this node: taken up as they are found, and told of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};

use shaper_core::{
    doctor::{Availability, Rung},
    gpu::{CardMemory, CardUsage, CharDevice},
    id::TaskId,
    units::Bytes,
};

use super::{Node, NodeError};
use crate::{
    config::Config,
    gpu::{self, CardReading, Library, LibraryState, Reader, Table},
    kernel::mapped::monotonic_ns,
    launch,
};

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
        for card in &reading.cards {
            if let Some(device) = card.device {
                self.cards.note(&card.id, &card.model, device);
            }
            self.cards.notice_trouble(card);
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
                let nothing = CardMemory { number, used: Bytes(0), processes: 0 };
                let of_card = of_task.entry(number).or_insert(nothing);
                of_card.used = Bytes(of_card.used.0.saturating_add(process.memory.unwrap_or(Bytes(0)).0));
                of_card.processes += 1;
            }
        }
        self.cards.uses = uses;
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

fn silence(silent: Duration) -> String {
    format!("NVML has not answered for {} s: the driver may hang (see `dmesg`)", silent.as_secs())
}
