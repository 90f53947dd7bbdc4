//! Debian's packages by apt: from this machine's own sources, or from one suite beside them.
//!
//! A suite that is not this machine's has a sources list, package lists and a cache of its own below `target`, so that
//! nothing of it can be installed here by accident. apt checks its signature as it does any other.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, setup, workspace};

/// What the package debian-archive-keyring brings, for sources that name no key themselves.
const ARCHIVE_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A set of sources.
pub(crate) struct Apt {
    /// apt's own options, which come before a command's arguments.
    options: Vec<String>,
}

impl Apt {
    /// The sources of this machine.
    pub(crate) fn of_machine() -> Self {
        Self { options: Vec::new() }
    }

    /// `suite` alone, from the mirror of this machine's Debian, its lists just refreshed.
    pub(crate) fn of_suite(suite: &str) -> Result<Self> {
        let mirror = Mirror::of_machine()?;
        let folder = workspace::target().join("vm/apt").join(suite);
        for needed in ["lists/partial", "cache/archives/partial"] {
            let needed = folder.join(needed);
            fs::create_dir_all(&needed).with_context(|| format!("cannot create {}", needed.display()))?;
        }
        let list = folder.join("sources.list");
        fs::write(&list, mirror.source(suite)).with_context(|| format!("cannot write {}", list.display()))?;
        let folder = folder.display();
        let settings = [
            format!("Dir::Etc::SourceList={}", list.display()),
            "Dir::Etc::SourceParts=-".into(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Default-Release=".into(), // the machine's, which is not in this list
            "APT::Update::Error-Mode=any".into(), // else a list that cannot be had is a remark
        ];
        let apt = Self { options: settings.into_iter().flat_map(|setting| ["-o".into(), setting]).collect() };
        eprintln!("reading what {suite} of {} has; this machine's own sources stay as they are", mirror.uri);
        process::run(apt.command("apt-get").args(["update", "-q"])).with_context(|| {
            format!(
                "cannot read {suite} from {} (where its key is not known here, as root: apt-get install \
                 debian-archive-keyring)",
                mirror.uri
            )
        })?;
        Ok(apt)
    }

    /// What `apt-cache search` prints about packages whose names match `pattern`.
    pub(crate) fn search(&self, pattern: &str) -> Result<String> {
        process::read(self.command("apt-cache").args(["search", "--names-only", pattern]))
    }

    /// What `apt-cache depends` prints about `package`.
    pub(crate) fn depends(&self, package: &str) -> Result<String> {
        process::read(self.command("apt-cache").args(["depends", package]))
    }

    /// Those of `packages`, and of what they depend on, that are not installed here.
    pub(crate) fn needed(&self, packages: &[&str]) -> Result<Vec<String>> {
        let simulate = || {
            let mut command = self.command("apt-get");
            process::read(command.args(["install", "--simulate", "--no-install-recommends"]).args(packages))
        };
        let said = simulate().or_else(|error| match setup::apt_update()? {
            true => simulate(),
            false => Err(error),
        })?;
        Ok(new_ones(&said))
    }

    /// Downloads `packages` into `folder`.
    pub(crate) fn download(&self, packages: &[String], folder: &Path) -> Result<()> {
        process::run(self.command("apt-get").args(["download", "-q"]).args(packages).current_dir(folder))
    }

    /// Downloads `packages` and unpacks them below `folder`, without installing anything: nothing of them is started, and the
    /// system stays as it is.
    pub(crate) fn unpack(&self, packages: &[&str], folder: &Path) -> Result<()> {
        let packages: Vec<_> = packages.iter().map(|&package| package.to_owned()).collect();
        if let Err(error) = self.download(&packages, folder) {
            // Lists that are older than the archive name packages that are not there any more.
            if !setup::apt_update()? {
                return Err(error);
            }
            self.download(&packages, folder)?;
        }
        for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let deb = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
            if deb.extension().is_some_and(|extension| extension == "deb") {
                process::run(Command::new("dpkg").arg("-x").arg(&deb).arg(folder))?;
                fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))?;
            }
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if setup::is_root() {
            command.args(["-o", "APT::Sandbox::User=root"]); // apt's own user cannot write to our folders
        }
        command.args(&self.options);
        command
    }
}

/// Of what `apt-get install --simulate` prints, the packages that are not there in any version.
fn new_ones(simulated: &str) -> Vec<String> {
    let installs = simulated.lines().filter_map(|line| line.strip_prefix("Inst ")?.split_once(' '));
    installs.filter(|(_, what)| what.starts_with('(')).map(|(name, _)| name.to_owned()).collect()
}

/// Where this machine has its Debian from.
struct Mirror {
    uri: String,
    /// What the sources name as its key.
    signed_by: Option<String>,
}

impl Mirror {
    fn of_machine() -> Result<Self> {
        const FORMAT: &str = "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(SOURCESENTRY)";
        let targets = process::read(Command::new("apt-get").args([
            "indextargets",
            "--format",
            FORMAT,
            "Created-By: Packages",
        ]))?;
        let Some((uri, file)) = archive(&targets) else {
            bail!("no source of this machine's apt is Debian's archive (if one is, as root: apt-get update)");
        };
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
        let in_use = || Path::new(ARCHIVE_KEYRING).exists().then(|| ARCHIVE_KEYRING.to_owned());
        Ok(Self { uri: uri.to_owned(), signed_by: signed_by(&text, uri).or_else(in_use) })
    }

