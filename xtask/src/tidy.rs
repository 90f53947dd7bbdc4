//! `cargo xtask tidy`: invariants of the source tree that no compiler checks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{corner_cases, workspace};

/// A file past this is two ideas.
const MAX_LINES: usize = 800;

/// What is not left in code: unfinished work, and tests that nobody runs. (Split, so as not to find themselves.)
const LEFTOVERS: [&str; 3] = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];

/// Which crates one of ours may depend on. Dependencies of tests are free.
struct Arrows {
    package: &'static str,
    /// Of our own.
    ours: &'static [&'static str],
    others: Others,
}

enum Others {
    None,
    AllBut(&'static [&'static str]),
}

const ANY: Others = Others::AllBut(&[]);

/// Whoever writes to the kernel knows of these; nobody else does.
const KERNEL: Others = Others::AllBut(&["aya", "aya-log", "cgroups-rs"]);

const ARROWS: &[Arrows] = &[
    Arrows { package: "shaper-common", ours: &[], others: Others::None },
    Arrows { package: "shaper-core", ours: &[], others: KERNEL },
    Arrows { package: "shaper-fake-nvml", ours: &[], others: KERNEL },
    Arrows { package: "shaper-nsenter", ours: &[], others: KERNEL },
    Arrows { package: "shaper-runtime", ours: &["shaper-core", "shaper-proto"], others: KERNEL },
    Arrows { package: "shaper-proto", ours: &["shaper-core"], others: KERNEL },
    Arrows { package: "shaper-identity", ours: &["shaper-core", "shaper-proto"], others: KERNEL },
    Arrows {
        package: "shaper-metrics",
        ours: &["shaper-core", "shaper-identity", "shaper-proto"],
        others: KERNEL,
    },
    Arrows { package: "shaper-ebpf", ours: &["shaper-common"], others: ANY },
    Arrows {
        package: "shaper-agent",
        ours: &["shaper-core", "shaper-common", "shaper-identity", "shaper-metrics", "shaper-proto"],
        others: ANY,
    },
    Arrows {
        package: "shaper-broker",
        ours: &["shaper-core", "shaper-identity", "shaper-metrics", "shaper-proto"],
        others: KERNEL,
    },
    Arrows {
        package: "shaper-cli",
        ours: &["shaper-core", "shaper-identity", "shaper-proto"],
        others: KERNEL,
    },
    Arrows {
        package: "shaper-tests",
        ours: &[
            "shaper-agent",
            "shaper-broker",
            "shaper-cli",
            "shaper-common",
            "shaper-core",
            "shaper-fake-nvml",
            "shaper-identity",
            "shaper-metrics",
            "shaper-proto",
        ],
        others: ANY,
    },
    Arrows {
        package: "shaper-fuzz",
        ours: &["shaper-agent", "shaper-broker", "shaper-core", "shaper-identity", "shaper-proto"],
        others: KERNEL,
    },
    Arrows { package: "xtask", ours: &[], others: KERNEL },
];

pub(crate) fn run() -> Result<ExitCode> {
    let mut problems = Vec::new();
    for file in rust_files(workspace::root())? {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(workspace::root()).unwrap_or(&file).display().to_string();
        problems.extend(problems_of_source(&text).into_iter().map(|problem| format!("{name}{problem}")));
    }
    for manifest in ["Cargo.toml", "shaper-ebpf/Cargo.toml", "fuzz/Cargo.toml"] {
        let metadata: Metadata = workspace::metadata(&workspace::root().join(manifest))?;
        problems.extend(metadata.packages.iter().flat_map(problems_of_arrows));
    }
    problems.extend(corner_cases::problems(workspace::root())?);
    problems.extend(unlisted_decisions(&workspace::root().join("docs/decisions"))?);

    for problem in &problems {
        println!("{problem}");
    }
    println!("tidy: {} problems", problems.len());
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Every .rs file below `folder` that a build does not make. Walked, not asked of git, so that it works in a tarball.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                files.extend(rust_files(&path)?);
            }
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// The entries of `folder`, in order.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut entries = read().with_context(|| format!("cannot list {}", folder.display()))?;
    entries.sort();
    Ok(entries)
}

