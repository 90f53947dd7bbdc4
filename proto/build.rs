//! Compiles the protos with protox: no protoc is needed.

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=shaper");
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).open_files(["shaper/v1/agent.proto", "shaper/v1/broker.proto"])?;
    let descriptors = Path::new(&env::var("OUT_DIR")?).join("shaper.v1.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
