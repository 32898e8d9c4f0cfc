// Decoding: a weighted sum of payloads, added to fp32. Rows are taken in their order, a few at a time: then the hardware
// prefetches by itself, and better than by hand.
#pragma once

#include "lanes.h"

namespace qgc {

constexpr int kRun = 8;  // payloads whose words are kept at hand while sums stay in registers

struct DecodeJob {
  int payloads;
  const char* const* payload;
  const int* bits;
  const float* coefficients;
  int64_t numel;
  char* out;
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
  float step[kRun];
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

// out[i] += code[i] * step for each payload in order. The last plane is the sign: reading it again extends it. Sums stay
// in registers for all payloads of the run. Fresh ones begin at zero.
template <int W, int FIELD> INLINE void add_run(const Run& run, bool fresh, char* out) {
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
      F sum[kHeld];
      UNROLL for (int i = 0; i < kHeld; ++i) sum[i] = fresh ? F{} : load<F>(at + i * kStride);
      for (int p = 0; p < run.count; ++p) {
        const Products<W, FIELD> product(run.step[p]);
        UNROLL for (int i = 0; i < kHeld; ++i)
          sum[i] += product(words[p][(first + i) % FIELD], (first + i) / FIELD);
      }
      UNROLL for (int i = 0; i < kHeld; ++i) store(at + i * kStride, sum[i]);
    }
  }
}

// The pass-through codec: plain fp32.
INLINE void add_plain(const char* values, int64_t bytes, float step, char* out) {
  for (int64_t i = 0; i < bytes; i += 4) store(out + i, load<float>(out + i) + load<float>(values + i) * step);
}

template <int W> struct Decoder {
  const DecodeJob& job;
  const int64_t blocks = (job.numel + kBlock - 1) / kBlock;

  // Add the payload's scale and planes of this block to the run.
  INLINE void join(Run& run, int p, int64_t block) const {
    const int bits = job.bits[p];
    const int64_t bytes = (int64_t)bits * kColumns * 4;
    const float levels = bits == 1 ? 1.0f : (float)((1 << (bits - 1)) - 1);
    run.planes[run.count] = job.payload[p] + 4 * blocks + block * bytes;
    run.bits[run.count] = bits;
    run.step[run.count] = job.coefficients[p] * (load<float>(job.payload[p] + 4 * block) / levels);
    ++run.count;
  }

  INLINE void add_payloads(int64_t block, int64_t bytes, char* out) const {
    bool fresh = !job.accumulate;
    for (int p = 0; p < job.payloads; fresh = false) {
      if (job.bits[p] == kPassThrough) {
        if (fresh) std::memset(out, 0, 4 * kBlock);
        add_plain(job.payload[p] + 4 * block * kBlock, bytes, job.coefficients[p], out);
        ++p;
        continue;
      }
      const int width = field_bits(job.bits[p]);
      Run run;
      for (; p < job.payloads && run.count < kRun && field_bits(job.bits[p]) == width; ++p) join(run, p, block);
      if (width == 1) add_run<W, 1>(run, fresh, out);
      if (width == 4) add_run<W, 4>(run, fresh, out);
      if (width == 8) add_run<W, 8>(run, fresh, out);
      if (width == 16) add_run<W, 16>(run, fresh, out);
    }
    if (fresh) std::memset(out, 0, 4 * kBlock);
  }

  INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) char room[4 * kBlock];  // the last block, if it is not whole
    for (int64_t block = begin; block < end; ++block) {
      char* at = job.out + 4 * block * kBlock;
      const int64_t bytes = 4 * std::min<int64_t>(kBlock, job.numel - block * kBlock);
      const bool partial = bytes < 4 * kBlock;
      if (partial && job.accumulate) std::memcpy(room, at, bytes);
      add_payloads(block, bytes, partial ? room : at);
      if (partial) std::memcpy(at, room, bytes);
    }
  }
};

template <int W> INLINE void decode_blocks(const DecodeJob& job, int64_t begin, int64_t end) {
  Decoder<W>{job}.run(begin, end);
}

}  // namespace qgc
