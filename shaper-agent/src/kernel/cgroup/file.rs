//! What a file of a cgroup is: a name, a type that its text is read into, and a type that may be written.

use std::{
    convert::Infallible,
    fmt, io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use shaper_core::{
    limits::Limit,
    units::{Bytes, BytesPerSec, Iops, Micros, Weight},
};

use super::CgroupError;

/// Text of the kernel that was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(String);

impl Malformed {
    /// This text.
    pub fn new(text: &str) -> Malformed {
        Malformed(text.to_owned())
    }
}

impl fmt::Display for Malformed {
    /// In quotes, and not without end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 80;
        match self.0.char_indices().nth(SHOWN) {
            None => write!(f, "`{}`, which is not understood", self.0.escape_debug()),
            Some((end, _)) => write!(f, "`{}…`, which is not understood", self.0[..end].escape_debug()),
        }
    }
}

/// What can be read from a file.
pub trait Contents: Sized {
    /// Reads the whole text, without the newline at its end.
    fn from_text(text: &str) -> Result<Self, Malformed>;
}

/// What can be written to a file.
pub trait Setting {
    /// As the kernel takes it.
    fn text(&self) -> String;
}

/// A file that is only read is set to nothing.
pub type ReadOnly = Infallible;

impl Setting for Infallible {
    fn text(&self) -> String {
        match *self {}
    }
}

/// A file of cgroups, by name: read as `R`, written as `W`.
pub struct File<R, W = R> {
    name: &'static str,
    of: PhantomData<fn(W) -> R>,
}

impl<R, W> File<R, W> {
    /// The file `name`.
    pub const fn new(name: &'static str) -> File<R, W> {
        File { name, of: PhantomData }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<R, W> Clone for File<R, W> {
    fn clone(&self) -> File<R, W> {
        *self
    }
}

impl<R, W> Copy for File<R, W> {}

impl<R, W> fmt::Debug for File<R, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// An open file of one cgroup.
pub struct Open<R, W = R> {
    fd: OwnedFd,
    cgroup: Arc<Path>,
    file: File<R, W>,
}

/// Longer than most files are.
const ROOM: usize = 4096;

impl<R, W> Open<R, W> {
    pub(in crate::kernel) fn new(fd: OwnedFd, cgroup: Arc<Path>, file: File<R, W>) -> Open<R, W> {
        Open { fd, cgroup, file }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.cgroup.join(self.file.name())
    }

    fn error(&self, verb: &'static str, source: impl Into<io::Error>) -> CgroupError {
        CgroupError::File { verb, path: self.path(), source: source.into() }
    }
}

impl<R: Contents, W> Open<R, W> {
    /// What it says now.
    pub fn read(&self) -> Result<R, CgroupError> {
        let mut buffer = [0; ROOM];
        let length =
            rustix::io::pread(&self.fd, &mut buffer, 0).map_err(|errno| self.error("read", errno))?;
        let mut longer;
        let mut text = &buffer[..length];
        // Only a file that filled the buffer may go on; cgroup.procs comes in pages, whatever the buffer.
        if length == ROOM || self.file.name() == super::groups::PROCESSES.name() {
            longer = text.to_vec();
            loop {
                let more = rustix::io::pread(&self.fd, &mut buffer, longer.len() as u64);
                match more.map_err(|errno| self.error("read", errno))? {
                    0 => break,
                    length => longer.extend_from_slice(&buffer[..length]),
                }
            }
            text = &longer;
        }
        let text = String::from_utf8_lossy(text);
        R::from_text(text.strip_suffix('\n').unwrap_or(&text))
            .map_err(|malformed| CgroupError::Malformed { path: self.path(), malformed })
    }
}

impl<R, W: Setting> Open<R, W> {
    /// Writes it, in one call as the kernel wants it.
    pub fn write(&self, value: &W) -> Result<(), CgroupError> {
        let text = value.text();
        // A file of a cgroup takes all or nothing.
        match rustix::io::pwrite(&self.fd, text.as_bytes(), 0) {
            Ok(_) => Ok(()),
            Err(errno) => Err(self.error("write", errno)),
        }
    }
}

impl<R, W> AsFd for Open<R, W> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A number as the kernel prints it: digits, nothing before or after.
pub(in crate::kernel) fn number<T: TryFrom<u64>>(text: &str) -> Result<T, Malformed> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { text.parse::<u64>().ok() } else { None };
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| Malformed::new(text))
}

/// A decimal of two digits, such as `12.34`, in hundredths.
pub(in crate::kernel) fn hundredths(text: &str) -> Result<u32, Malformed> {
    let parts = || {
        let (whole, fraction) = text.split_once('.')?;
        if fraction.len() != 2 {
            return None;
        }
        let (whole, fraction) = (number::<u32>(whole).ok()?, number::<u32>(fraction).ok()?);
        whole.checked_mul(100)?.checked_add(fraction)
    };
    parts().ok_or_else(|| Malformed::new(text))
}

/// Lines of a name and a number, as in `cpu.stat`.
pub(in crate::kernel) struct Flat<'a>(&'a str);

