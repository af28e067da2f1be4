//! What other programs reached with the same shapes on one NVIDIA H200 (driver 580.159.04),
//! measured on 2026-11-23: llama.cpp's Vulkan back end (build 10434, Q8_0 weights) and vLLM's
//! Triton kernels (0.33, int8 weights with a scale per channel).

/// Figures of one program for one shape.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// The program.
    pub name: &'static str,
    /// One of [`super::shape_names`].
    pub shape: &'static str,
    /// Layers of the shape, where the figures depend on them.
    pub layers: Option<usize>,
    /// Sequences and tokens per second, or tokens and microseconds of one layer.
    pub points: &'static [(usize, f64)],
}

/// Tokens per second of whole models that generate for several sequences.
pub const DECODE: &[Peer] = &[
    Peer {
        name: "llama.cpp Vulkan",
        shape: "qwen3-30b-a3b",
        layers: Some(12),
        points: &[(1, 707.0), (8, 1870.0), (32, 2453.0)],
    },
    Peer {
        name: "llama.cpp Vulkan",
        shape: "mixtral-8x7b",
        layers: Some(4),
        points: &[(1, 848.0), (8, 1850.0), (32, 3356.0)],
    },
];

/// Microseconds of a whole mixture-of-experts layer for a number of tokens.
pub const LAYER: &[Peer] = &[
    Peer {
        name: "llama.cpp Vulkan",
        shape: "qwen3-30b-a3b",
        layers: None,
        points: &[
            (1, 53.2),
            (8, 232.9),
            (32, 881.9),
            (128, 833.3),
            (512, 1069.7),
            (2048, 2545.0),
            (4096, 4810.0),
        ],
    },
    Peer {
        name: "vLLM Triton (CUDA)",
        shape: "qwen3-30b-a3b",
        layers: None,
        points: &[
            (1, 34.3),
            (8, 95.7),
            (32, 163.9),
            (128, 188.3),
            (512, 279.6),
            (2048, 596.0),
            (4096, 974.0),
        ],
    },
    Peer {
        name: "llama.cpp Vulkan",
        shape: "mixtral-8x7b",
        layers: None,
        points: &[(1, 192.0), (8, 930.0), (32, 2054.0), (128, 2145.0), (512, 4006.0)],
    },
    Peer {
        name: "vLLM Triton (CUDA)",
        shape: "mixtral-8x7b",
        layers: None,
        points: &[
            (1, 123.2),
            (8, 314.1),
            (32, 357.7),
            (128, 615.4),
            (512, 1230.0),
            (2048, 3378.0),
            (4096, 6778.0),
        ],
    },
    Peer {
        name: "llama.cpp Vulkan",
        shape: "deepseek-v3-shard",
        layers: None,
        points: &[
            (1, 215.0),
            (8, 1033.0),
            (32, 3655.0),
            (128, 3603.0),
            (512, 5034.0),
            (2048, 13254.0),
        ],
    },
    Peer {
        name: "vLLM Triton (CUDA)",
        shape: "deepseek-v3-shard",
        layers: None,
        points: &[
            (1, 109.8),
            (8, 461.8),
            (32, 682.0),
            (128, 913.9),
            (512, 1520.0),
            (2048, 4009.0),
            (4096, 7165.0),
        ],
    },
];
