//! Sampling against a second, literal implementation that sorts; the devices against each other.

use super::*;
use crate::{
    device::{
        DType::{F32, U32},
        Device, Params as _, Recording, compose,
    },
    kernels::testing::{check, gpu},
    weights::padded,
};

mod case;

use case::Case;

/// vLLM's pipeline in f64 over sorted probabilities. Refuses data on which rounding decides: a
/// mass within 2e-6 of top_p, or two candidates within 2e-5 of each other.
fn reference(logits: &[f32], counts: Option<&Vec<u32>>, row: &SamplingRow) -> usize {
    let mut y: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for (y, &count) in y.iter_mut().zip(counts.into_iter().flatten()) {
        let r = f64::from(row.repetition_penalty);
        if count > 0 {
            *y = if *y > 0.0 { *y / r } else { *y * r };
        }
        let times = count << 1 >> 1;
        *y -= f64::from(row.frequency_penalty) * f64::from(times);
        *y -= f64::from(row.presence_penalty) * f64::from(times.min(1));
    }
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|&a, &b| y[b].partial_cmp(&y[a]).unwrap()); // stable: ids ascend
    if row.temperature < 1e-5 {
        return order[0];
    }
    y.iter_mut().for_each(|y| *y /= f64::from(row.temperature));
    let mut kept: Vec<(usize, f64)> =
        order.iter().map(|&id| (id, (y[id] - y[order[0]]).exp())).collect();
    kept.retain(|&(_, p)| p >= f64::from(row.min_p));
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    let total: f64 = kept.iter().map(|k| k.1).sum();
    let (mut mass, mut end) = (0.0, 0);
    while row.top_p < 1.0 && end < kept.len() {
        mass += kept[end].1 / total;
        assert!((mass - f64::from(row.top_p)).abs() > 2e-6, "top_p lies on the edge: {row:?}");
        end += 1;
        if mass > f64::from(row.top_p) {
            kept.truncate(end);
        }
    }
    let mut scores: Vec<(f64, usize)> =
        kept.iter().map(|&(id, _)| (y[id] + gumbel(row, id), id)).collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0));
    if let [first, second, ..] = scores[..] {
        assert!(first.0 - second.0 > 2e-5, "two candidates are too close: {row:?}");
    }
    scores[0].1
}

/// Reproducible normal deviates, three times as wide.
fn normal(n: usize, seed: u32) -> Vec<f32> {
    let uniform = |w: u32| (f64::from(w) + 0.5) / 4_294_967_296.0;
    let deviate = |i: u32| {
        let w = philox([i, 0, 0, 1], [seed, 77]);
        (-2.0 * uniform(w[0]).ln()).sqrt() * (std::f64::consts::TAU * uniform(w[1])).cos()
    };
    (0..n as u32).map(|i| (3.0 * deviate(i)) as f32).collect()
}

fn random(seed: u32, step: u32) -> SamplingRow {
    SamplingRow {
        temperature: 1.0,
        seed_low: seed,
        seed_high: seed ^ 0x5555,
        step,
        ..SamplingRow::default()
    }
}

