//! Connections on which both sides have shown a certificate. TLS 1.3 alone, no resumption: whoever connects again
//! is checked again.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper_util::rt::TokioIo;
pub use rustls::ClientConfig;
use rustls::{
    DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    Role,
    files::{self, FileError},
    name::{Holder, InvalidIdentity},
    pki::{AUTHORITIES, IDENTITY, LONGEST, certificates},
    token::{fingerprint, is_same},
};

/// Why certificates do not do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file without what it should hold.
    #[error("{} holds no {what}; make it with `shaper pki`", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// What.
        what: &'static str,
    },
    /// A certificate that names nobody.
    #[error("{} names no identity", path.display())]
    Nameless {
        /// Which.
        path: PathBuf,
        /// Why.
        source: InvalidIdentity,
    },
    /// Expired.
    #[error("the certificate in {} has expired; renew it: shaper pki rotate", .0.display())]
    Expired(PathBuf),
    /// Of TLS itself.
    #[error("the certificates in {} cannot be used", directory.display())]
    Unusable {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What a directory holds: who we are, and whom we believe.
pub struct Material {
    directory: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    /// Who we are.
    pub holder: Holder,
    /// Of both files: another one is another content.
    pub fingerprint: String,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Seconds since 1970.
pub fn now() -> i64 {
    UnixTime::now().as_secs().try_into().unwrap_or(i64::MAX)
}

/// The fingerprint of the two files, to see cheaply that they have changed.
pub fn fingerprint_of(directory: &Path) -> Result<String, FileError> {
    let identity = files::read_secret(&directory.join(IDENTITY), LONGEST)?;
    let authorities = files::read(&directory.join(AUTHORITIES), LONGEST)?;
    Ok(fingerprint(format!("{identity}\0{authorities}").as_bytes()))
}

impl Material {
    /// Reads a directory.
    pub fn load(directory: &Path) -> Result<Material, TlsError> {
        let (identity_path, authorities_path) = (directory.join(IDENTITY), directory.join(AUTHORITIES));
        let identity = files::read_secret(&identity_path, LONGEST)?;
        let authorities = files::read(&authorities_path, LONGEST)?;
        let missing = |path: &Path, what| TlsError::Missing { path: path.to_owned(), what };
        let chain = certificates(&identity);
        let first = chain.first().ok_or_else(|| missing(&identity_path, "certificate"))?;
        let holder =
            Holder::of(first).map_err(|source| TlsError::Nameless { path: identity_path.clone(), source })?;
        if holder.not_after <= now() {
            return Err(TlsError::Expired(identity_path));
        }
        let key = PrivateKeyDer::from_pem_slice(identity.as_bytes());
        let key = key.map_err(|_| missing(&identity_path, "private key"))?;
        let mut roots = RootCertStore::empty();
        let believed = certificates(&authorities);
        roots.add_parsable_certificates(believed.iter().cloned());
        if roots.is_empty() {
            return Err(missing(&authorities_path, "certificate"));
        }
        let fingerprint = fingerprint(format!("{identity}\0{authorities}").as_bytes());
        let (directory, roots) = (directory.to_owned(), Arc::new(roots));
        Ok(Material { directory, chain, key, authorities: believed, roots, holder, fingerprint })
    }

    fn unusable(&self) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> TlsError + use<> {
        let directory = self.directory.clone();
        move |source| TlsError::Unusable { directory: directory.clone(), source }
    }

    /// For a listener. Who has no certificate gets no connection, unless there is something for them (`strangers`).
    pub fn server(&self, strangers: bool) -> Result<Arc<ServerConfig>, TlsError> {
        let unusable = self.unusable();
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider());
        let verifier = if strangers { verifier.allow_unauthenticated() } else { verifier };
        let verifier = verifier.build().map_err(|error| unusable(error.into()))?;
        // With the authority's own: who joins knows it by its hash alone.
        let chain = self.chain.iter().chain(&self.authorities).cloned().collect();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(error.into()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, self.key.clone_key())
            .map_err(|error| unusable(error.into()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For a listener of HTTP on which nobody shows a certificate: they have tokens.
    pub fn server_of_tokens(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let unusable = self.unusable();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(error.into()))?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(error.into()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For a connection to a server of one of these roles, of our own trust domain.
    pub fn client(&self, roles: &'static [Role]) -> Result<Arc<ClientConfig>, TlsError> {
        let unusable = self.unusable();
        let verifier = Server {
            roots: Roots::Known(self.roots.clone()),
            trust_domain: Some(self.holder.identity.trust_domain().to_owned()),
            roles,
        };
        let mut config = client_builder(verifier)
            .map_err(|error| unusable(error.into()))?
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(error.into()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// For one who has no certificate yet, and knows the hash of the authority's from its token.
pub fn stranger(authority: &str) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verifier =
        Server { roots: Roots::Hashed(authority.to_owned()), trust_domain: None, roles: &[Role::Authority] };
    let mut config = client_builder(verifier)?.with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

type Authenticated = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client_builder(verifier: Server) -> Result<Authenticated, rustls::Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

#[derive(Debug)]
enum Roots {
    Known(Arc<RootCertStore>),
    /// The one with this hash, which the server must show.
    Hashed(String),
}

/// Checks a server by its identity. Its host name says nothing: whoever holds the certificate of a node must not be
/// taken for the broker, wherever it listens.
#[derive(Debug)]
struct Server {
    roots: Roots,
    trust_domain: Option<String>,
    roles: &'static [Role],
}

impl ServerCertVerifier for Server {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let roots = match &self.roots {
            Roots::Known(roots) => Arc::clone(roots),
            Roots::Hashed(hash) => {
                let mut roots = RootCertStore::empty();
                let shown = intermediates.iter().find(|der| is_same(&fingerprint(der), hash));
                let shown = shown.ok_or_else(|| {
                    rustls::Error::General(
                        "it has no certificate of the authority that the token names".into(),
                    )
                })?;
                roots.add(shown.clone().into_owned())?;
                Arc::new(roots)
            }
        };
        let provider = provider();
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, algorithms)?;
        let no = |text: String| rustls::Error::General(text);
        let Holder { identity, .. } = Holder::of(end_entity).map_err(|error| no(error.to_string()))?;
        let is_ours = self.trust_domain.as_ref().is_none_or(|ours| ours == identity.trust_domain());
        if !is_ours || !self.roles.contains(&identity.role()) {
            return Err(no(format!("the server is {identity}, which is not whom this connection is for")));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Connects to `host:port`.
pub async fn connect(
    address: &str,
    config: Arc<ClientConfig>,
) -> std::io::Result<TokioIo<TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
    Ok(TokioIo::new(TlsConnector::from(config).connect(name, stream).await?))
}
