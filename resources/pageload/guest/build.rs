//! Names the linker script, by its full path.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    println!("cargo:rustc-link-arg-bins=-Wl,-T{directory}/link.ld");
    println!("cargo:rerun-if-changed=link.ld");
}
