//! The hierarchy as it changes: inotify tells of directories that are made in those that are watched. What is adopted is not
//! watched, nor what belongs to somebody other than root, unless a rule names a path in it: who may make cgroups there can
//! make very many.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use shaper_common::abi::LEVELS_MAX;
use shaper_core::adopt::{Choice, Rule, looks_below};
use tokio::io::Interest;

use super::{Config, by_path};
use crate::{launch::async_fd, manager::Service};

/// Directories that are watched at most; the others are looked at again and again.
const WATCHES_MAX: usize = 8192;
/// Directories that one look through all sees at most.
const LOOK_MAX: usize = 65_536;
/// Permissions with which others than the owner may make directories.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// What a cgroup's id is; `None`: it is gone.
pub(super) fn id(mount: &Path, path: &str) -> Option<u64> {
    let found = fs::symlink_metadata(mount.join(path)).ok()?;
    Some(found.ino())
}

/// Where the agent's cgroups are, of which `own` is the root, and those of units of tasks.
fn the_agents(mount: &Path, own: &Path) -> Vec<String> {
    let own = own.strip_prefix(mount).unwrap_or(own).to_string_lossy().into_owned();
    vec![own, Service::SLICE.to_owned()]
}

/// Whether a path is there.
pub(super) fn is_the_agents(config: &Config, path: &str) -> bool {
    the_agents(&config.mount, &config.own).iter().any(|own| Path::new(path).starts_with(own))
}

/// Whether root alone could have made what is at a path: every directory above belongs to root, now, and nobody else may make
/// directories there. It is never remembered: systemd makes a user's cgroup as root and gives it away a moment later.
pub(super) fn is_roots_alone(mount: &Path, path: &str) -> bool {
    let mut above = mount.to_owned();
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    // From the top: what root's directory holds, root put there.
    while let Some(part) = parts.next() {
        if !is_roots(&above) {
            return false;
        }
        if parts.peek().is_some() {
            above.push(part);
        }
    }
    true
}

/// Whether root alone makes directories there.
fn is_roots(directory: &Path) -> bool {
    fs::symlink_metadata(directory)
        .is_ok_and(|found| found.is_dir() && found.uid() == 0 && found.mode() & WRITABLE_BY_OTHERS == 0)
}

pub(super) struct Tree {
    mount: PathBuf,
    own: Vec<String>,
    /// Absent where the kernel has none to give.
    inotify: Option<OwnedFd>,
    /// The paths of directories that are watched.
    watched: HashMap<i32, String>,
    misses_some: bool,
}

impl Tree {
    /// Of the hierarchy at `mount`, without `own`, nor the units of tasks. Nothing is watched before
    /// [`Tree::look_through`].
    pub(super) fn new(mount: &Path, own: &Path) -> Tree {
        Tree {
            mount: mount.to_owned(),
            own: the_agents(mount, own),
            inotify: None,
            watched: HashMap::new(),
            misses_some: true,
        }
    }

