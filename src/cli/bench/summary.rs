//! Numbers of many requests in few, and how they are printed.

use serde_json::{Value, json};

use super::subject::Output;
use crate::cli::report::print_line;

/// Sorted numbers.
#[derive(Debug)]
pub(super) struct Sorted(Vec<f64>);

impl Sorted {
    pub(super) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// 0 for no values.
    pub(super) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }

    /// Standard deviation.
    pub(super) fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares = self.0.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
        (squares / self.0.len().max(1) as f64).sqrt()
    }

    /// Linear between neighbours, as numpy does; 0 for no values.
    pub(super) fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let at = percent / 100.0 * last as f64;
        let (low, high) = (self.0[at as usize], self.0[(at.ceil() as usize).min(last)]);
        low + (high - low) * at.fract()
    }
}

/// Prints the named fields of a report, or all of it as JSON.
pub(super) fn print(output: Output, report: &Value, rows: &[(&str, &str)]) -> anyhow::Result<()> {
    if output == Output::Json {
        return print_line(report);
    }
    if output == Output::Md {
        print_line("| | |\n| --- | ---: |")?;
    }
    for (what, field) in rows {
        let value = match &report[field] {
            Value::Number(n) if n.is_f64() => format!("{:.2}", n.as_f64().unwrap_or(0.0)),
            Value::String(text) => text.clone(),
            Value::Null => continue,
            other => other.to_string(),
        };
        match output {
            Output::Md => print_line(format_args!("| {what} | {value} |"))?,
            _ => print_line(format_args!("{what:<38} {value:>14}"))?,
        }
    }
    Ok(())
}

/// `mean_NAME_ms`, `median_NAME_ms`, `std_NAME_ms` and `p99_NAME_ms` of some seconds.
pub(super) fn add_times(report: &mut Value, name: &str, seconds: Vec<f64>) {
    let sorted = Sorted::new(seconds);
    for (kind, seconds) in [
        ("mean", sorted.mean()),
        ("median", sorted.percentile(50.0)),
        ("std", sorted.deviation()),
        ("p99", sorted.percentile(99.0)),
    ] {
        report[format!("{kind}_{name}_ms")] = json!(seconds * 1e3);
    }
}
