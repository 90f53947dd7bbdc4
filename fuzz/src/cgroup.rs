//! What the kernel says in files whose content, or part of it, tasks and other tools decide.

use std::fmt::Debug;

use shaper_agent::{
    fuzz,
    kernel::{
        cgroup::{
            Contents, Setting,
            block::{ByDevice, CostModel, CostQos, IoLimits, IoStat, IoWeight, OfDevice},
            cpu::{CpuMax, CpuSet, CpuStat},
            groups::{Controllers, GroupEvents, GroupStat, GroupType, Processes},
            memory::{MemoryEvents, MemoryStat},
        },
        hierarchy::{Hierarchies, place_in},
        v1::{Shares, V1CpuStat, V1Limit, V1OomControl, V1Rates},
    },
};
use shaper_core::{
    limits::Limit,
    snapshot::Pressure,
    units::{Bytes, BytesPerSec, Iops, Micros, Weight},
};

/// What is read, if it can be; what cannot is said in a text of bounded length.
fn read<T: Contents>(text: &str) -> Option<T> {
    T::from_text(text).map_err(|malformed| assert!(malformed.to_string().len() < 4096)).ok()
}

/// What is written as it was read is read as the same.
fn same<T: Contents + Setting + PartialEq + Debug>(text: &str) -> Option<T> {
    let value: T = read(text)?;
    let written = value.text();
    assert_eq!(T::from_text(written.strip_suffix('\n').unwrap_or(&written)).as_ref(), Ok(&value));
    Some(value)
}

/// The same of a file with a line for each device, of which one is written at a time.
fn devices<T>(text: &str)
where
    T: Copy + PartialEq + Debug,
    ByDevice<T>: Contents,
    OfDevice<T>: Setting,
{
    for (device, value) in read::<ByDevice<T>>(text).unwrap_or_default() {
        let again = ByDevice::<T>::from_text(&OfDevice(device, value).text());
        // Of what the kernel chose itself only that is written.
        if let Some(again) = again.ok().filter(|again| !again.is_empty()) {
            assert_eq!(again, ByDevice::from([(device, value)]));
        }
    }
}

/// Files of cgroups. The first byte says which; they are read as [`shaper_agent::kernel::cgroup::Open::read`] does.
pub fn cgroup(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    match which % 26 {
        0 => {
            if let Some(max) = same::<CpuMax>(text) {
                let cores = max.cores();
                assert_eq!(cores.at().is_some(), max.quota.at().is_some());
                let _ = cores.to_string();
            }
        }
        1 => {
            if let Some(set) = same::<CpuSet>(text) {
                assert!(set.count() <= 1 << 32);
            }
        }
        2 => drop(read::<CpuStat>(text)),
        3 => drop(same::<Weight>(text)),
        4 => drop(same::<bool>(text)),
        5 => drop(same::<Micros>(text)),
        6 => drop(same::<Limit<Bytes>>(text)),
        7 => drop(same::<Bytes>(text)),
        8 => drop(read::<MemoryEvents>(text)),
        9 => drop(read::<MemoryStat>(text)),
        10 => devices::<IoLimits>(text),
        11 => devices::<CostQos>(text),
        12 => devices::<CostModel>(text),
        13 => drop(read::<ByDevice<IoStat>>(text)),
        14 => drop(read::<IoWeight>(text)),
        15 => drop(read::<Pressure>(text)),
        16 => drop(read::<GroupEvents>(text)),
        17 => {
            if let Some(Processes(found)) = read(text) {
                assert!(found.len() <= text.len());
            }
        }
        18 => drop(read::<Controllers>(text)),
        19 => drop((read::<GroupStat>(text), read::<GroupType>(text))),
        20 => drop(same::<Limit<u32>>(text)),
        21 => {
            same::<V1Limit<Micros>>(text);
            // What is written as -1 is shown as more than can be.
            if let Some(limit @ V1Limit(Limit::At(_))) = read::<V1Limit<Bytes>>(text) {
                assert_eq!(V1Limit::<Bytes>::from_text(&limit.text()), Ok(limit));
            }
        }
        22 => drop(same::<Shares>(text)),
        23 => drop(read::<V1Rates>(text)),
        24 => drop((read::<V1CpuStat>(text), read::<V1OomControl>(text))),
        _ => drop((same::<Iops>(text), same::<BytesPerSec>(text))),
    }
}

/// Files of /proc, and lines of a task's log.
pub fn proc(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    match which % 5 {
        0 => {
            if let Some(found) = Hierarchies::from_mountinfo(&text) {
                assert!(found.v1.len() <= 3 * text.len());
                assert_eq!(found.name() == "unified", found.v1.is_empty());
            }
        }
        1 => {
            for controller in [None, Some("cpu"), Some("memory")] {
                if let Some(place) = place_in(&text, controller) {
                    assert!(place.as_os_str().len() <= text.len());
                }
            }
        }
        2 => {
            // Whatever a task calls itself, the time of its start is behind that.
            let honest = b"1 (sh) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 8 9";
            assert_eq!(fuzz::start_time(honest), Some(4711));
            let name: Vec<u8> = data.iter().copied().filter(|byte| *byte != 0).take(15).collect();
            let stat = [b"1 (".as_slice(), &name, &honest[5..]].concat();
            assert_eq!(fuzz::start_time(&stat), Some(4711));
            let _ = fuzz::start_time(data);
        }
        3 => drop(fuzz::machine(&text)),
        _ => {
            let line = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
            if let Some((_, written)) = fuzz::log_line(line) {
                assert_eq!(written.strip_suffix(b"\n"), Some(line));
            }
        }
    }
}
