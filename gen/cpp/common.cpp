// What the kernels share.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <thread>
#include <vector>

using bfloat16 = uint16_t;

constexpr int LANES = 16;  // values of 32 bits in a register

// bfloat16 as float32.
inline __m512 wide(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
inline __m512 wide(const bfloat16* at) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }

// 2^x times a factor, to a part in ten thousand: a polynomial of what is behind the point.
inline __m512 power_of_two(__m512 x, float factor = 1) {
  const __m512 behind = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 y = _mm512_fmadd_ps(behind, _mm512_set1_ps(0.0790207f * factor), _mm512_set1_ps(0.2241291f * factor));
  y = _mm512_fmadd_ps(y, behind, _mm512_set1_ps(0.6968360f * factor));
  y = _mm512_fmadd_ps(y, behind, _mm512_set1_ps(0.9998109f * factor));
  return _mm512_scalef_ps(y, x);
}

// Does the same work in so many threads at once, of which the caller's is one.
template <class Work>
void by_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}
