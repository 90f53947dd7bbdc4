//! Network namespaces: a TCP iterator sees the sockets of one of them.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Every network namespace that a process is in or that has a name, each once.
///
/// (One that is held only by an open descriptor or a bind mount elsewhere is not found; its sockets
/// follow their next callback instead.)
pub fn all() -> io::Result<Vec<OwnedFd>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut candidates: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            candidates.push(entry.path().join("ns/net"));
        }
    }
    for named in ["/run/netns", "/run/docker/netns"] {
        if let Ok(entries) = fs::read_dir(named) {
            candidates.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    for candidate in candidates {
        // A process may have ended meanwhile, and a name may be a leftover without its mount.
        let Ok(meta) = fs::metadata(&candidate) else { continue };
        if seen.insert((meta.dev(), meta.ino()))
            && let Ok(file) = File::open(&candidate)
        {
            found.push(file.into());
        }
    }
    Ok(found)
}

/// Runs `action` on a thread of its own inside the namespace; needs CAP_SYS_ADMIN.
pub fn within<T: Send>(
    namespace: impl AsFd + Sync,
    action: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            action()
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
