//! The `bpf(2)` commands that aya does not offer: pinning the links of tracing programs, replacing
//! the program behind a cgroup link, iterators, and the query that probes for tcx; and a network namespace for a thread.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_ITER_CREATE: libc::c_long = 33;

/// `enum bpf_attach_type`
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_TRACE_ITER: u32 = 28;
const BPF_TCX_EGRESS: u32 = 47;

/// Puts this thread into a network namespace of its own, which ends with it.
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: it concerns this thread's view of the network alone.
    match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `union bpf_attr`: larger than any kernel's part of it that is used here, the rest 0.
#[repr(C, align(8))]
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Attr {
        Attr([0; 128])
    }

    fn u32(mut self, offset: usize, value: u32) -> Attr {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, offset: usize, value: u64) -> Attr {
        self.0[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Attr {
        self.u32(offset, fd.as_raw_fd() as u32)
    }
}

fn bpf(command: libc::c_long, attr: &mut Attr) -> io::Result<libc::c_long> {
    // SAFETY: the attribute outlives the call and is as long as said; the paths and buffers that it points to
    // are kept alive by the callers, and as long as they say in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.0.as_mut_ptr(), attr.0.len()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd(command: libc::c_long, attr: &mut Attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel made this descriptor for us (close-on-exec, as every BPF descriptor).
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins a link, program or map at `path`.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(BPF_OBJ_PIN, &mut Attr::new().u64(0, path.as_ptr() as u64).fd(8, object)).map(drop)
}

/// Opens what is pinned at `path`; `None` if nothing is.
pub(super) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    match bpf_fd(BPF_OBJ_GET, &mut Attr::new().u64(0, path.as_ptr() as u64)) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Attaches a `tp_btf` program to the tracepoint that it was loaded for; the link lives as long as the
/// descriptor or a pin.
pub(super) fn attach_tracing(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf_fd(BPF_RAW_TRACEPOINT_OPEN, &mut Attr::new().fd(8, program))
}

/// Puts `program` behind an existing cgroup or tcx link, atomically.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_UPDATE, &mut Attr::new().fd(0, link).fd(4, program)).map(drop)
}

/// Attaches a `cgroup/dev` program to a cgroup, beside those of others; the link lives as long as the descriptor or a pin.
pub(super) fn attach_device(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = Attr::new().fd(0, program).fd(4, cgroup).u32(8, BPF_CGROUP_DEVICE);
    bpf_fd(BPF_LINK_CREATE, &mut attr)
}

/// A link of an iterator program.
pub(super) fn attach_iterator(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf_fd(BPF_LINK_CREATE, &mut Attr::new().fd(0, program).u32(8, BPF_TRACE_ITER))
}

/// One walk of an iterator, in the network namespace of the calling thread.
pub(crate) fn create_iterator(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf_fd(BPF_ITER_CREATE, &mut Attr::new().fd(0, link))
}

/// Shows every entry of a hash map, many by one system call. `value_size` is that of all CPUs for a map by CPU. Entries
/// that come or go meanwhile may be shown or not.
pub(super) fn for_each_entry(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut show: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let value_size = value_size.next_multiple_of(8);
    // Enough for any bucket but a very unlucky one; that asks for more.
    let mut room = 256;
    // Where the next call goes on: the kernel's business, four bytes of a hash map.
    let mut position: Option<u64> = None;
    loop {
        let (mut keys, mut values) = (vec![0u8; room * key_size], vec![0u8; room * value_size]);
        let (from, mut to) = (position.unwrap_or(0), 0u64);
        let mut attr = Attr::new()
            .u64(0, if position.is_some() { &raw const from as u64 } else { 0 })
            .u64(8, &raw mut to as u64)
            .u64(16, keys.as_mut_ptr() as u64)
            .u64(24, values.as_mut_ptr() as u64)
            .u32(32, room as u32)
            .fd(36, map);
        let done = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let found = u32::from_ne_bytes([attr.0[32], attr.0[33], attr.0[34], attr.0[35]]) as usize;
        for index in 0..found.min(room) {
            show(&keys[index * key_size..][..key_size], &values[index * value_size..][..value_size]);
        }
        if done {
            return Ok(());
        }
        position = Some(to);
    }
}

/// How often a program was left out because it ran already on that CPU (`bpf_prog_info.recursion_misses`, 5.12).
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    const AT: usize = 208;
    let mut info = [0u8; AT + 8];
    let mut attr = Attr::new().fd(0, program).u32(4, info.len() as u32).u64(8, info.as_mut_ptr() as u64);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(u64::from_ne_bytes(info[AT..].try_into().unwrap_or_default()))
}

/// Asks which tcx programs a device has: EINVAL where the kernel has no tcx.
pub(super) fn query_tcx(ifindex: u32) -> io::Result<()> {
    bpf(BPF_PROG_QUERY, &mut Attr::new().u32(0, ifindex).u32(4, BPF_TCX_EGRESS)).map(drop)
}
