//! Real traces, from the folder that `SHAPER_DATA` names (by default `../shared/data` beside the repository).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context, Result, bail};
use shaper_core::{
    place::{Cluster, Constraint, ConstraintId, GpuRequest, Gpus, NodeSpec, Request},
    spec::{Capacity, Demand, Priority},
    units::{Bytes, Millicores},
};

use crate::traces;

const MIB: u64 = 1 << 20;

/// A node of Alibaba's GPU trace "openb".
#[derive(Clone)]
pub(super) struct NodeShape {
    pub(super) cpu: u64,
    pub(super) memory: u64,
    pub(super) gpus: u8,
    pub(super) model: String,
}

impl NodeShape {
    pub(super) fn spec(&self, number: usize, labels: BTreeMap<String, String>) -> NodeSpec {
        NodeSpec {
            name: format!("node-{number}"),
            capacity: Capacity {
                cpu: Millicores(self.cpu),
                memory: Bytes(self.memory),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            gpus: Gpus { count: self.gpus, model: Some(self.model.clone()) },
            labels,
            taints: BTreeSet::new(),
        }
    }
}

/// A task of the trace.
#[derive(Clone)]
pub(super) struct TaskShape {
    pub(super) cpu: u64,
    pub(super) memory: u64,
    pub(super) gpu: GpuRequest,
    pub(super) models: BTreeSet<String>,
}

impl TaskShape {
    pub(super) fn request(
        &self,
        cluster: &mut Cluster,
        labels: &BTreeMap<String, BTreeSet<String>>,
    ) -> Request {
        self.with(cluster.constraint(&self.constraint(labels)))
    }

    pub(super) fn constraint(&self, labels: &BTreeMap<String, BTreeSet<String>>) -> Constraint {
        Constraint { labels: labels.clone(), gpu_models: self.models.clone(), ..Constraint::default() }
    }

    pub(super) fn with(&self, constraint: ConstraintId) -> Request {
        Request {
            demand: Demand {
                cpu: Millicores(self.cpu),
                memory: Bytes(self.memory),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            gpu: self.gpu,
            constraint,
            priority: Priority::Medium,
        }
    }
}

/// The trace's nodes; `None`: the data are not on this machine.
pub(super) fn nodes() -> Result<Option<Vec<NodeShape>>> {
    let path = traces::folder().join("openb/openb_node_list_gpu_node.csv");
    if !path.exists() {
        return Ok(None);
    }
    let node = |row: &[&str]| {
        Ok(NodeShape {
            cpu: row[1].parse()?,
            memory: row[2].parse::<u64>()? * MIB,
            gpus: row[3].parse()?,
            model: row[4].to_owned(),
        })
    };
    rows(&path, 5, node).map(Some)
}

/// The trace's lists of tasks, by name.
pub(super) fn workloads() -> Result<Vec<String>> {
    let folder = traces::folder().join("openb");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let name = name.strip_prefix("openb_pod_list_").and_then(|name| name.strip_suffix(".csv"));
        names.extend(name.map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

pub(super) fn tasks(workload: &str) -> Result<Vec<TaskShape>> {
    let task = |row: &[&str]| {
        let share = row[4].parse::<u16>().unwrap_or(0);
        let gpu = match row[3].parse::<u8>().unwrap_or(0) {
            0 => GpuRequest::None,
            1 => GpuRequest::Share(share),
            count => GpuRequest::Whole(count),
        };
        let models = row.get(5).unwrap_or(&"").split('|').filter(|model| !model.is_empty());
        Ok(TaskShape {
            cpu: row[1].parse()?,
            memory: row[2].parse::<u64>()? * MIB,
            gpu,
            models: models.map(str::to_owned).collect(),
        })
    };
    rows(&traces::folder().join(format!("openb/openb_pod_list_{workload}.csv")), 5, task)
}

/// Published GPU allocation, percent, at arrivals of 100 and 130 %: of ten seeds.
#[derive(Clone, Copy)]
pub(super) struct Published {
    pub(super) means: [f64; 2],
    pub(super) deviations: [f64; 2],
}

/// By workload and policy.
pub(super) fn published() -> Result<BTreeMap<(String, String), Published>> {
    let path = traces::folder().join("openb/published_gpu_allocation.csv");
    let row = |row: &[&str]| {
        let policy = row[1].split_once('-').map_or(row[1], |(_, name)| name);
        let means = [row[3].parse()?, row[5].parse()?];
        let deviations = [row[4].parse()?, row[6].parse()?];
        Ok(((row[0].to_owned(), policy.to_owned()), Published { means, deviations }))
    };
    Ok(rows(&path, 7, row)?.into_iter().collect())
}

fn rows<T>(path: &Path, columns: usize, read: impl Fn(&[&str]) -> Result<T>) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate().skip(1) {
        let row: Vec<&str> = line.split(',').collect();
        if row.len() < columns {
            bail!("{}:{}: {} columns instead of {columns}", path.display(), number + 1, row.len());
        }
        found.push(read(&row).with_context(|| format!("{}:{}", path.display(), number + 1))?);
    }
    Ok(found)
}

/// A stream of numbers that look random and are the same in each run (xorshift64*).
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(7919).wrapping_add(1));
        for _ in 0..16 {
            random.next();
        }
        random
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// From 0 to below `count`, which is not 0.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        ((u128::from(self.next()) * count as u128) >> 64) as usize
    }

    pub(super) fn shuffle<T>(&mut self, of: &mut [T]) {
        for at in (1..of.len()).rev() {
            of.swap(at, self.below(at + 1));
        }
    }
}
