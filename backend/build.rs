//! Lets the binary find libtorch where it was linked, so that nobody needs `LD_LIBRARY_PATH`.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        println!("cargo:warning=LIBTORCH is not set; ./deploy/local/install puts a libtorch into .local/");
        return;
    };
    // Canonical: libtorch finds its own dependencies relative to where the file really lies.
    match libtorch.join("lib").canonicalize() {
        Ok(lib) => println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display()),
        Err(error) => println!("cargo:warning={}/lib: {error}; run ./deploy/local/install", libtorch.display()),
    }
}
