//! The JSON Schema of policies, for editors: written from the tables of fields that the parser reads by.

use super::{
    number::shortest,
    policy::POLICY,
    read::{Field, Kind, Quantity},
};

/// What a name may look like, as [`crate::id::TaskId`] has it.
const NAME: &str = "^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$";
/// What a pattern may look like, as [`crate::policy::NamePattern`] has it.
const NAME_PATTERN: &str = "^[A-Za-z0-9._*-]{1,63}$";
/// The name of a label, and its value, which may be empty.
const LABEL: &str = "^[A-Za-z0-9._/-]{1,63}$";
const LABEL_VALUE: &str = "^[A-Za-z0-9._/-]{0,63}$";

/// The fields of a policy as a table in Markdown, for the reference.
#[cfg(test)]
pub(super) fn policy_table() -> String {
    fn rows(fields: &'static [Field], of: &str, table: &mut String) {
        for Field { name, kind, about, without, .. } in fields {
            match kind {
                Kind::Fields(inner) if about.is_empty() => rows(inner, &format!("{of}{name}."), table),
                _ => {
                    assert!(!about.is_empty() && !without.is_empty(), "{of}{name} is not explained");
                    table.push_str(&format!("| `{of}{name}` | {about} | {without} |\n"));
                }
            }
        }
    }
    let mut table = "| field | what it is | default |\n|---|---|---|\n".to_owned();
    rows(POLICY, "", &mut table);
    table
}

/// The JSON Schema (draft 2020-12) of a policy.
pub fn policy_schema() -> String {
    let mut schema = vec![
        ("$schema", Json::text("https://json-schema.org/draft/2020-12/schema")),
        ("title", Json::text("a policy of shaper")),
    ];
    schema.extend(fields(POLICY));
    let mut text = String::new();
    Json::Map(schema).write(&mut text, 0);
    text.push('\n');
    text
}

fn fields(fields: &'static [Field]) -> Vec<(&'static str, Json)> {
    let required: Vec<Json> =
        fields.iter().filter(|field| field.is_required).map(|field| Json::text(field.name)).collect();
    let property = |field: &'static Field| {
        let mut schema = kind(&field.kind);
        if !field.about.is_empty() {
            // What it may hold is told by the rest.
            schema.retain(|(keyword, _)| *keyword != "description");
            let about = match field.is_required {
                true => field.about.to_owned(),
                false => format!("{}; without it: {}", field.about, field.without),
            };
            schema.insert(0, ("description", Json::Text(about.replace('`', ""))));
        }
        // As JSON already.
        schema.push(("examples", Json::List(vec![Json::Raw(field.example.to_owned())])));
        (field.name, Json::Map(schema))
    };
    let mut schema = vec![
        ("type", Json::text("object")),
        ("properties", Json::Map(fields.iter().map(property).collect())),
        ("additionalProperties", Json::Raw("false".into())),
    ];
    if !required.is_empty() {
        schema.insert(1, ("required", Json::List(required)));
    }
    schema
}

fn kind(kind: &'static Kind) -> Vec<(&'static str, Json)> {
    let text_like = |pattern: &str| vec![("type", Json::text("string")), ("pattern", Json::text(pattern))];
    match kind {
        Kind::Unpublished => Vec::new(),
        Kind::Name => text_like(NAME),
        Kind::NamePattern => text_like(NAME_PATTERN),
        Kind::Labels => vec![
            ("type", Json::text("object")),
            ("propertyNames", Json::Map(vec![("pattern", Json::text(LABEL))])),
            ("additionalProperties", Json::Map(text_like(LABEL_VALUE))),
        ],
        Kind::Boolean => vec![("type", Json::text("boolean"))],
        Kind::Word(words) => vec![("enum", Json::List(words.iter().map(|word| Json::text(word)).collect()))],
        Kind::Quantity(Quantity { unit, min, max, expected, .. }) => vec![
            ("description", Json::text(expected)),
            ("type", Json::text("number")),
            ("minimum", Json::Raw(shortest(*min, *unit))),
            ("maximum", Json::Raw(shortest(*max, *unit))),
        ],
        Kind::Whole { min, max } => vec![
            ("type", Json::text("integer")),
            ("minimum", Json::Raw(min.to_string())),
            ("maximum", Json::Raw(max.to_string())),
        ],
        Kind::Cores(written) => vec![
            ("description", Json::text(written.expected)),
            // Of the two, each binds the type that it is for.
            ("type", Json::List(vec![Json::text("number"), Json::text("string")])),
            ("minimum", Json::Raw(written.min.into())),
            ("maximum", Json::Raw(written.max.into())),
            ("pattern", Json::text(written.pattern)),
        ],
        Kind::Fields(of) => fields(of),
    }
}

/// A part of the schema.
enum Json {
    /// As it is written.
    Raw(String),
    Text(String),
    List(Vec<Json>),
    Map(Vec<(&'static str, Json)>),
}

impl Json {
    fn text(text: &str) -> Json {
        Json::Text(text.to_owned())
    }

    fn write(&self, out: &mut String, depth: usize) {
        match self {
            Json::Raw(text) => out.push_str(text),
            Json::Text(text) => {
                out.push('"');
                // Nothing else in the tables has to be escaped; the test reads it back.
                out.push_str(&text.replace('\\', "\\\\").replace('"', "\\\""));
                out.push('"');
            }
            Json::List(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    out.push_str(if index > 0 { ", " } else { "" });
                    item.write(out, depth);
                }
                out.push(']');
            }
            Json::Map(entries) => {
                out.push('{');
                for (index, (key, value)) in entries.iter().enumerate() {
                    out.push_str(if index > 0 { ",\n" } else { "\n" });
                    out.push_str(&"  ".repeat(depth + 1));
                    out.push_str(&format!("\"{key}\": "));
                    value.write(out, depth + 1);
                }
                out.push('\n');
                out.push_str(&"  ".repeat(depth));
                out.push('}');
            }
        }
    }
}
