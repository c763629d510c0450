// Linear layers in bfloat16 or float32, and what stands around one in a transformer: before it a layer norm (Ba et al. 2016)
// whose scale and shift are in the weights, behind it GELU, GEGLU (Shazeer 2020) or what is added to it. Inputs are read and
// answers written once; sums, norms and activations are float32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common.hpp"
#include "tiles.hpp"

namespace linear {

constexpr int PANEL = 64;  // rows whose input stays near while all weights go by

template <class Value>
struct Layer {
  int in, out;          // values of a row, multiples of 32 and 16
  const Value* weight;  // (pairs, ...), of each what `multiply_pair` reads
  const float* bias;    // of each value of the pairs, in their order
  bool normed, active, gated;  // what stands before it and behind it: a norm, GELU, GEGLU
  float epsilon;               // of the norm

  // A pair of tiles is for 32 values of the answer, or for 16 and their gates.
  int per_pair() const { return gated ? LANES : PAIR * LANES; }
  int pairs() const { return (out + per_pair() - 1) / per_pair(); }
};

// The normal distribution's share below x, to 1e-4: a half and an odd polynomial of degree 15 up to 4.2 from zero, fitted by
// least squares to be all and nothing there, and the same beyond.
inline __m512 share_below(__m512 x) {
  constexpr float END = 4.2f;
  constexpr float SHARES[] = {-8.71319628e-10f, 7.71800543e-08f,  -2.97145266e-06f, 6.58632489e-05f,
                              -9.41908453e-04f, 9.25822463e-03f, -6.54408410e-02f, 3.98400307e-01f};
  const __m512 near = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(END)), _mm512_set1_ps(-END));
  const __m512 square = _mm512_mul_ps(near, near);
  __m512 share = _mm512_set1_ps(SHARES[0]);
  for (int i = 1; i < 8; i++) share = _mm512_fmadd_ps(share, square, _mm512_set1_ps(SHARES[i]));
  return _mm512_fmadd_ps(near, share, _mm512_set1_ps(0.5f));
}

// The same to 1e-7: what is beyond x, up to 5.5 from zero, is sixteen polynomials of degree 5, each of how far x is from the
// middle of a sixteenth of that way, fitted by least squares; farther away it is nothing.
inline __m512 exact_share_below(__m512 x) {
  constexpr float END = 5.5f;
  alignas(64) static constexpr float SHARES[6][LANES] = {
      {-4.41310258e-5f, -2.05428696e-5f, 9.62827016e-6f, 2.75705879e-5f, 2.70402270e-5f, 1.51476033e-5f,
       2.73335309e-6f, -4.13625366e-6f, -5.48143953e-6f, -4.06515119e-6f, -2.24407904e-6f, -9.96355766e-7f,
       -3.67996535e-7f, -1.15141340e-7f, -3.08619192e-8f, -7.13916615e-9f},
      {-1.15908377e-4f, -2.84562237e-4f, -3.10141098e-4f, -2.09700826e-4f, -6.64038962e-5f, 4.13417183e-5f,
       8.45057439e-5f, 7.83914802e-5f, 5.26082295e-5f, 2.81982266e-5f, 1.25562947e-5f, 4.73940281e-6f,
       1.53453982e-6f, 4.29511715e-7f, 1.04479099e-7f, 2.21727383e-8f},
      {2.58252071e-3f, 1.73590309e-3f, 4.88161371e-4f, -5.86067443e-4f, -1.13705662e-3f, -1.16409606e-3f,
       -8.88455310e-4f, -5.49504184e-4f, -2.85002345e-4f, -1.26163606e-4f, -4.81673778e-5f, -1.59669726e-5f,
       -4.61684294e-6f, -1.16831586e-6f, -2.59382858e-7f, -5.06187341e-8f},
      {3.99167137e-3f, 1.06404349e-2f, 1.40015017e-2f, 1.37515590e-2f, 1.10211736e-2f, 7.46089313e-3f,
       4.33945004e-3f, 2.18955078e-3f, 9.64190636e-4f, 3.72043753e-4f, 1.26142215e-4f, 3.76566859e-5f,
       9.91282286e-6f, 2.30373075e-6f, 4.73087340e-7f, 8.59096829e-8f},
      {-1.35125726e-1f, -1.20065995e-1f, -9.47946906e-2f, -6.65012822e-2f, -4.14531976e-2f, -2.29597948e-2f,
       -1.12995207e-2f, -4.94121760e-3f, -1.91995036e-3f, -6.62869425e-4f, -2.03351825e-4f, -5.54306789e-5f,
       -1.34256243e-5f, -2.88935553e-6f, -5.52522238e-7f, -9.38817024e-8f},
      {4.31767911e-1f, 3.03058177e-1f, 1.95066825e-1f, 1.14463978e-1f, 6.09466955e-2f, 2.93372087e-2f,
       1.27292033e-2f, 4.96690255e-3f, 1.73965574e-3f, 5.46114112e-4f, 1.53467947e-4f, 3.85686290e-5f,
       8.66117261e-6f, 1.73679655e-6f, 3.10815579e-7f, 4.96168013e-8f}};
  const __m512 way = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(LANES / END)), all = _mm512_set1_ps(LANES);
  const __m512i piece = _mm512_cvttps_epi32(_mm512_min_ps(way, _mm512_set1_ps(LANES - 1)));
  const __m512 apart = _mm512_sub_ps(way, _mm512_add_ps(_mm512_cvtepi32_ps(piece), _mm512_set1_ps(0.5f)));
  __m512 beyond = _mm512_permutexvar_ps(piece, _mm512_load_ps(SHARES[0]));
  for (int i = 1; i < 6; i++)
    beyond = _mm512_fmadd_ps(beyond, apart, _mm512_permutexvar_ps(piece, _mm512_load_ps(SHARES[i])));
  beyond = _mm512_mask_mov_ps(beyond, _mm512_cmp_ps_mask(way, all, _CMP_GT_OQ), _mm512_setzero_ps());
  const __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mask_sub_ps(beyond, is_positive, _mm512_set1_ps(1), beyond);
}