    /// Another of its suites, as a line of a sources list.
    fn source(&self, suite: &str) -> String {
        let key = self.signed_by.as_ref().map_or(String::new(), |key| format!("[signed-by={key}] "));
        format!("deb {key}{} {suite} main\n", self.uri)
    }
}

/// The URI of Debian's archive, which has all suites but those of security, and the file that names it.
fn archive(targets: &str) -> Option<(&str, &str)> {
    targets.lines().find_map(|line| {
        let ["Debian", "Debian", uri, entry] = line.split('|').collect::<Vec<_>>()[..] else { return None };
        Some((uri, entry.rsplit_once(':')?.0))
    })
}

/// The keyrings that a sources file, of either format, names for `uri`. Key ids and keys in place count for the suites
/// that they stand beside: others have keys of their own.
fn signed_by(sources: &str, uri: &str) -> Option<String> {
    let live = sources.lines().filter(|line| !line.trim_start().starts_with('#'));
    // An entry is a line of one format, and a paragraph of the other.
    let entries = live.fold(vec![String::new()], |mut entries, line| {
        let one_line = line.starts_with("deb");
        if one_line || line.trim().is_empty() {
            entries.push(String::new());
        }
        if let Some(entry) = entries.last_mut() {
            *entry += line;
            *entry += "\n";
        }
        entries
    });
    let same = |word: &str| word.trim_end_matches('/') == uri.trim_end_matches('/');
    let entry = entries.iter().find(|entry| entry.split_whitespace().any(same))?;
    let entry = entry.replace(['[', ']'], " ").replace("signed-by=", "Signed-By: ");
    let mut words = entry.split_whitespace().skip_while(|word| !word.eq_ignore_ascii_case("signed-by:"));
    words.nth(1).filter(|key| key.starts_with('/')).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const URI: &str = "http://deb.debian.org/debian/";

    #[test]
    fn the_archive_is_told_from_security_and_from_others() {
        let targets = "\
Debian|Debian-Security|http://deb.debian.org/debian-security/|/etc/apt/sources.list:3
Node Source|Node Source|https://deb.nodesource.com/node_20.x/|/etc/apt/sources.list.d/n.list:1
Debian|Debian|http://deb.debian.org/debian/|/etc/apt/sources.list:1
";
        assert_eq!(archive(targets), Some((URI, "/etc/apt/sources.list")));
        assert_eq!(
            archive("Ubuntu|Ubuntu|http://archive.ubuntu.com/ubuntu/|/etc/apt/sources.list:1\n"),
            None
        );
        // As apt prints what it has no list of.
        assert_eq!(
            archive("$(ORIGIN)|$(LABEL)|http://deb.debian.org/debian/|/etc/apt/sources.list:1\n"),
            None
        );
    }

    #[test]
    fn what_is_upgraded_is_there_already() {
        let simulated = "\
Reading package lists...
Inst login [1:4.13-1] (1:4.13-2 Debian:12.15/oldstable [amd64])
Inst libsubid4 (1:4.13-2 Debian:12.15/oldstable [amd64])
Conf libsubid4 (1:4.13-2 Debian:12.15/oldstable [amd64])
";
        assert_eq!(new_ones(simulated), ["libsubid4"]);
    }

    #[test]
    fn keyrings_are_read_from_both_formats_of_sources() {
        let paragraphs = "\
Types: deb
URIs: http://deb.debian.org/debian-security
Signed-By: /keys/security.gpg

Types: deb
# URIs: http://snapshot.debian.org/archive
URIs: http://deb.debian.org/debian
Suites: bookworm
Signed-By: /keys/Debian.gpg
";
        assert_eq!(signed_by(paragraphs, URI).as_deref(), Some("/keys/Debian.gpg"));
        let lines = "\
#deb [signed-by=/keys/old.gpg] http://deb.debian.org/debian bullseye main
deb http://deb.debian.org/debian-security bookworm-security main
deb [arch=amd64 signed-by=/keys/Debian.gpg] http://deb.debian.org/debian bookworm main
";
        assert_eq!(signed_by(lines, URI).as_deref(), Some("/keys/Debian.gpg"));
        assert_eq!(signed_by(lines, "http://deb.debian.org/debian-security/"), None);
        assert_eq!(signed_by("deb [signed-by=ABCD1234] http://deb.debian.org/debian x main", URI), None);
    }

    #[test]
    fn another_suite_has_the_same_key() {
        let mut mirror = Mirror { uri: URI.into(), signed_by: Some("/keys/debian.gpg".into()) };
        let line = "deb [signed-by=/keys/debian.gpg] http://deb.debian.org/debian/ trixie-backports main\n";
        assert_eq!(mirror.source("trixie-backports"), line);
        mirror.signed_by = None;
        assert_eq!(mirror.source("trixie"), "deb http://deb.debian.org/debian/ trixie main\n");
    }
}
