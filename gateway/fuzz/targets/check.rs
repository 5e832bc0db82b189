//! No directory makes `check` panic or hang: four files of any text, one after the other, parted by a byte that is no UTF-8.

#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use isochrone_gateway::config::{Opened, load};
use libfuzzer_sys::fuzz_target;

/// A directory of this process's own, in memory where there is one.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let folder = place.join(format!("isochrone-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("regions")).expect("a folder");
        folder
    })
}

fuzz_target!(|data: &[u8]| {
    let files = ["gateway.toml", "regions/a.toml", "tenants.toml", "locations.toml"];
    let mut parts = data.split(|byte| *byte == 0xff);
    for name in files {
        std::fs::write(folder().join(name), parts.next().unwrap_or_default()).expect("written");
    }
    match load(folder(), &mut Opened::default()) {
        Ok(config) => assert!(!config.regions.is_empty() && !config.tenants.is_empty() && !config.listeners.is_empty()),
        Err(rejected) => {
            assert!(!rejected.problems.is_empty());
            rejected.problems.iter().for_each(|problem| drop(problem.to_string()));
        }
    }
});
