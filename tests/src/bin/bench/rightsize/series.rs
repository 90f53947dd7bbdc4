//! Recorded use: `data/usage`.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::traces;

/// Where a series is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    Bitbrains,
    Crane,
    Alibaba,
    Nab,
}

impl Set {
    pub(super) const ALL: [Set; 4] = [Set::Bitbrains, Set::Crane, Set::Alibaba, Set::Nab];

    pub(super) fn name(self) -> &'static str {
        match self {
            Set::Bitbrains => "Bitbrains",
            Set::Crane => "Crane",
            Set::Alibaba => "Alibaba container",
            Set::Nab => "NAB",
        }
    }
}

/// What one container or machine used of CPU.
pub(crate) struct Series {
    pub(crate) set: Set,
    /// Seconds from one value to the next.
    pub(crate) step: u64,
    /// What the machine has, where that is recorded.
    pub(crate) cores: Option<f64>,
    /// Millicores. Of Crane and NAB the unit is not stated, or a percentage: one of it counts as a core.
    pub(crate) used: Vec<u64>,
}

/// All series of CPU use, or nothing if the folder is not there.
pub(crate) fn cpu() -> Result<Option<Vec<Series>>> {
    let folder = traces::folder().join("usage");
    if !folder.exists() {
        return Ok(None);
    }
    let mut all = bitbrains(&folder.join("bitbrains"))?;
    for path in files(&folder.join("crane"), "gz")? {
        let used = column(&traces::unpacked(&path)?, ',', 1, 1000.0)?;
        all.push(Series { set: Set::Crane, step: 60, cores: None, used });
    }
    for path in files(&folder.join("vasim"), "csv")? {
        let used = column(&read(&path)?, ',', 1, 1000.0)?;
        all.push(Series { set: Set::Alibaba, step: 60, cores: None, used });
    }
    for path in files(&folder.join("nab"), "csv")? {
        let used = column(&read(&path)?, ',', 1, 1000.0)?;
        all.push(Series { set: Set::Nab, step: 300, cores: None, used });
    }
    Ok(Some(all))
}

/// What the one machine of which it is recorded used of memory: bytes, every five minutes.
pub(super) fn memory() -> Result<Option<Vec<u64>>> {
    let path = traces::folder().join("usage/bitbrains/one-vm-cpu-mem-disk-net.csv");
    if !path.exists() {
        return Ok(None);
    }
    column(&read(&path)?, ';', 6, 1024.0).map(Some)
}

/// CPU in MHz; a row stands for as many steps as it is long.
fn bitbrains(folder: &Path) -> Result<Vec<Series>> {
    const STEP: u64 = 300;
    let mut machines = BTreeMap::new();
    for row in read(&folder.join("meta.csv"))?.lines().skip(1) {
        let fields: Vec<&str> = row.split(',').collect();
        let [id, _, _, cores, capacity, ..] = fields[..] else { bail!("a row of meta.csv is short: {row}") };
        machines.insert(id.to_owned(), (cores.parse::<f64>()?, capacity.parse::<f64>()?));
    }
    let mut all: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for row in traces::unpacked(&folder.join("trace.csv.gz"))?.lines().skip(1) {
        let fields: Vec<&str> = row.split(',').collect();
        let [id, _, millis, _, mhz] = fields[..] else {
            bail!("a row of the trace is not of five fields: {row}")
        };
        let (cores, capacity) = machines.get(id).with_context(|| format!("meta.csv has no machine {id}"))?;
        let steps = (millis.parse::<u64>()? + STEP * 500) / (STEP * 1000);
        let used = scaled(mhz.parse::<f64>()?, 1000.0 * cores / capacity);
        all.entry(id.to_owned()).or_default().extend((0..steps.max(1)).map(|_| used));
    }
    let of = |(id, used): (String, Vec<u64>)| {
        let cores = machines.get(&id).map(|(cores, _)| *cores);
        Series { set: Set::Bitbrains, step: STEP, cores, used }
    };
    Ok(all.into_iter().map(of).collect())
}

/// In the order of their names.
fn files(folder: &Path, extension: &str) -> Result<Vec<std::path::PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|of_path| of_path == extension));
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Numbers of a column, below the heading, so many times as great.
fn column(text: &str, separator: char, index: usize, times: f64) -> Result<Vec<u64>> {
    let value = |row: &str| {
        let field = row.split(separator).nth(index).with_context(|| format!("a row is short: {row}"))?;
        Ok(scaled(field.trim().parse::<f64>().with_context(|| format!("not a number: {field}"))?, times))
    };
    text.lines().skip(1).filter(|row| !row.trim().is_empty()).map(value).collect()
}

fn scaled(value: f64, times: f64) -> u64 {
    (value * times).round().max(0.0) as u64
}
