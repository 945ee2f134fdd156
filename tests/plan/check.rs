//! The plan of one layer, compared with what the rows need. Pages are known by what the table buffer would hold, as a shader
//! knows them: an item's entry gives a cell, and the cell in the dispatch's arena is the page of some list, or a slot of
//! the window.

use std::collections::BTreeMap;
use std::ops::Range;

use concertina::compression::hidden::{HiddenCodec, Transform};
use concertina::kernels::decode::DecodeSpec;
use concertina::kernels::plan::{AttentionPlan, Dispatch, Place, ScorePlace};
use concertina::kernels::prefill::ITEM_ROWS;
use concertina::kernels::score;
use concertina::pool::PageId;

use super::setup::{CAPACITY, KV_HEADS, Owner, Part, Sequence, Setup};

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// Whether a plan computes what the rows of a layer need, each thing once.
pub(crate) fn check(setup: &Setup, plan: &AttentionPlan, layer: u32) -> Result<(), String> {
    let mut rows = Vec::new();
    for (sequence, s) in setup.sequences.iter().enumerate() {
        rows.extend((s.cached..s.cached + s.rows).map(|place| (sequence, place)));
    }
    let dispatches = &plan.plans[plan.of_layer[layer as usize]];
    let after = layer.checked_sub(dispatches.first_layer).ok_or("the plan is of a later layer")?;
    let (window, states) = (BTreeMap::new(), BTreeMap::new());
    let mut checker = Checker { setup, plan, layer, after, rows, window, states };
    // Layers run one after another, and what they leave in the window stays until it is written over.
    for before in 0..layer {
        let dispatches = &plan.plans[plan.of_layer[before as usize]].append;
        checker.fill_window(before, dispatches)?;
    }
    checker.append(&dispatches.append)?;
    checker.seal(&dispatches.seal)?;
    checker.decode(&dispatches.decode)?;
    checker.prefill(&dispatches.prefill)?;
    checker.score(&dispatches.score)?;
    checker.merge(dispatches.merge.clone())
}

struct Checker<'s> {
    setup: &'s Setup,
    plan: &'s AttentionPlan,
    layer: u32,
    /// Layers after the one whose pages the items name.
    after: u32,
    /// Sequence, and place in the tail, of each row.
    rows: Vec<(usize, u32)>,
    /// What each slot of the window, `(KV head, slot)`, holds: sequence, layer and page.
    window: BTreeMap<(u32, u32), (usize, u32, u32)>,
    /// For every state: its `row * KV_HEADS + head`, and the tokens of the list behind it.
    states: BTreeMap<u32, (u32, Range<u32>)>,
}

