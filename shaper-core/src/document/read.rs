//! Reads values out of the tree of a document: what is expected, what is there, and where.

use super::{
    error::{DocumentError, Place, quoted, shortened},
    number::Decimal,
    source::{self, Node, Source, Value},
    suggest,
};
use crate::units::Millicores;

/// A field that a mapping may have.
pub(super) struct Field {
    pub(super) name: &'static str,
    /// As JSON, for whoever left it out.
    pub(super) example: &'static str,
    pub(super) is_required: bool,
    pub(super) kind: Kind,
    /// What it is, for the reference; nothing where a document of its own has that.
    pub(super) about: &'static str,
    /// What holds without it, in Markdown.
    pub(super) without: &'static str,
}

impl Field {
    pub(super) const fn optional(name: &'static str, kind: Kind, example: &'static str) -> Field {
        Field { name, example, is_required: false, kind, about: "", without: "" }
    }

    pub(super) const fn required(name: &'static str, kind: Kind, example: &'static str) -> Field {
        Field { is_required: true, ..Field::optional(name, kind, example) }
    }

    pub(super) const fn means(self, about: &'static str, without: &'static str) -> Field {
        Field { about, without, ..self }
    }
}

/// What a field holds, as the published schema tells it.
pub(super) enum Kind {
    /// What no published schema has.
    Unpublished,
    /// A name that may become part of a path.
    Name,
    /// A name, or a pattern of names.
    NamePattern,
    /// Names of labels and their values.
    Labels,
    Boolean,
    Word(&'static [&'static str]),
    Quantity(&'static Quantity),
    Whole {
        min: u64,
        max: u64,
    },
    Cores(&'static Written<Millicores>),
    Fields(&'static [Field]),
}

/// A value with its way from the root.
pub(super) struct Item<'a> {
    source: &'a Source<'a>,
    node: &'a Node,
    /// Its key; of the root and in lists, there is none.
    key: Option<&'a Node>,
    pub(super) path: String,
}

impl<'a> Item<'a> {
    pub(super) fn root(source: &'a Source<'a>, node: &'a Node) -> Item<'a> {
        Item { source, node, key: None, path: String::new() }
    }

    /// An error at this value.
    pub(super) fn error(&self, message: impl Into<String>) -> DocumentError {
        self.source.error(source::place(self.node.referenced), &self.path, message.into())
    }

    /// This is not what it has to be.
    pub(super) fn mismatch(&self, expected: &str) -> DocumentError {
        let error = self.error(format!("must be {expected}, and is {}", self.shown()));
        match &self.node.value {
            Value::Null => error.with_remedy("give it a value; a field that is not required may be left out"),
            _ => error,
        }
    }

    /// What is there, for people.
    fn shown(&self) -> String {
        match &self.node.value {
            Value::Null => "null".into(),
            Value::Bool(value) => value.to_string(),
            Value::Number => shortened(self.source.slice(self.node.referenced).trim()),
            Value::Text(text) if text.is_empty() => "an empty text".into(),
            Value::Text(text) => format!("the text {}", quoted(text)),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    pub(super) fn text(&self, expected: &str) -> Result<&'a str, DocumentError> {
        match &self.node.value {
            Value::Text(text) => Ok(text),
            Value::Number | Value::Bool(_) => {
                let written = shortened(self.source.slice(self.node.referenced).trim());
                Err(self.mismatch(expected).with_remedy(format!("put it in quotes: \"{written}\"")))
            }
            _ => Err(self.mismatch(expected)),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, DocumentError> {
        match &self.node.value {
            Value::Bool(value) => Ok(*value),
            _ => Err(self.mismatch("true or false").with_remedy("write true or false, without quotes")),
        }
    }

    fn decimal(&self, expected: &str, remedy: &str) -> Result<Decimal, DocumentError> {
        let decimal = match &self.node.value {
            Value::Number => Decimal::parse(self.source.slice(self.node.referenced).trim()),
            _ => None,
        };
        decimal.ok_or_else(|| match &self.node.value {
            Value::Text(text) if Decimal::parse(text.trim()).is_some() => {
                let remedy = format!("write the number without quotes: {}", shortened(text.trim()));
                self.mismatch(expected).with_remedy(remedy)
            }
            Value::Null => self.mismatch(expected),
            _ => self.mismatch(expected).with_remedy(remedy),
        })
    }

    /// A quantity, in whole units, rounded to the nearest.
    pub(super) fn quantity(&self, quantity: &Quantity) -> Result<u64, DocumentError> {
        let Quantity { unit, min, max, expected, remedy } = quantity;
        let decimal = self.decimal(expected, remedy)?;
        // The bounds hold for what is written, not for what it is rounded to.
        let exact = decimal.scaled(unit * 1000);
        let in_range = exact.is_some_and(|exact| exact >= min * 1000 && exact <= max * 1000);
        let units = decimal.scaled(*unit).filter(|_| in_range);
        units.ok_or_else(|| self.mismatch(expected).with_remedy(*remedy))
    }

    /// A quantity that says its unit itself.
    pub(super) fn written<T>(&self, quantity: &Written<T>) -> Result<T, DocumentError> {
        let text = match &self.node.value {
            Value::Number => Some(self.source.slice(self.node.referenced).trim()),
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        };
        let error = || self.mismatch(quantity.expected).with_remedy(quantity.remedy);
        text.and_then(quantity.parse).ok_or_else(error)
    }

    pub(super) fn whole(&self, min: u64, max: u64, what: &str) -> Result<u64, DocumentError> {
        let expected = format!("{what}: a whole number from {min} to {max}");
        let remedy = "write digits only, such as 500";
        let number = self.decimal(&expected, remedy)?.whole().filter(|number| (min..=max).contains(number));
        number.ok_or_else(|| self.mismatch(&expected).with_remedy(remedy))
    }

    /// One of some words.
    pub(super) fn word(&self, words: &[&'static str]) -> Result<&'static str, DocumentError> {
        let expected = format!("one of {}", words.join(", "));
        let word = self.text(&expected)?;
        if let Some(found) = words.iter().find(|known| **known == word) {
            return Ok(found);
        }
        let remedy = match suggest::nearest(word, words) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => format!("write one of {}", words.join(", ")),
        };
        Err(self.mismatch(&expected).with_remedy(remedy))
    }

    pub(super) fn list(&self, expected: &str) -> Result<Vec<Item<'a>>, DocumentError> {
        let Value::List(nodes) = &self.node.value else { return Err(self.mismatch(expected)) };
        let item = |(index, node)| {
            let path = format!("{}[{index}]", self.path);
            Item { source: self.source, node, key: None, path }
        };
        Ok(nodes.iter().enumerate().map(item).collect())
    }

    /// The entries of a mapping whose keys are free.
    pub(super) fn entries(&self, expected: &str) -> Result<Vec<(&'a str, Item<'a>)>, DocumentError> {
        let Value::Map(nodes) = &self.node.value else { return Err(self.mismatch(expected)) };
        let mut entries: Vec<(&'a str, Item<'a>)> = Vec::with_capacity(nodes.len());
        let mut seen = std::collections::HashMap::new();
        for (key, node) in nodes {
            let child = Item { source: self.source, node: key, key: None, path: self.path.clone() };
            let name = child.text("a name").map_err(|error| match error.remedy {
                Some(_) => error,
                None => error.with_remedy("name each field by a text"),
            })?;
            let path = self.path_of(name);
            if let Some(first) = seen.insert(name, source::place(key.referenced)) {
                let error = self.source.error(
                    source::place(key.referenced),
                    &path,
                    format!("is there twice; first in line {}", first.line),
                );
                return Err(error.with_remedy("keep one of the two"));
            }
            entries.push((name, Item { source: self.source, node, key: Some(key), path }));
        }
        Ok(entries)
    }

    /// The fields of a mapping that may have these and no others.
    pub(super) fn fields(
        &self,
        what: &str,
        known: &'static [Field],
    ) -> Result<Fields<'a, '_>, DocumentError> {
        let names = || known.iter().map(|field| field.name).collect::<Vec<_>>();
        let entries = self
            .entries(&format!("{what}: a mapping of fields"))
            .map_err(|error| self.with_fields(error, &names()))?;
        for (name, item) in &entries {
            if known.iter().any(|field| field.name == *name) {
                continue;
            }
            let names = names();
            let place = item.key.map_or(Place::START, |key| source::place(key.referenced));
            let error = self.source.error(place, &item.path, format!("{what} has no field of that name"));
            let all = format!("the fields are {}", names.join(", "));
            return Err(match suggest::nearest(name, &names) {
                Some(meant) => error.with_remedy(format!("did you mean `{meant}`? {all}")),
                None => error.with_remedy(all),
            });
        }
        Ok(Fields { of: self, what: what.to_owned(), known, entries })
    }

    fn with_fields(&self, error: DocumentError, names: &[&str]) -> DocumentError {
        match (&self.node.value, error.remedy.is_some()) {
            (Value::Map(_), _) => error,
            _ => error.with_remedy(format!("the fields are {}", names.join(", "))),
        }
    }

    fn path_of(&self, name: &str) -> String {
        let name = shortened(name);
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    /// Where whoever looks for something in here has to look.
    fn head(&self) -> Place {
        self.key.map_or_else(
            || Place { length: 1, ..source::place(self.node.referenced) },
            |key| source::place(key.referenced),
        )
    }
}

/// A quantity that is written with its unit, or as a plain number.
pub(super) struct Written<T> {
    pub(super) parse: fn(&str) -> Option<T>,
    /// What texts are one, as a regular expression.
    pub(super) pattern: &'static str,
    /// The bounds of a plain number.
    pub(super) min: &'static str,
    pub(super) max: &'static str,
    pub(super) expected: &'static str,
    pub(super) remedy: &'static str,
}

/// A kind of quantity.
pub(super) struct Quantity {
    /// How many of the units that it is kept in one of the document's is.
    pub(super) unit: u64,
    /// In the units that it is kept in.
    pub(super) min: u64,
    /// In the units that it is kept in.
    pub(super) max: u64,
    pub(super) expected: &'static str,
    pub(super) remedy: &'static str,
}

/// The fields of a mapping, all of them known.
pub(super) struct Fields<'a, 'i> {
    of: &'i Item<'a>,
    what: String,
    known: &'static [Field],
    entries: Vec<(&'a str, Item<'a>)>,
}

impl<'a> Fields<'a, '_> {
    pub(super) fn optional(&self, name: &str) -> Option<&Item<'a>> {
        debug_assert!(self.known.iter().any(|field| field.name == name), "{name} is not declared");
        self.entries.iter().find(|(entry, _)| *entry == name).map(|(_, item)| item)
    }

    pub(super) fn required(&self, name: &str) -> Result<&Item<'a>, DocumentError> {
        debug_assert!(self.known.iter().any(|field| field.name == name && field.is_required), "{name}");
        self.optional(name).ok_or_else(|| {
            let message = format!("is missing, and {} must have it", self.what);
            let error = self.of.source.error(self.of.head(), &self.of.path_of(name), message);
            let field = self.known.iter().find(|field| field.name == name);
            match field {
                Some(Field { name, example, .. }) => {
                    error.with_remedy(format!("add it, such as `\"{name}\": {example}`"))
                }
                None => error,
            }
        })
    }

    /// What `read` makes of a field, if it is there.
    pub(super) fn map<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Item<'a>) -> Result<T, DocumentError>,
    ) -> Result<Option<T>, DocumentError> {
        self.optional(name).map(read).transpose()
    }
}
