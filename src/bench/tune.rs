//! Which way to run the experts is fastest on this adapter, by trying all of them.

use crate::{Result, engine::Runner, model::ExpertShape};

use super::moe_layer::layer_seconds;

/// What ways to run a layer's experts took for a number of tokens.
#[derive(Debug, Clone)]
pub struct TuneRow {
    /// Tokens.
    pub tokens: usize,
    /// Rows of a block, 1 for none, and seconds of a layer.
    pub tried: Vec<(usize, f64)>,
    /// What would be chosen without measuring.
    pub by_rule: usize,
    /// The fastest, if it is faster than that by more than measurements differ.
    pub best: usize,
}

/// Share of the time by which another way must be faster than that of the rule.
const MARGIN: f64 = 0.03;

/// Times every way for each number of tokens, of which `done` hears, and lets the device run by the
/// result from now on. The model's layers are all alike, or the first one's shape counts.
///
/// # Errors
/// [`crate::device::DeviceError`] if the device fails.
pub fn tune(
    runner: &mut Runner,
    tokens: &[usize],
    done: &mut dyn FnMut(&TuneRow),
) -> Result<Vec<TuneRow>> {
    let (spec, precision) = (runner.model().spec.clone(), runner.model().precision);
    let caps = runner.device().caps();
    let Some((_, moe)) = spec.moe_layers().next() else { return Ok(Vec::new()) };
    let shape = ExpertShape::of(&spec, moe, precision);
    let name = shape.name(&caps);
    let mut rows = Vec::new();
    if let Some(&first) = tokens.first() {
        // Once the first of all came out four times too slow on an H200, for an unknown cause.
        layer_seconds(runner, first)?;
    }
    for &tokens in tokens {
        let mut tried = Vec::new();
        for rows in shape.candidates(&caps, precision.activations) {
            runner.device().tune(&name, vec![(usize::MAX, rows)]);
            tried.push((rows, layer_seconds(runner, tokens)?));
        }
        let by_rule = shape.by_rule(&caps, precision.activations, tokens);
        let row = TuneRow { tokens, best: best(&tried, by_rule), tried, by_rule };
        done(&row);
        rows.push(row);
    }
    runner.device().tune(&name, choices(&rows));
    Ok(rows)
}

fn best(tried: &[(usize, f64)], by_rule: usize) -> usize {
    let seconds = |(_, seconds): &&(usize, f64)| *seconds;
    let fastest = tried.iter().min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let ruled = tried.iter().find(|(rows, _)| *rows == by_rule);
    match (fastest, ruled) {
        (Some(fastest), Some(ruled)) if fastest.1 < (1.0 - MARGIN) * ruled.1 => fastest.0,
        _ => by_rule,
    }
}

/// Choices by largest number of tokens; between two measured numbers that differ the boundary is
/// half way on a logarithmic scale.
fn choices(rows: &[TuneRow]) -> Vec<(usize, usize)> {
    let mut choices: Vec<(usize, usize)> = Vec::new();
    for pair in rows.windows(2).filter(|pair| pair[0].best != pair[1].best) {
        let middle = ((pair[0].tokens * pair[1].tokens) as f64).sqrt();
        choices.push((middle as usize, pair[0].best));
    }
    choices.extend(rows.last().map(|row| (row.tokens, row.best)));
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_does_not_overrule() {
        let tried = [(1, 1.0), (16, 0.98), (32, 1.5)];
        assert_eq!(best(&tried, 1), 1, "2 % are nothing");
        assert_eq!(best(&tried, 32), 16);
        assert_eq!(best(&tried, 64), 64, "what was not tried is not known to be slower");
    }

    #[test]
    fn boundaries_lie_between_measured_sizes() {
        let row = |tokens, best| TuneRow { tokens, best, by_rule: 1, tried: Vec::new() };
        let rows = [row(1, 1), row(8, 1), row(32, 16), row(128, 16), row(512, 64)];
        assert_eq!(choices(&rows), [(16, 1), (256, 16), (512, 64)]);
        assert_eq!(choices(&rows[..2]), [(8, 1)]);
        assert!(choices(&[]).is_empty());
    }
}
