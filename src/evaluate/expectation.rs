//! Reads `expected.json` and `expected.safetensors`, the layout of `tests/goldens`.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::{model::ModelSpec, weights::Directory};

use super::EvaluateError;

/// Reference outputs of a checkpoint.
#[derive(Debug, Clone)]
pub struct Expectation {
    /// Largest logit difference for f32.
    pub logit_atol: f64,
    /// Prompts with their outputs.
    pub prompts: Vec<Prompt>,
}

/// Reference outputs for a prompt and the tokens after it. Positions count through both: `n` of
/// the prompt and `t - 1` of the `t` generated tokens are fed, and each gives a row of logits.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Its name.
    pub name: String,
    /// `[n]`
    pub input_ids: Vec<u32>,
    /// `[t]`
    pub greedy_ids: Vec<u32>,
    /// `[n + t - 1][vocabulary]`
    pub logits: Vec<Vec<f32>>,
    /// By MoE layer.
    pub routed: Vec<RoutedExpectation>,
}

/// Expected routing of one layer.
#[derive(Debug, Clone)]
pub struct RoutedExpectation {
    /// Chosen experts, ascending. `[n + t - 1][top_k]`
    pub ids: Vec<Vec<i32>>,
    /// Their weights. `[n + t - 1][top_k]`
    pub weights: Vec<Vec<f32>>,
    /// Distance to the nearest other choice; 0 allows any. `[n + t - 1]`
    pub margins: Vec<f32>,
}

impl Expectation {
    /// Reads the reference beside a checkpoint and checks it against the model.
    ///
    /// # Errors
    /// [`EvaluateError::Expectation`] naming the file and the tensor.
    pub fn read(dir: &Path, spec: &ModelSpec) -> Result<Self, EvaluateError> {
        let path = dir.join("expected.json");
        let fail = |cause: String| EvaluateError::Expectation { path: path.clone(), cause };
        let json = crate::llm::read_json(&Directory(dir.into()), dir, "expected.json");
        let json = json.map_err(|e| fail(e.to_string()))?;
        let json = json.ok_or_else(|| fail("there is no such file".into()))?;
        let logit_atol = json.get("logit_atol").and_then(Value::as_f64).unwrap_or(5e-4);
        let prompts = json
            .get("prompts")
            .and_then(Value::as_array)
            .filter(|prompts| !prompts.is_empty())
            .ok_or_else(|| fail("it lists no prompts".into()))?;
        let names = prompts.iter().map(|p| {
            let name = p.get("name").and_then(Value::as_str);
            name.map(str::to_owned).ok_or_else(|| fail("a prompt has no name".into()))
        });
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let path = dir.join("expected.safetensors");
        let fail = |cause: String| EvaluateError::Expectation { path: path.clone(), cause };
        let bytes = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let file = File { path: &path, tensors };
        let prompts = names.into_iter().map(|name| file.prompt(name, spec, logit_atol));
        Ok(Self { logit_atol, prompts: prompts.collect::<Result<_, _>>()? })
    }
}

struct File<'a> {
    path: &'a PathBuf,
    tensors: SafeTensors<'a>,
}

