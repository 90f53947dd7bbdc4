//! A terminal for tests: a pty, and what a person would see on it.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};

use crate::fake::PATIENCE;

/// A command on a terminal of its own.
pub(crate) struct Terminal {
    child: Child,
    /// Its side of people: keys go in, and what is drawn comes out.
    keys: File,
    /// Our end of what the command has as its terminal.
    line: OwnedFd,
    screen: Arc<(Mutex<Screen>, Condvar)>,
}

/// How a command left its terminal.
#[derive(Debug, PartialEq)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    /// What it printed outside of the alternate screen.
    pub(crate) said: String,
    /// Whether it ever used a colour.
    pub(crate) coloured: bool,
}

impl Ended {
    /// The exit code of one that said nothing.
    pub(crate) fn quietly(self) -> Option<i32> {
        assert_eq!(self.said, "");
        self.code
    }
}

impl Terminal {
    pub(crate) fn start(command: Command, columns: u16, rows: u16) -> Terminal {
        let terminal = Terminal::open(command, columns, rows);
        let (mut output, drawn) = (terminal.keys.try_clone().unwrap(), terminal.screen.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It fails once nobody has the other end open.
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                drawn.0.lock().unwrap().write(&buffer[..length]);
                drawn.1.notify_all();
            }
        });
        terminal
    }

    /// With nobody who reads what is drawn, but for its first bytes.
    pub(crate) fn start_unread(command: Command, columns: u16, rows: u16, read: usize) -> Terminal {
        let mut terminal = Terminal::open(command, columns, rows);
        terminal.keys.read_exact(&mut vec![0; read]).unwrap();
        terminal
    }

    fn open(mut command: Command, columns: u16, rows: u16) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let pty = openpt(flags).unwrap();
        grantpt(&pty).unwrap();
        unlockpt(&pty).unwrap();
        let line = ioctl_tiocgptpeer(&pty, flags).unwrap();
        resize(&line, columns, rows);
        let end = || line.try_clone().unwrap();
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Terminal { child, keys: pty.into(), line, screen: Arc::default() }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        resize(&self.line, columns, rows);
        // The kernel tells the session of the terminal, which the command is not in.
        self.signal(Signal::WINCH);
    }

    /// Waits until the screen is as it should be.
    pub(crate) fn await_screen(&self, what: &str, is_right: impl Fn(&str) -> bool) {
        let wrong = |screen: &mut Screen| !is_right(&screen.text());
        let (screen, timeout) =
            self.screen.1.wait_timeout_while(self.screen.0.lock().unwrap(), PATIENCE, wrong).unwrap();
        assert!(!timeout.timed_out(), "{what}: not on the screen:\n{}", screen.text());
    }

    pub(crate) fn await_text(&self, text: &str) {
        self.await_screen(text, |screen| screen.contains(text));
    }

    /// Waits for the end, and sees that the terminal is as it was.
    pub(crate) fn end(mut self) -> Ended {
        let code = self.end_unread();
        // Behind all that the command has written.
        File::from(self.line.try_clone().unwrap()).write_all(b"[end]").unwrap();
        self.await_text("[end]");
        let screen = self.screen.0.lock().unwrap();
        assert!(!screen.alternate && !screen.hidden_cursor);
        let said = screen.text().replace("[end]", "").trim().to_owned();
        Ended { code, said, coloured: screen.coloured }
    }

    /// The same where nobody reads what it has written.
    pub(crate) fn end_unread(&mut self) -> Option<i32> {
        let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        let ended =
            poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&PATIENCE.try_into().unwrap())).unwrap();
        assert_eq!(ended, 1, "it does not end");
        let code = self.child.wait().unwrap().code();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(tcgetattr(&self.line).unwrap().local_modes.contains(cooked));
        code
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // For a test that fails; otherwise it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(line: &OwnedFd, columns: u16, rows: u16) {
    tcsetwinsize(line, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

/// As much of a terminal as is used here: text, positions, clearing, and the alternate screen.
#[derive(Default)]
struct Screen {
    cells: Vec<Vec<char>>,
    row: usize,
    column: usize,
    alternate: bool,
    hidden_cursor: bool,
    coloured: bool,
    /// The part of a sequence or letter that has come so far.
    pending: Vec<u8>,
}

impl Screen {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.pending.push(byte);
            match self.pending.as_slice() {
                [0x1b] | [0x1b, b'['] => {}
                [0x1b, b'[', parameters @ .., end] if (0x40..=0x7e).contains(end) => {
                    let parameters = String::from_utf8_lossy(parameters).into_owned();
                    self.sequence(&parameters, *end);
                    self.pending.clear();
                }
                [0x1b, b'[', ..] => {}
                [0x1b, ..] | [b'\r'] => {
                    self.column = if byte == b'\r' { 0 } else { self.column };
                    self.pending.clear();
                }
                [b'\n'] => {
                    self.row += 1;
                    self.pending.clear();
                }
                letter => {
                    if let Ok(text) = str::from_utf8(letter) {
                        let letter = text.chars().next().unwrap();
                        self.pending.clear();
                        self.put(letter);
                    }
                }
            }
        }
    }

    fn put(&mut self, letter: char) {
        if self.cells.len() <= self.row {
            self.cells.resize(self.row + 1, Vec::new());
        }
        let line = &mut self.cells[self.row];
        if line.len() <= self.column {
            line.resize(self.column + 1, ' ');
        }
        line[self.column] = letter;
        self.column += 1;
    }

    fn sequence(&mut self, parameters: &str, end: u8) {
        match (parameters, end) {
            ("?1049", b'h' | b'l') => {
                self.alternate = end == b'h';
                (self.cells, self.row, self.column) = (Vec::new(), 0, 0);
            }
            ("?25", b'h' | b'l') => self.hidden_cursor = end == b'l',
            (position, b'H') => {
                let (row, column) = position.split_once(';').unwrap_or(("1", "1"));
                (self.row, self.column) =
                    (row.parse::<usize>().unwrap() - 1, column.parse::<usize>().unwrap() - 1);
            }
            ("2", b'J') => self.cells.clear(),
            ("2", b'K') => {
                if let Some(line) = self.cells.get_mut(self.row) {
                    line.clear();
                }
            }
            (colours, b'm') => self.coloured |= colours.contains("38;") || colours.contains("48;"),
            other => panic!("a sequence that this terminal does not know: {other:?}"),
        }
    }

    fn text(&self) -> String {
        self.cells.iter().map(|line| format!("{}\n", line.iter().collect::<String>().trim_end())).collect()
    }
}
