//! sched_ext: whether this kernel has it, and whose scheduler has the CPUs.

use std::{fs, path::Path};

use shaper_core::scheduler::CpuScheduler;

use super::btf::{Btf, BtfError};

/// Where the kernel tells of it.
pub const DIRECTORY: &str = "/sys/kernel/sched_ext";
/// What shaper's own scheduler calls itself (`shaper-ebpf/bpf/sched.bpf.c`).
pub const NAME: &str = "shaper";

/// Why shaper's scheduler cannot have the CPUs.
#[derive(Debug, thiserror::Error)]
pub enum SchedExtError {
    /// This program was built without it.
    #[error(
        "--cpu-backend scx: this shaper-agent was built without it; build it with `--features scx`, or say \
         --cpu-backend kernel"
    )]
    NotBuilt,
    /// The kernel does not have what it needs.
    #[error(
        "--cpu-backend scx: this kernel has no sched_ext that passes cpu.max on (Linux 6.17 with \
         CONFIG_SCHED_CLASS_EXT and CONFIG_EXT_GROUP_SCHED); say --cpu-backend kernel"
    )]
    NotInKernel(#[source] BtfError),
    /// Another scheduler is loaded.
    #[error(
        "--cpu-backend scx: the sched_ext scheduler `{0}` is loaded already, and there can be one only; end whatever \
         loaded it, or say --cpu-backend kernel"
    )]
    Occupied(String),
    /// The kernel refused it.
    #[cfg(feature = "scx")]
    #[error("cannot {verb} shaper's sched_ext scheduler; `dmesg` may say more")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// What went wrong.
        source: libbpf_rs::Error,
    },
    /// Nobody can wait for its end.
    #[cfg(feature = "scx")]
    #[error("cannot start the thread that waits for the end of shaper's scheduler")]
    Thread(#[source] std::io::Error),
}

/// Whether this kernel has all that shaper's scheduler needs: the last that came was the call that passes cpu.max on.
pub fn is_supported(btf: &Btf) -> Result<(), BtfError> {
    btf.offset_of("sched_ext_ops", &["cgroup_set_bandwidth"]).map(drop)
}

/// The name of the scheduler that is loaded, if one is.
pub fn loaded(directory: &Path) -> Option<String> {
    let state = fs::read_to_string(directory.join("state")).ok()?;
    (state.trim() != "disabled").then(|| {
        let name = fs::read_to_string(directory.join("root/ops")).unwrap_or_default();
        name.trim().to_owned()
    })
}

/// Who has the CPUs.
pub fn scheduler(directory: &Path) -> CpuScheduler {
    match loaded(directory) {
        None => CpuScheduler::Kernel,
        Some(name) if name == NAME => CpuScheduler::Shaper,
        Some(name) => CpuScheduler::Foreign { name },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files as 6.18 has them; `tests/tests/vm/scx.rs` has them from the kernel.
    #[test]
    fn schedulers_are_told_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str| CpuScheduler::Foreign { name: name.into() };
        let found = || scheduler(folder.path());
        assert_eq!(found(), CpuScheduler::Kernel);
        fs::write(folder.path().join("state"), "disabled\n").unwrap();
        assert_eq!(found(), CpuScheduler::Kernel);
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::write(folder.path().join("root/ops"), "rusty_1.0\n").unwrap();
        fs::write(folder.path().join("state"), "enabled\n").unwrap();
        assert_eq!(found(), of("rusty_1.0"));
        fs::write(folder.path().join("root/ops"), "shaper\n").unwrap();
        assert_eq!(found(), CpuScheduler::Shaper);
    }
}
