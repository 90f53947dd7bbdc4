//! Places at which a test can have a daemon abort: `SHAPER_FAILPOINT=before-commit`, or
//! `before-commit:3` for the third time. And a wall clock that jumps: `SHAPER_CLOCK=FILE`. Without the feature `failpoints` they
//! are nothing.

/// Aborts here, if this is the place.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn hit(_name: &str) {}

/// Aborts here, if this is the place.
#[cfg(feature = "failpoints")]
pub fn hit(name: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    static PLACE: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let place = std::env::var("SHAPER_FAILPOINT").ok()?;
        let parsed =
            place.split_once(':').and_then(|(name, times)| Some((name.to_owned(), times.parse().ok()?)));
        Some(parsed.unwrap_or((place, 1)))
    });
    static TIMES: AtomicU64 = AtomicU64::new(0);

    if let Some((place, times)) = &*PLACE
        && place == name
        && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == *times
    {
        eprintln!("failpoint {name}");
        std::process::abort();
    }
}

/// By how much the wall clock is off, ns.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn clock_skew() -> i64 {
    0
}

/// By how much the wall clock is off, ns: the seconds that stand in the file now, if there is one.
#[cfg(feature = "failpoints")]
pub fn clock_skew() -> i64 {
    use std::{ffi::OsString, sync::LazyLock};

    static FILE: LazyLock<Option<OsString>> = LazyLock::new(|| std::env::var_os("SHAPER_CLOCK"));

    let text = FILE.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
    let seconds: i64 = text.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000)
}
