//! What only CAP_SYS_ADMIN may open, opened by a process that does nothing else (`shaper-opener`) and handed over as a
//! descriptor: so the agent, which hears and does so much, can be without the capability that makes the others matter little.
//!
//! There are three such things: an fanotify(7) group that is told whose each write is; a walk of a BPF iterator in another
//! network namespace, into which somebody has to go with setns(2); and an empty network namespace, to try in what the kernel
//! has. With the first its holder may watch what it can open by itself; the second runs a program that its holder has loaded
//! already; and of the third it has a socket. The opener opens no path that it is told.
//!
//! A conversation is one message each way on a `SOCK_SEQPACKET`: a byte that says what, with the descriptors that it takes;
//! and an errno as four bytes in the machine's order, with the descriptor if that is 0.

use std::{
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
        listen, recvmsg, sendmsg, socket_with,
        sockopt::{Timeout, set_socket_timeout, socket_peercred},
    },
};

use crate::kernel::{leave_network, netns, open_netlink, open_walk, writers};

/// Where it listens, unless it is told otherwise.
pub const SOCKET: &str = "/run/shaper-opener/opener.sock";

/// A peer that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Those that may wait for their turn.
const BACKLOG: i32 = 8;
const DESCRIPTORS_MAX: usize = 2;

const WRITERS: u8 = 1;
const WALK: u8 = 2;
const NETWORK: u8 = 3;

/// A way to have something opened: here, or where that is not allowed, by `shaper-opener`.
#[derive(Clone, Debug)]
pub struct Opener(PathBuf);

impl Opener {
    /// With the opener that listens there.
    pub fn at(socket: PathBuf) -> Opener {
        Opener(socket)
    }

    /// An fanotify group.
    pub fn writers(&self) -> io::Result<OwnedFd> {
        or_else(writers::open_group(), || self.ask(WRITERS, &[]))
    }

    /// A walk of the iterator behind `link` in `namespace`.
    pub fn walk(&self, link: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        or_else(netns::within(namespace, || open_walk(link)), || self.ask(WALK, &[link, namespace]))
    }

    /// A socket of rtnetlink in a network namespace that ends with it.
    pub fn network(&self) -> io::Result<OwnedFd> {
        or_else(empty_network(), || self.ask(NETWORK, &[]))
    }

    fn ask(&self, what: u8, with: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
        let socket = seqpacket()?;
        connect(&socket, &SocketAddrUnix::new(&self.0)?)?;
        be_patient(&socket)?;
        send(&socket, &[what], with)?;
        let mut answer = [0; 4];
        let (length, mut descriptors) = receive(&socket, &mut answer)?;
        match (length, i32::from_ne_bytes(answer), descriptors.pop()) {
            (4, 0, Some(opened)) => Ok(opened),
            (4, errno, None) if errno != 0 => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::other("the opener's answer makes no sense: is it of another version?")),
        }
    }
}

impl Default for Opener {
    /// With the opener that listens where it does as a rule.
    fn default() -> Opener {
        Opener(SOCKET.into())
    }
}

fn empty_network() -> io::Result<OwnedFd> {
    let within = thread::spawn(|| {
        leave_network()?;
        open_netlink()
    });
    within.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

/// The second way where the first is not allowed, and the first one's error where there is no second.
fn or_else(first: io::Result<OwnedFd>, second: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    match first {
        Err(refused) if refused.kind() == io::ErrorKind::PermissionDenied => match second() {
            Err(absent)
                if matches!(absent.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Err(refused)
            }
            other => other,
        },
        other => other,
    }
}

/// Opens what it is asked for, for root alone, until it cannot listen any more.
pub fn serve(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = seqpacket()?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before it listens.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&listener, BACKLOG)?;
    tracing::info!(socket = %path.display(), "ready");
    loop {
        let peer = match accept_with(&listener, SocketFlags::CLOEXEC) {
            Ok(peer) => peer,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(error) => return Err(error.into()),
        };
        if let Err(error) = answer(&peer) {
            tracing::warn!(%error, "a request was not answered");
        }
    }
}

fn answer(peer: &OwnedFd) -> io::Result<()> {
    let who = socket_peercred(peer)?;
    if !who.uid.is_root() {
        return send(peer, &Errno::ACCESS.raw_os_error().to_ne_bytes(), &[]);
    }
    be_patient(peer)?;
    let mut what = [0];
    let (length, descriptors) = receive(peer, &mut what)?;
    let opened = match (length, what, &descriptors[..]) {
        (1, [WRITERS], []) => writers::open_group(),
        (1, [WALK], [link, namespace]) => netns::within(namespace.as_fd(), || open_walk(link.as_fd())),
        (1, [NETWORK], []) => empty_network(),
        _ => Err(Errno::INVAL.into()),
    };
    let [what] = what;
    tracing::info!(pid = who.pid.as_raw_nonzero().get(), what, error = ?opened.as_ref().err(), "opened");
    match opened {
        Ok(opened) => send(peer, &0i32.to_ne_bytes(), &[opened.as_fd()]),
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            send(peer, &errno.to_ne_bytes(), &[])
        }
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn be_patient(socket: &OwnedFd) -> io::Result<()> {
    for direction in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(socket, direction, Some(PATIENCE))?;
    }
    Ok(())
}

fn send(socket: &OwnedFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::MSGSIZE.into());
    }
    sendmsg(socket, &[io::IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: &OwnedFd, message: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(message)];
    let received = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok((received.bytes, descriptors.flatten().collect()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// An opener on a thread, which ends with the process.
    fn opener() -> (tempfile::TempDir, Opener) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("opener.sock");
        let served = path.clone();
        thread::spawn(move || serve(&served));
        let opener = Opener::at(path);
        // Whatever it answers.
        while matches!(opener.ask(0, &[]), Err(error) if error.raw_os_error() != Some(libc::EINVAL)) {
            thread::yield_now();
        }
        (place, opener)
    }

    #[test]
    fn a_group_comes_back_and_everything_else_is_refused() {
        let (place, opener) = opener();
        let path = place.path().join("opener.sock");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        match opener.ask(WRITERS, &[]) {
            Ok(group) => writers::watch(group.as_fd(), fs::File::open(place.path()).unwrap()).unwrap(),
            // Without CAP_SYS_ADMIN nobody has it.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
        let file = fs::File::open("/proc/self/ns/net").unwrap();
        for (what, with) in
            [(0, &[][..]), (WALK, &[]), (WALK, &[file.as_fd()]), (WRITERS, &[file.as_fd()]), (4, &[])]
        {
            let refused = opener.ask(what, with).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "{what}: {refused}");
        }
        // No iterator, and no namespace.
        for with in [[file.as_fd(), file.as_fd()], [file.as_fd(), fs::File::open("/").unwrap().as_fd()]] {
            assert!(opener.ask(WALK, &with).is_err());
        }
    }

    #[test]
    fn without_an_opener_the_kernels_own_refusal_is_told() {
        let refused = || Err(io::Error::from(Errno::PERM));
        let nobody = Opener::at("/nonexistent/opener.sock".into());
        let error = or_else(refused(), || nobody.ask(WRITERS, &[])).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        // And what is wrong with one that is there.
        let error = or_else(refused(), || Err(Errno::INVAL.into())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
