//! The kernel programs from the agent's side: loading, pinning, adopting what an earlier agent left,
//! and the one translation between units and the structs of the maps.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use aya::{
    Btf as AyaBtf, Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    programs::{
        BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter, ProgramError, SchedClassifier,
        SockOps,
        links::{FdLink, LinkError},
    },
};
use shaper_common::abi::{self, CpuStat, CpuState, NetStat, Pace, PacketCount};
use shaper_core::{task::Traffic, units::BitsPerSec};

use crate::launch::chain;

use super::{
    btf::{Btf, BtfError, OFFSETS},
    netns,
    pace_table::{PaceTable, monotonic_ns},
    qdisc::{self, UplinkError, UplinkForm},
    sys,
};

const BPF_FS_MAGIC: i64 = 0xcafe_4a11_u32 as i64;

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
}

/// A struct of `shaper_common::abi` as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct Abi<T>(T);

// SAFETY: all are repr(C), made of integers, without padding (asserted beside their definition).
unsafe impl Pod for Abi<CpuState> {}
// SAFETY: as above.
unsafe impl Pod for Abi<CpuStat> {}
// SAFETY: as above.
unsafe impl Pod for Abi<NetStat> {}
// SAFETY: as above.
unsafe impl Pod for Abi<PacketCount> {}

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
    /// Where what must be undone later is noted.
    pub state_dir: PathBuf,
    /// Whether the programs' debug messages are wanted.
    pub debug: bool,
}

/// Counters of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// `CLOCK_MONOTONIC` ns of the reading.
    pub at_ns: u64,
    /// CPU time, ns, with the interval that is running.
    pub cpu_ns: u64,
    /// Sent.
    pub egress: Traffic,
    /// Received.
    pub ingress: Traffic,
    /// Sent through the uplinks.
    pub uplink_egress: Traffic,
}

/// The loaded, attached and pinned programs.
pub struct Bpf {
    config: BpfConfig,
    // Holds the programs; the maps below are taken out of it.
    ebpf: Ebpf,
    cgroup_slot: HashMap<MapData, u64, u32>,
    cpu_state: PerCpuArray<MapData, Abi<CpuState>>,
    cpu_stat: PerCpuArray<MapData, Abi<CpuStat>>,
    net_stat: PerCpuArray<MapData, Abi<NetStat>>,
    uplink_stat: PerCpuArray<MapData, Abi<PacketCount>>,
    slot_table_full: Array<MapData, u64>,
    pace: PaceTable,
    iterator: OwnedFd,
    uplinks: Vec<(String, Result<UplinkForm, String>)>,
}

const TRACING: [&str; 3] = ["sched_switch", "cgroup_mkdir", "cgroup_release"];

impl Bpf {
    /// Whether an earlier agent left pins in `directory`.
    pub fn is_pinned(directory: &Path) -> bool {
        layout_directory(directory).exists()
    }

