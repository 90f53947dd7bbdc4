//! Where the programs under test are.

use std::{
    env,
    path::{Path, PathBuf},
};

/// A binary of the workspace.
pub fn binary(name: &str) -> PathBuf {
    there(env::var_os("SHAPER_BIN_DIR").map_or_else(|| target("debug"), PathBuf::from).join(name))
}

/// What stands for NVIDIA's library.
pub fn fake_nvml() -> PathBuf {
    let folder = env::var_os("SHAPER_BIN_DIR").map_or_else(|| target("debug"), PathBuf::from);
    there(folder.join("deps/libshaper_fake_nvml.so"))
}

/// The kernel programs.
pub fn bpf_object() -> PathBuf {
    there(env::var_os("SHAPER_BPF_OBJECT").map_or_else(|| target("bpf/shaper.bpf.o"), PathBuf::from))
}

/// etcd: on PATH, or where `cargo xtask setup` puts it.
pub fn etcd() -> PathBuf {
    tool("etcd")
}

/// A program that tests need: on PATH, or where `cargo xtask` puts it.
pub fn tool(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    there(found.unwrap_or_else(|| target(&format!("tools/bin/{name}"))))
}

fn target(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(below)
}

fn there(path: PathBuf) -> PathBuf {
    match path.canonicalize() {
        Ok(path) => path,
        Err(error) => panic!("{}: {error}; `./x test` builds everything and runs the tests", path.display()),
    }
}
