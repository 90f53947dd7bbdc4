//! The code blocks of a page, and the commands in them.
//!
//! What a block is says its fence:
//!
//! - `sh`: commands, one a line, or several lines where one ends in `\`, opens a here-document, or begins a loop or a function.
//! - `console`: what a terminal shows. Commands begin with `$ ` and go on with `> `; the lines up to the next one are what
//!   the command prints, by the rules of [`crate::form`].
//! - `text`, `json`, `yaml` and `python`: no commands. A line of `text` that begins with a program of ours is a mistake.
//!
//! There are no other fences, and no blocks that are merely indented: one would have to guess what they are.

use std::mem;

/// A code block.
#[derive(Debug, PartialEq)]
pub(crate) struct Block {
    /// Of its fence.
    pub(crate) language: String,
    /// Of its fence, from 1.
    pub(crate) line: usize,
    /// What is between the fences.
    pub(crate) text: String,
}

/// A command.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Command {
    /// Where it begins, from 1.
    pub(crate) line: usize,
    /// Without the remark behind it.
    pub(crate) text: String,
    /// What it prints, if the page shows that.
    pub(crate) shown: Option<String>,
}

const NO_COMMANDS: [&str; 4] = ["text", "json", "yaml", "python"];

/// What a command of ours begins with.
pub(crate) const OURS: [&str; 6] = ["shaper ", "shaper-", "cargo xtask", "./x ", "systemctl ", "sudo "];

/// The blocks of a page, or what is wrong with one.
pub(crate) fn blocks(page: &str) -> Result<Vec<Block>, String> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    // Below a list's item what is indented is its text.
    let mut in_list = false;
    for (number, line) in (1..).zip(page.lines()) {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (Some(_), Some("")) => blocks.extend(open.take()),
            (Some(block), _) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, Some(language)) => {
                open = Some(Block { language: language.trim().into(), line: number, text: String::new() });
            }
            (None, None) if line.starts_with("    ") && !in_list => {
                return Err(format!(
                    "line {number} is indented: fence it, as sh, console, text, json or yaml"
                ));
            }
            (None, None) if !line.starts_with(' ') && !line.is_empty() => {
                in_list = line.starts_with("- ") || line.starts_with(|first: char| first.is_ascii_digit());
            }
            (None, None) => {}
        }
    }
    match open {
        Some(block) => Err(format!("the block of line {} has no end", block.line)),
        None => Ok(blocks),
    }
}

/// The commands of a block, in order.
pub(crate) fn commands(block: &Block) -> Result<Vec<Command>, String> {
    match block.language.as_str() {
        "sh" => Ok(of_script(block)),
        "console" => of_terminal(block),
        other if NO_COMMANDS.contains(&other) => {
            let is_command = |line: &&str| OURS.iter().any(|ours| line.trim_start().starts_with(ours));
            match block.text.lines().find(is_command).filter(|_| other == "text") {
                Some(line) => Err(format!("the block of line {} is text, and has `{line}`", block.line)),
                None => Ok(Vec::new()),
            }
        }
        other => Err(format!("the block of line {} is {other:?}, which is no language here", block.line)),
    }
}

fn of_script(block: &Block) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut whole = Whole::default();
    for (number, line) in (block.line + 1..).zip(block.text.lines()) {
        if let Some((line, text)) = whole.take(number, line) {
            commands.push(Command { line, text, shown: None });
        }
    }
    // Bash will say what is missing of one that does not end.
    commands.extend(whole.rest().map(|(line, text)| Command { line, text, shown: None }));
    commands
}

fn of_terminal(block: &Block) -> Result<Vec<Command>, String> {
    let mut commands: Vec<Command> = Vec::new();
    for (number, line) in (block.line + 1..).zip(block.text.lines()) {
        let last = commands.last_mut();
        match (line.strip_prefix("$ "), line.strip_prefix("> "), last) {
            (Some(first), _, _) => {
                commands.push(Command { line: number, text: first.to_owned(), shown: Some(String::new()) });
            }
            (None, Some(more), Some(command)) if command.shown.as_deref() == Some("") => {
                command.text = format!("{}\n{more}", command.text);
            }
            (None, _, Some(Command { shown: Some(shown), .. })) => {
                shown.push_str(line);
                shown.push('\n');
            }
            _ => return Err(format!("line {number} is printed before any command: `$ ` begins one")),
        }
    }
    for command in &mut commands {
        command.text = without_remarks(&command.text);
    }
    Ok(commands)
}

