//! The authority that signs certificates, and the files of those who hold one.
//!
//! A holder's directory has `identity.pem` (the key and the certificate in one file, which is replaced as one: the two
//! never differ) and `ca.pem` (whom it believes). An authority's has `ca.pem` and `ca.key`.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use time::{Duration, OffsetDateTime};

use crate::{
    Identity, Role,
    files::{self, FileError},
    name::{Holder, InvalidIdentity},
    token::fingerprint,
};

/// Key and certificate.
pub const IDENTITY: &str = "identity.pem";
/// Whom to believe.
pub const AUTHORITIES: &str = "ca.pem";
/// The authority's key.
const AUTHORITY_KEY: &str = "ca.key";
/// A file of certificates is no longer than this.
pub(crate) const LONGEST: u64 = 1 << 20;
/// Certificates of the authority.
const AUTHORITY_DAYS: i64 = 3650;
/// Clocks may differ by so much.
const SKEW: Duration = Duration::minutes(5);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something that is no certificate, key or request.
    #[error("{what} is not one")]
    Malformed {
        /// What it should be.
        what: String,
        /// What was found.
        source: rcgen::Error,
    },
    /// A certificate that names nobody.
    #[error("the certificate in {} names no identity", path.display())]
    Nameless {
        /// Where.
        path: PathBuf,
        /// Why.
        source: InvalidIdentity,
    },
    /// A file without a certificate.
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    /// There is one already.
    #[error("{} is there already: remove it first, if nobody needs it any more", .0.display())]
    Exists(PathBuf),
    /// It may not sign.
    #[error("the certificate of {} may not sign others: it is not of an authority", .0.display())]
    NotAnAuthority(PathBuf),
    /// A host name that is none.
    #[error("`{0}` is neither a host name nor an address")]
    Host(String),
}

fn malformed(what: impl Into<String>) -> impl FnOnce(rcgen::Error) -> PkiError {
    let what = what.into();
    move |source| PkiError::Malformed { what, source }
}

/// The certificates in a text.
pub fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map_while(Result::ok).collect()
}

/// Who signs.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// A new one, in a directory that has none.
    pub fn create(directory: &Path, trust_domain: &str) -> Result<Authority, PkiError> {
        let key_path = directory.join(AUTHORITY_KEY);
        if key_path.exists() {
            return Err(PkiError::Exists(key_path));
        }
        let key = KeyPair::generate().map_err(malformed("a new key"))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = distinguished(&format!("shaper authority of {trust_domain}"));
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - SKEW, now + Duration::days(AUTHORITY_DAYS));
        let certificate = params.self_signed(&key).map_err(malformed("a new authority"))?;
        files::private_directory(directory)?;
        files::replace(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
        files::replace(&directory.join(AUTHORITIES), certificate.pem().as_bytes(), 0o644)?;
        Authority::load(directory)
    }

    /// One that was made before, by this or by other means.
    pub fn load(directory: &Path) -> Result<Authority, PkiError> {
        let (certificate_path, key_path) = (directory.join(AUTHORITIES), directory.join(AUTHORITY_KEY));
        let pem = files::read(&certificate_path, LONGEST)?;
        let key = files::read_secret(&key_path, LONGEST)?;
        let key = KeyPair::from_pem(&key).map_err(malformed(format!("the key in {}", key_path.display())))?;
        let shown = || format!("the certificate in {}", certificate_path.display());
        let first =
            certificates(&pem).into_iter().next().ok_or_else(|| PkiError::Empty(certificate_path.clone()))?;
        let is_authority = {
            use x509_parser::prelude::{FromDer, X509Certificate};
            X509Certificate::from_der(&first).is_ok_and(|(_, certificate)| certificate.is_ca())
        };
        if !is_authority {
            return Err(PkiError::NotAnAuthority(certificate_path));
        }
        let issuer = Issuer::from_ca_cert_der(&first, key).map_err(malformed(shown()))?;
        Ok(Authority { issuer, pem })
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The hash of its certificate.
    pub fn fingerprint(&self) -> String {
        certificates(&self.pem).first().map(|der| fingerprint(der)).unwrap_or_default()
    }

    /// Signs a key for an identity. `hosts` are where it serves.
    fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &Identity,
        hosts: &[String],
        valid: std::time::Duration,
    ) -> Result<String, PkiError> {
        let mut params = CertificateParams::default();
        let uri = identity.to_string().try_into().map_err(malformed("the identity"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.subject_alt_names.extend(host_names(hosts)?);
        params.distinguished_name = distinguished(identity.name());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        // A node serves its metrics. Whoever wants a broker asks for its role, besides.
        if matches!(identity.role(), Role::Broker | Role::Authority | Role::Node) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let now = OffsetDateTime::now_utc();
        params.not_before = now - SKEW;
        params.not_after = now + valid;
        Ok(params.signed_by(key, &self.issuer).map_err(malformed("the certificate to be signed"))?.pem())
    }

    /// Signs what somebody else has a key for. Of the request, the key counts; who it is says `identity`.
    pub fn sign_request(
        &self,
        request_pem: &str,
        identity: &Identity,
        hosts: &[String],
        valid: std::time::Duration,
    ) -> Result<String, PkiError> {
        let request = read_request(request_pem)?;
        self.sign(&request.public_key, identity, hosts, valid)
    }

    /// Makes a key, signs it and writes both to the directory of who will hold them.
    pub fn issue(
        &self,
        directory: &Path,
        identity: &Identity,
        hosts: &[String],
        valid: std::time::Duration,
    ) -> Result<(), PkiError> {
        let key = KeyPair::generate().map_err(malformed("a new key"))?;
        let certificate = self.sign(&key, identity, hosts, valid)?;
        write_identity(directory, &key.serialize_pem(), &certificate, &self.pem)
    }
}

fn distinguished(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// What a certificate says of where its holder serves.
fn host_names(hosts: &[String]) -> Result<Vec<SanType>, PkiError> {
    let name = |host: &String| match host.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) if host.is_empty() || host.contains(['/', ':', ' ']) => Err(PkiError::Host(host.clone())),
        Err(_) => {
            let name = host.as_str().try_into().map_err(|_| PkiError::Host(host.clone()))?;
            Ok(SanType::DnsName(name))
        }
    };
    hosts.iter().map(name).collect()
}

