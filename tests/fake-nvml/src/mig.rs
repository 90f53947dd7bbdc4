//! Instances: parts of a card (MIG).

use std::ffi::c_uint;

use crate::{Card, Device, INSTANCES, INVALID_ARGUMENT, NOT_FOUND, NOT_SUPPORTED, Return, State, done, give};

/// Instances that a card can have.
const MOST: c_uint = 7;

impl State {
    /// The instances of a card, and the devices that they are.
    fn instances_of<'a>(&'a self, card: &'a Card) -> impl Iterator<Item = (Device, &'a Card)> {
        let is_its = |instance: &Card| instance.instance.as_ref().is_some_and(|(of, ..)| *of == card.uuid);
        let instances = self.instances.iter().enumerate().filter(move |(_, instance)| is_its(instance));
        instances.map(|(place, instance)| ((INSTANCES + place) as Device, instance))
    }
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: Device,
    now: *mut c_uint,
    later: *mut c_uint,
) -> Return {
    let mode = State::of("nvmlDeviceGetMigMode").and_then(|state| {
        let card = state.card(device)?;
        if state.instances_of(card).next().is_some() { Ok(1) } else { Err(NOT_SUPPORTED) }
    });
    // SAFETY: the caller's promise.
    done(mode.and_then(|mode| unsafe { give(now, mode).and_then(|()| give(later, mode)) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(device: Device, to: *mut c_uint) -> Return {
    let most = State::of("nvmlDeviceGetMaxMigDeviceCount").and_then(|state| state.card(device).map(|_| MOST));
    // SAFETY: the caller's promise.
    done(most.and_then(|most| unsafe { give(to, most) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: Device,
    index: c_uint,
    to: *mut Device,
) -> Return {
    let found = State::of("nvmlDeviceGetMigDeviceHandleByIndex").and_then(|state| {
        let card = state.card(device)?;
        state.instances_of(card).nth(index as usize).map(|(instance, _)| instance).ok_or(NOT_FOUND)
    });
    // SAFETY: the caller's promise.
    done(found.and_then(|instance| unsafe { give(to, instance) }))
}

/// A number of an instance.
fn number(
    function: &str,
    device: Device,
    of: impl Fn(&(String, c_uint, c_uint)) -> c_uint,
) -> Result<c_uint, Return> {
    let state = State::of(function)?;
    state.card(device)?.instance.as_ref().map(of).ok_or(INVALID_ARGUMENT)
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuInstanceId(device: Device, to: *mut c_uint) -> Return {
    let found = number("nvmlDeviceGetGpuInstanceId", device, |(_, gpu, _)| *gpu);
    // SAFETY: the caller's promise.
    done(found.and_then(|number| unsafe { give(to, number) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeInstanceId(device: Device, to: *mut c_uint) -> Return {
    let found = number("nvmlDeviceGetComputeInstanceId", device, |(_, _, compute)| *compute);
    // SAFETY: the caller's promise.
    done(found.and_then(|number| unsafe { give(to, number) }))
}
