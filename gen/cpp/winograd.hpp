// Convolutions of 3 x 3 by fewer multiplications: minimal filtering (Winograd 1980, Lavin & Gray 2016). F(2x2, 3x3) takes 16
// products for four answers where 36 are plain, F(4x4, 3x3) takes 36 for sixteen where 144 are, and rounds more. Channels
// stand side by side. Patches and their products are transformed in float32. What is multiplied is float32, or bfloat16, or
// for F(4x4, 3x3) of bfloat16 whole numbers of 16 bits: all channels of a patch at a place have one scale, and all of a
// filter have one. So scaled, their norms are at most MOST_OF_PATCH and MOST_OF_FILTER, and by the inequality of Cauchy and
// Schwarz no sum of their products, nor a part of one, is beyond 32 bits. They multiply as fast as bfloat16 and round an eighth.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.hpp"
#include "tiles.hpp"

namespace winograd {

constexpr int WIDE = PAIR * LANES;  // channels of the answer at a time

constexpr float MOST_OF_PATCH = 65400;  // its product with a filter's 32,700 (`gen.openvino_convolution`) is below 2^31
constexpr float MOST_OF_VALUE = 32700;  // of a patch, which has 16 bits

// What is multiplied of values, in patches for STEP x STEP answers, and what its products are summed in.
template <class Value, int STEP>
struct Factors {
  static constexpr bool ARE_WHOLE = false;
  using Factor = Value;
  using Sum = float;
};

template <>
struct Factors<bfloat16, 4> {
  static constexpr bool ARE_WHOLE = true;
  using Factor = int16_t;
  using Sum = int32_t;
};

template <class Value, int STEP>
struct Layer {
  int in, out;  // channels, multiples of 32
  // Transformed: (out / 32, products of a patch, in, 32), as `multiply_pair` reads the last two.
  const typename Factors<Value, STEP>::Factor* weight;
  const float* scales;  // of whole numbers, what one is of each filter, (out / 32, products of a patch, 32)
  const float* bias;    // (out)
};

template <class Value>
struct Pictures {
  const Value* from;    // (rows, height, width, in)
  const float* told;    // added to every place of a row, (rows, out); null: nothing
  const Value* beside;  // added, like the answer; null: nothing
  Value* to;            // (rows, height, width, out)
  int rows, height, width;
};

// --- transforms ------------------------------------------------------------------------------------------------

// Values of a patch, `apart` from each other, as what their filters are multiplied by; products as answers. In place.
template <int STEP>
struct Filtering;

// By the parabola through three numbers at 0, 1 and -1, and its leading number.
template <>
struct Filtering<2> {
  static void turn_in(__m512* d, int apart) {
    const __m512 first = _mm512_sub_ps(d[2 * apart], d[0]), last = _mm512_sub_ps(d[3 * apart], d[apart]);
    const __m512 sum = _mm512_add_ps(d[apart], d[2 * apart]), difference = _mm512_sub_ps(d[2 * apart], d[apart]);
    d[0] = first, d[apart] = sum, d[2 * apart] = difference, d[3 * apart] = last;
  }

  static void turn_out(__m512* m, int apart) {
    const __m512 first = _mm512_add_ps(_mm512_add_ps(m[0], m[apart]), m[2 * apart]);
    m[apart] = _mm512_add_ps(_mm512_sub_ps(m[apart], m[2 * apart]), m[3 * apart]);
    m[0] = first;
  }
};

// By a polynomial of degree 5 through numbers at 0, 3/4, -3/4, 3/2 and -3/2, and its leading number: a half of the rounding of
// 0, 1, -1, 2 and -2, as Lavin & Gray have it.
template <>
struct Filtering<4> {
  static constexpr float A = 0.75, B = 1.5, AA = A * A, BB = B * B;

  static void turn_in(__m512* d, int apart) {
    const auto at = [&](int i) -> __m512& { return d[i * apart]; };
    const auto without = [](__m512 x, float share, __m512 y) { return _mm512_fnmadd_ps(_mm512_set1_ps(share), y, x); };
    const auto with = [](__m512 x, float share, __m512 y) { return _mm512_fmadd_ps(_mm512_set1_ps(share), y, x); };
    const __m512 first = with(without(at(4), AA + BB, at(2)), AA * BB, at(0));
    const __m512 last = with(without(at(5), AA + BB, at(3)), AA * BB, at(1));
    const __m512 even_a = without(at(4), BB, at(2)), odd_a = without(at(3), BB, at(1));
    const __m512 even_b = without(at(4), AA, at(2)), odd_b = without(at(3), AA, at(1));
    at(0) = first;
    at(1) = with(even_a, A, odd_a), at(2) = without(even_a, A, odd_a);
    at(3) = with(even_b, B, odd_b), at(4) = without(even_b, B, odd_b);
    at(5) = last;
  }