    /// Loads the programs on the maps that are pinned, or new ones, and puts them behind the links
    /// that are pinned, or new ones: enforcement by an earlier agent goes on without a gap.
    pub fn establish(config: BpfConfig) -> Result<Bpf, BpfError> {
        let object = fs::read(&config.object)
            .map_err(|source| BpfError::Object { path: config.object.clone(), source })?;
        let kernel_btf = Btf::of_kernel()?;
        let aya_btf = AyaBtf::from_sys_fs()?;
        let maps = prepare_directories(&config.directory)?;

        let mut offsets = Vec::new();
        for (global, name, path) in OFFSETS {
            offsets.push((*global, kernel_btf.offset_of(name, path)?));
        }
        let log_level: u8 = if config.debug { aya_log::Level::Debug as u8 } else { 0 };
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&aya_btf)).default_map_pin_directory(&maps);
        loader.override_global(aya_log::LEVEL, &log_level, true);
        for (global, offset) in &offsets {
            loader.override_global(global, offset, true);
        }
        let mut ebpf = loader.load(&object)?;

        let object = config.object.clone();
        let links = links_directory(&config.directory);
        for name in TRACING {
            let program: &mut BtfTracePoint = program(&mut ebpf, name, &object)?;
            program.load(name, &aya_btf).map_err(|source| failed("load", name, source))?;
            let fd = program.fd().map_err(|source| failed("load", name, source))?;
            replace_tracing(&links.join(name), fd.as_fd(), name)?;
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
        if config.debug {
            forward_messages(&mut ebpf);
        }

        let mut take = |name: &'static str| {
            ebpf.take_map(name).ok_or_else(|| BpfError::Foreign { path: object.clone(), name })
        };
        fn typed<T: TryFrom<Map, Error = MapError>>(map: Map, name: &'static str) -> Result<T, BpfError> {
            T::try_from(map).map_err(|source| BpfError::Map { map: name, source })
        }
        let cgroup_slot = typed(take("CGROUP_SLOT")?, "CGROUP_SLOT")?;
        let cpu_state = typed(take("CPU_STATE")?, "CPU_STATE")?;
        let cpu_stat = typed(take("CPU_STAT")?, "CPU_STAT")?;
        let net_stat = typed(take("NET_STAT")?, "NET_STAT")?;
        let uplink_stat = typed(take("UPLINK_STAT")?, "UPLINK_STAT")?;
        let slot_table_full = typed(take("SLOT_TABLE_FULL")?, "SLOT_TABLE_FULL")?;
        let pace = match take("PACE")? {
            Map::Array(data) => PaceTable::map(data.fd()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        };
        let pace = pace.map_err(|source| BpfError::File { verb: "map", path: maps.join("PACE"), source })?;
        Ok(Bpf {
            config,
            ebpf,
            cgroup_slot,
            cpu_state,
            cpu_stat,
            net_stat,
            uplink_stat,
            slot_table_full,
            pace,
            iterator,
            uplinks,
        })
    }

    /// The uplinks, and how each is attached, or why not.
    pub fn uplinks(&self) -> &[(String, Result<UplinkForm, String>)] {
        &self.uplinks
    }

    /// Makes `slot` the account of this cgroup, from zero.
    pub fn assign(&mut self, slot: u32, cgroup_id: u64) -> Result<(), BpfError> {
        self.forget_cgroups(slot)?;
        self.clear(slot)?;
        self.join(slot, &[cgroup_id])
    }

    /// Lets these cgroups share the account `slot`.
    pub fn join(&mut self, slot: u32, cgroup_ids: &[u64]) -> Result<(), BpfError> {
        for id in cgroup_ids {
            self.cgroup_slot
                .insert(id, slot, 0)
                .map_err(|source| BpfError::Map { map: "CGROUP_SLOT", source })?;
        }
        Ok(())
    }

    /// Lifts the ceiling of a slot and forgets its cgroups. The sockets are opened first.
    pub fn retire(&mut self, slot: u32) -> Result<(), BpfError> {
        self.limit_egress(slot, None, true)?;
        self.forget_cgroups(slot)?;
        self.pace.off(slot);
        Ok(())
    }

    fn forget_cgroups(&mut self, slot: u32) -> Result<(), BpfError> {
        let is_missing = |error: &MapError| match error {
            MapError::KeyNotFound => true,
            MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
        loop {
            let entries = self.cgroup_slot.iter().filter_map(Result::ok);
            let ids: Vec<u64> = entries.filter(|(_, of)| *of == slot).map(|(id, _)| id).collect();
            if ids.is_empty() {
                return Ok(());
            }
            for id in ids {
                match self.cgroup_slot.remove(&id) {
                    // cgroup_release may have been faster. A child that was made meanwhile is found
                    // by the next round.
                    Err(error) if !is_missing(&error) => {
                        return Err(BpfError::Map { map: "CGROUP_SLOT", source: error });
                    }
                    _ => {}
                }
            }
        }
    }

    fn clear(&mut self, slot: u32) -> Result<(), BpfError> {
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, source)| BpfError::Map { map: "CPU_STAT", source: source.into() })?;
        fn zero<T: Clone + Default + Pod>(
            map: &mut PerCpuArray<MapData, T>,
            name: &'static str,
            slot: u32,
            cpus: usize,
        ) -> Result<(), BpfError> {
            let values = PerCpuValues::try_from(vec![T::default(); cpus])
                .map_err(|source| BpfError::Map { map: name, source: source.into() })?;
            map.set(slot, values, 0).map_err(|source| BpfError::Map { map: name, source })
        }
        zero(&mut self.cpu_stat, "CPU_STAT", slot, cpus)?;
        zero(&mut self.net_stat, "NET_STAT", slot, cpus)?;
        zero(&mut self.uplink_stat, "UPLINK_STAT", slot, cpus)?;
        self.pace.off(slot);
        Ok(())
    }

    /// Sets or lifts the ceiling on what the TCP sockets of a slot send. In force when this returns:
    /// sockets follow at their next acknowledgement, and a walk brings those along that have none.
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
        if has_sockets { self.walk_tcp() } else { Ok(()) }
    }

    /// The pacing of a slot, as the kernel has it.
    pub fn pacing(&self, slot: u32) -> Pace {
        self.pace.read(slot)
    }

    /// Walks the TCP sockets of every network namespace once.
    pub fn walk_tcp(&self) -> Result<(), BpfError> {
        let iterator = self.iterator.as_fd();
        let walk = || {
            let walk = sys::create_iterator(iterator)?;
            io::copy(&mut fs::File::from(walk), &mut io::sink()).map(drop)
        };
        netns::in_each(walk, |namespace, error| {
            // Its sockets follow at their next acknowledgement.
            tracing::warn!(namespace = %namespace.display(), %error, "cannot walk the TCP sockets of a namespace");
        })
        .map_err(BpfError::Walk)
    }

    /// Cgroups below managed ones that the table had no room for: they are not measured.
    pub fn cgroups_without_slot(&self) -> Result<u64, BpfError> {
        self.slot_table_full.get(&0, 0).map_err(|source| BpfError::Map { map: "SLOT_TABLE_FULL", source })
    }

    /// The counters of a slot.
    pub fn counters(&self, slot: u32) -> Result<Counters, BpfError> {
        let (at_ns, cpu_ns) = self.cpu_time(slot)?;
        let mut counters = Counters { at_ns, cpu_ns, ..Counters::default() };
        for Abi(stat) in values(&self.net_stat, "NET_STAT", slot)?.iter() {
            add(&mut counters.egress, &stat.egress);
            add(&mut counters.ingress, &stat.ingress);
        }
        for Abi(stat) in values(&self.uplink_stat, "UPLINK_STAT", slot)?.iter() {
            add(&mut counters.uplink_egress, stat);
        }
        Ok(counters)
    }

    /// When, and how much CPU time a slot had used by then, with what is running.
    fn cpu_time(&self, slot: u32) -> Result<(u64, u64), BpfError> {
        // A switch between the two reads would lose an interval, or count it twice: then they are read again.
        // Where tasks switch faster than we read, the intervals at stake are as short as that.
        const TRIES: usize = 8;
        let concerns = |before: &CpuState, after: &CpuState| {
            (before.slot == slot || after.slot == slot) && before.since_ns != after.since_ns
        };
        let mut tries = 0;
        loop {
            tries += 1;
            let before = values(&self.cpu_state, "CPU_STATE", 0)?;
            let closed: u64 =
                values(&self.cpu_stat, "CPU_STAT", slot)?.iter().map(|Abi(stat)| stat.run_ns).sum();
            let after = values(&self.cpu_state, "CPU_STATE", 0)?;
            let at_ns = monotonic_ns();
            let torn =
                before.iter().zip(after.iter()).any(|(Abi(before), Abi(after))| concerns(before, after));
            if torn && tries < TRIES {
                continue;
            }
            // A task that has not been switched out since is charged up to now.
            let runs = |cpu: &&Abi<CpuState>| cpu.0.slot == slot && cpu.0.pid != 0 && cpu.0.since_ns != 0;
            let open: u64 =
                after.iter().filter(runs).map(|Abi(cpu)| at_ns.saturating_sub(cpu.since_ns)).sum();
            return Ok((at_ns, closed + open));
        }
    }

    /// Takes everything away: links, pins, uplink filters. The slots must have been retired.
    pub fn remove(self) -> Result<Vec<String>, BpfError> {
        let Bpf { config, ebpf, .. } = self;
        drop(ebpf);
        remove_pins(&config)
    }
}

