//! The numbers of the cards, on disk: `<state-dir>/cards.json`. What a task was granted is written down as numbers, and so is
//! what the kernel programs are told.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shaper_core::gpu::{CARDS_MAX, Card, CharDevice};

use crate::durable;

/// The cards that this boot of the machine has seen.
#[derive(Debug)]
pub struct Table {
    path: PathBuf,
    boot_id: String,
    cards: Vec<Card>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    boot_id: String,
    cards: Vec<Card>,
}

/// Why a card has no number.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// There are no more.
    #[error("{0} has no number: a node can have {CARDS_MAX} cards")]
    Full(String),
    /// The file.
    #[error(transparent)]
    Durable(#[from] durable::Error),
}

impl Table {
    /// As it is on disk; empty after a boot.
    pub fn open(state_dir: &Path, boot_id: &str) -> Result<Table, durable::Error> {
        let path = state_dir.join("cards.json");
        let found: Option<OnDisk> = durable::read_json(&path)?;
        let cards = found.filter(|found| found.boot_id == boot_id).map_or_else(Vec::new, |found| found.cards);
        Ok(Table { path, boot_id: boot_id.to_owned(), cards })
    }

    /// The cards, by number.
    pub fn cards(&self) -> &[Card] {
        &self.cards
    }

    /// The card of that id.
    pub fn by_id(&self, id: &str) -> Option<&Card> {
        self.cards.iter().find(|card| card.id == id)
    }

    /// Takes a card up, on disk first; tells whether anything of it is new.
    pub fn note(&mut self, id: &str, model: &str, device: CharDevice) -> Result<bool, TableError> {
        if self.by_id(id).is_some_and(|card| card.device == device && card.model == model) {
            return Ok(false);
        }
        let mut cards = self.cards.clone();
        match cards.iter_mut().find(|card| card.id == id) {
            Some(card) => {
                card.device = device;
                card.model = model.to_owned();
            }
            None => {
                let number = u32::try_from(cards.len()).unwrap_or(CARDS_MAX);
                if number >= CARDS_MAX {
                    return Err(TableError::Full(id.to_owned()));
                }
                cards.push(Card { number, id: id.to_owned(), model: model.to_owned(), device });
            }
        }
        let on_disk = OnDisk { boot_id: self.boot_id.clone(), cards };
        durable::write_json(&self.path, &on_disk, 0o600)?;
        self.cards = on_disk.cards;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_keeps_its_number_as_long_as_the_machine_runs() {
        let folder = tempfile::tempdir().unwrap();
        let open = |boot| Table::open(folder.path(), boot).unwrap();
        let device = |minor| CharDevice { major: 195, minor };
        let mut table = open("one");
        assert!(table.note("GPU-a", "A", device(0)).unwrap());
        assert!(table.note("GPU-b", "B", device(1)).unwrap());
        assert!(!table.note("GPU-a", "A", device(0)).unwrap());
        // Another agent finds only the second, at another device.
        let mut table = open("one");
        assert!(table.note("GPU-b", "B", device(5)).unwrap());
        assert_eq!(table.by_id("GPU-b").map(|card| (card.number, card.device)), Some((1, device(5))));
        assert_eq!(open("one").cards().len(), 2);
        assert_eq!(open("two").cards(), []);
    }

    #[test]
    fn there_is_an_end_to_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let mut table = Table::open(folder.path(), "one").unwrap();
        for number in 0..CARDS_MAX {
            table.note(&number.to_string(), "", CharDevice { major: 1, minor: number }).unwrap();
        }
        let refused = table.note("more", "", CharDevice { major: 1, minor: 99 });
        assert!(matches!(refused, Err(TableError::Full(_))), "{refused:?}");
    }
}
