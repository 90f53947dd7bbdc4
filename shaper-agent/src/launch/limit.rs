//! The lease of a task: how long it goes on without the broker, and who ends it then.
//!
//! A thread of the supervisor sleeps until the lease is over, looks whether the broker was heard of meanwhile, and else kills
//! all that is in the task's cgroup. A thread of its own, since the other one writes the log and the state of the attempt, and
//! a disk may keep it waiting.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use rustix::{
    event::Timespec,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime},
};

use super::spec::Lease;
use crate::contact::Contact;

/// The thread calls nothing deep.
const STACK_BYTES: usize = 64 << 10;

/// See the module.
pub(super) struct Limit {
    contact: Contact,
    lease: Duration,
    timer: OwnedFd,
    /// `cgroup.kill` of the task's group, open so that nothing has to be found then.
    kill: File,
    /// It has ended the task.
    ended: AtomicBool,
}

impl Limit {
    /// From here on the lease counts.
    pub(super) fn watch(lease: &Lease, cgroup: &Path) -> io::Result<Arc<Limit>> {
        let limit = Arc::new(Limit {
            contact: Contact::open(&lease.contact)?,
            lease: Duration::from_secs(lease.seconds.into()),
            // Of the clock of the boot: others stand still while the machine sleeps.
            timer: timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?,
            kill: File::options().write(true).open(cgroup.join("cgroup.kill"))?,
            ended: AtomicBool::new(false),
        });
        let kept = limit.clone();
        let thread = thread::Builder::new().name("lease".into()).stack_size(STACK_BYTES);
        thread.spawn(move || kept.keep())?;
        Ok(limit)
    }

    pub(super) fn lease(&self) -> Duration {
        self.lease
    }

    pub(super) fn is_over(&self) -> bool {
        self.contact.is_over(self.lease)
    }

    /// Whether it has ended the task, or was about to when somebody else did.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(SeqCst) || self.is_over()
    }

    fn keep(&self) {
        // One that cannot be watched is over.
        while !self.is_over() && self.sleep().is_ok() {}
        self.ended.store(true, SeqCst);
        // A group that is gone has nobody in it.
        let _ = (&self.kill).write_all(b"1");
    }

    /// Until the lease is over, unless the broker is heard of until then.
    fn sleep(&self) -> io::Result<()> {
        let until = Duration::from_nanos(self.contact.until(self.lease));
        let it_value =
            Timespec { tv_sec: until.as_secs().cast_signed(), tv_nsec: until.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once)?;
        let mut expirations = [0; size_of::<u64>()];
        rustix::io::retry_on_intr(|| rustix::io::read(&self.timer, &mut expirations))?;
        Ok(())
    }
}
