//! `shaper-warden`: takes back what the agent has lent when the agent cannot any more.
//!
//! The agent starts one before its first loan, in a cgroup of high weight. It waits for the end of the agent (by a pidfd, so
//! that no later process of the same id is mistaken for it) and looks four times a second whether the agent's heartbeat is
//! older than a second, as it is while the agent is stopped. In either case it writes back what [`crate::lease`] names. It
//! has no configuration, no connection and no say in what is lent; it ends with its agent, and when another agent has begun.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, getppid, pidfd_open},
};

use crate::{
    kernel::mapped::monotonic_ns,
    lease::{LeaseError, Leases, Taken},
};

/// An agent that has not been heard of for so long does not look after its loans.
pub const SILENCE_NS: u64 = 1_000_000_000;
/// How often that is looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// What went wrong with a warden.
#[derive(Debug, thiserror::Error)]
pub enum WardenError {
    /// The table.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The agent.
    #[error("cannot {verb} the agent, process {pid}")]
    Agent {
        /// What was tried.
        verb: &'static str,
        /// Its process id.
        pid: u32,
        /// What went wrong.
        source: io::Error,
    },
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The agent is at work.
    Wait,
    /// It is not, but may come back.
    TakeBack,
    /// It will not come back.
    TakeBackAndEnd,
    /// Another has taken its place.
    End,
}

fn judge(is_current: bool, is_over: bool, last_beat_ns: u64, now_ns: u64) -> Verdict {
    match (is_current, is_over) {
        (false, _) => Verdict::End,
        (true, true) => Verdict::TakeBackAndEnd,
        (true, false) if now_ns.saturating_sub(last_beat_ns) > SILENCE_NS => Verdict::TakeBack,
        (true, false) => Verdict::Wait,
    }
}

/// Watches the agent `pid`, which must be the parent, in the epoch `epoch` of the table at `path`, until either is over.
pub fn watch(path: &Path, epoch: u64, pid: u32) -> Result<(), WardenError> {
    let error = |verb| move |errno: rustix::io::Errno| WardenError::Agent { verb, pid, source: errno.into() };
    let Some(leases) = Leases::open(path, epoch)? else { return Ok(()) };
    let agent = agent(pid).map_err(error("find"))?;
    loop {
        let is_over = match &agent {
            None => true,
            Some(agent) => match poll(&mut [PollFd::new(agent, PollFlags::IN)], Some(&LOOK)) {
                Ok(ended) => ended > 0,
                Err(rustix::io::Errno::INTR) => false,
                Err(errno) => return Err(error("wait for")(errno)),
            },
        };
        match judge(leases.is_current(), is_over, leases.last_beat_ns(), monotonic_ns()) {
            Verdict::Wait => {}
            Verdict::End => return Ok(()),
            Verdict::TakeBackAndEnd => {
                report(leases.take_back()?.unwrap_or_default());
                return Ok(());
            }
            Verdict::TakeBack if leases.is_anything_lent() => report(leases.take_back()?.unwrap_or_default()),
            Verdict::TakeBack => {}
        }
    }
}

/// The agent, which started this process; `None` if it has ended since.
fn agent(pid: u32) -> Result<Option<OwnedFd>, rustix::io::Errno> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    // It was the parent before this process began, so if it still is, the pidfd is of no other.
    Ok((getppid() == Some(raw)).then_some(pidfd))
}

fn report(taken: Vec<Taken>) {
    for Taken { cgroup, result } in taken {
        match result {
            Ok(true) => eprintln!("shaper-warden: {}: what was lent is taken back", cgroup.display()),
            Ok(false) => {}
            Err(error) => {
                eprintln!("shaper-warden: {}: cannot take back what was lent: {error}", cgroup.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_given_up_by_its_end_its_silence_or_its_successor() {
        const SECOND: u64 = 1_000_000_000;
        assert_eq!(judge(true, false, 5 * SECOND, 6 * SECOND), Verdict::Wait);
        assert_eq!(judge(true, false, 5 * SECOND, 6 * SECOND + 1), Verdict::TakeBack);
        assert_eq!(judge(true, true, 5 * SECOND, 5 * SECOND), Verdict::TakeBackAndEnd);
        assert_eq!(judge(false, true, 5 * SECOND, 9 * SECOND), Verdict::End);
        // A beat of a moment ago may be newer than the time that was read.
        assert_eq!(judge(true, false, 5 * SECOND + 1, 5 * SECOND), Verdict::Wait);
    }

    #[test]
    fn whoever_is_not_the_parent_is_not_watched() {
        assert!(agent(std::process::id()).unwrap().is_none());
        assert!(agent(std::os::unix::process::parent_id()).unwrap().is_some());
    }
}