/// Removes the uplinks' filters and what is pinned.
fn remove_pins(config: &BpfConfig) -> Result<Vec<String>, BpfError> {
    let directory = config.directory.as_path();
    let mut done = Vec::new();
    for device in qdisc::detach_all_clsact(&config.state_dir)? {
        done.push(format!("uplink {device}: detached (clsact)"));
    }
    let layout = layout_directory(directory);
    // Links first: when the last one is gone, nothing uses the maps any more.
    for part in ["links", "maps"] {
        let part = layout.join(part);
        let error = |source| BpfError::File { verb: "remove", path: part.clone(), source };
        for entry in fs::read_dir(&part).map_err(error)? {
            fs::remove_file(entry.map_err(error)?.path()).map_err(error)?;
        }
        fs::remove_dir(&part).map_err(error)?;
    }
    for path in [layout.as_path(), directory] {
        match fs::remove_dir(path) {
            Ok(()) => {}
            // Another layout's pins may be beside ours, and the directory may be a mount point.
            Err(error) if path == directory && error.kind() != io::ErrorKind::PermissionDenied => {}
            Err(source) => return Err(BpfError::File { verb: "remove", path: path.to_owned(), source }),
        }
    }
    done.push(format!("{}: kernel programs detached, pins removed", directory.display()));
    Ok(done)
}

fn add(sum: &mut Traffic, count: &PacketCount) {
    sum.bytes += count.bytes;
    sum.packets += count.packets;
}

fn values<T: Pod>(
    map: &PerCpuArray<MapData, T>,
    name: &'static str,
    index: u32,
) -> Result<PerCpuValues<T>, BpfError> {
    map.get(&index, 0).map_err(|source| BpfError::Map { map: name, source })
}

