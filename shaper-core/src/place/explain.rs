//! Why a task goes where it goes, or nowhere: as data.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    class::Mismatch,
    cluster::Cluster,
    node::{NodeId, Readiness, WHOLE},
    scorer::Scoring,
    task::{GpuRequest, Request},
};
use crate::units::{BitsPerSec, Bytes, Iops, Millicores};

/// What a node can fail by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// It takes no tasks now.
    Readiness,
    /// A label.
    Label,
    /// A taint.
    Taint,
    /// The model of its GPUs.
    GpuModel,
    /// CPU.
    Cpu,
    /// Memory.
    Memory,
    /// Network.
    Network,
    /// Block IO.
    StorageIo,
    /// Memory of one GPU.
    GpuMemory,
    /// A share of one GPU.
    GpuShare,
    /// GPUs that nobody else uses.
    Gpus,
}

impl Filter {
    const ALL: [Filter; 11] = [
        Filter::Readiness,
        Filter::Label,
        Filter::Taint,
        Filter::GpuModel,
        Filter::Cpu,
        Filter::Memory,
        Filter::Network,
        Filter::StorageIo,
        Filter::GpuMemory,
        Filter::GpuShare,
        Filter::Gpus,
    ];

    /// How an amount of it reads; `None`: it is not an amount.
    fn show(self, amount: u64) -> Option<String> {
        Some(match self {
            Filter::Readiness | Filter::Label | Filter::Taint | Filter::GpuModel => return None,
            Filter::Cpu => format!("{} cores", Millicores(amount)),
            Filter::Memory | Filter::GpuMemory => Bytes(amount).to_string(),
            Filter::Network => BitsPerSec(amount).to_string(),
            Filter::StorageIo => Iops(amount).to_string(),
            Filter::GpuShare => format!("{amount}/1000 of a GPU"),
            Filter::Gpus => format!("{amount} whole GPUs"),
        })
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Filter::Readiness => "readiness",
            Filter::Label => "label",
            Filter::Taint => "taint",
            Filter::GpuModel => "gpu_model",
            Filter::Cpu => "cpu",
            Filter::Memory => "memory",
            Filter::Network => "network",
            Filter::StorageIo => "storage_io",
            Filter::GpuMemory => "gpu_memory",
            Filter::GpuShare => "gpu_share",
            Filter::Gpus => "gpus",
        })
    }
}

/// One thing that keeps a task off a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obstacle {
    /// It takes no tasks.
    Readiness(Readiness),
    /// Its kind does not suit.
    Kind(Mismatch),
    /// More is wanted than is free.
    Lacks {
        /// Of what.
        of: Filter,
        /// Wanted.
        wanted: u64,
        /// Free.
        free: u64,
    },
}

impl Obstacle {
    /// What the node fails by.
    pub fn filter(&self) -> Filter {
        match self {
            Obstacle::Readiness(_) => Filter::Readiness,
            Obstacle::Kind(Mismatch::Label { .. }) => Filter::Label,
            Obstacle::Kind(Mismatch::Taint(_)) => Filter::Taint,
            Obstacle::Kind(Mismatch::GpuModel(_)) => Filter::GpuModel,
            Obstacle::Lacks { of, .. } => *of,
        }
    }

