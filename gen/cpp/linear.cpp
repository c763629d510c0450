// Linear layers in bfloat16 by products of tiles, and what stands around one in a transformer: before it a layer norm (Ba et al.
// 2016) whose scale and shift are in the weights, behind it GELU, GEGLU (Shazeer 2020) or what is added to it. Inputs are read
// and answers written once; sums, norms and activations are float32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common.cpp"
#include "tiles.cpp"

namespace linear {

constexpr int PANEL = 64;  // rows whose input stays near while all weights go by

struct Layer {
  int in, out;             // values of a row, multiples of 32 and 16
  const bfloat16* weight;  // tiles (pairs, in / 32, PAIR) of 16 pairs of inputs, each for 16 values of the answer
  const float* bias;       // of each value of the pairs, in their order
  bool normed, active, gated;  // what stands before it and behind it: a norm, GELU, GEGLU
  float epsilon;               // of the norm

  // A pair of tiles is for 32 values of the answer, or for 16 and their gates.
  int per_pair() const { return gated ? LANES : PAIR * LANES; }
  int pairs() const { return (out + per_pair() - 1) / per_pair(); }
};

// x times the normal distribution's share below it (Hendrycks & Gimpel 2016), to 1e-4. The share is a half and an odd polynomial
// of degree 15 up to 4.2 from zero, fitted by least squares to be all and nothing there, and the same beyond.
inline __m512 gelu(__m512 x) {
  constexpr float END = 4.2f;
  constexpr float SHARES[] = {-8.71319628e-10f, 7.71800543e-08f,  -2.97145266e-06f, 6.58632489e-05f,
                              -9.41908453e-04f, 9.25822463e-03f, -6.54408410e-02f, 3.98400307e-01f};
  const __m512 near = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(END)), _mm512_set1_ps(-END));
  const __m512 square = _mm512_mul_ps(near, near);
  __m512 share = _mm512_set1_ps(SHARES[0]);
  for (int i = 1; i < 8; i++) share = _mm512_fmadd_ps(share, square, _mm512_set1_ps(SHARES[i]));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(near, share, _mm512_set1_ps(0.5f)));
}

// A row without its mean, over its deviation.
inline void normalise(const bfloat16* from, bfloat16* to, int count, float epsilon) {
  const __m512 first = wide(_mm256_set1_epi16(static_cast<int16_t>(*from)));  // sums of differences to it keep digits
  __m512 sums[2] = {}, squares[2] = {};
  for (int i = 0; i < count; i += 2 * LANES)
    for (int half = 0; half < 2; half++) {
      const __m512 apart = _mm512_sub_ps(wide(from + i + half * LANES), first);
      sums[half] = _mm512_add_ps(sums[half], apart);
      squares[half] = _mm512_fmadd_ps(apart, apart, squares[half]);
    }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / count;
  const float square = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / count;
  const __m512 centre = _mm512_add_ps(first, _mm512_set1_ps(mean));
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(std::max(square - mean * mean, 0.f) + epsilon));
  for (int i = 0; i < count; i += 2 * LANES) {
    const __m512 low = _mm512_mul_ps(_mm512_sub_ps(wide(from + i), centre), factor);
    const __m512 high = _mm512_mul_ps(_mm512_sub_ps(wide(from + i + LANES), centre), factor);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

class Panel {  // PANEL rows of a layer
 public:
  Panel(const Tiles& tiles, const Layer& layer) : tiles_(tiles), layer_(layer), held_(room<bfloat16>(PANEL * layer.in)) {}

  // `count` rows from `from`; `beside`, where there is one, is added to what goes `to`.
  void compute(const bfloat16* from, const bfloat16* beside, bfloat16* to, int count) {
    const bfloat16* rows = from;
    if (layer_.normed || count < PANEL) {
      for (int row = 0; row < count; row++) {
        const bfloat16* at = from + int64_t(row) * layer_.in;
        bfloat16* held = held_.get() + row * layer_.in;
        layer_.normed ? normalise(at, held, layer_.in, layer_.epsilon) : (void)std::copy_n(at, layer_.in, held);
      }
      rows = held_.get();
    }
    for (int pair = 0; pair < layer_.pairs(); pair++)
      for (int row = 0; row < count; row += 2 * LANES) {
        const int here = std::min(2 * LANES, count - row);
        const bfloat16* weight = layer_.weight + int64_t(pair) * layer_.in * PAIR * LANES;
        tiles_.multiply_pair(products_, rows + row * layer_.in, layer_.in, weight, here);
        const int64_t at = int64_t(row) * layer_.out + pair * layer_.per_pair();
        if (layer_.gated)
          gate(to + at, pair, here);
        else if (layer_.active)
          write<true>(nullptr, to + at, pair, here);
        else
          write<false>(beside ? beside + at : nullptr, to + at, pair, here);
      }
  }

 private:
  template <bool ACTIVE>
  void write(const bfloat16* beside, bfloat16* to, int pair, int count) const {
    const __m512 first = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES);
    const __m512 second = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES + LANES);
    const __mmask32 inside = layer_.out - pair * PAIR * LANES < PAIR * LANES ? 0xffff : ~0u;
    for (int row = 0; row < count; row++) {
      __m512 low = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES), first);
      __m512 high = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES + LANES), second);
      const int64_t at = int64_t(row) * layer_.out;
      if (ACTIVE) {
        low = gelu(low);
        high = gelu(high);
      }
      if (beside) {
        const __m512i both = _mm512_maskz_loadu_epi16(inside, beside + at);
        low = _mm512_add_ps(low, wide(_mm512_castsi512_si256(both)));
        high = _mm512_add_ps(high, wide(_mm512_extracti64x4_epi64(both, 1)));
      }
      _mm512_mask_storeu_epi16(to + at, inside, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  void gate(bfloat16* to, int pair, int count) const {
    const __m512 first = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES);
    const __m512 second = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES + LANES);
    for (int row = 0; row < count; row++) {
      const __m512 value = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES), first);
      const __m512 gate = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES + LANES), second);
      const auto answer = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(value, gelu(gate)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + int64_t(row) * layer_.out), answer);
    }
  }

  const Tiles& tiles_;
  const Layer& layer_;
  Room<bfloat16> held_;
  alignas(64) float products_[2 * LANES * PAIR * LANES];
};

// So many rows of `layer.in` to as many of `layer.out`, by one thread.
inline void compute(const Layer& layer, const bfloat16* from, const bfloat16* beside, bfloat16* to, int64_t rows) {
  const Tiles tiles;
  Panel panel(tiles, layer);
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int count = std::min<int64_t>(PANEL, rows - row);
    panel.compute(from + row * layer.in, beside ? beside + row * layer.out : nullptr, to + row * layer.out, count);
  }
}

// The same through two layers, of which `first` answers what `second` reads; that stays near.
inline void compute(const Layer& first, const Layer& second, const bfloat16* from, const bfloat16* beside, bfloat16* to,
                    int64_t rows) {
  const Tiles tiles;
  Panel one(tiles, first), other(tiles, second);
  const auto between = room<bfloat16>(PANEL * first.out);
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int count = std::min<int64_t>(PANEL, rows - row);
    one.compute(from + row * first.in, nullptr, between.get(), count);
    other.compute(between.get(), beside ? beside + row * second.out : nullptr, to + row * second.out, count);
  }
}

}  // namespace linear
