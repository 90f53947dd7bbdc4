//! What holds tasks to their part of a card's memory, and a card to a power: of each card the strongest that is there.
//!
//! The ladder is [`Rung`]'s. The controller dmem and NVIDIA's driver refuse what is beyond by themselves. Where neither is there,
//! what was decided is kept here, for the node to look at what is used (`node/card_watch.rs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nvml_wrapper::{Device, error::NvmlError};
use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::Rung,
    limits::Limit,
    units::{Bytes, Milliwatts},
};

use super::{nvml::Loaded, reader::Asker};
use crate::kernel::cgroup::{
    Cgroup, CgroupError,
    dmem::{self, OfRegion},
};

/// What a cgroup may have of a card's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryLimit {
    /// What it has in any case, where others want the card's memory, too. Only NVIDIA's driver knows that.
    pub guaranteed: Bytes,
    /// What is refused beyond.
    pub limit: Limit<Bytes>,
}

impl fmt::Display for MemoryLimit {
    /// For people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryLimit { guaranteed, limit } = *self;
        if guaranteed == Bytes(0) || limit == Limit::At(guaranteed) {
            return limit.fmt(f);
        }
        write!(f, "{limit} ({guaranteed} guaranteed)")
    }
}

/// Why something was not done with a card.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CardError {
    /// Nobody answers.
    #[error("NVML has not answered for {0} s: the driver may hang (see `dmesg`)")]
    Silent(u64),
    /// The card is not there.
    #[error("card {card} is not there: {why}")]
    Gone {
        /// Its number.
        card: u32,
        /// How that was seen.
        why: String,
    },
    /// The driver has no such function, or may not be asked.
    #[error("the driver does not do that for card {card}: {why}")]
    Unsupported {
        /// Its number.
        card: u32,
        /// What it said.
        why: String,
    },
    /// The driver did not take it.
    #[error("the driver does not take that for card {card}: {why}")]
    Refused {
        /// Its number.
        card: u32,
        /// What it said.
        why: String,
    },
}

/// What is known of a card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// What it is known by.
    pub id: String,
    /// Its region of the controller dmem.
    pub region: Option<String>,
    /// Whether NVIDIA's driver limits its memory by cgroup; else why not.
    pub by_driver: Option<Result<(), String>>,
    /// Whether it is a part of a card, cut by the hardware.
    pub is_part: bool,
    /// Why nothing is known of it now.
    pub trouble: Option<String>,
}

#[derive(Debug, Default)]
struct Card {
    facts: Facts,
    /// The driver did not take a limit after all: why.
    refused: Option<String>,
    /// What the watchdog holds cgroups to, by their ids.
    watched: BTreeMap<u64, MemoryLimit>,
}

impl Card {
    /// The strongest that can hold a task to its part, where its cgroup has the files of dmem; `None`: nothing can, for
    /// nobody sees what is used.
    fn strongest(&self, has_dmem: impl FnOnce() -> bool) -> Option<Rung> {
        let by_driver = self.facts.by_driver.as_ref();
        if self.facts.region.is_some() && has_dmem() {
            Some(Rung::Dmem)
        } else if by_driver == Some(&Ok(())) && self.refused.is_none() {
            Some(Rung::NvmlCgroup)
        } else {
            (by_driver.is_some() || self.facts.region.is_some()).then_some(Rung::Watchdog)
        }
    }
}

/// All of them. A clone is the same.
#[derive(Clone)]
pub struct Holders {
    cards: Arc<Mutex<BTreeMap<u32, Card>>>,
    library: Option<Asker>,
}

