//! Who owns which block of the KV cache, and which full blocks hold a known prefix (vLLM
//! v1/core/block_pool.py): pure bookkeeping, no device.

use std::{collections::HashMap, sync::Arc};

/// Names the tokens up to the end of a full block, exactly: no hash that two prefixes may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixId(u64);

impl PrefixId {
    /// The prefix without tokens.
    pub const EMPTY: Self = Self(0);
}

/// A prefix as one block more than another. The salt is part of the first block only.
#[derive(Debug, PartialEq, Eq, Hash)]
struct PrefixKey {
    parent: PrefixId,
    tokens: Box<[u32]>, // [block_size]
    salt: Option<Arc<str>>,
}

/// A pool of cache blocks. Block 0, the null block, is never handed out: it heads the ring of free
/// blocks, which is taken from in front; blocks worth keeping join it at the back.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    cached: HashMap<Arc<PrefixKey>, (PrefixId, u32)>,
    n_free: usize,
    last_prefix: u64,
    caching: bool,
    /// Positions per block.
    pub block_size: usize,
}

#[derive(Debug, Clone, Default)]
struct Block {
    /// Tables that hold it; free if none.
    users: u32,
    previous: u32,
    next: u32,
    key: Option<Arc<PrefixKey>>,
}

impl BlockPool {
    /// All blocks free, nothing cached. Without `caching` no prefix is ever found.
    pub fn new(n_blocks: usize, block_size: usize, caching: bool) -> Self {
        let mut pool = Self {
            blocks: vec![Block::default(); n_blocks.max(1)],
            cached: HashMap::new(),
            n_free: 0,
            last_prefix: 0,
            caching,
            block_size,
        };
        (1..n_blocks as u32).for_each(|id| pool.link_before(id, 0));
        pool
    }

    /// Blocks that can be owned at all.
    pub fn usable(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Blocks that nobody owns.
    pub fn n_free(&self) -> usize {
        self.n_free
    }

    /// Extends `table` until it holds `n_tokens` positions; changes nothing if that is impossible.
    pub fn grow(&mut self, table: &mut Vec<u32>, n_tokens: usize) -> bool {
        let missing = n_tokens.div_ceil(self.block_size).saturating_sub(table.len());
        if missing > self.n_free {
            return false;
        }
        for _ in 0..missing {
            let id = self.blocks[0].next;
            self.forget(id);
            self.take(id);
            table.push(id);
        }
        true
    }

    /// Takes all blocks of `table` back. Cached ones stay findable; the last is the first to go.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for id in table.drain(..).rev() {
            let block = &mut self.blocks[id as usize];
            block.users -= 1;
            if block.users == 0 {
                let before = if block.key.is_some() { 0 } else { self.blocks[0].next };
                self.link_before(id, before);
            }
        }
    }

    /// The blocks of the longest cached prefix of `tokens`, taken, and that prefix.
    pub fn find(&mut self, tokens: &[u32], salt: Option<&Arc<str>>) -> (Vec<u32>, PrefixId) {
        let (mut table, mut prefix) = (Vec::new(), PrefixId::EMPTY);
        if self.caching {
            for tokens in tokens.chunks_exact(self.block_size) {
                let Some(&(id, block)) = self.cached.get(&key(prefix, tokens, salt)) else { break };
                self.take(block);
                table.push(block);
                prefix = id;
            }
        }
        (table, prefix)
    }

    /// Makes a full block of a table findable as `parent` and then `tokens`. A block with the same
    /// content that is already known stays the one that is found.
    pub fn publish(
        &mut self,
        block: u32,
        parent: PrefixId,
        tokens: &[u32],
        salt: Option<&Arc<str>>,
    ) -> PrefixId {
        if !self.caching {
            return PrefixId::EMPTY;
        }
        let key = Arc::new(key(parent, tokens, salt));
        if let Some(&(id, _)) = self.cached.get(&key) {
            return id;
        }
        self.last_prefix += 1;
        let id = PrefixId(self.last_prefix);
        self.blocks[block as usize].key = Some(key.clone());
        self.cached.insert(key, (id, block));
        id
    }

    /// Makes a block no longer findable.
    pub fn forget(&mut self, block: u32) {
        if let Some(key) = self.blocks[block as usize].key.take() {
            self.cached.remove(&key);
        }
    }

    /// Makes all blocks no longer findable.
    pub fn forget_all(&mut self) {
        self.cached.clear();
        self.blocks.iter_mut().for_each(|block| block.key = None);
    }

    fn take(&mut self, id: u32) {
        let Block { users, previous, next, .. } = self.blocks[id as usize];
        if users == 0 {
            self.blocks[previous as usize].next = next;
            self.blocks[next as usize].previous = previous;
            self.n_free -= 1;
        }
        self.blocks[id as usize].users += 1;
    }

    fn link_before(&mut self, id: u32, next: u32) {
        let previous = std::mem::replace(&mut self.blocks[next as usize].previous, id);
        self.blocks[previous as usize].next = id;
        (self.blocks[id as usize].previous, self.blocks[id as usize].next) = (previous, next);
        self.n_free += 1;
    }
}

