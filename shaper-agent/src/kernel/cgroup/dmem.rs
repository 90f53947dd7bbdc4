//! The files of the controller dmem (Documentation/admin-guide/cgroup-v2.rst, from 6.14 on): memory of devices, with a line for each
//! *region*, which a driver names, such as `drm/0000:03:00.0/vram0` or `nvidia/0000:65:00.0/vidmem`.

use std::collections::BTreeMap;

use shaper_core::{limits::Limit, units::Bytes};

use super::file::{Contents, File, Malformed, ReadOnly, Setting};

/// How much there is; at the root alone.
pub const CAPACITY: File<ByRegion<Bytes>, ReadOnly> = File::new("dmem.capacity");
/// In use.
pub const CURRENT: File<ByRegion<Bytes>, ReadOnly> = File::new("dmem.current");
/// What is refused beyond.
pub const MAX: File<ByRegion<Limit<Bytes>>, OfRegion> = File::new("dmem.max");

/// What a file says of each region.
pub type ByRegion<T> = BTreeMap<String, T>;

/// What is written for one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfRegion(pub String, pub Limit<Bytes>);

impl<T: Contents> Contents for ByRegion<T> {
    fn from_text(text: &str) -> Result<ByRegion<T>, Malformed> {
        let line = |line: &str| {
            let (region, value) = line.rsplit_once(' ').ok_or_else(|| Malformed::new(line))?;
            Ok((region.to_owned(), T::from_text(value)?))
        };
        text.lines().map(line).collect()
    }
}

impl Setting for OfRegion {
    fn text(&self) -> String {
        format!("{} {}", self.0, self.1.text())
    }
}

/// The region that is the memory of the card at this PCI address, such as `0000:03:00.0`. `None`: there is none, or
/// there are several, as of a card with two tiles, which no single limit would hold.
pub fn region_of(capacity: &ByRegion<Bytes>, pci: &str) -> Option<String> {
    let is_memory = |region: &&String| {
        let mut parts = region.rsplit('/');
        let (name, at) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        at.eq_ignore_ascii_case(pci) && (name.starts_with("vram") || name == "vidmem")
    };
    let mut found = capacity.keys().filter(is_memory);
    let region = found.next()?;
    found.next().is_none().then(|| region.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_a_line() {
        let text = "drm/0000:03:00.0/vram0 8514437120\ndrm/0000:03:00.0/stolen 67108864\nnvidia/0000:65:00.0/vidmem 5";
        let capacity = ByRegion::<Bytes>::from_text(text).unwrap();
        assert_eq!(capacity.len(), 3);
        assert_eq!(region_of(&capacity, "0000:03:00.0").as_deref(), Some("drm/0000:03:00.0/vram0"));
        assert_eq!(region_of(&capacity, "0000:65:00.0").as_deref(), Some("nvidia/0000:65:00.0/vidmem"));
        assert_eq!(region_of(&capacity, "0000:04:00.0"), None);
        let tiles =
            ByRegion::<Bytes>::from_text("drm/0000:03:00.0/vram0 1\ndrm/0000:03:00.0/vram1 1").unwrap();
        assert_eq!(region_of(&tiles, "0000:03:00.0"), None, "no single limit would hold");
        let max = ByRegion::<Limit<Bytes>>::from_text(
            "drm/0000:03:00.0/vram0 1073741824\ndrm/0000:03:00.0/stolen max",
        );
        let max = max.unwrap();
        assert_eq!(max["drm/0000:03:00.0/vram0"], Limit::At(Bytes(1 << 30)));
        assert_eq!(max["drm/0000:03:00.0/stolen"], Limit::Unlimited);
        assert_eq!(OfRegion("a/b/vram0".into(), Limit::At(Bytes(5))).text(), "a/b/vram0 5");
        assert_eq!(OfRegion("a/b/vram0".into(), Limit::Unlimited).text(), "a/b/vram0 max");
        assert_eq!(ByRegion::<Bytes>::from_text("").unwrap().len(), 0);
        assert!(ByRegion::<Bytes>::from_text("vram0").is_err());
    }
}
