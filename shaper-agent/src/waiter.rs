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
