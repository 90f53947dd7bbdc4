//! Instants as RFC 3339 text in UTC with nine decimals, the one form that the log uses. Its width
//! is fixed, so text order is time order.

use std::time::{SystemTime, UNIX_EPOCH};

/// Length of the text, for every instant that a `u64` of nanoseconds holds (to the year 2554).
pub(super) const LENGTH: usize = "1970-01-01T00:00:00.000000000Z".len();

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const SECONDS_PER_DAY: u64 = 86_400;

/// The wall clock in Unix nanoseconds. A clock set before 1970 reads as 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Appends the text of `at`.
pub(super) fn format(at: u64, text: &mut Vec<u8>) {
    let (seconds, nanos) = (at / NANOS_PER_SECOND, at % NANOS_PER_SECOND);
    let (days, second) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
    let (year, month, day) = civil_from_days(days);
    for (value, width, after) in [
        (year, 4, b'-'),
        (month, 2, b'-'),
        (day, 2, b'T'),
        (second / 3600, 2, b':'),
        (second / 60 % 60, 2, b':'),
        (second % 60, 2, b'.'),
        (nanos, 9, b'Z'),
    ] {
        let start = text.len();
        text.resize(start + width, b'0');
        let mut rest = value;
        for digit in text[start..].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        text.push(after);
    }
}

/// Reads what [`format`] wrote, and nothing else.
pub(super) fn parse(text: &[u8]) -> Option<u64> {
    let text: &[u8; LENGTH] = text.try_into().ok()?;
    let number = |from: usize, to: usize, after: u8| {
        let value = text[from..to].iter().try_fold(0, |value: u64, digit| {
            digit.is_ascii_digit().then(|| value * 10 + u64::from(digit - b'0'))
        })?;
        (text[to] == after).then_some(value)
    };
    let (year, month, day) = (number(0, 4, b'-')?, number(5, 7, b'-')?, number(8, 10, b'T')?);
    let (hour, minute, second) = (number(11, 13, b':')?, number(14, 16, b':')?, number(17, 19, b'.')?);
    let nanos = number(20, 29, b'Z')?;
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let days = days_from_civil(year, month, day)?;
    let seconds = days * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second;
    seconds.checked_mul(NANOS_PER_SECOND)?.checked_add(nanos)
}

// The proleptic Gregorian calendar by eras of 400 years (146,097 days), with the year counted from
// 1 March so that the leap day is its last: H. Hinnant, "chrono-compatible low-level date
// algorithms". Only days from 1970 on are needed, so everything is unsigned.

const DAYS_PER_ERA: u64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_EPOCH: u64 = 719_468;

fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + DAYS_TO_EPOCH;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// `None` for a date that does not exist, or is before 1970.
fn days_from_civil(year: u64, month: u64, day: u64) -> Option<u64> {
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let from_march = year - u64::from(month <= 2);
    let (era, year_of_era) = (from_march / 400, from_march % 400);
    let month_from_march = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * DAYS_PER_ERA + day_of_era - DAYS_TO_EPOCH;
    // 31 April would otherwise be 1 May.
    (civil_from_days(days) == (year, month, day)).then_some(days)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(at: u64) -> String {
        let mut text = Vec::new();
        format(at, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn known_instants() {
        for (at, expected) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (1, "1970-01-01T00:00:00.000000001Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000000Z"),
            (1_000_000_000_123_456_789, "2001-09-09T01:46:40.123456789Z"),
            (4_107_542_399_999_999_999, "2100-02-28T23:59:59.999999999Z"),
            (4_107_542_400_000_000_000, "2100-03-01T00:00:00.000000000Z"),
            (u64::MAX, "2554-07-21T23:34:33.709551615Z"),
        ] {
            assert_eq!(text(at), expected);
            assert_eq!(expected.len(), LENGTH);
            assert_eq!(parse(expected.as_bytes()), Some(at));
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..=u64::MAX / NANOS_PER_SECOND / SECONDS_PER_DAY {
            assert_eq!(civil_from_days(days), (year, month, day));
            assert_eq!(days_from_civil(year, month, day), Some(days));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }

    #[test]
    fn what_is_not_an_instant_is_refused() {
        for bad in [
            "",
            "1969-12-31T23:59:59.000000000Z",
            "2023-02-29T00:00:00.000000000Z",
            "2023-04-31T00:00:00.000000000Z",
            "2023-13-01T00:00:00.000000000Z",
            "2023-00-01T00:00:00.000000000Z",
            "2023-01-00T00:00:00.000000000Z",
            "2023-01-01T24:00:00.000000000Z",
            "2023-01-01T00:60:00.000000000Z",
            "2023-01-01T00:00:60.000000000Z",
            "2023-01-01T00:00:00.000000000+",
            "2023-01-01 00:00:00.000000000Z",
            "2023-01-01T00:00:00.00000000 Z",
            "2554-07-21T23:34:33.709551616Z",
            "9999-12-31T23:59:59.999999999Z",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
