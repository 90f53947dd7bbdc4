//! The service of an authority: signs certificates for those who have a token or a certificate.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use shaper_identity::{
    Identity, Role,
    files::{self, FileError},
    pki::{Authority, PkiError},
    serve::Asking,
    tls,
    token::{TokenError, Tokens},
};
use shaper_proto::v1::{self, enrolment_server::Enrolment};
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

/// The open tokens, beside the authority's key.
const TOKENS: &str = "tokens.json";
/// A file of tokens is no longer than this.
const LONGEST_TOKENS: u64 = 1 << 20;
/// How long a token may be open.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Host names and addresses in one certificate.
const MOST_HOSTS: usize = 16;

/// Why there are no tokens.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is in it.
    #[error("{} cannot be read; without it the open tokens are lost: remove it, and make new ones", path.display())]
    Tokens {
        /// Which file.
        path: PathBuf,
        /// Where, and what was expected.
        source: serde_json::Error,
    },
    /// The authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// The service.
pub struct EnrolmentService {
    keys: Arc<Keys>,
}

struct Keys {
    directory: PathBuf,
    trust_domain: String,
    valid: Duration,
    tokens: Mutex<Tokens>,
}

/// A failure that is ours: the log has all of it, and the caller a word.
fn failed(error: &(dyn std::error::Error + 'static)) -> Status {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let error = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    tracing::error!(error, "the authority cannot do its work");
    Status::internal("the authority cannot do its work; its log says why")
}

fn refused(error: PkiError) -> Status {
    match error {
        PkiError::Host(_) => Status::invalid_argument(error.to_string()),
        PkiError::Malformed { ref what, .. } if what == "the request" => {
            Status::invalid_argument("request_pem is no request for a certificate (PKCS #10, as PEM)")
        }
        other => failed(&other),
    }
}

impl EnrolmentService {
    /// A service of the authority in a directory, for the names of one trust domain. Certificates are good for `valid`.
    pub fn open(
        directory: &Path,
        trust_domain: &str,
        valid: Duration,
    ) -> Result<EnrolmentService, EnrolmentError> {
        Authority::load(directory)?;
        let path = directory.join(TOKENS);
        let tokens = if path.exists() {
            let text = files::read_secret(&path, LONGEST_TOKENS)?;
            serde_json::from_str(&text).map_err(|source| EnrolmentError::Tokens { path, source })?
        } else {
            Tokens::default()
        };
        let (directory, trust_domain) = (directory.to_owned(), trust_domain.to_owned());
        Ok(EnrolmentService {
            keys: Arc::new(Keys { directory, trust_domain, valid, tokens: Mutex::new(tokens) }),
        })
    }

    /// Signs, on a thread that may wait for the disk. The authority is read anew, so that it can be replaced.
    async fn sign(
        &self,
        identity: Identity,
        request_pem: String,
        hosts: Vec<String>,
    ) -> Result<Response<v1::CertificateResponse>, Status> {
        if hosts.len() > MOST_HOSTS {
            return Err(Status::invalid_argument(format!("a certificate has at most {MOST_HOSTS} hosts")));
        }
        let keys = Arc::clone(&self.keys);
        let sign = move || {
            let authority = Authority::load(&keys.directory)?;
            let certificate_pem = authority.sign_request(&request_pem, &identity, &hosts, keys.valid)?;
            let authorities_pem = authority.pem().to_owned();
            tracing::info!(target: "audit", who = %identity, "signed a certificate");
            Ok(v1::CertificateResponse { certificate_pem, authorities_pem })
        };
        let signed = tokio::task::spawn_blocking(sign).await;
        signed.map_err(|error| failed(&error))?.map(Response::new).map_err(refused)
    }
}

impl Keys {
    /// Changes the tokens, and returns when the change is on the disk. What could not be kept has not happened.
    async fn change<T: Send + 'static>(
        self: Arc<Keys>,
        change: impl FnOnce(&mut Tokens, &Keys) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        // On a task of its own: a caller who hangs up must not leave half of it undone.
        let changed = tokio::spawn(async move {
            let mut tokens = self.tokens.lock().await;
            let (keys, mut changed) = (Arc::clone(&self), tokens.clone());
            let change = move || {
                let answer = change(&mut changed, &keys)?;
                let text = serde_json::to_string(&changed).map_err(|error| failed(&error))?;
                let path = keys.directory.join(TOKENS);
                files::replace(&path, text.as_bytes(), 0o600).map_err(|error| failed(&error))?;
                Ok::<_, Status>((answer, changed))
            };
            let (answer, changed) =
                tokio::task::spawn_blocking(change).await.map_err(|error| failed(&error))??;
            *tokens = changed;
            Ok(answer)
        });
        changed.await.map_err(|error| failed(&error))?
    }
}