impl<'a> Flat<'a> {
    pub(in crate::kernel) fn new(text: &'a str) -> Flat<'a> {
        Flat(text)
    }

    /// The number behind `name`, if that is there.
    pub(in crate::kernel) fn find(&self, name: &str) -> Result<Option<u64>, Malformed> {
        let found = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.map(number).transpose()
    }

    /// The number behind `name`, which every kernel shows.
    pub(in crate::kernel) fn get(&self, name: &str) -> Result<u64, Malformed> {
        self.find(name)?.ok_or_else(|| Malformed::new(self.0))
    }
}

impl Contents for bool {
    fn from_text(text: &str) -> Result<bool, Malformed> {
        match text {
            "0" => Ok(false),
            "1" => Ok(true),
            _ => Err(Malformed::new(text)),
        }
    }
}

impl Setting for bool {
    fn text(&self) -> String {
        if *self { "1" } else { "0" }.into()
    }
}

impl Contents for u32 {
    fn from_text(text: &str) -> Result<u32, Malformed> {
        number(text)
    }
}

impl Setting for u32 {
    fn text(&self) -> String {
        self.to_string()
    }
}

macro_rules! quantities {
    ($($name:ident),*) => {$(
        impl Contents for $name {
            fn from_text(text: &str) -> Result<$name, Malformed> {
                number(text).map($name)
            }
        }

        impl Setting for $name {
            fn text(&self) -> String {
                self.0.to_string()
            }
        }
    )*};
}

quantities!(Bytes, BytesPerSec, Iops, Micros);

impl Contents for Weight {
    fn from_text(text: &str) -> Result<Weight, Malformed> {
        Weight::new(number(text)?).ok_or_else(|| Malformed::new(text))
    }
}

impl Setting for Weight {
    fn text(&self) -> String {
        self.get().to_string()
    }
}

impl<T: Contents> Contents for Limit<T> {
    fn from_text(text: &str) -> Result<Limit<T>, Malformed> {
        if text == "max" { Ok(Limit::Unlimited) } else { T::from_text(text).map(Limit::At) }
    }
}

impl<T: Setting> Setting for Limit<T> {
    fn text(&self) -> String {
        match self {
            Limit::Unlimited => "max".into(),
            Limit::At(value) => value.text(),
        }
    }
}

/// Reads what is written to be the same again.
#[cfg(test)]
#[track_caller]
pub(in crate::kernel) fn survives<T: Contents + Setting + PartialEq + fmt::Debug>(value: &T) {
    assert_eq!(T::from_text(&value.text()).as_ref(), Ok(value));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(Bytes::from_text("4096"), Ok(Bytes(4096)));
        assert_eq!(u32::from_text("4294967296"), Err(Malformed::new("4294967296")));
        for broken in ["", "-1", "+1", " 1", "1 ", "1.0", "0x1", "max", "18446744073709551616"] {
            assert_eq!(Bytes::from_text(broken), Err(Malformed::new(broken)));
        }
        assert_eq!(Limit::<Bytes>::from_text("max"), Ok(Limit::Unlimited));
        assert_eq!(Limit::<Bytes>::from_text("MAX"), Err(Malformed::new("MAX")));
        assert!(Weight::from_text("0").is_err() && Weight::from_text("10001").is_err());
        assert!(bool::from_text("2").is_err() && bool::from_text("").is_err());
    }

    #[test]
    fn decimals_have_two_digits() {
        assert_eq!(hundredths("1.53"), Ok(153));
        assert_eq!(hundredths("100.00"), Ok(10_000));
        for broken in ["1", "1.5", "1.533", ".53", "1.", "-1.00", "1.+5", "99999999.00"] {
            assert_eq!(hundredths(broken), Err(Malformed::new(broken)));
        }
    }

    #[test]
    fn a_value_is_found_by_its_whole_name() {
        let flat = Flat::new("oom 3\noom_kill 2\noom_group_kill x\n");
        assert_eq!(flat.get("oom_kill"), Ok(2));
        assert_eq!(flat.find("oom_kil"), Ok(None));
        assert!(flat.get("oom_kil").is_err());
        assert_eq!(flat.find("oom_group_kill"), Err(Malformed::new("x")));
    }

    #[test]
    fn what_is_not_understood_is_shown_but_not_all_of_it() {
        assert_eq!(Malformed::new("a\nb").to_string(), "`a\\nb`, which is not understood");
        let long = Malformed::new(&"é".repeat(200)).to_string();
        assert!(long.contains('…') && long.chars().count() < 120, "{long}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(number: u64, unlimited: bool, weight in 1u32..=10_000, flag: bool) {
            survives(&Bytes(number));
            survives(&Micros(number));
            survives(&if unlimited { Limit::Unlimited } else { Limit::At(Bytes(number)) });
            survives(&Weight::new(weight).unwrap());
            survives(&flag);
        }

        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}") {
            let _ = (bool::from_text(&text), Limit::<Bytes>::from_text(&text), hundredths(&text));
            let _ = (Flat::new(&text).find("a"), Malformed::new(&text).to_string());
        }
    }
}
