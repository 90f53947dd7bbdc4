//! The kernel programs from the agent's side: loading, pinning, adopting what an earlier agent left,
//! and the one translation between units and the structs of the maps.

mod admission;
mod attach;
mod counters;
mod messages;
mod queue;
mod selftest;
mod table;

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    mem::offset_of,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::SeqCst},
};

use aya::{
    Btf as AyaBtf, Ebpf, EbpfLoader, Pod,
    maps::{HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, RingBuf},
    programs::{
        BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter, ProgramError, SchedClassifier,
        SockOps, links::LinkError,
    },
};
use shaper_common::{
    abi::{
        self, Activity, Budget, CgroupSlot, Control, CpuStat, CpuState, Event, IoKey, IoStat, NetStat, PAIRS,
        Pace, PacketCount, REMEMBERED, SLOTS_MAX,
    },
    hist::Histogram,
    pool::Terms,
};
use shaper_core::units::BitsPerSec;

use crate::{launch::chain, opener::Opener};

use super::{
    btf::{Btf, BtfError, IO_EXTRAS, IO_OFFSETS, OFFSETS, QUOTA_OFFSETS},
    ingress::{IngressError, Queue},
    mapped::{Mapped, monotonic_ns},
    netns,
    pace_table::PaceTable,
    qdisc::{self, UplinkError, UplinkForm},
    sys,
};
pub use admission::Refused;
use admission::{AdmissionTable, DEVICES, admit_devices};
use attach::{
    attach_beside, failed, layout_directory, links_directory, prepare_directories, program, remove_pins,
};
pub(super) use attach::{pin_link, replace};
pub use counters::{Counters, Histograms, QuotaWatch};

