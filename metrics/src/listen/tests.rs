//! The listener, over real sockets.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinHandle,
};

use super::*;
use shaper_identity::files;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
    directory: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn one() -> Option<Exposition> {
    let mut exposition = Exposition::default();
    exposition.add(&table::BUILD, &["shaper-test".to_owned(), "1".to_owned()], &[], Value::Info);
    Some(exposition)
}

async fn serve() -> Server {
    let directory = tempfile::tempdir().unwrap();
    let token_file = directory.path().join("token");
    files::replace(&token_file, TOKEN.as_bytes(), 0o600).unwrap();
    let address = Address::Tcp { address: "127.0.0.1:0".parse().unwrap(), token_file, tls_dir: None };
    let listener = Listener::bind(&Config { address }).await.unwrap();
    let Bound::Tcp { listener: tcp, .. } = &listener.0 else { panic!("it listens on TCP") };
    let address = tcp.local_addr().unwrap();
    let task = tokio::spawn(listener.serve(|| async { one() }));
    Server { address, task, directory }
}

impl Server {
    /// What is answered to a request, all of it.
    async fn ask(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // Who is refused before the end of the request may find the connection closed.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    async fn get(&self, path: &str, headers: &str) -> String {
        self.ask(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await
    }
}

fn with(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[tokio::test]
async fn who_shows_the_token_gets_what_they_accept() {
    let server = serve().await;
    let answer = server.get("/metrics", &with(TOKEN)).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.contains("shaper_build_info{daemon=\"shaper-test\",version=\"1\"} 1\n"), "{answer}");
    let open = format!("{}Accept: application/openmetrics-text;version=1.0.0\r\n", with(TOKEN));
    let answer = server.get("/metrics?x=1", &open).await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"), "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
}

#[tokio::test]
async fn nobody_else_gets_anything_and_is_counted() {
    let server = serve().await;
    let others = [
        String::new(),
        with(""),
        with(&TOKEN[1..]),
        with(&format!("{TOKEN}0")),
        format!("Authorization: Basic {TOKEN}\r\n"),
        format!("Authorization: {TOKEN}\r\n"),
        // Of two nobody knows which counts.
        with(TOKEN) + &with("other"),
    ];
    for headers in &others {
        for path in ["/metrics", "/"] {
            let answer = server.get(path, headers).await;
            assert!(answer.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{headers}: {answer}");
            assert!(answer.contains("www-authenticate: Bearer"), "{answer}");
            assert!(!answer.contains("shaper_build_info"), "{answer}");
        }
    }
    let answer = server.get("/metrics", &with(TOKEN)).await;
    let refused = format!("shaper_metrics_requests_refused_total{{reason=\"token\"}} {}\n", others.len() * 2);
    assert!(answer.contains(&refused), "{answer}");
}

#[tokio::test]
async fn what_is_too_large_or_something_else_is_refused() {
    let server = serve().await;
    let token = with(TOKEN);
    let long = "x".repeat(LONGEST_HEAD);
    let many = "X: y\r\n".repeat(MOST_HEADERS + 1);
    for (request, status) in [
        (format!("GET / HTTP/1.1\r\n{token}\r\n"), "404"),
        (format!("GET /metrics/ HTTP/1.1\r\n{token}\r\n"), "404"),
        (format!("DELETE /metrics HTTP/1.1\r\n{token}\r\n"), "405"),
        (format!("POST /metrics HTTP/1.1\r\n{token}Content-Length: 1\r\n\r\nx"), "405"),
        (format!("GET /metrics HTTP/1.1\r\n{token}Content-Length: 1\r\n\r\nx"), "413"),
        (format!("GET /metrics HTTP/1.1\r\n{token}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), "413"),
        (format!("GET /metrics HTTP/1.1\r\n{token}X: {long}\r\n\r\n"), "431"),
        (format!("GET /metrics HTTP/1.1\r\n{token}{many}\r\n"), "431"),
        ("what is this?\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = server.ask(request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
        assert!(!answer.contains("shaper_build_info"), "{answer}");
    }
    let answer = server.get("/metrics", &token).await;
    for (reason, count) in [("path", 2), ("method", 2), ("body", 2)] {
        assert!(answer.contains(&format!("{{reason=\"{reason}\"}} {count}\n")), "{answer}");
    }
}

#[tokio::test]
async fn another_token_holds_at_once_and_a_broken_file_changes_nothing() {
    let server = serve().await;
    let file = server.directory.path().join("token");
    let other = TOKEN.replace('0', "f");
    files::replace(&file, other.as_bytes(), 0o600).unwrap();
    assert!(server.get("/metrics", &with(TOKEN)).await.starts_with("HTTP/1.1 401"));
    assert!(server.get("/metrics", &with(&other)).await.starts_with("HTTP/1.1 200"));
    files::replace(&file, b"", 0o600).unwrap();
    assert!(server.get("/metrics", &with(&other)).await.starts_with("HTTP/1.1 200"));
    assert!(server.get("/metrics", &with("")).await.starts_with("HTTP/1.1 401"));
}

#[tokio::test]
async fn there_are_only_so_many_connections() {
    let server = serve().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(TcpStream::connect(server.address).await.unwrap());
    }
    // They were accepted in their order, so this one comes after them.
    assert_eq!(server.get("/metrics", &with(TOKEN)).await, "");
    drop(held);
    loop {
        let answer = server.get("/metrics", &with(TOKEN)).await;
        if answer.contains("{reason=\"connections\"} ") {
            assert!(!answer.contains("{reason=\"connections\"} 0\n"), "{answer}");
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_socket_is_for_its_group_and_takes_no_token() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.sock");
    let group = rustix::process::getegid().as_raw();
    let config = Config { address: Address::Socket { path: path.clone(), group } };
    let listener = Listener::bind(&config).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let task = tokio::spawn(listener.serve(|| async { one() }));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(!path.exists());
}

#[tokio::test]
async fn a_daemon_that_cannot_say_anything_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.sock");
    let group = rustix::process::getegid().as_raw();
    let config = Config { address: Address::Socket { path: path.clone(), group } };
    let task = tokio::spawn(Listener::bind(&config).await.unwrap().serve(|| async { None }));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    task.abort();
}

#[tokio::test]
async fn with_a_certificate_there_is_no_plain_text() {
    use shaper_identity::{pki::Authority, tls::Material};
    let directory = tempfile::tempdir().unwrap();
    let (ca, tls, token_file) =
        (directory.path().join("ca"), directory.path().join("n1"), directory.path().join("token"));
    let authority = Authority::create(&ca, "d").unwrap();
    let day = Duration::from_secs(86_400);
    authority.issue(&tls, &"spiffe://d/node/n1".parse().unwrap(), &["127.0.0.1".to_owned()], day).unwrap();
    files::replace(&token_file, TOKEN.as_bytes(), 0o600).unwrap();
    let address =
        Address::Tcp { address: "127.0.0.1:0".parse().unwrap(), token_file, tls_dir: Some(tls.clone()) };
    let listener = Listener::bind(&Config { address }).await.unwrap();
    let Bound::Tcp { listener: tcp, .. } = &listener.0 else { panic!("it listens on TCP") };
    let address = tcp.local_addr().unwrap();
    let task = tokio::spawn(listener.serve(|| async { one() }));

    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(shaper_identity::pki::certificates(authority.pem()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let fetch = |name: &'static str| {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client.clone()));
        async move {
            let stream = TcpStream::connect(address).await.unwrap();
            let mut stream = connector.connect(name.try_into().unwrap(), stream).await?;
            let request = format!("GET /metrics HTTP/1.1\r\n{}\r\n", with(TOKEN));
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            io::Result::Ok(answer)
        }
    };
    // As Prometheus does: by the host, not by the name of shaper's own.
    assert!(fetch("127.0.0.1").await.unwrap().starts_with("HTTP/1.1 200 OK"));
    assert!(fetch("127.0.0.2").await.is_err());
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    // Another certificate is in use with the next connection.
    let before = Material::load(&tls).unwrap().fingerprint;
    authority.issue(&tls, &"spiffe://d/node/n1".parse().unwrap(), &["127.0.0.2".to_owned()], day).unwrap();
    assert_ne!(Material::load(&tls).unwrap().fingerprint, before);
    assert!(fetch("127.0.0.2").await.unwrap().starts_with("HTTP/1.1 200 OK"));
    task.abort();
}