    fn begin() -> io::Result<OwnedFd> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        Ok(inotify::init(flags)?)
    }

    /// Whether a cgroup may have come of which nobody was told: all has to be looked through again.
    pub(super) fn misses_some(&self) -> bool {
        self.misses_some
    }

    /// Has all looked through again.
    pub(super) fn miss(&mut self) {
        self.misses_some = true;
    }

    /// The path of every cgroup that there is, but of those below one that a rule takes.
    pub(super) fn look_through(&mut self, rules: &[Rule]) -> Vec<String> {
        // What was adopted may have been released, and a rule may look where none did: begun anew.
        self.inotify = Tree::begin()
            .inspect_err(|error| tracing::warn!(%error, "cannot be told of new cgroups: they are looked for"))
            .ok();
        self.watched.clear();
        self.misses_some = self.inotify.is_none();
        let mut seen = Vec::new();
        self.enter(rules, String::new(), &mut seen);
        seen
    }

    /// Waits for new cgroups. Where the kernel did not tell of all, or cannot, [`Tree::misses_some`] is so.
    pub(super) async fn changed(&mut self, rules: &[Rule]) -> Vec<String> {
        let made = match &self.inotify {
            Some(inotify) => read(inotify.as_fd(), &mut self.watched, &mut self.misses_some).await,
            None => std::future::pending().await,
        };
        let made = made.unwrap_or_else(|error| {
            tracing::error!(%error, "cannot be told of new cgroups any more: they are looked for");
            self.inotify = None;
            self.misses_some = true;
            Vec::new()
        });
        let mut seen = Vec::new();
        for (above, name) in made {
            // Of a pod more may be known once there is something in it.
            if !above.is_empty()
                && matches!(by_path(rules, &above, is_roots_alone(&self.mount, &above)), Choice::AskPod)
            {
                seen.push(above.clone());
            }
            self.enter(rules, join(&above, &name), &mut seen);
        }
        seen
    }

    /// Watches a directory and those below it, and says what it sees.
    fn enter(&mut self, rules: &[Rule], first: String, seen: &mut Vec<String>) {
        let made_by_root = is_roots_alone(&self.mount, &first);
        let mut next = vec![(first, made_by_root)];
        while let Some((path, made_by_root)) = next.pop() {
            let depth = path.split('/').filter(|part| !part.is_empty()).count();
            if self.own.contains(&path) || depth > LEVELS_MAX as usize {
                continue;
            }
            if seen.len() >= LOOK_MAX {
                self.misses_some = true;
                return;
            }
            if depth > 0 {
                seen.push(path.clone());
                if matches!(by_path(rules, &path, made_by_root), Choice::Taken(_)) {
                    continue;
                }
            }
            let directory = self.mount.join(&path);
            let is_watched = looks_below(rules, &path) || (made_by_root && is_roots(&directory));
            if !is_watched {
                continue;
            }
            self.watch(&directory, &path);
            // After it is watched: what is made between is seen twice, and not never.
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            let below: Vec<String> = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect();
            // After it is read: root made what is in it if it is still root's.
            let made_by_root = made_by_root && is_roots(&directory);
            next.extend(below.iter().map(|name| (join(&path, name), made_by_root)));
        }
    }

    fn watch(&mut self, directory: &Path, path: &str) {
        let Some(inotify) = &self.inotify else { return };
        let events = WatchFlags::CREATE | WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
        let is_full = self.watched.len() >= WATCHES_MAX;
        let added = if is_full {
            Err(rustix::io::Errno::NOSPC)
        } else {
            inotify::add_watch(inotify, directory, events)
        };
        match added {
            Ok(watch) => drop(self.watched.insert(watch, path.to_owned())),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                if !self.misses_some {
                    tracing::warn!(
                        %error,
                        directory = %directory.display(),
                        "cannot watch all cgroups for new ones: they are looked for"
                    );
                }
                self.misses_some = true;
            }
        }
    }
}

/// The directories that were made: each with the path of the one it is in.
async fn read(
    inotify: BorrowedFd<'_>,
    watched: &mut HashMap<i32, String>,
    misses_some: &mut bool,
) -> io::Result<Vec<(String, String)>> {
    let inotify = async_fd(inotify, Interest::READABLE)?;
    let _ready = inotify.readable().await?;
    let mut made = Vec::new();
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify.get_ref(), &mut buffer);
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(rustix::io::Errno::AGAIN) => return Ok(made),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
            *misses_some = true;
            continue;
        }
        if event.events().contains(ReadFlags::IGNORED) {
            watched.remove(&event.wd());
            continue;
        }
        let Some(above) = watched.get(&event.wd()) else { continue };
        if let Some(name) = event.file_name().and_then(|name| name.to_str().ok())
            && event.events().contains(ReadFlags::CREATE | ReadFlags::ISDIR)
        {
            made.push((above.clone(), name.to_owned()));
        }
    }
}

fn join(above: &str, name: &str) -> String {
    if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") }
}
