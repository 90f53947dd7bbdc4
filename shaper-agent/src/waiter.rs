//! Threads that wait for the kernel, and end with who started them.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

use rustix::event::{EventfdFlags, eventfd};

/// A thread that waits. Dropping this ends it: nothing of what it holds is held any more then.
pub struct Waiter {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Waiter {
    /// Starts the thread. `wait` returns once the descriptor that it is given can be read, and must never wait for the
    /// thread that has the `Waiter`.
    pub fn start(name: &str, wait: impl FnOnce(&OwnedFd) + Send + 'static) -> io::Result<Waiter> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = Builder::new().name(name.into()).spawn(move || wait(&stopped))?;
        Ok(Waiter { stop, thread: Some(thread) })
    }
}

/// Has the calling thread run as soon as it can, whatever else wants its CPU: for one whose work is a matter of
/// microseconds, and late by the next tick. (Since 6.6 a fair thread that is woken waits until the one that runs has had its
/// slice, however great its weight.)
pub fn run_first() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    // What it starts is not like it.
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameters are there for the call, which changes nothing but how this thread is scheduled.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let told = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if told.is_ok()
            && let Some(thread) = self.thread.take()
        {
            // It has not panicked, or has said so itself.
            let _ = thread.join();
        }
    }
}