/// What is wrong with one file, each to be read behind its name.
fn problems_of_source(text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        problems.push(format!(": {lines} lines; past {MAX_LINES}, split it by subject"));
    }
    for (number, line) in (1..).zip(text.lines()) {
        for leftover in LEFTOVERS.into_iter().filter(|leftover| line.contains(leftover)) {
            problems.push(format!(":{number}: `{leftover}` is unfinished work"));
        }
    }
    problems
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// None for a normal dependency.
    kind: Option<String>,
    /// The folder of a dependency of our own.
    path: Option<PathBuf>,
}

fn problems_of_arrows(package: &Package) -> Vec<String> {
    let name = &package.name;
    let Some(arrows) = ARROWS.iter().find(|arrows| arrows.package == name) else {
        return vec![format!("{name}: say in xtask/src/tidy.rs what it may depend on")];
    };
    let problem = |dependency: &Dependency| {
        let on = dependency.name.as_str();
        let allowed = match (&dependency.path, &arrows.others) {
            (Some(_), _) => arrows.ours.contains(&on),
            (None, Others::None) => false,
            (None, Others::AllBut(never)) => !never.contains(&on),
        };
        (!allowed).then(|| format!("{name} must not depend on {on}"))
    };
    package.dependencies.iter().filter(|on| on.kind.as_deref() != Some("dev")).filter_map(problem).collect()
}

/// The decisions that their README does not list.
fn unlisted_decisions(folder: &Path) -> Result<Vec<String>> {
    let readme = folder.join("README.md");
    if !readme.exists() {
        return Ok(Vec::new());
    }
    let list = fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let unlisted = |path: PathBuf| {
        let name = path.file_name()?.to_str()?;
        (name.ends_with(".md") && name != "README.md" && !list.contains(name))
            .then(|| format!("{} does not list {name}", readme.display()))
    };
    Ok(entries(folder)?.into_iter().filter_map(unlisted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(json: &str) -> Package {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn leftovers_and_long_files_are_found() {
        assert_eq!(problems_of_source("fn f() {}\n"), Vec::<String>::new());
        for leftover in LEFTOVERS {
            let found = problems_of_source(&format!("fn f() {{\n    {leftover}\n}}\n"));
            assert_eq!(found, [format!(":2: `{leftover}` is unfinished work")]);
        }
        assert_eq!(problems_of_source(&"\n".repeat(MAX_LINES)).len(), 0);
        assert_eq!(problems_of_source(&"\n".repeat(MAX_LINES + 1)).len(), 1);
    }

    #[test]
    fn arrows_that_point_the_wrong_way_are_found() {
        let cli = package(
            r#"{"name": "shaper-cli", "dependencies": [
                {"name": "shaper-core", "kind": null, "path": "/r/shaper-core"},
                {"name": "shaper-agent", "kind": null, "path": "/r/shaper-agent"},
                {"name": "aya", "kind": "build", "path": null},
                {"name": "cgroups-rs", "kind": "dev", "path": null}]}"#,
        );
        let expected = ["shaper-cli must not depend on shaper-agent", "shaper-cli must not depend on aya"];
        assert_eq!(problems_of_arrows(&cli), expected);

        let common = package(
            r#"{"name": "shaper-common", "dependencies": [
                {"name": "libc", "kind": null, "path": null}, {"name": "proptest", "kind": "dev", "path": null}]}"#,
        );
        assert_eq!(problems_of_arrows(&common), ["shaper-common must not depend on libc"]);
        assert_eq!(problems_of_arrows(&package(r#"{"name": "new", "dependencies": []}"#)).len(), 1);
    }

    #[test]
    fn decisions_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("0001-one.md"), "").unwrap();
        fs::write(folder.path().join("0002-two.md"), "").unwrap();
        assert_eq!(unlisted_decisions(folder.path()).unwrap(), Vec::<String>::new());
        fs::write(folder.path().join("README.md"), "- [one](0001-one.md)\n").unwrap();
        let unlisted = unlisted_decisions(folder.path()).unwrap();
        assert_eq!(unlisted.len(), 1);
        assert!(unlisted[0].ends_with("does not list 0002-two.md"));
    }
}
