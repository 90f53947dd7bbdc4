//! shaper's own scheduler: loads it, and waits for its end. What it does is in `shaper-ebpf/bpf/sched.bpf.c`.
//!
//! libbpf loads it, not aya, which knows no struct_ops. Nothing is pinned: it has the CPUs for as long as this process has
//! its link, so that it goes with the agent, whatever the agent dies of, and leaves the CPUs to the kernel's scheduler.

use std::{
    ffi::CStr,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use libbpf_rs::{Link, MapCore, MapHandle, Object, ObjectBuilder, PrintLevel, RingBufferBuilder};
use rustix::event::{PollFd, PollFlags, poll};

use super::{
    btf::Btf,
    sched_ext::{self, DIRECTORY, NAME, SchedExtError},
};
use crate::waiter::Waiter;

/// The compiled program.
pub static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sched.bpf.o"));
/// Its map with the record of its end.
const EVENTS: &str = "events";

/// shaper's scheduler, which has the CPUs for as long as this is there or until the kernel ejects it.
pub struct Scheduler {
    // Dropped first: that the scheduler ends by our own doing is nobody's news.
    _waiter: Waiter,
    _link: Link,
    _object: Object,
}

impl Scheduler {
    /// Loads it and gives it the CPUs. `ended` is called with the reason if it loses them.
    pub fn load(ended: impl Fn(String) + Send + 'static) -> Result<Scheduler, SchedExtError> {
        Btf::of_kernel().and_then(|btf| sched_ext::is_supported(&btf)).map_err(SchedExtError::NotInKernel)?;
        if let Some(name) = sched_ext::loaded(Path::new(DIRECTORY)) {
            return Err(SchedExtError::Occupied(name));
        }
        let refused = |verb| move |source| SchedExtError::Refused { verb, source };
        libbpf_rs::set_print(Some((PrintLevel::Warn, |_, text| {
            tracing::warn!("libbpf: {}", text.trim_end())
        })));
        let object = ObjectBuilder::default().open_memory(OBJECT).map_err(refused("open"))?;
        let mut object = object.load().map_err(refused("load"))?;
        let absent = |name: &str| -> libbpf_rs::Error {
            std::io::Error::other(format!("it has no map `{name}`")).into()
        };
        let events = object
            .maps()
            .find(|map| map.name() == EVENTS)
            .ok_or_else(|| absent(EVENTS))
            .and_then(|map| MapHandle::try_from(&map))
            .map_err(refused("read"))?;
        let waiter = Waiter::start("scx-end", move |stop| {
            if let Err(error) = wait(&events, stop, &ended) {
                tracing::error!(%error, "cannot wait for the end of shaper's scheduler: it is found within a second");
            }
        })
        .map_err(SchedExtError::Thread)?;
        let link = object
            .maps_mut()
            .find(|map| map.name() == NAME)
            .ok_or_else(|| absent(NAME))
            .and_then(|mut map| map.attach_struct_ops())
            .map_err(refused("attach"))?;
        Ok(Scheduler { _waiter: waiter, _link: link, _object: object })
    }
}

/// Waits until the scheduler has ended, and tells why, or until it is not of interest any more.
fn wait(events: &MapHandle, stop: &OwnedFd, ended: &impl Fn(String)) -> libbpf_rs::Result<()> {
    let mut ring = RingBufferBuilder::new();
    ring.add(events, |record| {
        ended(reason(record));
        0
    })?;
    let ring = ring.build()?;
    // SAFETY: the descriptor belongs to `ring`, which outlives this; poll needs it to see that there is something.
    let ready = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
    loop {
        let mut ready = [PollFd::new(&ready, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        ring.consume()?;
    }
}

/// `struct ended` of the program: two numbers, then the kernel's reason and its message, a fixed length each.
const REASON: std::ops::Range<usize> = 16..144;
const MESSAGE: std::ops::Range<usize> = 144..528;

/// Why it ended, in the kernel's words.
fn reason(record: &[u8]) -> String {
    let text = |range| {
        let bytes = record.get(range).unwrap_or_default();
        let text = CStr::from_bytes_until_nul(bytes).unwrap_or_default();
        text.to_string_lossy().into_owned()
    };
    match (text(REASON), text(MESSAGE)) {
        (reason, message) if message.is_empty() => reason,
        (reason, message) => format!("{reason} ({message})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_read_as_the_program_writes_it() {
        let mut record = vec![0; MESSAGE.end];
        record[REASON.start..][..8].copy_from_slice(b"stalled\0");
        assert_eq!(reason(&record), "stalled");
        record[MESSAGE.start..][..4].copy_from_slice(b"why\0");
        assert_eq!(reason(&record), "stalled (why)");
        assert_eq!(reason(&record[..20]), "");
    }

    /// The layout that `reason` relies on, and the name that the kernel will tell, are the program's.
    #[test]
    fn the_program_has_what_is_looked_for() {
        let object = ObjectBuilder::default().open_memory(OBJECT).unwrap();
        let names: Vec<_> = object.maps().map(|map| map.name().to_string_lossy().into_owned()).collect();
        assert!(
            names.iter().any(|name| name == EVENTS) && names.iter().any(|name| name == NAME),
            "{names:?}"
        );
        let source = include_str!("../../../shaper-ebpf/bpf/sched.bpf.c");
        assert!(source.contains(&format!(".name = \"{NAME}\"")));
        assert!(source.contains("\ts64 kind;\n\ts64 code;\n\tchar reason[128];\n\tchar message[384];\n"));
    }
}
