//! What a program does to its own sockets that the standard library has no name for.
#![allow(unsafe_code, reason = "libc's functions take raw pointers")]

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// No rate.
pub(crate) const UNPACED: u32 = u32::MAX;

/// Sets `SO_MAX_PACING_RATE`, bytes a second.
pub(crate) fn set_pacing_rate(socket: &impl AsRawFd, rate: u32) -> io::Result<()> {
    let (value, length) = ((&raw const rate).cast(), size_of::<u32>() as libc::socklen_t);
    // SAFETY: a live descriptor, and four bytes of this stack.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, value, length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A packet socket that sends frames through one device.
pub(crate) struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Of the device with that number.
    pub(crate) fn on(device: u32) -> io::Result<PacketSocket> {
        // SAFETY: no pointers; the descriptor is new and nobody else's.
        let socket = unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if socket < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(socket)
        };
        // SAFETY: plain numbers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = device.cast_signed();
        let (at, length) = ((&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t);
        // SAFETY: a live descriptor, and an address of this stack.
        let result = unsafe { libc::bind(socket.as_raw_fd(), at, length) };
        if result == 0 { Ok(PacketSocket(socket)) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a frame as it is.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: a live descriptor, and the bytes of a slice.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
