//! Cgroups of containers that their runtime is still making. Below systemd both it and the runtime put programs of their own on such
//! a cgroup: whoever has systemd change the unit meanwhile takes one away that runc is about to replace, and the container fails
//! to start. So rules wait until the container's own program runs. (What `shaper-runtime` tells of is adopted before: then the
//! runtime has done its part, and waits.)

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use shaper_core::adopt::Place;
use tokio::time::Instant;

/// How often those are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long one without a process is waited for: its first is about to be moved there.
const EMPTY: Duration = Duration::from_secs(1);
/// How long a runtime is waited for; a container may call its own processes as it likes.
const MAKING: Duration = Duration::from_secs(10);
/// So many are waited for; more are adopted at once.
const MOST: usize = 4096;

/// What they are called who become the container's first process: of runc `runc:[2:INIT]`, of crun as its file.
const INITS: [&str; 2] = ["runc", "crun"];

/// Those that are waited for, and since when.
#[derive(Debug, Default)]
pub(super) struct InTheMaking {
    since: BTreeMap<String, Instant>,
    /// When they are looked at next.
    look: Option<Instant>,
}

impl InTheMaking {
    /// Of these those that can be adopted now; the others are waited for.
    pub(super) fn keep_back(&mut self, mount: &Path, seen: Vec<String>) -> Vec<String> {
        let now = Instant::now();
        let mut made = Vec::new();
        for path in seen {
            if is_containers(&path)
                && self.since.len() < MOST
                && is_in_the_making(mount, &path, Duration::ZERO)
            {
                self.since.entry(path).or_insert(now);
                self.look.get_or_insert(now + LOOK);
            } else {
                made.push(path);
            }
        }
        made
    }

    /// When they are to be looked at; `None`: there are none.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.look
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.since.contains_key(path)
    }

    /// Those that are made by now, or gone.
    pub(super) fn made(&mut self, mount: &Path) -> Vec<String> {
        let now = Instant::now();
        let mut made = Vec::new();
        self.since.retain(|path, since| {
            let is_in_the_making = is_in_the_making(mount, path, now.duration_since(*since));
            if !is_in_the_making {
                made.push(path.clone());
            }
            is_in_the_making
        });
        self.look = (!self.since.is_empty()).then(|| now + LOOK);
        made
    }
}

/// Whether a runtime may have made it: it is a container's, or a scope of systemd's.
fn is_containers(path: &str) -> bool {
    let place = Place::of(path);
    place.container.is_some() || place.unit.is_some_and(|unit| unit.ends_with(".scope"))
}

fn is_in_the_making(mount: &Path, path: &str, age: Duration) -> bool {
    // crun makes one below for what it runs.
    let processes = ["cgroup.procs", "container/cgroup.procs"]
        .map(|file| fs::read_to_string(mount.join(path).join(file)));
    let [Ok(own), below] = processes else { return false };
    let pids: Vec<String> =
        own.lines().chain(below.iter().flat_map(|text| text.lines())).map(str::to_owned).collect();
    if pids.is_empty() {
        return age < EMPTY;
    }
    let is_init = |pid: &String| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| INITS.iter().any(|init| name.starts_with(init)))
    };
    age < MAKING && pids.iter().all(is_init)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hierarchy with a cgroup that has those processes.
    fn cgroup(path: &str, processes: &str) -> tempfile::TempDir {
        let mount = tempfile::tempdir().unwrap();
        fs::create_dir_all(mount.path().join(path)).unwrap();
        fs::write(mount.path().join(path).join("cgroup.procs"), processes).unwrap();
        mount
    }

    #[tokio::test(start_paused = true)]
    async fn a_scope_without_a_process_is_waited_for_a_second() {
        let path = "system.slice/docker-1.scope";
        let mount = cgroup(path, "");
        let mut making = InTheMaking::default();
        assert_eq!(making.keep_back(mount.path(), vec!["a.slice".into(), path.into()]), ["a.slice"]);
        assert!(making.has(path) && making.made(mount.path()).is_empty() && making.next_look().is_some());
        tokio::time::advance(EMPTY).await;
        assert_eq!(making.made(mount.path()), [path]);
        assert_eq!(making.next_look(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_runs_a_program_of_its_own_is_made_and_what_is_gone_is_not_waited_for() {
        let path = "system.slice/docker-1.scope";
        let mount = cgroup(path, "");
        let mut making = InTheMaking::default();
        assert!(making.keep_back(mount.path(), vec![path.into()]).is_empty());
        // This process is no runtime.
        fs::write(mount.path().join(path).join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(making.made(mount.path()), [path]);
        assert_eq!(making.keep_back(mount.path(), vec![path.into()]), [path]);
        fs::remove_dir_all(mount.path().join(path)).unwrap();
        assert_eq!(making.keep_back(mount.path(), vec![path.into()]), [path]);
    }
}
