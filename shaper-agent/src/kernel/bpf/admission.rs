//! Which slots may open which GPU cards, from the agent's side.

use std::{fs, mem::offset_of, os::fd::AsFd, path::Path, sync::atomic::Ordering::SeqCst};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::CgroupDevice,
};
use shaper_common::abi::{self, Admission};
use shaper_core::gpu::{Card, CardSet};

use super::{
    Bpf, BpfError,
    attach::{failed, program, replace},
    table::is_missing,
};
use crate::kernel::{mapped::Mapped, sys};

/// Without it no card is refused to anybody.
pub(super) const DEVICES: &str = "device_admission";

/// Puts the program that admits tasks to GPU cards behind its pinned link, or a new one.
pub(super) fn admit_devices(
    ebpf: &mut Ebpf,
    object: &Path,
    cgroup: &fs::File,
    pin: &Path,
) -> Result<(), BpfError> {
    let device: &mut CgroupDevice = program(ebpf, DEVICES, object)?;
    device.load().map_err(|source| failed("load", DEVICES, source))?;
    let fd = device.fd().map_err(|source| failed("load", DEVICES, source))?;
    if replace(pin, fd.as_fd(), DEVICES)? {
        return Ok(());
    }
    let error = |verb| move |source| BpfError::Link { verb, program: DEVICES, source };
    let link = sys::attach_device(fd.as_fd(), cgroup.as_fd()).map_err(error("attach"))?;
    sys::pin(link.as_fd(), pin).map_err(error("pin"))
}

/// The tables.
pub(super) struct AdmissionTable {
    /// Device → number of the card.
    pub(super) governed: HashMap<MapData, u64, u32>,
    /// By slot.
    pub(super) admission: Mapped<Admission>,
}

/// Opens that were refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// How many.
    pub count: u64,
    /// The card of the last.
    pub card: u32,
}

impl AdmissionTable {
    fn set(&self, slot: u32, cards: Option<CardSet>) {
        let slot = slot as usize;
        let is_governed = self.admission.half(slot, offset_of!(Admission, is_governed));
        if let Some(cards) = cards {
            self.admission.word(slot, offset_of!(Admission, granted)).store(cards.bits(), SeqCst);
        }
        is_governed.store(cards.is_some().into(), SeqCst);
    }
}

impl Bpf {
    /// Whether the kernel admits tasks to cards at all.
    pub fn admits(&self) -> bool {
        self.without.iter().all(|(name, _)| *name != DEVICES)
    }

    /// Has the kernel ask for these cards, and for no others.
    pub fn govern(&mut self, cards: &[Card]) -> Result<(), BpfError> {
        let error = |source| BpfError::Map { map: "GOVERNED", source };
        let governed = &mut self.admission.governed;
        let key = |card: &Card| abi::device_key(card.device.major, card.device.minor);
        for card in cards {
            governed.insert(key(card), card.number, 0).map_err(error)?;
        }
        let known: Vec<u64> = governed.keys().filter_map(Result::ok).collect();
        for device in known.into_iter().filter(|device| cards.iter().all(|card| key(card) != *device)) {
            match governed.remove(&device) {
                Err(found) if !is_missing(&found) => return Err(error(found)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets a slot open these cards alone; `None`: whatever it could open anyway.
    pub fn admit(&mut self, slot: u32, cards: Option<CardSet>) {
        self.admission.set(slot, cards);
    }

    /// The cards that a slot may open; `None`: it is not asked.
    pub fn admitted(&self, slot: u32) -> Option<CardSet> {
        let Admission { granted, is_governed, .. } = self.admission.admission.read(slot as usize);
        (is_governed != 0).then(|| CardSet::from_bits(granted))
    }

    /// What was refused to a slot.
    pub fn refused(&self, slot: u32) -> Refused {
        let Admission { refused, refused_card, .. } = self.admission.admission.read(slot as usize);
        Refused { count: refused, card: refused_card }
    }
}