    /// What is missing, in thousandths of what is wanted: the less, the nearer.
    fn distance(&self) -> u64 {
        match self {
            Obstacle::Readiness(_) | Obstacle::Kind(_) => 0,
            Obstacle::Lacks { wanted, free, .. } => {
                (u128::from(wanted - wanted.min(free)) * 1000 / u128::from((*wanted).max(1))) as u64
            }
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Readiness(Readiness::Ready) => f.write_str("it has no CPU or no memory"),
            Obstacle::Readiness(Readiness::Cordoned) => f.write_str("it is cordoned"),
            Obstacle::Readiness(Readiness::Draining) => f.write_str("it is being drained"),
            Obstacle::Readiness(Readiness::UnderPressure) => f.write_str("its tasks stall now"),
            Obstacle::Readiness(Readiness::Away) => f.write_str("its agent is not connected"),
            Obstacle::Kind(Mismatch::Label { key, is: None }) => write!(f, "it has no label {key}"),
            Obstacle::Kind(Mismatch::Label { key, is: Some(is) }) => write!(f, "its label {key} is {is}"),
            Obstacle::Kind(Mismatch::Taint(taint)) => {
                write!(f, "its taint {}={} is not tolerated", taint.key, taint.value)
            }
            Obstacle::Kind(Mismatch::GpuModel(None)) => f.write_str("it has no GPU of a known model"),
            Obstacle::Kind(Mismatch::GpuModel(Some(model))) => write!(f, "its GPUs are {model}"),
            Obstacle::Lacks { of, wanted, free } => {
                let show = |amount: u64| of.show(amount).unwrap_or_else(|| amount.to_string());
                write!(f, "{of}: {} wanted, {} free", show(*wanted), show(*free))
            }
        }
    }
}

/// What one filter did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejections {
    /// Which.
    pub filter: Filter,
    /// How many nodes it kept out.
    pub nodes: u32,
    /// Of them, those that nothing else would have kept out: what there was to change to have them.
    pub alone: u32,
    /// The node that came nearest, and by how much it failed. Of those that nothing else kept out, if there are any.
    pub nearest: (String, Obstacle),
}

/// A node that fits, and what each scorer gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranked {
    /// The node.
    pub node: String,
    /// Points, of [`POINTS`](super::POINTS) for each unit of a scorer's weight. What is equal here may still differ for a
    /// scorer that decides alone, which compares exactly.
    pub points: u64,
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// All nodes.
    pub nodes: u32,
    /// Those that it fits on.
    pub feasible: u32,
    /// The node that is decided for.
    pub winner: Option<String>,
    /// The filters that kept any out.
    pub rejections: Vec<Rejections>,
    /// The best nodes by points.
    pub top: Vec<Ranked>,
    /// Resources that some nodes do not know, and so were not filtered by, with the number of those nodes.
    pub not_checked: Vec<(Filter, u32)>,
}

/// Nodes that are ranked.
const TOP: usize = 3;

impl Explanation {
    /// What would make it fit: each of these alone would do.
    pub fn remedies(&self) -> impl Iterator<Item = &Rejections> {
        self.rejections.iter().filter(|rejections| rejections.alone > 0)
    }
}

impl Cluster {
    /// Everything that keeps a task off a node now.
    pub fn obstacles(&self, id: NodeId, request: &Request) -> Vec<Obstacle> {
        let Some(node) = self.nodes.get(id.0 as usize) else { return Vec::new() };
        let mut found = Vec::new();
        if !node.is_open() {
            found.push(Obstacle::Readiness(node.readiness));
        }
        let constraint = &self.classes.decided(request.constraint).constraint;
        found.extend(self.classes.of(node.class).mismatches(constraint).into_iter().map(Obstacle::Kind));
        let plain = [Filter::Cpu, Filter::Memory, Filter::Network, Filter::StorageIo];
        for (resource, (of, wanted)) in plain.into_iter().zip(request.plain()).enumerate() {
            let free = node.free(resource);
            if wanted > free {
                found.push(Obstacle::Lacks { of, wanted, free });
            }
        }
        let memory = request.gpu_memory();
        let memory_free = match (node.gpus, node.gpu_memory) {
            (0, u64::MAX) => u64::MAX,
            _ => node.gpu_numbers().map(|gpu| node.gpu_memory_free(gpu)).max().unwrap_or(0),
        };
        if memory > memory_free {
            found.push(Obstacle::Lacks { of: Filter::GpuMemory, wanted: memory, free: memory_free });
        }
        let (of, wanted, free) = match request.gpu {
            GpuRequest::None => return found,
            GpuRequest::Share(share) => {
                // Where there is enough memory: it must be the same GPU.
                let with_memory = node.gpu_numbers().filter(|gpu| memory <= node.gpu_memory_free(*gpu));
                let most = with_memory.map(|gpu| WHOLE.saturating_sub(node.taken[gpu])).max();
                (Filter::GpuShare, share.max(1), most.unwrap_or(0))
            }
            GpuRequest::Whole(count) => {
                let whole = node.gpu_numbers().filter(|gpu| node.is_whole(*gpu)).count();
                (Filter::Gpus, u16::from(count), whole as u16)
            }
        };
        if wanted > free {
            found.push(Obstacle::Lacks { of, wanted: wanted.into(), free: free.into() });
        }
        found
    }

