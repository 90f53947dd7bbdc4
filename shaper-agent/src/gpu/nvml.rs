//! NVML, by `nvml-wrapper`: what it says of every card, and what it does to one. What the wrapper does not have are the limits of
//! memory by cgroup (`nvmlDeviceSetMemoryLimits_v1`, driver r615): they are called by their symbols.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, btree_map::Entry},
    ffi::{CString, c_char, c_uint, c_ulonglong, c_void},
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::event::EventTypes,
    enum_wrappers::device::TemperatureSensor,
    enums::{device::UsedGpuMemory, event::XidError},
    error::{NvmlError, nvml_try},
};
use shaper_core::{
    gpu::CharDevice,
    limits::Limit,
    units::{Bytes, Milliwatts},
};

use super::{
    CardError, CardReading, CgroupUse, Figures, Library, LibraryState, MemoryLimit, Xid, caps_major,
    nvidia_major, reader::Asked,
};

/// The library that is there wherever NVIDIA's driver is.
const NAME: &str = "libnvidia-ml.so.1";

/// What `nvmlDeviceSetMemoryLimits_v1` takes.
#[repr(C)]
struct SetMemoryLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
}

/// What `nvmlDeviceGetMemoryLimits_v1` takes and fills.
#[repr(C)]
struct GetMemoryLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
    used: c_ulonglong,
}

/// No limit, as these have it; none is guaranteed then.
const NO_LIMIT: c_ulonglong = c_ulonglong::MAX;

/// How long the driver is waited for that has no error to tell of, ms: so long the thread outlives the library, and still tells
/// of an error that came with its failing. The next is loaded later (`reader::RETRY`), so two never listen.
const LISTEN_MS: u32 = 10_000;
/// After so many readings it is asked anew who has memory, whatever has changed.
const FULL_EVERY: u32 = 10;
/// So many errors are kept until the node takes them.
const ERRORS_KEPT: usize = 256;

/// The library, loaded and initialised.
pub(super) struct Loaded {
    nvml: Arc<Nvml>,
    /// A cgroup that is there.
    own_cgroup: PathBuf,
    is_over: Arc<AtomicBool>,
    /// What is known of the cards by their places: a card that is lost does not say any more who it is.
    known: BTreeMap<u32, Identity>,
    /// Whether a card is cut into parts, as of the last full reading.
    cut: BTreeMap<u32, bool>,
    /// Where the processes are that use cards.
    cgroups: Cgroups,
    /// Of each card: the memory that was in use when it was last asked who has it, and the answer.
    uses: BTreeMap<u32, (Bytes, Vec<CgroupUse>)>,
    readings: u32,
    /// Whether the memory of cards can be limited, and after how many readings that is asked again.
    limits: BTreeMap<u32, (Result<(), String>, u32)>,
    /// Where the kernel shows what NVIDIA's driver has: `/proc/driver`.
    proc_driver: PathBuf,
}

#[derive(Clone)]
struct Identity {
    id: String,
    model: String,
    device: Option<CharDevice>,
    /// Its PCI address.
    pci: Option<String>,
    /// It is a part of a card (MIG).
    is_part: bool,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
    }
}

impl Loaded {
    /// Loads it, or says why not.
    pub(super) fn load(asked: &Asked) -> Result<Loaded, LibraryState> {
        let Asked { library, own_cgroup, proc_driver } = asked;
        let path = match library {
            Library::At(path) => path.as_os_str(),
            Library::Auto | Library::Off => NAME.as_ref(),
        };
        match Nvml::builder().lib_path(path).init() {
            Ok(nvml) => Ok(Loaded {
                nvml: Arc::new(nvml),
                own_cgroup: own_cgroup.clone(),
                proc_driver: proc_driver.clone(),
                is_over: Arc::default(),
                known: BTreeMap::new(),
                cut: BTreeMap::new(),
                cgroups: Cgroups::default(),
                limits: BTreeMap::new(),
                uses: BTreeMap::new(),
                readings: 0,
            }),
            Err(NvmlError::LibloadingError(error)) if *library == Library::Auto => {
                Err(LibraryState::Absent { evidence: error.to_string() })
            }
            Err(error) => Err(LibraryState::Failing { reason: error.to_string() }),
        }
    }

