//! How often a test does what it does again and again: a little of it with all the other tests, the whole of it as a
//! soak (`cargo xtask soak`), which also asks for the figures that are aimed at.

use std::env;

/// Part of the whole in a run of all tests.
const USUAL: (u32, u32) = (1, 20);

fn fraction() -> (u32, u32) {
    let Ok(text) = env::var("SHAPER_SOAK") else { return USUAL };
    let fraction =
        text.split_once('/').and_then(|(part, whole)| Some((part.parse().ok()?, whole.parse().ok()?)));
    fraction
        .filter(|(_, whole)| *whole > 0)
        .unwrap_or_else(|| panic!("SHAPER_SOAK=`{text}` is not a fraction"))
}

/// How often of `whole` times it is to be done now; once at least.
pub fn times(whole: u32) -> u32 {
    let (part, of) = fraction();
    (whole * part).div_ceil(of).max(1)
}

/// The same, of what takes long: in a run of all tests only so many `usual` times.
pub fn times_or(whole: u32, usual: u32) -> u32 {
    if env::var_os("SHAPER_SOAK").is_some() { times(whole) } else { usual }
}

/// Prints a figure, and in a soak asserts that it is as good as is aimed at: elsewhere, other work of this machine may be
/// to blame.
#[track_caller]
pub fn aim(figure: &str, is_met: bool) {
    println!("soak: {figure}");
    assert!(is_met || env::var_os("SHAPER_SOAK").is_none(), "not as aimed at: {figure}");
}
