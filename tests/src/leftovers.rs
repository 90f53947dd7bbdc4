//! A search for what an agent may have left in the kernel.

use std::{collections::BTreeSet, path::PathBuf};

use aya::programs::{SchedClassifier, tc::TcAttachType};

use crate::{
    agent::Agent,
    cgroup::{mounts, named},
    net::{DEVICE, NetPair},
    pins::{all_link_ids, links},
    time::eventually,
};

/// What must be gone once everything is released. Taken while the agent still holds it.
pub struct Leftovers<'a> {
    name: String,
    bpffs_dir: PathBuf,
    links: BTreeSet<u32>,
    network: Option<&'a NetPair>,
}

impl<'a> Leftovers<'a> {
    /// What `agent` holds now, on the near device of `network` too.
    pub fn of(agent: &Agent, network: Option<&'a NetPair>) -> Leftovers<'a> {
        let bpffs_dir = agent.bpffs_dir();
        let links: BTreeSet<u32> = links(&bpffs_dir).values().map(|link| link.id).collect();
        let leftovers = Leftovers { name: agent.name().to_owned(), bpffs_dir, links, network };
        let found = leftovers.found();
        assert!(found.len() > leftovers.links.len(), "the search does not see what is there: {found:?}");
        leftovers
    }

    /// Asserts that nothing of it is left.
    #[track_caller]
    pub fn assert_none(&self) {
        // The kernel frees a link after its last reference is gone, on a worker of its own.
        eventually("the links are gone", || self.links.is_disjoint(&all_link_ids()));
        let found = self.found();
        assert!(found.is_empty(), "left behind: {found:#?}");
    }

    fn found(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        if self.bpffs_dir.exists() {
            found.push(format!("pins in {}", self.bpffs_dir.display()));
        }
        found.extend(self.links.intersection(&all_link_ids()).map(|id| format!("BPF link {id}")));
        let (v2, v1) = mounts();
        for mount in v1.iter().chain([&v2]) {
            found.extend(named(mount, &self.name).map(|group| format!("cgroup {}", group.display())));
        }
        found.extend(self.network.into_iter().flat_map(on_the_device));
        found
    }
}

/// What hangs on the near device: tcx programs, and the qdisc clsact with its filters.
fn on_the_device(network: &NetPair) -> Vec<String> {
    let qdiscs = network.near.tc(&["qdisc", "show", "dev", DEVICE]);
    let qdiscs =
        qdiscs.lines().filter(|line| line.contains("clsact")).map(|line| format!("{DEVICE}: {line}"));
    // An error is that of a kernel without tcx.
    let tcx = network.near.within(|| SchedClassifier::query_tcx(DEVICE, TcAttachType::Egress));
    let tcx = tcx.map(|(_, programs)| programs).unwrap_or_default();
    qdiscs.chain(tcx.iter().map(|program| format!("{DEVICE}: tcx program {}", program.id()))).collect()
}
