//! What every daemon tells of itself: its version, and what its process uses.

use std::{fs, sync::OnceLock, time::SystemTime};

use crate::{Exposition, Value, table};

/// The version of this build.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Adds the version, under the name of the daemon, and what this process uses. What cannot be read is not there.
pub fn build_and_process(exposition: &mut Exposition, daemon: &str) {
    exposition.add(&table::BUILD, &[daemon.to_owned(), BUILD.to_owned()], &[], Value::Info);
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
    exposition.add(&table::PROCESS_CPU, &[], &[], Value::Float(cpu));
    if let Some(start) = start() {
        exposition.add(&table::PROCESS_START, &[], &[], Value::Float(start));
    }
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = statm.split(' ').map(|pages| pages.parse::<u64>().unwrap_or(0));
    let page = rustix::param::page_size() as u64;
    for family in [&table::PROCESS_VIRTUAL_MEMORY, &table::PROCESS_MEMORY] {
        if let Some(pages) = pages.next() {
            exposition.add(family, &[], &[], Value::Count(pages * page));
        }
    }
    if let Ok(files) = fs::read_dir("/proc/self/fd") {
        // One of them is that of this look.
        exposition.add(&table::PROCESS_FILES, &[], &[], Value::Count(files.count().saturating_sub(1) as u64));
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if let Some(limit) = limit {
        exposition.add(&table::PROCESS_MOST_FILES, &[], &[], Value::Count(limit));
    }
}

/// When this process started, seconds since 1970, by the kernel: found once, since the clock may be set.
fn start() -> Option<f64> {
    static START: OnceLock<Option<f64>> = OnceLock::new();
    *START.get_or_init(|| {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // Behind the name, which may have anything in it, fields begin with the third.
        let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()?;
        let since_boot = ticks / rustix::param::clock_ticks_per_second() as f64;
        let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let age = uptime.tv_sec as f64 + uptime.tv_nsec as f64 / 1e9 - since_boot;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(now.as_secs_f64() - age)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;

    #[test]
    fn this_process_is_there_with_all_its_figures() {
        let mut exposition = Exposition::default();
        build_and_process(&mut exposition, "shaper-test");
        let text = exposition.encode(Format::OpenMetrics).unwrap();
        assert!(
            text.contains(&format!("shaper_build_info{{daemon=\"shaper-test\",version=\"{BUILD}\"}} 1\n"))
        );
        for family in &table::EVERYWHERE[1..7] {
            assert!(text.contains(family.name), "{} is not in {text}", family.name);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let start = start().unwrap();
        assert!(start <= now + 1.0 && now - start < 86_400.0, "{start} {now}");
    }
}
