//! Processes that others started: by pidfd, never by a number that may be another's by now.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
    thread,
};

use shaper_core::task::ExitStatus;
use shaper_proto::peer::PeerProcess;

use super::hierarchy::place_in;
use crate::launch::attempt::parse_start_time;

/// What /proc says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its cgroup, from the mount point of cgroup v2 on.
    pub cgroup: PathBuf,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// Whether it is in a process namespace below ours, as one in a container is.
    pub is_contained: bool,
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}

fn not_understood(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/PID/{file} is not understood"))
}

impl Facts {
    /// Reads them; ESRCH if the process has ended.
    pub fn of(process: &PeerProcess) -> io::Result<Facts> {
        let read = |file: &str| fs::read(format!("/proc/{}/{file}", process.pid));
        let cgroup = String::from_utf8_lossy(&read("cgroup")?).into_owned();
        let status = String::from_utf8_lossy(&read("status")?).into_owned();
        let stat = read("stat")?;
        // If the number is its own now, it was when that was read.
        if number_of(process.pidfd.as_fd())? != Some(process.pid) {
            return Err(gone());
        }
        Ok(Facts {
            cgroup: place_in(&cgroup, None).ok_or_else(|| not_understood("cgroup"))?,
            start_time: parse_start_time(&stat).ok_or_else(|| not_understood("stat"))?,
            is_contained: is_contained(&status).ok_or_else(|| not_understood("status"))?,
        })
    }
}

/// From `/proc/<pid>/status`: it has one number for each process namespace that it is in, from ours on.
fn is_contained(status: &str) -> Option<bool> {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    Some(numbers.split_ascii_whitespace().count() > 1)
}

/// The process id that a pidfd stands for; `None`: it has ended and was reaped, so that the number is free.
fn number_of(pidfd: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let number = number.ok_or_else(|| not_understood("fdinfo"))?.trim();
    Ok(number.parse().ok())
}

/// Does something that names a process by its number, while the number cannot become another's: who is traced, is not
/// reaped by its parent before its tracer lets go. The process is not stopped. ESRCH: it has ended, and nothing was done.
pub fn while_held<T: Send>(process: &PeerProcess, work: impl FnOnce(u32) -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        // A tracer is a thread, and lets go at its end. (To let go earlier, the process would have to be stopped.)
        let holder = thread::Builder::new().name("hold".into()).spawn_scoped(scope, || {
            seize(process.pid)?;
            if number_of(process.pidfd.as_fd())? != Some(process.pid) {
                return Err(gone());
            }
            Ok(work(process.pid))
        })?;
        holder.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn seize(pid: u32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| gone())?;
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: with these arguments nothing of ours is read or written.
    match unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, nothing, nothing) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct pidfd_info` as of Linux 6.13; `exit_code` has a meaning since 6.15.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// `_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)`
const PIDFD_GET_INFO: libc::c_ulong = (3 << 30) | ((size_of::<PidfdInfo>() as libc::c_ulong) << 16) | 0xff0b;
const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// How a process that was not a child of ours ended; `None`: it was not reaped yet, or this kernel does not tell.
pub fn exit_status(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the structure is as long as the request says, and the kernel writes no more than that.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut info) };
    if result < 0 || info.mask & PIDFD_INFO_EXIT == 0 {
        return None;
    }
    Some(match info.exit_code & 0x7f {
        0 => ExitStatus::Code(info.exit_code >> 8 & 0xff),
        signal => ExitStatus::Signal(signal),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::fd::OwnedFd,
        process::{Child, Command, Stdio},
    };

    use rustix::process::{Pid, Signal};

    use super::*;
    use crate::launch;

    fn child(script: &str) -> (Child, PeerProcess) {
        let child = Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let pidfd: OwnedFd = launch::pidfd(pid).unwrap();
        (child, PeerProcess { pid, pidfd })
    }

    /// Whose parent is another process than the tracer, as that of one that asks is: a parent gets what it traces itself.
    #[test]
    fn who_is_held_keeps_its_number_after_its_end() {
        // The parent says that it has looked for the end of its child once more, as often as it is asked, and then that it
        // has got it.
        let script = "trap 'echo looked' USR1; exec 3<&0; { read line <&3; } & echo $!; \
                      while wait $!; [ $? -gt 128 ]; do :; done; echo reaped";
        let mut parent = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
        let pid: u32 = said.next().unwrap().parse().unwrap();
        let process = PeerProcess { pid, pidfd: launch::pidfd(pid).unwrap() };
        let asks = |parent: &Child| {
            rustix::process::kill_process(Pid::from_child(parent), Signal::USR1).unwrap();
        };
        let (heard, said) = while_held(&process, |_| {
            drop(parent.stdin.take());
            let mut ready = [rustix::event::PollFd::new(&process.pidfd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut ready, None).unwrap();
            // Between the two it has looked for it, after its end.
            let heard = [0, 1].map(|_| {
                asks(&parent);
                said.next().unwrap()
            });
            (heard, said)
        })
        .unwrap();
        assert_eq!(heard, ["looked", "looked"], "it was reaped while it was held");
        assert_eq!(said.collect::<Vec<_>>(), ["reaped"]);
        parent.wait().unwrap();
        let refused = while_held(&process, |_| ()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ESRCH), "{refused}");
        assert_eq!(Facts::of(&process).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_number_that_is_anothers_now_is_not_taken_for_it() {
        let (mut ended, was) = child("exit 0");
        ended.wait().unwrap();
        let (mut other, is) = child("read line");
        let forged = PeerProcess { pid: is.pid, pidfd: was.pidfd };
        let refused = while_held(&forged, |_| ()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ESRCH), "{refused}");
        assert_eq!(Facts::of(&forged).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert!(!Facts::of(&is).unwrap().is_contained);
        drop(other.stdin.take());
        other.wait().unwrap();
    }

    #[test]
    fn the_end_of_anothers_child_is_known_where_the_kernel_tells() {
        for (script, expected) in [("exit 7", ExitStatus::Code(7)), ("kill -9 $$", ExitStatus::Signal(9))] {
            let (mut child, process) = child(script);
            child.wait().unwrap();
            match exit_status(process.pidfd.as_fd()) {
                Some(status) => assert_eq!(status, expected),
                None => assert!(!crate::kernel::features::is_at_least(6, 15), "this kernel tells"),
            }
        }
    }

    #[test]
    fn a_process_in_a_container_has_more_numbers_than_one() {
        assert_eq!(is_contained("Name:\ta\nNSpid:\t17\n"), Some(false));
        assert_eq!(is_contained("Name:\ta\nNSpid:\t17\t1\n"), Some(true));
        assert_eq!(is_contained("Name:\ta\n"), None);
    }
}
