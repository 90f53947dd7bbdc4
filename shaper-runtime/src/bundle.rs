//! A bundle gets our hook. Whoever may write in the bundle, or swap a directory above it, could have root run anything, so that
//! such a bundle is not touched.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{ADMIT, settings::Chosen};

const CONFIG: &str = "config.json";
/// Longer than this is no configuration.
const CONFIG_MAX: u64 = 16 << 20;
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// In such a directory nobody takes away what is another's (`/tmp`).
const STICKY: u32 = 0o1000;
/// What the runtime grants the hook beyond our patience, in seconds.
const GRACE_SECONDS: u64 = 2;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("cannot {verb} {}", path.display())]
    Io { verb: &'static str, path: PathBuf, source: io::Error },
    #[error("{} may be written by others than root, who could put anything into the bundle", .0.display())]
    NotRoots(PathBuf),
    #[error("{} is no file, or is longer than {CONFIG_MAX} bytes", .0.display())]
    NoFile(PathBuf),
    #[error("{} is no configuration of a container", path.display())]
    Invalid { path: PathBuf, source: serde_json::Error },
}

/// An entry of `hooks.createRuntime`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hook {
    path: PathBuf,
    args: Vec<String>,
    /// Seconds.
    timeout: u64,
}

impl Hook {
    pub(crate) fn new(program: &Path, chosen: &Chosen) -> Hook {
        let mut args = vec!["shaper-runtime".to_owned()];
        args.extend(chosen.file.as_ref().map(|file| format!("--shaper-config={}", file.display())));
        args.push(ADMIT.to_owned());
        let patience = chosen.settings.patience.as_secs();
        Hook { path: program.to_owned(), args, timeout: patience.saturating_add(GRACE_SECONDS) }
    }
}

/// What is to be known of a configuration; what is not stays as it is, to the letter.
type Parts = BTreeMap<String, Box<RawValue>>;

/// Puts the hook before all others of its kind, unless it is there.
pub(crate) fn prepare(bundle: &Path, hook: &Hook) -> Result<(), BundleError> {
    let failed = |verb, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| BundleError::Io { verb, path, source }
    };
    let bundle = fs::canonicalize(bundle).map_err(failed("find", bundle))?;
    for above in bundle.ancestors() {
        let found = fs::symlink_metadata(above).map_err(failed("look at", above))?;
        let is_shared = found.mode() & WRITABLE_BY_OTHERS != 0;
        if found.uid() != 0 || is_shared && (above == bundle || found.mode() & STICKY == 0) {
            return Err(BundleError::NotRoots(above.to_owned()));
        }
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(&bundle, flags | OFlags::DIRECTORY, Mode::empty())
        .map_err(|errno| failed("open", &bundle)(errno.into()))?;
    let path = bundle.join(CONFIG);
    // One that is no file is not waited for.
    let file = openat(&directory, CONFIG, flags | OFlags::NONBLOCK, Mode::empty())
        .map_err(|errno| failed("open", &path)(errno.into()))?;
    let file = File::from(file);
    let found = file.metadata().map_err(failed("look at", &path))?;
    if !found.is_file() || found.len() > CONFIG_MAX {
        return Err(BundleError::NoFile(path));
    }
    if found.uid() != 0 || found.mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(BundleError::NotRoots(path));
    }
    let mut text = Vec::new();
    file.take(CONFIG_MAX).read_to_end(&mut text).map_err(failed("read", &path))?;
    let with_hook =
        with_hook(&text, hook).map_err(|source| BundleError::Invalid { path: path.clone(), source })?;
    let Some(with_hook) = with_hook else { return Ok(()) };

    let name = format!("{CONFIG}.shaper-{}", std::process::id());
    let written = write_beside(&directory, &name, found.mode() & 0o777, &with_hook).inspect_err(|_| {
        // What was not made is not there; what is left is a file that nobody reads.
        let _ = unlinkat(&directory, &name, AtFlags::empty());
    });
    written.map_err(failed("write", &path))
}

/// Writes a new file, which then takes the place of the configuration.
fn write_beside(directory: &std::os::fd::OwnedFd, name: &str, mode: u32, text: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(directory, name, flags, Mode::from_raw_mode(mode))?);
    file.write_all(text)?;
    renameat(directory, name, directory, CONFIG)?;
    Ok(())
}

