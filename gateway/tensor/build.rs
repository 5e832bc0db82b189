//! Compiles the messages of the protocol, and keeps their description.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/inference.proto");
    let described = protox::compile(["proto/inference.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("description.bin"), prost::Message::encode_to_vec(&described))?;
    let mut messages = prost_build::Config::new();
    // Tensors are kept as the part of the message that they came in, not copied; equal messages are equal bytes.
    messages.bytes(["."]).btree_map(["."]).compile_fds(described)?;
    Ok(())
}
