//! Did you mean …?

/// The candidate that `written` was probably meant to be.
pub(super) fn nearest<'a>(written: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let length = written.chars().count();
    // Nothing here is longer, and the comparison is quadratic.
    if length > 64 {
        return None;
    }
    let written = written.to_lowercase();
    let most = (length / 3).max(1);
    let distances = candidates.iter().map(|candidate| (distance(&written, candidate), *candidate));
    distances
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, it)| it)
}

/// How many letters to add, drop, replace or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut two_above = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (row, letter) in a.iter().enumerate() {
        let mut current = vec![row + 1];
        for (column, other) in b.iter().enumerate() {
            let replaced = above[column] + usize::from(letter != other);
            let mut best = replaced.min(above[column + 1] + 1).min(current[column] + 1);
            if row > 0 && column > 0 && *letter == b[column - 1] && a[row - 1] == *other {
                let swapped: usize = two_above[column - 1];
                best = best.min(swapped + 1);
            }
            current.push(best);
        }
        two_above = std::mem::replace(&mut above, current);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        let fields = ["cpu_cores", "memory_gb", "gpu_memory_gb"];
        for (written, meant) in [
            ("cpu_core", Some("cpu_cores")),
            ("CPU_Cores", Some("cpu_cores")),
            ("cpu_croes", Some("cpu_cores")),
            ("cpuCores", Some("cpu_cores")),
            ("memory_mb", Some("memory_gb")),
            ("gpumemory_gb", Some("gpu_memory_gb")),
            ("disk", None),
            ("", None),
        ] {
            assert_eq!(nearest(written, &fields), meant, "{written}");
        }
        assert_eq!(nearest("urgent", &["high", "medium", "low"]), None);
        assert_eq!(nearest("hihg", &["high", "medium", "low"]), Some("high"));
        assert_eq!(nearest(&"x".repeat(1 << 20), &fields), None);
    }
}