/// A configuration with the hook; `None`: it has it already.
fn with_hook(text: &[u8], hook: &Hook) -> Result<Option<Vec<u8>>, serde_json::Error> {
    let mut config: Parts = serde_json::from_slice(text)?;
    let mut hooks: Parts = match config.get("hooks") {
        Some(hooks) => serde_json::from_str::<Option<Parts>>(hooks.get())?.unwrap_or_default(),
        None => Parts::new(),
    };
    let own = serde_json::value::to_raw_value(hook)?;
    let mut list = vec![own];
    if let Some(before) = hooks.get("createRuntime") {
        let before: Vec<Box<RawValue>> = serde_json::from_str::<Option<_>>(before.get())?.unwrap_or_default();
        let is_own =
            |other: &RawValue| serde_json::from_str::<Hook>(other.get()).is_ok_and(|other| other == *hook);
        if before.first().is_some_and(|first| is_own(first)) {
            return Ok(None);
        }
        list.extend(before.into_iter().filter(|other| !is_own(other)));
    }
    hooks.insert("createRuntime".to_owned(), serde_json::value::to_raw_value(&list)?);
    config.insert("hooks".to_owned(), serde_json::value::to_raw_value(&hooks)?);
    serde_json::to_vec(&config).map(Some)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use serde_json::{Value, json};

    use super::*;

    fn hook() -> Hook {
        Hook {
            path: "/usr/lib/shaper/shaper-runtime".into(),
            args: vec!["shaper-runtime".into(), "admit".into()],
            timeout: 4,
        }
    }

    fn added(config: &str) -> Option<Value> {
        let text = with_hook(config.as_bytes(), &hook()).unwrap()?;
        Some(serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn the_hook_comes_first_and_all_else_stays() {
        let config =
            added(r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":9223372036854771712}}}}"#)
                .unwrap();
        assert_eq!(config["hooks"]["createRuntime"], json!([hook()]));
        assert_eq!(config["linux"]["resources"]["memory"]["limit"], json!(9_223_372_036_854_771_712_i64));
        let config = added(
            r#"{"hooks":{"prestart":[{"path":"/p"}],"createRuntime":[{"path":"/a"},{"path":"/b","env":["X=1"]}]}}"#,
        );
        let config = config.unwrap();
        assert_eq!(
            config["hooks"]["createRuntime"],
            json!([hook(), {"path": "/a"}, {"path": "/b", "env": ["X=1"]}])
        );
        assert_eq!(config["hooks"]["prestart"], json!([{"path": "/p"}]));
        for empty in [r#"{"hooks":null}"#, r#"{"hooks":{"createRuntime":null}}"#] {
            assert_eq!(added(empty).unwrap()["hooks"]["createRuntime"], json!([hook()]));
        }
        // Numbers that no float holds are not read at all.
        let text = with_hook(br#"{"x":123456789012345678901234567890.10}"#, &hook()).unwrap().unwrap();
        assert!(String::from_utf8(text).unwrap().contains("123456789012345678901234567890.10"));
    }

    #[test]
    fn the_hook_is_there_once() {
        let once = added("{}").unwrap().to_string();
        assert_eq!(added(&once), None);
        let second = json!({"hooks": {"createRuntime": [{"path": "/a"}, hook()]}}).to_string();
        assert_eq!(added(&second).unwrap()["hooks"]["createRuntime"], json!([hook(), {"path": "/a"}]));
    }

    #[test]
    fn what_is_no_configuration_is_told() {
        for text in ["", "[]", "{", r#"{"hooks":[]}"#, r#"{"hooks":{"createRuntime":{}}}"#] {
            assert!(with_hook(text.as_bytes(), &hook()).is_err(), "{text}");
        }
    }

    /// A bundle of root's.
    fn bundle() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(CONFIG), r#"{"process":{}}"#).unwrap();
        directory
    }

    #[test]
    fn a_bundle_is_changed_in_one_step() {
        let directory = bundle();
        let path = directory.path().join(CONFIG);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        prepare(directory.path(), &hook()).unwrap();
        prepare(directory.path(), &hook()).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(config, json!({"process": {}, "hooks": {"createRuntime": [hook()]}}));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_others_may_swap_is_not_touched() {
        const NOBODY: u32 = 65_534;
        let directory = bundle();
        let path = directory.path().join(CONFIG);
        let refused = || prepare(directory.path(), &hook()).unwrap_err();

        let elsewhere = directory.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(matches!(refused(), BundleError::Io { verb: "open", .. }));
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(matches!(refused(), BundleError::NoFile(_)));
        fs::remove_file(&path).unwrap();
        assert!(matches!(refused(), BundleError::Io { verb: "open", .. }));
        fs::rename(&elsewhere, &path).unwrap();

        chown(&path, Some(NOBODY), None).unwrap();
        assert!(matches!(refused(), BundleError::NotRoots(at) if at.ends_with(CONFIG)));
        chown(&path, Some(0), None).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        assert!(matches!(refused(), BundleError::NotRoots(at) if at.ends_with(CONFIG)));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();

        // Sticky or not: whoever may write in the bundle itself puts files there.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(matches!(refused(), BundleError::NotRoots(_)));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let inner = directory.path().join("above/bundle");
        fs::create_dir_all(&inner).unwrap();
        fs::copy(&path, inner.join(CONFIG)).unwrap();
        prepare(&inner, &hook()).unwrap();
        chown(directory.path().join("above"), Some(NOBODY), None).unwrap();
        assert!(matches!(prepare(&inner, &hook()), Err(BundleError::NotRoots(at)) if at.ends_with("above")));
        // As the caller says it, and where it is.
        symlink(&inner, directory.path().join("link")).unwrap();
        assert!(matches!(prepare(&directory.path().join("link"), &hook()), Err(BundleError::NotRoots(_))));
    }
}
