//! Lets the binary find libtorch where it was linked, so that nobody needs `LD_LIBRARY_PATH`; compiles the protocol.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    link();
    println!("cargo:rerun-if-changed=proto/inference.proto");
    let described = protox::compile(["proto/inference.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // For gRPC reflection.
    std::fs::write(out.join("inference.bin"), prost::Message::encode_to_vec(&described))?;
    // Tensors are kept as the part of the request that they came in, not copied.
    tonic_prost_build::configure().build_client(false).bytes(".").compile_fds(described)?;
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
