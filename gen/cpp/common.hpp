// What the kernels share.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

using bfloat16 = uint16_t;

constexpr int LANES = 16;  // values of 32 bits in a register

// bfloat16 as float32.
inline __m512 wide(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// Values that are kept as bfloat16 or float32 and computed with as float32. Where `asked` says which, no other is read or
// written, which takes longer.
inline __m512 load(const bfloat16* at) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
inline __m512 load(const bfloat16* at, __mmask16 asked) { return wide(_mm256_maskz_loadu_epi16(asked, at)); }
inline __m512 load(const float* at) { return _mm512_loadu_ps(at); }
inline __m512 load(const float* at, __mmask16 asked) { return _mm512_maskz_loadu_ps(asked, at); }
inline void store(bfloat16* at, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(value));
}
inline void store(bfloat16* at, __m512 value, __mmask16 asked) {
  _mm256_mask_storeu_epi16(at, asked, (__m256i)_mm512_cvtneps_pbh(value));
}
inline void store(float* at, __m512 value) { _mm512_storeu_ps(at, value); }
inline void store(float* at, __m512 value, __mmask16 asked) { _mm512_mask_storeu_ps(at, asked, value); }

// 2^x times a factor, to a part in ten thousand: a polynomial of what is behind the point.
inline __m512 power_of_two(__m512 x, float factor = 1) {
  const __m512 behind = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 y = _mm512_fmadd_ps(behind, _mm512_set1_ps(0.0790207f * factor), _mm512_set1_ps(0.2241291f * factor));
  y = _mm512_fmadd_ps(y, behind, _mm512_set1_ps(0.6968360f * factor));
  y = _mm512_fmadd_ps(y, behind, _mm512_set1_ps(0.9998109f * factor));
  return _mm512_scalef_ps(y, x);
}

// 2^x as exactly as float32 says it (to 2e-7): the same of what is up to a half away from a whole number.
inline __m512 exact_power_of_two(__m512 x) {
  constexpr float SHARES[] = {1.5337580e-4f, 1.3399866e-3f, 9.6185198e-3f, 5.5503290e-2f,
                              2.4022646e-1f, 6.9314718e-1f, 1};
  const __m512 behind = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
  __m512 y = _mm512_set1_ps(SHARES[0]);
  for (int i = 1; i < 7; i++) y = _mm512_fmadd_ps(y, behind, _mm512_set1_ps(SHARES[i]));
  return _mm512_scalef_ps(y, _mm512_sub_ps(x, behind));
}

// Does the same work in so many threads at once, of which the caller's is one; in fewer where the system gives no more,
// since each takes what is next of it.
template <class Work>
void by_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int i = 1; i < threads; i++) others.emplace_back(work);
  } catch (const std::system_error&) {
  }
  work();
  for (auto& other : others) other.join();
}
