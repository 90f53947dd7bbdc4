//! GPU cards that NVIDIA's library would show: `tests/fake-nvml`, and the file that it reads.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// Cards, as long as this lives.
pub struct FakeCards {
    directory: TempDir,
}

/// Memory of each of [`FakeCards::line`]'s.
pub const MEMORY: u64 = 80 << 30;

impl FakeCards {
    /// What the library says, line by line.
    pub fn new(lines: &[&str]) -> FakeCards {
        let directory = tempfile::Builder::new().prefix("shaper-cards-").tempdir();
        let cards = FakeCards { directory: directory.expect("a temporary directory can be made") };
        cards.say(lines);
        cards
    }

    /// So many whole cards, `GPU-0` and so on, of one model.
    pub fn line(count: u32) -> Vec<String> {
        let card = |number| {
            format!(
                "card uuid=GPU-{number} name=Fake_H100 memory={MEMORY} minor={number} busy=40 temperature=51"
            )
        };
        (0..count).map(card).collect()
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// What it says from now on.
    pub fn say(&self, lines: &[&str]) {
        // Whole: the library reads it at any time.
        let fresh = self.directory.path().join("fresh");
        fs::write(&fresh, lines.join("\n"))
            .and_then(|()| fs::rename(&fresh, self.path()))
            .expect("it is ours");
    }

    /// Where the library finds it.
    pub fn variable(&self) -> (String, String) {
        ("SHAPER_FAKE_NVML".into(), self.path().display().to_string())
    }

    /// The directory that it is in.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// What a process says that opens a path from within a cgroup; nothing: it could.
pub fn open_in(group: &Path, path: &str) -> String {
    let script = "echo $$ > \"$0\"/cgroup.procs && : < \"$1\"";
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .arg(group)
        .arg(path)
        .output()
        .expect("a shell can be started");
    String::from_utf8_lossy(&output.stderr).into_owned()
}
