//! Tasks that note when they do what, and who reads that: a record is two numbers in a file.
//!
//! None of them asks for its CPU time while it works, but through `/proc/…/schedstat`: any other question has the scheduler
//! charge what has run so far, which it would else do at the next tick, and the kernel programs would see it at once. None
//! of them says that it only waits, either: an emulated CPU stops for that.

use std::{
    fs::{self, File, OpenOptions},
    hint::black_box,
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    time::{ClockId, clock_gettime},
};
use shaper_tests::time::monotonic_ns;

use crate::load::pin;

pub(crate) fn run(kind: &str, arguments: &[&str]) -> Result<()> {
    match (kind, arguments) {
        ("hogs", [cpus]) => hogs(cpus),
        ("greed", [threads]) => greed(threads.parse()?),
        ("requests", [file, pattern]) => requests(Path::new(file), &Pattern::parse(pattern)?),
        ("cross", [file, budget, all]) => cross(Path::new(file), budget.parse()?, all.parse()?),
        ("observe", [file, quota]) => observe(Path::new(file), Path::new(quota)),
        _ => bail!("there is no load {kind} {arguments:?}"),
    }
}

/// What a task, or who observes it, has noted: what each number is depends on who wrote it.
pub(crate) type Record = (u64, u64);

/// Reads all there is.
pub(crate) fn records(file: &Path) -> Result<Vec<Record>> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
    Ok(bytes.chunks_exact(16).map(|record| (word(&record[..8]), word(&record[8..]))).collect())
}

/// Adds records; those of several threads do not mix.
#[derive(Clone)]
pub(crate) struct Records(std::sync::Arc<File>);

impl Records {
    pub(crate) fn open(file: &Path) -> Result<Records> {
        let opened = OpenOptions::new().create(true).append(true).open(file);
        Ok(Records(opened.with_context(|| format!("cannot open {}", file.display()))?.into()))
    }

    pub(crate) fn add(&self, (first, second): Record) -> Result<()> {
        let bytes = [first.to_ne_bytes(), second.to_ne_bytes()].concat();
        (&*self.0).write_all(&bytes).context("cannot note what happened")
    }
}

/// Uses these CPUs, `0,1`, each with a thread that stays there.
fn hogs(cpus: &str) -> Result<()> {
    let threads: Vec<_> = cpus
        .split(',')
        .map(|cpu| {
            let cpu = cpu.to_owned();
            thread::spawn(move || -> Result<()> {
                pin(&cpu)?;
                loop {
                    black_box(());
                }
            })
        })
        .collect();
    wait_for(threads)
}

/// They end only where one fails.
fn wait_for(threads: Vec<thread::JoinHandle<Result<()>>>) -> Result<()> {
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(_) => bail!("a thread of a load has panicked"),
        }
    }
    Ok(())
}

/// By turns rests for 0.3 to 2.3 s, and takes all it can get on that many CPUs for three times as long. The order is always
/// the same.
fn greed(threads: usize) -> Result<()> {
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis(300 + (random >> 33) % 2_000)
    };
    loop {
        thread::sleep(next());
        let until = monotonic_ns() + 3 * next().as_nanos() as u64;
        let spin = move || -> Result<()> {
            while monotonic_ns() < until {
                black_box(());
            }
            Ok(())
        };
        let all: Vec<_> = (0..threads).map(|_| thread::spawn(spin)).collect();
        wait_for(all)?;
    }
}

/// How requests come to a service, whoever answers: `THREADS:EVERY:SHORT:NTH:LONG`, µs. Each thread is due a request so
/// often, all at the same instants; it costs so much CPU time, and each n-th costs more.
pub(crate) struct Pattern {
    threads: u64,
    every_us: u64,
    short_us: u64,
    nth: u64,
    long_us: u64,
}

impl Pattern {
    fn parse(text: &str) -> Result<Pattern> {
        let numbers: Result<Vec<u64>, _> = text.split(':').map(str::parse).collect();
        match numbers.with_context(|| format!("`{text}` is no pattern"))?.as_slice() {
            &[threads, every_us, short_us, nth, long_us] if every_us > 0 && nth > 0 => {
                Ok(Pattern { threads, every_us, short_us, nth, long_us })
            }
            _ => bail!("`{text}` is no pattern"),
        }
    }

    /// Of all requests together, cores.
    pub(crate) fn demand(text: &str) -> Result<f64> {
        let Pattern { threads, every_us, short_us, nth, long_us } = Pattern::parse(text)?;
        Ok((threads * ((nth - 1) * short_us + long_us)) as f64 / (nth * every_us) as f64)
    }
}

/// Notes of each request when it was due and when it was done. A request that is due while another is at work waits.
fn requests(file: &Path, pattern: &Pattern) -> Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let records = Records::open(file)?;
    // All the same second: a service that begins later has its requests at the same place of it.
    let first = (monotonic_ns() / SECOND + 1) * SECOND;
    let &Pattern { threads, every_us, short_us, nth, long_us } = pattern;
    let serve = |records: Records| {
        move || -> Result<()> {
            for number in 0.. {
                let due = first + number * every_us * 1000;
                thread::sleep(Duration::from_nanos(due.saturating_sub(monotonic_ns())));
                burn(1000 * if number % nth == nth - 1 { long_us } else { short_us });
                records.add((due, monotonic_ns()))?;
            }
            Ok(())
        }
    };
    wait_for((0..threads).map(|_| thread::spawn(serve(records.clone()))).collect())
}

