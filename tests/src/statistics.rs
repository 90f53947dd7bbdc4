//! Of several measurements: what they have in common, and how far that is to be believed.

/// That which so many thousandths of the values are at most.
pub fn quantile(values: &[f64], thousandths: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() * thousandths).div_ceil(1000).max(1) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// The middle one; of an even number, the mean of the two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

/// Their mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard error of the mean.
pub fn error_of(values: &[f64]) -> f64 {
    let (mean, count) = (mean(values), values.len() as f64);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1.0) / count).sqrt()
}

/// Jain's index of fairness: 1 where all are equal, 1/n where one of n has everything.
pub fn jain(values: &[f64]) -> f64 {
    let (sum, squares) =
        values.iter().fold((0.0, 0.0), |(sum, squares), value| (sum + value, squares + value * value));
    sum * sum / (values.len() as f64 * squares)
}

/// A ratio, and the interval that has the true one in 95 of 100 cases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// The geometric mean of the pairs.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Ratio {
    /// Of pairs that were measured one soon after the other: by Student's t of the logarithms, since half and twice are
    /// equally far from the same.
    pub fn of_pairs(pairs: &[(f64, f64)]) -> Ratio {
        let logarithms: Vec<f64> = pairs.iter().map(|(over, under)| (over / under).ln()).collect();
        let (middle, half) = (mean(&logarithms), student(pairs.len() - 1) * error_of(&logarithms));
        Ratio { mean: middle.exp(), low: (middle - half).exp(), high: (middle + half).exp() }
    }
}

/// Student's t for 95 %, two-sided, by degrees of freedom; not a number for none.
fn student(degrees: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    match degrees {
        0 => f64::NAN,
        few => TABLE.get(few - 1).copied().unwrap_or(1.96),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(value: f64, expected: f64) {
        assert!((value - expected).abs() < 1e-3, "{value} is not {expected}");
    }

    #[test]
    fn the_median_is_in_the_middle_and_a_quantile_is_a_value() {
        close(median(&[3.0, 1.0, 2.0]), 2.0);
        close(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan() && quantile(&[], 990).is_nan());
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        close(quantile(&hundred, 990), 99.0);
        close(quantile(&hundred, 500), 50.0);
        close(quantile(&[7.0], 990), 7.0);
    }

    #[test]
    fn fairness_is_one_for_equals_and_a_share_for_one_with_everything() {
        close(jain(&[5.0; 8]), 1.0);
        close(jain(&[9.0, 0.0, 0.0, 0.0]), 0.25);
        close(jain(&[1.0, 2.0, 3.0]), 36.0 / 42.0);
    }

    #[test]
    fn the_interval_is_that_of_students_t() {
        // Logarithms 0.1, 0.2 and 0.3: their mean's standard error is 0.1 / sqrt(3), and t is 4.303.
        let pairs = [0.1_f64, 0.2, 0.3].map(|log| (log.exp() * 7.0, 7.0));
        let Ratio { mean, low, high } = Ratio::of_pairs(&pairs);
        close(mean.ln(), 0.2);
        close(low.ln(), 0.2 - 0.248_43);
        close(high.ln(), 0.2 + 0.248_43);
        close(error_of(&[1.0, 2.0, 3.0]), 0.577_35);
    }

    #[test]
    fn one_pair_says_nothing_of_its_error() {
        let Ratio { mean, low, high } = Ratio::of_pairs(&[(1.0, 2.0)]);
        close(mean, 0.5);
        assert!(low.is_nan() && high.is_nan());
        close(student(5), 2.571);
        close(student(1000), 1.96);
    }
}