/// A command of several lines, as far as it has come.
#[derive(Default)]
struct Whole {
    line: usize,
    text: String,
    /// The line that ends its here-document.
    until: Option<String>,
    /// How many loops, functions and groups are open.
    depth: usize,
}

impl Whole {
    /// One more line: the command that it ends, and where that began.
    fn take(&mut self, number: usize, line: &str) -> Option<(usize, String)> {
        if self.text.is_empty() {
            if line.trim().is_empty() || line.starts_with('#') {
                return None;
            }
            self.line = number;
        } else {
            self.text.push('\n');
        }
        self.text.push_str(line);
        if let Some(until) = &self.until {
            if line != until {
                return None;
            }
            self.until = None;
        } else {
            let line = without_remark(line);
            self.until = line.split_once("<<").map(|(_, word)| {
                word.split_whitespace().next().unwrap_or_default().trim_matches(['\'', '"']).to_owned()
            });
            let words = || line.split([' ', ';']);
            self.depth += words().filter(|word| ["do", "{"].contains(word)).count();
            self.depth -= words().filter(|word| ["done", "}"].contains(word)).count().min(self.depth);
            if self.until.is_some() || self.depth > 0 || line.ends_with('\\') {
                return None;
            }
        }
        self.rest()
    }

    fn rest(&mut self) -> Option<(usize, String)> {
        let text = mem::take(&mut self.text);
        (!text.is_empty()).then(|| (self.line, without_remarks(&text)))
    }
}

/// A command without the remark behind it; a here-document is as it is.
fn without_remarks(command: &str) -> String {
    if command.contains("<<") {
        return command.to_owned();
    }
    command.lines().map(without_remark).collect::<Vec<_>>().join("\n")
}

fn without_remark(line: &str) -> &str {
    line.split_once(" # ").map_or(line, |(command, _)| command).trim_end()
}

/// What stands between backticks in the running text, with its line.
pub(crate) fn spans(page: &str) -> Vec<(usize, String)> {
    let mut spans = Vec::new();
    let mut in_block = false;
    for (number, line) in (1..).zip(page.lines()) {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            let between = line.split('`').skip(1).step_by(2);
            spans.extend(between.map(|span| (number, span.to_owned())));
        }
    }
    spans
}

#[test]
fn commands_are_found_with_what_they_print() {
    let page = "\
Text.

```sh
shaper-agent &          # as root
a \\
  b

cat > f <<'END'
x # y
END
for n in 1 2; do
  c $n
done
```

- an item

    of two paragraphs

```console
$ shaper get tasks      # what runs
ID
train-1
$ for a in b; do
>   c
> done
```
";
    let found: Vec<Command> =
        blocks(page).unwrap().iter().flat_map(|block| commands(block).unwrap()).collect();
    let expected = [
        (4, "shaper-agent &", None),
        (5, "a \\\n  b", None),
        (8, "cat > f <<'END'\nx # y\nEND", None),
        (11, "for n in 1 2; do\n  c $n\ndone", None),
        (21, "shaper get tasks", Some("ID\ntrain-1\n")),
        (24, "for a in b; do\n  c\ndone", Some("")),
    ];
    let expected = expected.map(|(line, text, shown)| Command {
        line,
        text: text.to_owned(),
        shown: shown.map(str::to_owned),
    });
    assert_eq!(found, expected);
}

#[test]
fn a_block_of_which_one_would_have_to_guess_what_it_is_is_refused() {
    assert!(blocks("Text:\n\n    shaper get tasks\n").unwrap_err().contains("line 3 is indented"));
    assert!(blocks("```sh\nshaper get tasks\n").unwrap_err().contains("has no end"));
    for (page, why) in [
        ("```\nx\n```\n", "no language here"),
        ("```bash\nx\n```\n", "no language here"),
        ("```text\nshaper get tasks\n```\n", "is text, and has `shaper get tasks`"),
        ("```console\nshaper get tasks\n```\n", "before any command"),
    ] {
        let refused = blocks(page).and_then(|blocks| commands(&blocks[0])).unwrap_err();
        assert!(refused.contains(why), "{page}: {refused}");
    }
}

#[test]
fn spans_are_those_of_the_running_text() {
    let page = "`a b` and\n`c`\n```sh\n`d`\n```\n";
    assert_eq!(spans(page), [(1, "a b".to_owned()), (2, "c".to_owned())]);
}
