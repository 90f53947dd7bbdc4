//! What the tests run as a task: something that uses one resource, in a known way, until it is ended.
#![forbid(unsafe_code)]

use std::{
    env,
    hint::black_box,
    io::{self, Write},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    thread,
    time::Duration,
};

const USAGE: &str = "\
usage: test-load spin                 uses one CPU
       test-load send ADDRESS FLOWS   sends zeros on that many connections
       test-load eat MIB              takes memory, says so, and keeps it
       test-load tick COUNT CODE      prints a line every 100 ms, and exits with CODE";

const TICK: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["spin"] => spin(),
        ["send", address, flows] => match (address.parse(), flows.parse()) {
            (Ok(address), Ok(flows)) => send(address, flows),
            _ => return usage(),
        },
        ["eat", mib] => match mib.parse() {
            Ok(mib) => eat(mib),
            Err(_) => return usage(),
        },
        ["tick", count, code] => match (count.parse(), code.parse::<u8>()) {
            (Ok(count), Ok(code)) => tick(count).map(|()| ExitCode::from(code)),
            _ => return usage(),
        },
        _ => return usage(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("test-load: {error}");
        ExitCode::FAILURE
    })
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn spin() -> io::Result<ExitCode> {
    loop {
        black_box(());
    }
}

/// Ends when the first of the connections does.
fn send(address: SocketAddr, flows: usize) -> io::Result<ExitCode> {
    let (failed, failures) = std::sync::mpsc::channel();
    for _ in 0..flows {
        let mut stream = TcpStream::connect(address)?;
        let failed = failed.clone();
        thread::spawn(move || {
            let zeros = vec![0; 128 << 10];
            let error = loop {
                if let Err(error) = stream.write_all(&zeros) {
                    break error;
                }
            };
            // The first to fail is heard; nobody waits for the others.
            let _ = failed.send(error);
        });
    }
    drop(failed);
    Err(failures.recv().unwrap_or_else(|_| io::ErrorKind::InvalidInput.into()))
}

fn eat(mib: usize) -> io::Result<ExitCode> {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    for _ in 0..mib {
        // Not zeros: those would not be touched.
        eaten.push(black_box(vec![1; 1 << 20]));
    }
    say(&format!("ate {mib} MiB"))?;
    loop {
        thread::park();
        black_box(&eaten);
    }
}

fn tick(count: u32) -> io::Result<()> {
    for number in 1..=count {
        say(&format!("tick {number}"))?;
        thread::sleep(TICK);
    }
    Ok(())
}

fn say(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush())
}
