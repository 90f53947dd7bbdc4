//! What is lent, where a process that outlives the agent finds it: the table that the agent writes and `shaper-warden`
//! executes.
//!
//! A cgroup file has no timer: a quota that was raised for a moment stays raised if the agent dies in that moment. So the
//! agent notes for each task that may be lent something *what to write back, and where*, before it lends anything;
//! a loan itself is one word more, written before the quota is. The table is a file in the state directory that both
//! processes have in their memory: a store into it is there for the other at once, and survives the death of whoever
//! wrote it. It need not survive the machine, since cgroups do not.
//!
//! An entry names a cgroup by path *and* by the inode of its directory: one that was removed and made again under the same
//! name is another, and is left alone. What the table does not name is never written.
//!
//! Two agents never share a table: each new one takes back what the last one lent, and raises the *epoch*. A warden acts under
//! the table's lock and only in its own epoch, so that one which is late cannot undo what the next agent does.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::Ordering::SeqCst,
};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, ResolveFlags, flock, fstat, fstatfs, openat, openat2};

use shaper_core::{limits::Limit, units::Micros};

use crate::kernel::{
    cgroup::{
        CGROUP2_SUPER_MAGIC, Setting,
        cpu::{self, CpuMax},
    },
    mapped::{Mapped, Words, monotonic_ns},
    v1::{self, V1Limit},
};

const MAGIC: u64 = u64::from_le_bytes(*b"shprlea1");
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;

/// Bytes of an entry; the first one is the head of the table.
const ENTRY: usize = 1024;
const PATH: usize = 64;

/// An entry, or the head. Written word by word.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Entry([u8; ENTRY]);

impl Default for Entry {
    fn default() -> Entry {
        Entry([0; ENTRY])
    }
}

// SAFETY: bytes without padding, a whole number of words.
unsafe impl Words for Entry {}

/// Words of the head.
mod head {
    pub(super) const MAGIC: usize = 0;
    pub(super) const EPOCH: usize = 8;
    pub(super) const HEARTBEAT: usize = 16;
    /// How often somebody else than the agent has taken back what was lent.
    pub(super) const TAKINGS: usize = 24;
}

/// Words of an entry.
mod entry {
    pub(super) const KIND: usize = 0;
    /// 1 while another quota may be in force than the one to be written back.
    pub(super) const LENT: usize = 8;
    pub(super) const QUOTA: usize = 16;
    pub(super) const INODE: usize = 24;
    pub(super) const PATH_LENGTH: usize = 32;
}

/// In which file a quota is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cpu.max` of cgroup v2.
    V2,
    /// `cpu.cfs_quota_us` of the v1 controller.
    V1,
}

impl Kind {
    /// The name of the file.
    pub const fn file(self) -> &'static str {
        match self {
            Kind::V2 => cpu::MAX.name(),
            Kind::V1 => v1::CPU_QUOTA.name(),
        }
    }

    /// A quota as the kernel takes it.
    pub fn text(self, quota: Micros) -> String {
        let quota = Limit::At(quota);
        match self {
            Kind::V2 => CpuMax { quota, period: CpuMax::PERIOD }.text(),
            Kind::V1 => V1Limit(quota).text(),
        }
    }
}

/// Where a quota is written back, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// Which file of it.
    pub kind: Kind,
    /// The quota where nothing is lent, in a period of 100 ms.
    pub quota: Micros,
}

/// What went wrong with the table.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The file of it.
    #[error("cannot {verb} the table of leases {path}")]
    Table {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It is not one, or of another version.
    #[error("{0} is no table of leases; remove it while no agent with this state directory runs")]
    Foreign(PathBuf),
    /// A path that does not fit in.
    #[error("the path {0} is too long to be noted: nothing is lent to this task")]
    TooLong(PathBuf),
}

/// The table.
pub struct Leases {
    table: Mapped<Entry>,
    file: File,
    path: PathBuf,
    entries: u32,
    epoch: u64,
}

