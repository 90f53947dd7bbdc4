//! Every metric that a daemon has: this is what they are documented by, and the only way in which one is written.

pub mod agent;
pub mod broker;

/// What kind of number it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until the daemon or the task begins anew.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How many fell into each of some buckets, and their sum.
    Histogram,
    /// Always 1: its labels say something.
    Info,
}

/// What it is counted in: base units alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// It counts things, or is a state.
    None,
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// CPUs.
    Cores,
    /// Operations a second.
    OperationsPerSecond,
    /// Seconds.
    Seconds,
}

impl Unit {
    /// As it stands in a name.
    pub fn suffix(self) -> &'static str {
        match self {
            Unit::None => "",
            Unit::Bytes => "bytes",
            Unit::BytesPerSecond => "bytes_per_second",
            Unit::Cores => "cores",
            Unit::OperationsPerSecond => "operations_per_second",
            Unit::Seconds => "seconds",
        }
    }
}

/// A metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// The name of its series; of a histogram without `_bucket`, `_sum` and `_count`.
    pub name: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// What it is counted in.
    pub unit: Unit,
    /// What it says: a phrase, without a full stop.
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

type Names = &'static [&'static str];

impl Family {
    /// A counter: its name ends in `_total`.
    pub const fn counter(name: &'static str, unit: Unit, help: &'static str, labels: Names) -> Family {
        Family { name, kind: Kind::Counter, unit, help, labels }
    }

    /// A gauge.
    pub const fn gauge(name: &'static str, unit: Unit, help: &'static str, labels: Names) -> Family {
        Family { name, kind: Kind::Gauge, unit, help, labels }
    }

    /// A histogram.
    pub const fn histogram(name: &'static str, unit: Unit, help: &'static str, labels: Names) -> Family {
        Family { name, kind: Kind::Histogram, unit, help, labels }
    }

    /// What is said by labels: its name ends in `_info`.
    pub const fn info(name: &'static str, help: &'static str, labels: Names) -> Family {
        Family { name, kind: Kind::Info, unit: Unit::None, help, labels }
    }

    /// What type and unit add to the name.
    fn suffix(&self) -> String {
        let end = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        let unit = self.unit.suffix();
        if unit.is_empty() { end.to_owned() } else { format!("_{unit}{end}") }
    }

    /// The name without what type and unit add to it.
    pub fn stem(&self) -> &'static str {
        self.name.strip_suffix(self.suffix().as_str()).unwrap_or(self.name)
    }
}

/// Declares metrics, and the list of them all.
macro_rules! families {
    ($(#[$doc:meta])* $list:ident: $($(#[$each:meta])* $name:ident = $family:expr;)*) => {
        $($(#[$each])* pub const $name: crate::table::Family = $family;)*
        $(#[$doc])*
        pub const $list: &[crate::table::Family] = &[$($name),*];
    };
}
use families;

families! {
    /// What both daemons have.
    EVERYWHERE:
    /// The version.
    BUILD = Family::info("shaper_build_info", "Which daemon this is, and of which version", &["daemon", "version"]);
    /// When it started.
    PROCESS_START = Family::gauge(
        "process_start_time_seconds", Unit::Seconds, "When this process started, since 1970", &[]);
    /// Its CPU time.
    PROCESS_CPU = Family::counter(
        "process_cpu_seconds_total", Unit::Seconds, "CPU time of this process, in the kernel and outside", &[]);
    /// Its memory.
    PROCESS_MEMORY = Family::gauge(
        "process_resident_memory_bytes", Unit::Bytes, "Memory of this process that is in RAM", &[]);
    /// Its addresses.
    PROCESS_VIRTUAL_MEMORY = Family::gauge(
        "process_virtual_memory_bytes", Unit::Bytes, "Address space of this process", &[]);
    /// Its files.
    PROCESS_FILES = Family::gauge("process_open_fds", Unit::None, "Files that this process has open", &[]);
    /// How many it may have.
    PROCESS_MOST_FILES = Family::gauge(
        "process_max_fds", Unit::None, "Files that this process may have open", &[]);
    /// Refused requests.
    REFUSED = Family::counter(
        "shaper_metrics_requests_refused_total", Unit::None,
        "Requests to this listener that were refused: without the token, for another path, by another method, or with a \
         body; and connections beyond those that there may be",
        &["reason"]);
}

/// What follows which, as the document shows it.
const SECTIONS: [(&str, &[Family]); 4] = [
    ("Both daemons", EVERYWHERE),
    ("shaper-agent: each task", agent::TASKS),
    ("shaper-agent: the node", agent::NODE),
    ("shaper-broker", broker::BROKER),
];

/// All metrics.
pub fn all() -> impl Iterator<Item = &'static Family> {
    SECTIONS.into_iter().flat_map(|(_, families)| families)
}

/// The table as Markdown.
pub fn markdown() -> String {
    let mut text = String::new();
    for (title, families) in SECTIONS {
        text += &format!(
            "\n## {title}\n\n| metric | type | unit | labels | what it says |\n|---|---|---|---|---|\n"
        );
        for Family { name, kind, unit, help, labels } in families {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
                Kind::Info => "info",
            };
            let unit = unit.suffix().replace('_', " ");
            let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            text += &format!("| `{name}` | {kind} | {unit} | {labels} | {help} |\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_as_prometheus_has_them() {
        let mut names = BTreeSet::new();
        let is_name = |text: &str| {
            text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        };
        for family in all() {
            let Family { name, kind, help, labels, .. } = family;
            assert!(names.insert(name), "{name} is there twice");
            assert!(is_name(name) && (name.starts_with("shaper_") || name.starts_with("process_")), "{name}");
            assert!(name.ends_with(&family.suffix()) && family.stem() != "", "{name} lacks its unit or type");
            // Where another type has it, it would be taken for that.
            let of_others = ["_total", "_info", "_bucket", "_sum", "_count"];
            assert!(!of_others.iter().any(|end| family.stem().ends_with(end)), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(!help.ends_with('.') && !help.contains(['\n', '|']), "{name}: {help}");
            for label in *labels {
                // Prometheus puts these beside them.
                assert!(is_name(label) && !["le", "quantile", "job", "instance"].contains(label), "{name}");
            }
        }
    }

    #[test]
    fn the_document_shows_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        let (begin, end) = ("<!-- table: begin -->\n", "<!-- table: end -->");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once(begin).expect("the document has a place for the table");
        let (shown, after) = rest.split_once(end).expect("which ends");
        if std::env::var_os("SHAPER_REGENERATE").is_some() {
            std::fs::write(path, format!("{before}{begin}{}\n{end}{after}", markdown())).unwrap();
            return;
        }
        let remedy =
            "regenerate it: SHAPER_REGENERATE=1 cargo test -p shaper-metrics the_document_shows_this_table";
        assert!(shown == format!("{}\n", markdown()), "docs/metrics.md differs from the table; {remedy}");
    }
}
