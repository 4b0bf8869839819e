// Block sizes of the kernels: plain integers, one row per head dimension. The shape of a block on the
// token grid (say 2x8x8 of 128) is chosen at run time; only its size is compiled in.
#pragma once

namespace nearfield::gna {

struct FwdTile {
  int kBlockM;      // query rows of a CTA; 64 per consumer warpgroup
  int kBlockN;      // keys of a tile
  int kStages;      // K and V buffers each
  bool kOwnOutput;  // output staged in its own shared memory, so that the next Q loads under the epilogue
  bool kBarePlan = false;  // no room for what the planning warp knows of rows: consumers work it out
};

// Shared memory: 2 bytes * D * (M + 2 * stages * N + (own output ? M : 0)), at most 227 KB.
// At D = 256, O needs 128 registers a thread and Q 64 KB; with 64 keys, S alone takes all the bandwidth of
// shared memory. A bias takes the room of the other 16.
constexpr FwdTile fwd_tile(int head_dim, bool biased = false, bool wide = false) {
  if (wide) return {128, 192, 2, true};  // 128 KB
  if (head_dim <= 64) return {128, 128, 2, true};
  if (head_dim <= 128) return {128, 128, 2, true};  // 192 KB
  if (biased) return {128, 64, 2, false};           // 192 KB
  return {128, 80, 2, false, true};                 // 224 KB
}

// Kernels of 16-bit inputs without a bias come with a second, wide tile at some head dims: fewer visits of
// more keys, for which windows must be long. A visit takes as long as so many keys more would (measured,
// README.md).
constexpr bool has_wide_fwd_tile(int head_dim) { return head_dim == 64; }
constexpr double fwd_visit_cost(const FwdTile& tile) { return tile.kBlockN + 21; }

// The deterministic gradient of the queries: S and dP at once in registers, Q and dO in shared memory. 128 KB
// at D = 128, 192 KB at D = 256.
constexpr FwdTile dq_tile(int head_dim) { return {128, 64, head_dim <= 128 ? 2 : 1, false}; }

struct BwdTile {
  int kBlockM;  // queries of a visited tile
  int kBlockN;  // keys that a CTA holds
  int kStages;  // Q buffers
};

// Registers decide. Up to D = 128 a warpgroup holds dK and dV of 64 keys: 2 * D / 2 a thread, and S, dP and
// their rounded copies 96 at 64 queries (192 KB of shared memory at D = 128). Beyond, it holds half of the
// features of the CTA's 64 keys: 128, and 64 of dQ (208 KB).
constexpr BwdTile bwd_tile(int head_dim) {
  return {head_dim == 64 ? 128 : 64, head_dim <= 128 ? 128 : 64, 2};
}

// Rows of the float32 dQ that are rounded at a time beside the products: 16 KB, 8 at D = 256.
constexpr int rounded_rows(int head_dim) { return head_dim <= 128 ? 4096 / head_dim : 8; }

// Relative positions between two boxes for which Hopper's kernels have room, with a bias: 16 bytes each.
// Boxes of 8 x 16 and 8 x 16 have 465, 4 x 4 x 8 and 4 x 4 x 8 have 735; at D = 256 the blocks are smaller.
constexpr int bias_places(int head_dim) { return head_dim <= 128 ? 1024 : 576; }

// The portable kernels. A row is padded by 16 bytes; everything fits the 99 KB of the GPUs that have least,
// and two CTAs an SM up to 256 bytes a row where there are 160 KB.
struct PortableTile {
  int kStaying;   // rows that a CTA holds: queries, or keys for their gradients
  int kMoving;    // rows of a visited tile
  int kRowTiles;  // staying rows of a warp, in 16s
  int kCtas = 2;  // of an SM at once: bounds the registers
};

// 32 rows a warp halve the reads of shared memory per product; O or dQ then takes D registers a thread.
// float32 operands take four times the registers of 16-bit ones. Measured: README.md.
constexpr PortableTile portable_fwd_tile(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;
  if (row_bytes <= 256 && element_bytes == 4) return {64, 64, 1};
  if (row_bytes <= 128) return {128, 64, 2, 3};
  if (row_bytes <= 256) return {128, 64, 2};
  if (row_bytes <= 512) return {64, 32, 1};
  return {32, 16, 1};
}

// Two operands stay and two move.
constexpr PortableTile portable_dq_tile(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;
  if (row_bytes <= 256 && element_bytes == 4) return {64, 64, 1};
  if (row_bytes <= 128) return {128, 64, 2};
  if (row_bytes <= 256) return {128, 32, 2};
  if (row_bytes <= 512) return {32, 32, 1};
  return {32, 8, 1};
}

// dK and dV take D registers a thread with 16 rows a warp, the scores and their gradients 64.
constexpr PortableTile portable_dkv_tile(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;
  if (row_bytes <= 128 && element_bytes == 2) return {64, 64, 1, 3};
  if (row_bytes <= 256) return {64, 64, 1};
  if (row_bytes <= 512) return {32, 32, 1};
  return {32, 8, 1};
}
// Features of dK and dV that are summed in one pass over the queries.
constexpr int kPortableKeyFeatures = 128;

}  // namespace nearfield::gna