fn refused_token(error: TokenError) -> Status {
    match error {
        TokenError::Refused | TokenError::Form => Status::permission_denied(error.to_string()),
        TokenError::TooMany => Status::resource_exhausted(error.to_string()),
        TokenError::NoRandom => failed(&error),
    }
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let who = Asking::of(&request)?.who.clone();
        let v1::CreateTokenRequest { identity, valid_seconds } = request.into_inner();
        let identity: Identity =
            identity.parse().map_err(|error: shaper_identity::name::InvalidIdentity| {
                Status::invalid_argument(error.to_string())
            })?;
        if identity.trust_domain() != self.keys.trust_domain {
            let ours = &self.keys.trust_domain;
            return Err(Status::invalid_argument(format!(
                "{identity} is not of the trust domain {ours}, whose authority this is (shaper-authority --trust-domain)"
            )));
        }
        if identity.role() == Role::Authority {
            return Err(Status::invalid_argument(
                "an authority signs its own certificate, and needs no token",
            ));
        }
        if !(1..=LONGEST.as_secs()).contains(&valid_seconds) {
            let most = LONGEST.as_secs();
            return Err(Status::invalid_argument(format!("valid_seconds is from 1 to {most} (7 days)")));
        }
        let make = move |tokens: &mut Tokens, keys: &Keys| {
            let authority = Authority::load(&keys.directory).map_err(|error| failed(&error))?;
            let now = tls::now();
            let expires = now.saturating_add_unsigned(valid_seconds);
            let token = tokens.make(identity.clone(), &authority.fingerprint(), now, expires);
            let token = token.map_err(refused_token)?;
            tracing::info!(target: "audit", who, whose = %identity, token = token.id, valid_seconds, "made a token");
            let expires_unix_seconds = expires.try_into().unwrap_or_default();
            Ok(v1::CreateTokenResponse { token: token.reveal(), expires_unix_seconds })
        };
        Ok(Response::new(Arc::clone(&self.keys).change(make).await?))
    }

    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::CertificateResponse>, Status> {
        let v1::JoinRequest { token_id, secret, request_pem, hosts } = request.into_inner();
        // Before the token is used up.
        shaper_identity::pki::check_request(&request_pem, &hosts).map_err(refused)?;
        let redeem = move |tokens: &mut Tokens, _: &Keys| {
            let identity = tokens.redeem(&token_id, &secret, tls::now()).map_err(refused_token)?;
            tracing::info!(target: "audit", who = %identity, token = token_id, "joined");
            Ok(identity)
        };
        let identity = Arc::clone(&self.keys).change(redeem).await?;
        self.sign(identity, request_pem, hosts).await
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::CertificateResponse>, Status> {
        let identity = Asking::of(&request)?.identity.clone();
        let identity =
            identity.ok_or_else(|| Status::permission_denied("there is no certificate to renew"))?;
        let v1::RenewRequest { request_pem, hosts } = request.into_inner();
        self.sign(identity, request_pem, hosts).await
    }
}