/// How a quota was taken back.
#[derive(Debug)]
pub struct Taken {
    /// Whose.
    pub cgroup: PathBuf,
    /// `Ok(false)`: there was nothing to do, because the quota is as it should be or the cgroup is another by now.
    pub result: io::Result<bool>,
}

impl Leases {
    /// Where the table is.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("leases")
    }

    /// Begins a new epoch, of `slots` entries that are free, and takes back what the last one left. The new table is a new
    /// file: whoever has the old one in its memory goes on to see that one, and that it is over.
    pub fn begin(path: &Path, slots: u32) -> Result<(Leases, Vec<Taken>), LeaseError> {
        let error = |verb| move |source: io::Error| LeaseError::Table { verb, path: path.to_owned(), source };
        let mut epoch = 1;
        let mut taken = Vec::new();
        let before = match Leases::open_file(path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(error("open")(source)),
        };
        if let Some(file) = &before {
            lock(file).map_err(error("lock"))?;
            let before = Leases::map(file, path)?;
            if before.head(head::MAGIC) == MAGIC {
                epoch = before.head(head::EPOCH) + 1;
                taken = before.take_back_all();
                before.set_head(head::EPOCH, epoch);
            }
        }
        let made = path.with_extension("new");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&made).map_err(error("make"))?;
        // Nothing but zeros, of which only what is used takes room.
        file.set_len(u64::from(slots) * ENTRY as u64).map_err(error("make"))?;
        let leases = Leases { epoch, ..Leases::map(&file, path)? };
        leases.beat();
        leases.set_head(head::EPOCH, epoch);
        leases.set_head(head::MAGIC, MAGIC);
        std::fs::rename(&made, path).map_err(error("replace"))?;
        Ok((leases, taken))
    }

    /// Opens the table of `epoch`; `None` if that is over.
    pub fn open(path: &Path, epoch: u64) -> Result<Option<Leases>, LeaseError> {
        let error = |verb| move |source: io::Error| LeaseError::Table { verb, path: path.to_owned(), source };
        let file = Leases::open_file(path).map_err(error("open"))?;
        let leases = Leases { epoch, ..Leases::map(&file, path)? };
        if leases.head(head::MAGIC) != MAGIC {
            return Err(LeaseError::Foreign(path.to_owned()));
        }
        Ok(leases.is_current().then_some(leases))
    }

    fn open_file(path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
    }

    fn map(file: &File, path: &Path) -> Result<Leases, LeaseError> {
        let error = |verb| move |source: io::Error| LeaseError::Table { verb, path: path.to_owned(), source };
        let length = file.metadata().map_err(error("look at"))?.len();
        let entries = u32::try_from(length / ENTRY as u64).unwrap_or(0);
        if entries == 0 {
            return Err(LeaseError::Foreign(path.to_owned()));
        }
        let table = Mapped::map(file, entries).map_err(error("map"))?;
        let file = file.try_clone().map_err(error("open"))?;
        Ok(Leases { table, file, path: path.to_owned(), entries, epoch: 0 })
    }

    /// The epoch, which a warden is told.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether no later agent has begun another.
    pub fn is_current(&self) -> bool {
        self.head(head::EPOCH) == self.epoch
    }

    fn head(&self, word: usize) -> u64 {
        self.table.word(0, word).load(SeqCst)
    }

    fn set_head(&self, word: usize, value: u64) {
        self.table.word(0, word).store(value, SeqCst);
    }

    /// Says that the agent is at work.
    pub fn beat(&self) {
        self.set_head(head::HEARTBEAT, monotonic_ns());
    }

    /// When it last said so, `CLOCK_MONOTONIC` ns.
    pub fn last_beat_ns(&self) -> u64 {
        self.head(head::HEARTBEAT)
    }

    /// How often something was taken back behind the agent's back.
    pub fn takings(&self) -> u64 {
        self.head(head::TAKINGS)
    }

    /// Notes what to write back for the task of a slot.
    pub fn note(&self, slot: u32, lease: &Lease) -> Result<(), LeaseError> {
        let Lease { cgroup, inode, kind, quota } = lease;
        let path = cgroup.as_os_str().as_bytes();
        if path.len() > ENTRY - PATH || slot == 0 || slot >= self.entries {
            return Err(LeaseError::TooLong(cgroup.clone()));
        }
        // Without a kind it is nobody's; it gets one once the rest is there.
        self.forget(slot);
        let set = |word, value| self.table.word(slot as usize, word).store(value, SeqCst);
        for (index, bytes) in path.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            set(PATH + index * 8, u64::from_ne_bytes(word));
        }
        set(entry::PATH_LENGTH, path.len() as u64);
        set(entry::INODE, *inode);
        set(entry::QUOTA, quota.0);
        set(
            entry::KIND,
            match kind {
                Kind::V2 => 1,
                Kind::V1 => 2,
            },
        );
        Ok(())
    }

    /// Forgets a task.
    pub fn forget(&self, slot: u32) {
        if slot != 0 && slot < self.entries {
            self.table.word(slot as usize, entry::KIND).store(0, SeqCst);
            self.set_lent(slot, false);
        }
    }

    /// Says before another quota than the noted one is written, and after that one is again.
    pub fn set_lent(&self, slot: u32, lent: bool) {
        self.table.word(slot as usize, entry::LENT).store(lent.into(), SeqCst);
    }

    /// Whether anything is lent.
    pub fn is_anything_lent(&self) -> bool {
        (1..self.entries as usize).any(|slot| self.table.word(slot, entry::LENT).load(SeqCst) != 0)
    }

    /// What is noted of a slot.
    pub fn lease(&self, slot: u32) -> Option<Lease> {
        let entry = self.table.read(slot as usize).0;
        let word = |at: usize| u64::from_ne_bytes(entry[at..at + 8].try_into().unwrap_or_default());
        let kind = match word(entry::KIND) {
            1 => Kind::V2,
            2 => Kind::V1,
            _ => return None,
        };
        let path = entry.get(PATH..PATH + usize::try_from(word(entry::PATH_LENGTH)).ok()?)?;
        Some(Lease {
            cgroup: PathBuf::from(std::ffi::OsStr::from_bytes(path)),
            inode: word(entry::INODE),
            kind,
            quota: Micros(word(entry::QUOTA)),
        })
    }

    /// Takes back what is lent, unless another agent has begun; for whom it is not the agent. Tells whether it did.
    pub fn take_back(&self) -> Result<Option<Vec<Taken>>, LeaseError> {
        let error =
            |verb| move |source: io::Error| LeaseError::Table { verb, path: self.path.clone(), source };
        lock(&self.file).map_err(error("lock"))?;
        let taken = self.is_current().then(|| {
            let taken = self.take_back_all();
            // After the writes: the agent that sees it makes sure of each quota.
            self.table.word(0, head::TAKINGS).fetch_add(1, SeqCst);
            taken
        });
        unlock(&self.file).map_err(error("unlock"))?;
        Ok(taken)
    }

    fn take_back_all(&self) -> Vec<Taken> {
        let mut taken = Vec::new();
        for slot in 1..self.entries {
            if self.table.word(slot as usize, entry::LENT).load(SeqCst) == 0 {
                continue;
            }
            let Some(lease) = self.lease(slot) else { continue };
            let result = write_back(&lease);
            if result.is_ok() {
                self.set_lent(slot, false);
            }
            taken.push(Taken { cgroup: lease.cgroup, result });
        }
        taken
    }
}

