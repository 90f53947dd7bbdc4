//! docs/api.md: every call, message and enumeration of the protocol, with its comment, and who may make which call. It is
//! written from the protos and from the table of roles, and this test compares.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::HashMap, env, fmt::Write as _, fs};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
    source_code_info::Location,
};
use shaper_identity::table;
use shaper_proto::FILE_DESCRIPTOR_SET;

const INTRODUCTION: &str = "\
# API

What broker, agent and authority serve by gRPC, package `shaper.v1`: on Unix sockets, where the kernel names the caller, and over
TCP with certificates. Errors are the status codes of gRPC with a text for people, and for refusals `google.rpc.ErrorInfo` of the
domain `shaper`. Both daemons answer reflection, for tools such as grpcurl. Who may make which call is in
[authorization.md](authorization.md), too.

Written from `proto/shaper/v1` by `SHAPER_REGENERATE=1 cargo nextest run -p shaper-identity the_document`: change it there.
";

/// The comments of a file, by the path to what they are about (descriptor.proto, SourceCodeInfo).
struct Comments<'a>(HashMap<&'a [i32], &'a str>);

impl Comments<'_> {
    fn of(file: &FileDescriptorProto) -> Comments<'_> {
        let of = |location| {
            let Location { path, leading_comments, trailing_comments, .. }: &Location = location;
            let comment = leading_comments.as_deref().or(trailing_comments.as_deref())?;
            Some((path.as_slice(), comment))
        };
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        Comments(locations.filter_map(of).collect())
    }

    /// In one line, as a cell and a paragraph want it.
    fn at(&self, path: &[i32]) -> String {
        let text = self.0.get(path).copied().unwrap_or_default();
        let words: Vec<_> = text.split_whitespace().collect();
        words.join(" ").replace('|', "\\|").replace('<', "&lt;")
    }
}

/// Something's name, with what is said of it.
fn heading(text: &mut String, level: &str, name: &str, about: &str) {
    let _ = writeln!(text, "\n{level} {name}\n");
    if !about.is_empty() {
        let _ = writeln!(text, "{about}\n");
    }
}

/// The last word of a full name, as a link where it is ours.
fn named(full: &str) -> String {
    let name = full.rsplit('.').next().unwrap();
    if full.starts_with(".shaper.") {
        format!("[{name}](#{})", name.to_lowercase())
    } else {
        format!("`{}`", full.trim_start_matches('.'))
    }
}

fn is_map(of: &DescriptorProto) -> bool {
    of.options.as_ref().is_some_and(|options| options.map_entry())
}

fn kind(field: &FieldDescriptorProto, of: &DescriptorProto) -> String {
    let is_entry = |nested: &&DescriptorProto| {
        is_map(nested) && field.type_name().ends_with(&format!(".{}.{}", of.name(), nested.name()))
    };
    if let Some(entry) = of.nested_type.iter().find(is_entry) {
        return format!("map of {} to {}", kind(&entry.field[0], entry), kind(&entry.field[1], entry));
    }
    let name = match field.r#type() {
        Type::Message | Type::Enum => named(field.type_name()),
        plain => format!("{plain:?}").to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("list of {name}"),
        _ if field.proto3_optional() => format!("{name}, or absent"),
        _ if field.oneof_index.is_some() => {
            let group = &of.oneof_decl[usize::try_from(field.oneof_index()).unwrap()];
            format!("{name}, one of `{}`", group.name())
        }
        _ => name,
    }
}

fn message(text: &mut String, of: &DescriptorProto, comments: &Comments<'_>, path: &[i32]) {
    heading(text, "###", of.name(), &comments.at(path));
    if of.field.is_empty() {
        let _ = writeln!(text, "It has no fields.");
    } else {
        let _ = writeln!(text, "| field | type | meaning |\n|---|---|---|");
    }
    for (number, field) in (0..).zip(&of.field) {
        let about = comments.at(&[path, &[2, number]].concat());
        let _ = writeln!(text, "| `{}` = {} | {} | {about} |", field.name(), field.number(), kind(field, of));
    }
    for (number, nested) in (0..).zip(&of.nested_type).filter(|(_, nested)| !is_map(nested)) {
        message(text, nested, comments, &[path, &[3, number]].concat());
    }
    for (number, nested) in (0..).zip(&of.enum_type) {
        enumeration(text, nested, comments, &[path, &[4, number]].concat());
    }
}

fn enumeration(text: &mut String, of: &EnumDescriptorProto, comments: &Comments<'_>, path: &[i32]) {
    heading(text, "###", of.name(), &comments.at(path));
    let _ = writeln!(text, "| value | meaning |\n|---|---|");
    for (number, value) in (0..).zip(&of.value) {
        let about = comments.at(&[path, &[2, number]].concat());
        let _ = writeln!(text, "| `{}` = {} | {about} |", value.name(), value.number());
    }
}

fn services(text: &mut String, file: &FileDescriptorProto) {
    let comments = Comments::of(file);
    for (number, service) in (0..).zip(&file.service) {
        heading(text, "##", service.name(), &comments.at(&[6, number]));
        let _ = writeln!(text, "| call | request | answer | who may | meaning |\n|---|---|---|---|---|");
        for (at, method) in (0..).zip(&service.method) {
            let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
            let call = table::call(&path).unwrap_or_else(|| panic!("{path} is not in the table of roles"));
            let stream = |is_one| if is_one { "stream of " } else { "" };
            let request = format!("{}{}", stream(method.client_streaming()), named(method.input_type()));
            let answer = format!("{}{}", stream(method.server_streaming()), named(method.output_type()));
            let (who, about) = (call.who_may(), comments.at(&[6, number, 2, at]));
            let _ = writeln!(text, "| `{}` | {request} | {answer} | {who} | {about} |", method.name());
        }
    }
}

fn reference() -> String {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap().file;
    let ours = || files.iter().filter(|file| file.package() == "shaper.v1");
    let mut text = INTRODUCTION.to_owned();
    for file in ours() {
        services(&mut text, file);
    }
    for file in ours() {
        let (comments, name) = (Comments::of(file), file.name().rsplit('/').next().unwrap());
        let _ = writeln!(text, "\n## Messages of {name}");
        for (number, of) in (0..).zip(&file.message_type) {
            message(&mut text, of, &comments, &[4, number]);
        }
        for (number, of) in (0..).zip(&file.enum_type) {
            enumeration(&mut text, of, &comments, &[5, number]);
        }
    }
    text
}

#[test]
fn the_document_is_that_of_the_protocol() {
    let (path, expected) = (concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md"), reference());
    if env::var_os("SHAPER_REGENERATE").is_some() {
        fs::write(path, expected).unwrap();
        return;
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    let remedy = "regenerate it: SHAPER_REGENERATE=1 cargo nextest run -p shaper-identity the_document";
    assert!(found == expected, "docs/api.md differs from the protocol; {remedy}");
}
