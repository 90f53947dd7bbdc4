//! The clusters that the caller has given names to, in a file of their own.

use std::{
    collections::BTreeMap,
    env, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shaper_identity::files::{self, FileError};

/// More than this is not a list of clusters.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ContextError {
    /// There is no home to keep them in.
    #[error("contexts are kept below $XDG_CONFIG_HOME or $HOME, and neither is set")]
    Homeless,
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is somebody's who did not use `shaper context`.
    #[error(
        "{} is not as `shaper context` writes it; mend it, or remove it and set the contexts again", .path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// No such name.
    #[error("there is no context `{name}`; {}", names(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Nothing to keep.
    #[error("name at least one of --broker, --socket and --tls-dir, which the context is to keep")]
    Empty,
    /// A name that could be an option, or no word.
    #[error(
        "`{0}` is no name of a context: use 1 to 63 letters, digits, `-`, `_` and `.`, a letter or digit first"
    )]
    Name(String),
}

fn names(known: &[String]) -> String {
    match known {
        [] => "there are none yet: `shaper context set`".to_owned(),
        known => format!("there are: {}", known.join(", ")),
    }
}

/// Where a cluster is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// As --broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) broker: Option<String>,
    /// As --socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) socket: Option<PathBuf>,
    /// As --tls-dir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_dir: Option<PathBuf>,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contexts {
    /// The one that commands talk to.
    #[serde(default)]
    pub(crate) current: Option<String>,
    /// By name.
    #[serde(default)]
    pub(crate) contexts: BTreeMap<String, Context>,
}

impl Contexts {
    /// Those of the caller.
    pub(crate) fn load() -> Result<Contexts, ContextError> {
        path().map_or_else(|| Ok(Contexts::default()), |path| Contexts::read(&path))
    }

    /// Those of the caller, who need not have any unless one of them is asked for: whoever has become another user may still have
    /// the home of the first, and look into it in vain.
    pub(crate) fn load_for(name: Option<&str>) -> Result<Contexts, ContextError> {
        match Contexts::load() {
            Err(ContextError::File(error))
                if name.is_none() && error.source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Ok(Contexts::default())
            }
            loaded => loaded,
        }
    }

    /// Keeps them.
    pub(crate) fn save(&self) -> Result<(), ContextError> {
        self.write(&path().ok_or(ContextError::Homeless)?)
    }

    fn read(path: &Path) -> Result<Contexts, ContextError> {
        let text = match files::read(path, MAX_FILE) {
            Ok(text) => text,
            Err(error) => match error.source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => return Ok(Contexts::default()),
                _ => return Err(error.into()),
            },
        };
        serde_json::from_str(&text)
            .map_err(|source| ContextError::Malformed { path: path.to_owned(), source })
    }

    fn write(&self, path: &Path) -> Result<(), ContextError> {
        if let Some(directory) = path.parent() {
            files::private_directory(directory)?;
        }
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|source| ContextError::Malformed { path: path.to_owned(), source })?;
        text.push('\n');
        Ok(files::replace(path, text.as_bytes(), 0o600)?)
    }

    /// The one of this name, or else the current one, if any.
    pub(crate) fn chosen(&self, name: Option<&str>) -> Result<Option<&Context>, ContextError> {
        let Some(name) = name.or(self.current.as_deref()) else { return Ok(None) };
        self.contexts.get(name).map(Some).ok_or_else(|| self.unknown(name))
    }

    /// Keeps one under a name.
    pub(crate) fn set(&mut self, name: &str, context: Context) -> Result<(), ContextError> {
        let inner = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        if name.len() > 63
            || !name.starts_with(|first: char| first.is_ascii_alphanumeric())
            || !name.chars().all(inner)
        {
            return Err(ContextError::Name(name.to_owned()));
        }
        if context == Context::default() {
            return Err(ContextError::Empty);
        }
        self.contexts.insert(name.to_owned(), context);
        Ok(())
    }

    /// Makes one the current one, or none.
    pub(crate) fn choose(&mut self, name: Option<String>) -> Result<(), ContextError> {
        if let Some(name) = &name {
            self.chosen(Some(name))?;
        }
        self.current = name;
        Ok(())
    }

    /// Forgets one. Whoever forgets the current one talks to none.
    pub(crate) fn delete(&mut self, name: &str) -> Result<(), ContextError> {
        self.contexts.remove(name).ok_or_else(|| self.unknown(name))?;
        if self.current.as_deref() == Some(name) {
            self.current = None;
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> ContextError {
        ContextError::Unknown { name: name.to_owned(), known: self.contexts.keys().cloned().collect() }
    }
}

fn path() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")))?;
    Some(config.join("shaper/contexts.json"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn at(broker: &str) -> Context {
        Context { broker: Some(broker.into()), ..Context::default() }
    }

    #[test]
    fn what_is_kept_is_found_again_and_nobody_elses_to_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shaper/contexts.json");
        assert_eq!(Contexts::read(&path).unwrap(), Contexts::default());
        let mut contexts = Contexts::default();
        contexts.set("prod", at("https://b:1")).unwrap();
        contexts.choose(Some("prod".into())).unwrap();
        contexts.write(&path).unwrap();
        assert_eq!(Contexts::read(&path).unwrap(), contexts);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "{\"contexts\": []}").unwrap();
        let error = Contexts::read(&path).unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
    }

    #[test]
    fn one_is_current_until_it_is_forgotten() {
        let mut contexts = Contexts::default();
        assert_eq!(contexts.chosen(None).unwrap(), None);
        contexts.set("a", at("/a.sock")).unwrap();
        contexts.set("b", at("/b.sock")).unwrap();
        contexts.choose(Some("a".into())).unwrap();
        assert_eq!(contexts.chosen(None).unwrap(), Some(&at("/a.sock")));
        assert_eq!(contexts.chosen(Some("b")).unwrap(), Some(&at("/b.sock")));
        let unknown = contexts.choose(Some("c".into())).unwrap_err().to_string();
        assert!(unknown.contains("there are: a, b"), "{unknown}");
        contexts.delete("a").unwrap();
        assert_eq!((contexts.chosen(None).unwrap(), contexts.current.as_deref()), (None, None));
        contexts.choose(None).unwrap();
        assert!(contexts.delete("a").is_err());
    }

    #[test]
    fn names_are_words_and_contexts_say_something() {
        let mut contexts = Contexts::default();
        for bad in ["", "-a", ".a", "a b", "a/b", &"a".repeat(64)] {
            assert!(matches!(contexts.set(bad, at("/a")), Err(ContextError::Name(_))), "{bad}");
        }
        assert!(matches!(contexts.set("a", Context::default()), Err(ContextError::Empty)));
        assert_eq!(contexts, Contexts::default());
    }
}
