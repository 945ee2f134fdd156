// Values of a tile into workgroup memory, decoded once for all of its rows. The kernel declares `put_value`: four channels of the
// token at a place.

// Cells that a lane decodes of one load: all lanes should have some.
const VALUE_UNIT = min(VALUE_CODEC_SPAN, VALUE_SHARE);

// VALUE_TOKENS values from token `start` of the run on. Values past its end are zeros: an unused slot may hold anything, and
// zero times NaN is NaN. Runs of sealed pages are whole pages, so a block of several tokens is never cut.
fn stage_values(li: u32, tile: Tile, start: u32) {
  for (var i = li; i < VALUE_TOKENS / VALUE_UNIT * VALUE_CELLS; i += WORKGROUP_SIZE) {
    let cell = i % VALUE_CELLS;
    let place = i / VALUE_CELLS * VALUE_UNIT;
    let token = min(start + place, tile.n_tokens - 1u);
    let page = tables[tile.pages + token / PAGE_SIZE];
    let raw = value_codec_load(page, token % PAGE_SIZE, cell);
    for (var u = 0u; u < VALUE_UNIT; u++) {
      var v = Cell(vec4<f32>(0.0), vec4<f32>(0.0));
      if (start + place + u < tile.n_tokens) {
        let slot = token % PAGE_SIZE + u;
        v = value_codec_cell(page, slot, cell, value_codec_row(page, slot, cell), raw);
        if (PAIRED) {
          let length = merged_length(page, slot, 1u, tile.member);
          v = Cell(v.low * length, v.high * length);
        }
      }
      put_value(place + u, cell * 2u, v.low);
      put_value(place + u, cell * 2u + 1u, v.high);
    }
  }
}
