//! What stands before every page: which requests are read at all, and what browsers are told to refuse.

use axum::body::HttpBody;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};

/// Nothing is loaded but from here, and nothing is in line; nobody puts the page into a frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// Why a request is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Nothing is changed here.
    #[error("this page only shows: GET and HEAD are all that it takes")]
    Method,
    /// And nothing is sent.
    #[error("no body is read here")]
    Body,
    /// A page of another name was made to point here.
    #[error(
        "this page is not served under that name; ask for it by the address of --web, or have the broker told of the name: \
         --web-host NAME"
    )]
    Host,
    /// Another page asks.
    #[error("another site sent this request; open the page itself: shaper ui prints its address")]
    CrossSite,
}

impl Refusal {
    /// What HTTP calls it.
    pub(super) fn status(self) -> StatusCode {
        match self {
            Refusal::Method => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::Body => StatusCode::PAYLOAD_TOO_LARGE,
            Refusal::Host => StatusCode::MISDIRECTED_REQUEST,
            Refusal::CrossSite => StatusCode::FORBIDDEN,
        }
    }
}

/// The host of `name:port`, without the port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) && !host.is_empty() => host,
        _ => authority,
    }
}

/// The one value of a header; two are none.
fn only(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Whether a request is read: of a page that is found under these names.
pub(super) fn check<B: HttpBody>(request: &Request<B>, hosts: &[String]) -> Result<(), Refusal> {
    let headers = request.headers();
    // A port may be another's, at the other end of a tunnel; what a page of another name cannot change is its name.
    let host = only(headers, header::HOST).ok_or(Refusal::Host)?;
    let named = host_of(host).to_ascii_lowercase();
    if !hosts.contains(&named) || request.uri().authority().is_some_and(|other| other.as_str() != host) {
        return Err(Refusal::Host);
    }
    if headers.contains_key(header::ORIGIN) {
        let origin = only(headers, header::ORIGIN).and_then(|origin| origin.parse::<Uri>().ok());
        let from = origin.as_ref().and_then(Uri::authority);
        let is_own = from.is_some_and(|from| from.as_str() == host);
        if !is_own {
            return Err(Refusal::CrossSite);
        }
    }
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    if site.is_some_and(|site| site != b"same-origin" && site != b"none") {
        return Err(Refusal::CrossSite);
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Refusal::Method);
    }
    if !request.body().is_end_stream() {
        return Err(Refusal::Body);
    }
    Ok(())
}

/// Puts the headers of every answer on this one.
pub(super) fn harden(headers: &mut HeaderMap) {
    for (name, value) in [
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // What somebody may see now is not what a browser may show later.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn checked(headers: &[(&str, &str)], method: Method, body: &'static str) -> Result<(), Refusal> {
        let mut request = Request::builder().uri("/").method(method);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_empty() { Body::empty() } else { Body::from(body) };
        let hosts = ["127.0.0.1".to_owned(), "localhost".to_owned(), "[::1]".to_owned()];
        check(&request.body(body).unwrap(), &hosts)
    }

    #[test]
    fn web_requests_name_a_host_of_the_list() {
        for host in ["127.0.0.1:9780", "localhost", "LOCALHOST:1", "[::1]:9780", "[::1]"] {
            assert_eq!(checked(&[("host", host)], Method::GET, ""), Ok(()), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:9780", "localhost:x", "", ":9780", "127.0.0.2"] {
            assert_eq!(checked(&[("host", host)], Method::GET, ""), Err(Refusal::Host), "{host}");
        }
        assert_eq!(checked(&[], Method::GET, ""), Err(Refusal::Host));
        let twice = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(checked(&twice, Method::GET, ""), Err(Refusal::Host));
    }

    #[test]
    fn web_requests_of_other_sites_and_those_that_would_change_something_are_refused() {
        let host = ("host", "localhost:9780");
        for own in [
            ("origin", "http://localhost:9780"),
            ("sec-fetch-site", "none"),
            ("sec-fetch-site", "same-origin"),
        ] {
            assert_eq!(checked(&[host, own], Method::GET, ""), Ok(()), "{own:?}");
        }
        for other in [
            ("origin", "http://evil.example"),
            ("origin", "http://localhost:9781"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert_eq!(checked(&[host, other], Method::GET, ""), Err(Refusal::CrossSite), "{other:?}");
        }
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
            assert_eq!(checked(&[host], method, ""), Err(Refusal::Method));
        }
        assert_eq!(checked(&[host], Method::GET, "body"), Err(Refusal::Body));
    }
}