  static void turn_out(__m512* m, int apart) {
    const auto at = [&](int i) -> __m512& { return m[i * apart]; };
    const auto share = [](float share, __m512 x) { return _mm512_mul_ps(_mm512_set1_ps(share), x); };
    const auto with = [](__m512 x, float share, __m512 y) { return _mm512_fmadd_ps(_mm512_set1_ps(share), y, x); };
    const __m512 sum_a = _mm512_add_ps(at(1), at(2)), difference_a = _mm512_sub_ps(at(1), at(2));
    const __m512 sum_b = _mm512_add_ps(at(3), at(4)), difference_b = _mm512_sub_ps(at(3), at(4));
    at(0) = _mm512_add_ps(at(0), _mm512_add_ps(sum_a, sum_b));
    at(1) = with(share(A, difference_a), B, difference_b);
    at(2) = with(share(AA, sum_a), BB, sum_b);
    at(3) = with(with(at(5), AA * A, difference_a), BB * B, difference_b);
  }
};

// --- a thread's work -------------------------------------------------------------------------------------------

template <class Value, int STEP>
class Block {  // some patches of a layer, each for STEP x STEP answers
 public:
  using Factor = typename Factors<Value, STEP>::Factor;
  using Sum = typename Factors<Value, STEP>::Sum;
  static constexpr bool ARE_WHOLE = Factors<Value, STEP>::ARE_WHOLE;
  static constexpr int SIDE = STEP + 2;                        // of a patch
  static constexpr int PLACES = SIDE * SIDE;                   // products of a patch
  // At a time, so that they stay near. Tiles of bfloat16 come 32 rows at once.
  static constexpr int PATCHES = sizeof(Factor) == 4 && STEP == 4 ? LANES : 2 * LANES;

  static int count(const Pictures<Value>& pictures) { return pictures.rows * down(pictures) * across(pictures); }

  // How many patches a block has where so many threads share them: some for each.
  static int size(const Pictures<Value>& pictures, int threads) {
    constexpr int LEAST = std::is_same_v<Factor, bfloat16> ? PATCHES : HERE;
    const int share = (count(pictures) + threads - 1) / threads;
    return std::clamp((share + LEAST - 1) / LEAST * LEAST, LEAST, PATCHES);
  }

  Block(const Tiles& tiles, const Layer<Value, STEP>& layer, const Pictures<Value>& pictures)
      : tiles_(tiles),
        layer_(layer),
        pictures_(pictures),
        step_(PATCHES * layer.in + 64 / sizeof(Factor)),
        nothing_(layer.in),
        turned_(room<Factor>(PLACES * step_)),
        products_(room<Sum>(PLACES * STEP_OF_PRODUCTS)),
        exact_(ARE_WHOLE ? room<float>(PLACES * layer.in) : nullptr) {}

  void compute(int first, int most) {
    const int here = std::min(most, count(pictures_) - first);
    for (int i = 0; i < here; i++) read(Patch(pictures_, first + i), i);
    const int64_t panel = int64_t(layer_.in) * WIDE;
    for (int out = 0; out < layer_.out; out += WIDE) {
      const Factor* weight = layer_.weight + out / WIDE * PLACES * panel;
      for (int place = 0; place < PLACES; place++)
        multiply_pair(tiles_, products_.get() + place * STEP_OF_PRODUCTS, turned_.get() + place * step_, layer_.in,
                      weight + place * panel, here);
      for (int i = 0; i < here; i++) write(Patch(pictures_, first + i), i, out);
    }
  }

 private:
  static constexpr int STEP_OF_PRODUCTS = PATCHES * WIDE + LANES;

  static int down(const Pictures<Value>& pictures) { return (pictures.height + STEP - 1) / STEP; }
  static int across(const Pictures<Value>& pictures) { return (pictures.width + STEP - 1) / STEP; }

  struct Patch {  // its first answer
    int row, top, left;

    Patch(const Pictures<Value>& pictures, int number)
        : row(number / (down(pictures) * across(pictures))),
          top(number / across(pictures) % down(pictures) * STEP),
          left(number % across(pictures) * STEP) {}
  };

  void read(const Patch& patch, int i) {
    const Value* at[PLACES];  // zeros beyond the edges
    for (int place = 0; place < PLACES; place++) {
      const int y = patch.top - 1 + place / SIDE, x = patch.left - 1 + place % SIDE;
      const bool is_inside = y >= 0 && y < pictures_.height && x >= 0 && x < pictures_.width;
      const int64_t cell = (int64_t(patch.row) * pictures_.height + y) * pictures_.width + x;
      at[place] = is_inside ? pictures_.from + cell * layer_.in : nothing_.data();
    }
    for (int channel = 0; channel < layer_.in; channel += LANES) {
      __m512 d[PLACES];
      for (int place = 0; place < PLACES; place++) d[place] = load(at[place] + channel);
      for (int line = 0; line < SIDE; line++) Filtering<STEP>::turn_in(d + line, SIDE);
      for (int line = 0; line < SIDE; line++) Filtering<STEP>::turn_in(d + line * SIDE, 1);
      if constexpr (ARE_WHOLE) {
        for (int place = 0; place < PLACES; place++) _mm512_store_ps(exact_.get() + place * layer_.in + channel, d[place]);
      } else {
        Value* to = turned_.get() + int64_t(i) * layer_.in + channel;
        for (int place = 0; place < PLACES; place++) store(to + place * step_, d[place]);
      }
    }
    if constexpr (ARE_WHOLE)
      for (int place = 0; place < PLACES; place++) round(place, i);
  }

