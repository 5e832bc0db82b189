//! What the processor can do and libtorch does not find by itself. The only file of the worker with `unsafe`.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Off: the hook below answers as the library's own function would.
static FAST_ON_AMD: AtomicBool = AtomicBool::new(false);

/// Lets MKL, which is part of libtorch, take its AVX2 and AVX-512 paths on AMD processors that have them. Without this
/// it takes slow ones there: a text takes about twice as long. Before anything is computed.
pub(crate) fn fast_matrices(wanted: bool) {
    FAST_ON_AMD.store(wanted && has_avx2(), Relaxed);
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}

/// MKL asks this function which paths it may take. A symbol of the program comes before the library's own, so this is the
/// one that it finds (`build.rs` exports it). It is no documented interface of MKL's: where a version does not ask, nothing
/// changes.
// SAFETY: the name is MKL's; the signature is that of the function it stands for: no argument, one int.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    c_int::from(FAST_ON_AMD.load(Relaxed) || is_intel())
}

/// Loads the GPU half of libtorch if it is installed: nothing refers to its symbols, so the linker has dropped it, and
/// libtorch finds GPUs only if it is there.
pub(crate) fn load_cuda() {
    // SAFETY: its initialisers only register kernels with the libtorch that this program is linked to; it lies in the same
    // folder, and is found through the same path.
    if let Ok(library) = unsafe { libloading::Library::new("libtorch_cuda.so") } {
        // Kept: its kernels are registered for good.
        std::mem::forget(library);
    }
}

/// Gives memory that was freed back to the system: after a model is unloaded.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only looks at what is free already.
    unsafe {
        libc::malloc_trim(0);
    }
}
