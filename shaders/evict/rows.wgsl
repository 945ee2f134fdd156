// One token's key or value as plain channels in a lane's registers, decoded from its page whole. Slower than reading cells,
// and the same for every codec: transforms are undone here, where attention moves them to the query and the output.

struct Row {
  x: array<f32, HEAD_DIM>,
}

fn row_put(row: ptr<function, Row>, cell: u32, value: Cell) {
  for (var i = 0u; i < 4u; i++) {
    (*row).x[cell * 8u + i] = value.low[i];
    (*row).x[cell * 8u + 4u + i] = value.high[i];
  }
}

// Same order of additions as src/compression/hidden/rot.rs.
fn row_hadamard(row: ptr<function, Row>, first: u32) {
  for (var stride = 1u; stride < SPAN; stride *= 2u) {
    for (var pair = 0u; pair < SPAN / 2u; pair++) {
      let low = first + pair / stride * 2u * stride + pair % stride;
      let a = (*row).x[low];
      let b = (*row).x[low + stride];
      (*row).x[low] = a + b;
      (*row).x[low + stride] = a - b;
    }
  }
  for (var i = first; i < first + SPAN; i++) { (*row).x[i] *= NORMALISATION; }
}

fn row_rotate_back(row: ptr<function, Row>) {
  if (SPAN < HEAD_DIM) { row_hadamard(row, HEAD_DIM - SPAN); }
  row_hadamard(row, 0u);
  for (var i = 0u; i < HEAD_DIM; i++) { (*row).x[i] *= rotation_sign(i); }
}

// `basis` is the first vec4 of the list's parameters.
fn key_row(page: u32, token: u32, basis: u32) -> Row {
  var row: Row;
  if (KEY_LIFTS) {
    var latents = load_latents(page, token);
    let position = key_position(page, token);
    for (var c = 0u; c < HEAD_DIM / 8u; c++) { row_put(&row, c, lifted_cell(&latents, basis, position, c)); }
    return row;
  }
  let meta_row = key_codec_row(page, token, 0u);
  for (var first = 0u; first < KEY_WIDTH / 8u; first += KEY_CODEC_SPAN) {
    let raw = key_codec_load(page, token, first);
    for (var c = first; c < min(first + KEY_CODEC_SPAN, KEY_WIDTH / 8u); c++) {
      let value = key_codec_cell(page, token, c, meta_row, raw);
      if (KEY_PICKS) {
        let slots = key_slots(page, c);
        for (var i = 0u; i < 4u; i++) {
          row.x[slots.low[i]] = value.low[i];
          row.x[slots.high[i]] = value.high[i];
        }
      } else {
        row_put(&row, c, value);
      }
    }
  }
  if (KEY_ROTATES) { row_rotate_back(&row); }
  return row;
}

fn value_row(page: u32, token: u32, basis: u32) -> Row {
  var row: Row;
  let first = token / VALUE_CODEC_SPAN * VALUE_CODEC_SPAN;
  var latents: array<vec4<f32>, VALUE_WIDTH / 4u>;
  for (var c = 0u; c < VALUE_CELLS; c++) {
    let raw = value_codec_load(page, first, c);
    let value = value_codec_cell(page, token, c, value_codec_row(page, token, c), raw);
    if (VALUE_LIFTS) {
      latents[c * 2u] = value.low;
      latents[c * 2u + 1u] = value.high;
    } else {
      row_put(&row, c, value);
    }
  }
  if (VALUE_LIFTS) {
    for (var channel = 0u; channel < HEAD_DIM; channel++) {
      var sum = 0.0;
      for (var r = 0u; r < VALUE_WIDTH / 4u; r++) {
        sum += dot(latents[r], parameters[basis + VALUE_BASIS + channel * (VALUE_WIDTH / 4u) + r]);
      }
      row.x[channel] = sum;
    }
  }
  if (VALUE_ROTATES) { row_rotate_back(&row); }
  return row;
}