  // What a patch has at a place, in whole numbers.
  void round(int place, int i) {
    const float* from = exact_.get() + place * layer_.in;
    __m512 squares = _mm512_setzero_ps(), most = _mm512_setzero_ps();
    for (int channel = 0; channel < layer_.in; channel += LANES) {
      const __m512 d = _mm512_load_ps(from + channel);
      squares = _mm512_fmadd_ps(d, d, squares);
      most = _mm512_max_ps(most, _mm512_abs_ps(d));
    }
    const float norm = std::sqrt(_mm512_reduce_add_ps(squares)), largest = _mm512_reduce_max_ps(most);
    const float one = std::max(norm / MOST_OF_PATCH, largest / MOST_OF_VALUE);
    // zeros, and numbers too small to be told from them, are zeros; what is no number stays none
    const __m512 share = _mm512_set1_ps(one >= SMALLEST ? 1 / one : 0);
    scales_[place][i] = one >= SMALLEST ? one : one * 0;
    int16_t* to = turned_.get() + place * step_ + int64_t(i) * layer_.in;
    for (int channel = 0; channel < layer_.in; channel += LANES) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(from + channel), share));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + channel), _mm512_cvtsepi32_epi16(whole));
    }
  }

  void write(const Patch& patch, int i, int out) const {
    for (int channel = out; channel < out + WIDE; channel += LANES) {
      __m512 m[PLACES];
      const Sum* from = products_.get() + i * WIDE + channel - out;
      for (int place = 0; place < PLACES; place++) m[place] = product(from + place * STEP_OF_PRODUCTS, place, i, channel);
      for (int line = 0; line < SIDE; line++) Filtering<STEP>::turn_out(m + line, SIDE);
      for (int line = 0; line < STEP; line++) Filtering<STEP>::turn_out(m + line * SIDE, 1);
      __m512 shift = _mm512_loadu_ps(layer_.bias + channel);
      if (pictures_.told) {
        const float* told = pictures_.told + int64_t(patch.row) * layer_.out + channel;
        shift = _mm512_add_ps(shift, _mm512_loadu_ps(told));
      }
      for (int y = patch.top; y < std::min(patch.top + STEP, pictures_.height); y++)
        for (int x = patch.left; x < std::min(patch.left + STEP, pictures_.width); x++) {
          const int64_t cell = (int64_t(patch.row) * pictures_.height + y) * pictures_.width + x;
          const int64_t at = cell * layer_.out + channel;
          __m512 answer = _mm512_add_ps(m[(y - patch.top) * SIDE + x - patch.left], shift);
          if (pictures_.beside) answer = _mm512_add_ps(answer, load(pictures_.beside + at));
          store(pictures_.to + at, answer);
        }
    }
  }

  __m512 product(const Sum* from, int place, int i, int channel) const {
    if constexpr (ARE_WHOLE) {
      const float* scales = layer_.scales + (channel / WIDE * PLACES + place) * WIDE + channel % WIDE;
      const __m512 one = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(scales_[place][i]));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from)), one);
    } else {
      return _mm512_load_ps(from);
    }
  }

  static constexpr float SMALLEST = 1e-20f;  // of scales, whose squares float32 still tells from zero

  const Tiles& tiles_;
  const Layer<Value, STEP>& layer_;
  const Pictures<Value>& pictures_;
  const int64_t step_;  // from a place to the next: by no power of two, or all would want one line of the cache
  std::vector<Value> nothing_;
  Room<Factor> turned_;
  Room<Sum> products_;
  Room<float> exact_;  // of one patch, before it is in whole numbers
  float scales_[PLACES][PATCHES];  // what one is then
};

// All pictures, by so many threads and patches for STEP x STEP answers.
template <class Value, int STEP>
void compute(const Layer<Value, STEP>& layer, const Pictures<Value>& pictures, int threads) {
  using Work = Block<Value, STEP>;
  std::atomic<int> next{0};
  const int size = Work::size(pictures, threads), blocks = (Work::count(pictures) + size - 1) / size;
  const auto work = [&] {
    const Tiles tiles;
    Work block(tiles, layer, pictures);
    for (int at; (at = next++) < blocks;) block.compute(at * size, size);
  };
  by_threads(std::min(threads, blocks), work);
}

}  // namespace winograd
