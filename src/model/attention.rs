//! Self-attention over the paged cache: q, k and v in one product, normalisation and rotation with
//! the cache write, attention for single tokens and for chunks of a prompt, output projection.

use crate::{
    Result,
    device::{Recording, Tensor},
    kernels::{
        AttentionDecode, AttentionPrefill, QkNorm, RopeKvWrite, Store, attend_next, attend_tiles,
    },
};

use super::{
    AttentionSpec, KvCache, ModelSpec, Precision,
    kv_cache::head_stride,
    linear::{Input, Linear},
    loader::Loader,
    rows::{Cols, Heads, Rows},
    scratch::{Buffers, StepInputs, StepShape},
};

/// Attention of one layer.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    qkv: Linear,
    out: Linear,
    norm: Option<Tensor>,
    index: usize,
    window: Option<usize>,
}

impl Attention {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        spec: &ModelSpec,
        index: usize,
        precision: Precision,
    ) -> Result<Self> {
        let a = &spec.attention;
        let prefix = format!("model.layers.{index}.self_attn");
        let heads = Heads { dim: a.head_dim, stride: head_stride(spec) };
        let rows = [("q_proj", a.n_heads), ("k_proj", a.n_kv_heads), ("v_proj", a.n_kv_heads)]
            .map(|(name, n)| Rows::heads(format!("{prefix}.{name}"), n, heads));
        let cols = Cols::all(spec.hidden_size);
        let qkv = loader.linear(&rows, cols, precision.rest, a.qkv_bias)?;
        let rows = Rows::all(format!("{prefix}.o_proj"), spec.hidden_size);
        let cols = Cols::heads(a.n_heads, heads);
        let out = loader.linear(&[rows], cols, precision.rest, a.o_bias)?;
        let norm = |n_q: usize, n_k: usize| {
            [("q_norm", n_q), ("k_norm", n_k)]
                .map(|(name, n)| (format!("{prefix}.{name}.weight"), n * a.head_dim, Some(heads)))
        };
        let norm = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some(loader.vector(&norm(1, 1))?),
            QkNorm::Full => Some(loader.vector(&norm(a.n_heads, a.n_kv_heads))?),
        };
        Ok(Self { qkv, out, norm, index, window: spec.layers[index].window })
    }

    /// Attends from `input` `[n, hidden]` and adds the output to `residual`.
    #[expect(clippy::too_many_arguments, reason = "one call site; the pieces have no common owner")]
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        spec: &ModelSpec,
        shape: &StepShape,
        inputs: &StepInputs,
        buffers: &Buffers,
        kv: &KvCache,
        table: Tensor,
        input: Input,
        residual: Tensor,
    ) {
        let a: &AttentionSpec = &spec.attention;
        let (head_dim, n) = (head_stride(spec), residual.rows());
        let qkv = buffers.rows(buffers.qkv, n);
        let q = buffers.rows(buffers.q, n);
        let mixed = buffers.rows(buffers.attention, n);
        let (k_cache, v_cache) = kv.layers[self.index];
        self.qkv.record(rec, "qkv", input, qkv, Store::Set);
        let rope = RopeKvWrite {
            qkv,
            norm: self.norm,
            table,
            tokens: inputs.tokens.reshape(&[n, 4]),
            q,
            k_cache,
            v_cache,
            n_heads: a.n_heads,
            n_kv_heads: a.n_kv_heads,
            head_dim,
            norm_dim: a.head_dim,
            rotary_dim: a.rotary_dim,
            interleaved: false,
            qk_norm: a.qk_norm,
            eps: spec.rms_norm_eps,
        };
        let scale = (a.head_dim as f32).powf(-0.5);
        let (n_heads, n_kv_heads, block_size) = (a.n_heads, a.n_kv_heads, kv.block_size);
        let (block_tables, window) = (inputs.block_tables, self.window);
        let decode = AttentionDecode {
            q: q.reshape(&[shape.n_decode, q.cols()]),
            k_cache,
            v_cache,
            tokens: inputs.tokens.reshape(&[shape.n_decode, 4]),
            block_tables,
            out: mixed.reshape(&[shape.n_decode, mixed.cols()]),
            parts: buffers.attention_parts,
            n_heads,
            n_kv_heads,
            head_dim,
            block_size,
            scale,
            window,
        };
        // Single tokens are of different sequences, those of a chunk see each other.
        if shape.n_prefill == 0 {
            attend_next(rec, rope, decode);
        } else {
            rec.push(rope);
            rec.push(decode);
        }
        if shape.n_tiles > 0 {
            let attention = AttentionPrefill {
                q,
                k_cache,
                v_cache,
                tiles: inputs.tiles.reshape(&[shape.n_tiles, 4]),
                block_tables,
                out: mixed,
                n_heads,
                n_kv_heads,
                head_dim,
                block_size,
                scale,
                window,
            };
            attend_tiles(rec, attention);
        }
        self.out.record(rec, "o", mixed, residual, Store::Add);
    }
}
