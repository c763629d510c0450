// AMX's tiles, as the kernels use them: 16 rows of 64 bytes each.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "common.cpp"

constexpr int DEPTH = 32;            // values that one product sums over: a row of bfloat16
constexpr int TILE = LANES * DEPTH;  // bfloat16 in a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {LANES, LANES, LANES, LANES, LANES, LANES, LANES, LANES};
};

// The tiles of a thread, for as long as this lives; who had them before has them then.
class Tiles {
 public:
  Tiles() {
    static const TileConfig config;
    _tile_storeconfig(&before_);
    _tile_loadconfig(&config);
  }
  ~Tiles() { before_.palette ? _tile_loadconfig(&before_) : _tile_release(); }

 private:
  TileConfig before_;
};

// Some compilers do not know what a tile is loaded from; before this all of it is written.
inline void all_is_written() { __asm__ volatile("" ::: "memory"); }

// Memory that a register or a tile is read from in one go.
struct Free {
  void operator()(void* at) const { std::free(at); }
};
template <class T>
using Room = std::unique_ptr<T[], Free>;
template <class T>
Room<T> room(size_t count) {
  return Room<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}
