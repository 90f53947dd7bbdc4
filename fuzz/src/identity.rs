//! Names in certificates, the file of identities, tokens, and what a stranger sends to get a certificate.

use std::path::Path;

use shaper_core::spec::Priority;
use shaper_identity::{
    Identity, Role,
    access::Access,
    address::Address,
    name::Holder,
    pki,
    token::{Token, Tokens, fingerprint},
};

fn identity(identity: &Identity) {
    assert_eq!(identity.to_string().parse().as_ref(), Ok(identity));
    for part in [identity.trust_domain(), identity.name()] {
        assert!((1..=63).contains(&part.len()), "{part:?}");
        assert!(part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)), "{part:?}");
    }
    assert!(identity.trust_domain().bytes().all(|byte| !byte.is_ascii_uppercase()));
}

/// A certificate that somebody shows.
pub fn certificate(data: &[u8]) {
    match Holder::of(data) {
        Ok(holder) => {
            identity(&holder.identity);
            assert!(holder.serial.len() <= 2 * data.len() && holder.hosts.len() <= data.len());
            assert!(holder.hosts.iter().all(|host| host.len() <= data.len()));
            let access = Access::default();
            assert_eq!(access.distrust(&holder, holder.not_after).is_some(), true);
            assert!(access.grant(&holder.identity).is_none());
        }
        Err(error) => assert!(error.to_string().len() < 2048, "{error}"),
    }
    if let Ok(pem) = std::str::from_utf8(data) {
        for der in pki::certificates(pem) {
            let _ = Holder::of(&der);
        }
    }
}

/// The broker's file of identities.
pub fn identities(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(found) = text.parse::<Identity>() {
        identity(&found);
        assert_eq!(found.to_string(), text);
    }
    if let Ok(address) = text.parse::<Address>()
        && let Address::Tls(_) = &address
    {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    let access = match Access::parse(text, Path::new("f")) {
        Ok(access) => access,
        Err(error) => {
            assert!(error.to_string().len() < 16 << 10);
            return;
        }
    };
    // Of whoever is named in it, and of who is almost.
    for word in text.split(|letter: char| letter.is_whitespace() || "\"',[]{}".contains(letter)) {
        let Ok(found) = word.parse::<Identity>() else { continue };
        let Some(grant) = access.grant(&found) else { continue };
        assert_eq!(found.role(), Role::Submitter);
        assert!(grant.uid != 0 && grant.gid != 0 && !grant.groups.contains(&0), "{found} may be root");
        assert!(!grant.namespaces.is_empty() && grant.max_priority <= Priority::High);
        let longer = Identity::new(found.trust_domain(), found.role(), &format!("{}x", found.name()));
        if let Ok(longer) = longer {
            assert!(access.grant(&longer).is_none() || text.contains(longer.name()));
        }
    }
}

/// A token that somebody shows, and the open ones that the broker keeps.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.reveal(), text.trim());
        assert!(!format!("{token:?}").contains(&token.secret));
        let mut tokens = Tokens::default();
        assert!(tokens.redeem(&token.id, &token.secret, 0).is_err(), "of nobody's making");
    }
    let Ok(mut tokens) = serde_json::from_slice::<Tokens>(data) else { return };
    let written = serde_json::to_vec(&tokens).expect("what was read can be written");
    let again: Tokens = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(serde_json::to_vec(&again).ok(), Some(written));
    // Nobody guesses.
    let ids: Vec<String> = text.split('"').map(str::to_owned).collect();
    for id in &ids {
        assert!(tokens.redeem(id, id, i64::MIN).is_err() || text.contains(&fingerprint(id.as_bytes())));
    }
}
