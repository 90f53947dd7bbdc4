//! Decimal numbers as a document spells them. Never a float: what is written is what is meant.

/// A finite decimal number: `mantissa` · 10^`exponent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decimal {
    negative: bool,
    /// At most [`Decimal::DIGITS`] digits.
    mantissa: u128,
    exponent: i64,
}

impl Decimal {
    /// Digits that are kept: more than a float has, and few enough for [`Decimal::scaled`].
    const DIGITS: usize = 25;

    /// Reads `4`, `0.5`, `-1.25`, `1e3`: numbers as JSON has them.
    pub(super) fn parse(text: &str) -> Option<Decimal> {
        let (negative, text) = match text.strip_prefix('-') {
            Some(text) => (true, text),
            None => (false, text),
        };
        let (number, exponent) = match text.split_once(['e', 'E']) {
            Some((number, exponent)) => (number, exponent_of(exponent)?),
            None => (text, 0),
        };
        let (whole, fraction) = match number.split_once('.') {
            Some((whole, fraction)) => (whole, Some(fraction)),
            None => (number, None),
        };
        let fraction_is_fine = fraction.is_none_or(is_digits);
        if !is_digits(whole) || (whole.starts_with('0') && whole != "0") || !fraction_is_fine {
            return None;
        }
        let fraction = fraction.unwrap_or_default();
        let digits = format!("{whole}{fraction}");
        let significant = digits.trim_start_matches('0');
        let kept = &significant[..significant.len().min(Self::DIGITS)];
        let dropped = i64::try_from(significant.len() - kept.len()).ok()?;
        let exponent = exponent + dropped - i64::try_from(fraction.len()).ok()?;
        let mantissa = if kept.is_empty() { 0 } else { kept.parse().ok()? };
        Some(Decimal { negative, mantissa, exponent })
    }

    /// This number of units of `unit`, rounded to the nearest; `None` if it is negative or too large.
    /// `unit` may be up to 2^42.
    pub(super) fn scaled(&self, unit: u64) -> Option<u64> {
        if self.mantissa == 0 {
            return Some(0);
        }
        if self.negative {
            return None;
        }
        // Below 10^25 · 2^42, which is below 2^128.
        let value = self.mantissa.checked_mul(u128::from(unit))?;
        let power = 10u128.checked_pow(u32::try_from(self.exponent.unsigned_abs()).ok()?);
        let value = match (self.exponent >= 0, power) {
            (true, power) => value.checked_mul(power?)?,
            (false, Some(power)) => (value + power / 2) / power,
            (false, None) => 0,
        };
        u64::try_from(value).ok()
    }

    /// This number, if it is a whole one that fits.
    pub(super) fn whole(&self) -> Option<u64> {
        let value = self.scaled(1)?;
        let lossless = match u32::try_from(-self.exponent) {
            Ok(decimals) if self.mantissa > 0 => {
                10u128.checked_pow(decimals).is_some_and(|power| self.mantissa.is_multiple_of(power))
            }
            _ => true,
        };
        lossless.then_some(value)
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn exponent_of(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !is_digits(digits) {
        return None;
    }
    // A power beyond this is beyond everything that follows, too.
    let exponent = digits.parse::<i64>().unwrap_or(i64::MAX).min(1_000_000);
    Some(if text.starts_with('-') { -exponent } else { exponent })
}

/// `value` units of `unit` as a decimal: the shortest that [`Decimal::scaled`] reads back as `value`.
pub(super) fn shortest(value: u64, unit: u64) -> String {
    let (wide_value, wide_unit) = (u128::from(value), u128::from(unit));
    let mut power = 1u128;
    for decimals in 0..=12 {
        let digits = (wide_value * power + wide_unit / 2) / wide_unit;
        let mut text = (digits / power).to_string();
        if decimals > 0 {
            text = format!("{text}.{:0decimals$}", digits % power);
        }
        if Decimal::parse(&text).and_then(|decimal| decimal.scaled(unit)) == Some(value) {
            return text;
        }
        power *= 10;
    }
    // Not reached for the units here: 12 decimals tell all multiples of 2^-30 and of 10^-6 apart.
    (wide_value / wide_unit).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scaled(text: &str, unit: u64) -> Option<u64> {
        Decimal::parse(text).and_then(|decimal| decimal.scaled(unit))
    }

    #[test]
    fn numbers_as_json_has_them() {
        assert_eq!(scaled("4", 1000), Some(4000));
        assert_eq!(scaled("0.5", 1000), Some(500));
        assert_eq!(scaled("1.5E+1", 1000), Some(15_000));
        assert_eq!(scaled("5e-1", 1000), Some(500));
        assert_eq!(scaled("0.30000000000000004", 1000), Some(300));
        assert_eq!(scaled("0.1", 1 << 30), Some(107_374_182));
        assert_eq!(scaled("0e999999999999999999999", 1), Some(0));
        assert_eq!(scaled("1e-999999999999999999999", 1000), Some(0));
        assert_eq!(scaled("-0", 1000), Some(0));
        for too_much in ["-1", "1e999999999999999999999", "1e30", &"9".repeat(400)] {
            assert!(Decimal::parse(too_much).is_some(), "{too_much}");
            assert_eq!(scaled(too_much, 1000), None, "{too_much}");
        }
        for bad in
            ["", "-", ".5", "5.", "+5", "0755", "1_000", "0x10", ".nan", "1e", "1e+", "1.2.3", "1 ", "١"]
        {
            assert_eq!(Decimal::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_whole_number_may_be_spelt_with_decimals() {
        let whole = |text: &str| Decimal::parse(text).and_then(|decimal| decimal.whole());
        assert_eq!(whole("500"), Some(500));
        assert_eq!(whole("500.0"), Some(500));
        assert_eq!(whole("5e2"), Some(500));
        assert_eq!(whole("0.0"), Some(0));
        assert_eq!(whole("0.5"), None);
        assert_eq!(whole("1e-40"), None);
        assert_eq!(whole("-1"), None);
        assert_eq!(whole(&u64::MAX.to_string()), Some(u64::MAX));
        assert_eq!(whole("18446744073709551616"), None);
    }

    #[test]
    fn what_is_written_has_no_noise() {
        assert_eq!(shortest(1 << 33, 1 << 30), "8");
        assert_eq!(shortest(107_374_182, 1 << 30), "0.1");
        assert_eq!(shortest(1, 1 << 30), "0.000000001");
        assert_eq!(shortest(100_000_000, 1_000_000), "100");
        assert_eq!(shortest(128_001, 1_000_000), "0.128001");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(value in 0u64..=1 << 60) {
            for unit in [1000, 1_000_000, 1 << 30] {
                prop_assert_eq!(scaled(&shortest(value, unit), unit), Some(value));
            }
        }

        #[test]
        fn no_input_panics(text in "[-+0-9.eE]{0,60}") {
            if let Some(decimal) = Decimal::parse(&text) {
                let _ = (decimal.scaled(1 << 42), decimal.whole());
            }
        }
    }
}
