//! What users write: task profiles, task specs and policies, in YAML or JSON. Text in, a value or a
//! [`DocumentError`] out, which says where the fault is and what to write instead.
//!
//! Strict: a field that is not known, missing, there twice or of the wrong kind is refused, and so is
//! what could grow (anchors, deep nesting, more than [`MAX_BYTES`]). JSON is read by the same parser,
//! for it is YAML. Numbers are read as they are spelt, without a float.

mod adoption;
mod error;
mod number;
mod policy;
#[cfg(test)]
mod policy_tests;
mod profile;
mod read;
mod runtime;
mod scale;
#[cfg(test)]
mod scale_tests;
mod schema;
mod source;
mod suggest;
mod task;
#[cfg(test)]
mod tests;

pub use error::DocumentError;
pub use policy::policy_fields;
pub use profile::{MAX_RUNTIME_SECONDS, profile_to_json};
pub use runtime::{Failing, RuntimeSettings};
pub use schema::policy_schema;
pub use source::MAX_BYTES;
pub use task::{MAX_RETRIES, NoCommand, TaskDraft, fits_label};

use crate::{
    adopt::Rule,
    scale::Scaling,
    spec::{Policy, Profile},
};
use read::Item;
use source::{Source, Value};

/// Reads a task profile. `file` is its name in errors.
pub fn profile(file: &str, text: impl AsRef<[u8]>) -> Result<Profile, DocumentError> {
    read(file, text.as_ref(), profile::profile)
}

/// Reads a policy. `file` is its name in errors.
pub fn policy(file: &str, text: impl AsRef<[u8]>) -> Result<Policy, DocumentError> {
    read(file, text.as_ref(), policy::policy)
}

/// Reads which groups of nodes may be started and ended. `file` is its name in errors.
pub fn scaling(file: &str, text: impl AsRef<[u8]>) -> Result<Scaling, DocumentError> {
    read(file, text.as_ref(), scale::scaling)
}

/// Reads a task spec, or a bare profile as a draft of one. `file` is its name in errors.
pub fn task(file: &str, text: impl AsRef<[u8]>) -> Result<TaskDraft, DocumentError> {
    read(file, text.as_ref(), task::task)
}

/// Reads the rules by which an agent adopts cgroups. `file` is its name in errors.
pub fn adoption_rules(file: &str, text: impl AsRef<[u8]>) -> Result<Vec<Rule>, DocumentError> {
    read(file, text.as_ref(), adoption::rules)
}

/// Reads the settings of `shaper-runtime`. `file` is its name in errors.
pub fn runtime_settings(file: &str, text: impl AsRef<[u8]>) -> Result<RuntimeSettings, DocumentError> {
    read(file, text.as_ref(), runtime::settings)
}

fn read<T>(
    file: &str,
    text: &[u8],
    read: impl FnOnce(&Item<'_>) -> Result<T, DocumentError>,
) -> Result<T, DocumentError> {
    let source = Source::new(file, text)?;
    let root = source.parse()?;
    if matches!(root.value, Value::Null) {
        let error = Item::root(&source, &root).error("the document is empty");
        return Err(error.with_remedy("is this the right file?"));
    }
    read(&Item::root(&source, &root))
}
