//! Certificates: what can be asked of an authority, whose directory is on this machine or which is reached over TCP.

use std::path::PathBuf;

use clap::{Subcommand, builder::ValueParser};
use shaper_identity::{
    Identity,
    address::{Address, InvalidAddress},
};

const PKI_AFTER_HELP: &str = "\
An authority is a directory with ca.pem and ca.key; keep it where its key is safe. Who has a
certificate has a directory, too: identity.pem (key and certificate, mode 0600) and ca.pem (whom
it believes). Copy that directory to its holder, and name it with --tls-dir.

An identity reads spiffe://TRUST-DOMAIN/ROLE/NAME. The roles: broker (whom agents and clients obey),
node (an agent, of the node of that name), operator, submitter, reader.

Where `shaper-authority --ca-dir DIR --listen tcp://ADDRESS:PORT` runs, nothing needs to be copied: an
operator makes a token, whoever has it joins with it, once, and renews the certificate later.

Examples:
  shaper pki init --ca-dir /etc/shaper/ca
  shaper pki issue --ca-dir /etc/shaper/ca --host broker.lan spiffe://cluster.local/broker/b /etc/shaper/tls
  shaper pki issue --ca-dir /etc/shaper/ca spiffe://cluster.local/node/n1 ./n1
  shaper pki rotate --ca-dir /etc/shaper/ca ./n1
  shaper pki show ./n1
  shaper pki token --authority https://ca.lan:7071 --tls-dir ./me spiffe://cluster.local/node/n2 > n2.token
  shaper pki join --authority https://ca.lan:7071 --token-file n2.token /etc/shaper/tls
  shaper pki renew --authority https://ca.lan:7071 --before-days 30 /etc/shaper/tls";

/// What is done with certificates.
#[derive(Debug, clap::Args)]
#[command(after_help = PKI_AFTER_HELP)]
pub(crate) struct Pki {
    #[command(subcommand)]
    pub(crate) command: PkiCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make an authority that signs certificates
    Init(PkiInit),
    /// Make a key and a certificate for an identity
    Issue(PkiIssue),
    /// Replace a key and its certificate, of the same identity; who uses them need not be restarted
    Rotate(PkiRotate),
    /// Make a token with which somebody joins, once; --tls-dir is an operator's certificate
    Token(PkiToken),
    /// Come by a certificate, with a token
    Join(PkiJoin),
    /// Replace a key and its certificate, of the same identity, as long as it is good; nobody need be restarted
    Renew(PkiRenew),
    /// Show for whom a certificate is, and until when
    Show(PkiShow),
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiInit {
    /// Directory of the authority; it must have no key yet
    #[arg(long, value_name = "DIR")]
    pub(crate) ca_dir: PathBuf,
    /// Whose certificates these will be
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Validity {
    /// How many days the certificate is good for
    #[arg(long, value_name = "N", default_value_t = 90, value_parser = days())]
    pub(crate) days: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiIssue {
    /// Directory of the authority
    #[arg(long, value_name = "DIR")]
    pub(crate) ca_dir: PathBuf,
    /// Host name or address at which the holder serves; may be repeated
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<String>,
    #[command(flatten)]
    pub(crate) validity: Validity,
    /// For whom: spiffe://TRUST-DOMAIN/ROLE/NAME
    pub(crate) identity: Identity,
    /// Directory of the holder; it must have no certificate yet
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiRotate {
    /// Directory of the authority
    #[arg(long, value_name = "DIR")]
    pub(crate) ca_dir: PathBuf,
    #[command(flatten)]
    pub(crate) validity: Validity,
    /// Directory of the holder
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Authority {
    /// Where `shaper-authority` listens
    #[arg(long = "authority", value_name = "https://HOST:PORT", env = "SHAPER_AUTHORITY", value_parser = at)]
    pub(crate) at: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiToken {
    #[command(flatten)]
    pub(crate) authority: Authority,
    /// How many minutes it can be used
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10_080))]
    pub(crate) minutes: u64,
    /// As whom somebody joins: spiffe://TRUST-DOMAIN/ROLE/NAME
    pub(crate) identity: Identity,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiJoin {
    #[command(flatten)]
    pub(crate) authority: Authority,
    /// File with the token; `-` is standard input. (On a command line every user could read it)
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub(crate) token_file: PathBuf,
    /// Host name or address at which the holder serves; may be repeated
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<String>,
    /// Directory for the certificate; it must have none yet
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiRenew {
    #[command(flatten)]
    pub(crate) authority: Authority,
    /// Does nothing while the certificate is good for more than so many days
    #[arg(long, value_name = "N")]
    pub(crate) before_days: Option<u32>,
    /// Directory of the holder
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

/// `HOST:PORT`.
fn at(text: &str) -> Result<String, InvalidAddress> {
    match text.parse()? {
        Address::Tls(at) => Ok(at),
        Address::Socket(_) => Err(InvalidAddress::Plain(text.to_owned())),
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct PkiShow {
    /// Directory of the holder
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

fn days() -> ValueParser {
    clap::value_parser!(u64).range(1..=825).into()
}
