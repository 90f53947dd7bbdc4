//! The test that the programs count what happens, on the agent itself: a wrong offset of a number is not refused by
//! the verifier, and would be reported as truth.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mm::{MapFlags, ProtFlags, mmap_anonymous, munmap},
    thread::gettid,
    time::{ClockId, clock_gettime},
};
use shaper_common::abi::{IO_WRITE, IoKey, IoStat, SLOT_AGENT};

use super::{Bpf, Counters, Measure};
use crate::kernel::mapped::monotonic_ns;

/// How often something must be counted wrongly to be wrong.
const TRIES: u32 = 3;
/// Rounds of work and rest.
const ROUNDS: u32 = 8;
const WORK: Duration = Duration::from_millis(2);
/// Long enough for the thread to leave its CPU.
const REST: Duration = Duration::from_micros(500);
/// One direct write.
const BLOCK: usize = 4096;
const O_DIRECT: i32 = libc::O_DIRECT;

/// What is counted wrongly, and how: in each of [`TRIES`], as what counts wrongly does. On a machine that stands still
/// for moments, what the clocks say of so short a time may be far apart once. `scratch` is a directory for a file of one
/// block. The agent's cgroup has [`SLOT_AGENT`].
pub(super) fn run(bpf: &Bpf, scratch: &Path) -> Vec<(Measure, String)> {
    let mut wrong = once(bpf, scratch);
    for _ in 1..TRIES {
        if wrong.is_empty() {
            break;
        }
        let again = once(bpf, scratch);
        wrong.retain(|(measure, _)| again.iter().any(|(wrong, _)| wrong == measure));
    }
    wrong
}

fn once(bpf: &Bpf, scratch: &Path) -> Vec<(Measure, String)> {
    let mut wrong = Vec::new();
    // What a thread has run before the programs first saw it switch is not counted.
    thread::sleep(REST);
    let waits_before = bpf.histograms(SLOT_AGENT).run_queue;
    let waited_before = waited_ns();
    let (before, used_before) = (bpf.counters(SLOT_AGENT), process_cpu_ns());
    for _ in 0..ROUNDS {
        thread::sleep(REST);
        let work = Instant::now();
        while work.elapsed() < WORK {
            std::hint::spin_loop();
        }
    }
    let (after, used_after) = (bpf.counters(SLOT_AGENT), process_cpu_ns());
    let waited = waited_ns();
    if !runs_here(bpf) {
        wrong.push((Measure::Cpu, "the thread that runs is not the one that is said to".into()));
    }
    let (used, counted) = (used_after - used_before, after.cpu_ns.saturating_sub(before.cpu_ns));
    if counted.abs_diff(used) > used / 4 + 2_000_000 {
        wrong.push((Measure::Cpu, format!("{counted} ns of CPU time are counted where {used} were used")));
    }
    let waits = bpf.histograms(SLOT_AGENT).run_queue.since(&waits_before).total();
    let waited = waited.zip(waited_before).map(|(after, before)| after.saturating_sub(before));
    if let Some(why) = waits_are_wrong(&before, &after, waits, waited) {
        wrong.push((Measure::RunQueue, why));
    }
    if bpf.counts_io()
        && let Some(why) = io_is_wrong(bpf, scratch)
    {
        wrong.push((Measure::Io, why));
    }
    wrong
}

/// Whether the state of some CPU is that this thread runs there, which it does.
fn runs_here(bpf: &Bpf) -> bool {
    let this = gettid().as_raw_nonzero().get() as u32;
    // Not every kernel reports every switch: the next one will be.
    (0..ROUNDS).any(|_| {
        let is_there = bpf.cpu_states().iter().any(|cpu| cpu.pid == this && cpu.slot == SLOT_AGENT);
        if !is_there {
            thread::sleep(REST);
        }
        is_there
    })
}

