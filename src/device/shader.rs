//! Shader files and their composition. There are two mechanisms and no third: `override` constants,
//! and `#include "path"` lines in which `{slot}` stands for a file chosen by the kernel.

use super::{DeviceError, Shader};

include!(concat!(env!("OUT_DIR"), "/shaders.rs"));

/// WGSL source of a shader variant with every include expanded once and directives in front.
///
/// # Errors
/// [`DeviceError::Shader`] if a file or slot is missing.
pub(crate) fn compose(shader: &Shader) -> Result<String, DeviceError> {
    let mut out = Composer { shader, included: Vec::new(), directives: String::new() };
    let body = out.expand(&format!("{}.wgsl", shader.stem))?;
    Ok(out.directives + &body)
}

struct Composer<'a> {
    shader: &'a Shader,
    included: Vec<String>,
    directives: String,
}

impl Composer<'_> {
    fn expand(&mut self, path: &str) -> Result<String, DeviceError> {
        let text = FILES
            .iter()
            .find(|(name, _)| *name == path)
            .map(|(_, text)| *text)
            .ok_or_else(|| self.error(format!("there is no file shaders/{path}")))?;
        self.included.push(path.to_owned());
        let mut body = String::with_capacity(text.len());
        for line in text.lines() {
            if let Some(quoted) = line.strip_prefix("#include ") {
                let path = self.fill(quoted.trim().trim_matches('"'))?;
                if !self.included.contains(&path) {
                    body += &self.expand(&path)?;
                }
            } else if line.starts_with("enable ") || line.starts_with("requires ") {
                // WGSL wants directives before everything else.
                if !self.directives.contains(line) {
                    self.directives += line;
                    self.directives.push('\n');
                }
            } else {
                body += line;
                body.push('\n');
            }
        }
        Ok(body)
    }

    fn fill(&self, path: &str) -> Result<String, DeviceError> {
        let Some((before, rest)) = path.split_once('{') else { return Ok(path.to_owned()) };
        let (slot, after) =
            rest.split_once('}').ok_or_else(|| self.error(format!("bad include {path}")))?;
        let value = self
            .shader
            .slot_value(slot)
            .ok_or_else(|| self.error(format!("slot {slot} is not filled")))?;
        Ok(format!("{before}{value}{after}"))
    }

    fn error(&self, message: String) -> DeviceError {
        DeviceError::Shader { shader: self.shader.to_string(), message }
    }
}
