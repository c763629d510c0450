// Group norm (Wu & He 2018) in bfloat16 or float32 with channels side by side, and the SiLU behind it, in one reading and one
// writing. Sums are float32 of differences to a channel's first value, so that a large mean takes no digits.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.hpp"

namespace norm {

constexpr int BESIDE = 4;  // registers of channels that are taken down the places together

struct Channels {  // `count` of them from `from` on, in a register
  __mmask16 inside;
  int from;

  Channels(int from, int count)
      : inside(count - from >= LANES ? 0xffff : count <= from ? 0 : (1u << (count - from)) - 1), from(from) {}

  template <class Value>
  __m512 load(const Value* at) const {
    return ::load(at + from, inside);
  }
  template <class Value>
  void store(Value* at, __m512 value) const {
    ::store(at + from, value, inside);
  }
};

// x / (1 + e^-x), to a part in ten thousand of the sigmoid in bfloat16.
template <class Value>
__m512 silu(__m512 x) {
  const __m512 turned = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)), one = _mm512_set1_ps(1);  // powers are of two
  if (sizeof(Value) == sizeof(float)) return _mm512_div_ps(x, _mm512_add_ps(one, exact_power_of_two(turned)));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(one, power_of_two(turned))));
}

class Row {  // of a picture: places (of `channels` values each) one behind the other
 public:
  Row(int places, int channels, int groups, const float* scale, const float* shift, float epsilon, bool active)
      : folds_(folds(places, channels)),
        places_(places / folds_),
        channels_(channels * folds_),
        groups_(groups),
        scale_(scale),
        epsilon_(epsilon),
        active_(active),
        mean_(channels_),
        spread_(channels_),
        factor_(channels_),
        shift_(channels_) {
    for (int i = 0; i < channels_; i++) shift_[i] = shift[i % channels];
  }

  template <class Value>
  void compute(const Value* from, Value* to) {
    for (int first = 0; first < channels_; first += BESIDE * LANES) sum(from, first);
    for (int group = 0; group < groups_; group++) {
      float mean = 0, apart = 0;
      const int count = channels_ / groups_;
      each_of(group, [&](int i) { mean += mean_[i] / count; });
      each_of(group, [&](int i) { apart += spread_[i] + (mean_[i] - mean) * (mean_[i] - mean); });
      const float share = 1 / std::sqrt(apart / count + epsilon_);
      each_of(group, [&](int i) {
        mean_[i] = mean;
        factor_[i] = share * scale_[i % (channels_ / folds_)];
      });
    }
    for (int first = 0; first < channels_; first += BESIDE * LANES)
      active_ ? write<true>(from, to, first) : write<false>(from, to, first);
  }

 private:
  // Few channels leave registers empty, so some places count as one, of so many times the channels.
  static int folds(int places, int channels) {
    int count = 1;
    while (2 * count * channels <= BESIDE * LANES && places % (2 * count) == 0) count *= 2;
    return count;
  }

  // Tells every channel of a group, in all the places that count as one.
  template <class Tell>
  void each_of(int group, const Tell& tell) const {
    const int channels = channels_ / folds_, size = channels / groups_;
    for (int fold = 0; fold < folds_; fold++)
      for (int i = 0; i < size; i++) tell(fold * channels + group * size + i);
  }

  // Mean and variance of each of some channels.
  template <class Value>
  void sum(const Value* from, int first) {
    __m512 start[BESIDE], sums[BESIDE], squares[BESIDE];
    for (int i = 0; i < BESIDE; i++) {
      start[i] = here(first, i).load(from);
      sums[i] = squares[i] = _mm512_setzero_ps();
    }
    for (int place = 0; place < places_; place++)
      for (int i = 0; i < BESIDE; i++) {
        const __m512 apart = _mm512_sub_ps(here(first, i).load(from + int64_t(place) * channels_), start[i]);
        sums[i] = _mm512_add_ps(sums[i], apart);
        squares[i] = _mm512_fmadd_ps(apart, apart, squares[i]);
      }
    const __m512 share = _mm512_set1_ps(1.f / places_);
    for (int i = 0; i < BESIDE; i++) {
      const __m512 mean = _mm512_mul_ps(sums[i], share);
      const __m512 spread = _mm512_fnmadd_ps(mean, mean, _mm512_mul_ps(squares[i], share));
      here(first, i).store(mean_.data(), _mm512_add_ps(start[i], mean));
      here(first, i).store(spread_.data(), _mm512_max_ps(spread, _mm512_setzero_ps()));
    }
  }

  template <bool ACTIVE, class Value>
  void write(const Value* from, Value* to, int first) const {
    __m512 mean[BESIDE], factor[BESIDE], shift[BESIDE];
    for (int i = 0; i < BESIDE; i++) {
      mean[i] = here(first, i).load(mean_.data());
      factor[i] = here(first, i).load(factor_.data());
      shift[i] = here(first, i).load(shift_.data());
    }
    for (int place = 0; place < places_; place++)
      for (int i = 0; i < BESIDE; i++) {
        const int64_t at = int64_t(place) * channels_;
        const __m512 apart = _mm512_sub_ps(here(first, i).load(from + at), mean[i]);
        const __m512 normed = _mm512_fmadd_ps(apart, factor[i], shift[i]);
        here(first, i).store(to + at, ACTIVE ? silu<Value>(normed) : normed);
      }
  }

  Channels here(int first, int i) const { return {first + i * LANES, channels_}; }

  const int folds_, places_, channels_, groups_;
  const float* scale_;
  const float epsilon_;
  const bool active_;
  std::vector<float> mean_, spread_, factor_, shift_;
};

// Rows of (places, channels), by so many threads.
template <class Value>
void compute(const Value* from, Value* to, int rows, int places, int channels, int groups, const float* scale,
             const float* shift, float epsilon, bool active, int threads) {
  std::atomic<int> next{0};
  const auto work = [&] {
    Row row(places, channels, groups, scale, shift, epsilon, active);
    for (int at; (at = next++) < rows;) {
      const int64_t start = int64_t(at) * places * channels;
      row.compute(from + start, to + start);
    }
  };
  by_threads(std::min(threads, rows), work);
}

}  // namespace norm
