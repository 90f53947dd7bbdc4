//! The GPU cards of a node, one by one: what of each is taken, and which of them a task would have. Like [`judge`](super::judge)
//! this is the plain rule; [`Cluster`](super::Cluster) finds the same by its index.
//!
//! A card is either shared, by tasks that each ask for a part of its memory, or one task has it to itself.

use std::{cmp::Reverse, collections::BTreeMap, fmt};

use super::{judge::Candidate, node::WHOLE, task::GpuRequest};
use crate::{
    gpu::{CardOffer, CardRequest, CardSet},
    spec::Demand,
    units::Bytes,
};

/// All that a task asks a node for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs<'a> {
    /// Amounts. Memory of a GPU is of one card that it shares, or of each of those that it has to itself.
    pub demand: &'a Demand,
    /// Cards to itself, and the model of any card.
    pub gpus: &'a CardRequest,
    /// That it runs containers.
    pub container: bool,
}

/// No card.
pub static NO_CARDS: CardRequest = CardRequest { count: 0, model: String::new() };
/// A node without cards.
pub static NO_OFFER: CardOffer = CardOffer { model: String::new(), cards: CardSet::NONE };

impl<'a> Needs<'a> {
    /// Amounts alone.
    pub fn of(demand: &'a Demand) -> Needs<'a> {
        Needs { demand, gpus: &NO_CARDS, container: false }
    }

    /// As a request for GPUs: the least part of one says that nobody is to have it whole.
    pub fn gpu(&self) -> GpuRequest {
        match (self.gpus.count, self.memory()) {
            (0, 0) => GpuRequest::None,
            (0, _) => GpuRequest::Share(1),
            (count, _) => GpuRequest::Whole(u8::try_from(count).unwrap_or(u8::MAX)),
        }
    }

    /// Whether the model of these cards is one that it takes. Who asks for no card minds none.
    pub fn suits(&self, offer: &CardOffer) -> bool {
        self.gpu() == GpuRequest::None || suits_model(&self.gpus.model, &offer.model)
    }

    fn memory(&self) -> u64 {
        self.demand.gpu_memory.map_or(0, |it| it.0)
    }
}

/// What of a card is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CardTaken {
    /// By so many tasks that share it …
    pub shares: u32,
    /// … memory, together.
    pub memory: Bytes,
    /// By so many that have it to themselves: more than one only while a place is cleared.
    pub wholes: u32,
}

/// Nothing of any card is taken.
pub static NO_BOOKS: CardBooks = CardBooks(BTreeMap::new());

/// What of the cards of a node is taken, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CardBooks(BTreeMap<u32, CardTaken>);

impl CardBooks {
    /// A task has these cards.
    pub fn take(&mut self, needs: Needs<'_>, cards: CardSet) {
        for number in cards.numbers() {
            let taken = self.0.entry(number).or_default();
            match needs.gpu() {
                GpuRequest::Whole(_) => taken.wholes += 1,
                GpuRequest::None | GpuRequest::Share(_) => {
                    taken.shares += 1;
                    taken.memory = Bytes(taken.memory.0.saturating_add(needs.memory()));
                }
            }
        }
    }

    /// A task has them no more.
    pub fn give(&mut self, needs: Needs<'_>, cards: CardSet) {
        for number in cards.numbers() {
            let Some(taken) = self.0.get_mut(&number) else { continue };
            match needs.gpu() {
                GpuRequest::Whole(_) => taken.wholes = taken.wholes.saturating_sub(1),
                GpuRequest::None | GpuRequest::Share(_) => {
                    taken.shares = taken.shares.saturating_sub(1);
                    taken.memory = Bytes(taken.memory.0.saturating_sub(needs.memory()));
                }
            }
            if *taken == CardTaken::default() {
                self.0.remove(&number);
            }
        }
    }

    /// What of a card is taken.
    pub fn of(&self, number: u32) -> CardTaken {
        self.0.get(&number).copied().unwrap_or_default()
    }

    /// The cards of which something is taken.
    pub fn taken(&self) -> CardSet {
        CardSet::from_bits(self.0.keys().fold(0, |bits, number| bits | 1 << number))
    }

    /// Memory that is taken of all cards together, where each has so much: all of it of a card that somebody has to itself.
    pub fn memory(&self, each: Bytes) -> Bytes {
        let of = |taken: &CardTaken| if taken.wholes > 0 { each.0 } else { taken.memory.0 };
        Bytes(self.0.values().fold(0, |sum, taken| sum.saturating_add(of(taken))))
    }
}

/// Why the cards of a node are not for a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CardShortage<'a> {
    /// They are of another model.
    Model { wanted: &'a str, has: &'a str },
    /// Memory is wanted of one, and there is none.
    NoMemory { wanted: Bytes },
    /// They have less memory.
    Small { wanted: Bytes, each: Bytes },
    /// On none of them is so much left.
    Memory { wanted: Bytes, free: Bytes, each: Bytes },
    /// Cards are wanted, and there is none.
    None { wanted: u32 },
    /// Others have them.
    Cards { wanted: u32, free: u32, total: u32 },
}