fn key(parent: PrefixId, tokens: &[u32], salt: Option<&Arc<str>>) -> PrefixKey {
    let salt = salt.filter(|_| parent == PrefixId::EMPTY).cloned();
    PrefixKey { parent, tokens: tokens.into(), salt }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 4;

    impl BlockPool {
        /// Each block is free or held by exactly the tables that name it, and the ring is whole.
        fn check(&self, tables: &[&[u32]]) {
            let mut users = vec![0; self.blocks.len()];
            tables.concat().into_iter().for_each(|id| users[id as usize] += 1);
            assert_eq!(users, self.blocks.iter().map(|b| b.users).collect::<Vec<_>>());
            assert_eq!(users[0], 0, "the null block has an owner");
            let (mut free, mut at) = (0, self.blocks[0].next);
            while at != 0 {
                assert_eq!(users[at as usize], 0);
                assert_eq!(self.blocks[self.blocks[at as usize].next as usize].previous, at);
                (free, at) = (free + 1, self.blocks[at as usize].next);
                assert!(free < self.blocks.len(), "the ring does not close");
            }
            assert_eq!((free, free), (self.n_free, users.iter().filter(|&&u| u == 0).count() - 1));
            for (key, &(_, block)) in &self.cached {
                assert!(Arc::ptr_eq(key, self.blocks[block as usize].key.as_ref().unwrap()));
            }
        }
    }

    proptest! {
        /// Whatever happens, no block leaks or is written by two owners, and a found block holds
        /// the tokens (and salt) that were asked for.
        #[test]
        fn blocks_neither_leak_nor_alias(
            n_blocks in 1usize..24,
            caching in any::<bool>(),
            steps in prop::collection::vec((0usize..4, 0u32..3, 1usize..30, 0u8..4), 0..80),
        ) {
            let mut pool = BlockPool::new(n_blocks, SIZE, caching);
            // What each block holds: the salt and all tokens up to its end.
            let mut content: Vec<(u32, Vec<u32>)> = vec![(0, Vec::new()); n_blocks];
            let mut tables: Vec<Vec<u32>> = vec![Vec::new(); 4];
            let salts: Vec<Option<Arc<str>>> = vec![None, Some("a".into()), Some("b".into())];
            for (who, salt, n_tokens, kind) in steps {
                pool.release(&mut tables[who]);
                if kind == 0 {
                    pool.check(&[&tables[0], &tables[1], &tables[2], &tables[3]]);
                    continue;
                }
                // Few different texts, so that prefixes meet.
                let tokens: Vec<u32> =
                    (0..n_tokens).map(|i| if i < 9 { 7 } else { u32::from(kind) }).collect();
                let (mut table, mut prefix) = pool.find(&tokens, salts[salt as usize].as_ref());
                prop_assert!(caching || table.is_empty());
                for (i, &block) in table.iter().enumerate() {
                    let expected = (salt, tokens[..(i + 1) * SIZE].to_vec());
                    prop_assert_eq!(&content[block as usize], &expected);
                }
                let n_found = table.len();
                if pool.grow(&mut table, n_tokens) {
                    prop_assert_eq!(table.len(), n_tokens.div_ceil(SIZE));
                    for i in n_found..table.len() {
                        let block = table[i];
                        prop_assert!(!tables.iter().any(|t| t.contains(&block)));
                        let end = ((i + 1) * SIZE).min(n_tokens);
                        content[block as usize] = (salt, tokens[..end].to_vec());
                        if end == (i + 1) * SIZE {
                            let tokens = &tokens[i * SIZE..end];
                            let salt = salts[salt as usize].as_ref();
                            prefix = pool.publish(block, prefix, tokens, salt);
                        }
                    }
                }
                tables[who] = table;
                pool.check(&[&tables[0], &tables[1], &tables[2], &tables[3]]);
            }
            tables.iter_mut().for_each(|table| pool.release(table));
            prop_assert_eq!(pool.n_free(), n_blocks - 1);
        }
    }

    #[test]
    fn the_least_recently_used_prefix_goes_first() {
        let mut pool = BlockPool::new(4, SIZE, true);
        for text in [1, 2] {
            let mut table = Vec::new();
            assert!(pool.grow(&mut table, SIZE));
            pool.publish(table[0], PrefixId::EMPTY, &[text; SIZE], None);
            pool.release(&mut table);
        }
        let (mut first, _) = pool.find(&[1; SIZE], None);
        pool.release(&mut first);
        // One block was never used; the next to go is that of text 2.
        assert!(pool.grow(&mut first, 2 * SIZE));
        assert!(pool.find(&[2; SIZE], None).0.is_empty());
        assert_eq!(pool.find(&[1; SIZE], None).0.len(), 1);
    }
}
