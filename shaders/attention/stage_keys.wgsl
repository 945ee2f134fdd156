// Keys of a tile into workgroup memory, decoded once for all of its rows. The kernel declares `put_key`: four channels of the token
// at a place; and of a `Tile` the entry of the run's first page, its tokens, and the layer of merged ones.

// Cells that a lane decodes of one load: all lanes should have some.
const KEY_UNIT = min(KEY_CODEC_SPAN, KEY_SHARE);

// CHUNK_CELLS cells from `first_cell` on, of the keys of TILE_TOKENS tokens from `start` on. Tokens past the run repeat its
// last one.
fn stage_keys(li: u32, tile: Tile, start: u32, first_cell: u32) {
  for (var i = li; i < TILE_TOKENS * (CHUNK_CELLS / KEY_UNIT); i += WORKGROUP_SIZE) {
    let place = i % TILE_TOKENS;
    let token = min(start + place, tile.n_tokens - 1u);
    let cell = first_cell + i / TILE_TOKENS * KEY_UNIT;
    if (cell < KEY_CELLS) {
      let page = tables[tile.pages + token / PAGE_SIZE];
      let row = key_codec_row(page, token % PAGE_SIZE, cell);
      let raw = key_codec_load(page, token % PAGE_SIZE, cell);
      var length = 1.0;
      if (PAIRED) { length = merged_length(page, token % PAGE_SIZE, 0u, tile.member); }
      for (var u = 0u; u < min(KEY_UNIT, KEY_CELLS - cell); u++) {
        let k = key_codec_cell(page, token % PAGE_SIZE, cell + u, row, raw);
        let vec = (cell + u - first_cell) * 2u;
        put_key(place, vec, k.low * length);
        put_key(place, vec + 1u, k.high * length);
      }
    }
  }
}
