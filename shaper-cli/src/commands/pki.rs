//! `shaper pki`: certificates, by an authority whose directory is on this machine, or of one that is asked.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use shaper_identity::{
    Identity, Role,
    name::Holder,
    pki::{self, Authority, IDENTITY, PkiError},
    token::Token,
};

use crate::{
    args::{PkiCommand, PkiInit, PkiIssue, PkiJoin, PkiRenew, PkiRotate, PkiShow, PkiToken, Validity},
    client::{self, ConnectError, Signed},
    error::Error,
    output, time,
};

const DAY: u64 = 24 * 60 * 60;

/// Does what the command line says.
pub(crate) async fn pki(tls_dir: Option<&Path>, command: PkiCommand) -> Result<(), Error> {
    let text = match command {
        PkiCommand::Init(args) => init(&args)?,
        PkiCommand::Issue(args) => issue(&args)?,
        PkiCommand::Rotate(args) => rotate(&args)?,
        PkiCommand::Token(args) => token(tls_dir, &args).await?,
        PkiCommand::Join(args) => join(args).await?,
        PkiCommand::Renew(args) => renew(&args).await?,
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

/// There is no certificate in a directory that is to get one.
fn vacant(directory: &Path) -> Result<(), Error> {
    let path = directory.join(IDENTITY);
    if path.exists() { Err(pki_error(PkiError::Exists(path))) } else { Ok(()) }
}

fn issue(PkiIssue { ca_dir, hosts, validity, identity, directory }: &PkiIssue) -> Result<String, Error> {
    vacant(directory)?;
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

async fn token(tls_dir: Option<&Path>, args: &PkiToken) -> Result<String, Error> {
    let PkiToken { authority, minutes, identity } = args;
    let tls_dir = tls_dir.ok_or_else(|| ConnectError::NoCertificate(format!("https://{}", authority.at)))?;
    let authority = client::Authority::connect(&authority.at, tls_dir).await?;
    let token = authority.create_token(identity, Duration::from_secs(minutes * 60)).await?;
    Ok(format!("{token}\n"))
}

/// A token is no longer than this.
const TOKEN_MAX: u64 = 4096;

fn read_token(path: &Path) -> Result<Token, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let input: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin().lock()),
        _ => Box::new(std::fs::File::open(path).map_err(failed)?),
    };
    let mut text = String::new();
    input.take(TOKEN_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text.parse::<Token>()?)
}

/// Writes what was signed, after a look at whose it is: an authority that errs must not make a node an operator.
fn keep(directory: &Path, key: &str, signed: &Signed, own: Option<&Identity>) -> Result<Holder, Error> {
    let first = pki::certificates(&signed.certificate).into_iter().next();
    let first = first.ok_or_else(|| pki_error(PkiError::Empty(PathBuf::from("the authority's answer"))))?;
    let holder = Holder::of(&first)?;
    if let Some(own) = own.filter(|own| **own != holder.identity) {
        return Err(Error::OtherIdentity { own: Box::new(own.clone()), other: Box::new(holder.identity) });
    }
    pki::write_identity(directory, key, &signed.certificate, &signed.authorities).map_err(pki_error)?;
    Ok(holder)
}

async fn join(PkiJoin { authority, token_file, hosts, directory }: PkiJoin) -> Result<String, Error> {
    vacant(&directory)?;
    let token = read_token(&token_file)?;
    let (key, request) = pki::request().map_err(pki_error)?;
    let authority = client::Authority::connect_as_stranger(&authority.at, &token).await?;
    let signed = authority.join(&token, request, hosts).await?;
    let Holder { identity, not_after, .. } = keep(&directory, &key, &signed, None)?;
    Ok(format!("joined as {identity}: its certificate is in {}, {}\n", directory.display(), until(not_after)))
}

async fn renew(PkiRenew { authority, before_days, directory }: &PkiRenew) -> Result<String, Error> {
    let holder = pki::holder(directory).map_err(pki_error)?;
    let (identity, shown) = (&holder.identity, directory.display());
    if before_days.is_some_and(|days| left(holder.not_after) > i64::from(days) * 86_400) {
        return Ok(format!(
            "left the certificate of {identity} in {shown} as it is: {}\n",
            until(holder.not_after)
        ));
    }
    let (key, request) = pki::request().map_err(pki_error)?;
    let authority = client::Authority::connect(&authority.at, directory).await?;
    let signed = authority.renew(request, holder.hosts.clone()).await?;
    let renewed = keep(directory, &key, &signed, Some(identity))?;
    Ok(format!("replaced the certificate of {identity} in {shown}, {}\n", until(renewed.not_after)))
}

/// Seconds.
fn left(not_after: i64) -> i64 {
    not_after - i64::try_from(time::now() / 1_000_000_000).unwrap_or(i64::MAX)
}

fn until(not_after: i64) -> String {
    match left(not_after) {
        left if left <= 0 => "expired; replace it: shaper pki rotate".to_owned(),
        left => format!("good for {} days and {} hours more", left / 86_400, left % 86_400 / 3600),
    }
}

fn show(PkiShow { directory }: &PkiShow) -> Result<String, Error> {
    let holder = pki::holder(directory).map_err(pki_error)?;
    let until = until(holder.not_after);
    let hosts = if holder.hosts.is_empty() { "none".to_owned() } else { holder.hosts.join(", ") };
    Ok(format!(
        "identity  {}\nserial    {}\nhosts     {hosts}\nvalidity  {until}\n",
        holder.identity, holder.serial
    ))
}
