//! Changes of the file that says what the cards are and do.

use std::{mem::MaybeUninit, os::fd::OwnedFd, time::Instant};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};

use crate::path;

/// Tells of them from when it was made.
pub(crate) struct Changes(OwnedFd);

impl Changes {
    /// Of the folder that the file is in: it is replaced as a whole.
    pub(crate) fn watch() -> Result<Changes, Errno> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let folder = path().and_then(|path| Some(path.parent()?.to_owned())).ok_or(Errno::NOENT)?;
        inotify::add_watch(&changes, folder, WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE)?;
        Ok(Changes(changes))
    }

    /// Waits until something may have changed; whether that was in time.
    pub(crate) fn wait(&self, until: Option<Instant>) -> Result<bool, Errno> {
        let rest = until.map(|until| Timespec::try_from(until.saturating_duration_since(Instant::now())));
        let rest = rest.transpose().map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], rest.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut told = inotify::Reader::new(&self.0, &mut buffer);
        loop {
            match told.next() {
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }
}