    pub(super) fn state(&self) -> LibraryState {
        let driver = self.nvml.sys_driver_version().unwrap_or_else(|_| "of an unknown version".into());
        LibraryState::Ready { driver }
    }

    /// What it says of all cards; of those that it does not know, why.
    pub(super) fn read(&mut self) -> Result<(Vec<CardReading>, Vec<String>), NvmlError> {
        let (mut cards, mut unknown) = (Vec::new(), Vec::new());
        let is_full = self.readings.is_multiple_of(FULL_EVERY);
        self.readings = self.readings.wrapping_add(1);
        if is_full {
            self.cgroups.begin();
        }
        let nvml = Arc::clone(&self.nvml);
        for place in 0..nvml.device_count()? {
            let asked = nvml.device_by_index(place);
            // A card that is cut into parts cannot be used as a whole.
            if let Ok(card) = &asked
                && self.is_cut(place, card, is_full)
            {
                self.read_parts(card, &mut cards, &mut unknown);
                continue;
            }
            if let Entry::Vacant(vacant) = self.known.entry(place) {
                match asked.as_ref().map_err(ToString::to_string).and_then(identity) {
                    Ok(identity) => {
                        vacant.insert(identity);
                    }
                    Err(error) => unknown.push(format!("card {place} of NVML: {error}")),
                }
            }
            let Some(identity) = self.known.get(&place).cloned() else { continue };
            let figures = asked.and_then(|card| {
                let memory_limits = self.limits_memory(place, &card);
                let mut figures = figures(&card)?;
                // While the memory in use is the same, so is who has it; where one gave what another took, that is seen
                // with the next full reading.
                let before =
                    self.uses.get(&place).filter(|(used, _)| !is_full && *used == figures.memory_used);
                figures.uses = match before {
                    Some((_, uses)) => uses.clone(),
                    None => uses(&card, &mut self.cgroups)?,
                };
                self.uses.insert(place, (figures.memory_used, figures.uses.clone()));
                Ok(Figures { memory_limits, ..figures })
            });
            cards.push(identity.reading(figures));
        }
        Ok((cards, unknown))
    }

    /// Whether a card is cut into parts. That changes only while nobody uses it: full readings ask. Where that fails, it is as
    /// it was.
    fn is_cut(&mut self, place: u32, card: &Device<'_>, is_full: bool) -> bool {
        let before = self.cut.get(&place).copied();
        if let Some(is_cut) = before.filter(|_| !is_full) {
            return is_cut;
        }
        match if_supported(card.mig_mode()) {
            Ok(mode) => {
                let is_cut = mode.is_some_and(|mode| mode.current == 1);
                self.cut.insert(place, is_cut);
                is_cut
            }
            Err(_) => before.unwrap_or(false),
        }
    }

    /// What it says of the parts of a card.
    fn read_parts(&mut self, card: &Device<'_>, cards: &mut Vec<CardReading>, unknown: &mut Vec<String>) {
        for place in 0..card.mig_device_count().unwrap_or(0) {
            // Places that are empty are not there.
            let Ok(part) = card.mig_device_by_index(place) else { continue };
            match self.part(card, &part) {
                Ok(identity) => {
                    let without = Err("the hardware has cut it: there is no more of it".to_owned());
                    let figures = figures(&part).and_then(|figures| {
                        let uses = uses(&part, &mut self.cgroups)?;
                        Ok(Figures { memory_limits: without, uses, ..figures })
                    });
                    cards.push(identity.reading(figures));
                }
                Err(error) => unknown.push(format!("part {place} of a card: {error}")),
            }
        }
    }

