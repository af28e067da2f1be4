//! Which adapter to use: enumeration and the `--device` choice.

use std::{convert::Infallible, str::FromStr};

use super::{Caps, DeviceError};

/// What `--device` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best GPU, else a software adapter, else the CPU device.
    Auto,
    /// The CPU device.
    Cpu,
    /// The best adapter of a backend: `vulkan`, `metal`, `dx12`, `webgpu`.
    Backend(String),
    /// The n-th row of `moewe adapters`.
    Index(usize),
    /// The first adapter whose name contains this, ignoring case.
    Name(String),
}

impl FromStr for DeviceChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let lower = text.to_lowercase();
        Ok(match lower.as_str() {
            "auto" | "" => Self::Auto,
            "cpu" => Self::Cpu,
            "vulkan" | "metal" | "dx12" | "webgpu" => Self::Backend(lower),
            _ => lower.parse().map_or(Self::Name(lower), Self::Index),
        })
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Backend(name) | Self::Name(name) => f.write_str(name),
            Self::Index(i) => write!(f, "{i}"),
        }
    }
}

/// One row of `moewe adapters`.
#[derive(Debug, Clone)]
pub struct AdapterInfo {
    /// Name that the driver reports.
    pub name: String,
    /// `vulkan`, `metal`, `dx12` or `webgpu`.
    pub backend: &'static str,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// Driver name and version.
    pub driver: String,
    /// Capabilities.
    pub caps: Caps,
}

/// The graphics API's entry point: one for the whole program, since drivers limit how many there
/// may be.
fn instance() -> wgpu::Instance {
    #[cfg(not(target_arch = "wasm32"))]
    {
        static INSTANCE: std::sync::OnceLock<wgpu::Instance> = std::sync::OnceLock::new();
        INSTANCE.get_or_init(new_instance).clone()
    }
    #[cfg(target_arch = "wasm32")]
    new_instance()
}

fn new_instance() -> wgpu::Instance {
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
    // Not GL: probing it prints warnings on headless machines, and it has no compute worth having.
    desc.backends = wgpu::Backends::PRIMARY;
    wgpu::Instance::new(desc)
}

pub(super) fn backend_name(backend: wgpu::Backend) -> &'static str {
    match backend {
        wgpu::Backend::Vulkan => "vulkan",
        wgpu::Backend::Metal => "metal",
        wgpu::Backend::Dx12 => "dx12",
        wgpu::Backend::BrowserWebGpu => "webgpu",
        _ => "other",
    }
}

/// All adapters, best first: discrete, integrated, virtual, other, software.
async fn enumerate() -> Vec<wgpu::Adapter> {
    let instance = instance();
    let mut adapters = instance.enumerate_adapters(wgpu::Backends::PRIMARY).await;
    adapters.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// What is known of every adapter, in the order that `--device INDEX` counts.
pub async fn adapters() -> Vec<AdapterInfo> {
    enumerate().await.iter().map(describe).collect()
}

/// Every adapter, best first, and the CPU device.
pub async fn all_devices() -> Vec<DeviceChoice> {
    let n = enumerate().await.len();
    (0..n).map(DeviceChoice::Index).chain([DeviceChoice::Cpu]).collect()
}

pub(super) fn describe(adapter: &wgpu::Adapter) -> AdapterInfo {
    let info = adapter.get_info();
    AdapterInfo {
        backend: backend_name(info.backend),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        caps: super::gpu::caps_of(adapter),
        name: info.name,
    }
}

/// The adapter to open; `None` means the CPU device.
pub(super) async fn pick(choice: &DeviceChoice) -> Result<Option<wgpu::Adapter>, DeviceError> {
    if *choice == DeviceChoice::Cpu {
        return Ok(None);
    }
    let mut all = enumerate().await;
    let infos: Vec<AdapterInfo> = all.iter().map(describe).collect();
    let found = match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu if all.is_empty() => return Ok(None),
        DeviceChoice::Auto | DeviceChoice::Cpu => Some(0),
        DeviceChoice::Backend(name) => infos.iter().position(|i| i.backend == name),
        DeviceChoice::Index(i) => (*i < infos.len()).then_some(*i),
        DeviceChoice::Name(part) => {
            infos.iter().position(|i| i.name.to_lowercase().contains(part.as_str()))
        }
    };
    let available = || {
        let names = infos.iter().enumerate().map(|(i, a)| format!("{i} {} {}", a.backend, a.name));
        names.chain(["cpu".into()]).collect::<Vec<_>>().join(", ")
    };
    found.map(|i| Some(all.swap_remove(i))).ok_or_else(|| DeviceError::NoAdapter {
        wanted: choice.to_string(),
        available: available(),
    })
}
