// Convolutions of 3 x 3 by fewer multiplications: minimal filtering F(2x2, 3x3) (Winograd 1980, Lavin & Gray 2016), 16
// products for four answers where 36 are plain. Channels stand side by side. Patches of 4 x 4 and their products are
// transformed in float32; what is multiplied is float32 or bfloat16.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common.cpp"
#include "tiles.cpp"

namespace winograd {

constexpr int SIDE = 4, STEP = 2;    // of a patch, and what of the answer follows from it
constexpr int PLACES = SIDE * SIDE;  // products for each
constexpr int PATCHES = 2 * LANES;   // patches at a time
constexpr int WIDE = PAIR * LANES;   // channels of the answer at a time
constexpr int STEP_OF_PRODUCTS = PATCHES * WIDE + LANES;

template <class Value>
struct Layer {
  int in, out;          // channels, multiples of 32
  const Value* weight;  // transformed: (out / 32, PLACES, in, 32), as `Tiles::multiply_pair` reads the last two
  const float* bias;    // (out)
};

template <class Value>
struct Pictures {
  const Value* from;    // (rows, height, width, in)
  const float* told;    // added to every place of a row, (rows, out); null: nothing
  const Value* beside;  // added, like the answer; null: nothing
  Value* to;            // (rows, height, width, out)
  int rows, height, width;

  int down() const { return (height + STEP - 1) / STEP; }
  int across() const { return (width + STEP - 1) / STEP; }
  int patches() const { return rows * down() * across(); }
};

struct Patch {  // its first answer
  int row, top, left;

  template <class Value>
  Patch(const Pictures<Value>& pictures, int number)
      : row(number / (pictures.down() * pictures.across())),
        top(number / pictures.across() % pictures.down() * STEP),
        left(number % pictures.across() * STEP) {}
};

// --- values ----------------------------------------------------------------------------------------------------

inline __m512 load(const bfloat16* at) { return wide(at); }
inline __m512 load(const float* at) { return _mm512_loadu_ps(at); }
inline void store(bfloat16* at, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(value));
}
inline void store(float* at, __m512 value) { _mm512_storeu_ps(at, value); }

// --- transforms ------------------------------------------------------------------------------------------------

// Four values of a patch, `step` apart, as what their filters are multiplied by.
inline void turn_in(__m512* d, int step) {
  const __m512 first = _mm512_sub_ps(d[0], d[2 * step]), last = _mm512_sub_ps(d[step], d[3 * step]);
  const __m512 sum = _mm512_add_ps(d[step], d[2 * step]), apart = _mm512_sub_ps(d[2 * step], d[step]);
  d[0] = first, d[step] = sum, d[2 * step] = apart, d[3 * step] = last;
}

// Four products, `step` apart, as two answers.
inline void turn_out(__m512* m, int step) {
  const __m512 first = _mm512_add_ps(_mm512_add_ps(m[0], m[step]), m[2 * step]);
  m[step] = _mm512_sub_ps(_mm512_sub_ps(m[step], m[2 * step]), m[3 * step]);
  m[0] = first;
}

// --- a thread's work -------------------------------------------------------------------------------------------

template <class Value>
class Block {  // PATCHES of a layer
 public:
  Block(const Tiles& tiles, const Layer<Value>& layer, const Pictures<Value>& pictures)
      : tiles_(tiles),
        layer_(layer),
        pictures_(pictures),
        step_(PATCHES * layer.in + 64 / sizeof(Value)),
        nothing_(layer.in),
        turned_(room<Value>(PLACES * step_)),
        products_(room<float>(PLACES * STEP_OF_PRODUCTS)) {}

  void compute(int first) {
    const int count = std::min(PATCHES, pictures_.patches() - first);
    for (int i = 0; i < count; i++) read(Patch(pictures_, first + i), i);
    const int64_t panel = int64_t(layer_.in) * WIDE;
    for (int out = 0; out < layer_.out; out += WIDE) {
      const Value* weight = layer_.weight + out / WIDE * PLACES * panel;
      for (int place = 0; place < PLACES; place++)
        multiply(products_.get() + place * STEP_OF_PRODUCTS, turned_.get() + place * step_,
                 weight + place * panel, count);
      for (int i = 0; i < count; i++) write(Patch(pictures_, first + i), i, out);
    }
  }

 private:
  void multiply(float* to, const bfloat16* rows, const bfloat16* weight, int count) const {
    tiles_.multiply_pair(to, rows, layer_.in, weight, count);
  }
  void multiply(float* to, const float* rows, const float* weight, int count) const {
    multiply_pair(to, rows, layer_.in, weight, count);
  }

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
      for (int line = 0; line < SIDE; line++) turn_in(d + line, SIDE);
      for (int line = 0; line < SIDE; line++) turn_in(d + line * SIDE, 1);
      Value* to = turned_.get() + int64_t(i) * layer_.in + channel;
      for (int place = 0; place < PLACES; place++) store(to + place * step_, d[place]);
    }
  }

  void write(const Patch& patch, int i, int out) const {
    for (int channel = out; channel < out + WIDE; channel += LANES) {
      __m512 m[PLACES];
      const float* from = products_.get() + i * WIDE + channel - out;
      for (int place = 0; place < PLACES; place++) m[place] = _mm512_load_ps(from + place * STEP_OF_PRODUCTS);
      for (int line = 0; line < SIDE; line++) turn_out(m + line, SIDE);
      for (int line = 0; line < STEP; line++) turn_out(m + line * SIDE, 1);
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

  const Tiles& tiles_;
  const Layer<Value>& layer_;
  const Pictures<Value>& pictures_;
  const int64_t step_;  // from a place to the next: by no power of two, or all would want one line of the cache
  std::vector<Value> nothing_;
  Room<Value> turned_;
  Room<float> products_;
};

// All pictures, by so many threads.
template <class Value>
void compute(const Layer<Value>& layer, const Pictures<Value>& pictures, int threads) {
  std::atomic<int> next{0};
  const int blocks = (pictures.patches() + PATCHES - 1) / PATCHES;
  const auto work = [&] {
    const Tiles tiles;
    Block<Value> block(tiles, layer, pictures);
    for (int at; (at = next++) < blocks;) block.compute(at * PATCHES);
  };
  by_threads(std::min(threads, blocks), work);
}

}  // namespace winograd
