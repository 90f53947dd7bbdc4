//! Compiles the protos with protox: no protoc is needed.

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=shaper");
    println!("cargo::rerun-if-changed=scale");
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).open_files(["shaper/v1/agent.proto", "shaper/v1/broker.proto"])?;
    // With the comments, for whoever asks by reflection, and for the reference (docs/api.md).
    compiler.include_source_info(true);
    let descriptors = Path::new(&env::var("OUT_DIR")?).join("shaper.v1.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    compiler.include_source_info(false);
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    // What others have named; the descriptors above are of shaper's own services.
    let mut others = protox::Compiler::new(["."])?;
    others.include_imports(true).open_files([
        "scale/externalgrpc.proto",
        "scale/keda.proto",
        "scale/node.proto",
    ])?;
    tonic_prost_build::configure().compile_fds(others.file_descriptor_set())?;
    Ok(())
}
