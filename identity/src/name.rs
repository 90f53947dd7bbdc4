//! Names of the form `spiffe://<trust domain>/<role>/<name>`, as a URI in a certificate's subjectAltName.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What somebody with a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Submits tasks, as the user and within the bounds that the broker's configuration names.
    Submitter,
    /// May do everything that root may on a socket.
    Operator,
    /// An agent, of the node of that name.
    Node,
    /// Sees everything and changes nothing.
    Reader,
    /// The server that agents and clients obey.
    Broker,
    /// The server that signs certificates. It asks nobody for anything.
    Authority,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 6] =
        [Role::Submitter, Role::Operator, Role::Node, Role::Reader, Role::Broker, Role::Authority];

    /// As it stands in a name.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Submitter => "submitter",
            Role::Operator => "operator",
            Role::Node => "node",
            Role::Reader => "reader",
            Role::Broker => "broker",
            Role::Authority => "authority",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Role, InvalidIdentity> {
        let role = Role::ALL.into_iter().find(|role| role.as_str() == text);
        role.ok_or_else(|| InvalidIdentity::Role(shown(text)))
    }
}

/// Who somebody with a certificate is. Two are the same if they are equal, letter by letter: nothing is a prefix of
/// anything, and no letter stands for another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    trust_domain: String,
    role: Role,
    name: String,
}

/// Why a text names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Not of the form.
    #[error("`{0}` is not of the form spiffe://TRUST-DOMAIN/ROLE/NAME")]
    Form(String),
    /// No such role.
    #[error("`{0}` is no role; there are submitter, operator, node, reader and broker")]
    Role(String),
    /// A part that cannot be.
    #[error(
        "{part} `{text}` must be 1 to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit"
    )]
    Part {
        /// Of what.
        part: &'static str,
        /// What it is.
        text: String,
    },
    /// A certificate with none or several.
    #[error("the certificate has {0} URIs among its names; an identity has exactly one")]
    NotOne(usize),
    /// Not a certificate.
    #[error("it is not an X.509 certificate")]
    NotACertificate,
}

/// A text of a stranger's, fit to be shown.
fn shown(text: &str) -> String {
    text.chars().take(96).flat_map(char::escape_default).collect()
}

fn part(what: &'static str, text: &str) -> Result<String, InvalidIdentity> {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    let fits = bytes.len() <= 63
        && bytes.iter().copied().all(is_inner)
        && ends_well(bytes.first())
        && ends_well(bytes.last());
    if fits { Ok(text.to_owned()) } else { Err(InvalidIdentity::Part { part: what, text: shown(text) }) }
}

impl Identity {
    /// From its parts.
    pub fn new(trust_domain: &str, role: Role, name: &str) -> Result<Identity, InvalidIdentity> {
        let trust_domain = part("the trust domain", trust_domain)?;
        if trust_domain.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(InvalidIdentity::Part {
                part: "the trust domain (in small letters)",
                text: trust_domain,
            });
        }
        Ok(Identity { trust_domain, role, name: part("the name", name)? })
    }

    /// Whose certificates these are.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// What they are.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Which of them.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.trust_domain, self.role, self.name)
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> String {
        identity.to_string()
    }
}

impl TryFrom<String> for Identity {
    type Error = InvalidIdentity;

    fn try_from(text: String) -> Result<Identity, InvalidIdentity> {
        text.parse()
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Identity, InvalidIdentity> {
        let form = || InvalidIdentity::Form(shown(text));
        let mut parts = text.strip_prefix("spiffe://").ok_or_else(form)?.split('/');
        let (Some(trust_domain), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        Identity::new(trust_domain, role.parse()?, name)
    }
}

/// What a verified certificate says of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub identity: Identity,
    /// Number of the certificate, in hexadecimal.
    pub serial: String,
    /// Until when, in seconds since 1970.
    pub not_after: i64,
    /// Host names and addresses for which it may be shown by a server.
    pub hosts: Vec<String>,
}

impl Holder {
    /// Reads a certificate, whose signature is somebody else's to check.
    pub fn of(der: &[u8]) -> Result<Holder, InvalidIdentity> {
        use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| InvalidIdentity::NotACertificate)?;
        if !rest.is_empty() {
            return Err(InvalidIdentity::NotACertificate);
        }
        let names = certificate.subject_alternative_name().map_err(|_| InvalidIdentity::NotACertificate)?;
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let (mut uris, mut hosts) = (Vec::new(), Vec::new());
        for name in names {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::DNSName(host) => hosts.push(host.to_ascii_lowercase()),
                GeneralName::IPAddress(bytes) => {
                    if let Ok(four) = <[u8; 4]>::try_from(*bytes) {
                        hosts.push(std::net::Ipv4Addr::from(four).to_string());
                    } else if let Ok(sixteen) = <[u8; 16]>::try_from(*bytes) {
                        hosts.push(std::net::Ipv6Addr::from(sixteen).to_string());
                    }
                }
                _ => {}
            }
        }
        let [uri] = uris[..] else { return Err(InvalidIdentity::NotOne(uris.len())) };
        let serial = certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Holder {
            identity: uri.parse()?,
            serial,
            not_after: certificate.validity().not_after.timestamp(),
            hosts,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_read_whole_or_not_at_all() {
        let node: Identity = "spiffe://cluster.local/node/n1".parse().unwrap();
        assert_eq!((node.trust_domain(), node.role(), node.name()), ("cluster.local", Role::Node, "n1"));
        for bad in [
            "",
            "spiffe://",
            "spiffe:///node/n1",
            "spiffe://d/node",
            "spiffe://d/node/",
            "spiffe://d/node/n1/",
            "spiffe://d/node/n1/x",
            "spiffe://d/node/../operator/root",
            "spiffe://d/node/n1?role=operator",
            "spiffe://d/Node/n1",
            "spiffe://d/nodes/n1",
            "spiffe://D/node/n1",
            "spiffe://d:80/node/n1",
            "SPIFFE://d/node/n1",
            "spiffe://d/node/n%31",
            "spiffe://d/node/-n1",
            "spiffe://d/node/n1 ",
            "https://d/node/n1",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_shown_as_it_was(text in "spiffe://[a-zA-Z.]{0,4}/(node|operator|x)/[a-zA-Z0-9._/-]{0,5}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }

        #[test]
        fn no_bytes_crash_the_reader_of_certificates(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Holder::of(&bytes);
        }
    }
}
