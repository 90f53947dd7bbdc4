//! The files of the memory controller (Documentation/admin-guide/cgroup-v2.rst). Sizes are whole pages: the kernel
//! rounds down what is written.

use shaper_core::{limits::Limit, units::Bytes};

use super::{
    Cgroup, CgroupError, Open,
    file::{Contents, File, Flat, Malformed, ReadOnly},
};

/// What it may use; beyond that it is reclaimed, and then killed. Written below use, it kills at once.
pub const MAX: File<Limit<Bytes>> = File::new("memory.max");
/// Beyond this it is reclaimed and slowed down.
pub const HIGH: File<Limit<Bytes>> = File::new("memory.high");
/// Up to this it is not reclaimed while others have something to give.
pub const LOW: File<Limit<Bytes>> = File::new("memory.low");
/// Up to this it is never reclaimed.
pub const MIN: File<Limit<Bytes>> = File::new("memory.min");
/// In use.
pub const CURRENT: File<Bytes, ReadOnly> = File::new("memory.current");
/// The most that ever was (5.19).
pub const PEAK: File<Bytes, ReadOnly> = File::new("memory.peak");
/// Swap that it may use.
pub const SWAP_MAX: File<Limit<Bytes>> = File::new("memory.swap.max");
/// Swap in use.
pub const SWAP_CURRENT: File<Bytes, ReadOnly> = File::new("memory.swap.current");
/// Gives up so much (5.19): see [`Reclaimer`].
pub const RECLAIM: File<ReadOnly, Bytes> = File::new("memory.reclaim");
/// What happened in it and below.
pub const EVENTS: File<MemoryEvents, ReadOnly> = File::new("memory.events");
/// What happened in it alone.
pub const EVENTS_LOCAL: File<MemoryEvents, ReadOnly> = File::new("memory.events.local");
/// What the memory is, and what reclaim did.
pub const STAT: File<MemoryStat, ReadOnly> = File::new("memory.stat");

/// How often each thing happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Reclaimed although below `memory.low`.
    pub low: u64,
    /// Slowed down by `memory.high`.
    pub high: u64,
    /// About to exceed `memory.max`.
    pub max: u64,
    /// Out of memory.
    pub oom: u64,
    /// Processes killed.
    pub oom_kill: u64,
    /// Whole groups killed (5.17).
    pub oom_group_kill: Option<u64>,
}

impl Contents for MemoryEvents {
    fn from_text(text: &str) -> Result<MemoryEvents, Malformed> {
        let flat = Flat::new(text);
        Ok(MemoryEvents {
            low: flat.get("low")?,
            high: flat.get("high")?,
            max: flat.get("max")?,
            oom: flat.get("oom")?,
            oom_kill: flat.get("oom_kill")?,
            oom_group_kill: flat.find("oom_group_kill")?,
        })
    }
}

/// What of `memory.stat` tells whether memory can be taken. Counts are of pages, since the cgroup exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStat {
    /// Not of files: heaps, stacks.
    pub anon: Bytes,
    /// Page cache.
    pub file: Bytes,
    /// Of anon: not used lately.
    pub inactive_anon: Bytes,
    /// Of anon: used lately.
    pub active_anon: Bytes,
    /// Of file: not used lately.
    pub inactive_file: Bytes,
    /// Of file: used lately.
    pub active_file: Bytes,
    /// Swapped in again soon after it was reclaimed (5.9).
    pub refault_anon: u64,
    /// Read again soon after it was reclaimed.
    pub refault_file: u64,
    /// Looked at by reclaim.
    pub scanned: u64,
    /// Reclaimed.
    pub stolen: u64,
}

impl Contents for MemoryStat {
    fn from_text(text: &str) -> Result<MemoryStat, Malformed> {
        let flat = Flat::new(text);
        let bytes = |name| flat.get(name).map(Bytes);
        Ok(MemoryStat {
            anon: bytes("anon")?,
            file: bytes("file")?,
            inactive_anon: bytes("inactive_anon")?,
            active_anon: bytes("active_anon")?,
            inactive_file: bytes("inactive_file")?,
            active_file: bytes("active_file")?,
            refault_anon: flat.get("workingset_refault_anon")?,
            refault_file: flat.get("workingset_refault_file")?,
            scanned: flat.get("pgscan")?,
            stolen: flat.get("pgsteal")?,
        })
    }
}

/// What came of asking for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reclaimed {
    /// All that was asked for.
    All,
    /// Some of it, or nothing: the rest is in use, or there is nowhere to put it.
    Partly,
    /// A signal came first; some of it, or nothing.
    Interrupted,
}

/// An open `memory.reclaim`. Asking blocks for as long as the kernel tries, which can be long: that is for a thread
/// that has nothing else to do.
pub struct Reclaimer(Open<ReadOnly, Bytes>);

impl Reclaimer {
    /// That of a cgroup; `None` where the kernel has none.
    pub fn open(cgroup: &Cgroup) -> Result<Option<Reclaimer>, CgroupError> {
        Ok(cgroup.open_file_to_write(RECLAIM)?.map(Reclaimer))
    }

    /// Asks the cgroup to give up `amount`.
    pub fn reclaim(&self, amount: Bytes) -> Result<Reclaimed, CgroupError> {
        match self.0.write(&amount) {
            Ok(()) => Ok(Reclaimed::All),
            Err(error) => match error.errno() {
                Some(rustix::io::Errno::AGAIN) => Ok(Reclaimed::Partly),
                Some(rustix::io::Errno::INTR) => Ok(Reclaimed::Interrupted),
                _ => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn events_of_two_kernels() {
        // 5.15, then 6.12.
        let old = "low 0\nhigh 12\nmax 3\noom 1\noom_kill 2";
        let expected = MemoryEvents { high: 12, max: 3, oom: 1, oom_kill: 2, ..MemoryEvents::default() };
        assert_eq!(MemoryEvents::from_text(old), Ok(expected));
        let new = format!("{old}\noom_group_kill 4");
        assert_eq!(MemoryEvents::from_text(&new), Ok(MemoryEvents { oom_group_kill: Some(4), ..expected }));
        assert!(MemoryEvents::from_text("low 0\nhigh 12\nmax 3\noom 1").is_err());
        assert_eq!(MemoryEvents::from_text(&old.replace("12", "many")), Err(Malformed::new("many")));
    }

    #[test]
    fn memory_stat_of_a_kernel() {
        // 6.12, lines between left out.
        let text = "anon 16384\nfile 1187840\nkernel 307200\nfile_mapped 270336\ninactive_anon 12288\nactive_anon 4096\n\
                    inactive_file 917504\nactive_file 270336\nunevictable 0\nslab 165848\nworkingset_refault_anon 7\n\
                    workingset_refault_file 9\nworkingset_activate_anon 0\npswpin 0\npgscan 128\npgsteal 64\n\
                    pgscan_kswapd 28\npgscan_direct 100\npgsteal_kswapd 4\npgsteal_direct 60";
        let expected = MemoryStat {
            anon: Bytes(16_384),
            file: Bytes(1_187_840),
            inactive_anon: Bytes(12_288),
            active_anon: Bytes(4096),
            inactive_file: Bytes(917_504),
            active_file: Bytes(270_336),
            refault_anon: 7,
            refault_file: 9,
            scanned: 128,
            stolen: 64,
        };
        assert_eq!(MemoryStat::from_text(text), Ok(expected));
        assert!(MemoryStat::from_text("anon 1").is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}") {
            let _ = (MemoryEvents::from_text(&text), MemoryStat::from_text(&text));
        }
    }
}
