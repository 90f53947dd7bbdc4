//! The files that every cgroup has (Documentation/admin-guide/cgroup-v2.rst), `cgroup.*`.

use shaper_core::limits::Limit;

use super::file::{Contents, File, Flat, Malformed, ReadOnly, Setting, number};

/// What changed: it is populated, frozen.
pub const EVENTS: File<GroupEvents, ReadOnly> = File::new("cgroup.events");
/// Stops everything in it and below; `cgroup.events` says when that is done.
pub const FREEZE: File<bool> = File::new("cgroup.freeze");
/// Kills everything in it and below (5.14).
pub const KILL: File<ReadOnly, bool> = File::new("cgroup.kill");
/// Its own processes; writing one moves it here.
pub const PROCESSES: File<Processes, u32> = File::new("cgroup.procs");
/// The controllers that it has.
pub const CONTROLLERS: File<Controllers, ReadOnly> = File::new("cgroup.controllers");
/// The controllers that the cgroups directly below have.
pub const SUBTREE_CONTROL: File<Controllers, Enable> = File::new("cgroup.subtree_control");
/// How many cgroups may be below.
pub const MAX_DESCENDANTS: File<Limit<u32>> = File::new("cgroup.max.descendants");
/// How many are.
pub const STAT: File<GroupStat, ReadOnly> = File::new("cgroup.stat");
/// Domain or threaded. The root has none.
pub const TYPE: File<GroupType, ReadOnly> = File::new("cgroup.type");

/// `cgroup.events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupEvents {
    /// A process is in it or below it.
    pub populated: bool,
    /// Everything in it stands still (5.2).
    pub frozen: bool,
}

impl Contents for GroupEvents {
    fn from_text(text: &str) -> Result<GroupEvents, Malformed> {
        let flat = Flat::new(text);
        let flag = |name| match flat.get(name)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed::new(text)),
        };
        Ok(GroupEvents { populated: flag("populated")?, frozen: flag("frozen")? })
    }
}

/// `cgroup.procs`. A process of another pid namespace is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes(pub Vec<u32>);

impl Contents for Processes {
    fn from_text(text: &str) -> Result<Processes, Malformed> {
        Ok(Processes(text.lines().map(number).collect::<Result<_, _>>()?))
    }
}

/// `cgroup.controllers`: names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Controllers(pub Vec<String>);

impl Controllers {
    /// Whether `name` is among them.
    pub fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|controller| controller == name)
    }
}

impl Contents for Controllers {
    fn from_text(text: &str) -> Result<Controllers, Malformed> {
        Ok(Controllers(text.split_ascii_whitespace().map(str::to_owned).collect()))
    }
}

/// A controller that the cgroups below are to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enable(pub &'static str);

impl Setting for Enable {
    fn text(&self) -> String {
        format!("+{}", self.0)
    }
}

/// `cgroup.stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupStat {
    /// Cgroups below.
    pub descendants: u64,
    /// Cgroups below that were removed and are still charged with something.
    pub dying: u64,
}

impl Contents for GroupStat {
    fn from_text(text: &str) -> Result<GroupStat, Malformed> {
        let flat = Flat::new(text);
        Ok(GroupStat { descendants: flat.get("nr_descendants")?, dying: flat.get("nr_dying_descendants")? })
    }
}

/// `cgroup.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupType {
    /// The usual.
    Domain,
    /// A domain with threaded cgroups below.
    ThreadedDomain,
    /// Neither: it must be made threaded before it is used.
    Invalid,
    /// Threads of one process may be in several.
    Threaded,
}

impl Contents for GroupType {
    fn from_text(text: &str) -> Result<GroupType, Malformed> {
        match text {
            "domain" => Ok(GroupType::Domain),
            "domain threaded" => Ok(GroupType::ThreadedDomain),
            "domain invalid" => Ok(GroupType::Invalid),
            "threaded" => Ok(GroupType::Threaded),
            _ => Err(Malformed::new(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_of_a_kernel() {
        let events = GroupEvents { populated: true, frozen: false };
        assert_eq!(GroupEvents::from_text("populated 1\nfrozen 0"), Ok(events));
        assert!(GroupEvents::from_text("populated 2\nfrozen 0").is_err());
        assert!(GroupEvents::from_text("populated 1").is_err());
        assert_eq!(Processes::from_text("0\n17\n4194304"), Ok(Processes(vec![0, 17, 4_194_304])));
        assert_eq!(Processes::from_text(""), Ok(Processes::default()));
        assert!(Processes::from_text("17\n-1").is_err());
        let controllers = Controllers::from_text("cpuset cpu io memory hugetlb pids").unwrap();
        assert!(controllers.contains("cpu") && !controllers.contains("cp"));
        assert_eq!(Controllers::from_text(""), Ok(Controllers::default()));
        // 6.12 counts by controller as well.
        let stat = "nr_descendants 3\nnr_subsys_cpu 2\nnr_dying_descendants 1\nnr_dying_subsys_cpu 0";
        assert_eq!(GroupStat::from_text(stat), Ok(GroupStat { descendants: 3, dying: 1 }));
        assert_eq!(GroupType::from_text("domain threaded"), Ok(GroupType::ThreadedDomain));
        assert!(GroupType::from_text("domains").is_err());
        assert_eq!(Enable("io").text(), "+io");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}") {
            let _ = (GroupEvents::from_text(&text), Processes::from_text(&text), GroupStat::from_text(&text));
        }
    }
}
