// Attention in bfloat16 for small heads, where the exponentials of the softmax take the time.
//
// Flash attention (Dao et al. 2022) turned on its side: scores are computed as keys x queries, so that a register holds
// one key's score for 16 queries, the largest and the sum of the weights run down the registers, and nothing is summed
// across one. Products, of keys and queries and of values and weights, are of tiles. Scores and sums are float32;
// weights and what is answered are bfloat16, as in torch's own kernel.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>

#include "common.hpp"
#include "tiles.hpp"

namespace attention {

constexpr int BLOCK = 256;  // keys whose weights are computed at once
constexpr int MOST = 160;   // values of a head
// Weights are cut to bfloat16, not rounded: they are this much larger first, half of what is cut, and so is their sum.
constexpr float CUT = 1.0028f;

// --- parts -----------------------------------------------------------------------------------------------------

// 16 rows of 16 values of 32 bits, turned.
inline void turn(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

inline __mmask32 first(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

struct Rows {  // of one head: `size` values side by side, rows `step` apart
  const bfloat16* at;
  int64_t step;
  int count, size;

  // 32 values of a row from `from` on, zeros behind its end and behind the last row.
  __m512i load(int row, int from, int most = DEPTH) const {
    if (row >= count) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(first(std::min(size - from, most)), at + row * step + from);
  }
};

// --- one head --------------------------------------------------------------------------------------------------

class Head {
 public:
  Head(const Tiles& tiles, int keys, int size)
      : tiles_(tiles),
        keys_(keys),
        size_(size),
        depths_((size + DEPTH - 1) / DEPTH),
        parts_((size + LANES - 1) / LANES),
        blocks_((keys + DEPTH - 1) / DEPTH),
        key_tiles_(room<bfloat16>(2 * blocks_ * depths_ * TILE)),
        value_tiles_(room<bfloat16>(blocks_ * parts_ * TILE)) {}

  // Keys as tiles of 16 rows, values turned: 16 of a key's values are the rows, 32 keys beside each other.
  void read(const Rows& key, const Rows& value) {
    for (int row = 0; row < blocks_ * DEPTH; row++)
      for (int depth = 0; depth < depths_; depth++) {
        bfloat16* tile = key_tiles_.get() + (row / LANES * depths_ + depth) * TILE;
        _mm512_store_si512(tile + row % LANES * DEPTH, key.load(row, depth * DEPTH));
      }
    for (int block = 0; block < blocks_; block++)
      for (int part = 0; part < parts_; part++) {
        __m512i pairs[LANES];
        for (int i = 0; i < LANES; i++) {
          const auto wide = [&](int row) {
            return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(value.load(row, part * LANES, LANES)));
          };
          const int row = block * DEPTH + 2 * i;
          pairs[i] = _mm512_or_si512(wide(row), _mm512_slli_epi32(wide(row + 1), 16));
        }
        turn(pairs);
        bfloat16* tile = value_tiles_.get() + (block * parts_ + part) * TILE;
        for (int i = 0; i < LANES; i++) _mm512_store_si512(tile + i * DEPTH, pairs[i]);
      }
  }

  // What 16 queries from `from` on are answered.
  void answer(const Rows& query, int from, float scale, bfloat16* out, int64_t out_step) {
    const int count = std::min(LANES, query.count - from);
    for (int depth = 0; depth < depths_; depth++) {
      __m512i rows[LANES];
      for (int i = 0; i < LANES; i++) rows[i] = query.load(from + i, depth * DEPTH);
      turn(rows);
      for (int i = 0; i < LANES; i++) _mm512_store_si512(queries_ + depth * TILE + i * DEPTH, rows[i]);
    }
    const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);  // powers are of two
    // A score that weighs nothing, also when it is multiplied.
    const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::max() * std::min(1.f, 0.5f / scale));
    __m512 top = least, total = _mm512_setzero_ps();
    for (int i = 0; i < parts_ * LANES; i++) sums_[i] = _mm512_setzero_ps();
    for (int start = 0; start < keys_; start += BLOCK) {
      const int here = std::min(BLOCK, keys_ - start), tiles = (here + DEPTH - 1) / DEPTH;
      score(start, tiles);
      for (int key = here; key < tiles * DEPTH; key++) scores_[key] = least;
      const __m512 now = _mm512_max_ps(top, largest(tiles));
      const __m512 behind = power_of_two(_mm512_mul_ps(_mm512_sub_ps(top, now), factor), CUT);
      const __m512 kept = _mm512_mul_ps(behind, _mm512_set1_ps(1 / CUT));
      top = now;
      total = _mm512_fmadd_ps(total, kept, weigh(tiles, factor, top));
      for (int part = 0; part < parts_; part++) {
        const bfloat16* values = value_tiles_.get() + (start / DEPTH * parts_ + part) * TILE;
        const int rows = std::min(LANES, size_ - part * LANES);
        tiles_.multiply(read_, values, parts_ * TILE, weights_, TILE, tiles * DEPTH, rows);
        for (int i = 0; i < rows; i++) {
          __m512& sum = sums_[part * LANES + i];
          sum = _mm512_fmadd_ps(sum, kept, _mm512_load_ps(read_ + i * LANES));
        }
      }
    }
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(CUT), total);
    for (int part = 0; part < parts_; part++) {
      __m512i rows[LANES];
      for (int i = 0; i < LANES; i++) rows[i] = _mm512_castps_si512(_mm512_mul_ps(sums_[part * LANES + i], share));
      turn(rows);
      const auto inside = static_cast<__mmask16>(first(std::min(size_ - part * LANES, LANES)));
      for (int i = 0; i < count; i++) {
        const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i]));
        _mm256_mask_storeu_epi16(out + (from + i) * out_step + part * LANES, inside, rounded);
      }
    }
  }

 private:
  void score(int start, int tiles) {
    for (int tile = 0; tile < 2 * tiles; tile++) {
      const bfloat16* keys = key_tiles_.get() + (start / LANES + tile) * depths_ * TILE;
      tiles_.multiply(reinterpret_cast<float*>(scores_ + tile * LANES), keys, TILE, queries_, TILE, size_, LANES);
    }
  }

  __m512 largest(int tiles) const {
    __m512 top[4] = {scores_[0], scores_[1], scores_[2], scores_[3]};
    for (int key = 4; key < tiles * DEPTH; key += 4)
      for (int i = 0; i < 4; i++) top[i] = _mm512_max_ps(top[i], scores_[key + i]);
    return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
  }

  // Weights of the keys as tiles; their sum.
  __m512 weigh(int tiles, __m512 factor, __m512 top) {
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int key = 0; key < tiles * DEPTH; key += 2) {
      const __m512 one = power_of_two(_mm512_mul_ps(_mm512_sub_ps(scores_[key], top), factor), CUT);
      const __m512 other = power_of_two(_mm512_mul_ps(_mm512_sub_ps(scores_[key + 1], top), factor), CUT);
      even = _mm512_add_ps(even, one);
      odd = _mm512_add_ps(odd, other);
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(one), 16);
      const __m512i pair = _mm512_ternarylogic_epi32(upper, _mm512_castps_si512(other), low, 0xca /* upper ? b : c */);
      _mm512_store_si512(weights_ + key * LANES, pair);
    }
    return _mm512_add_ps(even, odd);
  }

  const Tiles& tiles_;
  const int keys_, size_, depths_, parts_, blocks_;
  Room<bfloat16> key_tiles_, value_tiles_;
  alignas(64) bfloat16 queries_[MOST / DEPTH * TILE], weights_[BLOCK * LANES];
  alignas(64) float read_[LANES * LANES];
  __m512 scores_[BLOCK], sums_[MOST];
};

// Queries, keys, values and what is answered are (rows, heads, count, size), size at most MOST, values side by side;
// `steps` are those of a row, a head and a query or key, in values, for each of the four in turn.
inline void attend(const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* out, const int64_t* steps,
                   int rows, int heads, int queries, int keys, int size, float scale, int threads) {
  std::atomic<int> next{0};
  const auto work = [&] {
    const Tiles tiles;
    const auto head = std::make_unique<Head>(tiles, keys, size);
    for (int place; (place = next++) < rows * heads;) {
      const int row = place / heads, layer = place % heads;
      const auto at = [&](int which) { return row * steps[3 * which] + layer * steps[3 * which + 1]; };
      head->read({key + at(1), steps[5], keys, size}, {value + at(2), steps[8], keys, size});
      const Rows asked{query + at(0), steps[2], queries, size};
      for (int from = 0; from < queries; from += LANES) head->answer(asked, from, scale, out + at(3), steps[11]);
    }
  };
  by_threads(std::min(threads, rows * heads), work);
}

}  // namespace attention
