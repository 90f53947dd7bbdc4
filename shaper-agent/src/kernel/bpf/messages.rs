//! What the kernel programs say, in the log.

use std::os::fd::{AsRawFd, BorrowedFd};

use aya::Ebpf;

/// Hands the programs' debug messages to the log, on a thread that waits for them.
pub(super) fn forward(ebpf: &mut Ebpf) {
    let mut logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!("no debug messages from the kernel programs: {error}");
            return;
        }
    };
    let wait = move || {
        loop {
            let fd = logger.as_raw_fd();
            // SAFETY: the ring buffer's descriptor, open as long as the logger that this thread owns.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let mut ready = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => logger.flush(),
                Err(error) => {
                    tracing::warn!("no more debug messages from the kernel programs: {error}");
                    return;
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("bpf-log".into()).spawn(wait) {
        tracing::warn!("no debug messages from the kernel programs: {error}");
    }
}