// x times the normal distribution's share below it (Hendrycks & Gimpel 2016), as exactly as is asked of such values.
template <class Value>
__m512 gelu(__m512 x) {
  return _mm512_mul_ps(x, sizeof(Value) < sizeof(float) ? share_below(x) : exact_share_below(x));
}

// A row without its mean, over its deviation.
template <class Value>
void normalise(const Value* from, Value* to, int count, float epsilon) {
  const __m512 first = _mm512_broadcastss_ps(_mm512_castps512_ps128(load(from, 1)));  // sums of differences to it keep digits
  __m512 sums[2] = {}, squares[2] = {};
  for (int i = 0; i < count; i += 2 * LANES)
    for (int half = 0; half < 2; half++) {
      const __m512 apart = _mm512_sub_ps(load(from + i + half * LANES), first);
      sums[half] = _mm512_add_ps(sums[half], apart);
      squares[half] = _mm512_fmadd_ps(apart, apart, squares[half]);
    }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / count;
  const float square = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / count;
  const __m512 centre = _mm512_add_ps(first, _mm512_set1_ps(mean));
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(std::max(square - mean * mean, 0.f) + epsilon));
  for (int i = 0; i < count; i += LANES) store(to + i, _mm512_mul_ps(_mm512_sub_ps(load(from + i), centre), factor));
}

template <class Value>
class Panel {  // PANEL rows of a layer
 public:
  Panel(const Tiles& tiles, const Layer<Value>& layer)
      : tiles_(tiles), layer_(layer), held_(room<Value>(PANEL * layer.in)) {}

  // `count` rows from `from`; `beside`, where there is one, is added to what goes `to`.
  void compute(const Value* from, const Value* beside, Value* to, int count) {
    const Value* rows = from;
    if (layer_.normed || count < PANEL) {
      for (int row = 0; row < count; row++) {
        const Value* at = from + int64_t(row) * layer_.in;
        Value* held = held_.get() + row * layer_.in;
        layer_.normed ? normalise(at, held, layer_.in, layer_.epsilon) : (void)std::copy_n(at, layer_.in, held);
      }
      rows = held_.get();
    }
    for (int pair = 0; pair < layer_.pairs(); pair++)
      for (int row = 0; row < count; row += 2 * LANES) {
        const int here = std::min(2 * LANES, count - row);
        const Value* weight = layer_.weight + int64_t(pair) * layer_.in * PAIR * LANES;
        multiply_pair(tiles_, products_, rows + row * layer_.in, layer_.in, weight, here);
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
  void write(const Value* beside, Value* to, int pair, int count) const {
    const __m512 first = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES);
    const __m512 second = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES + LANES);
    const __mmask16 inside = layer_.out - pair * PAIR * LANES < PAIR * LANES ? 0 : 0xffff;  // of the second
    for (int row = 0; row < count; row++) {
      __m512 low = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES), first);
      __m512 high = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES + LANES), second);
      const int64_t at = int64_t(row) * layer_.out;
      if (ACTIVE) {
        low = gelu<Value>(low);
        high = gelu<Value>(high);
      }
      if (beside) {
        low = _mm512_add_ps(low, load(beside + at));
        high = _mm512_add_ps(high, load(beside + at + LANES, inside));
      }
      store(to + at, low);
      store(to + at + LANES, high, inside);
    }
  }

  void gate(Value* to, int pair, int count) const {
    const __m512 first = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES);
    const __m512 second = _mm512_loadu_ps(layer_.bias + pair * PAIR * LANES + LANES);
    for (int row = 0; row < count; row++) {
      const __m512 value = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES), first);
      const __m512 gate = _mm512_add_ps(_mm512_load_ps(products_ + row * PAIR * LANES + LANES), second);
      store(to + int64_t(row) * layer_.out, _mm512_mul_ps(value, gelu<Value>(gate)));
    }
  }

  const Tiles& tiles_;
  const Layer<Value>& layer_;
  Room<Value> held_;
  alignas(64) float products_[2 * LANES * PAIR * LANES];
};

// So many rows of `layer.in` to as many of `layer.out`, by one thread.
template <class Value>
void compute(const Layer<Value>& layer, const Value* from, const Value* beside, Value* to, int64_t rows) {
  const Tiles tiles;
  Panel<Value> panel(tiles, layer);
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int count = std::min<int64_t>(PANEL, rows - row);
    panel.compute(from + row * layer.in, beside ? beside + row * layer.out : nullptr, to + row * layer.out, count);
  }
}

// The same through two layers, of which `first` answers what `second` reads; that stays near.
template <class Value>
void compute(const Layer<Value>& first, const Layer<Value>& second, const Value* from, const Value* beside, Value* to,
             int64_t rows) {
  const Tiles tiles;
  Panel<Value> one(tiles, first), other(tiles, second);
  const auto between = room<Value>(PANEL * first.out);
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int count = std::min<int64_t>(PANEL, rows - row);
    one.compute(from + row * first.in, nullptr, between.get(), count);
    other.compute(between.get(), beside ? beside + row * second.out : nullptr, to + row * second.out, count);
  }
}

}  // namespace linear
