// The f16 page codec. See src/compression/hidden/f16.rs for the definition.
//
// A page starts at a cell of 16 bytes. K: [HEAD_DIM / 8][PAGE_SIZE] cells, so that lanes on neighbouring tokens load
// neighbouring cells. V: [PAGE_SIZE][HEAD_DIM / 8] cells, so that lanes on neighbouring channels do.

const CODEC_K_CELLS = HEAD_DIM / 8u * PAGE_SIZE;

// Eight channels of one token.
struct Cell {
  low: vec4<f32>,
  high: vec4<f32>,
}

fn codec_k_index(page: u32, token: u32, cell: u32) -> u32 {
  return page + cell * PAGE_SIZE + token;
}

fn codec_v_index(page: u32, token: u32, cell: u32) -> u32 {
  return page + CODEC_K_CELLS + token * (HEAD_DIM / 8u) + cell;
}

fn codec_decode(bits: vec4<u32>) -> Cell {
  return Cell(
    vec4<f32>(unpack2x16float(bits.x), unpack2x16float(bits.y)),
    vec4<f32>(unpack2x16float(bits.z), unpack2x16float(bits.w)));
}
