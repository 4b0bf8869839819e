// Sizes of the Hopper kernels: plain integers, one row per head dimension.
#pragma once

namespace nearfield::lla {

// A CTA holds 128 queries, 64 per consumer warpgroup, and streams tiles of 64 keys. Registers of a consumer
// thread at d = 128: the sum 64, two score tiles 32 each, the direction 32, the rounded weights 16.
struct QueryTileSizes {
  int kStages;     // tiles of K or V in flight, a power of two
  bool kKeepKbar;  // the mean keys stay in shared memory; else they are read back from the output
};

// The most tiles of keys a warpgroup may see for its rounded weights to stay in shared memory, 8 KB a tile;
// 0: there is no room.
constexpr int resident_tiles(int head_dim) { return head_dim <= 64 ? 9 : 0; }

// Shared memory in KB: Q 16 + stages 64 + r, x, kbar 32 each = 176; or Q 32 + stages 64 + r, x 64 each = 224
// of 227. With resident weights Q 16 + stages 32 + kbar 32 + weights 144 = 224; r and x take the registers of
// the scores.
constexpr QueryTileSizes query_tile(int head_dim, bool resident) {
  if (resident) return {4, true};
  if (head_dim <= 64) return {8, true};
  return {4, false};
}

struct KeyTileSizes {
  int kStages;            // tiles of 64 queries in flight: Q, X, Y and dO
  int kQueries;           // multiplied at once
  bool kKeysInRegisters;  // K and V as left operands
};

// Registers: dK and dV take d a thread, three score tiles and their rounded copies 2.25 kQueries, K and V d
// / 2. 64 queries at once would spill at d = 64 now that exponentials run before the other products end.
// Shared memory in KB: K, V 32 + stages 96; or 64 + 128.
constexpr KeyTileSizes key_tile(int head_dim) {
  if (head_dim <= 64) return {3, 32, true};
  return {2, 32, false};
}

}  // namespace nearfield::lla
