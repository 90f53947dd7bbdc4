//! The options of the web page, checked before anything is touched.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;

/// Where the web page is served.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "web_options")]
pub struct Options {
    /// Where the web page is served, such as tcp://127.0.0.1:9780. Nobody gets in without a code of `shaper ui`. Elsewhere than
    /// on loopback it takes a certificate, too (--tls-dir)
    #[arg(long, value_name = "ADDRESS")]
    pub web: Option<String>,
    /// A name under which browsers find the page, besides localhost and the address of --web; repeatable. Requests that name
    /// another host are refused
    #[arg(long, value_name = "NAME", requires = "web")]
    pub web_host: Vec<String>,
}

/// Why they cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Not an address.
    #[error("--web {0}: say an address and a port, such as tcp://127.0.0.1:9780")]
    NotAnAddress(String),
    /// Anybody on the way could read the cookie.
    #[error(
        "--web {0} needs --tls-dir: on the way to another machine the cookie could be read. Listen on loopback and reach it \
         through a proxy or ssh -L 9780:127.0.0.1:9780 HOST, or make a certificate that names this host: shaper pki issue \
         --ca-dir CA --host HOST …"
    )]
    NoCertificate(String),
    /// Nobody could be told where it is.
    #[error("--web {0} needs --web-host NAME: under which name do browsers find this machine?")]
    NoName(String),
    /// Not a name.
    #[error("--web-host {0}: say a host name or an address, without a port")]
    NotAName(String),
}

/// Checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where.
    pub address: SocketAddr,
    /// Under which names, besides its own address and localhost; the first is in what `shaper ui` prints.
    pub hosts: Vec<String>,
    /// With this certificate.
    pub tls_dir: Option<PathBuf>,
}

impl Options {
    /// Checks them; `tls_dir` is where the broker's certificate is. `None`: nothing is served.
    pub fn check(self, tls_dir: Option<&Path>) -> Result<Option<Config>, OptionsError> {
        let Options { web, web_host } = self;
        let Some(wanted) = web else { return Ok(None) };
        let address = wanted.strip_prefix("tcp://").and_then(|address| address.parse::<SocketAddr>().ok());
        let address = address.ok_or_else(|| OptionsError::NotAnAddress(wanted.clone()))?;
        let ip = address.ip().to_canonical();
        if !ip.is_loopback() && tls_dir.is_none() {
            return Err(OptionsError::NoCertificate(wanted));
        }
        if ip.is_unspecified() && web_host.is_empty() {
            return Err(OptionsError::NoName(wanted));
        }
        let is_of_a_name = |letter: char| letter.is_ascii_alphanumeric() || "-.[]:".contains(letter);
        let is_name = |name: &str| {
            let has_port = name.contains(':') && !(name.starts_with('[') && name.ends_with(']'));
            !name.is_empty() && name.chars().all(is_of_a_name) && !has_port
        };
        if let Some(bad) = web_host.iter().find(|name| !is_name(name)) {
            return Err(OptionsError::NotAName(bad.clone()));
        }
        let hosts = web_host.iter().map(|name| name.to_ascii_lowercase()).collect();
        // On this machine nobody is on the way, and browsers know no authority of ours.
        let tls_dir = tls_dir.filter(|_| !ip.is_loopback()).map(Path::to_owned);
        Ok(Some(Config { address, hosts, tls_dir }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(web: &str, hosts: &[&str], tls: bool) -> Result<Option<Config>, OptionsError> {
        let web_host = hosts.iter().map(|&host| host.to_owned()).collect();
        Options { web: Some(web.to_owned()), web_host }.check(tls.then_some(Path::new("/tls")))
    }

    #[test]
    fn web_off_loopback_takes_a_certificate_and_says_what_else_would_do() {
        for open in ["tcp://0.0.0.0:9780", "tcp://[::]:1", "tcp://10.0.0.1:9780"] {
            let error = check(open, &["b.example"], false).unwrap_err().to_string();
            assert!(error.contains("--tls-dir") && error.contains("ssh -L"), "{error}");
            assert!(check(open, &["b.example"], true).unwrap().unwrap().tls_dir.is_some());
        }
        assert!(matches!(check("tcp://0.0.0.0:1", &[], true), Err(OptionsError::NoName(_))));
        for loopback in ["tcp://127.0.0.1:9780", "tcp://[::1]:0"] {
            assert_eq!(check(loopback, &[], true).unwrap().unwrap().tls_dir, None, "{loopback}");
        }
        assert_eq!(Options::default().check(None), Ok(None));
    }

    #[test]
    fn web_addresses_and_names_are_of_their_form() {
        for bad in ["127.0.0.1:9780", "tcp://localhost:1", "tcp://127.0.0.1", "/run/web.sock", ""] {
            assert!(matches!(check(bad, &[], true), Err(OptionsError::NotAnAddress(_))), "{bad}");
        }
        for bad in ["", "a b", "a:9780", "http://a", "a/b"] {
            let refused = check("tcp://127.0.0.1:1", &[bad], false);
            assert!(matches!(refused, Err(OptionsError::NotAName(_))), "{bad}: {refused:?}");
        }
        let config = check("tcp://127.0.0.1:1", &["B.Example", "[::1]"], false).unwrap().unwrap();
        assert_eq!(config.hosts, ["b.example", "[::1]"]);
    }
}
