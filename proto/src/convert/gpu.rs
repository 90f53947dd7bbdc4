//! GPU cards.

use shaper_core::{
    gpu::{CARDS_MAX, Card, CardMemory, CardOffer, CardRequest, CardSet, CardUsage, CharDevice, Rung},
    limits::Limit,
    units::{Bytes, Milliwatts},
};

use super::{WireError, broker::in_range};
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

/// A set that, if it is empty, is not sent.
pub fn granted(cards: CardSet) -> Option<v1::CardSet> {
    (!cards.is_empty()).then(|| cards.into())
}

/// The cards that a `Start` grants.
pub fn grant(wire: Option<v1::CardSet>) -> Result<CardSet, WireError> {
    Ok(cards(wire)?.unwrap_or_default())
}

pub(super) fn power(milliwatts: u64) -> Result<Milliwatts, WireError> {
    in_range("gpu_power_milliwatts", milliwatts, 1..=Milliwatts::MAX.0, "above 0, and at most 100 kW")
        .map(Milliwatts)
}

pub(super) fn request(count: u32, model: String) -> Result<CardRequest, WireError> {
    in_range("gpus", count.into(), 0..=CARDS_MAX.into(), "at most 64")?;
    if model.len() > 255 || model.contains('\0') {
        return Err(WireError::Invalid { field: "gpu_model", expected: "at most 255 bytes without NUL" });
    }
    Ok(CardRequest { count, model })
}

impl From<CardOffer> for v1::CardOffer {
    fn from(CardOffer { model, cards }: CardOffer) -> v1::CardOffer {
        v1::CardOffer { model, cards: Some(cards.into()) }
    }
}

impl TryFrom<v1::CardOffer> for CardOffer {
    type Error = WireError;

    fn try_from(v1::CardOffer { model, cards }: v1::CardOffer) -> Result<CardOffer, WireError> {
        Ok(CardOffer { model, cards: grant(cards)? })
    }
}

impl From<CardUsage> for v1::CardUsage {
    fn from(usage: CardUsage) -> v1::CardUsage {
        let CardUsage { card, memory, memory_used, busy_percent, temperature_celsius, trouble, errors } =
            usage;
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
            errors,
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
            errors,
        } = wire;
        let v1::CharDevice { major, minor } = device.ok_or(WireError::Missing("gpus.device"))?;
        Ok(CardUsage {
            card: Card { number, id, model, device: CharDevice { major, minor } },
            memory: memory_bytes.map(Bytes),
            memory_used: memory_used_bytes.map(Bytes),
            busy_percent,
            temperature_celsius,
            trouble,
            errors,
        })
    }
}

impl From<CardMemory> for v1::CardMemory {
    fn from(memory: CardMemory) -> v1::CardMemory {
        let CardMemory { number, used, processes, limit, enforced_by } = memory;
        v1::CardMemory {
            number,
            used_bytes: used.0,
            processes,
            limit_bytes: limit.at().map(|limit| limit.0),
            enforced_by: enforced_by.map(|rung| rung.name().to_owned()).unwrap_or_default(),
        }
    }
}

impl From<v1::CardMemory> for CardMemory {
    fn from(wire: v1::CardMemory) -> CardMemory {
        let v1::CardMemory { number, used_bytes, processes, limit_bytes, enforced_by } = wire;
        CardMemory {
            number,
            used: Bytes(used_bytes),
            processes,
            limit: limit_bytes.map_or(Limit::Unlimited, |bytes| Limit::At(Bytes(bytes))),
            // One that a newer agent has is not known here.
            enforced_by: Rung::ALL.into_iter().find(|rung| rung.name() == enforced_by),
        }
    }
}
