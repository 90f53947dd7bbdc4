//! Who may do what. An [`Identity`] is a name in a certificate; the [`table`] says which role may make which
//! call; [`access`] says, of those who may submit tasks, as which user and how urgently. The listeners of both daemons
//! (`serve`, behind the feature `server`) ask all three before a service is reached.
#![forbid(unsafe_code)]

pub mod access;
pub mod address;
pub mod files;
pub mod name;
pub mod pki;
#[cfg(feature = "server")]
pub mod serve;
pub mod table;
pub mod tls;
pub mod token;

pub use self::name::{Identity, Role};