fn read_request(request_pem: &str) -> Result<CertificateSigningRequestParams, PkiError> {
    CertificateSigningRequestParams::from_pem(request_pem).map_err(malformed("the request"))
}

/// Whether there is something to sign.
pub fn check_request(request_pem: &str, hosts: &[String]) -> Result<(), PkiError> {
    read_request(request_pem)?;
    host_names(hosts).map(drop)
}

/// A key, and the request to sign it; both as PEM.
pub fn request() -> Result<(String, String), PkiError> {
    let key = KeyPair::generate().map_err(malformed("a new key"))?;
    let request = CertificateParams::default().serialize_request(&key).map_err(malformed("a new request"))?;
    Ok((key.serialize_pem(), request.pem().map_err(malformed("a new request"))?))
}

/// Writes what a holder needs.
pub fn write_identity(
    directory: &Path,
    key: &str,
    certificate: &str,
    authorities: &str,
) -> Result<(), PkiError> {
    files::private_directory(directory)?;
    files::replace(&directory.join(AUTHORITIES), authorities.as_bytes(), 0o644)?;
    files::replace(&directory.join(IDENTITY), format!("{key}{certificate}").as_bytes(), 0o600)?;
    Ok(())
}

/// Who the holder of a directory is.
pub fn holder(directory: &Path) -> Result<Holder, PkiError> {
    let path = directory.join(IDENTITY);
    let pem = files::read_secret(&path, LONGEST)?;
    let first = certificates(&pem).into_iter().next().ok_or_else(|| PkiError::Empty(path.clone()))?;
    Holder::of(&first).map_err(|source| PkiError::Nameless { path, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

    #[test]
    fn what_is_issued_names_its_holder_and_is_closed_to_others() {
        let root = tempfile::tempdir().unwrap();
        let ca = root.path().join("ca");
        let authority = Authority::create(&ca, "d").unwrap();
        assert!(matches!(Authority::create(&ca, "d"), Err(PkiError::Exists(_))));
        let node: Identity = "spiffe://d/node/n1".parse().unwrap();
        let at = root.path().join("n1");
        authority.issue(&at, &node, &["localhost".into(), "127.0.0.1".into()], HOUR).unwrap();
        let holder = holder(&at).unwrap();
        assert_eq!(
            (holder.identity, holder.hosts),
            (node, vec!["localhost".to_owned(), "127.0.0.1".to_owned()])
        );
        let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode(at.join(IDENTITY)), mode(at.clone()), mode(ca.join("ca.key"))),
            (0o600, 0o700, 0o600)
        );
        for host in ["", "a/b", "a b"] {
            let no = authority.issue(&at, &"spiffe://d/node/n1".parse().unwrap(), &[host.into()], HOUR);
            assert!(matches!(no, Err(PkiError::Host(_))), "{host}");
        }
    }

    #[test]
    fn of_a_request_the_key_counts_alone() {
        let root = tempfile::tempdir().unwrap();
        let authority = Authority::create(root.path(), "d").unwrap();
        let (_, request) = request().unwrap();
        let reader: Identity = "spiffe://d/reader/r".parse().unwrap();
        let certificate = authority.sign_request(&request, &reader, &[], HOUR).unwrap();
        assert_eq!(Holder::of(&certificates(&certificate)[0]).unwrap().identity, reader);
        assert!(authority.sign_request("no request", &reader, &[], HOUR).is_err());
    }

    #[test]
    fn who_may_not_sign_is_no_authority() {
        let root = tempfile::tempdir().unwrap();
        let authority = Authority::create(&root.path().join("ca"), "d").unwrap();
        let at = root.path().join("n1");
        authority.issue(&at, &"spiffe://d/node/n1".parse().unwrap(), &[], HOUR).unwrap();
        // A node that takes its own certificate for that of an authority.
        let own = std::fs::read_to_string(at.join(IDENTITY)).unwrap();
        let certificate = &own[own.find("-----BEGIN CERTIFICATE").unwrap()..];
        std::fs::write(at.join("ca.pem"), certificate).unwrap();
        files::replace(&at.join("ca.key"), own.as_bytes(), 0o600).unwrap();
        assert!(matches!(Authority::load(&at), Err(PkiError::NotAnAuthority(_))));
    }
}
