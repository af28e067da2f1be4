//! Compares a model with reference outputs, position by position: logits, chosen experts, greedy
//! tokens. The reference's tokens are fed, so that one close call does not end the comparison.

use std::fmt;

use crate::{
    Result,
    engine::{Routed, Runner},
    model::Precision,
};

use super::{Expectation, Prompt, Session, Step};

/// How far a model may be from its reference; measured for `tests/goldens`, see its README.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Largest logit difference.
    pub logit_max: f64,
    /// RMS of the difference over RMS of the logits about their mean, over all prompts.
    pub logit_rel: f64,
    /// The same at any one position.
    pub position_rel: f64,
    /// Largest difference of a routed weight.
    pub weight_max: f64,
    /// A choice of experts may differ where the reference's margin is below this (softmax).
    pub margin_softmax: f32,
    /// The same for sigmoid routers.
    pub margin_sigmoid: f32,
    /// The greedy token may differ where the reference's two best logits are closer than this.
    pub top2_gap: f32,
}

impl Tolerance {
    /// Bounds for models in `precision`; `logit_atol` is the reference's own for f32.
    pub fn of(precision: Precision, logit_atol: f64) -> Self {
        let inf = f64::INFINITY;
        match precision.experts.bits().min(precision.rest.bits()) {
            32 => Self {
                logit_max: logit_atol,
                logit_rel: inf,
                position_rel: inf,
                weight_max: 5e-5,
                margin_softmax: 0.0,
                margin_sigmoid: 0.0,
                top2_gap: 0.0,
            },
            16 => Self {
                logit_max: 0.3,
                logit_rel: 0.01,
                position_rel: inf,
                weight_max: inf,
                margin_softmax: 0.05,
                margin_sigmoid: 0.01,
                top2_gap: 0.1,
            },
            8 => Self {
                logit_max: inf,
                logit_rel: 0.03,
                position_rel: 0.1,
                weight_max: inf,
                margin_softmax: 0.25,
                margin_sigmoid: 0.05,
                top2_gap: 0.4,
            },
            _ => Self {
                logit_max: inf,
                logit_rel: 0.4,
                position_rel: 0.7,
                weight_max: inf,
                margin_softmax: 2.0,
                margin_sigmoid: 0.4,
                top2_gap: 4.0,
            },
        }
    }
}

/// Comparison of one prompt. Positions after the first changed choice of experts are left out:
/// from there on it is another computation.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct PromptReport {
    /// Its name.
    pub name: String,
    /// Positions of the reference, and how many were compared.
    pub positions: usize,
    /// Positions before the first changed choice.
    pub compared: usize,
    /// Largest logit difference.
    pub max_error: f64,
    /// Root mean square of the logit differences.
    pub rms_error: f64,
    /// That over the RMS of the reference's logits about their mean.
    pub rel_error: f64,
    /// Choices of experts that differ, over all positions and layers.
    pub expert_mismatches: usize,
    /// Largest difference of a routed weight.
    pub weight_error: f64,
    /// Index of the first greedy token that differs.
    pub first_greedy_difference: Option<usize>,
    /// What is beyond tolerance, in words.
    pub failures: Vec<String>,
    #[serde(skip)]
    squares: (f64, f64),
}

/// Comparison of a model with its reference.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// By prompt.
    pub prompts: Vec<PromptReport>,
    /// Whether all is within tolerance.
    pub passed: bool,
    /// RMS of the differences over RMS of the logits, over all prompts.
    pub rel_error: f64,
}

/// Runs every prompt of the reference and compares.
///
/// # Errors
/// [`crate::Error`] if a prompt does not fit the context or the device fails.
pub fn verify(
    runner: &mut Runner,
    expectation: &Expectation,
    tolerance: &Tolerance,
) -> Result<Report> {
    let mut prompts = Vec::new();
    for prompt in &expectation.prompts {
        let mut session = Session::new(runner);
        let n = prompt.logits.len();
        if n > session.room() {
            let limit = session.room();
            return Err(crate::engine::EngineError::PromptTooLong { tokens: n, limit }.into());
        }
        let mut step = session.feed(&prompt.input_ids, true)?;
        for id in &prompt.greedy_ids[..prompt.greedy_ids.len() - 1] {
            let next = session.feed(std::slice::from_ref(id), true)?;
            step.logits.extend(next.logits);
            step.append(next.routed.into_iter());
        }
        let sigmoid = runner
            .model()
            .spec
            .moe_layers()
            .next()
            .is_some_and(|(_, moe)| moe.routing.scoring == crate::kernels::Scoring::Sigmoid);
        let margin = if sigmoid { tolerance.margin_sigmoid } else { tolerance.margin_softmax };
        prompts.push(compare(prompt, &step, tolerance, margin));
    }
    let (error, power) = prompts
        .iter()
        .fold((0.0, 0.0), |sum, p: &PromptReport| (sum.0 + p.squares.0, sum.1 + p.squares.1));
    let rel_error = (error / f64::max(power, 1e-30)).sqrt();
    let passed = rel_error <= tolerance.logit_rel && prompts.iter().all(|p| p.failures.is_empty());
    Ok(Report { prompts, passed, rel_error })
}

