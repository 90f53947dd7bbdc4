//! A Unix socket whose server knows its callers, as the kernel names them (SO_PEERCRED,
//! SO_PEERGROUPS, SO_PEERPIDFD). Behind the feature `server`: a client needs none of it.

use std::{
    collections::HashMap,
    fs,
    hash::Hash,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::{FileTypeExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use shaper_core::task::Owner;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// A user with their groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Caller {
    /// uid 0: may do everything.
    pub fn is_operator(&self) -> bool {
        self.uid == 0
    }

    /// Whether a task of this owner is theirs to see and to act on.
    pub fn may_use(&self, owner: &Owner) -> bool {
        self.is_operator() || self.uid == owner.uid
    }

    /// As the owner of a task.
    pub fn as_owner(&self) -> Owner {
        Owner { uid: self.uid, gid: self.gid }
    }

    fn of_peer(stream: &UnixStream) -> io::Result<Caller> {
        let credentials = stream.peer_cred()?;
        let groups = peer_groups(stream)?;
        Ok(Caller { uid: credentials.uid(), gid: credentials.gid(), groups })
    }
}

#[allow(unsafe_code, reason = "no safe wrapper knows SO_PEERGROUPS")]
fn peer_groups(stream: &impl AsFd) -> io::Result<Vec<u32>> {
    // NGROUPS_MAX.
    let mut groups = vec![0u32; 65_536];
    let mut length = (groups.len() * size_of::<u32>()) as libc::socklen_t;
    // SAFETY: the buffer is as long as said, and the kernel writes no more than that.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(length as usize / size_of::<u32>());
    Ok(groups)
}

/// A process that has connected, or what was one: the descriptor never means another.
#[derive(Debug)]
pub struct PeerProcess {
    /// Its process id when it connected.
    pub pid: u32,
    /// It.
    pub pidfd: OwnedFd,
}

impl PeerProcess {
    /// `None`: the kernel does not know that (before 6.5), or the process is gone already.
    fn of_peer(stream: &UnixStream) -> io::Result<Option<PeerProcess>> {
        let pid = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok());
        // 0: it is in a process namespace that this one does not contain.
        let Some(pid) = pid.filter(|pid| *pid != 0) else { return Ok(None) };
        Ok(peer_pidfd(stream).ok().map(|pidfd| PeerProcess { pid, pidfd }))
    }

    /// Whether the kernel can say who has connected.
    pub fn probe() -> io::Result<bool> {
        let (one, _other) = std::os::unix::net::UnixStream::pair()?;
        match peer_pidfd(&one) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[allow(unsafe_code, reason = "no safe wrapper knows SO_PEERPIDFD")]
fn peer_pidfd(stream: &impl AsFd) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the buffer is as long as said, and the kernel writes one descriptor there.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us (close-on-exec, as every pidfd).
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Who is at the other end of a Unix socket.
#[derive(Clone, Debug)]
pub struct LocalPeer {
    /// As which user.
    pub caller: Caller,
    /// Which process, where the kernel says so.
    pub process: Option<Arc<PeerProcess>>,
}

/// How many of something each user, or whoever else `K` tells apart, may have at once.
pub struct Admission<K = u32> {
    most: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

/// One of them, until it is dropped.
pub struct Permit<K: Eq + Hash = u32> {
    whose: K,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Eq + Hash + Clone> Admission<K> {
    /// `most` for each.
    pub fn new(most: usize) -> Admission<K> {
        Admission { most, held: Arc::default() }
    }

    /// `None`: they have them all.
    pub fn admit(&self, whose: K) -> Option<Permit<K>> {
        let mut held = lock(&self.held);
        let count = held.entry(whose.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Permit { whose, held: Arc::clone(&self.held) })
    }
}

impl<K: Eq + Hash> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        if let Some(count) = held.get_mut(&self.whose) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.whose);
            }
        }
    }
}

/// The counts are whole whatever befell another thread.
fn lock<K>(held: &Mutex<HashMap<K, usize>>) -> MutexGuard<'_, HashMap<K, usize>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that knows its caller from the moment it was accepted.
pub struct PeerStream {
    stream: UnixStream,
    peer: LocalPeer,
    _permit: Option<Permit>,
}

impl PeerStream {
    /// Asks the kernel who is at the other end. `None`: they have as many connections as they may; root may have any number.
    pub fn identify(stream: UnixStream, admission: &Admission) -> io::Result<Option<PeerStream>> {
        let caller = Caller::of_peer(&stream)?;
        let permit = if caller.is_operator() { None } else { admission.admit(caller.uid) };
        if permit.is_none() && !caller.is_operator() {
            return Ok(None);
        }
        let process = PeerProcess::of_peer(&stream)?.map(Arc::new);
        Ok(Some(PeerStream { stream, peer: LocalPeer { caller, process }, _permit: permit }))
    }
}

impl Connected for PeerStream {
    type ConnectInfo = LocalPeer;

    fn connect_info(&self) -> LocalPeer {
        self.peer.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct BindError {
    /// What was tried.
    pub operation: &'static str,
    /// With what.
    pub path: PathBuf,
    /// What the kernel said.
    pub source: io::Error,
}

/// Makes the socket, which nobody can connect to before it has its mode (0660) and group. Changes the
/// process's umask for a moment, so no other thread may make files meanwhile.
pub fn bind(socket: &Path, group: u32) -> Result<UnixListener, BindError> {
    let failed = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| BindError { operation, path, source }
    };
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).map_err(failed("make", directory))?;
    }
    match fs::symlink_metadata(socket) {
        Ok(found) if !found.file_type().is_socket() => {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "it is there, and is no socket");
            return Err(failed("listen on", socket)(source));
        }
        Ok(_) => fs::remove_file(socket).map_err(failed("replace", socket))?,
        Err(_) => {}
    }
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(mask);
    let listener = listener.map_err(failed("listen on", socket))?;
    chown(socket, None, Some(group)).map_err(failed("give its group to", socket))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o660))
        .map_err(failed("open to its group", socket))?;
    Ok(listener)
}

/// How long to wait after a connection could not be accepted: the next may do better.
const RETRY: Duration = Duration::from_millis(10);

/// Connections that one user other than root may have at once.
const CONNECTIONS_PER_USER: usize = 64;

/// The connections of `listener`, each with its caller, and the task that accepts them. A user who has as
/// many as one may have is hung up on.
pub fn incoming(listener: UnixListener) -> (ReceiverStream<io::Result<PeerStream>>, JoinHandle<()>) {
    let (connections, incoming) = mpsc::channel(16);
    let admission = Admission::new(CONNECTIONS_PER_USER);
    let accept = tokio::spawn(async move {
        loop {
            let connection = listener.accept().await;
            match connection.and_then(|(stream, _)| PeerStream::identify(stream, &admission)) {
                Ok(Some(stream)) => {
                    if connections.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => {}
                // One caller that went away, or too many open files.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    });
    (ReceiverStream::new(incoming), accept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cannot_take_what_is_for_all() {
        let admission = Admission::new(2);
        let first = admission.admit(1);
        let second = admission.admit(1);
        assert!(first.is_some() && second.is_some() && admission.admit(1).is_none());
        assert!(admission.admit(2).is_some());
        drop(first);
        assert!(admission.admit(1).is_some());
    }
}
