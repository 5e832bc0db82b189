//! Lets the binary find libtorch where it was linked, so that nobody needs `LD_LIBRARY_PATH`; compiles the protocol.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    link();
    // The services alone: the messages are isochrone-tensor's.
    const PROTOCOL: &str = "../gateway/tensor/proto";
    println!("cargo:rerun-if-changed={PROTOCOL}");
    let described = protox::compile(["inference.proto"], [PROTOCOL])?;
    let services = tonic_prost_build::configure().build_client(false);
    services.extern_path(".inference", "::isochrone_tensor::proto").compile_fds(described)?;
    Ok(())
}

fn link() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // MKL looks for it in the program; see runtime/processor.rs.
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=mkl_serv_intel_cpu_true");
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
