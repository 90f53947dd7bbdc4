//! Who calls, as the kernel says (SO_PEERCRED, SO_PEERGROUPS), and what they may do.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    task::{Context, Poll},
};

use shaper_core::task::Owner;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
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
