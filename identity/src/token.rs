//! Tokens with which a node or a person joins: each works once, for one identity, for a while.
//!
//! A token reads `ID.SECRET.CA`. The authority keeps a hash of the secret. `CA` is the hash of its certificate, by which
//! the one who joins knows it before it has any certificate.

use std::collections::BTreeMap;

use ring::{
    digest::{SHA256, digest},
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::Identity;

/// Tokens that may be open at once.
const MOST: usize = 1000;

/// In hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of it, in hexadecimal.
pub fn fingerprint(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

/// Two secrets, in a time that does not depend on where they differ.
pub fn is_same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// Why there is no token, or why it does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not of the form.
    #[error("that is not a token: it reads ID.SECRET.CA, as `shaper pki token` printed it")]
    Form,
    /// One answer for unknown, used and wrong ones: whoever guesses learns nothing.
    #[error("the token is not known, was used before or has expired; make another: shaper pki token")]
    Refused,
    /// Too many.
    #[error("{MOST} tokens are open already; wait until some have expired")]
    TooMany,
    /// The kernel gave no random bytes.
    #[error("the kernel gives no random bytes")]
    NoRandom,
}

/// A token, as its holder has it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Which.
    pub id: String,
    /// What proves it.
    pub secret: String,
    /// Hash of the authority's certificate.
    pub authority: String,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Token {
    /// As text, for its holder alone.
    pub fn reveal(&self) -> String {
        format!("{}.{}.{}", self.id, self.secret, self.authority)
    }
}

impl std::str::FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let is_hex =
            |part: &str, length: usize| part.len() == length && part.bytes().all(|b| b.is_ascii_hexdigit());
        match text.trim().split('.').collect::<Vec<_>>()[..] {
            [id, secret, authority] if is_hex(id, 16) && is_hex(secret, 64) && is_hex(authority, 64) => {
                Ok(Token { id: id.into(), secret: secret.into(), authority: authority.into() })
            }
            _ => Err(TokenError::Form),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Open {
    secret_sha256: String,
    identity: Identity,
    expires: i64,
}

/// The open tokens, as the authority keeps them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tokens {
    open: BTreeMap<String, Open>,
}

impl Tokens {
    /// A token for `identity`, until `expires` (seconds since 1970).
    pub fn make(
        &mut self,
        identity: Identity,
        authority: &str,
        now: i64,
        expires: i64,
    ) -> Result<Token, TokenError> {
        self.open.retain(|_, open| open.expires > now);
        if self.open.len() >= MOST {
            return Err(TokenError::TooMany);
        }
        let mut bytes = [0; 40];
        SystemRandom::new().fill(&mut bytes).map_err(|_| TokenError::NoRandom)?;
        let (id, secret) = (hex(&bytes[..8]), hex(&bytes[8..]));
        let open = Open { secret_sha256: fingerprint(secret.as_bytes()), identity, expires };
        self.open.insert(id.clone(), open);
        Ok(Token { id, secret, authority: authority.to_owned() })
    }

    /// Uses a token up. A wrong secret leaves it as it is: who knows no secret must not be able to end a token.
    pub fn redeem(&mut self, id: &str, secret: &str, now: i64) -> Result<Identity, TokenError> {
        let open = self.open.get(id).ok_or(TokenError::Refused)?;
        if !is_same(&open.secret_sha256, &fingerprint(secret.as_bytes())) || open.expires <= now {
            return Err(TokenError::Refused);
        }
        self.open.remove(id).map(|open| open.identity).ok_or(TokenError::Refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n1() -> Identity {
        "spiffe://d/node/n1".parse().unwrap()
    }

    #[test]
    fn a_token_works_once_before_it_expires_and_with_its_secret() {
        let mut tokens = Tokens::default();
        let ca = fingerprint(b"ca");
        let token = tokens.make(n1(), &ca, 100, 200).unwrap();
        assert_eq!(token.reveal().parse::<Token>().unwrap(), token);
        assert!(!format!("{token:?}{tokens:?}").contains(&token.secret));
        let kept = serde_json::to_string(&tokens).unwrap();
        assert!(!kept.contains(&token.secret), "{kept}");
        let mut tokens: Tokens = serde_json::from_str(&kept).unwrap();
        let wrong = format!("{}0", &token.secret[..63]);
        let wrong = if wrong == token.secret { format!("{}1", &token.secret[..63]) } else { wrong };
        for (id, secret, now) in [
            (token.id.as_str(), wrong.as_str(), 150),
            ("0000000000000000", token.secret.as_str(), 150),
            (token.id.as_str(), "", 150),
            (token.id.as_str(), token.secret.as_str(), 200),
        ] {
            assert_eq!(tokens.redeem(id, secret, now), Err(TokenError::Refused), "{id} {now}");
        }
        assert_eq!(tokens.redeem(&token.id, &token.secret, 199), Ok(n1()));
        assert_eq!(tokens.redeem(&token.id, &token.secret, 199), Err(TokenError::Refused));
    }

    #[test]
    fn there_are_only_so_many_and_the_expired_make_room() {
        let mut tokens = Tokens::default();
        for _ in 0..MOST {
            tokens.make(n1(), "", 0, 10).unwrap();
        }
        assert_eq!(tokens.make(n1(), "", 9, 20), Err(TokenError::TooMany));
        assert!(tokens.make(n1(), "", 10, 20).is_ok());
    }

    #[test]
    fn what_is_no_token_is_not_read_as_one() {
        let x = "a".repeat(64);
        for bad in ["", "..", "a.b.c", &format!("aa.{x}.{x}"), &format!("{}.{x}.{x}.{x}", "a".repeat(16))] {
            assert_eq!(bad.parse::<Token>(), Err(TokenError::Form), "{bad}");
        }
    }
}
