//! Where a broker is, as agents and clients are told.

use std::path::PathBuf;

/// A place to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Socket(PathBuf),
    /// `HOST:PORT`, over TCP, where both sides show a certificate.
    Tls(String),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// Neither kind.
    #[error("`{0}` is no address: say the path of a Unix socket, unix:PATH, or https://HOST:PORT")]
    Form(String),
    /// Without a certificate, nobody would know who is at the other end.
    #[error("`{0}`: over TCP, loopback included, both sides show a certificate: say https://HOST:PORT")]
    Plain(String),
}

impl std::str::FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Address, InvalidAddress> {
        let form = || InvalidAddress::Form(text.to_owned());
        if let Some(at) = text.strip_prefix("https://") {
            let (host, port) = at.trim_end_matches('/').rsplit_once(':').ok_or_else(form)?;
            let is_bare = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
            let is_host = !host.is_empty() && is_bare && !host.contains(['/', '@', '?', '#', ' ']);
            let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
            return if is_host && is_port { Ok(Address::Tls(format!("{host}:{port}"))) } else { Err(form()) };
        }
        if text.starts_with("http://") || text.starts_with("tcp://") {
            return Err(InvalidAddress::Plain(text.to_owned()));
        }
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
        let has_scheme = path.contains("://") || (path.contains(':') && !path.contains('/'));
        if path.is_empty() || has_scheme { Err(form()) } else { Ok(Address::Socket(path.into())) }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Socket(path) => write!(f, "{}", path.display()),
            Address::Tls(at) => write!(f, "https://{at}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_or_a_host_with_certificates() {
        for (text, address) in [
            ("/run/b.sock", Address::Socket("/run/b.sock".into())),
            ("unix:/run/b.sock", Address::Socket("/run/b.sock".into())),
            ("b.sock", Address::Socket("b.sock".into())),
            ("https://broker.lan:7070", Address::Tls("broker.lan:7070".into())),
            ("https://[::1]:7070/", Address::Tls("[::1]:7070".into())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        for bad in
            ["", "unix:", "https://", "https://b", "https://b:0", "https://::1:1", "https://u@b:1", "b:1"]
        {
            assert!(matches!(bad.parse::<Address>(), Err(InvalidAddress::Form(_))), "{bad}");
        }
        for bad in ["http://127.0.0.1:7070", "tcp://127.0.0.1:7070"] {
            assert!(matches!(bad.parse::<Address>(), Err(InvalidAddress::Plain(_))), "{bad}");
        }
    }
}