/// Not the file's alone: a lock is one per open file, and the agent and its warden have their own.
fn lock(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::LockExclusive)?)
}

fn unlock(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::Unlock)?)
}

/// Opens the directory of a cgroup, if it is the one that is meant.
fn directory(lease: &Lease) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let directory = match openat2(CWD, &lease.cgroup, flags, Mode::empty(), resolve) {
        Ok(directory) => directory,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let magic = match lease.kind {
        Kind::V2 => CGROUP2_SUPER_MAGIC,
        Kind::V1 => CGROUP_SUPER_MAGIC,
    };
    let is_it = fstatfs(&directory)?.f_type as i64 == magic && fstat(&directory)?.st_ino == lease.inode;
    Ok(is_it.then_some(directory))
}

/// Writes the noted quota, where another is in force; tells whether it did.
fn write_back(lease: &Lease) -> io::Result<bool> {
    let Some(directory) = directory(lease)? else { return Ok(false) };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let gone = |errno| matches!(errno, rustix::io::Errno::NOENT | rustix::io::Errno::NODEV);
    let file = match openat(&directory, lease.kind.file(), flags, Mode::empty()) {
        Ok(file) => file,
        Err(errno) if gone(errno) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let mut buffer = [0; 64];
    let length = match rustix::io::pread(&file, &mut buffer, 0) {
        Ok(length) => length,
        Err(errno) if gone(errno) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let text = lease.kind.text(lease.quota);
    if buffer[..length].trim_ascii_end() == text.as_bytes() {
        return Ok(false);
    }
    rustix::io::pwrite(&file, text.as_bytes(), 0)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(cgroup: &Path) -> Lease {
        Lease { cgroup: cgroup.to_owned(), inode: 7, kind: Kind::V2, quota: Micros(30_000) }
    }

    #[test]
    fn what_is_noted_is_there_for_another_process_and_gone_with_the_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let path = Leases::path(folder.path());
        let (agent, taken) = Leases::begin(&path, 16).unwrap();
        assert!(taken.is_empty());
        let lease = lease(Path::new("/sys/fs/cgroup/shaper/a-task.1"));
        agent.note(3, &lease).unwrap();
        agent.set_lent(3, true);
        agent.beat();

        let warden = Leases::open(&path, agent.epoch()).unwrap().unwrap();
        assert_eq!((warden.lease(3), warden.lease(4)), (Some(lease), None));
        assert!(warden.is_anything_lent() && warden.last_beat_ns() > 0);
        agent.forget(3);
        assert_eq!(warden.lease(3), None);

        let (next, _) = Leases::begin(&path, 8).unwrap();
        assert_eq!(next.epoch(), agent.epoch() + 1);
        assert!(Leases::open(&path, agent.epoch()).unwrap().is_none());
        assert!(warden.take_back().unwrap().is_none());
    }

    #[test]
    fn what_is_no_cgroup_or_another_one_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cpu.max"), "60000 100000\n").unwrap();
        let (agent, _) = Leases::begin(&Leases::path(folder.path()), 16).unwrap();
        let inode = fstat(File::open(folder.path()).unwrap()).unwrap().st_ino;
        agent.note(3, &Lease { inode, ..lease(folder.path()) }).unwrap();
        agent.note(4, &lease(&folder.path().join("absent"))).unwrap();
        agent.set_lent(3, true);
        agent.set_lent(4, true);
        let taken = agent.take_back().unwrap().unwrap();
        assert!(taken.iter().all(|taken| matches!(taken.result, Ok(false))) && taken.len() == 2, "{taken:?}");
        assert_eq!(std::fs::read_to_string(folder.path().join("cpu.max")).unwrap(), "60000 100000\n");
        assert_eq!(agent.takings(), 1);
    }

    #[test]
    fn a_path_that_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (agent, _) = Leases::begin(&Leases::path(folder.path()), 16).unwrap();
        let long = PathBuf::from("/").join("x".repeat(ENTRY));
        assert!(matches!(agent.note(3, &lease(&long)), Err(LeaseError::TooLong(_))));
        assert!(matches!(agent.note(16, &lease(Path::new("/a"))), Err(LeaseError::TooLong(_))));
    }
}
