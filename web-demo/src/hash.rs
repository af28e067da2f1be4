//! SHA-256 of a download while it comes in.

use sha2::{Digest, Sha256};
use wasm_bindgen::prelude::*;

/// A running SHA-256.
#[derive(Debug, Default)]
#[wasm_bindgen]
pub struct Hash(Sha256);

#[wasm_bindgen]
impl Hash {
    /// Of nothing yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of all bytes so far, 64 hexadecimal digits.
    pub fn digest(&self) -> String {
        self.0.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