    /// A part of a card. Who uses it opens the device of its compute instance, besides those that all parts have in common.
    fn part(&self, card: &Device<'_>, part: &Device<'_>) -> Result<Identity, String> {
        let lib = self.nvml.lib();
        let number = |function: Result<_, String>| -> Result<u32, String> {
            let function: unsafe extern "C" fn(_, *mut u32) -> u32 = function?;
            let mut number = 0;
            // SAFETY: the device is one of this library's, and there is room for the number.
            nvml_try(unsafe { function(part.handle(), &mut number) }).map_err(|error| error.to_string())?;
            Ok(number)
        };
        let unknown = |error: &_| format!("{error}");
        let gpu = number(lib.nvmlDeviceGetGpuInstanceId.as_ref().copied().map_err(unknown))?;
        let compute = number(lib.nvmlDeviceGetComputeInstanceId.as_ref().copied().map_err(unknown))?;
        let minor = card.minor_number().map_err(|error| error.to_string())?;
        let minors = self.proc_driver.join("nvidia-caps/mig-minors");
        let minors = fs::read_to_string(&minors)
            .map_err(|error| format!("cannot read {}: {error}", minors.display()))?;
        let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
        let wanted = format!("gpu{minor}/gi{gpu}/ci{compute}/access");
        let device =
            capability(&minors, &wanted).map(|minor| CharDevice { major: caps_major(&devices), minor });
        let device = device.ok_or_else(|| format!("the kernel has no capability {wanted}"))?;
        Ok(Identity {
            id: part.uuid().map_err(|error| error.to_string())?,
            model: part.name().map_err(|error| error.to_string())?,
            device: Some(device),
            pci: None,
            is_part: true,
        })
    }

