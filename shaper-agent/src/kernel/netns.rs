//! Network namespaces: a TCP iterator sees the sockets of one of them.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::fstatfs;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Hands every network namespace that a process is in or that has a name to `action`, once each, one after the other. Where
/// that fails `failed` is told; the others are visited all the same.
///
/// (A namespace that is held only by an open descriptor or a bind mount elsewhere is not found; its
/// sockets follow at their next callback instead.)
pub fn in_each(
    action: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
    mut failed: impl FnMut(&Path, io::Error),
) -> io::Result<()> {
    let mut seen = HashSet::new();
    for candidate in candidates()? {
        let file = match File::open(&candidate) {
            Ok(file) => file,
            // A process may have ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            // A process that we may not look into, as in a container: its namespace is most likely ours.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            Err(error) => {
                failed(&candidate, error);
                continue;
            }
        };
        // A name without its mount is a plain file: a leftover.
        if fstatfs(&file).map_or(0, |found| found.f_type) != NSFS_MAGIC {
            continue;
        }
        let meta = file.metadata()?;
        if seen.insert((meta.dev(), meta.ino()))
            && let Err(error) = action(file.as_fd())
        {
            failed(&candidate, error);
        }
    }
    Ok(())
}

fn candidates() -> io::Result<Vec<PathBuf>> {
    let mut candidates = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            candidates.push(entry.path().join("ns/net"));
        }
    }
    for named in ["/run/netns", "/run/docker/netns"] {
        if let Ok(entries) = fs::read_dir(named) {
            candidates.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    Ok(candidates)
}

/// Runs `action` inside the namespace, on a thread of its own if it is another one than ours; that needs CAP_SYS_ADMIN.
pub fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    action: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let identity = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    if identity(rustix::fs::fstat(namespace)?) == identity(rustix::fs::stat("/proc/thread-self/ns/net")?) {
        return action();
    }
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            action()
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