impl File<'_> {
    fn fail(&self, cause: String) -> EvaluateError {
        EvaluateError::Expectation { path: self.path.clone(), cause }
    }

    /// A tensor of 4-byte elements and its shape; the last extents must be `tail`.
    fn tensor<T: bytemuck::Pod>(
        &self,
        name: &str,
        dtype: Dtype,
        rank: usize,
        tail: &[usize],
    ) -> Result<(Vec<usize>, Vec<T>), EvaluateError> {
        let view = self.tensors.tensor(name).map_err(|_| self.fail(format!("no {name}")))?;
        let shape = view.shape().to_vec();
        if view.dtype() != dtype || shape.len() != rank || !shape.ends_with(tail) {
            let is = format!("{name} is {:?} {shape:?}", view.dtype());
            return Err(self.fail(format!("{is}, not {dtype:?} of {rank} dimensions to {tail:?}")));
        }
        Ok((shape, bytemuck::pod_collect_to_vec(view.data())))
    }

    fn floats(&self, name: &str, rank: usize, tail: &[usize]) -> Result<Vec<f32>, EvaluateError> {
        let values = self.tensor::<f32>(name, Dtype::F32, rank, tail)?.1;
        match values.iter().all(|v| v.is_finite()) {
            true => Ok(values),
            false => Err(self.fail(format!("{name} has numbers that are not finite"))),
        }
    }

    fn ids(&self, name: &str, vocab_size: usize) -> Result<Vec<u32>, EvaluateError> {
        let (_, ids) = self.tensor::<i32>(name, Dtype::I32, 1, &[])?;
        let known = |id: &i32| usize::try_from(*id).is_ok_and(|id| id < vocab_size);
        if ids.is_empty() || !ids.iter().all(known) {
            return Err(self.fail(format!("{name} has ids outside the vocabulary, or none")));
        }
        Ok(ids.into_iter().map(|id| id as u32).collect())
    }

    fn prompt(
        &self,
        name: String,
        spec: &ModelSpec,
        logit_atol: f64,
    ) -> Result<Prompt, EvaluateError> {
        let vocab = spec.vocab_size;
        let input_ids = self.ids(&format!("{name}.input_ids"), vocab)?;
        let greedy_ids = self.ids(&format!("{name}.greedy_ids"), vocab)?;
        let (n, t) = (input_ids.len(), greedy_ids.len());
        let mut logits = self.floats(&format!("{name}.logits"), 2, &[n, vocab])?;
        // Row 0 of the greedy logits is the prompt's last row once more.
        let greedy = self.floats(&format!("{name}.greedy_logits"), 2, &[t, vocab])?;
        let repeated = logits[(n - 1) * vocab..].iter().zip(&greedy);
        if repeated.map(|(a, b)| f64::from((a - b).abs())).any(|d| d > logit_atol) {
            let cause = format!("{name}.logits ends and {name}.greedy_logits begins differently");
            return Err(self.fail(cause));
        }
        logits.extend(&greedy[vocab..]);
        let logits = logits.chunks(vocab).map(<[f32]>::to_vec).collect();
        let moe: Vec<usize> = spec.moe_layers().map(|(_, moe)| moe.routing.top_k).collect();
        let routed = match moe.first() {
            Some(&top_k) => self.routed(&name, moe.len(), n, t - 1, top_k)?,
            None => Vec::new(),
        };
        Ok(Prompt { name, input_ids, greedy_ids, logits, routed })
    }

    /// Routing of `layers` layers over `n` positions of the prompt and `m` after it.
    fn routed(
        &self,
        prompt: &str,
        layers: usize,
        n: usize,
        m: usize,
        top_k: usize,
    ) -> Result<Vec<RoutedExpectation>, EvaluateError> {
        let mut all =
            vec![RoutedExpectation { ids: vec![], weights: vec![], margins: vec![] }; layers];
        for (part, rows) in [("router", n), ("greedy_router", m)] {
            let name = |what: &str| format!("{prompt}.{part}_{what}");
            if rows == 0 {
                continue;
            }
            let shape = [layers, rows, top_k];
            let ids = self.tensor::<i32>(&name("ids"), Dtype::I32, 3, &shape)?.1;
            let weights = self.floats(&name("weights"), 3, &shape)?;
            let margins = self.floats(&name("margin"), 2, &shape[..2])?;
            if margins.iter().any(|&margin| margin < 0.0) {
                return Err(self.fail(format!("{} has negative numbers", name("margin"))));
            }
            for (layer, of) in all.iter_mut().enumerate() {
                let range = layer * rows * top_k..(layer + 1) * rows * top_k;
                of.ids.extend(ids[range.clone()].chunks(top_k).map(<[i32]>::to_vec));
                of.weights.extend(weights[range].chunks(top_k).map(<[f32]>::to_vec));
                of.margins.extend(&margins[layer * rows..(layer + 1) * rows]);
            }
        }
        Ok(all)
    }
}
