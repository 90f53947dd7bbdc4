//! The ladder: every kernel feature that shaper can use, how it is probed, and what happens without
//! it. The table in docs/kernel-support.md is this one (a test compares them).

use std::{fs, io, path::Path};

use shaper_core::doctor::{Availability, Rung};
use shaper_proto::peer::PeerProcess;

use super::{
    bpf::Measure,
    btf::{Btf, BtfError, IO_OFFSETS},
    hierarchy::Hierarchies,
    ingress::{self, IngressError},
    qdisc,
};
use crate::{launch::chain, opener::Opener};

/// One row of the table.
pub struct Feature {
    /// Stable name.
    pub name: &'static str,
    /// What it is for.
    pub used_for: &'static str,
    /// What happens without it.
    pub degrades_to: &'static str,
    probe: fn(&Facts) -> Availability,
}

/// What the probes look at.
pub struct Facts {
    hierarchies: Option<Hierarchies>,
    status: String,
    btf: Result<Btf, BtfError>,
    opener: Opener,
}

/// The table.
pub const LADDER: &[Feature] = &[
    Feature {
        name: "btf",
        used_for: "offsets of kernel fields, tracing programs",
        degrades_to: "nothing works: the agent refuses to start a task",
        probe: |_| file(Path::new("/sys/kernel/btf/vmlinux")),
    },
    Feature {
        name: "cap-bpf",
        used_for: "loading and attaching kernel programs",
        degrades_to: "nothing works: run the agent with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        probe: capabilities,
    },
    Feature {
        name: "cgroup-v2",
        used_for: "the identity of every task",
        degrades_to: "nothing works: mount cgroup2",
        probe: |facts| match &facts.hierarchies {
            Some(_) => Availability::Available,
            None => Availability::Missing { evidence: "no cgroup2 mount in /proc/self/mountinfo".into() },
        },
    },
    Feature {
        name: "cgroup-v2-cpu",
        used_for: "CPU limit and weight: cpu.max, cpu.weight",
        degrades_to: "the v1 cpu controller, for launched tasks; adopted cgroups have no CPU limit",
        probe: |facts| controller(facts, "cpu"),
    },
    Feature {
        name: "cgroup-v2-memory",
        used_for: "memory limit: memory.max",
        degrades_to: "the v1 memory controller, for launched tasks; adopted cgroups have no memory limit",
        probe: |facts| controller(facts, "memory"),
    },
    Feature {
        name: "memory-reclaim",
        used_for: "memory limits that come below use, idle memory that is taken away: memory.reclaim (5.19)",
        degrades_to: "limits below use and --reclaim-idle are refused",
        probe: |facts| match &facts.hierarchies {
            Some(hierarchies) => file(&hierarchies.v2.join("memory.reclaim")),
            None => Availability::Missing { evidence: "no cgroup2 mount".into() },
        },
    },
    Feature {
        name: "cgroup-v2-io",
        used_for: "block IO is charged to the cgroup that caused it, written back or not",
        degrades_to: "the v1 blkio controller, for launched tasks, which knows only who wrote",
        probe: |facts| controller(facts, "io"),
    },
    Feature {
        name: "io-cost",
        used_for: "dividing block devices by weight, by a measured model (`shaper-agent calibrate`)",
        degrades_to: "BFQ divides, where it is the scheduler; elsewhere `--io-weight` is refused",
        probe: |facts| match &facts.hierarchies {
            Some(hierarchies) => file(&hierarchies.v2.join("io.cost.model")),
            None => Availability::Missing { evidence: "no cgroup2 mount".into() },
        },
    },
    Feature {
        name: "block-io-program",
        used_for: "bytes, operations and latency of block IO by task and device",
        degrades_to: "bytes and operations from io.stat, no latency",
        probe: |facts| fields(facts, IO_OFFSETS),
    },
    Feature {
        name: "run-queue-delay",
        used_for: "how long tasks wait for a CPU (CONFIG_SCHED_INFO)",
        degrades_to: "nothing works: the agent refuses to start a task",
        probe: |facts| fields(facts, &[("", "task_struct", &["sched_info", "last_queued"])]),
    },
    Feature {
        name: "cgroup-kill",
        used_for: "ending all processes of a task at once: cgroup.kill (5.14)",
        degrades_to: "SIGKILL is refused; SIGTERM to the main process works",
        probe: |facts| core_file(facts, "cgroup.kill"),
    },
    Feature {
        name: "tcx",
        used_for: "counting at uplinks by a pinned link (6.6)",
        degrades_to: "a filter on the clsact qdisc",
        probe: |_| match qdisc::has_tcx() {
            Ok(true) => Availability::Available,
            Ok(false) => Availability::Missing { evidence: "BPF_PROG_QUERY for tcx: EINVAL".into() },
            Err(error) => unusable(&error),
        },
    },
    Feature {
        name: "ingress-queue",
        used_for: "limits on what a task receives: ifb, HTB, and a bpf filter with mirred",
        degrades_to: "`--net-in` is refused, with what to load",
        probe: |facts| match ingress::probe(&facts.opener) {
            Ok(()) => Availability::Available,
            Err(error @ IngressError::Unsupported { .. }) => {
                Availability::Missing { evidence: chain(&error) }
            }
            Err(error) => Availability::Unusable { reason: chain(&error) },
        },
    },
    Feature {
        name: "iterator-cb-flags",
        used_for: "pacing sockets that are older than a task's management (6.12)",
        degrades_to: "such sockets get the share of the last change of the limit, and keep it",
        probe: |_| at_least(6, 12),
    },
    Feature {
        name: "peer-pidfd",
        used_for: "`shaper exec`: which process it is that asks (SO_PEERPIDFD, 6.5)",
        degrades_to: "`shaper exec` is refused; `shaper run` and `shaper adopt` work",
        probe: |_| match PeerProcess::probe() {
            Ok(true) => Availability::Available,
            Ok(false) => {
                Availability::Missing { evidence: "getsockopt for SO_PEERPIDFD: ENOPROTOOPT".into() }
            }
            Err(error) => unusable(&error),
        },
    },
    Feature {
        name: "psi",
        used_for: "pressure of CPU, memory and IO",
        degrades_to: "not measured",
        probe: |_| match fs::read("/proc/pressure/cpu") {
            Ok(_) => Availability::Available,
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Availability::Missing { evidence: "PSI is off; boot with psi=1".into() }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Availability::Missing { evidence: "no /proc/pressure".into() }
            }
            Err(error) => unusable(&error),
        },
    },
    Feature {
        name: "no-foreign-scheduler",
        used_for: "cpu.max and cpu.weight mean something",
        degrades_to: "a sched_ext scheduler is loaded: it may ignore CPU limits",
        probe: |_| own_scheduler(Path::new("/sys/kernel/sched_ext")),
    },
];

