//! A Prometheus with a configuration and a store of its own.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use shaper_tests::{bins::tool, time::eventually};

/// It ends with this.
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
    address: String,
}

impl Server {
    /// One that scrapes a broker in plain text and an agent over TLS each second, with these alerts.
    pub(crate) fn start(directory: &Path, broker: &str, agent: &str, rules: &Path) -> Server {
        let (rules, directory_name) = (rules.display(), directory.display());
        let config = format!(
            "global: {{ scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s }}\n\
             rule_files: [\"{rules}\"]\n\
             scrape_configs:\n\
             - job_name: shaper-agent\n  scheme: https\n  tls_config: {{ ca_file: {directory_name}/ca.pem }}\n  \
             authorization: {{ credentials_file: {directory_name}/token }}\n  \
             static_configs: [{{ targets: [\"{agent}\"] }}]\n\
             - job_name: shaper-broker\n  \
             authorization: {{ credentials_file: {directory_name}/token }}\n  \
             static_configs: [{{ targets: [\"{broker}\"] }}]\n"
        );
        let file = directory.join("prometheus.yml");
        fs::write(&file, config).expect("a file can be written");
        let log = directory.join("prometheus.log");
        let mut command = Command::new(tool("prometheus"));
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", directory.join("tsdb").display()));
        command.args(["--web.listen-address=127.0.0.1:0", "--log.format=logfmt"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&log).expect("a file can be made"));
        let child = command.spawn().expect("prometheus can be started");
        let mut server = Server { child, log, address: String::new() };
        eventually("Prometheus listens", || {
            let said = server.said();
            let ready = said.contains("Server is ready to receive web requests");
            let listens = said.lines().find(|line| line.contains("msg=\"Listening on\""));
            let address = listens.and_then(|line| line.split("address=").nth(1)?.split_whitespace().next());
            server.address = address.unwrap_or_default().to_owned();
            ready && !server.address.is_empty()
        });
        server
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What it answers to a call.
    #[track_caller]
    fn call(&self, path: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address)
            .unwrap_or_else(|error| panic!("cannot connect to Prometheus: {error}\n{}", self.said()));
        // The older HTTP: its answer ends with the connection, and has no chunks.
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer}"));
        let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
        assert_eq!(body["status"], "success", "{path}: {body}");
        body["data"].clone()
    }

    /// Waits until both daemons were scraped.
    pub(crate) fn wait_for_targets(&self) {
        let mut targets = Value::Null;
        let up = |targets: &Value| {
            let active = targets["activeTargets"].as_array().expect("there are targets");
            active.len() == 2 && active.iter().all(|target| target["health"] == "up")
        };
        let all_are = shaper_tests::time::happens(|| {
            targets = self.call("/api/v1/targets?state=active");
            up(&targets)
        });
        assert!(all_are, "{targets:#}");
    }

    /// How many series a query has.
    #[track_caller]
    pub(crate) fn series(&self, query: &str) -> usize {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
        let encode = |byte: u8| match Some(byte).filter(is_plain) {
            Some(byte) => char::from(byte).to_string(),
            None => format!("%{byte:02X}"),
        };
        let query: String = query.bytes().map(encode).collect();
        let found = self.call(&format!("/api/v1/query?query={query}"));
        found["result"].as_array().map_or(0, Vec::len)
    }

    /// Whether every alert could be evaluated.
    pub(crate) fn rules_are_healthy(&self) -> bool {
        let groups = self.call("/api/v1/rules");
        let groups = groups["groups"].as_array().expect("there are groups");
        let rules: Vec<&Value> =
            groups.iter().flat_map(|group| group["rules"].as_array().expect("of rules")).collect();
        !rules.is_empty() && rules.iter().all(|rule| rule["health"] == "ok")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
