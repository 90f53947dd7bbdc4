//! Users and groups as the node's name service knows them: files, LDAP or what else it has. Only
//! libc asks all of these, so only here is `unsafe` used.
#![allow(unsafe_code, reason = "libc's name service functions")]

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io,
    mem::MaybeUninit,
    ptr,
    str::FromStr,
};

/// A user on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UserSpec {
    user: String,
    gid: Option<u32>,
}

/// Why a user was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    /// Not of the form.
    #[error("`{0}` is not a user: a name or number, and after a colon the number of a group")]
    Malformed(String),
    /// A name that nobody has.
    #[error("there is no user `{0}` on this node: name one that `getent passwd` lists, or give UID:GID")]
    Unknown(String),
    /// A number that nobody has, and so no group of theirs.
    #[error("nobody on this node has the user id {0}: give a group as well, as in --user {0}:{0}")]
    Groupless(u32),
    /// The name service failed.
    #[error("cannot look up user `{user}`")]
    Lookup {
        /// Whom it was asked for.
        user: String,
        /// How it failed.
        source: io::Error,
    },
}

impl FromStr for UserSpec {
    type Err = UserError;

    fn from_str(text: &str) -> Result<UserSpec, UserError> {
        let (user, gid) = match text.split_once(':') {
            None => (text, None),
            Some((user, gid)) => (user, Some(gid)),
        };
        let gid = gid.map(str::parse).transpose().map_err(|_| UserError::Malformed(text.into()))?;
        if user.is_empty() || user.contains('\0') {
            return Err(UserError::Malformed(text.into()));
        }
        Ok(UserSpec { user: user.into(), gid })
    }
}

/// Whom a task shall run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Name, where the node knows one.
    pub(crate) name: Option<String>,
    /// Home directory, where the node knows one.
    pub(crate) home: Option<String>,
}

impl UserSpec {
    /// The account that is meant.
    pub(crate) fn resolve(&self) -> Result<Account, UserError> {
        let lookup = |source| UserError::Lookup { user: self.user.clone(), source };
        let uid = self.user.parse::<u32>().ok();
        let passwd = match (uid, CString::new(self.user.as_str())) {
            (Some(uid), _) => passwd_of_uid(uid),
            (None, Ok(name)) => passwd_of_name(&name),
            (None, Err(_)) => return Err(UserError::Malformed(self.user.clone())),
        };
        match (passwd.map_err(lookup)?, uid, self.gid) {
            (Some(passwd), _, gid) => {
                let groups = if gid.is_some() { Ok(Vec::new()) } else { groups(&passwd) };
                Ok(Account {
                    uid: passwd.uid,
                    gid: gid.unwrap_or(passwd.gid),
                    groups: groups.map_err(lookup)?,
                    name: passwd.name.into_string().ok(),
                    home: passwd.home.into_string().ok(),
                })
            }
            (None, Some(uid), Some(gid)) => {
                Ok(Account { uid, gid, groups: Vec::new(), name: None, home: None })
            }
            (None, Some(uid), None) => Err(UserError::Groupless(uid)),
            (None, None, _) => Err(UserError::Unknown(self.user.clone())),
        }
    }
}

/// Who this process acts as, and so whom a server sees.
pub(crate) fn caller() -> u32 {
    // SAFETY: it has no preconditions and does not fail.
    unsafe { libc::geteuid() }
}

/// What a user is called and where at home, where the node knows it.
#[derive(Debug, Default)]
pub(crate) struct NameAndHome {
    pub(crate) name: Option<String>,
    pub(crate) home: Option<String>,
}

/// What a user is called and where at home.
pub(crate) fn name_and_home(uid: u32) -> NameAndHome {
    let passwd = passwd_of_uid(uid).ok().flatten();
    passwd.map_or_else(NameAndHome::default, |passwd| NameAndHome {
        name: passwd.name.into_string().ok(),
        home: passwd.home.into_string().ok(),
    })
}

/// The name of a user, where there is one.
pub(crate) fn user_name(uid: u32) -> Option<String> {
    passwd_of_uid(uid).ok().flatten().and_then(|passwd| passwd.name.into_string().ok())
}

/// The name of a group, where there is one.
pub(crate) fn group_name(gid: u32) -> Option<String> {
    let name = entry(
        |group, buffer, size, found| {
            // SAFETY: `entry` passes storage for a group, and a buffer of `size` bytes.
            unsafe { libc::getgrgid_r(gid, group, buffer, size, found) }
        },
        // SAFETY: libc filled in the group, whose name is a string in the buffer that `entry` holds.
        |group: &libc::group| unsafe { owned(group.gr_name) },
    );
    name.ok().flatten().and_then(|name| name.into_string().ok())
}

/// What is used of a line of `passwd`.
struct Passwd {
    name: CString,
    uid: u32,
    gid: u32,
    home: CString,
}

