//! What a daemon has to say at one moment, and its text: OpenMetrics by prometheus-client, and the older format of
//! Prometheus by conversion of that, since the two differ in headers alone.

use std::{collections::BTreeMap, fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit as ClientUnit},
};

use crate::{Durations, Family, Kind, Unit};

/// A value of a series.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number without a fraction.
    Count(u64),
    /// One with.
    Float(f64),
    /// There is nothing but the labels.
    Info,
    /// A histogram.
    Histogram {
        /// Where each bucket ends, the last of them nowhere, and how many are in it: not in those before.
        buckets: Vec<(f64, u64)>,
        /// The sum of all.
        sum: f64,
    },
}

impl From<&Durations> for Value {
    fn from(durations: &Durations) -> Value {
        Value::Histogram { buckets: durations.buckets(), sum: durations.sum_seconds() }
    }
}

/// How it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' own text, version 0.0.4.
    Classic,
}

impl Format {
    /// As HTTP names it.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// What the value of `Accept` prefers; without a preference, the older one: what knows the newer says so.
    pub fn preferred(accept: &str) -> Format {
        let wanted = |name: &str| {
            let ranges = accept.split(',').filter_map(|range| {
                let mut parts = range.split(';').map(str::trim);
                let is_it = parts.next().is_some_and(|media| media.eq_ignore_ascii_case(name));
                let quality = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f64>().ok());
                is_it.then(|| quality.unwrap_or(1.0))
            });
            ranges.fold(0.0, f64::max)
        };
        let open = wanted("application/openmetrics-text");
        if open > 0.0 && open >= wanted("text/plain") { Format::OpenMetrics } else { Format::Classic }
    }
}

#[derive(Debug)]
struct Sample {
    labels: Arc<[String]>,
    more: &'static [&'static str],
    value: Value,
}

/// What a daemon has to say at one moment.
#[derive(Debug, Default)]
pub struct Exposition {
    families: BTreeMap<&'static str, (&'static Family, Vec<Sample>)>,
}

impl Exposition {
    /// Adds a series. Its labels have the values `labels`, then `more`, in the order of the table.
    pub fn add(
        &mut self,
        family: &'static Family,
        labels: &[String],
        more: &'static [&'static str],
        value: Value,
    ) {
        self.add_shared(family, &Arc::from(labels), more, value);
    }

    /// The same for labels that many series share.
    pub fn add_shared(
        &mut self,
        family: &'static Family,
        labels: &Arc<[String]>,
        more: &'static [&'static str],
        value: Value,
    ) {
        debug_assert_eq!(labels.len() + more.len(), family.labels.len(), "{}", family.name);
        let sample = Sample { labels: Arc::clone(labels), more, value };
        self.families.entry(family.name).or_insert_with(|| (family, Vec::new())).1.push(sample);
    }

    /// How many series there are.
    pub fn series(&self) -> usize {
        self.families.values().map(|(_, samples)| samples.len()).sum()
    }

    /// All of it as text.
    pub fn encode(self, format: Format) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut written = String::new();
        text::encode(&mut written, &registry)?;
        Ok(match format {
            Format::OpenMetrics => written,
            Format::Classic => classic(&written),
        })
    }
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (family, samples) in self.families.values() {
            let unit = match family.unit {
                Unit::None => None,
                Unit::Bytes => Some(ClientUnit::Bytes),
                Unit::Seconds => Some(ClientUnit::Seconds),
                other => Some(ClientUnit::Other(other.suffix().to_owned())),
            };
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
                Kind::Info => MetricType::Info,
            };
            let help = format!("{}.", family.help);
            let stem = family.stem();
            let mut metric = encoder.encode_descriptor(stem, &help, unit.as_ref(), kind)?;
            for sample in samples {
                let labels = Labels { names: family.labels, sample };
                match family.kind {
                    Kind::Info => metric.encode_info(&labels)?,
                    // Not `name{}`, which is the same in more letters.
                    kind if family.labels.is_empty() => write(&mut metric, kind, &sample.value)?,
                    kind => write(&mut metric.encode_family(&labels)?, kind, &sample.value)?,
                }
            }
        }
        Ok(())
    }
}

fn write(metric: &mut MetricEncoder<'_>, kind: Kind, value: &Value) -> fmt::Result {
    match (kind, value) {
        (Kind::Counter, Value::Count(count)) => metric.encode_counter::<NoLabelSet, _, u64>(count, None),
        (Kind::Counter, Value::Float(sum)) => metric.encode_counter::<NoLabelSet, _, f64>(sum, None),
        (Kind::Gauge, Value::Count(count)) => metric.encode_gauge(count),
        (Kind::Gauge, Value::Float(value)) => metric.encode_gauge(value),
        (Kind::Histogram, Value::Histogram { buckets, sum }) => {
            let count = buckets.iter().map(|(_, count)| count).sum();
            metric.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
        }
        // A value of another type than the table says.
        _ => Err(fmt::Error),
    }
}

