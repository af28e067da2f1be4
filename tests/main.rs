//! The integration tests, one binary: it links once, and a module's name says what it covers.
//!
//! They see moewe as a user does, through the library's public API and the files of the tree.

/// A damaged checkpoint ends with exit code 1 and a sentence that names file, tensor or key.
mod bad_checkpoint;
/// Clients that leave, stall, dribble or overdo it.
mod bad_clients;
/// Bad input ends with exit code 1 and a sentence that names the cause, never with a panic.
mod bad_input;
/// Load on a server and on the engine: the fields that are reported.
mod bench;
/// Checkpoints to test with: those of the tree, edited copies, random ones.
mod checkpoints;
/// The binary: what it prints, where, and its exit codes.
mod cli;
/// The server keeps what its OpenAPI document and the files in deploy/ say.
mod contract;
/// The shipped model computes what transformers computed for it.
mod default_model;
/// Launches per layer, and how dummy weights route.
mod dispatches;
/// Devices that fail under the engine and the server.
mod faults;
/// Every architecture against its golden, and verify against corrupted goldens.
mod goldens;
/// Experts replaced in a running model: all of a file or none, with requests in flight.
mod hot_experts;
/// Results do not depend on batches, chunks, preemption, block size, device or run.
mod invariance;
/// A damaged config.json or safetensors header never panics, hangs or loads as garbage.
mod mutations;
/// Experts that visit the device from the host's memory give what resident ones give.
mod offload;
/// Experts on several devices give what one device gives.
mod parallel;
/// Devices that fail while they share experts are named, and nothing hangs.
mod parallel_faults;
/// Runs the binary and holds its output.
mod program;
/// Quantised models compute what the originals compute in int8.
mod quantize;
/// Random models of odd sizes against a plain forward pass in f64.
mod random_models;
/// That forward pass: a decoder written from the papers, sharing no code with moewe.
mod reference;
/// The HTTP server: statuses, streams, keys, limits, cancellation, draining, metrics.
mod server;
/// The tree keeps its rules: layers, imports, sizes, names, a twin for every shader.
mod tidy;
/// Tool calls over HTTP: made, streamed, refused.
mod tools;
