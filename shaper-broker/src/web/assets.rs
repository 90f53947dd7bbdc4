//! Style and script, part of the program. Each has its hash in its address, so that a browser keeps it for good and asks
//! for another as soon as it changes.

use std::sync::LazyLock;

use axum::body::Body;
use http::{HeaderValue, Response, StatusCode, header};
use shaper_identity::token::fingerprint;

/// Letters of a hash in an address.
const HASH: usize = 16;

/// A file.
pub(super) struct Asset {
    name: &'static str,
    content_type: &'static str,
    content: &'static str,
}

const ASSETS: [Asset; 5] = [
    Asset { name: "icon.svg", content_type: "image/svg+xml", content: include_str!("assets/icon.svg") },
    Asset {
        name: "page.css",
        content_type: "text/css; charset=utf-8",
        content: include_str!("assets/page.css"),
    },
    Asset {
        name: "page.js",
        content_type: "text/javascript; charset=utf-8",
        content: include_str!("assets/page.js"),
    },
    Asset {
        name: "uplot.css",
        content_type: "text/css; charset=utf-8",
        content: include_str!("assets/uPlot-1.6.32.min.css"),
    },
    Asset {
        name: "uplot.js",
        content_type: "text/javascript; charset=utf-8",
        content: include_str!("assets/uPlot-1.6.32.min.js"),
    },
];

static ADDRESSES: LazyLock<[String; ASSETS.len()]> = LazyLock::new(|| {
    ASSETS.map(|asset| {
        let hash = fingerprint(asset.content.as_bytes());
        format!("/assets/{}/{}", hash.get(..HASH).unwrap_or_default(), asset.name)
    })
});

/// Where this one is; it is one of [`ASSETS`].
pub(super) fn address(name: &str) -> &'static str {
    let place = ASSETS.iter().position(|asset| asset.name == name);
    place.and_then(|place| ADDRESSES.get(place)).map_or("/assets/", String::as_str)
}

/// What is at an address.
pub(super) fn at(path: &str) -> Option<Response<Body>> {
    let asset = &ASSETS[ADDRESSES.iter().position(|address| address == path)?];
    let mut response = Response::new(Body::from(asset.content));
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(asset.content_type));
    let forever = HeaderValue::from_static("public, max-age=31536000, immutable");
    headers.insert(header::CACHE_CONTROL, forever);
    Some(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_assets_are_at_the_addresses_of_their_content() {
        for asset in ASSETS {
            let address = address(asset.name);
            assert!(address.ends_with(asset.name) && at(address).is_some(), "{address}");
            assert!(at(&address.replace("/assets/", "/assets/0")).is_none());
        }
        assert!(at("/assets/").is_none() && at("/assets/../web.rs").is_none());
    }

    #[test]
    fn web_assets_of_others_are_those_that_their_page_of_origin_tells() {
        let told = include_str!("assets/README.md");
        for vendored in [
            include_str!("assets/uPlot-1.6.32.min.css"),
            include_str!("assets/uPlot-1.6.32.min.js"),
            include_str!("assets/uPlot-LICENSE"),
        ] {
            assert!(told.contains(&fingerprint(vendored.as_bytes())));
        }
    }
}
