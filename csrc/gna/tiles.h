// Block sizes of the Hopper kernels: plain integers, one row per head dimension. The shape of a block on the
// token grid (say 2x8x8 of 128) is chosen at run time; only its size is compiled in.
#pragma once

namespace nearfield::gna {

struct FwdTile {
  int kBlockM;      // query rows of a CTA; 64 per consumer warpgroup
  int kBlockN;      // keys of a tile
  int kStages;      // K and V buffers each
  bool kOwnOutput;  // output staged in its own shared memory, so that the next Q loads under the epilogue
};

// Shared memory: 2 bytes * D * (M + 2 * stages * N + (own output ? M : 0)), at most 227 KB.
constexpr FwdTile fwd_tile(int head_dim) {
  if (head_dim <= 64) return {128, 128, 2, true};
  if (head_dim <= 128) return {128, 128, 2, true};  // 192 KB
  return {128, 64, 2, false};                       // 192 KB; O needs 128 registers a thread
}

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
constexpr BwdTile bwd_tile(int head_dim) { return {64, head_dim <= 128 ? 128 : 64, 2}; }

}  // namespace nearfield::gna
