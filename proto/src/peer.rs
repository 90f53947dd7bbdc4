//! A Unix socket whose server knows its callers, as the kernel names them (SO_PEERCRED,
//! SO_PEERGROUPS). Behind the feature `server`: a client needs none of it.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    pin::Pin,
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

/// A connection that knows its caller from the moment it was accepted.
pub struct PeerStream {
    stream: UnixStream,
    caller: Caller,
}

impl PeerStream {
    /// Asks the kernel who is at the other end.
    pub fn identify(stream: UnixStream) -> io::Result<PeerStream> {
        let caller = Caller::of_peer(&stream)?;
        Ok(PeerStream { stream, caller })
    }
}

impl Connected for PeerStream {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
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
    match fs::remove_file(socket) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(failed("replace", socket)(source));
        }
        _ => {}
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

/// The connections of `listener`, each with its caller, and the task that accepts them.
pub fn incoming(listener: UnixListener) -> (ReceiverStream<io::Result<PeerStream>>, JoinHandle<()>) {
    let (connections, incoming) = mpsc::channel(16);
    let accept = tokio::spawn(async move {
        loop {
            match listener.accept().await.and_then(|(stream, _)| PeerStream::identify(stream)) {
                Ok(stream) => {
                    if connections.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
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