fn compare(prompt: &Prompt, step: &Step, tolerance: &Tolerance, margin: f32) -> PromptReport {
    let positions = prompt.logits.len();
    let name = prompt.name.clone();
    let mut report = PromptReport { name, positions, ..PromptReport::default() };
    let mut counted = 0usize;
    let mut same_route = true;
    for at in 0..positions {
        for (layer, (expected, routed)) in prompt.routed.iter().zip(&step.routed).enumerate() {
            let (ids, weights) = sorted_route(routed, at);
            if ids != expected.ids[at] {
                report.expert_mismatches += 1;
                if same_route && expected.margins[at] >= margin {
                    let (got, want) = (ids, &expected.ids[at]);
                    report.failures.push(format!(
                        "position {at}, layer {layer}: experts {got:?} instead of {want:?}"
                    ));
                }
                same_route = false;
            } else if same_route {
                for (a, b) in weights.iter().zip(&expected.weights[at]) {
                    report.weight_error = max(report.weight_error, f64::from((a - b).abs()));
                }
            }
        }
        report.compare_greedy(prompt, &step.logits[at], at, tolerance, same_route);
        if same_route {
            counted += prompt.logits[at].len();
            report.compared += 1;
            report.compare_logits(&prompt.logits[at], &step.logits[at], at, tolerance);
        }
    }
    report.rms_error = (report.squares.0 / counted.max(1) as f64).sqrt();
    report.rel_error = (report.squares.0 / f64::max(report.squares.1, 1e-30)).sqrt();
    report.limit("largest logit difference", report.max_error, tolerance.logit_max);
    report.limit("largest weight difference", report.weight_error, tolerance.weight_max);
    report
}

/// The larger of the two; NaN wins, so that it cannot hide.
fn max(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

/// Ids, ascending, and weights of one token.
fn sorted_route(routed: &Routed, at: usize) -> (Vec<i32>, Vec<f32>) {
    let range = at * routed.top_k..(at + 1) * routed.top_k;
    let mut pairs: Vec<(i32, f32)> =
        routed.ids[range.clone()].iter().copied().zip(routed.weights[range].to_vec()).collect();
    pairs.sort_by_key(|pair| pair.0);
    pairs.into_iter().unzip()
}

fn argmax(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (i, &v)| if v > logits[best] { i } else { best })
}

impl PromptReport {
    fn limit(&mut self, what: &str, value: f64, limit: f64) {
        let within = value <= limit;
        if !within {
            self.failures.push(format!("{what} {value:.3e} is above {limit:.1e}"));
        }
    }

    fn compare_logits(
        &mut self,
        expected: &[f32],
        actual: &[f32],
        at: usize,
        tolerance: &Tolerance,
    ) {
        let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / expected.len() as f64;
        let (mut error, mut power) = (0.0, 0.0);
        for (&a, &b) in actual.iter().zip(expected) {
            let difference = f64::from(a) - f64::from(b);
            self.max_error = max(self.max_error, difference.abs());
            error += difference * difference;
            power += (f64::from(b) - mean).powi(2);
        }
        self.squares = (self.squares.0 + error, self.squares.1 + power);
        let rel = (error / f64::max(power, 1e-30)).sqrt();
        self.limit(&format!("relative error at position {at}"), rel, tolerance.position_rel);
    }

    /// The token that this position chooses, where the reference chose one.
    fn compare_greedy(
        &mut self,
        prompt: &Prompt,
        logits: &[f32],
        at: usize,
        tolerance: &Tolerance,
        same_route: bool,
    ) {
        let Some(index) = (at + 1).checked_sub(prompt.input_ids.len()) else { return };
        let expected = prompt.greedy_ids[index] as usize;
        if argmax(logits) == expected {
            return;
        }
        self.first_greedy_difference.get_or_insert(index);
        let reference = &prompt.logits[at];
        let second = reference.iter().enumerate().filter(|(i, _)| *i != expected);
        let second = second.map(|(_, &v)| v).fold(f32::NEG_INFINITY, f32::max);
        let gap = reference[expected] - second;
        let close_call = gap.abs() < tolerance.top2_gap;
        if same_route && !close_call {
            let chosen = argmax(logits);
            self.failures.push(format!("greedy token {index} is {chosen} instead of {expected}"));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12} {:>9} {:>9} {:>10} {:>10} {:>8} {:>7}  first differing greedy token",
            "prompt", "positions", "compared", "max error", "RMS error", "rel", "experts"
        )?;
        for p in &self.prompts {
            writeln!(
                f,
                "{:<12} {:>9} {:>9} {:>10.2e} {:>10.2e} {:>7.3}% {:>7}  {}",
                p.name,
                p.positions,
                p.compared,
                p.max_error,
                p.rms_error,
                p.rel_error * 100.0,
                p.expert_mismatches,
                p.first_greedy_difference.map_or("none".into(), |i| i.to_string())
            )?;
            for failure in p.failures.iter().take(5) {
                writeln!(f, "  FAIL {failure}")?;
            }
            if p.failures.len() > 5 {
                writeln!(f, "  FAIL and {} more", p.failures.len() - 5)?;
            }
        }
        let verdict = if self.passed { "within tolerance" } else { "BEYOND TOLERANCE" };
        write!(f, "{verdict}, relative error over all prompts {:.4}%", self.rel_error * 100.0)
    }
}
