//! Stands for `libnvidia-ml.so.1` where there is no card.
//!
//! It does what NVIDIA documents of the functions that it has, and nothing else; the others are missing, as from an
//! older driver. What the cards are and do is in a file, named by `SHAPER_FAKE_NVML` when the library is initialised, and
//! read with each call, so that a test changes it while an agent runs:
//!
//!     card uuid=GPU-1 name=Fake_H100 memory=85899345920 minor=0 busy=40 temperature=51 power=700000 [lost]
//!     instance card=GPU-1 uuid=MIG-1 name=Fake_H100_MIG_1g.10gb memory=10737418240 gi=1 ci=0
//!     xid card=GPU-1 code=79
//!     process card=GPU-1 pid=4711 memory=2147483648
//!     without nvmlDeviceSetMemoryLimits_v1
//!     denied nvmlDeviceSetMemoryLimits_v1
//!     stuck nvmlDeviceGetCount_v2
//!
//! A card that is `lost` is still counted, and whoever asks it anything is told that it has fallen off the bus. A function
//! that the driver is `without` answers so, as a library does that is newer than its driver. One that is `stuck` does not
//! return until the line is gone.
//!
//! Who waits for events is told of each `xid` that was not there when he began. A card with instances is in MIG mode; processes
//! name theirs as `card`. `power` is the most that a card draws, in mW; it can be brought down to a quarter of that.
//!
//! Memory limits of cgroups (driver r615) are kept in a file beside that, a line each, with `.limits` after its name, and
//! limits of power in one with `.power`.
#![allow(non_snake_case, reason = "the names are NVIDIA's")]

mod changes;
pub mod events;
pub mod mig;

use std::{
    collections::HashSet,
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use changes::Changes;

/// `nvmlReturn_t`
type Return = c_int;
const SUCCESS: Return = 0;
const INVALID_ARGUMENT: Return = 2;
const NOT_SUPPORTED: Return = 3;
const NO_PERMISSION: Return = 4;
const NOT_FOUND: Return = 6;
const INSUFFICIENT_SIZE: Return = 7;
const DRIVER_NOT_LOADED: Return = 9;
const FUNCTION_NOT_FOUND: Return = 13;
const GPU_IS_LOST: Return = 15;
const UNKNOWN: Return = 999;

/// `nvmlDevice_t`: here the place of the card in the file, from 1.
type Device = *mut c_void;

/// What the file is named by.
const STATE: &str = "SHAPER_FAKE_NVML";
/// `nvmlProcessInfo_t`: the process is not on a part of a card.
const NO_INSTANCE: c_uint = c_uint::MAX;
/// A limit that is none.
const NO_LIMIT: c_ulonglong = c_ulonglong::MAX;

struct Card {
    uuid: String,
    name: String,
    memory: u64,
    minor: u32,
    busy: Option<u32>,
    temperature: Option<u32>,
    power: Option<u32>,
    lost: bool,
    /// Of an instance: the UUID of its card, and its numbers there.
    instance: Option<(String, c_uint, c_uint)>,
}

struct Xid {
    card: String,
    code: u64,
}

/// Devices from here on are instances.
const INSTANCES: usize = 1000;

struct Process {
    card: String,
    pid: u32,
    memory: u64,
}

#[derive(Default)]
struct State {
    cards: Vec<Card>,
    instances: Vec<Card>,
    xids: Vec<Xid>,
    processes: Vec<Process>,
    without: Vec<String>,
    denied: Vec<String>,
    stuck: Vec<String>,
}

fn path() -> Option<PathBuf> {
    std::env::var_os(STATE).map(PathBuf::from)
}

impl State {
    fn read() -> State {
        let text = path().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let mut state = State::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let kind = words.next().unwrap_or_default();
            let words: Vec<&str> = words.collect();
            let named = |name: &str| {
                words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
            };
            let listed = || words.iter().map(|word| (*word).to_owned());
            let card = |instance| Card {
                uuid: named("uuid").to_owned(),
                name: named("name").replace('_', " "),
                memory: named("memory").parse().unwrap_or(0),
                minor: named("minor").parse().unwrap_or(0),
                busy: named("busy").parse().ok(),
                temperature: named("temperature").parse().ok(),
                power: named("power").parse().ok(),
                lost: words.contains(&"lost"),
                instance,
            };
            match kind {
                "card" => state.cards.push(card(None)),
                "instance" => {
                    let number = |name| named(name).parse().unwrap_or(0);
                    let place = (named("card").to_owned(), number("gi"), number("ci"));
                    state.instances.push(card(Some(place)));
                }
                "xid" => {
                    let (card, code) = (named("card").to_owned(), named("code").parse().unwrap_or(0));
                    state.xids.push(Xid { card, code });
                }
                "process" => state.processes.push(Process {
                    card: named("card").to_owned(),
                    pid: named("pid").parse().unwrap_or(0),
                    memory: named("memory").parse().unwrap_or(0),
                }),
                "without" => state.without.extend(listed()),
                "denied" => state.denied.extend(listed()),
                "stuck" => state.stuck.extend(listed()),
                _ => {}
            }
        }
        state
    }

    /// As it is now: it is read again when it was replaced.
    fn now() -> Arc<State> {
        static LAST: Mutex<Option<(u64, SystemTime, Arc<State>)>> = Mutex::new(None);
        let metadata = path().and_then(|path| fs::metadata(path).ok());
        let changed = metadata.and_then(|it| Some((it.ino(), it.modified().ok()?)));
        let Some((file, at)) = changed else { return Arc::new(State::read()) };
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, since, state)) if (*known, *since) == (file, at) => Arc::clone(state),
            _ => {
                let state = Arc::new(State::read());
                *last = Some((file, at, Arc::clone(&state)));
                state
            }
        }
    }

    /// The state for a call of `function`, or what it answers at once.
    fn of(function: &str) -> Result<Arc<State>, Return> {
        let named = |list: &[String]| list.iter().any(|name| name == function);
        let mut changes: Option<Changes> = None;
        loop {
            let state = State::now();
            if named(&state.without) {
                return Err(FUNCTION_NOT_FOUND);
            }
            if named(&state.denied) {
                return Err(NO_PERMISSION);
            }
            if !named(&state.stuck) {
                return Ok(state);
            }
            // Once it is watched it is read again before it is waited for: what changes meanwhile is not missed.
            match &changes {
                None => changes = Some(Changes::watch().map_err(|_| UNKNOWN)?),
                Some(changes) => drop(changes.wait(None).map_err(|_| UNKNOWN)?),
            }
        }
    }

    fn card(&self, device: Device) -> Result<&Card, Return> {
        let card = match device as usize {
            place @ INSTANCES.. => self.instances.get(place - INSTANCES),
            place => self.cards.get(place.wrapping_sub(1)),
        };
        let card = card.ok_or(INVALID_ARGUMENT)?;
        if card.lost { Err(GPU_IS_LOST) } else { Ok(card) }
    }

    fn processes<'a>(&'a self, card: &'a Card) -> impl Iterator<Item = &'a Process> {
        self.processes.iter().filter(|process| process.card == card.uuid)
    }
}

