//! Which tasks, of those of its priority and namespace, a policy is for.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::Subject;

/// What a task must be like. The default selects every task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// Labels that it has, with these values.
    pub labels: BTreeMap<String, String>,
    /// What its name is like.
    pub name: Option<NamePattern>,
}

impl Selector {
    /// Whether this task is like that.
    pub fn selects(&self, subject: &Subject<'_>) -> bool {
        let has_labels = self.labels.iter().all(|(label, value)| subject.labels.get(label) == Some(value));
        has_labels && self.name.as_ref().is_none_or(|name| name.matches(subject.name))
    }
}

/// Why a pattern was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name pattern is 1 to {MAX_PATTERN} characters out of a-z, A-Z, 0-9, `-`, `_`, `.` and `*`")]
pub struct InvalidPattern;

/// The longest pattern: as long as the longest name.
const MAX_PATTERN: usize = 63;

/// A name, or a pattern of names in which `*` stands for any characters, also for none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether there is one name only that matches.
    pub fn is_exact(&self) -> bool {
        !self.0.contains('*')
    }

    /// How many characters stand for themselves.
    pub fn literals(&self) -> usize {
        self.0.bytes().filter(|byte| *byte != b'*').count()
    }

    /// Whether a name is one of these.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // The first place where a part is found leaves the most for those that follow.
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

impl FromStr for NamePattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<NamePattern, InvalidPattern> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.*".contains(&byte);
        let is_valid = (1..=MAX_PATTERN).contains(&text.len()) && text.bytes().all(fits);
        if is_valid { Ok(NamePattern(text.to_owned())) } else { Err(InvalidPattern) }
    }
}

impl TryFrom<String> for NamePattern {
    type Error = InvalidPattern;

    fn try_from(text: String) -> Result<NamePattern, InvalidPattern> {
        text.parse()
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> String {
        pattern.0
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
