//! GPU cards.

use shaper_core::{
    gpu::{Card, CardMemory, CardSet, CardUsage, CharDevice},
    units::Bytes,
};

use super::WireError;
use crate::v1;

impl From<CardSet> for v1::CardSet {
    fn from(cards: CardSet) -> v1::CardSet {
        v1::CardSet { numbers: cards.into() }
    }
}

pub(super) fn cards(wire: Option<v1::CardSet>) -> Result<Option<CardSet>, WireError> {
    let set = wire.map(|v1::CardSet { numbers }| numbers.try_into());
    set.transpose()
        .map_err(|_| WireError::Invalid { field: "gpu_cards", expected: "numbers of cards, below 64" })
}

impl From<CardUsage> for v1::CardUsage {
    fn from(usage: CardUsage) -> v1::CardUsage {
        let CardUsage { card, memory, memory_used, busy_percent, temperature_celsius, trouble } = usage;
        let Card { number, id, model, device: CharDevice { major, minor } } = card;
        v1::CardUsage {
            number,
            id,
            model,
            device: Some(v1::CharDevice { major, minor }),
            memory_bytes: memory.map(|bytes| bytes.0),
            memory_used_bytes: memory_used.map(|bytes| bytes.0),
            busy_percent,
            temperature_celsius,
            trouble,
        }
    }
}

impl TryFrom<v1::CardUsage> for CardUsage {
    type Error = WireError;

    fn try_from(wire: v1::CardUsage) -> Result<CardUsage, WireError> {
        let v1::CardUsage {
            number,
            id,
            model,
            device,
            memory_bytes,
            memory_used_bytes,
            busy_percent,
            temperature_celsius,
            trouble,
        } = wire;
        let v1::CharDevice { major, minor } = device.ok_or(WireError::Missing("gpus.device"))?;
        Ok(CardUsage {
            card: Card { number, id, model, device: CharDevice { major, minor } },
            memory: memory_bytes.map(Bytes),
            memory_used: memory_used_bytes.map(Bytes),
            busy_percent,
            temperature_celsius,
            trouble,
        })
    }
}

impl From<CardMemory> for v1::CardMemory {
    fn from(memory: CardMemory) -> v1::CardMemory {
        let CardMemory { number, used, processes } = memory;
        v1::CardMemory { number, used_bytes: used.0, processes }
    }
}

impl From<v1::CardMemory> for CardMemory {
    fn from(wire: v1::CardMemory) -> CardMemory {
        let v1::CardMemory { number, used_bytes, processes } = wire;
        CardMemory { number, used: Bytes(used_bytes), processes }
    }
}