fn done(result: Result<(), Return>) -> Return {
    result.err().unwrap_or(SUCCESS)
}

/// Writes what a function answers.
///
/// # Safety
/// `to` is null or where a value of this type can be written.
unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Return> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a text, with the NUL that ends it.
///
/// # Safety
/// `to` is null or where `length` bytes can be written.
unsafe fn give_text(to: *mut c_char, length: c_uint, text: &str) -> Result<(), Return> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if text.len() >= length as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: the caller's promise, and there is room.
    unsafe {
        to.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// A function of one value of a card.
macro_rules! of_card {
    ($($name:ident($type:ty): |$state:ident, $card:ident| $value:expr;)*) => {$(
        /// # Safety
        /// As NVIDIA documents it.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(device: Device, to: *mut $type) -> Return {
            let value = State::of(stringify!($name)).and_then(|$state| {
                let $card = $state.card(device)?;
                let value: Result<$type, Return> = $value;
                value
            });
            // SAFETY: the caller's promise.
            done(value.and_then(|value| unsafe { give(to, value) }))
        }
    )*};
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> Return {
    match path() {
        Some(path) if path.exists() => done(State::of("nvmlInit_v2").map(drop)),
        _ => DRIVER_NOT_LOADED,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> Return {
    SUCCESS
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, length: c_uint) -> Return {
    let state = State::of("nvmlSystemGetDriverVersion");
    // SAFETY: the caller's promise.
    done(state.and_then(|_| unsafe { give_text(to, length, "615.00-fake") }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(to: *mut c_uint) -> Return {
    let state = State::of("nvmlDeviceGetCount_v2");
    // SAFETY: the caller's promise.
    done(state.and_then(|state| unsafe { give(to, state.cards.len() as c_uint) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, to: *mut Device) -> Return {
    let device = State::of("nvmlDeviceGetHandleByIndex_v2").and_then(|state| {
        let device = (index as usize).wrapping_add(1) as Device;
        state.card(device).map(|_| device)
    });
    // SAFETY: the caller's promise.
    done(device.and_then(|device| unsafe { give(to, device) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: *mut Device) -> Return {
    if uuid.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's promise: a text that ends with a NUL.
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_string_lossy();
    let device = State::of("nvmlDeviceGetHandleByUUID").and_then(|state| {
        let of = |cards: &[Card]| cards.iter().position(|card| card.uuid == uuid);
        let place = of(&state.cards).map(|place| place + 1);
        let place = place.or_else(|| of(&state.instances).map(|place| place + INSTANCES)).ok_or(NOT_FOUND)?;
        let device = place as Device;
        state.card(device).map(|_| device)
    });
    // SAFETY: the caller's promise.
    done(device.and_then(|device| unsafe { give(to, device) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: Device, to: *mut c_char, length: c_uint) -> Return {
    let name =
        State::of("nvmlDeviceGetName").and_then(|state| state.card(device).map(|card| card.name.clone()));
    // SAFETY: the caller's promise.
    done(name.and_then(|name| unsafe { give_text(to, length, &name) }))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: Device, to: *mut c_char, length: c_uint) -> Return {
    let uuid =
        State::of("nvmlDeviceGetUUID").and_then(|state| state.card(device).map(|card| card.uuid.clone()));
    // SAFETY: the caller's promise.
    done(uuid.and_then(|uuid| unsafe { give_text(to, length, &uuid) }))
}

/// `nvmlMemory_v2_t`
#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlPciInfo_t`
#[repr(C)]
pub struct PciInfo {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    id: c_uint,
    subsystem: c_uint,
    bus_id: [c_char; 32],
}

/// `nvmlUtilization_t`
#[repr(C)]
pub struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

of_card! {
    nvmlDeviceGetMinorNumber(c_uint): |state, card| {
        if card.instance.is_some() { Err(NOT_SUPPORTED) } else { Ok(card.minor) }
    };
    nvmlDeviceGetPowerManagementLimit(c_uint): |state, card| {
        let most = card.power.ok_or(NOT_SUPPORTED)?;
        Ok(last(POWER, &card.uuid).and_then(|limit| limit.parse().ok()).unwrap_or(most))
    };
    nvmlDeviceGetPciInfo_v3(PciInfo): |state, card| {
        let mut bus_id = [0; 32];
        for (to, letter) in bus_id.iter_mut().zip(format!("00000000:{:02X}:00.0", card.minor + 1).bytes()) {
            *to = letter as c_char;
        }
        Ok(PciInfo { legacy: [0; 16], domain: 0, bus: card.minor + 1, device: 0, id: 0, subsystem: 0, bus_id })
    };
    nvmlDeviceGetMemoryInfo_v2(Memory): |state, card| {
        let used = state.processes(card).map(|process| process.memory).sum::<u64>();
        let free = card.memory.saturating_sub(used);
        Ok(Memory { version: size_of::<Memory>() as c_uint | 2 << 24, total: card.memory, reserved: 0, free, used })
    };
    nvmlDeviceGetUtilizationRates(Utilization): |state, card| {
        card.busy.map(|gpu| Utilization { gpu, memory: 0 }).ok_or(NOT_SUPPORTED)
    };
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(device: Device, sensor: c_uint, to: *mut c_uint) -> Return {
    let value = State::of("nvmlDeviceGetTemperature").and_then(|state| {
        let card = state.card(device)?;
        if sensor == 0 { card.temperature.ok_or(NOT_SUPPORTED) } else { Err(INVALID_ARGUMENT) }
    });
    // SAFETY: the caller's promise.
    done(value.and_then(|value| unsafe { give(to, value) }))
}

/// `nvmlProcessInfo_t`
#[repr(C)]
pub struct ProcessInfo {
    pid: c_uint,
    used: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: Device,
    count: *mut c_uint,
    to: *mut ProcessInfo,
) -> Return {
    if count.is_null() {
        return INVALID_ARGUMENT;
    }
    let listed = State::of("nvmlDeviceGetComputeRunningProcesses_v3").and_then(|state| {
        let card = state.card(device)?;
        Ok(state.processes(card).map(|process| (process.pid, process.memory)).collect::<Vec<_>>())
    });
    let listed = match listed {
        Ok(listed) => listed,
        Err(answer) => return answer,
    };
    // SAFETY: the caller's promise: there is room for as many as are said to be.
    unsafe {
        let room = count.read() as usize;
        count.write(listed.len() as c_uint);
        if listed.len() > room || (to.is_null() && !listed.is_empty()) {
            return INSUFFICIENT_SIZE;
        }
        for (place, (pid, used)) in listed.into_iter().enumerate() {
            let info = ProcessInfo { pid, used, gpu_instance: NO_INSTANCE, compute_instance: NO_INSTANCE };
            to.add(place).write(info);
        }
    }
    SUCCESS
}

/// What `nvmlDeviceSetMemoryLimits_v1` takes.
#[repr(C)]
pub struct SetMemoryLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
}

/// What `nvmlDeviceGetMemoryLimits_v1` takes and fills.
#[repr(C)]
pub struct GetMemoryLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
    used: c_ulonglong,
}

/// What was set is in files beside the state: a line each, of which the last of each kind holds.
const LIMITS: &str = ".limits";
const POWER: &str = ".power";

fn beside(suffix: &str) -> Option<PathBuf> {
    let mut name = path()?.into_os_string();
    name.push(suffix);
    Some(name.into())
}

fn note(suffix: &str, line: &str) -> Result<(), Return> {
    let path = beside(suffix).ok_or(UNKNOWN)?;
    let mut text = fs::read_to_string(&path).unwrap_or_default();
    text += line;
    text.push('\n');
    fs::write(&path, text).map_err(|_| UNKNOWN)
}

/// What stands behind these words in the last line that begins with them.
fn last(suffix: &str, words: &str) -> Option<String> {
    let text = fs::read_to_string(beside(suffix)?).ok()?;
    let of = |line: &str| Some(line.strip_prefix(words)?.strip_prefix(' ')?.to_owned());
    text.lines().rev().find_map(of)
}

/// The limits that were set, by card and cgroup. Those of a cgroup that is gone went with it.
fn limits(card: &Card, cgroup: &str) -> (u64, u64) {
    let found = last(LIMITS, &format!("{} {cgroup}", card.uuid)).and_then(|found| {
        let (soft, hard) = found.split_once(' ')?;
        Some((soft.parse().ok()?, hard.parse().ok()?))
    });
    found.unwrap_or((0, NO_LIMIT))
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceSetPowerManagementLimit(device: Device, limit: c_uint) -> Return {
    let set = || {
        let state = State::of("nvmlDeviceSetPowerManagementLimit")?;
        let card = state.card(device)?;
        let most = card.power.ok_or(NOT_SUPPORTED)?;
        if !(most / 4..=most).contains(&limit) {
            return Err(INVALID_ARGUMENT);
        }
        note(POWER, &format!("{} {limit}", card.uuid))
    };
    done(set())
}

/// The name of a cgroup, which must be there.
///
/// # Safety
/// `name` is null or a text that ends with a NUL.
unsafe fn cgroup(name: *const c_char) -> Result<String, Return> {
    if name.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| INVALID_ARGUMENT)?;
    if Path::new(name).join("cgroup.procs").exists() { Ok(name.to_owned()) } else { Err(NOT_FOUND) }
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceSetMemoryLimits_v1(
    device: Device,
    wanted: *mut SetMemoryLimits,
) -> Return {
    let set = || {
        let state = State::of("nvmlDeviceSetMemoryLimits_v1")?;
        let card = state.card(device)?;
        // "MIG handles are not supported."
        if card.instance.is_some() {
            return Err(NOT_SUPPORTED);
        }
        if wanted.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: the caller's promise.
        let SetMemoryLimits { name_space, soft, hard } = unsafe { wanted.read() };
        // SAFETY: the caller's promise.
        let cgroup = unsafe { cgroup(name_space) }?;
        if soft > hard {
            return Err(INVALID_ARGUMENT);
        }
        note(LIMITS, &format!("{} {cgroup} {soft} {hard}", card.uuid))
    };
    done(set())
}

/// # Safety
/// As NVIDIA documents it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryLimits_v1(device: Device, to: *mut GetMemoryLimits) -> Return {
    let get = || {
        let state = State::of("nvmlDeviceGetMemoryLimits_v1")?;
        let card = state.card(device)?;
        if card.instance.is_some() {
            return Err(NOT_SUPPORTED);
        }
        if to.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: the caller's promise.
        let name_space = unsafe { (*to).name_space };
        // SAFETY: the caller's promise.
        let cgroup = unsafe { cgroup(name_space) }?;
        let (soft, hard) = limits(card, &cgroup);
        let members = fs::read_to_string(Path::new(&cgroup).join("cgroup.procs")).map_err(|_| NOT_FOUND)?;
        let members: HashSet<u32> = members.lines().filter_map(|pid| pid.parse().ok()).collect();
        let is_in = |process: &&Process| members.contains(&process.pid);
        let used = state.processes(card).filter(is_in).map(|process| process.memory).sum();
        // SAFETY: the caller's promise.
        unsafe { give(to, GetMemoryLimits { name_space, soft, hard, used }) }
    };
    done(get())
}
