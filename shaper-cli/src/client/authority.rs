//! The authority: who signs certificates.

use std::{path::Path, sync::Arc, time::Duration};

use shaper_identity::{Identity, Role, tls, tls::Material, token::Token};
use shaper_proto::v1::{self, enrolment_client::EnrolmentClient};
use tonic::transport::Channel;

use super::{CallError, ConnectError, Link, Peer};

/// A connection to an authority.
pub(crate) struct Authority {
    link: Link,
}

/// What an authority signed, as PEM.
pub(crate) struct Signed {
    pub(crate) certificate: String,
    pub(crate) authorities: String,
}

impl From<v1::CertificateResponse> for Signed {
    fn from(response: v1::CertificateResponse) -> Signed {
        let v1::CertificateResponse { certificate_pem, authorities_pem } = response;
        Signed { certificate: certificate_pem, authorities: authorities_pem }
    }
}

impl Authority {
    /// With the certificate in a directory.
    pub(crate) async fn connect(address: &str, directory: &Path) -> Result<Authority, ConnectError> {
        let config = Material::load(directory).and_then(|material| material.client(&[Role::Authority]));
        let config = config.map_err(|error| ConnectError::Certificate(Box::new(error)))?;
        Ok(Authority { link: Link::connect_over_tls(Peer::Authority, address, config).await? })
    }

    /// Without a certificate. The token says which authority is the right one.
    pub(crate) async fn connect_as_stranger(address: &str, token: &Token) -> Result<Authority, ConnectError> {
        let config = tls::stranger(&token.authority).map_err(|error| ConnectError::Tls(error.to_string()))?;
        Ok(Authority { link: Link::connect_over_tls(Peer::Authority, address, Arc::clone(&config)).await? })
    }

    fn client(&self) -> EnrolmentClient<Channel> {
        EnrolmentClient::new(self.link.channel.clone())
    }

    /// A token with which somebody joins as `identity`.
    pub(crate) async fn create_token(
        &self,
        identity: &Identity,
        valid: Duration,
    ) -> Result<String, CallError> {
        let operation = format!("make a token for {identity}");
        let request =
            v1::CreateTokenRequest { identity: identity.to_string(), valid_seconds: valid.as_secs() };
        let v1::CreateTokenResponse { token, expires_unix_seconds: _ } =
            self.link.answer(operation, self.client().create_token(request).await)?;
        Ok(token)
    }

    /// Uses a token up.
    pub(crate) async fn join(
        &self,
        token: &Token,
        request_pem: String,
        hosts: Vec<String>,
    ) -> Result<Signed, CallError> {
        let (token_id, secret) = (token.id.clone(), token.secret.clone());
        let request = v1::JoinRequest { token_id, secret, request_pem, hosts };
        self.link.answer("join", self.client().join(request).await).map(Into::into)
    }

    /// Another certificate for who we are.
    pub(crate) async fn renew(&self, request_pem: String, hosts: Vec<String>) -> Result<Signed, CallError> {
        let request = v1::RenewRequest { request_pem, hosts };
        self.link.answer("renew the certificate", self.client().renew(request).await).map(Into::into)
    }
}