    /// Does something with a card, by its id.
    pub(super) fn with<T>(
        &self,
        number: u32,
        id: &str,
        call: impl FnOnce(&Loaded, &mut Device<'_>) -> Result<T, NvmlError>,
    ) -> Result<T, CardError> {
        let done = self.nvml.device_by_uuid(id).and_then(|mut card| call(self, &mut card));
        done.map_err(|error| {
            let why = error.to_string();
            match error {
                NvmlError::GpuLost | NvmlError::NotFound => CardError::Gone { card: number, why },
                NvmlError::NotSupported
                | NvmlError::NoPermission
                | NvmlError::FunctionNotFound
                | NvmlError::FailedToLoadSymbol(_) => CardError::Unsupported { card: number, why },
                _ => CardError::Refused { card: number, why },
            }
        })
    }

    /// The power that a card may draw.
    pub(super) fn power(&self, card: &Device<'_>) -> Result<Milliwatts, NvmlError> {
        card.power_management_limit().map(|power| Milliwatts(power.into()))
    }

    /// Limits it.
    pub(super) fn set_power(&self, card: &mut Device<'_>, power: Milliwatts) -> Result<(), NvmlError> {
        card.set_power_management_limit(u32::try_from(power.0).map_err(|_| NvmlError::InvalidArg)?)
    }

    /// Whether the driver limits the memory of a card by cgroup. One that does not may let us later, but not from one second to
    /// the next.
    fn limits_memory(&mut self, place: u32, card: &Device<'_>) -> Result<(), String> {
        const ROUNDS: u32 = 5;
        if let Some((known, rounds)) = self.limits.get_mut(&place)
            && (known.is_ok() || *rounds > 0)
        {
            *rounds = rounds.saturating_sub(1);
            return known.clone();
        }
        let asked = self.memory_limit(card, &self.own_cgroup).map(drop).map_err(|error| error.to_string());
        self.limits.insert(place, (asked.clone(), ROUNDS));
        asked
    }

    /// What a cgroup may have of a card's memory.
    pub(super) fn memory_limit(&self, card: &Device<'_>, cgroup: &Path) -> Result<MemoryLimit, NvmlError> {
        type Function = unsafe extern "C" fn(*mut c_void, *mut GetMemoryLimits) -> c_uint;
        let name_space = CString::new(cgroup.as_os_str().as_bytes()).map_err(|_| NvmlError::InvalidArg)?;
        let mut found = GetMemoryLimits { name_space: name_space.as_ptr(), soft: 0, hard: NO_LIMIT, used: 0 };
        // SAFETY: this is how NVIDIA declares the function of that name; what it is given outlives the call.
        unsafe {
            let get = self.nvml.lib().__library.get::<Function>(b"nvmlDeviceGetMemoryLimits_v1\0");
            let get = get.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
            nvml_try(get(card.handle().cast(), &mut found))?;
        }
        let limit = if found.hard == NO_LIMIT { Limit::Unlimited } else { Limit::At(Bytes(found.hard)) };
        Ok(MemoryLimit { guaranteed: Bytes(found.soft), limit })
    }

    /// Limits it.
    pub(super) fn set_memory_limit(
        &self,
        card: &Device<'_>,
        cgroup: &Path,
        MemoryLimit { guaranteed, limit }: MemoryLimit,
    ) -> Result<(), NvmlError> {
        type Function = unsafe extern "C" fn(*mut c_void, *mut SetMemoryLimits) -> c_uint;
        let name_space = CString::new(cgroup.as_os_str().as_bytes()).map_err(|_| NvmlError::InvalidArg)?;
        let hard = limit.at().map_or(NO_LIMIT, |limit| limit.0);
        let mut wanted = SetMemoryLimits { name_space: name_space.as_ptr(), soft: guaranteed.0, hard };
        // SAFETY: as above.
        unsafe {
            let set = self.nvml.lib().__library.get::<Function>(b"nvmlDeviceSetMemoryLimits_v1\0");
            let set = set.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
            nvml_try(set(card.handle().cast(), &mut wanted))
        }
    }

    /// Begins to tell of errors, of the cards that there are now and that can tell, on a thread of its own.
    pub(super) fn listen(&self, tell: impl Fn(Xid) + Send + 'static) -> io::Result<()> {
        let (nvml, is_over) = (Arc::clone(&self.nvml), Arc::clone(&self.is_over));
        let listen = move || {
            if let Err(error) = listen(&nvml, &is_over, tell) {
                tracing::info!(%error, "the driver does not tell of errors of GPU cards");
            }
        };
        thread::Builder::new().name("gpu-errors".into()).spawn(listen).map(drop)
    }
}

fn listen(nvml: &Nvml, is_over: &AtomicBool, tell: impl Fn(Xid)) -> Result<(), NvmlError> {
    let mut set = nvml.create_event_set()?;
    let mut any = false;
    for place in 0..nvml.device_count()? {
        let Ok(card) = nvml.device_by_index(place) else { continue };
        if card.supported_event_types().is_ok_and(|types| types.contains(EventTypes::CRITICAL_XID_ERROR)) {
            set = card.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error)?;
            any = true;
        }
    }
    while any && !is_over.load(Ordering::Acquire) {
        match set.wait(LISTEN_MS) {
            Ok(event) => {
                let code = match event.event_data {
                    Some(XidError::Value(code)) => Some(code),
                    Some(XidError::Unknown) | None => None,
                };
                // A card that is lost says no more who it is, but of that the readings tell.
                if let Ok(id) = event.device.uuid() {
                    tell(Xid { card: id, code });
                }
            }
            Err(NvmlError::Timeout | NvmlError::GpuLost) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Keeps an error, and of too many the latest.
pub(super) fn note(errors: &Mutex<VecDeque<Xid>>, xid: Xid) {
    let mut errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
    if errors.len() == ERRORS_KEPT {
        errors.pop_front();
    }
    errors.push_back(xid);
}

fn identity(card: &Device<'_>) -> Result<Identity, String> {
    let id = card.uuid().map_err(|error| error.to_string())?;
    let model = card.name().map_err(|error| error.to_string())?;
    let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
    let device = card.minor_number().ok().map(|minor| CharDevice { major: nvidia_major(&devices), minor });
    // NVML's domains have eight digits, those of sysfs and of regions four.
    let pci = card.pci_info().ok().map(|pci| pci.bus_id.to_ascii_lowercase());
    let pci =
        pci.map(|pci| pci.strip_prefix("0000").filter(|pci| pci.len() == 12).unwrap_or(&pci).to_owned());
    Ok(Identity { id, model, device, pci, is_part: false })
}

impl Identity {
    fn reading(self, figures: Result<Figures, NvmlError>) -> CardReading {
        let Identity { id, model, device, pci, is_part } = self;
        CardReading { id, model, device, pci, is_part, figures: figures.map_err(|error| error.to_string()) }
    }
}

/// The minor number of a capability, in what `nvidia-caps/mig-minors` lists: `gpu0/gi1/ci0/access 4`.
fn capability(minors: &str, wanted: &str) -> Option<u32> {
    minors.lines().find_map(|line| line.strip_prefix(wanted)?.trim().parse().ok())
}

fn figures(card: &Device<'_>) -> Result<Figures, NvmlError> {
    let memory = card.memory_info()?;
    Ok(Figures {
        memory: Bytes(memory.total),
        memory_used: Bytes(memory.used),
        busy_percent: if_supported(card.utilization_rates())?.map(|rates| rates.gpu),
        temperature_celsius: if_supported(card.temperature(TemperatureSensor::Gpu))?,
        memory_limits: Ok(()),
        uses: Vec::new(),
    })
}

/// Who has memory of a card.
fn uses(card: &Device<'_>, cgroups: &mut Cgroups) -> Result<Vec<CgroupUse>, NvmlError> {
    let memory_of = |memory| match memory {
        UsedGpuMemory::Used(bytes) => Bytes(bytes),
        UsedGpuMemory::Unavailable => Bytes(0),
    };
    let processes = card.running_compute_processes()?.into_iter();
    Ok(cgroups.sum(processes.map(|process| (process.pid, memory_of(process.used_gpu_memory)))))
}

/// Not every card says everything.
fn if_supported<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(
            NvmlError::NotSupported
            | NvmlError::NoPermission
            | NvmlError::FunctionNotFound
            | NvmlError::FailedToLoadSymbol(_),
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The cgroups of processes. To read all each second would cost more than all else; of those that are known a part is.
#[derive(Default)]
struct Cgroups {
    round: u32,
    known: HashMap<u32, Known>,
    /// Those that any process is or was in, and their places here. A few: they are forgotten when there are too many.
    places: HashMap<String, usize>,
    paths: Vec<Arc<Path>>,
}

#[derive(Clone, Copy)]
struct Known {
    place: Option<usize>,
    /// Of when it was asked for last.
    round: u32,
}

impl Cgroups {
    /// A process is read anew after so many full readings.
    const ROUNDS: u32 = 4;
    const PATHS_MAX: usize = 4096;

    /// Another full reading: processes that were not in the last are forgotten, for another may have their number.
    fn begin(&mut self) {
        if self.paths.len() > Self::PATHS_MAX {
            *self = Cgroups { round: self.round, ..Cgroups::default() };
        }
        let last = self.round;
        self.known.retain(|_, known| known.round == last);
        self.round = self.round.wrapping_add(1);
    }

    fn place_of(&mut self, pid: u32) -> Option<usize> {
        let round = self.round;
        let is_due = pid.wrapping_add(round).is_multiple_of(Self::ROUNDS);
        if let Some(known) = self.known.get_mut(&pid)
            && (!is_due || known.round == round)
        {
            known.round = round;
            return known.place;
        }
        let place = cgroup_of(pid).map(|path| {
            *self.places.entry(path).or_insert_with_key(|path| {
                self.paths.push(Path::new(path).into());
                self.paths.len() - 1
            })
        });
        self.known.insert(pid, Known { place, round });
        place
    }

    /// What each cgroup has, of what its processes have.
    fn sum(&mut self, processes: impl Iterator<Item = (u32, Bytes)>) -> Vec<CgroupUse> {
        let mut sums = BTreeMap::<usize, (Bytes, u32)>::new();
        for (pid, Bytes(memory)) in processes {
            let Some(place) = self.place_of(pid) else { continue };
            let (sum, count) = sums.entry(place).or_default();
            *sum = Bytes(sum.0.saturating_add(memory));
            *count += 1;
        }
        let of = |(place, (memory, processes))| {
            Some(CgroupUse { cgroup: Arc::clone(self.paths.get::<usize>(place)?), memory, processes })
        };
        sums.into_iter().filter_map(of).collect()
    }
}

/// The cgroup of v2 that a process is in.
fn cgroup_of(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    Some(text.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_a_device_of_its_own() {
        let minors =
            "config 1\nmonitor 2\ngpu0/gi1/access 12\ngpu0/gi1/ci0/access 13\ngpu0/gi11/ci0/access 103\n";
        assert_eq!(capability(minors, "gpu0/gi1/ci0/access"), Some(13));
        assert_eq!(capability(minors, "gpu0/gi11/ci0/access"), Some(103));
        assert_eq!(capability(minors, "gpu1/gi1/ci0/access"), None);
    }
}
