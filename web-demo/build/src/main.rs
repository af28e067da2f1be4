//! The steps of `./x web` that no other tool does: JavaScript around the module, a manifest of the
//! model's files, and a server for the result.

use std::{fs, io::Read, net::Ipv4Addr, path::Path};

use anyhow::{Context, Result, bail};
use axum::{
    Router,
    http::{HeaderName, HeaderValue},
};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};
use tower_http::{services::ServeDir, set_header::SetResponseHeaderLayer};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["bindgen", module, out] => bindgen(module, out),
        ["manifest", dir] => manifest(Path::new(dir)),
        ["serve", dir, port] => serve(dir, port.parse().context("the port is no number")?),
        _ => bail!("usage: bindgen MODULE OUT | manifest DIR | serve DIR PORT"),
    }
}

/// `moewe.js`, its types and `moewe_bg.wasm` from the compiled module.
fn bindgen(module: &str, out: &str) -> Result<()> {
    wasm_bindgen_cli_support::Bindgen::new()
        .input_path(module)
        .out_name("moewe")
        .web(true)?
        .typescript(true)
        .remove_name_section(true)
        .remove_producers_section(true)
        .generate(out)
}

/// Writes `manifest.json`: size and SHA-256 of every file of a model.
fn manifest(dir: &Path) -> Result<()> {
    let mut files = Map::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !path.is_file() || name == "manifest.json" {
            continue;
        }
        let (mut hash, mut size, mut block) = (Sha256::new(), 0, vec![0; 1 << 20]);
        let mut file = fs::File::open(&path)?;
        loop {
            let n = file.read(&mut block)?;
            if n == 0 {
                break;
            }
            hash.update(&block[..n]);
            size += n as u64;
        }
        let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        files.insert(name, json!({ "size": size, "sha256": digest }));
    }
    let text = format!("{:#}\n", json!({ "files": files }));
    fs::write(dir.join("manifest.json"), text).context("the manifest cannot be written")
}

/// Serves `dir` on this machine until it is stopped, with the headers of an isolated page.
fn serve(dir: &str, port: u16) -> Result<()> {
    let header = |name, value| {
        let (name, value) = (HeaderName::from_static(name), HeaderValue::from_static(value));
        SetResponseHeaderLayer::overriding(name, value)
    };
    let app = Router::new()
        .fallback_service(ServeDir::new(dir))
        .layer(header("cross-origin-opener-policy", "same-origin"))
        .layer(header("cross-origin-embedder-policy", "require-corp"))
        .layer(header("cache-control", "no-cache"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .with_context(|| format!("port {port} cannot be used; name another one"))?;
        println!("http://{}/", listener.local_addr()?);
        Ok(axum::serve(listener, app).await?)
    })
}
