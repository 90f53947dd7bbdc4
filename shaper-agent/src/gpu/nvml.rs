//! NVML, by `nvml-wrapper`: what it says of every card.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::PathBuf,
};

use nvml_wrapper::{
    Device, Nvml, enum_wrappers::device::TemperatureSensor, enums::device::UsedGpuMemory, error::NvmlError,
};
use shaper_core::{gpu::CharDevice, units::Bytes};

use super::{CardReading, Figures, Library, LibraryState, ProcessUse, nvidia_major};

/// The library that is there wherever NVIDIA's driver is.
const NAME: &str = "libnvidia-ml.so.1";

/// The library, loaded and initialised.
pub(super) struct Loaded {
    nvml: Nvml,
    /// What is known of the cards by their places: a card that is lost does not say any more who it is.
    known: BTreeMap<u32, Identity>,
}

#[derive(Clone)]
struct Identity {
    id: String,
    model: String,
    device: Option<CharDevice>,
}

impl Loaded {
    /// Loads it, or says why not.
    pub(super) fn load(library: &Library) -> Result<Loaded, LibraryState> {
        let path = match library {
            Library::At(path) => path.as_os_str(),
            Library::Auto | Library::Off => NAME.as_ref(),
        };
        match Nvml::builder().lib_path(path).init() {
            Ok(nvml) => Ok(Loaded { nvml, known: BTreeMap::new() }),
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
        for place in 0..self.nvml.device_count()? {
            let asked = self.nvml.device_by_index(place);
            if let Entry::Vacant(vacant) = self.known.entry(place) {
                match asked.as_ref().map_err(ToString::to_string).and_then(identity) {
                    Ok(identity) => {
                        vacant.insert(identity);
                    }
                    Err(error) => unknown.push(format!("card {place} of NVML: {error}")),
                }
            }
            let Some(Identity { id, model, device }) = self.known.get(&place).cloned() else { continue };
            let figures = asked.and_then(|card| figures(&card)).map_err(|error| error.to_string());
            cards.push(CardReading { id, model, device, figures });
        }
        Ok((cards, unknown))
    }
}

fn identity(card: &Device<'_>) -> Result<Identity, String> {
    let id = card.uuid().map_err(|error| error.to_string())?;
    let model = card.name().map_err(|error| error.to_string())?;
    let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
    let device = card.minor_number().ok().map(|minor| CharDevice { major: nvidia_major(&devices), minor });
    Ok(Identity { id, model, device })
}

fn figures(card: &Device<'_>) -> Result<Figures, NvmlError> {
    let memory = card.memory_info()?;
    let processes = card.running_compute_processes()?.into_iter().map(|process| ProcessUse {
        pid: process.pid,
        memory: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
            UsedGpuMemory::Unavailable => None,
        },
        cgroup: cgroup_of(process.pid),
    });
    Ok(Figures {
        memory: Bytes(memory.total),
        memory_used: Bytes(memory.used),
        busy_percent: if_supported(card.utilization_rates())?.map(|rates| rates.gpu),
        temperature_celsius: if_supported(card.temperature(TemperatureSensor::Gpu))?,
        processes: processes.collect(),
    })
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

/// The cgroup of v2 that a process is in.
fn cgroup_of(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.into())
}
