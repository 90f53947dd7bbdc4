//! `/etc/shaper/runtime.yaml`: which runtime does the work, whom to ask, and what happens where nobody answers.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use shaper_core::document::{self, DocumentError, RuntimeSettings};

/// Where it is, unless another is named: `--shaper-config FILE`, before all options of the runtime (Docker: `runtimeArgs`).
pub(crate) const FILE: &str = "/etc/shaper/runtime.yaml";
const OPTION: &[u8] = b"--shaper-config";
/// Where runtimes are, unless the file names one.
const RUNTIMES: [&str; 6] = [
    "/usr/bin/runc",
    "/usr/sbin/runc",
    "/usr/local/sbin/runc",
    "/usr/local/bin/runc",
    "/usr/bin/crun",
    "/usr/local/bin/crun",
];
const WRITABLE_BY_OTHERS: u32 = 0o022;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not root's alone: chown root:root and chmod go-w it", .0.display())]
    NotRoots(PathBuf),
    #[error("{0}")]
    Document(Box<DocumentError>),
    #[error(
        "there is no runc and no crun: install one, or say where it is, in {FILE}: `runtime: /path/of/runc`"
    )]
    NoRuntime,
    #[error("the runtime is shaper-runtime itself: say in {FILE} which does the work")]
    Itself,
}

/// What was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// The file, if another than [`FILE`].
    pub(crate) file: Option<PathBuf>,
    pub(crate) settings: RuntimeSettings,
    /// The runtime that does the work.
    pub(crate) runtime: PathBuf,
}

/// The file that the arguments name, which are the other runtime's then.
pub(crate) fn take_file(arguments: &mut Vec<OsString>) -> Option<PathBuf> {
    let first = arguments.first()?.as_bytes().to_owned();
    if first == OPTION && arguments.len() > 1 {
        let file = arguments.remove(1);
        arguments.remove(0);
        return Some(file.into());
    }
    let value = first.strip_prefix(OPTION)?.strip_prefix(b"=")?;
    arguments.remove(0);
    Some(OsString::from_vec(value.to_owned()).into())
}

impl Chosen {
    pub(crate) fn load(file: Option<PathBuf>) -> Result<Chosen, SettingsError> {
        let settings = match (&file, read(file.as_deref().unwrap_or(Path::new(FILE)))) {
            (None, Err(SettingsError::Read { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
                RuntimeSettings::default()
            }
            (_, read) => read?,
        };
        let runtime = match &settings.runtime {
            Some(path) => path.clone(),
            None => RUNTIMES
                .map(PathBuf::from)
                .into_iter()
                .find(|path| path.is_file())
                .ok_or(SettingsError::NoRuntime)?,
        };
        // It would start itself for ever.
        let id = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
        if id(&runtime).is_some() && id(&runtime) == id(Path::new("/proc/self/exe")) {
            return Err(SettingsError::Itself);
        }
        Ok(Chosen { file, settings, runtime })
    }
}

fn read(path: &Path) -> Result<RuntimeSettings, SettingsError> {
    let failed = |source| SettingsError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    // Root runs what it names.
    if rustix::process::geteuid().is_root() && (found.uid() != 0 || found.mode() & WRITABLE_BY_OTHERS != 0) {
        return Err(SettingsError::NotRoots(path.to_owned()));
    }
    let most = u64::try_from(document::MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    let mut text = Vec::new();
    file.take(most).read_to_end(&mut text).map_err(failed)?;
    document::runtime_settings(&path.display().to_string(), text)
        .map_err(|error| SettingsError::Document(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use shaper_core::document::Failing;

    use super::*;

    #[test]
    fn its_own_option_is_not_handed_on() {
        let take = |line: &str| {
            let mut words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let file = take_file(&mut words);
            (file, words.len())
        };
        assert_eq!(take("--shaper-config /f create c"), (Some("/f".into()), 2));
        assert_eq!(take("--shaper-config=/f create c"), (Some("/f".into()), 2));
        assert_eq!(take("--root /f create --shaper-config=/f"), (None, 4));
        assert_eq!(take("--shaper-configs=/f"), (None, 1));
    }

    #[test]
    fn a_file_that_others_may_write_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.yaml");
        fs::write(&path, "runtime: /bin/true\nfail: closed\n").unwrap();
        let chosen = Chosen::load(Some(path.clone())).unwrap();
        assert_eq!(
            (chosen.runtime.as_path(), chosen.settings.fail),
            (Path::new("/bin/true"), Failing::Closed)
        );
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
            assert!(matches!(Chosen::load(Some(path.clone())), Err(SettingsError::NotRoots(_))));
        }
        assert!(matches!(Chosen::load(Some("/none".into())), Err(SettingsError::Read { .. })));
        let own = std::env::current_exe().unwrap().display().to_string();
        fs::write(&path, format!("runtime: {own}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Chosen::load(Some(path)), Err(SettingsError::Itself)));
    }
}
