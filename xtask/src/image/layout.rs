//! An image of one layer as an OCI image layout in a tar archive, `oci-archive` (image-spec 1.1: image-layout.md, manifest.md,
//! config.md). The layer is not compressed: a registry's tool may do that, and what it is then called is not ours to say.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};

use super::layer::{Layer, append};
use super::{About, VERSION, whole};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Where programs of the image are found by name.
const PATH: &str = "PATH=/usr/bin:/usr/lib/shaper";

/// What names a blob.
#[derive(Serialize)]
struct Descriptor {
    #[serde(rename = "mediaType")]
    media_type: &'static str,
    digest: String,
    size: u64,
}

/// Blobs by the hexadecimal digits of their digests.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, media_type: &'static str, data: Vec<u8>) -> Descriptor {
        let digits: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
        let descriptor =
            Descriptor { media_type, digest: format!("sha256:{digits}"), size: data.len() as u64 };
        self.0.insert(digits, data);
        descriptor
    }

    fn add_json(&mut self, media_type: &'static str, document: &serde_json::Value) -> Result<Descriptor> {
        Ok(self.add(media_type, text(document)?))
    }
}

/// Keys are sorted, so that the same document is the same text.
fn text(document: &serde_json::Value) -> Result<Vec<u8>> {
    serde_json::to_vec(document).context("cannot write JSON")
}

/// Writes the archive, and returns the digest of the image's manifest.
pub(super) fn write(layer: &Layer, about: &About, to: &Path) -> Result<String> {
    let mut blobs = Blobs::default();
    let layer = blobs.add(LAYER, layer.write(about.seconds(), Vec::new())?);
    let created = about.created()?;
    let config = blobs.add_json(
        CONFIG,
        &json!({
            "created": created,
            "architecture": about.architecture,
            "os": "linux",
            "config": {"Env": [PATH], "WorkingDir": "/", "Labels": about.labels},
            // Of a layer that is not compressed it is the blob's own.
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
            "history": [{"created": created, "created_by": "cargo xtask image"}],
        }),
    )?;
    let manifest = blobs.add_json(
        MANIFEST,
        &json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer],
            "annotations": about.labels,
        }),
    )?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [{
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": manifest.size,
            "platform": {"architecture": about.architecture, "os": "linux"},
            "annotations": {"org.opencontainers.image.ref.name": VERSION},
        }],
    });
    whole(to, |file| {
        let mut archive = Builder::new(file);
        let mut add = |path: &str, kind, data: &[u8]| {
            let mode = if kind == EntryType::Directory { 0o755 } else { 0o644 };
            append(&mut archive, path, kind, mode, about.seconds(), data)
        };
        // What says that it is a layout comes first, for those who read no further.
        add("oci-layout", EntryType::Regular, &text(&json!({"imageLayoutVersion": "1.0.0"}))?)?;
        add("index.json", EntryType::Regular, &text(&index)?)?;
        add("blobs", EntryType::Directory, &[])?;
        add("blobs/sha256", EntryType::Directory, &[])?;
        for (digits, data) in &blobs.0 {
            add(&format!("blobs/sha256/{digits}"), EntryType::Regular, data)?;
        }
        archive.finish().context("cannot write the archive")
    })?;
    Ok(manifest.digest)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use serde_json::Value;
    use time::OffsetDateTime;

    use super::*;

    fn about() -> About {
        About {
            architecture: "amd64",
            created: OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap(),
            labels: BTreeMap::from([("org.opencontainers.image.title", "shaper".to_owned())]),
        }
    }

    fn layer() -> Layer {
        let mut layer = Layer::default();
        layer.file("usr/lib/shaper/shaper-agent", 0o755, b"\x7fELF".to_vec()).unwrap();
        layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/nonexistent\n".to_vec()).unwrap();
        layer
    }

    /// An independent reading of the layout: files by their names.
    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            (String::from_utf8(entry.path_bytes().into_owned()).unwrap(), data)
        });
        entries.collect()
    }

    /// What a descriptor names, if its digest and size are those of what is there.
    fn blob<'f>(files: &'f BTreeMap<String, Vec<u8>>, descriptor: &Value, media_type: &str) -> &'f [u8] {
        assert_eq!(descriptor["mediaType"], media_type);
        let digest = descriptor["digest"].as_str().unwrap();
        let data = &files[&format!("blobs/{}", digest.replace(':', "/"))];
        let found: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            (digest, descriptor["size"].as_u64()),
            (&*format!("sha256:{found}"), Some(data.len() as u64))
        );
        data
    }

    #[test]
    fn the_layout_leads_from_the_index_to_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("image.tar");
        let digest = write(&layer(), &about(), &to).unwrap();
        let files = files(&fs::read(&to).unwrap());
        let json = |data: &[u8]| serde_json::from_slice::<Value>(data).unwrap();
        assert_eq!(json(&files["oci-layout"])["imageLayoutVersion"], "1.0.0");

        let index = json(&files["index.json"]);
        assert_eq!((&index["schemaVersion"], &index["mediaType"]), (&json!(2), &json!(INDEX)));
        let [named] = &index["manifests"].as_array().unwrap()[..] else { panic!("{index}") };
        assert_eq!(named["digest"], digest);
        assert_eq!(named["platform"], json!({"architecture": "amd64", "os": "linux"}));

        let manifest = json(blob(&files, named, MANIFEST));
        assert_eq!((&manifest["schemaVersion"], &manifest["mediaType"]), (&json!(2), &json!(MANIFEST)));
        let [layer] = &manifest["layers"].as_array().unwrap()[..] else { panic!("{manifest}") };
        let config = json(blob(&files, &manifest["config"], CONFIG));
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        assert_eq!(config["rootfs"]["diff_ids"], json!([layer["digest"]]));
        assert_eq!(config["config"]["Labels"]["org.opencontainers.image.title"], "shaper");
        assert!(config["config"].get("Entrypoint").is_none());

        let inside = self::files(blob(&files, layer, LAYER));
        assert_eq!(inside["usr/lib/shaper/shaper-agent"], b"\x7fELF");
        assert_eq!(inside.keys().filter(|name| !name.ends_with('/')).count(), 2);
        // Nothing is there that nothing names.
        assert_eq!(
            files.keys().filter(|name| name.starts_with("blobs/sha256/") && name.len() > 13).count(),
            3
        );
    }

    #[test]
    fn the_same_files_are_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["a.tar", "b.tar"].map(|name| folder.path().join(name));
        let digests = [&first, &second].map(|to| write(&layer(), &about(), to).unwrap());
        assert_eq!(digests[0], digests[1]);
        assert_eq!(fs::read(&first).unwrap(), fs::read(&second).unwrap());

        let mut other = layer();
        other.file("etc/group", 0o644, Vec::new()).unwrap();
        assert_ne!(write(&other, &about(), &second).unwrap(), digests[0]);
    }
}
