//! Who writes to the files of a cgroup: fanotify(7) tells of each write which file it was to, and whose.
//!
//! A file of cgroupfs that its kernel changes by itself makes no such event, and a write that changes nothing makes one:
//! whoever is told has to read what is there.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Dir, Mode, OFlags, fstat, open},
};

use crate::waiter::Waiter;

/// The key of a file: its file system, and its number there.
pub type FileId = (u64, u64);

/// A write by a process that is not this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// To which file.
    pub file: FileId,
    /// Whose. 0: of a process in another pid namespace.
    pub pid: u32,
    /// Its name; empty if it had ended by then.
    pub name: String,
}

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// These, in order.
    Writes(Vec<Write>),
    /// So many that the kernel has dropped some.
    Lost,
}

/// The directories that are watched, and the thread that waits for writes to their files.
pub struct Writers {
    group: Arc<OwnedFd>,
    _waiter: Waiter,
}

/// Writes to files of a directory, without those below it.
const EVENTS: u64 = libc::FAN_MODIFY | libc::FAN_EVENT_ON_CHILD;
/// `struct fanotify_event_metadata`, whole.
const EVENT_LENGTH: usize = size_of::<libc::fanotify_event_metadata>();
const BUFFER: usize = 256 * EVENT_LENGTH;

/// A group that is told whose each write is: that takes CAP_SYS_ADMIN, and marking directories in it does not.
pub fn open_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_UNLIMITED_MARKS;
    // SAFETY: the call takes numbers.
    let group = unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as u32) };
    if group < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(group) })
}

/// Has a group told of writes to the files of a directory.
pub fn watch(group: BorrowedFd<'_>, directory: impl AsFd) -> io::Result<()> {
    mark(group, libc::FAN_MARK_ADD | libc::FAN_MARK_ONLYDIR, directory.as_fd())
}

fn mark(group: BorrowedFd<'_>, what: libc::c_uint, directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors are open, and no path means the directory itself.
    let result = unsafe {
        libc::fanotify_mark(group.as_raw_fd(), what, EVENTS, directory.as_raw_fd(), std::ptr::null())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Writers {
    /// Starts the thread, which has the group of [`open_group`]; `tell` is called on it.
    pub fn start(group: OwnedFd, tell: impl Fn(Told) + Send + 'static) -> io::Result<Writers> {
        let group = Arc::new(group);
        let waits = Arc::clone(&group);
        let waiter = Waiter::start("cgroup-writers", move |stop| {
            if let Err(error) = follow(&waits, stop, tell) {
                tracing::error!(%error, "cannot wait for second writers any more");
            }
        })?;
        Ok(Writers { group, _waiter: waiter })
    }

    /// Tells of writes to the files of a directory from now on.
    pub fn watch(&self, directory: impl AsFd) -> io::Result<()> {
        watch(self.group.as_fd(), directory)
    }

    /// Tells of them no more.
    pub fn forget(&self, directory: impl AsFd) -> io::Result<()> {
        mark(self.group.as_fd(), libc::FAN_MARK_REMOVE, directory.as_fd())
    }
}

/// Opens a directory by its path, for where there is no descriptor of it yet.
pub fn directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The files of a directory.
pub fn files(directory: impl AsFd) -> io::Result<Vec<(FileId, String)>> {
    let device = fstat(&directory)?.st_dev;
    let mut files = Vec::new();
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().to_str() {
            files.push(((device, entry.ino()), name.to_owned()));
        }
    }
    Ok(files)
}

fn follow(group: &OwnedFd, stop: &OwnedFd, tell: impl Fn(Told)) -> io::Result<()> {
    let mut buffer = [0u8; BUFFER];
    loop {
        let mut ready = [PollFd::new(group, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        let length = match rustix::io::read(group, &mut buffer) {
            Ok(length) => length,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
            // A file that is gone cannot be opened for us, nor is there anything left to hold.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut writes = Vec::new();
        for event in buffer[..length].chunks_exact(EVENT_LENGTH).map(Event::read) {
            match event {
                Some(Event::Write(write)) => writes.extend(write),
                Some(Event::Overflow) => tell(Told::Lost),
                None => return Err(io::Error::other("fanotify has another format on this kernel")),
            }
        }
        if !writes.is_empty() {
            tell(Told::Writes(writes));
        }
    }
}

enum Event {
    /// `None`: our own, or to a file that is gone.
    Write(Option<Write>),
    Overflow,
}

impl Event {
    /// Without information records every event is `fanotify_event_metadata` and no more.
    fn read(bytes: &[u8]) -> Option<Event> {
        let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (length, version) = (u32_at(0)?, *bytes.get(4)?);
        if length as usize != EVENT_LENGTH || version != libc::FANOTIFY_METADATA_VERSION {
            return None;
        }
        let mask = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
        let (fd, pid) = (u32_at(16)?.cast_signed(), u32_at(20)?);
        if mask & libc::FAN_Q_OVERFLOW != 0 {
            return Some(Event::Overflow);
        }
        if fd < 0 {
            return Some(Event::Write(None));
        }
        // SAFETY: the kernel has opened the file for whoever reads the event, which is here and once.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        if pid == std::process::id() {
            return Some(Event::Write(None));
        }
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let write = fstat(&file).ok().map(|found| Write {
            file: (found.st_dev, found.st_ino),
            pid,
            name: name.trim_end().to_owned(),
        });
        Some(Event::Write(write))
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc, time::Duration};

    use super::*;

    #[test]
    fn writes_of_others_are_told_with_who_they_are() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("cpu.max");
        std::fs::write(&path, "max").unwrap();
        let (sender, told) = mpsc::channel();
        let group = match open_group() {
            // Without CAP_SYS_ADMIN there is nothing to be seen.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            other => other.unwrap(),
        };
        let writers = Writers::start(group, move |told| sender.send(told).unwrap()).unwrap();
        let watched = directory(place.path()).unwrap();
        writers.watch(&watched).unwrap();
        let known = files(&watched).unwrap();
        let (file, _) = known.iter().find(|(_, name)| name == "cpu.max").unwrap();

        std::fs::write(&path, "ours").unwrap();
        let write = |what: &str| {
            let mut shell = Command::new("sh");
            // A second command keeps the shell, which does the write, from becoming the first.
            let child = shell.arg("-c").arg(format!("echo {what} > {}; read _", path.display()));
            child.stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        let mut child = write("theirs");
        let expected = Told::Writes(vec![Write { file: *file, pid: child.id(), name: "sh".into() }]);
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(expected));
        drop(child.stdin.take());
        child.wait().unwrap();

        writers.forget(&watched).unwrap();
        let mut child = write("unseen");
        drop(child.stdin.take());
        child.wait().unwrap();
        drop(writers);
        assert!(told.recv().is_err());
    }

    #[test]
    fn an_event_of_another_format_is_not_read() {
        let mut event = [0u8; EVENT_LENGTH];
        event[0] = EVENT_LENGTH as u8;
        event[4] = libc::FANOTIFY_METADATA_VERSION;
        event[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert!(matches!(Event::read(&event), Some(Event::Write(None))));
        event[8..16].copy_from_slice(&libc::FAN_Q_OVERFLOW.to_ne_bytes());
        assert!(matches!(Event::read(&event), Some(Event::Overflow)));
        event[4] += 1;
        assert!(Event::read(&event).is_none());
        event[..4].copy_from_slice(&48u32.to_ne_bytes());
        assert!(Event::read(&event).is_none());
    }
}