#[test]
fn philox_known_answers() {
    // kat_vectors of Random123.
    let ones = u32::MAX;
    assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(philox([ones; 4], [ones; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
    let answer = [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1];
    assert_eq!(philox(pi, [0xa4093822, 0x299f31d0]), answer);
}

#[test]
fn row_struct_is_the_shaders() {
    let source = compose(&Shader::new(Sample::NAME)).unwrap();
    let module = naga::front::wgsl::parse_str(&source).unwrap();
    let rows = module.global_variables.iter().find(|(_, v)| v.name.as_deref() == Some("rows"));
    let naga::TypeInner::Array { base, stride, .. } = module.types[rows.unwrap().1.ty].inner else {
        panic!("rows is an array");
    };
    let naga::TypeInner::Struct { members, .. } = &module.types[base].inner else {
        panic!("rows holds structs");
    };
    let fields = members.iter().enumerate().map(|(i, m)| {
        assert_eq!(m.offset as usize, 4 * i);
        let dtype = match module.types[m.ty].inner {
            naga::TypeInner::Scalar(naga::Scalar::U32) => "u32",
            naga::TypeInner::Scalar(naga::Scalar::F32) => "f32",
            _ => "?",
        };
        (m.name.as_deref().unwrap(), dtype)
    });
    assert_eq!(fields.collect::<Vec<_>>(), SamplingRow::FIELDS);
    assert_eq!((stride as usize, size_of::<SamplingRow>()), (80, 80));
}

#[test]
fn greedy_takes_the_lower_id_of_a_tie() {
    let mut case = Case::new(601);
    for (i, winners) in [[0, 600], [5, 6], [257, 513], [3, 4], [599, 600]].iter().enumerate() {
        let mut logits = normal(601, i as u32);
        winners.iter().for_each(|&id| logits[id] = 50.0);
        for temperature in [0.0, 9e-6] {
            case.push(&logits, SamplingRow { temperature, flags: 1, ..SamplingRow::default() });
        }
        // One candidate only, whatever the temperature.
        case.push(&logits, SamplingRow { top_k: 1, ..random(1, 2) });
        // Zeros of both signs are a tie, below them are only negative numbers.
        let mut zeros: Vec<f32> = logits.iter().map(|x| -x.abs() - 1.0).collect();
        (zeros[winners[0]], zeros[winners[1]]) = (-0.0, 0.0);
        case.push(&zeros, SamplingRow::default());
        case.push(&zeros, SamplingRow { top_k: 1, ..random(1, 2) });
    }
    case.verify();
    let ids = case.run(gpu()).ids;
    assert_eq!(ids[..6], [0, 0, 0, 0, 0, 5]);
}

#[test]
fn temperature() {
    let mut case = Case::new(100);
    for (i, temperature) in [0.0, 1e-6, 1.1e-5, 1e-3, 0.5, 1.0, 3.0, 1e4].into_iter().enumerate() {
        for step in 0..8 {
            let row = SamplingRow { temperature, ..random(i as u32, step) };
            case.push(&normal(100, step), SamplingRow { flags: SamplingRow::LOGPROB, ..row });
        }
    }
    case.verify();
    let ids = case.run(gpu()).ids;
    assert_eq!(ids[..8], ids[16..24], "a tiny temperature is as good as greedy");
    assert_ne!(ids[..8], ids[48..56], "a high one is not");
}

/// top_k, top_p, min_p: each alone, all together, at their ends.
const FILTERS: [(u32, f32, f32); 15] = [
    (0, 1.0, 0.0),
    (2, 1.0, 0.0),
    (40, 1.0, 0.0),
    (300, 1.0, 0.0),
    (u32::MAX, 1.0, 0.0),
    (0, 0.87, 0.0),
    (0, 0.33, 0.0),
    (0, 1e-9, 0.0),
    (0, 0.973, 0.0),
    (0, 1.0, 0.053),
    (0, 1.0, 1.0),
    (40, 0.87, 0.0),
    (7, 0.53, 0.11),
    (0, 0.71, 0.023),
    (300, 1.0, 0.0037),
];

#[test]
fn filters() {
    for n_vocab in [1, 3, 50, 512, 1001] {
        let mut case = Case::new(n_vocab);
        let continuous = normal(n_vocab, 5);
        // Many equal logits, three different ones, and one only: the ids decide.
        let steps: Vec<f32> = continuous.iter().map(|x| (x * 2.0).round() / 2.0).collect();
        let three: Vec<f32> = continuous.iter().map(|x| (x / 4.0).round() + 0.5).collect();
        for (kind, logits) in [continuous, steps, three, vec![-2.5; n_vocab]].iter().enumerate() {
            for (i, &(top_k, top_p, min_p)) in FILTERS.iter().enumerate() {
                for (step, temperature) in [0.61, 1.0, 2.47, 50.0].into_iter().enumerate() {
                    let row = random((kind * 100 + i) as u32, step as u32);
                    case.push(logits, SamplingRow { temperature, top_k, top_p, min_p, ..row });
                }
            }
        }
        case.verify();
    }
}

#[test]
fn large_vocabulary() {
    let mut case = Case::new(151_937);
    let logits = normal(case.n_vocab, 3);
    // So peaked that no token at the edge of a top_p weighs next to nothing.
    let peaked: Vec<f32> = logits.iter().map(|x| x * 3.0).collect();
    for (i, &(top_k, top_p, min_p)) in FILTERS.iter().enumerate() {
        let row = SamplingRow { top_k, top_p, min_p, ..random(i as u32, 9) };
        let logits = if top_p < 1.0 { &peaked } else { &logits };
        case.push(logits, SamplingRow { temperature: 0.9, flags: SamplingRow::LOGPROB, ..row });
    }
    case.push(&logits, SamplingRow { flags: SamplingRow::LOGPROB, ..SamplingRow::default() });
    // Ties that end at a high id.
    let ties: Vec<f32> = (0..case.n_vocab).map(|i| if i < 100_000 { -30.0 } else { 1.0 }).collect();
    for (top_k, top_p) in [(300, 1.0), (200, 1.0), (30_000, 1.0), (0, 0.53), (40_001, 0.73)] {
        case.push(&ties, SamplingRow { top_k, top_p, ..random(7, top_k) });
    }
    case.verify();
}

#[test]
fn penalties_count_prompt_and_output() {
    let mut case = Case::new(203);
    let penalties = [
        (1.3, 0.0, 0.0),
        (1.0, 0.7, 0.0),
        (1.0, 0.0, 0.4),
        (1.2, 0.5, 0.3),
        (0.8, -0.5, -0.2),
        (1.0, 0.0, 0.0),
    ];
    let n = penalties.len() as u32 * 4;
    for (i, &(repetition_penalty, presence_penalty, frequency_penalty)) in
        penalties.iter().enumerate()
    {
        for (j, temperature) in [0.0, 0.8, 1.0, 1.7].into_iter().enumerate() {
            let at = (i * 4 + j) as u32;
            let row = SamplingRow {
                temperature,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                top_k: if j == 2 { 20 } else { 0 },
                // Rows of counts in another order than rows of logits.
                counts_row: n - 1 - at,
                flags: SamplingRow::LOGPROB,
                ..random(at, 3)
            };
            let logits = normal(203, at);
            case.push(&logits, row);
            // The same without counts: penalties do nothing.
            case.push(&logits, SamplingRow { counts_row: SamplingRow::NO_COUNTS, ..row });
        }
    }
    // A third of the tokens in the prompt, a third generated up to four times, some both.
    let count = |i: u32| match i % 6 {
        0 | 1 => Sample::PROMPT,
        2 => 1 + i % 4,
        3 => Sample::PROMPT | (1 + i % 3),
        _ => 0,
    };
    case.counts = (0..n).map(|r| (0..203).map(|i| count(i * 7 + r)).collect()).collect();
    case.verify();
}

#[test]
fn penalties_change_the_greedy_token_step_by_step() {
    let mut case = Case::new(5);
    let row = SamplingRow { counts_row: 0, frequency_penalty: 1.0, ..SamplingRow::default() };
    case.push(&[1.0, 3.5, 3.0, 0.0, -1.0], row);
    case.counts = vec![vec![0, Sample::PROMPT, 0, 0, 0]];
    let mut ids = Vec::new();
    for _ in 0..4 {
        let outcome = case.run(gpu());
        ids.push(outcome.ids[0]);
        case.counts = vec![outcome.counts[..5].to_vec()];
    }
    assert_eq!(ids, [1, 2, 1, 2]);
    assert_eq!(case.counts[0], [0, Sample::PROMPT | 2, 2, 0, 0]);
}

#[test]
fn masks_and_biases_decide_what_can_be_sampled() {
    for n_vocab in [5, 203, 1026] {
        let mut case = Case::new(n_vocab);
        let last = n_vocab as u32 - 1;
        case.masks = vec![
            (0..n_vocab).map(|id| id % 3 == 1).collect(),
            (0..n_vocab).map(|id| id as u32 == last).collect(),
        ];
        // Neighbours, both ends, and a token that is forbidden.
        let ids = [0, 1, 3, 4, last];
        case.biases = ids.map(|id| (id, [9.5, -4.25, f32::NEG_INFINITY][id as usize % 3])).to_vec();
        case.biases.dedup_by_key(|b| b.0);
        for (i, (mask_row, bias_start, n_biases)) in
            [(0, 0, 0), (1, 0, 0), (u32::MAX, 0, 4), (0, 1, 3), (u32::MAX, 2, 1), (0, 0, 4)]
                .into_iter()
                .enumerate()
        {
            for (j, temperature) in [0.0, 0.9, 1.4].into_iter().enumerate() {
                let row = random(i as u32, j as u32);
                let row = SamplingRow { temperature, mask_row, bias_start, n_biases, ..row };
                case.push(&normal(n_vocab, (i * 3 + j) as u32), row);
                case.push(&normal(n_vocab, 7), SamplingRow { top_k: 3, ..row });
            }
        }
        case.verify();
        assert!(case.run(gpu()).ids[6..12].iter().all(|&id| id == last));
    }
}

#[test]
fn a_row_is_sampled_alike_alone_and_in_a_batch() {
    let mut batch = Case::new(515);
    for i in 0..12 {
        let (top_k, top_p, min_p) = FILTERS[i % FILTERS.len()];
        batch.push(&normal(515, i as u32), SamplingRow { top_k, top_p, min_p, ..random(4, 2) });
    }
    for device in [Device::cpu as fn() -> Device, gpu] {
        let together = batch.run(device()).ids;
        batch.logits.reverse();
        batch.rows.reverse();
        let mut reversed = batch.run(device()).ids;
        reversed.reverse();
        batch.logits.reverse();
        batch.rows.reverse();
        assert_eq!(together, reversed);
        for i in [0, 5, 11] {
            let mut alone = Case::new(515);
            alone.push(&batch.logits[i], batch.rows[i]);
            assert_eq!(alone.run(device()).ids[0], together[i]);
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let shares = [0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005f64];
    let logits = shares.map(|share| (share.ln() * 0.7) as f32);
    let chi_square = |rows: &dyn Fn(u32) -> SamplingRow, n: u32, device: Device| {
        let mut case = Case::new(8);
        (0..n).for_each(|i| case.push(&logits, SamplingRow { temperature: 0.7, ..rows(i) }));
        let ids = case.run(device).ids;
        let deviation = |(id, share): (usize, &f64)| {
            let seen = ids.iter().filter(|&&i| i == id as u32).count() as f64;
            (seen - share * f64::from(n)).powi(2) / (share * f64::from(n))
        };
        shares.iter().enumerate().map(deviation).sum::<f64>()
    };
    // 24.3 is exceeded once in a thousand (7 degrees of freedom); the seeds are fixed.
    let steps = |i| random(11, i);
    let seeds = |i| random(i, 0);
    for (rows, n, device) in [
        (&steps as &dyn Fn(u32) -> SamplingRow, 20_000, Device::cpu()),
        (&seeds, 20_000, Device::cpu()),
        (&steps, 4_000, gpu()),
    ] {
        let chi_square = chi_square(rows, n, device);
        assert!(chi_square < 24.3, "{chi_square}");
    }
}

#[test]
fn faults_are_marked() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let table: [([f32; 6], u32); 9] = [
        ([nan; 6], Sample::INVALID),
        ([-inf; 6], Sample::INVALID),
        ([inf; 6], Sample::INVALID),
        ([nan, 1.0, -inf, -inf, -inf, -inf], Sample::INVALID | 1),
        ([-inf, -inf, -inf, -inf, -5.0, inf], Sample::INVALID | 4),
        ([-inf, -inf, -inf, -inf, -inf, -1e38], 5),
        ([-inf, -3.4e38, -inf, -inf, -inf, -inf], 1),
        ([0.0, -0.0, 1.0, 3.4e38, -3.4e38, -inf], 3),
        ([-inf, nan, -inf, 0.5, -inf, -inf], Sample::INVALID | 3),
    ];
    let mut case = Case::new(6);
    let mut expected = Vec::new();
    for (i, (logits, id)) in table.iter().enumerate() {
        for (top_k, top_p, min_p) in [(1, 1.0, 0.0), (3, 0.9, 0.1), (0, 1.0, 0.0)] {
            let row = SamplingRow { top_k, top_p, min_p, flags: 1, ..random(i as u32, 1) };
            let counts_row = case.counts.len() as u32;
            case.push(logits, SamplingRow { counts_row, repetition_penalty: 0.5, ..row });
            // A penalty that overflows must not make a token infinite.
            case.counts.push(vec![0, 1, Sample::PROMPT, 2, 0, 1]);
            expected.push(*id);
        }
    }
    for device in [Device::cpu(), gpu()] {
        let outcome = case.run(device);
        assert_eq!(outcome.ids, expected);
        let mut counts = case.flat_counts();
        for (i, &id) in expected.iter().enumerate().filter(|e| e.1 & Sample::INVALID == 0) {
            counts[i * 6 + id as usize] += 1;
        }
        assert_eq!(outcome.counts, counts, "marked rows count nothing");
    }
    case.parity();
}
