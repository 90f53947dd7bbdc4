//! The executor by itself, on the cgroup files of this kernel: what an agent does with them, without one.

use shaper_agent::{
    actuate::{self, ActuateError, Change, Knob, Lasts, Pacing, Target, Value, Values, Wish},
    gpu::Holders,
    kernel::{
        bpf::{BpfError, Refused},
        cgroup::Cgroup,
        ingress::ClassState,
    },
};
use shaper_common::{abi::Pace, pool::Terms};
use shaper_core::{gpu::CardSet, id::BlockDevice, units::BitsPerSec};

/// Where the limits of a task are that has this cgroup, no group of v1, no socket and no other manager.
pub fn target(cgroup: Cgroup) -> Target {
    Target {
        cgroup,
        v1_cpu: None,
        v1_memory: None,
        v1_io: None,
        manager: None,
        slot: 0,
        has_sockets: false,
        shares_network: false,
        cards: Holders::new(None),
    }
}

/// For tasks whose sockets nobody asks about.
pub struct NoPacing;

impl Pacing for NoPacing {
    fn pace(&self, slot: u32) -> Pace {
        panic!("the pacing of slot {slot} is asked for");
    }

    fn ceiling(&self, slot: u32) -> Option<u64> {
        panic!("the ceiling of slot {slot} is asked for");
    }

    fn terms(&self, slot: u32) -> Option<Terms> {
        panic!("the part of slot {slot} is asked for");
    }

    fn set_terms(&mut self, slot: u32, _: u64, _: u32) {
        panic!("slot {slot} is to have another part");
    }

    fn limit(&mut self, slot: u32, _: Option<BitsPerSec>, _: bool) -> Result<(), BpfError> {
        panic!("slot {slot} is to be paced");
    }

    fn ingress(&self, slot: u32) -> Result<Option<ClassState>, BpfError> {
        panic!("the queue of slot {slot} is asked for");
    }

    fn ingress_device(&self) -> &str {
        panic!("the device of a queue is asked for");
    }

    fn limit_ingress(&mut self, slot: u32, _: Option<BitsPerSec>) -> Result<(), BpfError> {
        panic!("what slot {slot} receives is to be limited");
    }

    fn admits(&self) -> bool {
        panic!("whether there is admission to cards is asked for");
    }

    fn cards(&self, slot: u32) -> Option<CardSet> {
        panic!("the cards of slot {slot} are asked for");
    }

    fn admit(&mut self, slot: u32, _: Option<CardSet>) {
        panic!("slot {slot} is to have other cards");
    }

    fn refused(&self, slot: u32) -> Refused {
        panic!("what was refused to slot {slot} is asked for");
    }
}

/// Grants wishes, and returns what was changed.
pub fn grant(target: &Target, wishes: &[Wish]) -> Result<Vec<Change>, ActuateError> {
    let changes = actuate::plan(target, &NoPacing, wishes)?.changes;
    actuate::execute(target, &mut NoPacing, &changes, Lasts::ForAWhile)?;
    Ok(changes)
}

/// Grants wishes that each turn a knob, sees that `files` shows it, and that everything comes back: when a later knob
/// of the same change fails, and at a release.
#[track_caller]
pub fn assert_turned_and_restored(target: &Target, wishes: &[Wish], files: impl Fn() -> String) {
    let before = files();
    let changes = grant(target, wishes).expect("the kernel takes the values");
    assert_eq!(changes.len(), wishes.len(), "{changes:?}");
    let turned = files();
    assert_ne!(turned, before);
    // What is in force is read back as what was wished, so nothing is left to do.
    assert_eq!(actuate::plan(target, &NoPacing, wishes).expect("it can be read").changes, []);

    let baseline: Values = changes.iter().map(|change| (change.knob, change.before)).collect();
    assert_eq!(
        grant(target, &actuate::as_before(&baseline)).expect("the kernel takes the values back").len(),
        wishes.len()
    );
    assert_eq!(files(), before);

    let nowhere = BlockDevice { major: 4000, minor: 1 };
    let value =
        |read| Value::Io(shaper_agent::kernel::cgroup::block::IoLimits { read, ..Default::default() });
    let limit = shaper_core::limits::Limit::At(shaper_core::units::BytesPerSec(1 << 20));
    let fails = Change { knob: Knob::IoMax(nowhere), before: value(Default::default()), after: value(limit) };
    let with_failure: Vec<Change> = changes.into_iter().chain([fails]).collect();
    let error = actuate::execute(target, &mut NoPacing, &with_failure, Lasts::ForAWhile)
        .expect_err("there is no such device");
    assert!(matches!(error, ActuateError::NoDevice(device) if device == nowhere), "{error}");
    assert!(error.is_undone());
    assert_eq!(files(), before, "after {turned}");
}
