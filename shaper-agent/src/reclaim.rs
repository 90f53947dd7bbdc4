//! Reclaim beside everything else: writing `memory.reclaim` takes as long as the kernel tries, so it is done on a thread
//! that has nothing else to do, and a signal ends it.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicI32, Ordering::SeqCst},
};

use shaper_core::units::Bytes;
use tokio::runtime;

use crate::kernel::cgroup::{
    CgroupError,
    memory::{Reclaimed, Reclaimer},
};

/// What ends a system call of ours: nobody else uses it.
const SIGNAL: i32 = libc::SIGURG;

/// A chunk of reclaim that may be under way. Dropping this asks the kernel to leave it at that.
pub struct Chunk {
    state: Arc<State>,
}

struct State {
    /// The thread that waits in the kernel; 0 before and after.
    thread: AtomicI32,
    is_unwanted: AtomicBool,
}

impl Chunk {
    /// Has the kernel reclaim `amount`, and calls `done` on another thread when it has tried.
    pub fn start(
        runtime: &runtime::Handle,
        reclaimer: Arc<Reclaimer>,
        amount: Bytes,
        done: impl FnOnce(Result<Reclaimed, CgroupError>) + Send + 'static,
    ) -> Chunk {
        can_be_interrupted();
        let state = Arc::new(State { thread: AtomicI32::new(0), is_unwanted: AtomicBool::new(false) });
        let own = Arc::clone(&state);
        runtime.spawn_blocking(move || {
            own.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), SeqCst);
            let reclaimed = if own.is_unwanted.load(SeqCst) {
                Ok(Reclaimed::Interrupted)
            } else {
                reclaimer.reclaim(amount)
            };
            own.thread.store(0, SeqCst);
            done(reclaimed);
        });
        Chunk { state }
    }

    /// Asks the kernel to leave it at what it has. A signal that comes just before the system call is lost: what must be
    /// sure asks again.
    pub fn interrupt(&self) {
        self.state.is_unwanted.store(true, SeqCst);
        let thread = self.state.thread.load(SeqCst);
        if thread != 0 {
            interrupt(thread);
        }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.interrupt();
    }
}

/// The signal has to reach a handler: one that is ignored interrupts nothing.
fn can_be_interrupted() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    extern "C" fn nothing(_signal: libc::c_int) {}
    INSTALLED.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int) = nothing;
        // SAFETY: zeros are a valid `sigaction`; the handler does nothing, so it may run anywhere. Other system calls that it
        // meets are restarted.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut())
        };
        if installed != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, "reclaim that is under way cannot be interrupted");
        }
    });
}

fn interrupt(thread: i32) {
    // SAFETY: the call takes numbers. A thread that has gone on, or has ended, is not harmed.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A pipe that nobody writes to, in place of a kernel that is busy.
    #[test]
    fn a_thread_that_waits_in_the_kernel_is_woken() {
        can_be_interrupted();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let state = Arc::new(State { thread: AtomicI32::new(0), is_unwanted: AtomicBool::new(false) });
        let own = Arc::clone(&state);
        let waiting = std::thread::spawn(move || {
            own.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), SeqCst);
            // poll(2) is never restarted.
            let mut ready = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut ready, None)
        });
        let chunk = Chunk { state };
        while !waiting.is_finished() {
            chunk.interrupt();
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(waiting.join().unwrap(), Err(rustix::io::Errno::INTR));
    }
}
