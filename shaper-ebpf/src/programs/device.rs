//! Which tasks may open which GPU cards.
//!
//! It decides on opens (and on making a node): a descriptor that is open already goes on working. It takes away only: what
//! another program on a cgroup below refuses stays refused.

use aya_ebpf::{macros::cgroup_device, programs::DeviceContext};
use shaper_common::abi::{self, SLOT_FIRST};

use crate::{
    atomic,
    maps::{ADMISSION, GOVERNED},
    slots,
};

/// cgroup/dev: the kernel goes on …
const ALLOW: i32 = 1;
/// … or answers EPERM.
const REFUSE: i32 = 0;

/// `BPF_DEVCG_DEV_CHAR`, in the lower half of the access type.
const CHARACTER: u32 = 2;
const KIND: u32 = 0xffff;

/// Lets a task open the cards that it was granted, of those that are governed. Whatever else is opened, by whomever, is left
/// alone.
#[cgroup_device]
pub fn device_admission(ctx: DeviceContext) -> i32 {
    // SAFETY: fields of the context.
    let (access, major, minor) =
        unsafe { ((*ctx.device).access_type, (*ctx.device).major, (*ctx.device).minor) };
    if access & KIND != CHARACTER {
        return ALLOW;
    }
    // SAFETY: a plain word; a concurrent change gives the old or the new number.
    let Some(card) = (unsafe { GOVERNED.get(abi::device_key(major, minor)) }) else { return ALLOW };
    let slot = slots::of_current();
    if slot < SLOT_FIRST {
        return ALLOW;
    }
    let Some(admission) = ADMISSION.get_ptr_mut(slot) else { return ALLOW };
    // SAFETY: words of a live map value.
    unsafe {
        if atomic::load(&raw const (*admission).is_governed) == 0 {
            return ALLOW;
        }
        // A shift by more is no shift to the verifier.
        let card = *card & (u64::BITS - 1);
        if atomic::load(&raw const (*admission).granted) >> card & 1 == 1 {
            return ALLOW;
        }
        atomic::store(&raw mut (*admission).refused_card, card);
        atomic::fetch_add(&raw mut (*admission).refused, 1);
    }
    REFUSE
}
