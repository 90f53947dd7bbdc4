//! The hierarchy as it changes: inotify tells of directories that are made in those that are watched. What is adopted is not
//! watched, nor what belongs to somebody other than root, unless a rule names a path in it: who may make cgroups there can
//! make very many.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use shaper_common::abi::LEVELS_MAX;
use shaper_core::adopt::{Choice, Rule, looks_below};
use tokio::io::Interest;

use super::by_path;
use crate::{launch::async_fd, manager::Service};

/// Directories that are watched at most; the others are looked at again and again.
const WATCHES_MAX: usize = 8192;
/// Directories that one look through all sees at most.
const LOOK_MAX: usize = 65_536;
/// Permissions with which others than the owner may make directories.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A cgroup that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its path from the mount point on.
    pub(super) path: String,
    /// Whether root alone could have made it.
    pub(super) is_roots: bool,
}

/// A directory that is watched.
#[derive(Clone, Debug)]
struct Watched {
    path: String,
    /// Whether root alone makes directories in it.
    is_roots: bool,
    /// Whether root alone could have made it itself.
    made_by_root: bool,
}

pub(super) struct Tree {
    mount: PathBuf,
    own: Vec<String>,
    inotify: OwnedFd,
    watched: HashMap<i32, Watched>,
    misses_some: bool,
}

impl Tree {
    /// Of the hierarchy at `mount`, without `own`, nor the units of tasks.
    pub(super) fn new(mount: &Path, own: &Path) -> io::Result<Tree> {
        let own = own.strip_prefix(mount).unwrap_or(own).to_string_lossy().into_owned();
        Ok(Tree {
            mount: mount.to_owned(),
            own: vec![own, Service::SLICE.to_owned()],
            inotify: Tree::begin()?,
            watched: HashMap::new(),
            misses_some: false,
        })
    }

    fn begin() -> io::Result<OwnedFd> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        Ok(inotify::init(flags)?)
    }

    /// Whether there are directories that could not be watched.
    pub(super) fn misses_some(&self) -> bool {
        self.misses_some
    }

    /// Every cgroup that there is, but those below one that a rule takes.
    pub(super) fn look_through(&mut self, rules: &[Rule]) -> Vec<Seen> {
        // What was adopted may have been released, and a rule may look where none did: begun anew.
        match Tree::begin() {
            Ok(inotify) => self.inotify = inotify,
            Err(error) => tracing::warn!(%error, "cannot begin to watch the hierarchy anew"),
        }
        self.watched.clear();
        self.misses_some = false;
        let mut seen = Vec::new();
        self.enter(rules, Watched { path: String::new(), is_roots: false, made_by_root: true }, &mut seen);
        seen
    }

    /// Waits for new cgroups; `None`: there were so many that some are not told.
    pub(super) async fn changed(&mut self, rules: &[Rule]) -> io::Result<Option<Vec<Seen>>> {
        let mut made = Vec::new();
        {
            let inotify = async_fd(self.inotify.as_fd(), Interest::READABLE)?;
            let _ready = inotify.readable().await?;
            let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
            let mut reader = inotify::Reader::new(inotify.get_ref(), &mut buffer);
            loop {
                let event = match reader.next() {
                    Ok(event) => event,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => return Err(error.into()),
                };
                if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                    return Ok(None);
                }
                if event.events().contains(ReadFlags::IGNORED) {
                    self.watched.remove(&event.wd());
                    continue;
                }
                let Some(above) = self.watched.get(&event.wd()) else { continue };
                if let Some(name) = event.file_name().and_then(|name| name.to_str().ok())
                    && event.events().contains(ReadFlags::CREATE | ReadFlags::ISDIR)
                {
                    made.push((above.clone(), name.to_owned()));
                }
            }
        }
        let mut seen = Vec::new();
        for (above, name) in made {
            let below =
                Watched { path: join(&above.path, &name), is_roots: false, made_by_root: above.is_roots };
            self.enter(rules, below, &mut seen);
            // Of a pod more may be known once there is something in it.
            if !above.path.is_empty()
                && matches!(by_path(rules, &above.path, above.made_by_root), Choice::AskPod)
            {
                seen.push(Seen { path: above.path, is_roots: above.made_by_root });
            }
        }
        Ok(Some(seen))
    }

    /// Watches a directory and those below it, and says what it sees.
    fn enter(&mut self, rules: &[Rule], first: Watched, seen: &mut Vec<Seen>) {
        let mut next = vec![first];
        while let Some(mut this) = next.pop() {
            let depth = this.path.split('/').filter(|part| !part.is_empty()).count();
            if self.own.contains(&this.path) || depth > LEVELS_MAX as usize {
                continue;
            }
            if seen.len() >= LOOK_MAX {
                self.misses_some = true;
                return;
            }
            if depth > 0 {
                seen.push(Seen { path: this.path.clone(), is_roots: this.made_by_root });
                if matches!(by_path(rules, &this.path, this.made_by_root), Choice::Taken(_)) {
                    continue;
                }
            }
            let directory = self.mount.join(&this.path);
            let Ok(found) = fs::symlink_metadata(&directory) else { continue };
            let is_roots = found.uid() == 0 && found.mode() & WRITABLE_BY_OTHERS == 0;
            this.is_roots = is_roots && (this.made_by_root || depth == 0);
            if !this.is_roots && !looks_below(rules, &this.path) {
                continue;
            }
            self.watch(&directory, &this);
            // After it is watched: what is made between is seen twice, and not never.
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir())
                    && let Ok(name) = entry.file_name().into_string()
                {
                    let path = join(&this.path, &name);
                    next.push(Watched { path, is_roots: false, made_by_root: this.is_roots });
                }
            }
        }
    }

    fn watch(&mut self, directory: &Path, this: &Watched) {
        let events = WatchFlags::CREATE | WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
        let is_full = self.watched.len() >= WATCHES_MAX;
        let added = if is_full {
            Err(rustix::io::Errno::NOSPC)
        } else {
            inotify::add_watch(&self.inotify, directory, events)
        };
        match added {
            Ok(watch) => drop(self.watched.insert(watch, this.clone())),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                if !self.misses_some {
                    tracing::warn!(%error, directory = %directory.display(), "cannot watch all cgroups for new ones: they are looked for");
                }
                self.misses_some = true;
            }
        }
    }
}

fn join(above: &str, name: &str) -> String {
    if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") }
}
