// Vectors of W of a block's 16 columns: GCC/Clang vector extensions, no intrinsics. Everything here is inlined into
// loops that are compiled once per instruction set, so W is 4 (any CPU), 8 (AVX2) or 16 (AVX-512).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define INLINE [[gnu::always_inline]] inline
#define UNROLL _Pragma("GCC unroll 32")

namespace qgc {

constexpr int kRows = 32, kColumns = 16, kBlock = kRows * kColumns, kPassThrough = 32;
constexpr uint32_t kLane[kColumns] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr uint32_t kLive = (127 - 90) << 23, kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

enum Dtype { kFloat32, kBfloat16, kFloat16 };

template <int W> struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef double D __attribute__((vector_size(8 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

template <class To, class From> INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V> INLINE V load(const void* from) {  // from any alignment
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }

// a * b + c, fused where the instruction set can: for statistics only, whose last bits are free. The compiler must not
// fuse anything by itself, and has no portable way to ask for it on vectors.
template <class F> INLINE F multiply_add(F a, F b, F c) {
#if defined(__x86_64__)
  if constexpr (sizeof(F) > 16) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#endif
  return a * b + c;
}

// ---------------------------------------------------------------------------------------------------- bit transpose

// Swap bit j of word k with bit k of word j, in every field of F bits.
template <int F, class U> INLINE void transpose(U (&words)[F]) {
  constexpr uint32_t kMasks[] = {0x55555555, 0x33333333, 0x0f0f0f0f, 0x00ff00ff};
  UNROLL for (int level = 3; level >= 0; --level) {
    const int step = 1 << level;
    if (step >= F) continue;
    UNROLL for (int k = 0; k < F; ++k) {
      if (k & step) continue;
      const U swap = ((words[k] >> step) ^ words[k + step]) & kMasks[level];
      words[k + step] ^= swap;
      words[k] ^= swap << step;
    }
  }
}

// Take the low F bits of the integer part of a fixed-point number to field f.
template <int F, class U> INLINE U place(U fixed, int f) {
  const int shift = F * f - 16;
  const uint32_t field = ((1u << F) - 1) << (F * f);
  return (shift < 0 ? fixed >> -shift : fixed << shift) & field;
}

// Read field f as a signed number; the sign codec's 0 and -1 become 1 and -1.
template <int F, class U> INLINE auto signed_field(U word, int f) {
  using I = typename Vec<sizeof(U) / 4>::I;
  const I code = (I)(word << (32 - F - F * f)) >> (32 - F);
  if constexpr (F == 1) return code | 1;
  return code;
}

// -------------------------------------------------------------------------------------------------------- reduction

template <int W> INLINE uint32_t largest_lane(typename Vec<W>::I v) {
  if constexpr (W > 4) {
    using Half = typename Vec<W / 2>::I;
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return largest_lane<W / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
  int32_t largest = v[0];
  UNROLL for (int i = 1; i < W; ++i) largest = std::max(largest, v[i]);
  return (uint32_t)largest;
}

// Sums over blocks: fp32 lanes within a block, float64 across blocks.
template <int W> struct Sum {
  using Half = typename Vec<W / 2>::D;
  Half low{}, high{};

  INLINE void add(typename Vec<W>::F lanes, double factor) {
    typename Vec<W / 2>::F halves[2];
    std::memcpy(halves, &lanes, sizeof lanes);
    low += __builtin_convertvector(halves[0], Half) * factor;
    high += __builtin_convertvector(halves[1], Half) * factor;
  }
  INLINE double total() const {
    const Half both = low + high;
    double sum = 0;
    for (int i = 0; i < W / 2; ++i) sum += both[i];
    return sum;
  }
};

// ------------------------------------------------------------------------------------------------ half precision

// Widen to fp32. Exact, and without arithmetic on subnormals, which a process may have switched off.
template <int W> INLINE typename Vec<W>::F widen(typename Vec<W>::H half, Dtype dtype) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const U word = __builtin_convertvector(half, U);
  if (dtype == kBfloat16) return bits_as<F>(word << 16);
  const U magnitude = (word & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const U normal = magnitude + (112u << 23), special = magnitude | kInfinity;
  const U subnormal = bits_as<U>(bits_as<F>(magnitude + (113u << 23)) - 0x1p-14f);
  const U value = exponent == 0 ? subnormal : exponent == 0x0f800000 ? special : normal;
  return bits_as<F>(value | (word & 0x8000) << 16);
}

}  // namespace qgc