impl Holders {
    /// `library`: who asks NVIDIA's.
    pub fn new(library: Option<Asker>) -> Holders {
        Holders { cards: Arc::default(), library }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Card>> {
        self.cards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is known of a card now; tells whether something else holds its memory from here on.
    pub fn learn(&self, number: u32, facts: Facts) -> bool {
        let mut cards = self.lock();
        let card = cards.entry(number).or_default();
        let of = |facts: &Facts| (facts.region.clone(), facts.by_driver == Some(Ok(())));
        let changed = of(&card.facts) != of(&facts);
        if changed {
            card.refused = None;
        }
        card.facts = facts;
        changed
    }

    /// Forgets what cgroups other than these were held to.
    pub fn retain(&self, cgroups: &BTreeSet<u64>) {
        for card in self.lock().values_mut() {
            card.watched.retain(|cgroup, _| cgroups.contains(cgroup));
        }
    }

    /// What holds a cgroup to its part of a card.
    pub fn rung(&self, number: u32, cgroup: &Cgroup) -> Rung {
        let cards = self.lock();
        let strongest = cards.get(&number).and_then(|card| card.strongest(|| cgroup.has(dmem::MAX)));
        strongest.unwrap_or(Rung::Watchdog)
    }

    /// Whether what is used of a card is seen: else no watchdog can do anything.
    pub fn is_seen(&self, number: u32) -> bool {
        self.strongest(number).is_some()
    }

    /// Whether a card is a part of one, of which there is no more than it has.
    pub fn is_part(&self, number: u32) -> bool {
        self.lock().get(&number).is_some_and(|card| card.facts.is_part)
    }

    /// Whether the driver was last said to limit the memory of a card, by its id.
    pub fn by_driver(&self, id: &str) -> Result<(), String> {
        let cards = self.lock();
        let card = cards.values().find(|card| card.facts.id == id);
        card.and_then(|card| card.facts.by_driver.clone())
            .unwrap_or_else(|| Err("it was never read".to_owned()))
    }

    /// The strongest that can hold a task to its part of a card, and why nothing stronger does; `None`: nothing can.
    pub fn strongest(&self, number: u32) -> Option<(Rung, Option<String>)> {
        let cards = self.lock();
        let card = cards.get(&number)?;
        let rung = if card.facts.is_part { Rung::Mig } else { card.strongest(|| true)? };
        let by_driver = || card.facts.by_driver.clone()?.err();
        let why = if rung == Rung::Watchdog { card.refused.clone().or_else(by_driver) } else { None };
        Some((rung, why))
    }

    fn gone(&self, number: u32) -> Option<CardError> {
        let why = self.lock().get(&number)?.facts.trouble.clone()?;
        Some(CardError::Gone { card: number, why })
    }

    fn ask<T: Send + 'static>(
        &self,
        number: u32,
        call: impl FnOnce(&Loaded, &mut Device<'_>) -> Result<T, NvmlError> + Send + 'static,
    ) -> Result<T, CardError> {
        let id = self.lock().get(&number).map(|card| card.facts.id.clone()).unwrap_or_default();
        match &self.library {
            Some(library) => library.ask(number, move |loaded| loaded.with(number, &id, call)),
            None => Err(CardError::Unsupported { card: number, why: "NVML is off (--nvml off)".into() }),
        }
    }

    /// What a cgroup may have of a card now.
    pub fn memory(&self, number: u32, cgroup: &Cgroup) -> Result<MemoryLimit, HolderError> {
        match self.rung(number, cgroup) {
            Rung::Dmem => {
                let region = self.region(number);
                let limit = cgroup.get(dmem::MAX)?.get(&region).copied().unwrap_or_default();
                Ok(MemoryLimit { guaranteed: Bytes(0), limit })
            }
            Rung::NvmlCgroup => {
                let cgroup = cgroup.path().to_owned();
                Ok(self.ask(number, move |loaded, card| loaded.memory_limit(card, &cgroup))?)
            }
            Rung::Mig | Rung::Mps | Rung::Watchdog => {
                let cards = self.lock();
                let watched = cards.get(&number).and_then(|card| card.watched.get(&cgroup.id()));
                Ok(watched.copied().unwrap_or_default())
            }
        }
    }

    /// As a limit would be held: what is granted is guaranteed, where that can be said.
    pub fn as_kept(&self, number: u32, cgroup: &Cgroup, limit: Limit<Bytes>) -> MemoryLimit {
        let guaranteed = match self.rung(number, cgroup) {
            Rung::NvmlCgroup => limit.at().unwrap_or(Bytes(0)),
            _ => Bytes(0),
        };
        MemoryLimit { guaranteed, limit }
    }

    /// Limits a cgroup's memory of a card. A driver that does not take it is not asked again: the watchdog sees to it.
    pub fn set_memory(&self, number: u32, cgroup: &Cgroup, limit: MemoryLimit) -> Result<(), HolderError> {
        match self.rung(number, cgroup) {
            Rung::Dmem => {
                cgroup.set(dmem::MAX, &OfRegion(self.region(number), limit.limit))?;
                Ok(())
            }
            Rung::NvmlCgroup => {
                let path = cgroup.path().to_owned();
                match self.ask(number, move |loaded, card| loaded.set_memory_limit(card, &path, limit)) {
                    Ok(()) => Ok(()),
                    Err(CardError::Unsupported { why, .. }) => {
                        tracing::warn!(
                            card = number,
                            why,
                            "the driver does not limit memory by cgroup after all: it is watched"
                        );
                        if let Some(card) = self.lock().get_mut(&number) {
                            card.refused = Some(why);
                        }
                        self.watch(number, cgroup, limit);
                        Ok(())
                    }
                    // What is gone took its limits with it.
                    Err(CardError::Gone { .. }) if limit == MemoryLimit::default() => Ok(()),
                    Err(error) => Err(error.into()),
                }
            }
            Rung::Mig | Rung::Mps | Rung::Watchdog => {
                self.watch(number, cgroup, limit);
                Ok(())
            }
        }
    }

    fn watch(&self, number: u32, cgroup: &Cgroup, limit: MemoryLimit) {
        let mut cards = self.lock();
        let watched = &mut cards.entry(number).or_default().watched;
        if limit == MemoryLimit::default() {
            watched.remove(&cgroup.id());
        } else {
            watched.insert(cgroup.id(), limit);
        }
    }

    fn region(&self, number: u32) -> String {
        self.lock().get(&number).and_then(|card| card.facts.region.clone()).unwrap_or_default()
    }

    /// The power that a card may draw now.
    pub fn power(&self, number: u32) -> Result<Milliwatts, CardError> {
        if let Some(gone) = self.gone(number) {
            return Err(gone);
        }
        self.ask(number, |loaded, card| loaded.power(card))
    }

    /// Limits it.
    pub fn set_power(&self, number: u32, power: Milliwatts) -> Result<(), CardError> {
        self.ask(number, move |loaded, card| loaded.set_power(card, power))
    }

    /// What of its region a cgroup uses, where the controller dmem counts it.
    pub fn used(&self, number: u32, cgroup: &Cgroup) -> Option<Bytes> {
        let region = self.lock().get(&number)?.facts.region.clone()?;
        cgroup.find(dmem::CURRENT).ok()??.get(&region).copied()
    }
}

/// Which region of the controller dmem is the memory of a card. `root`: the root of cgroup v2.
pub fn region(root: &Path, pci: Option<&str>) -> Option<String> {
    region_in(&Cgroup::open(root, root).ok()?, pci?)
}

fn region_in(root: &Cgroup, pci: &str) -> Option<String> {
    dmem::region_of(&root.find(dmem::CAPACITY).ok()??, pci)
}

/// What went wrong with a limit of memory.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The card, or who speaks for it.
    #[error(transparent)]
    Card(#[from] CardError),
    /// The file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GIB: u64 = 1 << 30;

    /// No kernel of ours has the controller dmem: folders stand for a root and a cgroup, with its files as they are documented.
    #[test]
    fn a_region_of_dmem_holds_a_cgroup_to_its_part() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("dmem.capacity", "drm/0000:03:00.0/vram0 17179869184\ndrm/0000:03:00.0/stolen 67108864\n");
        write("dmem.max", "drm/0000:03:00.0/vram0 max\ndrm/0000:03:00.0/stolen max\n");
        write("dmem.current", "drm/0000:03:00.0/vram0 2147483648\ndrm/0000:03:00.0/stolen 0\n");
        let cgroup = Cgroup::pretended(folder.path());
        let region = region_in(&cgroup, "0000:03:00.0");
        assert_eq!(region.as_deref(), Some("drm/0000:03:00.0/vram0"));
        let holders = Holders::new(None);
        assert_eq!(holders.rung(0, &cgroup), Rung::Watchdog, "of a card that is not known nothing else is");
        assert!(!holders.is_seen(0));
        assert!(holders.learn(0, Facts { id: "card".into(), region, ..Facts::default() }));
        assert_eq!((holders.rung(0, &cgroup), holders.is_seen(0)), (Rung::Dmem, true));
        assert_eq!(holders.memory(0, &cgroup).unwrap(), MemoryLimit::default());
        assert_eq!(holders.used(0, &cgroup), Some(Bytes(2 * GIB)));
        // Granted, grown, and brought below what is used, which dmem takes: what is there stays, and nothing is added.
        for gib in [4, 8, 1] {
            let limit = holders.as_kept(0, &cgroup, Limit::At(Bytes(gib * GIB)));
            assert_eq!(limit.guaranteed, Bytes(0), "there is no such word in dmem.max");
            // What is written to a cgroup's file is no text that lies upon another.
            write("dmem.max", "");
            holders.set_memory(0, &cgroup, limit).unwrap();
            let written = fs::read_to_string(folder.path().join("dmem.max")).unwrap();
            assert!(written.starts_with(&format!("drm/0000:03:00.0/vram0 {}", gib * GIB)), "{written}");
            assert_eq!(holders.memory(0, &cgroup).unwrap(), limit);
        }
        write("dmem.max", "");
        holders.set_memory(0, &cgroup, MemoryLimit::default()).unwrap();
        assert_eq!(holders.memory(0, &cgroup).unwrap().limit, Limit::Unlimited);
    }

    #[test]
    fn what_is_watched_is_kept_as_long_as_its_cgroup_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::pretended(folder.path());
        let holders = Holders::new(None);
        holders.learn(0, Facts { by_driver: Some(Err("an older driver".into())), ..Facts::default() });
        let limit = MemoryLimit { guaranteed: Bytes(0), limit: Limit::At(Bytes(GIB)) };
        holders.set_memory(0, &cgroup, limit).unwrap();
        assert_eq!(holders.memory(0, &cgroup).unwrap(), limit);
        assert_eq!(holders.strongest(0), Some((Rung::Watchdog, Some("an older driver".into()))));
        holders.retain(&BTreeSet::from([cgroup.id()]));
        assert_eq!(holders.memory(0, &cgroup).unwrap(), limit);
        holders.retain(&BTreeSet::new());
        assert_eq!(holders.memory(0, &cgroup).unwrap(), MemoryLimit::default());
        // Nobody can be asked for a power.
        assert!(matches!(holders.power(0), Err(CardError::Unsupported { .. })));
    }
}
