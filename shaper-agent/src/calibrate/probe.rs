//! Direct reads and writes, as many at once as a device can be given, for a while.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use shaper_core::id::BlockDevice;

use super::{CalibrateError, file_error};
use crate::kernel::disks;

/// Which operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// Small ones, anywhere.
    Random,
    /// Small ones, one after the other.
    Sequential,
    /// Large ones, one after the other.
    Large,
}

/// What was done in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) operations: u64,
    pub(super) bytes: u64,
}

/// What is read or written.
pub(super) struct Target {
    file: File,
    path: PathBuf,
    size: u64,
    writes: bool,
    /// Removed in the end.
    is_scratch: bool,
}

const SMALL: usize = 4 << 10;
const LARGE: usize = 256 << 10;
/// The queue fills, and what the device has saved up is spent, before anything is counted.
const RAMP: Duration = Duration::from_millis(500);

/// Aligned as direct IO wants it.
#[repr(align(4096))]
struct Buffer([u8; LARGE]);

impl Target {
    /// A device, to be read.
    pub(super) fn device(device: BlockDevice, size: u64) -> Result<Target, CalibrateError> {
        let path = Path::new("/dev").join(disks::name(device).replace('!', "/"));
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        let file = opened.map_err(|source| file_error("open", &path, source))?;
        Ok(Target { file, path, size, writes: false, is_scratch: false })
    }

    /// A new file, to be written; it is removed when this is dropped.
    pub(super) fn scratch(path: &Path, size: u64) -> Result<Target, CalibrateError> {
        let failed = |verb| move |source| file_error(verb, path, source);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_DIRECT);
        let file = options.open(path).map_err(failed("make"))?;
        let mut target = Target { file, path: path.to_owned(), size, writes: true, is_scratch: true };
        // Blocks that were never written are another matter than those that are written over.
        let buffer = buffer();
        let mut left = size;
        while left > 0 {
            target.file.write_all(&buffer.0).map_err(failed("write"))?;
            left = left.saturating_sub(LARGE as u64);
        }
        target.file.sync_all().map_err(failed("write"))?;
        Ok(target)
    }

    /// Does so many operations at once, and counts them.
    pub(super) fn rate(&self, pattern: Pattern, depth: u32, time: Duration) -> Result<Rate, CalibrateError> {
        let length = if pattern == Pattern::Large { LARGE } else { SMALL };
        let (done, place, is_over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let failure: Mutex<Option<io::Error>> = Mutex::new(None);
        let pieces = (self.size / length as u64).max(1);
        let work = |number: u64| {
            let mut buffer = buffer();
            let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number + 1) | 1;
            while !is_over.load(Relaxed) {
                let piece = if pattern == Pattern::Random {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random
                } else {
                    place.fetch_add(1, Relaxed)
                };
                let at = piece % pieces * length as u64;
                let bytes = &mut buffer.0[..length];
                let result = if self.writes {
                    self.file.write_all_at(bytes, at)
                } else {
                    self.file.read_exact_at(bytes, at)
                };
                if let Err(error) = result {
                    is_over.store(true, Relaxed);
                    // A poisoned lock is that of a thread that panicked, of which the scope tells.
                    if let Ok(mut failure) = failure.lock() {
                        failure.get_or_insert(error);
                    }
                    return;
                }
                done.fetch_add(1, Relaxed);
            }
        };
        let (operations, elapsed) = thread::scope(|scope| {
            for number in 0..u64::from(depth) {
                let work = &work;
                scope.spawn(move || work(number));
            }
            thread::sleep(RAMP);
            let (start, before) = (Instant::now(), done.load(Relaxed));
            thread::sleep(time);
            let (elapsed, after) = (start.elapsed(), done.load(Relaxed));
            is_over.store(true, Relaxed);
            (after - before, elapsed)
        });
        if let Some(source) = failure.into_inner().unwrap_or_default() {
            let verb = if self.writes { "write" } else { "read" };
            return Err(file_error(verb, &self.path, source));
        }
        let per_second = |count: u64| {
            let rate = u128::from(count) * 1_000_000_000 / elapsed.as_nanos().max(1);
            // The kernel takes no model of a device that does nothing.
            u64::try_from(rate).unwrap_or(u64::MAX).max(1)
        };
        Ok(Rate { operations: per_second(operations), bytes: per_second(operations * length as u64) })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.is_scratch
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the scratch file");
        }
    }
}

/// Not zeros, which a device may not keep.
fn buffer() -> Box<Buffer> {
    Box::new(Buffer([0xa5; LARGE]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_is_written_measured_and_removed() {
        // A disk: /tmp may be memory.
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("scratch");
        let target = match Target::scratch(&path, 4 << 20) {
            Ok(target) => target,
            // A file system without direct IO.
            Err(CalibrateError::File { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => {
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Large] {
            // Others may have the disk: then it takes longer until something is done.
            let times = (0..8).map(|doubled| Duration::from_millis(50 << doubled));
            let mut rates = times.map(|time| target.rate(pattern, 4, time).unwrap());
            let rate = rates.find(|rate| rate.operations > 1).expect("something is written within 6 s");
            assert!(rate.bytes >= rate.operations * SMALL as u64, "{pattern:?}: {rate:?}");
        }
        drop(target);
        assert!(!path.exists());
        assert!(matches!(Target::scratch(Path::new("/proc/no"), 1), Err(CalibrateError::File { .. })));
    }
}