impl fmt::Display for CardShortage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CardShortage::Model { wanted, has } => {
                write!(f, "gpu model: `{wanted}` wanted, this node has `{has}`")
            }
            CardShortage::NoMemory { wanted } => write!(f, "gpu_memory: {wanted} wanted, none here"),
            CardShortage::Small { wanted, each } => {
                write!(f, "gpu_memory: {wanted} wanted, a card has {each}")
            }
            CardShortage::Memory { wanted, free, each } => {
                write!(f, "gpu_memory: {wanted} wanted, {free} of {each} free on one card")
            }
            CardShortage::None { wanted } => write!(f, "gpus: {wanted} wanted, none here"),
            CardShortage::Cards { wanted, free, total } => {
                write!(f, "gpus: {wanted} wanted, {free} of {total} free")
            }
        }
    }
}

impl<'a> Candidate<'a> {
    fn memory_of_a_card(&self) -> u64 {
        self.capacity.gpu_memory.map_or(0, |it| it.0)
    }

    /// Memory that is free of a card that can be shared.
    fn sharable(&self, number: u32) -> Option<u64> {
        let CardTaken { shares, memory, wholes } = self.cards.of(number);
        let is_open = self.offer.cards.contains(number) && wholes == 0 && shares < u32::from(WHOLE);
        is_open.then(|| self.memory_of_a_card().saturating_sub(memory.0))
    }

    /// The cards that nobody has any of.
    fn untouched(&self) -> CardSet {
        CardSet::from_bits(self.offer.cards.bits() & !self.cards.taken().bits())
    }

    /// Why none of its cards are for a task; whether some are.
    pub(super) fn compare_cards(&self, needs: Needs<'a>, mut tell: impl FnMut(CardShortage<'a>)) -> bool {
        let request = needs.gpu();
        if request == GpuRequest::None {
            return true;
        }
        let (wanted, each) = (Bytes(needs.memory()), Bytes(self.memory_of_a_card()));
        let mut suits = true;
        let mut tell = |shortage| {
            suits = false;
            tell(shortage);
        };
        let (offer, count) = (self.offer, needs.gpus.count);
        if offer.cards.is_empty() {
            tell(match request {
                GpuRequest::Whole(_) => CardShortage::None { wanted: count },
                GpuRequest::None | GpuRequest::Share(_) => CardShortage::NoMemory { wanted },
            });
            return false;
        }
        if !suits_model(&needs.gpus.model, &offer.model) {
            tell(CardShortage::Model { wanted: &needs.gpus.model, has: &offer.model });
        }
        if wanted > each {
            tell(CardShortage::Small { wanted, each });
        }
        match request {
            GpuRequest::Whole(_) => {
                let (free, total) = (self.untouched().len(), offer.cards.len());
                if count > free {
                    tell(CardShortage::Cards { wanted: count, free, total });
                }
            }
            GpuRequest::None | GpuRequest::Share(_) => {
                let free = offer.cards.numbers().filter_map(|number| self.sharable(number)).max();
                if wanted <= each && free.is_none_or(|free| wanted.0 > free) {
                    let free = Bytes(free.unwrap_or(0));
                    tell(CardShortage::Memory { wanted, free, each });
                }
            }
        }
        suits
    }

    /// Whether a task could have just these of its cards.
    pub(super) fn has_cards(&self, needs: Needs<'_>, cards: CardSet) -> bool {
        let memory = needs.memory();
        match needs.gpu() {
            GpuRequest::None => true,
            GpuRequest::Share(_) => {
                let free = |number| self.sharable(number).is_some_and(|free| memory <= free);
                !cards.is_empty() && cards.numbers().all(free)
            }
            GpuRequest::Whole(_) => {
                memory <= self.memory_of_a_card()
                    && cards.len() == needs.gpus.count
                    && cards.bits() & !self.untouched().bits() == 0
            }
        }
    }

    /// The cards that a task would have here, which fits: to share, that with the least left; to itself, the first.
    pub fn cards_for(&self, needs: Needs<'_>) -> CardSet {
        let first = |set: CardSet, count: u32| set.numbers().take(count as usize);
        let bits = |numbers: &mut dyn Iterator<Item = u32>| {
            CardSet::from_bits(numbers.fold(0, |bits, number| bits | 1 << number))
        };
        match needs.gpu() {
            GpuRequest::None => CardSet::NONE,
            GpuRequest::Whole(_) => bits(&mut first(self.untouched(), needs.gpus.count)),
            GpuRequest::Share(_) => {
                let free = |number: u32| Some((number, self.sharable(number)?));
                let fitting = self.offer.cards.numbers().filter_map(free);
                let fitting = fitting.filter(|(_, free)| *free >= needs.memory());
                let least =
                    fitting.min_by_key(|(number, free)| (Reverse(self.cards.of(*number).shares), *free));
                bits(&mut least.into_iter().map(|(number, _)| number))
            }
        }
    }
}

/// Whether a model has what is wanted in its name.
pub fn suits_model(wanted: &str, model: &str) -> bool {
    model.contains(wanted)
}
