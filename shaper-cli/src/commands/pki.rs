//! `shaper pki`: certificates, by an authority whose directory is on this machine. Nobody is asked.

use std::time::Duration;

use shaper_identity::{
    Identity, Role,
    pki::{self, Authority, IDENTITY, PkiError},
};

use crate::{
    args::{PkiCommand, PkiInit, PkiIssue, PkiRotate, PkiShow, Validity},
    error::Error,
    output, time,
};

const DAY: u64 = 24 * 60 * 60;

/// Does what the command line says.
pub(crate) fn pki(command: PkiCommand) -> Result<(), Error> {
    let text = match command {
        PkiCommand::Init(args) => init(&args)?,
        PkiCommand::Issue(args) => issue(&args)?,
        PkiCommand::Rotate(args) => rotate(&args)?,
        PkiCommand::Show(args) => show(&args)?,
    };
    output::print(&text)
}

fn pki_error(error: PkiError) -> Error {
    Error::Pki(Box::new(error))
}

fn valid(Validity { days }: &Validity) -> Duration {
    Duration::from_secs(days * DAY)
}

fn init(PkiInit { ca_dir, trust_domain }: &PkiInit) -> Result<String, Error> {
    // A trust domain in which nobody could have a name is refused before there is an authority for it.
    let broker = Identity::new(trust_domain, Role::Broker, "b")?;
    let authority = Authority::create(ca_dir, trust_domain).map_err(pki_error)?;
    let (shown, fingerprint) = (ca_dir.display(), authority.fingerprint());
    Ok(format!(
        "made an authority of {trust_domain} in {shown} (SHA-256 {fingerprint})\n\
         next, a certificate for the broker: shaper pki issue --ca-dir {shown} --host HOST {broker} DIR\n"
    ))
}

fn issue(PkiIssue { ca_dir, hosts, validity, identity, directory }: &PkiIssue) -> Result<String, Error> {
    let path = directory.join(IDENTITY);
    if path.exists() {
        return Err(pki_error(PkiError::Exists(path)));
    }
    let authority = Authority::load(ca_dir).map_err(pki_error)?;
    authority.issue(directory, identity, hosts, valid(validity)).map_err(pki_error)?;
    Ok(format!("made a certificate for {identity} in {}, for {} days\n", directory.display(), validity.days))
}

fn rotate(PkiRotate { ca_dir, validity, directory }: &PkiRotate) -> Result<String, Error> {
    let holder = pki::holder(directory).map_err(pki_error)?;
    let authority = Authority::load(ca_dir).map_err(pki_error)?;
    authority.issue(directory, &holder.identity, &holder.hosts, valid(validity)).map_err(pki_error)?;
    let (identity, shown) = (holder.identity, directory.display());
    Ok(format!("replaced the certificate of {identity} in {shown}, for {} days\n", validity.days))
}

fn show(PkiShow { directory }: &PkiShow) -> Result<String, Error> {
    let holder = pki::holder(directory).map_err(pki_error)?;
    let now = i64::try_from(time::now() / 1_000_000_000).unwrap_or(i64::MAX);
    let left = holder.not_after - now;
    let until = match left {
        left if left <= 0 => "expired; replace it: shaper pki rotate".to_owned(),
        left => format!("good for {} days and {} hours more", left / 86_400, left % 86_400 / 3600),
    };
    let hosts = if holder.hosts.is_empty() { "none".to_owned() } else { holder.hosts.join(", ") };
    Ok(format!(
        "identity  {}\nserial    {}\nhosts     {hosts}\nvalidity  {until}\n",
        holder.identity, holder.serial
    ))
}