/// `waited`: by the kernel's own count, if it keeps one.
fn waits_are_wrong(before: &Counters, after: &Counters, waits: u64, waited: Option<u64>) -> Option<String> {
    if waits == 0 {
        return Some("no wait for a CPU was seen where there were several".into());
    }
    let (counted, waited) = (after.wait_ns.wrapping_sub(before.wait_ns), waited?);
    let is_close = counted.abs_diff(waited) <= waited / 4 + 2_000_000;
    (!is_close)
        .then(|| format!("{counted} ns of waiting for a CPU are counted where the kernel counts {waited}"))
}

/// How long the threads of this process have waited for a CPU, ns: the second number of their schedstat.
fn waited_ns() -> Option<u64> {
    let of_thread = |entry: io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(entry.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').nth(1)?.parse::<u64>().ok()
    };
    let waited: Vec<u64> = fs::read_dir("/proc/self/task").ok()?.filter_map(of_thread).collect();
    if waited.is_empty() { None } else { Some(waited.into_iter().sum()) }
}

/// Writes one block to the device, and looks at what was counted. Where nothing was, as for a file system without a
/// block device, or one that has no requests, nothing is known.
fn io_is_wrong(bpf: &Bpf, scratch: &Path) -> Option<String> {
    let mine = |io: BTreeMap<IoKey, IoStat>| {
        let of_agent = io.into_iter().filter(|(key, _)| key.slot == SLOT_AGENT && key.direction == IO_WRITE);
        of_agent.map(|(key, stat)| (key.device, stat)).collect::<BTreeMap<_, _>>()
    };
    let before = mine(bpf.block_io().ok()?);
    let start = monotonic_ns();
    if let Err(error) = write_block(&scratch.join("self-test")) {
        tracing::debug!(%error, "no direct write to test the count of block IO with");
        return None;
    }
    let took = monotonic_ns() - start;
    for (device, after) in mine(bpf.block_io().ok()?) {
        let before = before.get(&device).copied().unwrap_or_default();
        let (bytes, operations) = (after.bytes - before.bytes, after.operations - before.operations);
        if bytes == 0 && operations == 0 {
            continue;
        }
        let latency_ns = after.latency_ns - before.latency_ns;
        if bytes > 64 * BLOCK as u64 || operations == 0 || operations > 64 || latency_ns > took * operations {
            return Some(format!(
                "a write of {BLOCK} bytes in {took} ns is counted as {bytes} bytes in {operations} operations of \
                 {latency_ns} ns"
            ));
        }
    }
    None
}

fn write_block(path: &Path) -> io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).custom_flags(O_DIRECT).open(path)?;
    // Direct writes are of aligned memory.
    // SAFETY: a new mapping of one block, which nothing else knows; it is unmapped below.
    let block = unsafe {
        mmap_anonymous(std::ptr::null_mut(), BLOCK, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
    };
    // SAFETY: the mapping above, zeroed by the kernel.
    let written = file.write_all(unsafe { std::slice::from_raw_parts(block.cast::<u8>(), BLOCK) });
    let written = written.and_then(|()| file.sync_all());
    // SAFETY: the mapping above, which nothing refers to any more.
    unsafe { munmap(block, BLOCK)? };
    let removed = fs::remove_file(path);
    written.and(removed)
}

fn process_cpu_ns() -> u64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_what_the_kernel_says() {
        let at = |wait_ns| Counters { wait_ns, ..Counters::default() };
        let second = 1_000_000_000;
        assert_eq!(waits_are_wrong(&at(5), &at(second), 3, Some(second)), None);
        assert_eq!(waits_are_wrong(&at(5), &at(second), 3, None), None);
        assert!(waits_are_wrong(&at(5), &at(second), 0, Some(second)).is_some());
        assert!(waits_are_wrong(&at(0), &at(second), 1, Some(1)).is_some());
        assert!(waits_are_wrong(&at(10), &at(5), 1, Some(0)).is_some());
    }

    #[test]
    fn a_block_is_written_where_the_file_system_takes_direct_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("block");
        match write_block(&path) {
            Ok(()) => assert!(!path.exists()),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}"),
        }
    }
}
