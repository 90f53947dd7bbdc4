//! Every command of the README and of the pages in `docs/` is executed here, in order, as it is there.
//!
//! What a command is says its fence ([`markdown`]). One that is new is executed like all others; where it needs something that
//! the page does not bring, or does not end by itself, [`directions`] say so, and where it cannot be executed here, what
//! executes it instead ([`elsewhere`]). Nothing is left out silently: a command that nobody has prepared for fails.
//!
//! What takes more than seconds, or more than every machine has, is executed in stages of `./x test --all`, by tests of the same
//! names below [`stages`].

mod directions;
mod elsewhere;
mod form;
mod machine;
mod markdown;
mod page;
mod prose;
mod repository;

use std::{collections::BTreeSet, fs};

use page::{Stage, commands, execute, root};

/// A test for each page that has commands, and for each stage.
macro_rules! pages {
    ($($name:ident: $page:literal,)+) => {
        /// All of them.
        const PAGES: &[&str] = &[$($page),+];
        $(
            #[test]
            fn $name() {
                execute($page, directions::$name(), None);
            }
        )+
        mod stages {
            in_stage!(benches, Benches, $($name: $page,)+);
            in_stage!(commands, Commands, $($name: $page,)+);
            in_stage!(frameworks, Frameworks, $($name: $page,)+);
            in_stage!(soaks, Soaks, $($name: $page,)+);
        }
    };
}

/// What of each page belongs to one stage.
macro_rules! in_stage {
    ($module:ident, $stage:ident, $($name:ident: $page:literal,)+) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    crate::execute($page, crate::directions::$name(), Some(crate::Stage::$stage));
                }
            )+
        }
    };
}

pages! {
    readme: "README.md",
    containers: "docs/containers.md",
    frameworks: "docs/frameworks.md",
    kubernetes: "docs/kubernetes.md",
    operating: "docs/operating.md",
    policies: "docs/policies.md",
    scaling: "docs/scaling.md",
    tutorial_one_node: "docs/tutorial-one-node.md",
    tutorial_three_nodes: "docs/tutorial-three-nodes.md",
}

/// The README, and what is in `docs/`; decisions are not for users.
fn all_pages() -> BTreeSet<String> {
    let entries = fs::read_dir(root().join("docs")).expect("it is there").flatten();
    let names = entries.map(|entry| format!("docs/{}", entry.file_name().to_string_lossy()));
    names.filter(|name| name.ends_with(".md")).chain(["README.md".to_owned()]).collect()
}

#[test]
fn every_page_with_commands_has_a_test() {
    let mut with_commands = all_pages();
    // What `--help` says, examples included, is a page that shaper-cli's own test writes.
    with_commands.retain(|page| page != "docs/cli.md" && !commands(page).1.is_empty());
    assert_eq!(with_commands, PAGES.iter().map(|&page| page.to_owned()).collect());
}
