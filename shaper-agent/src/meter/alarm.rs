//! Alarms: the kernel tells when a cgroup has waited too long for memory or block IO (Documentation/accounting/psi.rst),
//! or has met a limit of its memory, and nobody has to look for it.

use std::{collections::BTreeMap, io, os::fd::OwnedFd, sync::Arc};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use shaper_core::{snapshot::Pressure, units::Micros};

use crate::{
    kernel::cgroup::{
        Cgroup, CgroupError, File, Open, ReadOnly,
        memory::{self, MemoryEvents},
        pressure::{self, Stall, Trigger},
    },
    waiter::Waiter,
};

/// A tenth of two seconds: an agent without CAP_SYS_RESOURCE may have windows of whole pairs of seconds only.
const TRIGGER: Trigger = Trigger { stall: Stall::Some, time: Micros(200_000), window: Micros(2_000_000) };
const FILES: [File<Pressure, ReadOnly>; 2] = [pressure::MEMORY, pressure::IO];
/// What the epoll calls the end; no slot has this number.
const STOP: u64 = u64::MAX;
/// Beside a slot: it is `memory.events` that has changed.
const OF_MEMORY: u64 = 1 << 32;
/// Events taken at once.
const BATCH: usize = 64;

/// What has rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// It waited too long.
    Pressure,
    /// Something is to be read in `memory.events`.
    MemoryEvents,
}

/// The alarms that are set, and the thread that waits for them.
pub struct Alarms {
    epoll: Arc<OwnedFd>,
    set: BTreeMap<u32, OfTask>,
    _waiter: Waiter,
}

/// The alarms of a task, which go with their descriptors.
struct OfTask {
    _pressure: Vec<OwnedFd>,
    _events: Option<Open<MemoryEvents, ReadOnly>>,
}

impl Alarms {
    /// Starts the thread; `ring` is called on it with the slot of each alarm.
    pub fn start(ring: impl Fn(u32, Ring) + Send + 'static) -> io::Result<Alarms> {
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
        let mut set = Vec::new();
        for file in FILES {
            match self.set_one(slot, cgroup, file) {
                Ok(alarm) => set.extend(alarm),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "no alarm of pressure: it is read once a second");
                }
            }
        }
        let events = self.set_events(slot, cgroup).unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "nobody tells when memory meets its limit: it is read once a second");
            None
        });
        self.set.insert(slot, OfTask { _pressure: set, _events: events });
    }

    fn set_events(
        &self,
        slot: u32,
        cgroup: &Cgroup,
    ) -> Result<Option<Open<MemoryEvents, ReadOnly>>, CgroupError> {
        let Some(file) = cgroup.open_file(memory::EVENTS)? else { return Ok(None) };
        let data = EventData::new_u64(OF_MEMORY | u64::from(slot));
        epoll::add(&self.epoll, &file, data, EventFlags::PRI | EventFlags::ET)
            .map_err(|errno| cgroup.error("wait for", memory::EVENTS.name(), errno.into()))?;
        Ok(Some(file))
    }

    fn set_one(
        &self,
        slot: u32,
        cgroup: &Cgroup,
        file: File<Pressure, ReadOnly>,
    ) -> Result<Option<OwnedFd>, CgroupError> {
        let Some(fd) = cgroup.watch_pressure(file, &TRIGGER)? else { return Ok(None) };
        epoll::add(&self.epoll, &fd, EventData::new_u64(slot.into()), EventFlags::PRI | EventFlags::ET)
            .map_err(|errno| cgroup.error("wait for", file.name(), errno.into()))?;
        Ok(Some(fd))
    }

    /// Forgets the alarms of a task: they go with their descriptors.
    pub fn forget(&mut self, slot: u32) {
        self.set.remove(&slot);
    }
}

fn wait(epoll: &OwnedFd, stop: &OwnedFd, ring: impl Fn(u32, Ring)) -> io::Result<()> {
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
                // Every change of a file comes with an error.
                data if data & OF_MEMORY != 0 => ring(data as u32, Ring::MemoryEvents),
                // A cgroup that is gone rings once more, with an error, and then never.
                _ if { event.flags }.contains(EventFlags::ERR) => {}
                slot => ring(slot as u32, Ring::Pressure),
            }
        }
    }
}
