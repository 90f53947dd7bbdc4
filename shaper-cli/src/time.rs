//! Times as people write and read them.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shaper_core::task::UnixNanos;

const NANOS_PER_SEC: u64 = 1_000_000_000;

/// The wall clock; 1970 where it is before that.
pub(crate) fn now() -> UnixNanos {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

/// How long ago `then` was, in its two largest units: `12s`, `3m12s`, `2h10m`, `3d4h`.
pub(crate) fn age(then: UnixNanos, now: UnixNanos) -> String {
    let seconds = now.saturating_sub(then) / NANOS_PER_SEC;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days}d{}h", hours % 24),
        () if hours > 0 => format!("{hours}h{}m", minutes % 60),
        () if minutes > 0 => format!("{minutes}m{}s", seconds % 60),
        () => format!("{seconds}s"),
    }
}

/// A point in time in UTC, `2025-11-24T06:58:00Z`, to the nanosecond.
pub(crate) struct Utc(pub(crate) UnixNanos);

impl Utc {
    /// Year, month and day in the Gregorian calendar.
    fn date(&self) -> (u64, u64, u64) {
        // Years are counted from March 1st, so that the leap day is the last of its year, and days
        // from March 1st of year 0, 719,468 days before the epoch.
        const DAYS_PER_400_YEARS: u64 = 146_097;
        let days = self.0 / NANOS_PER_SEC / 86_400 + 719_468;
        let (era, day_of_era) = (days / DAYS_PER_400_YEARS, days % DAYS_PER_400_YEARS);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        (era * 400 + year_of_era + u64::from(month <= 2), month, day)
    }
}

impl fmt::Display for Utc {
    /// The precision is the number of decimals of the second: none, unless asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.date();
        let second = self.0 / NANOS_PER_SEC % 86_400;
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")?;
        if let Some(digits @ 1..=9) = f.precision() {
            let nanos = format!("{:09}", self.0 % NANOS_PER_SEC);
            write!(f, ".{}", &nanos[..digits])?;
        }
        f.write_str("Z")
    }
}

/// A length of time on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl Span {
    /// When so much time before now was.
    pub(crate) fn ago(self) -> UnixNanos {
        now().saturating_sub(u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Why a length of time was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a length of time, such as 10s, 500ms, 2m or 1h")]
pub(crate) struct ParseSpanError(String);

impl FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Span, ParseSpanError> {
        const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
        let error = || ParseSpanError(text.into());
        let unit_at = text.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(error)?;
        let (number, suffix) = text.split_at(unit_at);
        let (_, unit) = UNITS.iter().find(|(unit, _)| *unit == suffix).ok_or_else(error)?;
        let millis = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*unit));
        millis.map(Duration::from_millis).map(Span).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_of_time_has_a_unit() {
        let millis = |text: &str| text.parse::<Span>().map(|span| span.0.as_millis());
        assert_eq!(millis("10s"), Ok(10_000));
        assert_eq!(millis("500ms"), Ok(500));
        assert_eq!(millis("2m"), Ok(120_000));
        assert_eq!(millis("1h"), Ok(3_600_000));
        assert_eq!(millis("0s"), Ok(0));
        for bad in ["", "10", "s", "-1s", "+1s", "1.5s", "10 s", "10S", "1d", "ms", "99999999999999999999s"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
        assert!(format!("{}h", u64::MAX).parse::<Span>().is_err());
        let shown = "ten".parse::<Span>().unwrap_err().to_string();
        assert_eq!(shown, "`ten` is not a length of time, such as 10s, 500ms, 2m or 1h");
    }

    #[test]
    fn an_age_has_two_units() {
        let after = |seconds: u64| age(5, 5 + seconds * NANOS_PER_SEC);
        assert_eq!(after(0), "0s");
        assert_eq!(after(59), "59s");
        assert_eq!(after(192), "3m12s");
        assert_eq!(after(7_800), "2h10m");
        assert_eq!(after(273_600), "3d4h");
        assert_eq!(age(9, 5), "0s", "a clock that was set back");
    }

    #[test]
    fn the_calendar() {
        let shown = |seconds: u64| Utc(seconds * NANOS_PER_SEC).to_string();
        assert_eq!(shown(0), "1970-01-01T00:00:00Z");
        assert_eq!(shown(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(shown(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(shown(951_868_800), "2000-03-01T00:00:00Z");
        assert_eq!(shown(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(shown(4_107_542_400), "2100-03-01T00:00:00Z");
        assert_eq!(format!("{:.3}", Utc(1_001_002_003)), "1970-01-01T00:00:01.001Z");
        assert_eq!(format!("{:.9}", Utc(1_001_002_003)), "1970-01-01T00:00:01.001002003Z");
    }
}
