//! The GPU cards of a node: how they are named, and what they hold.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{limits::Limit, units::Bytes};

/// How many cards a node can have.
pub const CARDS_MAX: u32 = 64;

/// A character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CharDevice {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for CharDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Cards of one node, by their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u32>", into = "Vec<u32>")]
pub struct CardSet(u64);

impl CardSet {
    /// No card.
    pub const NONE: CardSet = CardSet(0);

    /// With one bit for each, from the lowest on.
    pub const fn from_bits(bits: u64) -> CardSet {
        CardSet(bits)
    }

    /// Likewise.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether a card is one of them.
    pub fn contains(self, number: u32) -> bool {
        number < CARDS_MAX && self.0 >> number & 1 == 1
    }

    /// Whether all of these are of them.
    pub fn has_all(self, others: CardSet) -> bool {
        others.0 & !self.0 == 0
    }

    /// How many.
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether it is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their numbers, the lowest first.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let first = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            (first < CARDS_MAX).then_some(first)
        })
    }
}

/// Why this is no set of cards.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no number of a card: say numbers below {CARDS_MAX}, such as 0,2, or none")]
pub struct NotCards(String);

impl TryFrom<Vec<u32>> for CardSet {
    type Error = NotCards;

    fn try_from(numbers: Vec<u32>) -> Result<CardSet, NotCards> {
        numbers.into_iter().try_fold(CardSet::NONE, |CardSet(bits), number| {
            if number < CARDS_MAX {
                Ok(CardSet(bits | 1 << number))
            } else {
                Err(NotCards(number.to_string()))
            }
        })
    }
}

impl From<CardSet> for Vec<u32> {
    fn from(cards: CardSet) -> Vec<u32> {
        cards.numbers().collect()
    }
}

impl FromStr for CardSet {
    type Err = NotCards;

    fn from_str(text: &str) -> Result<CardSet, NotCards> {
        if text == "none" {
            return Ok(CardSet::NONE);
        }
        let number = |part: &str| part.trim().parse::<u32>().map_err(|_| NotCards(part.to_owned()));
        text.split(',').map(number).collect::<Result<Vec<u32>, _>>()?.try_into()
    }
}

impl fmt::Display for CardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == CardSet::NONE {
            return f.pad("none");
        }
        let numbers: Vec<String> = self.numbers().map(|number| number.to_string()).collect();
        f.pad(&numbers.join(","))
    }
}

/// A card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Its number on this node, which it keeps as long as the machine runs.
    pub number: u32,
    /// What it is known by: the UUID that NVML gives it, or the path of its device.
    pub id: String,
    /// Its model.
    pub model: String,
    /// What is opened to use it.
    pub device: CharDevice,
}

/// A card as it was last read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardUsage {
    /// Which.
    pub card: Card,
    /// Its memory; `None` where nobody says so.
    pub memory: Option<Bytes>,
    /// Of that: what is in use, by whomever.
    pub memory_used: Option<Bytes>,
    /// Part of the last moments in which it was busy, per cent.
    pub busy_percent: Option<u32>,
    /// Temperature, °C.
    pub temperature_celsius: Option<u32>,
    /// Why nothing is known of it now: it was lost, or cannot be read.
    pub trouble: Option<String>,
}

/// Cards that a task is to have to itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardRequest {
    /// How many.
    pub count: u32,
    /// What their model has in its name; empty: any.
    pub model: String,
}

/// The cards that a node offers to a broker: of one model, with as much memory each as its capacity says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardOffer {
    /// Their model.
    pub model: String,
    /// Their numbers.
    pub cards: CardSet,
}

/// What holds a task to its part of a card's memory, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// The controller dmem of cgroup v2: the kernel refuses what is beyond.
    Dmem,
    /// NVIDIA's driver, by cgroup: it refuses what is beyond.
    NvmlCgroup,
    /// The card is a part of one, cut by the hardware: there is no more of it.
    Mig,
    /// The MPS server, which refuses what is beyond to each process; said when the task was started.
    Mps,
    /// This agent looks each second, and acts on a task that has more.
    Watchdog,
}

impl Rung {
    /// All of them, the strongest first.
    pub const ALL: [Rung; 5] = [Rung::Dmem, Rung::NvmlCgroup, Rung::Mig, Rung::Mps, Rung::Watchdog];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Rung::Dmem => "dmem",
            Rung::NvmlCgroup => "nvml-cgroup",
            Rung::Mig => "mig",
            Rung::Mps => "mps",
            Rung::Watchdog => "watchdog",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a task has of the memory of one card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardMemory {
    /// The number of the card.
    pub number: u32,
    /// In use.
    pub used: Bytes,
    /// By so many processes.
    pub processes: u32,
    /// What it may have.
    pub limit: Limit<Bytes>,
    /// What holds it to that; `None`: it has no limit.
    pub enforced_by: Option<Rung>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_numbers_or_none() {
        for (text, bits) in [("none", 0), ("0", 1), ("0,2", 5), ("63", 1 << 63)] {
            let cards: CardSet = text.parse().unwrap();
            assert_eq!((cards.bits(), cards.to_string().as_str()), (bits, text));
        }
        assert_eq!("2, 0,2".parse(), Ok(CardSet::from_bits(5)));
        for bad in ["", "all", "64", "-1", "0,", "0;1"] {
            assert!(bad.parse::<CardSet>().is_err(), "{bad}");
        }
        assert!(!CardSet::from_bits(u64::MAX).contains(64));
    }

    #[test]
    fn cards_are_written_as_a_list() {
        let cards = CardSet::from_bits(0b101);
        assert_eq!(serde_json::to_string(&cards).unwrap(), "[0,2]");
        assert_eq!(serde_json::from_str::<CardSet>("[2,0]").unwrap(), cards);
        assert!(serde_json::from_str::<CardSet>("[64]").is_err());
    }
}
