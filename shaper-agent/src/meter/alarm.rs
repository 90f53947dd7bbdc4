//! Alarms of pressure: the kernel tells when a cgroup has waited too long for memory or block IO, and nobody has to
//! look for it (Documentation/accounting/psi.rst).

use std::{collections::BTreeMap, io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    fs::{Mode, OFlags},
};

use crate::{kernel::cgroup::Cgroup, waiter::Waiter};

/// A tenth of two seconds: an agent without CAP_SYS_RESOURCE may have windows of whole pairs of seconds only.
const TRIGGER: &[u8] = b"some 200000 2000000\0";
const FILES: [&str; 2] = ["memory.pressure", "io.pressure"];
/// What the epoll calls the end; no slot has this number.
const STOP: u64 = u64::MAX;
/// Events taken at once.
const BATCH: usize = 64;

/// The alarms that are set, and the thread that waits for them.
pub struct Alarms {
    epoll: Arc<OwnedFd>,
    set: BTreeMap<u32, Vec<OwnedFd>>,
    _waiter: Waiter,
}

impl Alarms {
    /// Starts the thread; `ring` is called on it with the slot of each alarm.
    pub fn start(ring: impl Fn(u32) + Send + 'static) -> io::Result<Alarms> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        let waits = Arc::clone(&epoll);
        let waiter = Waiter::start("pressure", move |stop| {
            if let Err(error) = wait(&waits, stop, ring) {
                tracing::error!(%error, "cannot wait for alarms of pressure any more: it is read once a second");
            }
        })?;
        Ok(Alarms { epoll, set: BTreeMap::new(), _waiter: waiter })
    }

    /// Sets the alarms of a cgroup; where its kernel counts no pressure, there are none.
    pub fn set(&mut self, slot: u32, cgroup: &Cgroup) {
        let set = FILES.iter().filter_map(|file| match self.set_one(slot, cgroup, file) {
            Ok(set) => set,
            Err(error) => {
                let path = cgroup.path().join(file);
                tracing::warn!(path = %path.display(), %error, "no alarm of pressure: it is read once a second");
                None
            }
        });
        let set = set.collect();
        self.set.insert(slot, set);
    }

    fn set_one(&self, slot: u32, cgroup: &Cgroup, file: &str) -> io::Result<Option<OwnedFd>> {
        let opened = rustix::fs::openat(cgroup, file, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let fd = match opened {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match rustix::io::write(&fd, TRIGGER) {
            Ok(_) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        epoll::add(&self.epoll, &fd, EventData::new_u64(slot.into()), EventFlags::PRI | EventFlags::ET)?;
        Ok(Some(fd))
    }

    /// Forgets the alarms of a task: they go with their descriptors.
    pub fn forget(&mut self, slot: u32) {
        self.set.remove(&slot);
    }
}

fn wait(epoll: &OwnedFd, stop: &OwnedFd, ring: impl Fn(u32)) -> io::Result<()> {
    epoll::add(epoll, stop, EventData::new_u64(STOP), EventFlags::IN)?;
    let mut events = Vec::with_capacity(BATCH);
    loop {
        events.clear();
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            match event.data.u64() {
                STOP => return Ok(()),
                // A cgroup that is gone rings once more, with an error, and then never.
                _ if { event.flags }.contains(EventFlags::ERR) => {}
                slot => ring(slot as u32),
            }
        }
    }
}
