//! The options of both daemons, checked before anything is touched.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use shaper_proto::daemon::{OptionError, group_id, socket_path};

/// Where metrics are served.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "metrics_options")]
pub struct Options {
    /// Where Prometheus finds /metrics: tcp://ADDRESS:PORT, with a token, or the path of a Unix socket, optionally as
    /// unix:PATH. Elsewhere than on loopback it takes a certificate, too (--tls-dir). Whoever may read it sees all tasks of all
    /// users
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// File with the token that a scraper shows (Authorization: Bearer TOKEN), or with `sha256:` and its hash in hexadecimal:
    /// nobody but its owner may be able to read it. It is read with each request
    #[arg(long, value_name = "FILE", requires = "metrics")]
    pub metrics_token_file: Option<PathBuf>,
    /// Group (name or id) whose members may read the Unix socket of --metrics
    #[arg(long, value_name = "GROUP", default_value = "0")]
    pub metrics_group: String,
}

/// Why they cannot be.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Like other options.
    #[error("--metrics: {0}")]
    Common(#[from] OptionError),
    /// Not an address.
    #[error(
        "--metrics {0}: say an address and a port, such as tcp://127.0.0.1:9750, or the path of a Unix socket"
    )]
    NotAnAddress(String),
    /// Anybody could read it.
    #[error(
        "--metrics {0} needs --metrics-token-file: 127.0.0.1, too, belongs to every local user. Make a token: (umask 077; \
         openssl rand -hex 32 > /etc/shaper/metrics.token)"
    )]
    NoToken(String),
    /// A token that nobody would be asked for.
    #[error(
        "--metrics-token-file is for tcp://; who may read the Unix socket {0}, its group says (--metrics-group)"
    )]
    NeedlessToken(String),
    /// Anybody on the way could read the token.
    #[error(
        "--metrics {0} needs --tls-dir: on the way to another machine the token could be read. Listen on loopback, or make a \
         certificate that names this host: shaper pki issue --ca-dir CA --host HOST …"
    )]
    NoCertificate(String),
}

/// Checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where, and for whom.
    pub address: Address,
}

/// Where metrics are served, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// At this socket, for its group.
    Socket {
        /// The path.
        path: PathBuf,
        /// The group's id.
        group: u32,
    },
    /// Over TCP.
    Tcp {
        /// There.
        address: SocketAddr,
        /// With this token.
        token_file: PathBuf,
        /// And this certificate.
        tls_dir: Option<PathBuf>,
    },
}

impl Options {
    /// Checks them; `tls_dir` is where the daemon's certificate is. `None`: nothing is served.
    pub fn check(self, tls_dir: Option<&Path>) -> Result<Option<Config>, OptionsError> {
        let Options { metrics, metrics_token_file, metrics_group } = self;
        let Some(wanted) = metrics else { return Ok(None) };
        let Some(address) = wanted.strip_prefix("tcp://") else {
            let path = socket_path(&wanted).map_err(|_| OptionsError::NotAnAddress(wanted.clone()))?;
            if metrics_token_file.is_some() {
                return Err(OptionsError::NeedlessToken(wanted));
            }
            let group = group_id(&metrics_group)?;
            return Ok(Some(Config { address: Address::Socket { path, group } }));
        };
        let address: SocketAddr = address.parse().map_err(|_| OptionsError::NotAnAddress(wanted.clone()))?;
        let token_file = metrics_token_file.ok_or_else(|| OptionsError::NoToken(wanted.clone()))?;
        if tls_dir.is_none() && !address.ip().to_canonical().is_loopback() {
            return Err(OptionsError::NoCertificate(wanted));
        }
        let tls_dir = tls_dir.map(Path::to_owned);
        Ok(Some(Config { address: Address::Tcp { address, token_file, tls_dir } }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(address: &str, token: bool, tls: bool) -> Result<Option<Config>, OptionsError> {
        let options = Options {
            metrics: Some(address.to_owned()),
            metrics_token_file: token.then(|| "/token".into()),
            metrics_group: "0".to_owned(),
        };
        options.check(tls.then_some(Path::new("/tls")))
    }

    #[test]
    fn tcp_takes_a_token_and_a_certificate_off_loopback() {
        for loopback in ["tcp://127.0.0.1:9750", "tcp://[::1]:0", "tcp://[::ffff:127.0.0.1]:1"] {
            assert!(matches!(check(loopback, false, true), Err(OptionsError::NoToken(_))), "{loopback}");
            assert!(check(loopback, true, false).unwrap().is_some());
        }
        for open in ["tcp://0.0.0.0:9750", "tcp://[::]:9750", "tcp://10.0.0.1:9750"] {
            assert!(matches!(check(open, false, true), Err(OptionsError::NoToken(_))), "{open}");
            let error = check(open, true, false).unwrap_err().to_string();
            assert!(error.contains("--tls-dir"), "{error}");
            assert!(check(open, true, true).unwrap().is_some());
        }
    }

    #[test]
    fn a_socket_is_for_a_group_and_the_rest_is_no_address() {
        let socket = check("unix:/run/m.sock", false, true).unwrap().unwrap();
        assert_eq!(socket.address, Address::Socket { path: "/run/m.sock".into(), group: 0 });
        assert!(matches!(check("/run/m.sock", true, false), Err(OptionsError::NeedlessToken(_))));
        for bad in
            ["tcp://localhost:1", "tcp://127.0.0.1", "127.0.0.1:9750", "http://127.0.0.1:1", "m.sock", ""]
        {
            assert!(matches!(check(bad, true, true), Err(OptionsError::NotAnAddress(_))), "{bad}");
        }
        assert_eq!(Options::default().check(None).unwrap(), None);
    }
}
