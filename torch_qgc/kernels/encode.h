// Encoding: blocks of 512 numbers to a scale and bit planes. The steps are those of reference.py. Reading is strictly
// sequential and best left to the hardware: prefetching by hand made it 1.5 times slower on Zen 4.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"

namespace qgc {

struct Statistics {
  double variance = 0, squared_norm = 0;
};

struct EncodeJob {
  const char* values;
  Dtype dtype;
  int64_t numel;
  int bits;
  bool l2;
  uint32_t k0, k1;
  uint64_t first_block;
  char *scales, *planes;
};

// Return a block's 512 values as fp32: in place where possible, else in `room`, padded with zeros.
template <int W> INLINE const char* read_block(const EncodeJob& job, int64_t block, float* room) {
  const int64_t size = job.dtype == kFloat32 ? 4 : 2;
  const char* from = job.values + block * kBlock * size;
  const int64_t count = std::min<int64_t>(kBlock, job.numel - block * kBlock);
  if (job.dtype == kFloat32) {
    if (count == kBlock) return from;
    std::memset(room, 0, kBlock * sizeof(float));
    std::memcpy(room, from, count * sizeof(float));
    return (const char*)room;
  }
  uint16_t padded[kBlock];
  if (count < kBlock) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, count * sizeof(uint16_t));
    from = (const char*)padded;
  }
  using H = typename Vec<W>::H;
  for (int i = 0; i < kBlock; i += W) store(room + i, widen<W>(load<H>(from + 2 * i), job.dtype));
  return (const char*)room;
}

template <int W> INLINE uint32_t largest_magnitude(const char* values) {
  using I = typename Vec<W>::I;
  I largest{};
  _Pragma("GCC unroll 8") for (int i = 0; i < kBlock / W; ++i) {
    const I magnitude = load<I>(values + 4 * W * i) & (int32_t)kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest_lane<W>(largest);
}

// The L2 norm from 11 bits of each value, so that the sum is an integer and has no order to agree on.
template <int W> INLINE float integer_norm(const char* values, uint32_t largest) {
  using F = typename Vec<W>::F;
  using I = typename Vec<W>::I;
  const uint32_t exponent = largest >> 23;
  const float factor = bits_as<float>((264 - exponent) << 23);
  I sum{};
  _Pragma("GCC unroll 8") for (int i = 0; i < kBlock / W; ++i) {
    const I t = __builtin_convertvector(load<F>(values + 4 * W * i) * factor, I);
    sum += t * t;
  }
  int32_t total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  return std::sqrt((float)total) * bits_as<float>((exponent - 10) << 23);
}

template <class U> INLINE U hash(U x, uint32_t k1) {
  x = (x ^ (x >> 17)) * 0xed5ad4bbu;
  x = (x ^ (x >> 11) ^ k1) * 0xac4c1b51u;
  x = (x ^ (x >> 15)) * 0x31848babu;
  return x ^ (x >> 14);
}

template <int W> struct Encoder {
  using F = typename Vec<W>::F;
  using I = typename Vec<W>::I;
  using U = typename Vec<W>::U;

  const EncodeJob& job;
  Sum<W> variance{}, squared_norm{};
  float levels, full;

  INLINE explicit Encoder(const EncodeJob& j) : job(j) {
    levels = job.bits == 1 ? 1.0f : (float)((1 << (job.bits - 1)) - 1);
    full = job.bits == 1 ? 32768.0f : levels * 65536.0f;
  }

  // Round one value to fixed point, add its dither, note what rounding costs; at one bit codes are -1 and 0.
  template <int FIELD> INLINE U round(const char* value, float inverse, U random, F& cost, F& square) const {
    const F scaled = load<F>(value) * inverse;
    square = multiply_add(scaled, scaled, square);
    I fixed = __builtin_convertvector(scaled, I);
    if constexpr (FIELD == 1) fixed -= 1 << 15;
    const F fraction = __builtin_convertvector(fixed & 0xffff, F);
    cost = multiply_add(fraction, 65536.0f - fraction, cost);
    return (U)fixed + random;
  }

  template <int FIELD> INLINE void pack(const char* values, float scale, int64_t block) {
    constexpr int kFields = 32 / FIELD;
    float inverse = full / scale;
    if (scale * inverse > full) inverse = bits_as<float>(bits_as<uint32_t>(inverse) - 1);
    const double step = FIELD == 1 ? 2.0 * scale : (double)scale / levels;
    const double step_cost = step * step * 0x1p-32, unit = 1.0 / ((double)inverse * inverse);
    const uint32_t counter = (uint32_t)(job.first_block + block) * (kBlock / 2) + job.k0;
    char* planes = job.planes + block * job.bits * kColumns * 4;

    for (int column = 0; column < kColumns; column += W) {
      const U lane = load<U>(kLane + column) + counter;
      F cost{}, square{};
      U words[FIELD] = {};
      for (int k = 0; k < FIELD; ++k) {  // not unrolled: GCC would part hashing from rounding, and use ports unevenly
        UNROLL for (int f = 0; f < kFields / 2; ++f) {
          const int row = FIELD * f + k;
          const U random = hash(lane + (uint32_t)(row * kColumns), job.k1);
          const char* low = values + 4 * (row * kColumns + column);
          const char* high = low + 4 * kBlock / 2;
          words[k] |= place<FIELD>(round<FIELD>(low, inverse, random & 0xffff, cost, square), f);
          words[k] |= place<FIELD>(round<FIELD>(high, inverse, random >> 16, cost, square), f + kFields / 2);
        }
      }
      transpose<FIELD>(words);
      UNROLL for (int j = 0; j < FIELD; ++j)
        if (j < job.bits) store(planes + 4 * (j * kColumns + column), words[j]);
      variance.add(cost, step_cost);
      squared_norm.add(square, unit);
    }
  }

  template <int FIELD> INLINE Statistics run(int64_t begin, int64_t end) {
    alignas(64) float room[kBlock];
    Statistics extra;
    for (int64_t block = begin; block < end; ++block) {
      const char* values = read_block<W>(job, block, room);
      const uint32_t largest = largest_magnitude<W>(values);
      const bool zero = largest < kLive;
      float scale = zero ? 0.0f : bits_as<float>(largest);
      if (job.l2 && !zero && largest < kInfinity) scale = std::max(scale, integer_norm<W>(values, largest));
      const bool broken = bits_as<uint32_t>(scale) >= kInfinity;
      if (broken) {
        scale = std::numeric_limits<float>::quiet_NaN();
        extra = {scale, scale};
      }
      std::memcpy(job.scales + 4 * block, &scale, 4);
      if (zero || broken) {
        std::memset(job.planes + block * job.bits * kColumns * 4, 0, job.bits * kColumns * 4);
        continue;
      }
      pack<FIELD>(values, scale, block);
      const int64_t padding = std::max<int64_t>(0, (block + 1) * kBlock - job.numel);
      if (FIELD == 1) extra.variance -= (double)padding * scale * scale;  // coins tossed that nobody decodes
    }
    return {variance.total() + extra.variance, squared_norm.total() + extra.squared_norm};
  }
};

template <int W> INLINE Statistics encode_blocks(const EncodeJob& job, int64_t begin, int64_t end) {
  Encoder<W> encoder(job);
  if (job.bits == 1) return encoder.template run<1>(begin, end);
  if (job.bits <= 4) return encoder.template run<4>(begin, end);
  if (job.bits <= 8) return encoder.template run<8>(begin, end);
  return encoder.template run<16>(begin, end);
}

}  // namespace qgc