/// Probes everything. Nothing is changed.
pub fn probe(opener: &Opener) -> io::Result<Vec<Rung>> {
    let facts = Facts {
        hierarchies: Hierarchies::detect()?,
        status: fs::read_to_string("/proc/self/status")?,
        btf: Btf::of_kernel(),
        opener: opener.clone(),
    };
    let rung = |feature: &Feature| Rung {
        feature: feature.name.into(),
        used_for: feature.used_for.into(),
        availability: (feature.probe)(&facts),
        degrades_to: feature.degrades_to.into(),
    };
    Ok(LADDER.iter().map(rung).collect())
}

/// A row that is there only when it has something to say.
pub fn slot_table(cgroups_without_entry: u64) -> Option<Rung> {
    (cgroups_without_entry > 0).then(|| Rung {
        feature: "slot-table".into(),
        used_for: "cgroups below managed ones are found by one look-up".into(),
        availability: Availability::Unusable {
            reason: format!("{cgroups_without_entry} cgroups were made when it was full"),
        },
        degrades_to:
            "they are measured and limited as before, by a walk to their ancestors, which costs time at \
                      each switch and packet; release what makes cgroups by the thousand"
                .into(),
    })
}

/// A row for what the kernel programs count wrongly.
pub fn distrusted(measure: Measure, why: &str) -> Rung {
    let (used_for, degrades_to) = match measure {
        Measure::Cpu => ("CPU time by task", "CPU time from cpu.stat"),
        Measure::RunQueue => ("waiting for a CPU by task", "not measured"),
        Measure::Io => ("block IO and its latency by task", "bytes and operations from io.stat, no latency"),
    };
    Rung {
        feature: format!("self-test: {measure}"),
        used_for: used_for.into(),
        availability: Availability::Unusable { reason: format!("{why}; please report this with `uname -r`") },
        degrades_to: degrades_to.into(),
    }
}

/// A row for a kernel program that could not be attached.
pub fn program(name: &str, why: &str) -> Rung {
    let (used_for, degrades_to) = match name {
        "block_rq_complete" => {
            ("block IO and its latency by task", "bytes and operations from io.stat, no latency")
        }
        "kfree_skb" => ("packets that were thrown away on their way out", "not measured"),
        "tcp_retransmit_skb" => ("TCP segments that were sent again", "not measured"),
        "sched_stat_runtime" => ("a warning before a CPU quota is used up", "seen once it is, within 100 ms"),
        "device_admission" => (
            "GPU cards are opened by those tasks alone that were granted them",
            "`--cards` and `--gpus` are refused; whoever may open a device does",
        ),
        "uplink_ingress" => ("limits on what a task receives", "`--net-in` is refused"),
        _ => ("the end of an adopted cgroup, at once", "it is found within ten seconds"),
    };
    Rung {
        feature: format!("program {name}"),
        used_for: used_for.into(),
        availability: Availability::Unusable { reason: why.into() },
        degrades_to: degrades_to.into(),
    }
}

