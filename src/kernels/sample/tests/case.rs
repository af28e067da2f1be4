//! One launch of the kernel: built up row by row, run on any device, held against the reference.

use super::*;

/// A launch: every row has its own logits and parameters.
#[derive(Default)]
pub(super) struct Case {
    pub(super) n_vocab: usize,
    pub(super) logits: Vec<Vec<f32>>, // [n][n_vocab]
    pub(super) rows: Vec<SamplingRow>,
    pub(super) counts: Vec<Vec<u32>>, // [n_counts][n_vocab]
    pub(super) masks: Vec<Vec<bool>>, // [n_masks][n_vocab]
    pub(super) biases: Vec<(u32, f32)>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) ids: Vec<u32>,
    pub(super) counts: Vec<u32>,
}

impl Case {
    pub(super) fn new(n_vocab: usize) -> Self {
        Self { n_vocab, ..Self::default() }
    }

    pub(super) fn push(&mut self, logits: &[f32], row: SamplingRow) {
        assert_eq!(logits.len(), self.n_vocab);
        self.logits.push(logits.to_vec());
        self.rows.push(row);
    }

    /// Logits with garbage between vocabulary and stride.
    pub(super) fn padded_logits(&self) -> (usize, Vec<f32>) {
        let stride = padded(self.n_vocab) + 32;
        let garbage = [f32::NAN, 1e30, f32::INFINITY, f32::MAX];
        let row = |x: &Vec<f32>| -> Vec<f32> {
            let tail = (self.n_vocab..stride).map(|i| garbage[i % 4]);
            x.iter().copied().chain(tail).collect()
        };
        (stride, self.logits.iter().flat_map(row).collect())
    }

    pub(super) fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.rows)
    }

    pub(super) fn mask_words(&self) -> usize {
        self.n_vocab.div_ceil(32)
    }

    /// Masks, and a row more that nobody names.
    pub(super) fn flat_masks(&self) -> Vec<u32> {
        let word = |bits: &[bool]| bits.iter().rev().fold(0, |w, &bit| w << 1 | u32::from(bit));
        let rows = self.masks.iter().flat_map(|mask| mask.chunks(32).map(word));
        rows.chain(vec![0; self.mask_words()]).collect()
    }

    /// Biases, and one more that nobody names.
    pub(super) fn flat_biases(&self) -> Vec<u32> {
        let pairs = self.biases.iter().chain(&[(0, f32::NAN)]);
        pairs.flat_map(|&(id, bias)| [id, bias.to_bits()]).collect()
    }

    /// Row `i` of logits as mask and biases leave it.
    pub(super) fn constrained(&self, i: usize) -> Vec<f32> {
        let (mut y, row) = (self.logits[i].clone(), &self.rows[i]);
        for (id, y) in y.iter_mut().enumerate() {
            let mask = self.masks.get(row.mask_row as usize);
            if mask.is_some_and(|mask| !mask[id]) {
                *y = f32::NEG_INFINITY;
            }
        }
        let biases = self.biases[row.bias_start as usize..].iter().take(row.n_biases as usize);
        biases.for_each(|&(id, bias)| y[id as usize] += bias);
        y
    }

    /// Counts, one row more than named, as a flat array.
    pub(super) fn flat_counts(&self) -> Vec<u32> {
        let mut counts = self.counts.concat();
        counts.resize(counts.len() + self.n_vocab, 7);
        counts
    }

    pub(super) fn parity(&self) {
        let (stride, logits) = self.padded_logits();
        let n = self.rows.len();
        check(1e-7, |bench, rec| {
            // Not compared: the twin needs no slices.
            let slices = Sample::alloc_slices(&mut bench.device, n, self.n_vocab).unwrap();
            let kernel = Sample {
                logits: bench.floats(&[n, stride], F32, |_, i| logits[i]),
                n_vocab: self.n_vocab,
                rows: bench.ints(&[n, SamplingRow::WORDS], U32, self.words()),
                masks: bench.ints(
                    &[self.masks.len() + 1, self.mask_words()],
                    U32,
                    &self.flat_masks(),
                ),
                biases: bench.ints(&[self.biases.len() + 1, 2], U32, &self.flat_biases()),
                counts: bench.ints(
                    &[self.counts.len() + 1, self.n_vocab],
                    U32,
                    &self.flat_counts(),
                ),
                scratch: bench.normal(&[n, stride], F32),
                slices,
                ids: bench.ints(&[n], U32, &vec![9; n]),
                stage: SampleStage::Whole,
            };
            sample(rec, kernel);
        });
    }

    pub(super) fn run(&self, mut device: Device) -> Outcome {
        let (stride, logits) = self.padded_logits();
        let (n, counts) = (self.rows.len(), self.flat_counts());
        let slices = Sample::alloc_slices(&mut device, n, self.n_vocab).unwrap();
        let mut alloc = |shape: &[usize], dtype| device.alloc("test", shape, dtype).unwrap();
        let kernel = Sample {
            logits: alloc(&[n, stride], F32),
            n_vocab: self.n_vocab,
            rows: alloc(&[n, SamplingRow::WORDS], U32),
            masks: alloc(&[self.masks.len() + 1, self.mask_words()], U32),
            biases: alloc(&[self.biases.len() + 1, 2], U32),
            counts: alloc(&[self.counts.len() + 1, self.n_vocab], U32),
            scratch: alloc(&[n, stride], F32),
            slices,
            ids: alloc(&[n], U32),
            stage: SampleStage::Whole,
        };
        device.write(&kernel.logits, &logits);
        device.write(&kernel.rows, self.words());
        device.write(&kernel.masks, &self.flat_masks());
        device.write(&kernel.biases, &self.flat_biases());
        device.write(&kernel.counts, &counts);
        let mut rec = Recording::new(&device.caps());
        sample(&mut rec, kernel);
        let plan = device.prepare(rec).unwrap();
        device.run(&plan).unwrap();
        Outcome {
            ids: device.read_now(&kernel.ids).unwrap(),
            counts: device.read_now(&kernel.counts).unwrap(),
        }
    }

    /// The twin gives what the reference gives, and the GPU what the twin gives.
    pub(super) fn verify(&self) {
        let outcome = self.run(Device::cpu());
        let mut counts = self.flat_counts();
        for (i, row) in self.rows.iter().enumerate() {
            let seen = self.counts.get(row.counts_row as usize);
            let id = reference(&self.constrained(i), seen, row);
            assert_eq!(outcome.ids[i], id as u32, "row {i}: {row:?}");
            if seen.is_some() {
                counts[row.counts_row as usize * self.n_vocab + id] += 1;
            }
        }
        assert_eq!(outcome.counts, counts);
        self.parity();
    }
}