/// What went wrong with the kernel programs.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The object file.
    #[error(
        "cannot read the kernel programs from {path}; build them with `cargo xtask build-ebpf`, or say --bpf-object"
    )]
    Object {
        /// Where it was looked for.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel's BTF.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The kernel's BTF, as aya reads it.
    #[error("cannot read the kernel's BTF")]
    AyaBtf(#[from] aya::BtfError),
    /// bpffs.
    #[error("{0} is not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NoBpfFs(PathBuf),
    /// The maps or the object.
    #[error("cannot load the kernel programs")]
    Load(#[from] aya::EbpfError),
    /// One program: the verifier, or the attachment.
    #[error("cannot {verb} the kernel program {program}")]
    Program {
        /// What was tried.
        verb: &'static str,
        /// The program.
        program: &'static str,
        /// What went wrong.
        source: ProgramError,
    },
    /// A link.
    #[error("cannot {verb} the link of {program}")]
    Link {
        /// What was tried.
        verb: &'static str,
        /// Its program.
        program: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// A link, as aya reports it.
    #[error("cannot take the link of {program}")]
    AyaLink {
        /// Its program.
        program: &'static str,
        /// What went wrong.
        source: LinkError,
    },
    /// A map.
    #[error("cannot use the map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What went wrong.
        source: MapError,
    },
    /// A map, as a whole.
    #[error("cannot read the entries of the map {map}")]
    Entries {
        /// Its name.
        map: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The object lacks something: it belongs to another version.
    #[error("the kernel programs in {path} have no {name}: agent and object are of different versions")]
    Foreign {
        /// The object.
        path: PathBuf,
        /// What was not found.
        name: &'static str,
    },
    /// A file or directory of ours.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The path.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A walk of the TCP sockets.
    #[error("cannot walk the TCP sockets")]
    Walk(#[source] io::Error),
    /// An uplink.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// The queue of what arrives.
    #[error(transparent)]
    Ingress(#[from] IngressError),
}

/// A struct of `shaper_common::abi` as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct Abi<T>(T);

// SAFETY: all are repr(C), made of integers, without padding (asserted beside their definition).
unsafe impl Pod for Abi<CgroupSlot> {}
// SAFETY: as above.
unsafe impl Pod for Abi<IoKey> {}
// SAFETY: as above.
unsafe impl Pod for Abi<IoStat> {}

/// Where the programs are attached and pinned.
#[derive(Clone, Debug)]
pub struct BpfConfig {
    /// The object file.
    pub object: PathBuf,
    /// Directory of this agent below a bpffs; the pins are below `v<layout>` in it.
    pub directory: PathBuf,
    /// Mount point of cgroup v2: the cgroup programs are attached there, once, so that a cgroup
    /// can be adopted wherever it is (docs/decisions/0002).
    pub cgroup_mount: PathBuf,
    /// Devices whose egress is counted.
    pub uplinks: Vec<String>,
    /// Slots wanted; programs that are pinned already keep theirs.
    pub slots: u32,
    /// Where what must be undone later is noted.
    pub state_dir: PathBuf,
    /// Whether the programs' debug messages are wanted.
    pub debug: bool,
    /// What the tasks can send together, where that is divided among them.
    pub network: Option<BitsPerSec>,
    /// What opens for us what we may not.
    pub opener: Opener,
}

/// The loaded, attached and pinned programs.
pub struct Bpf {
    config: BpfConfig,
    slots: u32,
    cpus: usize,
    // Holds the programs; the maps below are taken out of it.
    ebpf: Ebpf,
    cgroup_slot: HashMap<MapData, u64, Abi<CgroupSlot>>,
    v1_slot: HashMap<MapData, u64, Abi<CgroupSlot>>,
    io_stat: PerCpuHashMap<MapData, Abi<IoKey>, Abi<IoStat>>,
    control: Mapped<Control>,
    activity: Mapped<Activity>,
    cpu_state: Arc<Mapped<CpuState>>,
    cpu_stat: Arc<Mapped<CpuStat>>,
    budget: Arc<Mapped<Budget>>,
    net_stat: Mapped<NetStat>,
    round_trip: Mapped<Histogram>,
    uplink_stat: Mapped<PacketCount>,
    pace: PaceTable,
    /// Sockets are not looked for with each change of a ceiling, but once, after many.
    one_walk: bool,
    /// The class of each slot in the queue of what arrives; 0: none.
    ingress_class: Mapped<u64>,
    queue: Queue,
    admission: AdmissionTable,
    iterator: OwnedFd,
    uplinks: Vec<(String, Result<UplinkForm, String>)>,
    /// Why a program that others do without is not attached.
    without: Vec<(&'static str, String)>,
    /// What the test of the programs found wrong.
    distrusted: Vec<(Measure, String)>,
    /// `sched_stat_runtime` is attached while a slot has a quota to be warned of.
    budget_link: Option<OwnedFd>,
    budgets: BTreeSet<u32>,
}

/// Tracing programs without which nothing is measured …
const TRACING: [&str; 3] = ["sched_switch", "cgroup_mkdir", "cgroup_release"];
/// … and those without which one thing is not.
const OPTIONAL: [&str; 4] = [BLOCK_IO, DROPS, "tcp_retransmit_skb", "cgroup_rmdir"];
const BLOCK_IO: &str = "block_rq_complete";
const DROPS: &str = "kfree_skb";
/// The storages of sockets, of a kind whose definition has no place for a pin.
const SOCKETS: [&str; 2] = ["SOCKET_STATE", "SOCKET_SLOT"];
const BUDGET_PROGRAM: &str = "sched_stat_runtime";
/// Attached while a slot has a limit of what it receives.
const INGRESS_PROGRAM: &str = "uplink_ingress";

/// What the programs measure, as far as it can be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// CPU time.
    Cpu,
    /// Run-queue delay.
    RunQueue,
    /// Block IO.
    Io,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Measure::Cpu => "CPU time",
            Measure::RunQueue => "run-queue delay",
            Measure::Io => "block IO",
        })
    }
}

/// What the size of a map depends on.
enum Size {
    Slots,
    Cpus,
    SlotsAndCpus,
    Pairs,
    Remembered,
}

const SIZES: [(&str, Size); 14] = [
    ("ADMISSION", Size::Slots),
    ("ACTIVITY", Size::Slots),
    ("BUDGET", Size::Slots),
    ("PACE", Size::Slots),
    ("CLOCK", Size::Slots),
    ("SHARE", Size::Slots),
    ("INGRESS_CLASS", Size::Slots),
    ("CPU_STATE", Size::Cpus),
    ("SWITCH_MEMORY", Size::Pairs),
    ("PACKET_MEMORY", Size::Remembered),
    ("CPU_STAT", Size::SlotsAndCpus),
    ("NET_STAT", Size::SlotsAndCpus),
    ("ROUND_TRIP", Size::SlotsAndCpus),
    ("UPLINK_STAT", Size::SlotsAndCpus),
];

impl Bpf {
    /// Whether an earlier agent left pins in `directory`, of whichever layout.
    pub fn is_pinned(directory: &Path) -> bool {
        layout_directory(directory).exists() || !attach::other_layouts(directory).is_empty()
    }

    /// Takes away what an attempt to [`Bpf::establish`] has left.
    pub fn discard(config: &BpfConfig) -> Result<(), BpfError> {
        if Bpf::is_pinned(&config.directory) { remove_pins(config).map(drop) } else { Ok(()) }
    }

    /// Detaches what an agent of another layout left. Its limits are in force here by then.
    pub fn remove_other_layouts(&self) -> Result<(), BpfError> {
        for layout in attach::other_layouts(&self.config.directory) {
            attach::remove_layout(&layout)?;
            tracing::info!(layout = %layout.display(), "programs of another version are detached");
        }
        Ok(())
    }

    /// The slots that the maps pinned in `directory` have, if there are any.
    pub fn pinned_slots(directory: &Path) -> Result<Option<u32>, BpfError> {
        let pin = layout_directory(directory).join("maps/PACE");
        if !pin.exists() {
            return Ok(None);
        }
        let info = MapInfo::from_pin(&pin).map_err(|source| BpfError::Map { map: "PACE", source })?;
        Ok(Some(info.max_entries()))
    }

    /// Loads the programs on the maps that are pinned, or new ones, and puts them behind the links
    /// that are pinned, or new ones: enforcement by an earlier agent goes on without a gap.
    pub fn establish(config: BpfConfig) -> Result<Bpf, BpfError> {
        let object = fs::read(&config.object)
            .map_err(|source| BpfError::Object { path: config.object.clone(), source })?;
        let kernel_btf = Btf::of_kernel()?;
        let aya_btf = AyaBtf::from_sys_fs()?;
        let maps = prepare_directories(&config.directory)?;
        let slots = Bpf::pinned_slots(&config.directory)?.unwrap_or(config.slots).min(SLOTS_MAX);
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, source)| BpfError::Map { map: "CPU_STATE", source: source.into() })?;
        let entries = |size: &Size| match size {
            Size::Slots => slots,
            Size::Cpus => cpus as u32,
            Size::SlotsAndCpus => slots * cpus as u32,
            Size::Pairs => PAIRS * cpus as u32,
            Size::Remembered => REMEMBERED * cpus as u32,
        };
        let size_of =
            |map: &str| SIZES.iter().find(|(name, _)| *name == map).map_or(1, |(_, size)| entries(size));

        let mut without = Vec::new();
        let mut offsets = Vec::new();
        for (global, name, path) in OFFSETS {
            offsets.push((*global, kernel_btf.offset_of(name, path)?));
        }
        let of_quotas: Result<Vec<_>, _> = QUOTA_OFFSETS
            .iter()
            .map(|(global, name, path)| Ok((*global, kernel_btf.offset_of(name, path)?)))
            .collect();
        match of_quotas {
            Ok(found) => offsets.extend(found),
            Err::<_, BtfError>(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "warnings of CPU quotas are not in step with their periods: some come late"
                );
            }
        }
        for (global, name, path) in IO_OFFSETS {
            match kernel_btf.offset_of(name, path) {
                Ok(offset) => offsets.push((*global, offset)),
                Err(error) => without.push((BLOCK_IO, chain(&error))),
            }
        }
        for (global, name, places) in IO_EXTRAS {
            let found = places.iter().find_map(|path| kernel_btf.offset_of(name, path).ok());
            offsets.extend(found.map(|offset| (*global, offset)));
        }
        let log_level: u8 = if config.debug { aya_log::Level::Debug as u8 } else { 0 };
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&aya_btf)).default_map_pin_directory(&maps);
        loader.override_global(aya_log::LEVEL, &log_level, true);
        // Any number that no earlier agent of this boot has had.
        let instance = monotonic_ns() as u32 | 1;
        loader.override_global("SLOT_COUNT", &slots, true);
        loader.override_global("INSTANCE", &instance, true);
        skew(&mut offsets);
        for (global, offset) in &offsets {
            loader.override_global(global, offset, true);
        }
        for name in SOCKETS {
            loader.map_pin_path(name, maps.join(name));
        }
        for (name, size) in &SIZES {
            loader.map_max_entries(name, entries(size));
        }
        let mut ebpf = loader.load(&object)?;

        let object = config.object.clone();
        let links = links_directory(&config.directory);
        let trace = |ebpf: &mut Ebpf, name: &'static str| {
            let program: &mut BtfTracePoint = program(ebpf, name, &object)?;
            program.load(name, &aya_btf).map_err(|source| failed("load", name, source))?;
            let fd = program.fd().map_err(|source| failed("load", name, source))?;
            attach_beside(links.join(name), fd.as_fd(), name)
        };
        let mut beside = Vec::new();
        for name in TRACING {
            beside.push(trace(&mut ebpf, name)?);
        }
        for name in OPTIONAL {
            if without.iter().any(|(program, _)| *program == name) {
                continue;
            }
            match trace(&mut ebpf, name) {
                Ok(attached) => beside.push(attached),
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(program = name, error, "a kernel program is not attached");
                    without.push((name, error));
                }
            }
        }
        // Loaded while the maps are at hand, and attached when somebody asks.
        let budget: &mut BtfTracePoint = program(&mut ebpf, BUDGET_PROGRAM, &object)?;
        if let Err(error) = budget.load(BUDGET_PROGRAM, &aya_btf) {
            let error = chain(&error);
            tracing::error!(program = BUDGET_PROGRAM, error, "a kernel program cannot be used");
            without.push((BUDGET_PROGRAM, error));
        }
        let cgroup = fs::File::open(&config.cgroup_mount).map_err(|source| BpfError::File {
            verb: "open",
            path: config.cgroup_mount.clone(),
            source,
        })?;
        for (name, direction) in
            [("net_egress", CgroupSkbAttachType::Egress), ("net_ingress", CgroupSkbAttachType::Ingress)]
        {
            let program: &mut CgroupSkb = program(&mut ebpf, name, &object)?;
            program.load().map_err(|source| failed("load", name, source))?;
            let pin = links.join(name);
            if !replace(&pin, program.fd().map_err(|source| failed("load", name, source))?.as_fd(), name)? {
                let link = program
                    .attach(&cgroup, direction, CgroupAttachMode::default())
                    .and_then(|link| program.take_link(link))
                    .map_err(|source| failed("attach", name, source))?;
                pin_link(link, &pin, name)?;
            }
        }
        {
            let name = "pace_tcp";
            let program: &mut SockOps = program(&mut ebpf, name, &object)?;
            program.load().map_err(|source| failed("load", name, source))?;
            let pin = links.join(name);
            if !replace(&pin, program.fd().map_err(|source| failed("load", name, source))?.as_fd(), name)? {
                let link = program
                    .attach(&cgroup, CgroupAttachMode::default())
                    .and_then(|link| program.take_link(link))
                    .map_err(|source| failed("attach", name, source))?;
                pin_link(link, &pin, name)?;
            }
        }
        if let Err(error) = admit_devices(&mut ebpf, &object, &cgroup, &links.join(DEVICES)) {
            let error = chain(&error);
            tracing::error!(program = DEVICES, error, "a kernel program is not attached");
            without.push((DEVICES, error));
        }
        let iterator = {
            let name = "walk_tcp";
            let program: &mut Iter = program(&mut ebpf, name, &object)?;
            program.load("tcp", &aya_btf).map_err(|source| failed("load", name, source))?;
            let fd = program.fd().map_err(|source| failed("load", name, source))?;
            sys::attach_iterator(fd.as_fd()).map_err(|source| BpfError::Link {
                verb: "attach",
                program: name,
                source,
            })?
        };
        let mut uplinks = Vec::new();
        {
            let name = "uplink_egress";
            let program: &mut SchedClassifier = program(&mut ebpf, name, &object)?;
            program.load().map_err(|source| failed("load", name, source))?;
            for device in &config.uplinks {
                match qdisc::attach_egress(program, device, &links, &config.state_dir) {
                    Ok(form) => uplinks.push((device.clone(), Ok(form))),
                    // Counting there is not worth everything else; status and doctor say so.
                    Err(error) => {
                        let error = chain(&error);
                        tracing::error!(device, error, "an uplink is not counted");
                        uplinks.push((device.clone(), Err(error)));
                    }
                }
            }
        }
        let ingress: &mut SchedClassifier = program(&mut ebpf, INGRESS_PROGRAM, &object)?;
        if let Err(error) = ingress.load() {
            let error = chain(&error);
            tracing::error!(program = INGRESS_PROGRAM, error, "a kernel program cannot be used");
            without.push((INGRESS_PROGRAM, error));
        }
        if config.debug {
            messages::forward(&mut ebpf);
        }

        // 10 MiB that nothing needs any more.
        drop((aya_btf, kernel_btf));

        let mut take = |name: &'static str| {
            ebpf.take_map(name).ok_or_else(|| BpfError::Foreign { path: object.clone(), name })
        };
        fn typed<T: TryFrom<Map, Error = MapError>>(map: Map, name: &'static str) -> Result<T, BpfError> {
            T::try_from(map).map_err(|source| BpfError::Map { map: name, source })
        }
        fn mapped<T>(map: Map, name: &'static str, entries: u32, maps: &Path) -> Result<Mapped<T>, BpfError> {
            match map {
                Map::Array(data) => Mapped::map(data.fd(), entries),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
            .map_err(|source| BpfError::File { verb: "map", path: maps.join(name), source })
        }
        macro_rules! mapped {
            ($name:literal) => {
                mapped(take($name)?, $name, size_of($name), &maps)?
            };
        }
        let pace = PaceTable {
            pace: mapped!("PACE"),
            clocks: mapped!("CLOCK"),
            shares: mapped!("SHARE"),
            pools: mapped(take("POOL")?, "POOL", abi::POOLS, &maps)?,
        };
        if let Some(capacity) = config.network {
            pace.divide(capacity.bytes_per_sec());
        }
        let control: Mapped<Control> = mapped!("CONTROL");
        let has_others = !attach::other_layouts(&config.directory).is_empty();
        control.half(0, offset_of!(Control, rates_are_ours)).store(has_others.into(), SeqCst);
        // From here on the new tracing programs count, and the old ones do not.
        control.half(0, offset_of!(Control, instance)).store(instance, SeqCst);
        for attached in beside {
            attached.replace()?;
        }
        let mut bpf = Bpf {
            cgroup_slot: typed(take("CGROUP_SLOT")?, "CGROUP_SLOT")?,
            v1_slot: typed(take("V1_SLOT")?, "V1_SLOT")?,
            io_stat: typed(take("IO_STAT")?, "IO_STAT")?,
            control,
            activity: mapped!("ACTIVITY"),
            cpu_state: Arc::new(mapped!("CPU_STATE")),
            cpu_stat: Arc::new(mapped!("CPU_STAT")),
            budget: Arc::new(mapped!("BUDGET")),
            net_stat: mapped!("NET_STAT"),
            round_trip: mapped!("ROUND_TRIP"),
            uplink_stat: mapped!("UPLINK_STAT"),
            pace,
            one_walk: false,
            ingress_class: mapped!("INGRESS_CLASS"),
            queue: Queue::of(&config.directory),
            admission: AdmissionTable {
                governed: typed(take("GOVERNED")?, "GOVERNED")?,
                admission: mapped!("ADMISSION"),
            },
            config,
            slots,
            cpus,
            ebpf,
            iterator,
            uplinks,
            without,
            distrusted: Vec::new(),
            budget_link: None,
            budgets: BTreeSet::new(),
        };
        // The filters of an earlier agent go on with these programs.
        if bpf.limits_ingress()
            && let Err(error) = bpf.feed_queue()
        {
            tracing::error!(error = chain(&error), "what arrives is not limited by this agent's programs");
        }
        Ok(bpf)
    }

    /// The uplinks, and how each is attached, or why not.
    pub fn uplinks(&self) -> &[(String, Result<UplinkForm, String>)] {
        &self.uplinks
    }

    /// Programs that are not attached, and why.
    pub fn without(&self) -> &[(&'static str, String)] {
        &self.without
    }

    /// Whether block IO is counted by program.
    pub fn counts_io(&self) -> bool {
        self.without.iter().all(|(name, _)| *name != BLOCK_IO) && self.trusts(Measure::Io)
    }

    /// Whether drops are counted.
    pub fn counts_drops(&self) -> bool {
        self.without.iter().all(|(name, _)| *name != DROPS)
    }

    /// How often the kernel left a tracing program out because it ran already on that CPU: something was not counted
    /// then.
    pub fn runs_missed(&self) -> u64 {
        let missed = |name: &&str| {
            let program: &BtfTracePoint = self.ebpf.program(name)?.try_into().ok()?;
            sys::recursion_misses(program.fd().ok()?.as_fd()).ok()
        };
        TRACING.iter().chain(&OPTIONAL).filter_map(missed).sum()
    }

    /// Tests the programs on this process, whose cgroup (and v1 group for block IO) is given. What they count wrongly
    /// is not believed from then on.
    pub fn self_test(
        &mut self,
        cgroup_id: u64,
        v1_io: Option<u64>,
        scratch: &Path,
    ) -> Result<&[(Measure, String)], BpfError> {
        self.assign(abi::SLOT_AGENT, cgroup_id)?;
        if let Some(id) = v1_io {
            self.join_v1(abi::SLOT_AGENT, id)?;
        }
        self.distrusted = selftest::run(self, scratch);
        for (measure, why) in &self.distrusted {
            tracing::error!(%measure, why, "the kernel programs count wrongly: this is not believed");
        }
        Ok(&self.distrusted)
    }

    /// Whether what the programs say of this is believed.
    pub fn trusts(&self, measure: Measure) -> bool {
        self.distrusted.iter().all(|(wrong, _)| *wrong != measure)
    }

    /// What is not believed, and why.
    pub fn distrusted(&self) -> &[(Measure, String)] {
        &self.distrusted
    }

    /// Slots, the reserved ones included.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The ring of events, once: whoever has it reads them.
    pub fn take_events(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        let map = self
            .ebpf
            .take_map("EVENTS")
            .ok_or_else(|| BpfError::Foreign { path: self.config.object.clone(), name: "EVENTS" })?;
        RingBuf::try_from(map).map_err(|source| BpfError::Map { map: "EVENTS", source })
    }

    /// Sets or lifts the ceiling on what a slot sends. In force when this returns: TCP sockets follow at their next
    /// acknowledgement, and a walk brings those along that have none; what no socket paces is held to a clock.
    /// `has_sockets` is false for a cgroup in which nothing has run.
    pub fn limit_egress(
        &mut self,
        slot: u32,
        ceiling: Option<BitsPerSec>,
        has_sockets: bool,
    ) -> Result<(), BpfError> {
        match ceiling {
            Some(rate) => self.pace.limit(slot, rate.bytes_per_sec()),
            None if self.pace.read(slot).mode == abi::PACE_OFF => return Ok(()),
            None => self.pace.open(slot),
        }
        if has_sockets && !self.one_walk { self.walk_tcp() } else { Ok(()) }
    }

    /// Whether ceilings change without a walk from here on: [`Bpf::walk_tcp`] has to follow.
    pub fn walk_once(&mut self, yes: bool) {
        self.one_walk = yes;
    }

    /// Puts a slot among those that share the network, where it is divided; else it is on its own.
    pub fn share_network(&mut self, slot: u32) {
        match self.config.network {
            Some(_) => self.pace.enter(slot),
            None => self.pace.leave(slot),
        }
    }

    /// What a slot has of the network.
    pub fn network_terms(&self, slot: u32) -> Option<Terms> {
        self.pace.terms(slot)
    }

    /// Changes what a slot has of the network: in any case, bytes a second, and its part of the rest. In force from the next
    /// window on.
    pub fn set_network_terms(&mut self, slot: u32, guarantee: u64, weight: u32) {
        self.pace.set_guarantee(slot, guarantee);
        self.pace.set_weight(slot, weight);
    }

    /// The ceiling of a slot, bytes a second.
    pub fn egress_ceiling(&self, slot: u32) -> Option<u64> {
        self.pace.ceiling(slot)
    }

    /// The pacing of a slot, as the kernel has it.
    pub fn pacing(&self, slot: u32) -> Pace {
        self.pace.read(slot)
    }

    /// Walks the TCP sockets of every network namespace once.
    pub fn walk_tcp(&self) -> Result<(), BpfError> {
        let walk = |namespace: BorrowedFd<'_>| {
            let walk = self.config.opener.walk(self.iterator.as_fd(), namespace)?;
            io::copy(&mut fs::File::from(walk), &mut io::sink()).map(drop)
        };
        netns::in_each(walk, |namespace, error| {
            // Its sockets follow at their next acknowledgement.
            tracing::warn!(namespace = %namespace.display(), %error, "cannot walk the TCP sockets of a namespace");
        })
        .map_err(BpfError::Walk)
    }

    /// Asks to be told when a slot has used so much CPU time in a period of so much, ns, or no longer. The program that
    /// tells runs at each tick of every task, so it is attached only while somebody asks.
    pub fn watch_budget(&mut self, slot: u32, limit: Option<(u64, u64)>) -> Result<(), BpfError> {
        self.write_budget(slot, limit);
        if !self.warns_of_budgets() {
            return Ok(());
        }
        let Some(_) = limit else {
            self.budgets.remove(&slot);
            if self.budgets.is_empty() {
                self.budget_link = None;
            }
            return Ok(());
        };
        self.budgets.insert(slot);
        if self.budget_link.is_none() {
            let path = self.config.object.clone();
            let program: &mut BtfTracePoint = program(&mut self.ebpf, BUDGET_PROGRAM, &path)?;
            let fd = program.fd().map_err(|source| failed("load", BUDGET_PROGRAM, source))?;
            let link = sys::attach_tracing(fd.as_fd()).map_err(|source| BpfError::Link {
                verb: "attach",
                program: BUDGET_PROGRAM,
                source,
            })?;
            self.budget_link = Some(link);
        }
        Ok(())
    }

    /// Whether the kernel can warn before a quota is used up.
    pub fn warns_of_budgets(&self) -> bool {
        self.without.iter().all(|(name, _)| *name != BUDGET_PROGRAM)
    }

    /// What a thread needs that follows the warnings.
    pub fn quota_watch(&self) -> QuotaWatch {
        QuotaWatch {
            budget: Arc::clone(&self.budget),
            cpu_state: Arc::clone(&self.cpu_state),
            cpu_stat: Arc::clone(&self.cpu_stat),
            cpus: self.cpus,
            slots: self.slots,
        }
    }

    /// Takes everything away: links, pins, uplink filters. The slots must have been retired.
    pub fn remove(self) -> Result<Vec<String>, BpfError> {
        let Bpf { config, ebpf, budget_link, .. } = self;
        drop(budget_link);
        drop(ebpf);
        remove_pins(&config)
    }
}

/// Makes an offset wrong, for tests of what happens then: `SHAPER_SKEW=OFF_TASK_PID=8`.
#[cfg(feature = "failpoints")]
fn skew(offsets: &mut [(&str, u64)]) {
    let Ok(skew) = std::env::var("SHAPER_SKEW") else { return };
    let by = skew.split_once('=').and_then(|(name, by)| Some((name, by.parse::<i64>().ok()?)));
    for (name, offset) in offsets {
        if let Some((skewed, by)) = by
            && *name == skewed
        {
            *offset = offset.wrapping_add_signed(by);
        }
    }
}

#[cfg(not(feature = "failpoints"))]
fn skew(_: &mut [(&str, u64)]) {}

/// Reads an event out of the ring.
pub fn event(item: &[u8]) -> Option<Event> {
    let word = |at: usize| Some(u64::from_ne_bytes(item.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u32::from_ne_bytes(item.get(at..at + 4)?.try_into().ok()?));
    Some(Event { at_ns: word(0)?, value: word(8)?, kind: half(16)?, slot: half(20)? })
}
