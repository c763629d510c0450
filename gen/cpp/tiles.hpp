// Products of tiles, 16 rows of 32 bfloat16 each, summed in float32: by AMX where it is compiled for, and by AVX512-BF16
// elsewhere. And products of float32 and of whole numbers.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "common.hpp"

constexpr int DEPTH = 32;            // values that one product sums over: a row of bfloat16
constexpr int TILE = LANES * DEPTH;  // bfloat16 in a tile
constexpr int PAIR = 2;              // tiles of weights beside each other

constexpr int HERE = 8;  // rows whose sums are in registers

inline void put(float* to, __m512 sums) { _mm512_store_ps(to, sums); }
inline void put(int32_t* to, __m512i sums) { _mm512_store_si512(to, sums); }

template <class Register>
struct Sums {
  Register of[HERE][PAIR] = {};

  template <class Number>
  void store(Number* to) const {
    for (int place = 0; place < HERE; place++)
      for (int i = 0; i < PAIR; i++) put(to + (place * PAIR + i) * LANES, of[place][i]);
  }
};

#ifdef __AMX_BF16__

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

  // `to` (16 x 16) = sum over `depth` values of left (16 rows, of which `rows` are asked) times right (16 pairs of rows,
  // each 16 lanes wide). Of both, tiles lie `..._step` values apart.
  void multiply(float* to, const bfloat16* left, int64_t left_step, const bfloat16* right, int64_t right_step, int depth,
                int /* rows: all come at once */) const {
    all_is_written();
    _tile_zero(0);
    for (int i = 0; i * DEPTH < depth; i++) {
      _tile_loadd(1, left + i * left_step, 64);
      _tile_loadd(2, right + i * right_step, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, to, 64);
  }

  // `to` (32 x 32) = 32 rows of `in` values, side by side, of which `count` are asked, times a pair of tiles of weights
  // for every 32 of these.
  void multiply_pair(float* to, const bfloat16* rows, int in, const bfloat16* weight, int /* count: all come at once */) const {
    all_is_written();
    const int step = in * sizeof(bfloat16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int from = 0; from < in; from += DEPTH) {
      _tile_loadd(4, rows + from, step);
      _tile_loadd(5, rows + LANES * in + from, step);
      _tile_loadd(6, weight + from / DEPTH * PAIR * TILE, 64);
      _tile_loadd(7, weight + (from / DEPTH * PAIR + 1) * TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int step_of_products = PAIR * LANES * sizeof(float);
    _tile_stored(0, to, step_of_products);
    _tile_stored(1, to + LANES, step_of_products);
    _tile_stored(2, to + LANES * PAIR * LANES, step_of_products);
    _tile_stored(3, to + LANES * PAIR * LANES + LANES, step_of_products);
  }

 private:
  // Some compilers do not know what a tile is loaded from; before this all of it is written.
  static void all_is_written() { __asm__ volatile("" ::: "memory"); }

  TileConfig before_;
};

#else

class Tiles {
 public:
  // As above.
  void multiply(float* to, const bfloat16* left, int64_t left_step, const bfloat16* right, int64_t right_step, int depth,
                int rows) const {
    rows > LANES / 2 ? add_up<LANES>(to, left, left_step, right, right_step, depth)
                     : add_up<LANES / 2>(to, left, left_step, right, right_step, depth);
  }

  void multiply_pair(float* to, const bfloat16* rows, int in, const bfloat16* weight, int count) const {
    for (int row = 0; row < count; row += HERE) {
      Sums<__m512> sums;
      for (int from = 0; from < in; from += DEPTH)
        for (int i = 0; i < LANES; i++) {
          const bfloat16* at = weight + from * PAIR * LANES + i * DEPTH;
          const __m512bh low = (__m512bh)_mm512_loadu_si512(at), high = (__m512bh)_mm512_loadu_si512(at + TILE);
          for (int place = 0; place < HERE; place++) {
            const __m512bh both = everywhere(rows + (row + place) * int64_t(in) + from + 2 * i);
            sums.of[place][0] = _mm512_dpbf16_ps(sums.of[place][0], both, low);
            sums.of[place][1] = _mm512_dpbf16_ps(sums.of[place][1], both, high);
          }
        }
      sums.store(to + row * PAIR * LANES);
    }
  }

 private:
  template <int ROWS>
  static void add_up(float* to, const bfloat16* left, int64_t left_step, const bfloat16* right, int64_t right_step,
                     int depth) {
    __m512 sums[ROWS];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int from = 0; from < depth; from += DEPTH, left += left_step, right += right_step)
      for (int at = 0; at < std::min(DEPTH, depth - from); at += 2) {
        const auto lanes = (__m512bh)_mm512_load_si512(right + at * LANES);
        for (int i = 0; i < ROWS; i++) sums[i] = _mm512_dpbf16_ps(sums[i], everywhere(left + i * DEPTH + at), lanes);
      }
    for (int i = 0; i < ROWS; i++) _mm512_store_ps(to + i * LANES, sums[i]);
  }

  // A pair of values in every lane.
  static __m512bh everywhere(const bfloat16* pair) {
    int both;
    std::memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
};

#endif

// 32 rows of values by 32 values of the answer, as `Tiles::multiply_pair` says.
inline void multiply_pair(const Tiles& tiles, float* to, const bfloat16* rows, int in, const bfloat16* weight, int count) {
  tiles.multiply_pair(to, rows, in, weight, count);
}

// The same of float32, which AMX does not multiply; weights are (in, 32).
inline void multiply_pair(const Tiles&, float* to, const float* rows, int in, const float* weight, int count) {
  for (int row = 0; row < count; row += HERE) {
    Sums<__m512> sums;
    for (int i = 0; i < in; i++) {
      const float* at = weight + i * PAIR * LANES;
      const __m512 low = _mm512_loadu_ps(at), high = _mm512_loadu_ps(at + LANES);
      for (int place = 0; place < HERE; place++) {
        const __m512 one = _mm512_set1_ps(rows[(row + place) * int64_t(in) + i]);
        sums.of[place][0] = _mm512_fmadd_ps(one, low, sums.of[place][0]);
        sums.of[place][1] = _mm512_fmadd_ps(one, high, sums.of[place][1]);
      }
    }
    sums.store(to + row * PAIR * LANES);
  }
}

// Has what is read before long come near; there may be nothing.
inline void soon(const int16_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// The same of whole numbers of 16 bits, whose sums of products are in 32; weights are (in / 2, 32, 2). Those behind them are
// multiplied next: where patches are few they go by faster than the processor sees that they are wanted.
inline void multiply_pair(const Tiles&, int32_t* to, const int16_t* rows, int in, const int16_t* weight, int count) {
  for (int row = 0; row < count; row += HERE) {
    Sums<__m512i> sums;
    for (int i = 0; i < in; i += 2) {
      const int16_t* at = weight + i * PAIR * LANES;
      soon(at + in * PAIR * LANES);
      soon(at + in * PAIR * LANES + 2 * LANES);
      const __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + 2 * LANES);
      for (int place = 0; place < HERE; place++) {
        int pair;
        std::memcpy(&pair, rows + (row + place) * int64_t(in) + i, sizeof pair);
        const __m512i both = _mm512_set1_epi32(pair);
        sums.of[place][0] = _mm512_dpwssd_epi32(sums.of[place][0], both, low);
        sums.of[place][1] = _mm512_dpwssd_epi32(sums.of[place][1], both, high);
      }
    }
    sums.store(to + row * PAIR * LANES);
  }
}

// Memory that a register or a tile is read from in one go.
struct Free {
  void operator()(void* at) const { std::free(at); }
};
template <class T>
using Room = std::unique_ptr<T[], Free>;
template <class T>
Room<T> room(size_t count) {
  void* const at = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (!at) throw std::bad_alloc();
  return Room<T>(static_cast<T*>(at));
}