/// CPU time of this thread; the scheduler charges what has run.
fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Uses so much CPU time. The time that passes is looked at, and the CPU time only when it may be over: with nothing else
/// on this CPU, once.
fn burn(cost_ns: u64) {
    const CLOSE_ENOUGH_NS: u64 = 20_000;
    let end = thread_cpu_ns() + cost_ns;
    loop {
        let left = end.saturating_sub(thread_cpu_ns());
        if left < CLOSE_ENOUGH_NS {
            return;
        }
        let until = monotonic_ns() + left;
        while monotonic_ns() < until {
            black_box(());
        }
    }
}

/// The scheduler's own count of a thread's CPU time, ns, as of the last time that it charged some, and how often the
/// thread was given a CPU. Reading it charges nothing.
struct Charged(File);

impl Charged {
    fn of_this_thread() -> Result<Charged> {
        File::open("/proc/thread-self/schedstat")
            .map(Charged)
            .context("cannot open /proc/thread-self/schedstat")
    }

    fn read(&self) -> Result<(u64, u64)> {
        let mut bytes = [0; 96];
        let length = self.0.read_at(&mut bytes, 0).context("cannot read schedstat")?;
        let text = String::from_utf8_lossy(&bytes[..length]);
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        match numbers.as_slice() {
            &[runtime, _, times] => Ok((runtime, times)),
            _ => bail!("schedstat is `{text}`"),
        }
    }
}

/// The period of a CPU quota.
const PERIOD_NS: u64 = 100_000_000;

/// Computes for two seconds, and returns when it went on after it had stood still for the longest time: when a period of its
/// quota began, if nothing else keeps it from the CPU.
fn begin_of_a_period() -> u64 {
    let begin = monotonic_ns();
    let (mut seen, mut longest, mut went_on) = (begin, 0, begin);
    while seen - begin < 20 * PERIOD_NS {
        let now = monotonic_ns();
        if now - seen > longest {
            (longest, went_on) = (now - seen, now);
        }
        seen = now;
    }
    went_on
}

/// Again and again rests for most of a second, then computes until it has used `all` µs of CPU time, from the first third of
/// a period of its quota on. Notes when it began and when it had used `budget` µs since.
fn cross(file: &Path, budget: u64, all: u64) -> Result<()> {
    /// Between two looks at the clock there is more only if something else had the CPU, or the whole machine stood.
    const GAP_NS: u64 = 100_000;
    let (budget, all) = (budget * 1000, all * 1000);
    let (records, charged) = (Records::open(file)?, Charged::of_this_thread()?);
    let first = begin_of_a_period();
    for number in 0u64.. {
        // At all places of a tick.
        let due = first + (30 + 8 * number) * PERIOD_NS + 1_000_000 + number * 7_411_000 % 25_000_000;
        thread::sleep(Duration::from_nanos(due.saturating_sub(monotonic_ns())));
        let began = monotonic_ns();
        let (base, mut times) = charged.read()?;
        let (mut used, mut seen, mut crossed) = (0, began, None);
        while used < all {
            let now = monotonic_ns();
            let (before, since) = (used, seen);
            used += now - since;
            seen = now;
            if now - since > GAP_NS {
                let (runtime, now_times) = charged.read()?;
                if now_times != times {
                    // It was charged when it left the CPU.
                    (used, times) = (runtime - base, now_times);
                }
                seen = monotonic_ns();
            }
            if crossed.is_none() && used >= budget {
                // It ran from the last look on, until it left the CPU.
                crossed = Some(since + (budget - before.min(budget)));
            }
        }
        records.add((began, crossed.unwrap_or(seen)))?;
    }
    Ok(())
}

/// Notes when a quota was written, and what it is then, µs.
fn observe(file: &Path, quota: &Path) -> Result<()> {
    let cannot = || format!("cannot watch {}", quota.display());
    let records = Records::open(file)?;
    let opened = File::open(quota).with_context(cannot)?;
    let watch = inotify::init(CreateFlags::CLOEXEC).with_context(cannot)?;
    inotify::add_watch(&watch, quota, WatchFlags::MODIFY).with_context(cannot)?;
    let mut events = File::from(watch);
    records.add((0, 0))?;
    loop {
        let _ = events.read(&mut [0; 4096]).with_context(cannot)?;
        let mut bytes = [0; 64];
        let length = opened.read_at(&mut bytes, 0).with_context(cannot)?;
        let now = monotonic_ns();
        let text = String::from_utf8_lossy(&bytes[..length]);
        let quota = text.split(' ').next().and_then(|quota| quota.parse().ok());
        records.add((now, quota.unwrap_or(u64::MAX)))?;
    }
}
