//! Events: errors of cards, by their numbers (XID).

use std::{
    ffi::{c_uint, c_ulonglong},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use crate::{
    Device, INVALID_ARGUMENT, NO_INSTANCE, Return, SUCCESS, State, UNKNOWN, changes::Changes, done, give,
};

const TIMEOUT: Return = 10;
/// `nvmlEventTypeXidCriticalError`
const XID: c_ulonglong = 8;

/// `nvmlEventSet_t`: how many errors were told.
pub struct Events(AtomicUsize);

/// `nvmlEventData_t`
#[repr(C)]
pub struct EventData {
    device: Device,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(to: *mut *mut Events) -> Return {
    let made = State::of("nvmlEventSetCreate").map(|state| Events(AtomicUsize::new(state.xids.len())));
    // SAFETY: the caller's promise.
    done(made.and_then(|set| unsafe { give(to, Box::into_raw(Box::new(set))) }))
}

/// # Safety
/// As NVIDIA documents it: the set was made by `nvmlEventSetCreate`, and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetFree(set: *mut Events) -> Return {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(set) });
    SUCCESS
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetSupportedEventTypes(device: Device, to: *mut c_ulonglong) -> Return {
    let types =
        State::of("nvmlDeviceGetSupportedEventTypes").and_then(|state| state.card(device).map(|_| XID));
    // SAFETY: the caller's promise.
    done(types.and_then(|types| unsafe { give(to, types) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceRegisterEvents(
    device: Device,
    types: c_ulonglong,
    _: *mut Events,
) -> Return {
    let state = State::of("nvmlDeviceRegisterEvents");
    let known = state.and_then(|state| state.card(device).map(drop));
    done(known.and(if types == XID { Ok(()) } else { Err(INVALID_ARGUMENT) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    set: *mut Events,
    to: *mut EventData,
    timeout_ms: c_uint,
) -> Return {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's promise.
    let Events(told) = unsafe { &*set };
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    // Before it is read: what changes meanwhile is not missed.
    let Ok(changes) = Changes::watch() else { return UNKNOWN };
    loop {
        let state = match State::of("nvmlEventSetWait_v2") {
            Ok(state) => state,
            Err(answer) => return answer,
        };
        // Where there are fewer than before, another test begins.
        let number = told.load(Ordering::Acquire).min(state.xids.len());
        if let Some(xid) = state.xids.get(number) {
            told.store(number + 1, Ordering::Release);
            let place = state.cards.iter().position(|card| card.uuid == xid.card).unwrap_or(0);
            let event = EventData {
                device: (place + 1) as Device,
                kind: XID,
                data: xid.code,
                gpu_instance: NO_INSTANCE,
                compute_instance: NO_INSTANCE,
            };
            // SAFETY: the caller's promise.
            return done(unsafe { give(to, event) });
        }
        told.store(number, Ordering::Release);
        match changes.wait(Some(until)) {
            Ok(true) => {}
            Ok(false) => return TIMEOUT,
            Err(_) => return UNKNOWN,
        }
    }
}
