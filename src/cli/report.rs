//! Numbers after a run: speed, and the table of kernels.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::Context;
use moewe::{bench::by_kernel, device::Timing, parallel::CacheStats};

/// Prints a line to stdout. Unlike `println!` it does not panic where that is full or closed.
pub(crate) fn print_line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("standard output cannot be written")
}

/// Clock of one answer.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    start: Instant,
    first_piece: Option<Instant>,
    n_pieces: usize,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now(), first_piece: None, n_pieces: 0 }
    }

    /// Call at every piece of text; the first counts.
    pub(crate) fn piece(&mut self) {
        self.first_piece.get_or_insert_with(Instant::now);
        self.n_pieces += 1;
    }

    /// Speeds of an answer of `n_tokens` to a prompt of `n_prompt`.
    pub(crate) fn stop(&self, n_prompt: usize, n_tokens: usize) -> Speed {
        let end = Instant::now();
        let first = self.first_piece.unwrap_or(end);
        let (ttft, decode) = (first - self.start, end - first);
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
        Speed {
            prompt_tokens: n_prompt,
            completion_tokens: n_tokens,
            time_to_first_token_s: ttft.as_secs_f64(),
            prompt_tokens_per_s: rate(n_prompt, ttft),
            // Tokens whose text came at once were not timed one by one.
            decode_tokens_per_s: match self.n_pieces {
                0 | 1 => rate(n_tokens, end - self.start),
                _ => rate(n_tokens.saturating_sub(1), decode),
            },
        }
    }
}

/// Speeds of one answer.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Speed {
    prompt_tokens: usize,
    completion_tokens: usize,
    time_to_first_token_s: f64,
    prompt_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "prompt {} tokens, {:.0} tokens/s; first token after {:.0} ms; answer {} tokens, \
             {:.1} tokens/s",
            self.prompt_tokens,
            self.prompt_tokens_per_s,
            self.time_to_first_token_s * 1e3,
            self.completion_tokens,
            self.decode_tokens_per_s
        )
    }
}

/// Prints what the cache of experts did.
pub(crate) fn print_cache(cache: &CacheStats) {
    eprintln!(
        "expert cache: {} of {} experts on the device, {:.1} % of {} uses hit, {:.1} MiB moved, \
         {} stalls, {} extra turns",
        cache.slots,
        cache.experts,
        cache.hit_rate() * 100.0,
        cache.hits + cache.misses,
        cache.bytes_moved as f64 / f64::from(1 << 20),
        cache.stalls,
        cache.extra_turns
    );
}

/// Prints calls, total time and share by kernel, longest first.
pub(crate) fn print_profile(timings: &[Timing], n_steps: usize) {
    let rows = by_kernel(timings);
    let total: f64 = rows.iter().map(|row| row.2).sum();
    eprintln!("{:<24} {:>8} {:>12} {:>7}", "kernel", "calls", "total ms", "share");
    for (label, calls, seconds) in rows {
        let (ms, share) = (seconds * 1e3, seconds / total * 100.0);
        eprintln!("{label:<24} {calls:>8} {ms:>12.3} {share:>6.1}%");
    }
    let ms = total * 1e3;
    eprintln!("{:<24} {:>8} {ms:>12.3}   over {n_steps} steps", "total", timings.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_comes_at_once_has_the_rate_of_the_whole_answer() {
        let mut watch = Stopwatch::start();
        std::thread::sleep(Duration::from_millis(20));
        watch.piece();
        assert!(watch.stop(1, 8).decode_tokens_per_s <= 8.0 / 0.02);
        std::thread::sleep(Duration::from_millis(5));
        watch.piece();
        // Of two pieces the first one's time is not the answer's.
        let late = watch.stop(1, 8);
        assert!(late.time_to_first_token_s >= 0.02 && late.decode_tokens_per_s <= 7.0 / 0.005);
    }
}
