//! When the broker was last heard of, where those find it who outlive the agent: the supervisors of tasks that are run again
//! elsewhere when their node is lost.
//!
//! It is one word, in a file that everybody has in his memory: the time at which the agent *asked*, of the latest question
//! that the broker has answered. Whoever counts a lease from there is never later than the broker, which had the session
//! when it answered. The clock is that of the boot, which also runs while the machine sleeps; each boot has a file of its
//! own, since the clock begins anew.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering::SeqCst,
    time::Duration,
};

use tokio::sync::watch;

use crate::kernel::mapped::Mapped;

const PREFIX: &str = "contact.";
/// How often the broker is asked in the shortest lease.
const QUESTIONS_IN_A_LEASE: u32 = 10;

/// See the module.
pub struct Contact {
    word: Mapped<u64>,
    path: PathBuf,
    /// How often the broker is to be asked; `None`: nobody needs it.
    pace: watch::Sender<Option<Duration>>,
}

impl std::fmt::Debug for Contact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contact").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Contact {
    /// The agent's: the file of this boot, and no other any more.
    pub fn begin(state_dir: &Path, boot_id: &str) -> io::Result<Contact> {
        let name = format!("{PREFIX}{boot_id}");
        for entry in fs::read_dir(state_dir)? {
            let entry = entry?;
            let other = entry.file_name();
            if other.to_str().is_some_and(|other| other.starts_with(PREFIX) && other != name) {
                fs::remove_file(entry.path())?;
            }
        }
        let path = state_dir.join(name);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(libc::O_NOFOLLOW).open(&path)?;
        // Zeros: nobody was heard of yet.
        file.set_len(size_of::<u64>() as u64)?;
        Contact::map(&file, path)
    }

    /// A supervisor's: the file that the agent named.
    pub fn open(path: &Path) -> io::Result<Contact> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        if file.metadata()?.len() < size_of::<u64>() as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is shorter than a word"));
        }
        Contact::map(&file, path.to_owned())
    }

    fn map(file: &File, path: PathBuf) -> io::Result<Contact> {
        Ok(Contact { word: Mapped::map(file, 1)?, path, pace: watch::Sender::new(None) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The broker has answered what it was asked at `asked_at`.
    pub fn note(&self, asked_at: u64) {
        self.word.word(0, 0).fetch_max(asked_at, SeqCst);
    }

    /// When a lease is over that counts from when the broker was last heard of.
    pub fn until(&self, lease: Duration) -> u64 {
        let lease = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
        self.word.word(0, 0).load(SeqCst).saturating_add(lease)
    }

    /// Whether it is over.
    pub fn is_over(&self, lease: Duration) -> bool {
        self.until(lease) <= boottime_ns()
    }

    /// The shortest lease of those that have one: the broker is to be asked often enough for that.
    pub fn keep(&self, shortest: Option<Duration>) {
        let pace = shortest.map(|lease| lease / QUESTIONS_IN_A_LEASE);
        self.pace.send_if_modified(|before| std::mem::replace(before, pace) != pace);
    }

    /// How often the broker is to be asked.
    pub fn pace(&self) -> watch::Receiver<Option<Duration>> {
        self.pace.subscribe()
    }
}

/// `CLOCK_BOOTTIME`, which no one sets and which goes on while the machine sleeps. It means the same to the next agent.
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_nanos(100);

    #[test]
    fn what_one_notes_the_other_sees_and_it_only_grows() {
        let directory = tempfile::tempdir().unwrap();
        let agent = Contact::begin(directory.path(), "boot-1").unwrap();
        let supervisor = Contact::open(agent.path()).unwrap();
        assert_eq!(supervisor.until(LEASE), 100, "nobody was heard of");
        assert!(supervisor.is_over(LEASE));
        agent.note(7);
        agent.note(5);
        assert_eq!(supervisor.until(LEASE), 107);
        // The next agent goes on with it.
        drop(agent);
        let agent = Contact::begin(directory.path(), "boot-1").unwrap();
        assert_eq!(agent.until(LEASE), 107);
        agent.note(9);
        assert_eq!(supervisor.until(LEASE), 109);
        assert_eq!(supervisor.until(Duration::MAX), u64::MAX);
        agent.note(boottime_ns());
        assert!(!supervisor.is_over(Duration::from_secs(3600)));
    }

    #[test]
    fn another_boot_begins_anew() {
        let directory = tempfile::tempdir().unwrap();
        Contact::begin(directory.path(), "boot-1").unwrap().note(7);
        fs::write(directory.path().join("other"), "").unwrap();
        let agent = Contact::begin(directory.path(), "boot-2").unwrap();
        assert_eq!(agent.until(LEASE), 100);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "the other file stays");
        fs::write(agent.path(), "short").unwrap();
        assert!(Contact::open(agent.path()).is_err());
    }

    #[test]
    fn the_broker_is_asked_ten_times_in_the_shortest_lease_if_there_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let contact = Contact::begin(directory.path(), "boot").unwrap();
        let mut pace = contact.pace();
        assert_eq!(*pace.borrow_and_update(), None);
        contact.keep(Some(Duration::from_secs(30)));
        assert_eq!(*pace.borrow_and_update(), Some(Duration::from_secs(3)));
        contact.keep(Some(Duration::from_secs(30)));
        assert!(!pace.has_changed().unwrap());
        contact.keep(None);
        assert_eq!(*pace.borrow_and_update(), None);
    }
}
