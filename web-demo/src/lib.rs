//! moewe in the browser: the engine behind a small JavaScript interface, one JSON text in and one
//! out. Lives in a worker; the package around it (`../package`) is what pages import.

#![cfg(target_arch = "wasm32")]

mod engine;
mod error;
mod files;
mod hash;
mod request;