    /// Why the task goes where it goes, or nowhere. It looks at every node.
    pub fn explain(&mut self, request: &Request, scoring: &Scoring) -> Explanation {
        let winner = self.decide(request, scoring);
        let mut kept_out: [Option<Rejections>; Filter::ALL.len()] = Default::default();
        let mut top = Vec::new();
        let mut feasible = 0;
        for id in self.ids() {
            let obstacles = self.obstacles(id, request);
            if obstacles.is_empty() {
                feasible += 1;
                top.push((self.weighted_points(id, request, scoring), id));
            }
            let is_alone = obstacles.len() == 1;
            for obstacle in obstacles {
                let filter = obstacle.filter();
                let name = || self.specs[id.0 as usize].name.clone();
                let slot = &mut kept_out[filter as usize];
                let rejections = slot.get_or_insert_with(|| Rejections {
                    filter,
                    nodes: 0,
                    alone: 0,
                    nearest: (name(), obstacle.clone()),
                });
                rejections.nodes += 1;
                let is_nearer = if is_alone == (rejections.alone > 0) {
                    obstacle.distance() < rejections.nearest.1.distance()
                } else {
                    is_alone
                };
                if is_nearer {
                    rejections.nearest = (name(), obstacle);
                }
                rejections.alone += u32::from(is_alone);
            }
        }
        top.sort_unstable_by_key(|(points, id)| (std::cmp::Reverse(*points), *id));
        let ranked =
            |(points, id): (u64, NodeId)| Ranked { node: self.specs[id.0 as usize].name.clone(), points };
        Explanation {
            nodes: self.nodes.len() as u32,
            feasible,
            winner: winner.map(|at| self.specs[at.node.0 as usize].name.clone()),
            rejections: kept_out.into_iter().flatten().collect(),
            top: top.into_iter().take(TOP).map(ranked).collect(),
            not_checked: self.not_checked(request),
        }
    }

    fn weighted_points(&mut self, id: NodeId, request: &Request, scoring: &Scoring) -> u64 {
        let points = |(scorer, weight): &(_, u32)| {
            self.points(*scorer, id, request).map_or(0, |(points, _)| points * u64::from(*weight))
        };
        scoring.parts().iter().map(points).sum()
    }

    fn not_checked(&self, request: &Request) -> Vec<(Filter, u32)> {
        let [_, _, network, io] = request.plain();
        let count = |is_unknown: fn(&super::node::Node) -> bool| {
            self.nodes.iter().filter(|node| is_unknown(node)).count() as u32
        };
        let rows = [
            (Filter::Network, network, count(|node| node.total[2] == u64::MAX)),
            (Filter::StorageIo, io, count(|node| node.total[3] == u64::MAX)),
            (Filter::GpuMemory, request.gpu_memory(), count(|node| node.gpu_memory == u64::MAX)),
        ];
        let is_of_interest = |(_, wanted, nodes): &(Filter, u64, u32)| *wanted > 0 && *nodes > 0;
        rows.into_iter().filter(is_of_interest).map(|(filter, _, nodes)| (filter, nodes)).collect()
    }
}
