//! What to run, as plain data: a list of dispatches that any device can execute.

use std::{borrow::Cow, fmt, ops::Range};

use super::{Caps, Tensor, cpu::Io};

/// How a kernel touches a binding. Read-only bindings need no barrier between kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
}

/// A tensor as a kernel binds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The memory.
    pub tensor: Tensor,
    /// How it is used.
    pub access: Access,
}

impl Binding {
    /// A binding that is only read.
    pub fn read(tensor: Tensor) -> Self {
        Self { tensor, access: Access::Read }
    }

    /// A binding that is written, and perhaps read as well.
    pub fn write(tensor: Tensor) -> Self {
        Self { tensor, access: Access::Write }
    }
}

/// One compiled form of a shader file: the files put into its `#include` slots and the values of
/// its `override` constants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shader {
    /// File stem in `shaders/`; also the kernel's name.
    pub stem: &'static str,
    /// Slot name and what it is filled with.
    pub slots: Vec<(&'static str, &'static str)>,
    /// Override name and value (integers and booleans; floats travel in params).
    pub overrides: Vec<(&'static str, u32)>,
}

impl Shader {
    /// The plain file, without slots and overrides.
    pub fn new(stem: &'static str) -> Self {
        Self { stem, slots: Vec::new(), overrides: Vec::new() }
    }

    /// Fills `#include "...{name}..."`.
    pub fn slot(mut self, name: &'static str, file: &'static str) -> Self {
        self.slots.push((name, file));
        self
    }

    /// Sets `override name`.
    pub fn set(mut self, name: &'static str, value: impl Into<u32>) -> Self {
        self.overrides.push((name, value.into()));
        self
    }

    /// What a slot was filled with.
    pub fn slot_value(&self, name: &str) -> Option<&'static str> {
        self.slots.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }

    /// What an override was set to.
    pub fn override_value(&self, name: &str) -> Option<u32> {
        self.overrides.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }
}

impl fmt::Display for Shader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.stem)?;
        for (name, value) in &self.slots {
            write!(f, " {name}={value}")?;
        }
        for (name, value) in &self.overrides {
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}

/// The CPU form of a dispatch: all workgroups of the grid at once.
pub type Twin = fn(params: &[u8], io: &Io<'_>);

/// One kernel launch.
#[derive(Debug, Clone)]
pub struct Dispatch {
    /// What profiles and errors call it: the kernel, or the kernel and its role.
    pub label: Cow<'static, str>,
    /// The GPU form.
    pub shader: Shader,
    /// The CPU form.
    pub twin: Twin,
    /// Bytes of the kernel's `Params` struct, uniform binding 0.
    pub params: Vec<u8>,
    /// Field names and types of `Params`, see [`Params::FIELDS`].
    pub fields: &'static [(&'static str, &'static str)],
    /// Storage bindings 1, 2, ... in order.
    pub bindings: Vec<Binding>,
    /// Workgroups in x, y, z.
    pub grid: [u32; 3],
}

/// A struct that mirrors the WGSL `struct Params` of a shader. Written by `params!`.
pub trait Params: bytemuck::Pod {
    /// Field names and WGSL types, in order; a test compares them with the shader.
    const FIELDS: &'static [(&'static str, &'static str)];
}

/// Declares a kernel's parameters: a plain struct of `u32`, `i32` and `f32`, and its field table.
macro_rules! params {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($(#[$doc:meta])* $field:ident: $ty:ident),* $(,)?
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        $vis struct $name {
            $($(#[$doc])* pub $field: $ty,)*
        }
        impl $crate::device::Params for $name {
            const FIELDS: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), stringify!($ty))),*];
        }
    };
}
pub(crate) use params;

/// What a kernel says of one launch; [`Recording::push`] turns it into a [`Dispatch`].
pub struct Launch<P> {
    /// Shader variant for the device's capabilities.
    pub shader: Shader,
    /// Parameters.
    pub params: P,
    /// Storage bindings in order.
    pub bindings: Vec<Binding>,
    /// Workgroups in x, y, z.
    pub grid: [u32; 3],
}

/// A shader with its CPU twin. The struct that implements this holds the tensors and numbers of
/// one launch; file stem, [`Kernel::NAME`], shader and tests share one name.
pub trait Kernel: Sized {
    /// Stem of the shader file.
    const NAME: &'static str;
    /// Mirror of the WGSL `Params`.
    type Params: Params;

    /// Shader variant, parameters, bindings and grid for a device with `caps`.
    fn launch(&self, caps: &Caps) -> Launch<Self::Params>;

    /// The same computation on the CPU, with the same bindings and parameters.
    fn twin(params: &Self::Params, io: &Io<'_>);

    /// Name in profiles, where several roles of one kernel should be told apart.
    fn label(&self) -> Cow<'static, str> {
        Cow::Borrowed(Self::NAME)
    }
}

/// An ordered list of dispatches; each sees the writes of those before it.
#[derive(Debug, Clone)]
pub struct Recording {
    caps: Caps,
    /// What to run, in order.
    pub dispatches: Vec<Dispatch>,
    /// Numbers of dispatches after which the host takes part, ascending; what lies between is
    /// submitted by segments.
    pub cuts: Vec<usize>,
    /// Tensors that are zeroed before the first dispatch.
    pub clears: Vec<Tensor>,
}

impl Recording {
    /// An empty recording for a device with `caps`.
    pub fn new(caps: &Caps) -> Self {
        let (cuts, clears) = (Vec::new(), Vec::new());
        Self { caps: caps.clone(), dispatches: Vec::new(), cuts, clears }
    }

    /// Ends a segment here.
    pub fn cut(&mut self) {
        self.cuts.push(self.dispatches.len());
    }

    /// Dispatches of segment `index`, one of `cuts.len() + 1`.
    pub fn segment(&self, index: usize) -> Range<usize> {
        let start = index.checked_sub(1).map_or(0, |before| self.cuts[before]);
        start..self.cuts.get(index).copied().unwrap_or(self.dispatches.len())
    }

    /// Zeroes a tensor before the first dispatch.
    pub fn clear(&mut self, tensor: Tensor) {
        self.clears.push(tensor);
    }

    /// Capabilities that variants are chosen from.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Appends a kernel launch. Empty grids are dropped.
    pub fn push<K: Kernel>(&mut self, kernel: K) {
        let Launch { shader, params, bindings, grid } = kernel.launch(&self.caps);
        if grid.contains(&0) {
            return;
        }
        self.dispatches.push(Dispatch {
            label: kernel.label(),
            shader,
            twin: |params, io| K::twin(&bytemuck::pod_read_unaligned(params), io),
            params: bytemuck::bytes_of(&params).to_vec(),
            fields: K::Params::FIELDS,
            bindings,
            grid,
        });
    }
}

impl fmt::Display for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.dispatches.iter().enumerate() {
            write!(f, "{i:4} {} {:?}", d.shader, d.grid)?;
            for b in &d.bindings {
                write!(f, " {}{}", if b.access == Access::Write { "*" } else { "" }, b.tensor)?;
            }
            writeln!(f)?;
        }
        self.cuts.iter().try_for_each(|cut| writeln!(f, "cut before {cut}"))
    }
}
