//! Text into a tree in which every node knows its place. JSON is read as the YAML that it is.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{
    Error, Location, Options, Spanned,
    budget::BudgetBreach,
    options::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy},
};

use super::error::{DocumentError, Place, printable};

/// The longest document that is read.
pub const MAX_BYTES: usize = 1 << 20;

/// The deepest nesting that is read; no document here has need of more than a few levels.
const MAX_DEPTH: usize = 16;
/// The most values that a document may have.
const MAX_NODES: usize = 20_000;

/// A document as it came.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: &'a str,
    pub(super) text: &'a str,
}

/// A value and its place.
pub(super) type Node = Spanned<Value>;

/// What YAML and JSON can say.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// Its digits are in the source.
    Number,
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

impl<'a> Source<'a> {
    /// A document that is text and not too long.
    pub(super) fn new(file: &'a str, bytes: &'a [u8]) -> Result<Source<'a>, DocumentError> {
        if bytes.len() > MAX_BYTES {
            let message = "the document is longer than 1 MiB".to_owned();
            let error = DocumentError::new(file, None, Place::START, "", message);
            return Err(error.with_remedy("documents here are a few hundred bytes: is this the right file?"));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let place = place_after(&String::from_utf8_lossy(&bytes[..error.valid_up_to()]));
            let error = DocumentError::new(file, None, place, "", "the document is not UTF-8".into());
            error.with_remedy("save it as UTF-8")
        })?;
        Ok(Source { file, text })
    }

    /// The tree of the document.
    pub(super) fn parse(&self) -> Result<Node, DocumentError> {
        serde_yaml::from_str_with_options(self.text, options()).map_err(|error| self.syntax_error(&error))
    }

    /// The text of a node, as it was written.
    pub(super) fn slice(&self, location: Location) -> &'a str {
        let span = location.span();
        let range = span.byte_offset().zip(span.byte_len()).and_then(|(start, length)| {
            Some(usize::try_from(start).ok()?..usize::try_from(start.checked_add(length)?).ok()?)
        });
        range.and_then(|range| self.text.get(range)).unwrap_or_default()
    }

    pub(super) fn error(&self, place: Place, path: &str, message: String) -> DocumentError {
        DocumentError::new(self.file, Some(self.text), place, path, message)
    }

    fn anchor_before(&self, error: &Error) -> Option<Place> {
        let offset = usize::try_from(error.location()?.span().byte_offset()?).ok()?;
        let before = self.text.get(..offset)?;
        before.rfind('&').map(|anchor| place_after(&before[..anchor]))
    }

    fn syntax_error(&self, error: &Error) -> DocumentError {
        let error = error.without_snippet();
        let place = error.location().map_or(Place::START, place);
        let fault = |message: &str, remedy: &str| self.error(place, "", message.into()).with_remedy(remedy);
        match error {
            Error::Budget { breach, .. } => match breach {
                // It is noticed at the value that the anchor is for.
                BudgetBreach::Anchors { .. } => {
                    let place = self.anchor_before(error).unwrap_or(place);
                    self.error(place, "", NO_ALIASES.into()).with_remedy(WRITE_OUT)
                }
                BudgetBreach::Aliases { .. } | BudgetBreach::AliasAnchorRatio { .. } => {
                    fault(NO_ALIASES, WRITE_OUT)
                }
                BudgetBreach::Documents { .. } => {
                    fault("another document begins here", "keep each document in a file of its own")
                }
                BudgetBreach::Depth { .. } => fault(TOO_DEEP, FEW_LEVELS),
                _ => fault("the document has too many values", "is this the right file?"),
            },
            Error::UnknownAnchor { .. }
            | Error::AliasError { .. }
            | Error::AliasReplayLimitExceeded { .. }
            | Error::AliasExpansionLimitExceeded { .. } => fault(NO_ALIASES, WRITE_OUT),
            Error::MergeKeyNotAllowed { .. } => fault("merge keys (`<<`) are not taken", WRITE_OUT),
            Error::UnsupportedTag { .. } => fault("this tag is not known", "leave tags (`!…`) out"),
            other => {
                let message = other.to_string();
                let ending = format!(" at line {}, column {}", place.line, place.column);
                // Long enough for whatever the parser says of itself.
                let message: String =
                    message.strip_suffix(&ending).unwrap_or(&message).chars().take(200).collect();
                // The parser looks ahead of what the budget has seen.
                if message.contains("recursion limit exceeded") {
                    return fault(TOO_DEEP, FEW_LEVELS);
                }
                fault(
                    &format!("this is not valid YAML or JSON: {}", printable(&message)),
                    "check the quotes, commas, colons, brackets and the indentation up to here",
                )
            }
        }
    }
}

/// The place that follows a text.
fn place_after(text: &str) -> Place {
    let last = text.rsplit('\n').next().unwrap_or_default();
    let number = |count: usize| u32::try_from(count + 1).unwrap_or(u32::MAX);
    let (line, column) = (text.matches('\n').count(), last.chars().count());
    Place { line: number(line), column: number(column), length: 1 }
}

const NO_ALIASES: &str = "anchors (`&`) and aliases (`*`) are not taken";
const TOO_DEEP: &str = "this is nested too deeply";
const FEW_LEVELS: &str = "close the brackets that are open; no document here has more than a few levels";
const WRITE_OUT: &str = "write the value out; a text that begins with `&` or `*` needs quotes";

pub(super) fn place(location: Location) -> Place {
    let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).max(1);
    Place {
        line: number(location.line()),
        column: number(location.column()),
        length: usize::try_from(location.span().len()).unwrap_or(1),
    }
}

fn options() -> Options {
    serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_documents: 1,
            max_anchors: 0,
            max_aliases: 0,
        },
        alias_limits: serde_yaml::alias_limits! {
            max_total_replayed_events: 0,
            max_alias_expansions_per_anchor: 0,
        },
        // Refused by `read`, which knows the path.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
        // Refused by `read`, like all that is not a decimal.
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_u128<E>(self, _: u128) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_i128<E>(self, _: i128) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}
