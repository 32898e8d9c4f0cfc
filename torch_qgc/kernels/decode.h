// Decoding: a weighted sum of payloads, added to one or two tracks of fp32. Rows are taken in their order, a few at a
// time: then the hardware prefetches by itself, and better than by hand.
#pragma once

#include "lanes.h"

namespace qgc {

constexpr int kRun = 8;    // payloads whose words are kept at hand while sums stay in registers

struct DecodeJob {
  int payloads;
  const char* const* payload;
  const int* bits;
  const float *coefficients, *second_coefficients;  // the second ones may be null
  int64_t numel;
  char *out, *second_out;
  bool accumulate;
};

// Width of the field that a code takes in a word while planes are transposed.
INLINE int field_bits(int bits) {
  return bits == 1 ? 1 : bits <= 4 ? 4 : bits <= 8 ? 8 : bits <= 16 ? 16 : kPassThrough;
}

// Some payloads of one block, whose codes have fields of one width.
struct Run {
  int count = 0;
  const char* planes[kRun];
  int bits[kRun];
  float step[kRun], second_step[kRun];
};

// What the codes of field f of each word stand for, in units of `step`: float(code) * step. A vector of 16 holds the
// products of all 4-bit codes, so that looking one up replaces extracting it, converting it and multiplying.
template <int W, int FIELD> struct Products {
  using F = typename Vec<W>::F;
  using I = typename Vec<W>::I;
  using U = typename Vec<W>::U;
  static constexpr bool kTable = FIELD == 4 && W == 16;
  F of;

  INLINE explicit Products(float step) {
    if constexpr (kTable) of = F{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1} * step;
    else of = F{} + step;
  }
  INLINE F operator()(U word, int f) const {
    if constexpr (kTable) return __builtin_shuffle(of, (I)(word >> FIELD * f));
    else return __builtin_convertvector(signed_field<FIELD>(word, f), F) * of;
  }
};

// out[i] += code[i] * step for each payload in order, and the second track alike. The last plane is the sign: reading
// it again extends it. Sums stay in registers for all payloads of the run. Fresh ones begin at zero.
template <int W, int FIELD, bool TWO> INLINE void add_run(const Run& run, bool fresh, char* out, char* second_out) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  constexpr int kHeld = 4, kStride = 4 * kColumns;
  for (int column = 0; column < kColumns; column += W) {
    U words[kRun][FIELD];
    for (int p = 0; p < run.count; ++p) {
      U planes[FIELD];
      UNROLL for (int j = 0; j < FIELD; ++j)
        planes[j] = load<U>(run.planes[p] + 4 * (std::min(j, run.bits[p] - 1) * kColumns + column));
      transpose<FIELD>(planes);
      UNROLL for (int j = 0; j < FIELD; ++j) words[p][j] = planes[j];
    }
    UNROLL for (int first = 0; first < kRows; first += kHeld) {
      char* at = out + 4 * column + first * kStride;
      char* second_at = TWO ? second_out + 4 * column + first * kStride : nullptr;
      F sum[kHeld], second_sum[kHeld];
      UNROLL for (int i = 0; i < kHeld; ++i) {
        sum[i] = fresh ? F{} : load<F>(at + i * kStride);
        if constexpr (TWO) second_sum[i] = fresh ? F{} : load<F>(second_at + i * kStride);
      }
      for (int p = 0; p < run.count; ++p) {
        const Products<W, FIELD> first_of(run.step[p]), second_of(TWO ? run.second_step[p] : 0.0f);
        UNROLL for (int i = 0; i < kHeld; ++i) {
          const U word = words[p][(first + i) % FIELD];
          sum[i] += first_of(word, (first + i) / FIELD);
          if constexpr (TWO) second_sum[i] += second_of(word, (first + i) / FIELD);
        }
      }
      UNROLL for (int i = 0; i < kHeld; ++i) {
        store(at + i * kStride, sum[i]);
        if constexpr (TWO) store(second_at + i * kStride, second_sum[i]);
      }
    }
  }
}

// The pass-through codec: plain fp32.
template <bool TWO>
INLINE void add_plain(const char* values, int64_t bytes, float step, float second_step, char* out, char* second_out) {
  for (int64_t i = 0; i < bytes; i += 4) {
    const float value = load<float>(values + i);
    store(out + i, load<float>(out + i) + value * step);
    if constexpr (TWO) store(second_out + i, load<float>(second_out + i) + value * second_step);
  }
}

template <int W, bool TWO> struct Decoder {
  const DecodeJob& job;
  const int64_t blocks = (job.numel + kBlock - 1) / kBlock;

  // Add the payload's scale and planes of this block to the run.
  INLINE void join(Run& run, int p, int64_t block) const {
    const int bits = job.bits[p];
    const int64_t bytes = (int64_t)bits * kColumns * 4;
    const char* planes = job.payload[p] + 4 * blocks + block * bytes;
    const float levels = bits == 1 ? 1.0f : (float)((1 << (bits - 1)) - 1);
    const float unit = load<float>(job.payload[p] + 4 * block) / levels;
    run.planes[run.count] = planes;
    run.bits[run.count] = bits;
    run.step[run.count] = job.coefficients[p] * unit;
    if constexpr (TWO) run.second_step[run.count] = job.second_coefficients[p] * unit;
    ++run.count;
  }

  INLINE static void clear(char* out, char* second) {
    std::memset(out, 0, 4 * kBlock);
    if (TWO) std::memset(second, 0, 4 * kBlock);
  }

  INLINE void add_payloads(int64_t block, int64_t bytes, char* out, char* second) const {
    bool fresh = !job.accumulate;
    for (int p = 0; p < job.payloads; fresh = false) {
      if (job.bits[p] == kPassThrough) {
        if (fresh) clear(out, second);
        const float c = job.coefficients[p], c2 = TWO ? job.second_coefficients[p] : 0.0f;
        add_plain<TWO>(job.payload[p] + 4 * block * kBlock, bytes, c, c2, out, second);
        ++p;
        continue;
      }
      const int width = field_bits(job.bits[p]);
      Run run;
      for (; p < job.payloads && run.count < kRun && field_bits(job.bits[p]) == width; ++p) join(run, p, block);
      if (width == 1) add_run<W, 1, TWO>(run, fresh, out, second);
      if (width == 4) add_run<W, 4, TWO>(run, fresh, out, second);
      if (width == 8) add_run<W, 8, TWO>(run, fresh, out, second);
      if (width == 16) add_run<W, 16, TWO>(run, fresh, out, second);
    }
    if (fresh) clear(out, second);
  }

  INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) char room[2][kBlock * 4];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = 4 * block * kBlock;
      const int64_t bytes = 4 * std::min<int64_t>(kBlock, job.numel - block * kBlock);
      const bool partial = bytes < 4 * kBlock;
      char* out = partial ? room[0] : job.out + at;
      char* second = !TWO ? nullptr : partial ? room[1] : job.second_out + at;
      if (partial && job.accumulate) {
        std::memcpy(out, job.out + at, bytes);
        if (TWO) std::memcpy(second, job.second_out + at, bytes);
      }
      add_payloads(block, bytes, out, second);
      if (partial) {
        std::memcpy(job.out + at, out, bytes);
        if (TWO) std::memcpy(job.second_out + at, second, bytes);
      }
    }
  }
};

template <int W> INLINE void decode_blocks(const DecodeJob& job, int64_t begin, int64_t end) {
  if (job.second_coefficients) return Decoder<W, true>{job}.run(begin, end);
  return Decoder<W, false>{job}.run(begin, end);
}

}  // namespace qgc