impl Checker<'_> {
    fn page_size(&self) -> u32 {
        self.setup.shape.page_size
    }

    fn group(&self) -> u32 {
        self.setup.shape.heads.group_size()
    }

    fn sequence(&self, row: u32) -> Result<(usize, &Sequence, u32), String> {
        let (sequence, place) = *self.rows.get(row as usize).ok_or(format!("there is no row {row}"))?;
        Ok((sequence, &self.setup.sequences[sequence], place))
    }

    /// The page that an entry names in an arena.
    fn owner(&self, arena: u16, entry: u32) -> Result<Owner, String> {
        let cell = *self.setup.buffer.get(entry as usize).ok_or(format!("entry {entry} is outside the tables"))?;
        if arena != PageId::WINDOW {
            let owner = self.setup.owners.get(&(arena, cell)).copied();
            return owner.ok_or(format!("entry {entry} names cell {cell} of arena {arena}, where no page begins"));
        }
        let (head, slot) = (entry / self.setup.slots.max(1), entry % self.setup.slots.max(1));
        ensure(entry < self.setup.slots * KV_HEADS, || format!("entry {entry} is outside the window"))?;
        let holds = self.window.get(&(head, slot)).copied();
        let holds = holds.ok_or(format!("slot {slot} of head {head} is used before it is appended to"))?;
        let (sequence, layer, page) = holds;
        Ok(Owner { sequence, layer, head, part: Part::Open, page })
    }

    /// The rows that a layer leaves in the window; no slot takes two pages.
    fn fill_window(&mut self, layer: u32, dispatches: &[Dispatch]) -> Result<(), String> {
        for (_, range) in dispatches.iter().filter(|(place, _)| place.arena == PageId::WINDOW) {
            for item in &self.plan.append[range.start as usize..range.end as usize] {
                let (sequence, _, first) = self.sequence(item.row_lo)?;
                let page = first / self.page_size();
                let at = (item.page_entry / self.setup.slots.max(1), item.page_entry % self.setup.slots.max(1));
                let before = self.window.insert(at, (sequence, layer, page));
                let twice = before.is_some_and(|b| b.1 == layer && b != (sequence, layer, page));
                ensure(!twice && item.layer_stride == 0, || format!("slot {at:?} is used twice, or moves"))?;
            }
        }
        Ok(())
    }

    /// Every row goes to the open form of its page, which is in the window unless the list holds it; not to lists that
    /// are closed, nor to those of other layers.
    fn append(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        let size = self.page_size();
        let mut left = Vec::new();
        for (row, (sequence, _)) in (0_u32..).zip(&self.rows) {
            let s = &self.setup.sequences[*sequence];
            let heads = (0..KV_HEADS).filter(|head| s.owns(self.layer) && s.kept(self.layer, *head).is_some());
            left.extend(heads.map(|head| (row, head)));
        }
        self.fill_window(self.layer, dispatches)?;
        for (place, range) in dispatches {
            ensure(place.codec == HiddenCodec::F16, || format!("rows are appended as {}", place.codec))?;
            for item in &self.plan.append[range.start as usize..range.end as usize] {
                let entry = item.page_entry + self.after * item.layer_stride;
                let (sequence, s, first) = self.sequence(item.row_lo)?;
                let page = first / size;
                let own = self.setup.tables[sequence].list(self.layer, item.kv_head).1.len();
                let passes = page >= s.sealed(size).start + u32::try_from(own).expect("few pages");
                ensure(passes == (place.arena == PageId::WINDOW), || format!("page {page} is in {place:?}"))?;
                let owner = Owner { sequence, layer: self.layer, head: item.kv_head, part: Part::Open, page };
                let found = self.owner(place.arena, entry)?;
                ensure(found == owner, || format!("row {} of {owner:?} goes to {found:?}", item.row_lo))?;
                for r in 0..item.n_rows {
                    let row = item.row_lo + r;
                    let slot = item.slot_in_page + r;
                    let here = self.rows.get(row as usize) == Some(&(sequence, page * size + slot)) && slot < size;
                    ensure(here, || format!("row {row} does not belong to slot {slot} of page {page}"))?;
                    let at = left.iter().position(|l| *l == (row, item.kv_head));
                    left.swap_remove(at.ok_or(format!("row {row} is appended twice, or to a list that takes none"))?);
                }
            }
        }
        ensure(left.is_empty(), || format!("{left:?} are not appended"))
    }

    /// Every page that becomes full is sealed once, from its open to its sealed form.
    fn seal(&self, dispatches: &[Dispatch]) -> Result<(), String> {
        let size = self.page_size();
        let mut left = Vec::new();
        for (sequence, s) in self.setup.sequences.iter().enumerate().filter(|(_, s)| s.owns(self.layer)) {
            for head in (0..KV_HEADS).filter(|head| s.kept(self.layer, *head).is_some()) {
                left.extend(s.sealed(size).map(|page| (sequence, head, page)));
            }
        }
        for (place, range) in dispatches {
            for item in &self.plan.seal[range.start as usize..range.end as usize] {
                let from = self.owner(place.arena, item.open_entry + self.after * item.open_stride)?;
                let to = self.owner(place.sealed_arena, item.sealed_entry + self.after * item.sealed_stride)?;
                ensure(from.part == Part::Open, || format!("{from:?} is sealed twice"))?;
                ensure(to == Owner { part: Part::Sealed, ..from }, || format!("{from:?} is sealed to {to:?}"))?;
                let list = item.list + self.after * KV_HEADS;
                let own = self.layer * KV_HEADS + from.head;
                ensure(from.layer == self.layer && list == own, || format!("{from:?} in {item:?}"))?;
                let s = &self.setup.sequences[from.sequence];
                ensure(place.codec == s.codec, || format!("{from:?} of {} is sealed as {}", s.codec, place.codec))?;
                let first = s.start() + from.page * size;
                ensure((item.first_position, item.positions) == (first, 0), || format!("{item:?} begins at {first}"))?;
                if matches!(s.codec.k.transform, Transform::LowRank { .. }) {
                    let turned = self.plan.turned_pages.get(item.angles as usize);
                    ensure(turned == Some(&first), || format!("{from:?} is turned back by {turned:?}"))?;
                }
                let at = left.iter().position(|l| *l == (from.sequence, from.head, from.page));
                left.swap_remove(at.ok_or(format!("{from:?} is sealed, but should not be"))?);
            }
        }
        ensure(left.is_empty(), || format!("{left:?} are not sealed"))
    }

    /// The tokens of the list that a run covers, whose pages have to be those that a row reads, in its forms; and the
    /// position of the first, where it has to be named.
    fn reads(
        &self,
        place: Place,
        (entry, n_tokens, list): (u32, u32, u32),
        (row, head): (u32, u32),
    ) -> Result<(Range<u32>, u32), String> {
        let size = self.page_size();
        let (sequence, s, row_place) = self.sequence(row)?;
        let owner = s.owners[self.layer as usize];
        ensure(n_tokens > 0, || format!("a run of row {row} is empty"))?;
        ensure(place.sealed_arena == place.arena, || format!("{place:?} is read in two arenas"))?;
        let of_owner = owner * KV_HEADS + head;
        let named = list + self.after * KV_HEADS;
        ensure(named == of_owner, || format!("row {row} reads list {of_owner}, not {named}"))?;
        let first = self.owner(place.arena, entry)?;
        for (at, page) in (0..n_tokens.div_ceil(size)).map(|at| (at, first.page + at)) {
            let sealed = page < s.sealed(size).end.min(row_place / size);
            let (part, codec) = match first.part {
                Part::Kept => (Part::Kept, s.codec),
                _ if sealed => (Part::Sealed, s.codec),
                _ => (Part::Open, HiddenCodec::F16),
            };
            ensure(place.codec == codec, || format!("row {row} reads page {page} of {codec} as {}", place.codec))?;
            let expected = Owner { sequence, layer: owner, head, part, page };
            let found = self.owner(place.arena, entry + at)?;
            ensure(found == expected, || format!("row {row} should read {expected:?}, not {found:?}"))?;
        }
        let kept = s.n_kept(self.layer, head);
        let (start, position) = match first.part {
            Part::Kept => (first.page * size, first.page * size),
            _ => (kept + first.page * size, s.start() + first.page * size),
        };
        let end = start + n_tokens;
        ensure(first.part != Part::Kept || end <= kept, || format!("row {row} reads kept token {end} of {kept}"))?;
        Ok((start..end, position))
    }

    fn write(&mut self, state: u32, q_row: u32, tokens: Range<u32>) -> Result<(), String> {
        ensure(state < self.plan.n_states, || format!("state {state} is beyond {}", self.plan.n_states))?;
        let before = self.states.insert(state, (q_row, tokens));
        ensure(before.is_none(), || format!("state {state} is written twice"))
    }

    fn decode(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        for (place, range) in dispatches {
            for item in &self.plan.decode[range.start as usize..range.end as usize] {
                let (row, head) = (item.q_row / KV_HEADS, item.q_row % KV_HEADS);
                let entry = item.page_lo + self.after * item.layer_stride;
                let (tokens, _) = self.reads(*place, (entry, item.n_tokens, item.list), (row, head))?;
                // Split at multiples of a chunk, from the start of what was kept or of the tail.
                let kept = self.sequence(row)?.1.n_kept(self.layer, head);
                let before = if tokens.start < kept { 0 } else { kept };
                let chunk = |token: u32| (token - before) / DecodeSpec::KV_CHUNK;
                ensure(chunk(tokens.start) == chunk(tokens.end - 1), || format!("{item:?} crosses a chunk's edge"))?;
                for g in 0..self.group() {
                    self.write(item.slot + g, item.q_row, tokens.clone())?;
                }
            }
        }
        Ok(())
    }

    fn prefill(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        let group = self.group();
        for (place, range) in dispatches {
            for item in &self.plan.prefill[range.start as usize..range.end as usize] {
                ensure(item.n_rows * group <= ITEM_ROWS, || format!("{item:?} has too many rows"))?;
                let entry = item.page_lo + self.after * item.layer_stride;
                for r in 0..item.n_rows {
                    let row = item.row_lo + r;
                    let (_, s, row_place) = self.sequence(row)?;
                    let index = item.first_index + r;
                    ensure(s.start() + row_place == index, || format!("row {row} is not at position {index}"))?;
                    // The mask leaves out what comes after the row.
                    let n = (index + 1).saturating_sub(item.first_token).min(item.n_tokens);
                    let mut tokens = 0..0;
                    if n > 0 {
                        let position;
                        (tokens, position) = self.reads(*place, (entry, n, item.list), (row, item.kv_head))?;
                        let here = item.first_token == position;
                        ensure(here, || format!("{item:?} begins at position {position}"))?;
                    }
                    for g in 0..group {
                        let q_row = row * KV_HEADS + item.kv_head;
                        self.write(item.slot + r * group + g, q_row, tokens.clone())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Every token that the last row of a segment sees gets what the scored rows give it, at its place in the list: in
    /// the order of rows, which an item may hold only some of.
    fn score(&self, dispatches: &[(ScorePlace, Range<u32>)]) -> Result<(), String> {
        // Score by score and list: rows, and of each token the row that it is to be scored by next.
        let mut left = BTreeMap::new();
        let mut row_lo = 0;
        for (sequence, s) in self.setup.sequences.iter().enumerate() {
            for (i, (first, largest)) in
                s.scores.iter().enumerate().filter(|(_, (first, _))| s.attend && *first < s.rows)
            {
                for head in 0..KV_HEADS {
                    let at = Sequence::scores_at(sequence, i) + s.list(self.layer, head) * CAPACITY;
                    let seen = s.seen(self.layer, head, s.cached + s.rows - 1);
                    let rows = row_lo + first..row_lo + s.rows;
                    let next = vec![rows.start; seen as usize];
                    left.insert(at, (rows, head, *largest, next));
                }
            }
            row_lo += s.rows;
        }
        for (place, range) in dispatches {
            ensure(place.pass.0 == 0, || "every session has one segment".to_owned())?;
            for item in &self.plan.score[range.start as usize..range.end as usize] {
                ensure(item.n_tokens <= score::TOKENS, || format!("{item:?} is too long"))?;
                let out = item.out + self.after * KV_HEADS * CAPACITY;
                let (at, (rows, head, largest, next)) =
                    left.range_mut(..=out).next_back().ok_or(format!("{item:?} is scored for nobody"))?;
                let end = item.row_lo + item.n_rows;
                let of_rows = (item.kv_head, place.largest) == (*head, *largest) && end <= rows.end;
                ensure(of_rows, || format!("{item:?} for {rows:?}"))?;
                let (_, s, row_place) = self.sequence(item.row_lo)?;
                let index = s.start() + row_place;
                ensure(item.first_index == index, || format!("{item:?} begins with the row at {index}"))?;
                let entry = item.page_lo + self.after * item.layer_stride;
                let run = (entry, item.n_tokens, item.list);
                // In the forms that the last row reads.
                let (tokens, position) = self.reads(place.place, run, (rows.end - 1, *head))?;
                ensure(item.first_token == position, || format!("{item:?} begins at position {position}"))?;
                ensure(out == at + tokens.start, || format!("{item:?} scores token {} elsewhere", tokens.start))?;
                for token in tokens {
                    let next = next.get_mut(token as usize).ok_or(format!("{item:?} scores what no row sees"))?;
                    ensure(*next == item.row_lo, || format!("{item:?} scores token {token}, due for {next}"))?;
                    *next = end;
                }
            }
        }
        for (at, (rows, head, _, next)) in &left {
            let wrong = next.iter().position(|next| *next != rows.end);
            ensure(wrong.is_none(), || format!("token {wrong:?} of head {head} for {rows:?} at {at}"))?;
        }
        Ok(())
    }

    /// Every state is merged once, into its own row; the tokens of a row are all up to its own, each once.
    fn merge(mut self, range: Range<u32>) -> Result<(), String> {
        let group = self.group();
        let mut merged = BTreeMap::new();
        for item in &self.plan.merge[range.start as usize..range.end as usize] {
            for g in 0..group {
                let mut runs = Vec::new();
                for i in 0..item.n_states {
                    let state = item.state_lo + g + i * item.stride;
                    let (q_row, tokens) = self.states.remove(&state).ok_or(format!("state {state} is not there"))?;
                    ensure(q_row == item.q_row, || format!("state {state} of {q_row} in {item:?}"))?;
                    runs.push(tokens);
                }
                runs.retain(|tokens| !tokens.is_empty());
                runs.sort_by_key(|tokens| tokens.start);
                let joined = runs.windows(2).all(|w| w[0].end == w[1].start);
                ensure(joined && runs.first().is_none_or(|r| r.start == 0), || format!("{item:?} has {runs:?}"))?;
                let before = merged.insert((item.q_row, g), runs.last().map_or(0, |r| r.end));
                ensure(before.is_none(), || format!("row {} is merged twice", item.q_row))?;
            }
        }
        ensure(self.states.is_empty(), || format!("{:?} are not merged", self.states))?;
        for (row, (sequence, place)) in (0..).zip(&self.rows) {
            let s = &self.setup.sequences[*sequence];
            for (head, g) in (0..KV_HEADS).flat_map(|head| (0..group).map(move |g| (head, g))) {
                let seen = merged.remove(&(row * KV_HEADS + head, g));
                let expected = s.attend.then(|| s.seen(self.layer, head, *place));
                ensure(seen == expected, || format!("row {row} sees {seen:?} of {expected:?} tokens"))?;
            }
        }
        ensure(merged.is_empty(), || format!("{merged:?} were not asked for"))
    }
}