fn unusable(error: &io::Error) -> Availability {
    Availability::Unusable { reason: error.to_string() }
}

fn file(path: &Path) -> Availability {
    match fs::metadata(path) {
        Ok(_) => Availability::Available,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Availability::Missing { evidence: format!("no {}", path.display()) }
        }
        Err(error) => unusable(&error),
    }
}

fn capabilities(facts: &Facts) -> Availability {
    lacking_of(&facts.status)
        .map_or(Availability::Available, |lacking| Availability::Unusable { reason: lacking })
}

/// What this process may not do of what kernel programs need.
pub fn lacking() -> Option<String> {
    lacking_of(&fs::read_to_string("/proc/self/status").ok()?)
}

/// The same by `/proc/PID/status`.
fn lacking_of(status: &str) -> Option<String> {
    const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(_, bit)| effective >> bit & 1 == 0).map(|(name, _)| *name).collect();
    (!missing.is_empty()).then(|| format!("this process lacks {}", missing.join(", ")))
}

/// Whether the scheduler is the kernel's own, by the directory in which it tells of another.
fn own_scheduler(sched_ext: &Path) -> Availability {
    match fs::read_to_string(sched_ext.join("state")) {
        Ok(state) if state.trim() != "disabled" => {
            let name = fs::read_to_string(sched_ext.join("root/ops")).unwrap_or_default();
            Availability::Missing { evidence: format!("sched_ext scheduler `{}` is loaded", name.trim()) }
        }
        _ => Availability::Available,
    }
}

/// Whether the kernel has these fields.
fn fields(facts: &Facts, fields: &[(&str, &str, &[&str])]) -> Availability {
    let btf = match &facts.btf {
        Ok(btf) => btf,
        Err(error) => return Availability::Missing { evidence: error.to_string() },
    };
    for (_, name, path) in fields {
        if let Err(error) = btf.offset_of(name, path) {
            return Availability::Missing { evidence: error.to_string() };
        }
    }
    Availability::Available
}

fn controller(facts: &Facts, name: &str) -> Availability {
    let Some(hierarchies) = &facts.hierarchies else {
        return Availability::Missing { evidence: "no cgroup2 mount".into() };
    };
    match fs::read_to_string(hierarchies.v2.join("cgroup.controllers")) {
        Ok(list) if list.split_whitespace().any(|found| found == name) => Availability::Available,
        Ok(_) => Availability::Missing {
            evidence: format!("{name} is not in {}/cgroup.controllers", hierarchies.v2.display()),
        },
        Err(error) => unusable(&error),
    }
}

/// A core file, which every cgroup but the root has.
fn core_file(facts: &Facts, name: &str) -> Availability {
    let Some(hierarchies) = &facts.hierarchies else {
        return Availability::Missing { evidence: "no cgroup2 mount".into() };
    };
    let children = fs::read_dir(&hierarchies.v2).into_iter().flatten().flatten();
    let mut children = children.map(|entry| entry.path()).filter(|path| path.is_dir());
    match children.next() {
        Some(child) if child.join(name).exists() => Availability::Available,
        Some(_) => Availability::Missing { evidence: format!("no {name}") },
        None => at_least(5, 14),
    }
}

/// For what cannot be seen without using it.
fn at_least(major: u32, minor: u32) -> Availability {
    if is_at_least(major, minor) {
        Availability::Available
    } else {
        Availability::Missing { evidence: format!("kernel {}", release()) }
    }
}

/// Whether the running kernel is this version or a later one. A last resort: what can be probed, is.
pub fn is_at_least(major: u32, minor: u32) -> bool {
    let release = release();
    let mut parts = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
}

/// `uname -r`.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_this_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernel-support.md");
        let document = fs::read_to_string(&path).expect("docs/kernel-support.md");
        for Feature { name, used_for, degrades_to, .. } in LADDER {
            let row = format!("| `{name}` | {used_for} | {degrades_to} |");
            assert!(document.contains(&row), "docs/kernel-support.md lacks the row\n{row}");
        }
    }

    /// The files as 6.18 has them. No scheduler of others can be had where the tests run.
    #[test]
    fn a_foreign_scheduler_is_told_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let probe = || own_scheduler(folder.path());
        assert_eq!(probe(), Availability::Available);
        fs::write(folder.path().join("state"), "disabled\n").unwrap();
        assert_eq!(probe(), Availability::Available);
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::write(folder.path().join("root/ops"), "rusty_1.0\n").unwrap();
        fs::write(folder.path().join("state"), "enabled\n").unwrap();
        let evidence = "sched_ext scheduler `rusty_1.0` is loaded".into();
        assert_eq!(probe(), Availability::Missing { evidence });
    }

    #[test]
    fn probing_answers_for_every_feature() {
        assert_eq!(probe(&Opener::default()).unwrap().len(), LADDER.len());
    }
}
