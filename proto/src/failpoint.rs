//! Places at which a test can have a daemon abort: `SHAPER_FAILPOINT=before-commit`, or
//! `before-commit:3` for the third time. Without the feature `failpoints` they are nothing.

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
