//! Requests of rtnetlink, in the network namespace of the calling thread, or in that which it reaches by a socket ([`through`]):
//! one message with its attributes, and what answers it. Numbers are in the machine's order, as everywhere in rtnetlink.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_DELLINK: u16 = 17;
pub(super) const RTM_GETLINK: u16 = 18;
pub(super) const RTM_SETLINK: u16 = 19;
pub(super) const RTM_NEWQDISC: u16 = 36;
pub(super) const RTM_DELQDISC: u16 = 37;
pub(super) const RTM_NEWTCLASS: u16 = 40;
pub(super) const RTM_DELTCLASS: u16 = 41;
pub(super) const RTM_GETTCLASS: u16 = 42;
pub(super) const RTM_NEWTFILTER: u16 = 44;
pub(super) const RTM_DELTFILTER: u16 = 45;
pub(super) const RTM_GETTFILTER: u16 = 46;

const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_ACK: u16 = 4;
/// What answers a request about one thing is sent to whoever asked.
pub(super) const NLM_F_ECHO: u16 = 8;
pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE: u16 = 0x3fff;

const HEADER: usize = 16;
/// `struct ifinfomsg`
pub(super) const LINK: usize = 16;
/// `struct tcmsg`
pub(super) const TRAFFIC_CONTROL: usize = 20;

thread_local! {
    /// Of another network namespace, as long as this thread talks to that.
    static ELSEWHERE: RefCell<Option<OwnedFd>> = const { RefCell::new(None) };
}

/// A socket for requests in the network namespace of the calling thread.
pub(crate) fn open() -> io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?)
}

/// Runs `action`, whose requests go through `socket`.
pub(super) fn through<T>(socket: OwnedFd, action: impl FnOnce() -> T) -> T {
    let before = ELSEWHERE.replace(Some(socket));
    let done = action();
    ELSEWHERE.set(before);
    done
}

/// A message that is being written.
pub(super) struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16) -> Request {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend(0u32.to_ne_bytes()); // nlmsg_len: when it is sent
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(1u32.to_ne_bytes()); // nlmsg_seq
        bytes.extend(0u32.to_ne_bytes()); // nlmsg_pid: the kernel
        Request(bytes)
    }

    /// About a device; `index` 0: by its name, in an attribute. `flags` are those of the device that are changed to 1.
    pub(super) fn link(kind: u16, flags: u16, index: u32, device_flags: u32) -> Request {
        let mut request = Request::new(kind, flags);
        request.0.extend([0; 4]); // ifi_family, padding, ifi_type
        for word in [index, device_flags, device_flags] {
            request.0.extend(word.to_ne_bytes());
        }
        request
    }

    /// About a queueing discipline, a class or a filter of a device.
    pub(super) fn traffic_control(
        kind: u16,
        flags: u16,
        index: u32,
        handle: u32,
        parent: u32,
        info: u32,
    ) -> Request {
        let mut request = Request::new(kind, flags);
        request.0.extend([0; 4]); // tcm_family and padding
        for word in [index, handle, parent, info] {
            request.0.extend(word.to_ne_bytes());
        }
        request
    }

    /// With an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Request {
        let length = 4 + value.len();
        self.0.extend((length as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// With a text that ends as in C.
    pub(super) fn with_text(self, kind: u16, value: &str) -> Request {
        self.with(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// With attributes in an attribute.
    pub(super) fn with_nested(mut self, kind: u16, inner: impl FnOnce(Request) -> Request) -> Request {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NLA_F_NESTED).to_ne_bytes());
        let mut request = inner(self);
        let length = (request.0.len() - start) as u16;
        request.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        request
    }

    /// Sends it; returns the messages that answer it. It must ask for an acknowledgement or a dump: their end is awaited.
    pub(super) fn send(mut self) -> io::Result<Vec<Message>> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        ELSEWHERE.with_borrow(|elsewhere| match elsewhere {
            Some(socket) => self.send_by(socket.as_fd()),
            None => self.send_by(open()?.as_fd()),
        })
    }

    fn send_by(&self, socket: BorrowedFd<'_>) -> io::Result<Vec<Message>> {
        send(socket, &self.0, SendFlags::empty())?;
        let mut messages = Vec::new();
        let mut buffer = vec![0u8; 1 << 16];
        loop {
            let (length, _) = recv(socket, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER {
                let size = (word(rest, 0).unwrap_or(0) as usize).clamp(HEADER, rest.len());
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                match kind {
                    NLMSG_ERROR => {
                        let errno = word(rest, HEADER).unwrap_or(0) as i32;
                        return match errno {
                            0 => Ok(messages),
                            _ => Err(io::Error::from_raw_os_error(-errno)),
                        };
                    }
                    NLMSG_DONE => return Ok(messages),
                    _ => messages.push(Message { kind, payload: rest[HEADER..size].to_vec() }),
                }
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
            }
        }
    }
}

/// A message that came.
pub(super) struct Message {
    /// Its type.
    pub(super) kind: u16,
    payload: Vec<u8>,
}

impl Message {
    /// A word of the structure that it begins with.
    pub(super) fn word(&self, at: usize) -> u32 {
        word(&self.payload, at).unwrap_or(0)
    }

    /// The attribute at the end of a path, behind a structure of that size.
    pub(super) fn attribute(&self, structure: usize, path: &[u16]) -> Option<&[u8]> {
        let mut inside = self.payload.get(structure..)?;
        for wanted in path {
            inside = attribute(inside, *wanted)?;
        }
        Some(inside)
    }
}

fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while rest.len() >= 4 {
        let size = usize::from(u16::from_ne_bytes([rest[0], rest[1]])).clamp(4, rest.len());
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & NLA_TYPE;
        if kind == wanted {
            return rest.get(4..size);
        }
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
    }
    None
}

/// A number of 32 bits.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_where_they_were_written() {
        let request = Request::link(RTM_GETLINK, NLM_F_ACK, 7, 1)
            .with_text(3, "lo")
            .with_nested(18, |inner| inner.with(1, &[5]).with_text(2, "ifb"));
        assert!(request.0.len().is_multiple_of(4));
        let message = Message { kind: RTM_GETLINK, payload: request.0[HEADER..].to_vec() };
        assert_eq!((message.word(4), message.word(8)), (7, 1));
        assert_eq!(message.attribute(LINK, &[3]), Some(&b"lo\0"[..]));
        assert_eq!(message.attribute(LINK, &[18, 2]), Some(&b"ifb\0"[..]));
        assert_eq!(message.attribute(LINK, &[18, 1]), Some(&[5u8][..]));
        assert_eq!(message.attribute(LINK, &[4]), None);
    }

    #[test]
    fn the_kernel_answers() {
        let lo = Request::link(RTM_GETLINK, NLM_F_ACK, 0, 0).with_text(3, "lo").send().unwrap();
        assert_eq!(lo[0].kind, RTM_NEWLINK);
        assert_eq!(lo[0].attribute(LINK, &[3]), Some(&b"lo\0"[..]));
        let missing = Request::link(RTM_GETLINK, NLM_F_ACK, 0, 0).with_text(3, "no-such-device").send();
        assert_eq!(missing.err().and_then(|error| error.raw_os_error()), Some(libc::ENODEV));
    }
}