fn failed(verb: &'static str, program: &'static str, source: ProgramError) -> BpfError {
    BpfError::Program { verb, program, source }
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str, object: &Path) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let foreign = || BpfError::Foreign { path: object.to_owned(), name };
    let program = ebpf.program_mut(name).ok_or_else(foreign)?;
    program.try_into().map_err(|source| failed("use", name, source))
}

pub(super) fn pin_link<L>(link: L, path: &Path, program: &'static str) -> Result<(), BpfError>
where
    FdLink: TryFrom<L, Error = LinkError>,
{
    let link = FdLink::try_from(link).map_err(|source| BpfError::AyaLink { program, source })?;
    // Dropping the pinned link closes its descriptor only; the pin keeps it attached.
    link.pin(path).map(drop).map_err(|source| BpfError::Link {
        verb: "pin",
        program,
        source: io::Error::other(source),
    })
}

/// Puts `program` behind the link pinned at `pin`, if there is one; tells whether there was.
pub(super) fn replace(pin: &Path, program: BorrowedFd<'_>, name: &'static str) -> Result<bool, BpfError> {
    let error = |verb| move |source| BpfError::Link { verb, program: name, source };
    let Some(link) = sys::open_pin(pin).map_err(error("open"))? else { return Ok(false) };
    sys::update_link(link.as_fd(), program).map_err(error("replace the program behind"))?;
    Ok(true)
}

/// Attaches a tracing program and pins its link in place of the one there. For an instant both run;
/// they share the maps and charge from one timestamp, so nothing is counted twice.
fn replace_tracing(pin: &Path, program: BorrowedFd<'_>, name: &'static str) -> Result<(), BpfError> {
    let error = |verb| move |source| BpfError::Link { verb, program: name, source };
    let link = sys::attach_tracing(program).map_err(error("attach"))?;
    // (A name on bpffs has no dot.)
    let fresh = pin.with_file_name(format!("{name}_new"));
    match fs::remove_file(&fresh) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("unpin")(source)),
        _ => {}
    }
    sys::pin(link.as_fd(), &fresh).map_err(error("pin"))?;
    fs::rename(&fresh, pin).map_err(error("pin"))
}

fn layout_directory(directory: &Path) -> PathBuf {
    directory.join(format!("v{}", abi::LAYOUT))
}

fn links_directory(directory: &Path) -> PathBuf {
    layout_directory(directory).join("links")
}

/// Makes the directories, open to root only; returns that of the maps.
fn prepare_directories(directory: &Path) -> Result<PathBuf, BpfError> {
    mount_bpffs_if_missing(directory)?;
    let maps = layout_directory(directory).join("maps");
    for path in [&links_directory(directory), &maps] {
        let error = |source| BpfError::File { verb: "make", path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(error)?;
    }
    let error = |source| BpfError::File { verb: "close to others", path: directory.to_owned(), source };
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).map_err(error)?;
    Ok(maps)
}

/// bpffs is mounted by systemd; elsewhere nobody may have done it.
fn mount_bpffs_if_missing(directory: &Path) -> Result<(), BpfError> {
    const DEFAULT: &str = "/sys/fs/bpf";
    let is_bpffs = |path: &Path| {
        let existing = path.ancestors().find(|path| path.exists())?;
        Some(rustix::fs::statfs(existing).ok()?.f_type as i64 == BPF_FS_MAGIC)
    };
    if is_bpffs(directory) == Some(true) {
        return Ok(());
    }
    if directory.starts_with(DEFAULT) {
        let flags = rustix::mount::MountFlags::NOSUID
            | rustix::mount::MountFlags::NODEV
            | rustix::mount::MountFlags::NOEXEC;
        let mounted = rustix::mount::mount("bpf", DEFAULT, "bpf", flags, None);
        if mounted.is_ok() && is_bpffs(directory) == Some(true) {
            tracing::info!("mounted a BPF file system at {DEFAULT}");
            return Ok(());
        }
    }
    Err(BpfError::NoBpfFs(directory.to_owned()))
}

/// Hands the programs' debug messages to the log, on a thread that waits for them.
fn forward_messages(ebpf: &mut Ebpf) {
    let mut logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!("no debug messages from the kernel programs: {error}");
            return;
        }
    };
    let wait = move || {
        loop {
            let fd = logger.as_raw_fd();
            // SAFETY: the ring buffer's descriptor, open as long as the logger that this thread owns.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let mut ready = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => logger.flush(),
                Err(error) => {
                    tracing::warn!("no more debug messages from the kernel programs: {error}");
                    return;
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("bpf-log".into()).spawn(wait) {
        tracing::warn!("no debug messages from the kernel programs: {error}");
    }
}