impl Passwd {
    /// # Safety
    ///
    /// The pointers in `passwd` are null or lead to strings.
    unsafe fn from_libc(passwd: &libc::passwd) -> Passwd {
        // SAFETY: as the caller promises.
        let (name, home) = unsafe { (owned(passwd.pw_name), owned(passwd.pw_dir)) };
        Passwd { name, uid: passwd.pw_uid, gid: passwd.pw_gid, home }
    }
}

fn passwd_of_uid(uid: u32) -> io::Result<Option<Passwd>> {
    entry(
        |passwd, buffer, size, found| {
            // SAFETY: `entry` passes storage for a passwd, and a buffer of `size` bytes.
            unsafe { libc::getpwuid_r(uid, passwd, buffer, size, found) }
        },
        // SAFETY: libc filled it in, and `entry` holds the buffer with its strings.
        |passwd| unsafe { Passwd::from_libc(passwd) },
    )
}

fn passwd_of_name(name: &CStr) -> io::Result<Option<Passwd>> {
    entry(
        |passwd, buffer, size, found| {
            // SAFETY: as in `passwd_of_uid`, and the name is a string.
            unsafe { libc::getpwnam_r(name.as_ptr(), passwd, buffer, size, found) }
        },
        // SAFETY: as in `passwd_of_uid`.
        |passwd| unsafe { Passwd::from_libc(passwd) },
    )
}

/// The groups of a user, the primary one among them.
fn groups(passwd: &Passwd) -> io::Result<Vec<u32>> {
    /// The most that Linux lets a process have (NGROUPS_MAX).
    const MOST: usize = 65_536;
    let mut groups = vec![0; 64];
    loop {
        let mut count = c_int::try_from(groups.len()).unwrap_or(c_int::MAX);
        // SAFETY: the name is a string, and `groups` has room for `count` ids.
        let fits =
            unsafe { libc::getgrouplist(passwd.name.as_ptr(), passwd.gid, groups.as_mut_ptr(), &mut count) }
                >= 0;
        if fits {
            groups.truncate(usize::try_from(count).unwrap_or(0));
            return Ok(groups);
        }
        if groups.len() >= MOST {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        groups.resize(groups.len() * 2, 0);
    }
}

/// Calls one of libc's reentrant lookups with a buffer that is large enough, and reads the entry
/// while the buffer, which its strings are in, is there.
fn entry<E, T>(
    call: impl Fn(*mut E, *mut c_char, usize, *mut *mut E) -> c_int,
    read: impl FnOnce(&E) -> T,
) -> io::Result<Option<T>> {
    const LARGEST: usize = 1 << 20;
    let mut buffer: Vec<c_char> = vec![0; 1024];
    loop {
        let mut storage = MaybeUninit::<E>::uninit();
        let mut found = ptr::null_mut();
        match call(storage.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &mut found) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: after success `found` points to `storage`, which is filled in.
            0 => return Ok(Some(read(unsafe { &*found }))),
            // Not in POSIX, but how some sources say that there is no such entry (see getpwnam(3)).
            libc::ENOENT | libc::ESRCH => return Ok(None),
            libc::EINTR => {}
            libc::ERANGE if buffer.len() < LARGEST => buffer.resize(buffer.len() * 2, 0),
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// # Safety
///
/// `text` is null or leads to a string.
unsafe fn owned(text: *const c_char) -> CString {
    if text.is_null() {
        return CString::default();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(text) }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(spec: &str) -> Result<Account, UserError> {
        spec.parse::<UserSpec>()?.resolve()
    }

    #[test]
    fn root_is_known_by_name_and_by_number() {
        let root = resolve("root").unwrap();
        assert_eq!((root.uid, root.gid, root.name.as_deref()), (0, 0, Some("root")));
        assert!(root.groups.contains(&0), "{root:?}");
        assert_eq!(resolve("0").unwrap(), root);
        assert_eq!(user_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(0).as_deref(), Some("root"));
    }

    #[test]
    fn a_named_group_is_the_only_one() {
        let account = resolve("root:7").unwrap();
        assert_eq!((account.gid, account.groups), (7, vec![]));
    }

    #[test]
    fn a_number_that_nobody_has_needs_a_group() {
        let error = resolve("3999999999").unwrap_err().to_string();
        assert!(error.ends_with("as in --user 3999999999:3999999999"), "{error}");
        let account = resolve("3999999999:5").unwrap();
        let expected = Account { uid: 3_999_999_999, gid: 5, groups: vec![], name: None, home: None };
        assert_eq!(account, expected);
    }

    #[test]
    fn what_is_not_a_user_is_refused() {
        for bad in ["", ":", ":5", "root:", "root:wheel", "root:-1", "a\0b"] {
            assert!(matches!(bad.parse::<UserSpec>(), Err(UserError::Malformed(_))), "{bad:?}");
        }
        assert!(matches!(resolve("no-such-user-here"), Err(UserError::Unknown(_))));
        assert!(matches!(resolve("-1"), Err(UserError::Unknown(_))));
    }
}