struct Labels<'a> {
    names: &'static [&'static str],
    sample: &'a Sample,
}

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Sample { labels, more, .. } = self.sample;
        let values = labels.iter().map(String::as_str).chain(more.iter().copied());
        self.names.iter().copied().zip(values).collect::<Vec<_>>().encode(encoder)
    }
}

/// The older format: headers have the names of the series, there are no units, and an info is a gauge.
fn classic(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut help = "";
    for line in text.lines() {
        let (name, kind) = match line.strip_prefix("# ").and_then(|header| header.split_once(' ')) {
            Some(("HELP", said)) => {
                help = said;
                continue;
            }
            Some(("TYPE", said)) => said.split_once(' ').unwrap_or((said, "untyped")),
            Some(("UNIT", _)) => continue,
            _ if line == "# EOF" => continue,
            _ => {
                written += line;
                written.push('\n');
                continue;
            }
        };
        let (suffix, kind) = match kind {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            other => ("", other),
        };
        let help = help.split_once(' ').map_or("", |(_, help)| help);
        written += &format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const BYTES: Family =
        Family::counter("x_sent_bytes_total", Unit::Bytes, "What was sent", &["task", "direction"]);
    const LEVEL: Family = Family::gauge("x_level", Unit::None, "How high it is", &[]);
    const WHAT: Family = Family::info("x_what_info", "What it is", &["name"]);
    const TOOK: Family = Family::histogram("x_took_seconds", Unit::Seconds, "How long it took", &[]);

    fn exposition() -> Exposition {
        let mut exposition = Exposition::default();
        let odd = ["a\"\\\nb".to_owned()];
        exposition.add(&BYTES, &odd, &["egress"], Value::Count(u64::MAX));
        exposition.add(&BYTES, &["c".to_owned()], &["ingress"], Value::Float(0.5));
        exposition.add(&LEVEL, &[], &[], Value::Float(-1.5));
        exposition.add(&WHAT, &["it".to_owned()], &[], Value::Info);
        let mut took = Durations::default();
        took.add(Duration::from_millis(2));
        took.add(Duration::from_secs(1000));
        exposition.add(&TOOK, &[], &[], Value::from(&took));
        exposition
    }

    #[test]
    fn open_metrics_have_units_and_an_end() {
        let text = exposition().encode(Format::OpenMetrics).unwrap();
        let begin = "# HELP x_level How high it is.\n# TYPE x_level gauge\nx_level -1.5\n\
                     # HELP x_sent_bytes What was sent.\n# TYPE x_sent_bytes counter\n# UNIT x_sent_bytes bytes\n\
                     x_sent_bytes_total{task=\"a\\\"\\\\\\nb\",direction=\"egress\"} 18446744073709551615\n\
                     x_sent_bytes_total{task=\"c\",direction=\"ingress\"} 0.5\n";
        assert!(text.starts_with(begin), "{text}");
        assert!(text.contains("# TYPE x_what info\nx_what_info{name=\"it\"} 1\n"), "{text}");
        assert!(text.contains("x_took_seconds_sum 1000.002\nx_took_seconds_count 2\n"), "{text}");
        assert!(text.contains("{le=\"0.001\"} 0\n") && text.contains("{le=\"0.0025\"} 1\n"), "{text}");
        assert!(text.ends_with("x_what_info{name=\"it\"} 1\n# EOF\n"), "{text}");
        assert!(text.contains("{le=\"+Inf\"} 2\n"), "{text}");
    }

    #[test]
    fn the_older_text_names_series_in_its_headers() {
        let text = exposition().encode(Format::Classic).unwrap();
        let headers: Vec<_> = text.lines().filter(|line| line.starts_with('#')).collect();
        let expected = [
            "# HELP x_level How high it is.",
            "# TYPE x_level gauge",
            "# HELP x_sent_bytes_total What was sent.",
            "# TYPE x_sent_bytes_total counter",
            "# HELP x_took_seconds How long it took.",
            "# TYPE x_took_seconds histogram",
            "# HELP x_what_info What it is.",
            "# TYPE x_what_info gauge",
        ];
        assert_eq!(headers, expected);
        let values = |text: &str| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        };
        assert_eq!(values(&text), values(&exposition().encode(Format::OpenMetrics).unwrap()));
    }

    #[test]
    fn a_value_of_another_type_is_not_written() {
        let mut exposition = Exposition::default();
        exposition.add(&LEVEL, &[], &[], Value::from(&Durations::default()));
        assert!(exposition.encode(Format::Classic).is_err());
    }

    #[test]
    fn the_format_is_what_is_preferred() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Format::preferred(prometheus), Format::OpenMetrics);
        for classic in [
            "",
            "*/*",
            "text/plain",
            "text/plain, application/openmetrics-text;q=0.5",
            "text/html",
            "application/openmetrics-text;q=0",
        ] {
            assert_eq!(Format::preferred(classic), Format::Classic, "{classic}");
        }
    }
}
