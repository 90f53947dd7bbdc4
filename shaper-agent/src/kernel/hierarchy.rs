//! Which cgroup hierarchies this host has, and where a process is in them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The controllers that shaper uses on v1.
pub const V1_CONTROLLERS: [&str; 3] = ["cpu", "memory", "blkio"];

/// How cgroups are mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// Mount point of cgroup v2.
    pub v2: PathBuf,
    /// Mount points of v1 controllers, out of [`V1_CONTROLLERS`]; empty on a unified host.
    pub v1: Vec<(String, PathBuf)>,
}

impl Hierarchies {
    /// Reads the mounts of this process. `None`: there is no cgroup v2, without which shaper can do
    /// nothing.
    pub fn detect() -> io::Result<Option<Hierarchies>> {
        Ok(Hierarchies::from_mountinfo(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    /// From the text of a `mountinfo` (proc_pid_mountinfo(5)).
    pub fn from_mountinfo(mountinfo: &str) -> Option<Hierarchies> {
        let mut v2 = None;
        let mut v1 = Vec::new();
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = before.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut after = after.split(' ');
            let (file_system, options) = (after.next().unwrap_or(""), after.nth(1).unwrap_or(""));
            match file_system {
                "cgroup2" if v2.is_none() => v2 = Some(mount_point),
                "cgroup" => {
                    for controller in options.split(',').filter(|name| V1_CONTROLLERS.contains(name)) {
                        v1.push((controller.to_owned(), mount_point.clone()));
                    }
                }
                _ => {}
            }
        }
        Some(Hierarchies { v2: v2?, v1 })
    }

    /// `unified` or `hybrid`.
    pub fn name(&self) -> &'static str {
        if self.v1.is_empty() { "unified" } else { "hybrid" }
    }
}

/// Where the process `pid` is, as a path from the mount point: in v2 for `None`, else in the hierarchy
/// of a v1 controller.
pub fn place_of(pid: &str, controller: Option<&str>) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    place_in(&text, controller).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("/proc/{pid}/cgroup names no such hierarchy"))
    })
}

/// The same from the text of such a file.
pub fn place_in(text: &str, controller: Option<&str>) -> Option<PathBuf> {
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let wanted = match controller {
            None => controllers.is_empty(),
            Some(controller) => controllers.split(',').any(|name| name == controller),
        };
        if wanted {
            return Some(Path::new(path).strip_prefix("/").unwrap_or(Path::new("")).to_path_buf());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host() {
        let mounts = "\
29 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
30 29 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
31 29 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 29 0:29 / /sys/fs/cgroup/unified rw,relatime shared:1 - cgroup2 cgroup2 rw
";
        let found = Hierarchies::from_mountinfo(mounts).unwrap();
        assert_eq!(found.v2, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.v1[0], ("cpu".into(), PathBuf::from("/sys/fs/cgroup/cpu")));
        assert_eq!(found.name(), "hybrid");
    }

    #[test]
    fn a_unified_host_and_one_without_v2() {
        let unified = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(Hierarchies::from_mountinfo(unified).unwrap().name(), "unified");
        let legacy = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct";
        assert_eq!(Hierarchies::from_mountinfo(legacy), None);
    }
}
