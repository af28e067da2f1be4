//! Errors as JavaScript sees them: an `Error` whose name tells programs what to do.

use moewe::{Error, device::DeviceError, engine::EngineError};
use wasm_bindgen::JsValue;

/// An `Error` of that name.
pub(crate) fn named(name: &str, message: &str) -> JsValue {
    let error = js_sys::Error::new(message);
    error.set_name(name);
    error.into()
}

/// The library's sentence under the name of its kind.
pub(crate) fn from(error: Error) -> JsValue {
    let name = match &error {
        Error::Device(DeviceError::Lost { .. } | DeviceError::Timeout { .. }) => "DeviceLostError",
        Error::Device(
            DeviceError::OutOfMemory { .. }
            | DeviceError::TooLarge { .. }
            | DeviceError::DoesNotFit { .. },
        ) => "OutOfMemoryError",
        Error::Device(DeviceError::NoAdapter { .. }) => "WebGPUNotFoundError",
        Error::Device(_) => "DeviceError",
        Error::Engine(EngineError::NonFinite) => "ModelError",
        Error::Engine(_) | Error::Text(_) => "RequestError",
        _ => "ModelError",
    };
    named(name, &error.to_string())
}
