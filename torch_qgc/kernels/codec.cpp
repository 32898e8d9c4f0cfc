// The codec on CPU. Equals reference.py bit for bit; format and reasons are in docs/kernels.md.
//
// No torch: plain C functions on addresses. The library carries one copy of the loops per instruction set and picks at
// run time, so that one binary serves every machine. Build with -ffp-contract=off: a fused multiply-add rounds once
// where the definition rounds twice.

#include <exception>
#include <thread>
#include <vector>

#include "decode.h"
#include "encode.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "payloads are little endian and this machine is not: install without a compiler and use the reference"
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace qgc;

constexpr int64_t kGrain = 256 * 1024 / kBlock;  // blocks per thread that make up for starting one

enum Isa { kBaseline, kV3, kV4 };  // x86-64-v3 has AVX2, x86-64-v4 AVX-512

Statistics encode_baseline(const EncodeJob& job, int64_t begin, int64_t end) {
  return encode_blocks<4>(job, begin, end);
}
void decode_baseline(const DecodeJob& job, int64_t begin, int64_t end) { decode_blocks<4>(job, begin, end); }

#if defined(__x86_64__)
#define TARGET(name) __attribute__((target(name)))
TARGET("arch=x86-64-v3") Statistics encode_v3(const EncodeJob& job, int64_t begin, int64_t end) {
  return encode_blocks<8>(job, begin, end);
}
TARGET("arch=x86-64-v4") Statistics encode_v4(const EncodeJob& job, int64_t begin, int64_t end) {
  return encode_blocks<16>(job, begin, end);
}
TARGET("arch=x86-64-v3") void decode_v3(const DecodeJob& job, int64_t begin, int64_t end) {
  decode_blocks<8>(job, begin, end);
}
TARGET("arch=x86-64-v4") void decode_v4(const DecodeJob& job, int64_t begin, int64_t end) {
  decode_blocks<16>(job, begin, end);
}
constexpr decltype(&encode_baseline) kEncode[] = {encode_baseline, encode_v3, encode_v4};
constexpr decltype(&decode_baseline) kDecode[] = {decode_baseline, decode_v3, decode_v4};

int best_isa() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? kV4 : v3 ? kV3 : kBaseline;
}
#else
constexpr decltype(&encode_baseline) kEncode[] = {encode_baseline};
constexpr decltype(&decode_baseline) kDecode[] = {decode_baseline};
int best_isa() { return kBaseline; }
#endif

// Call work(part, begin, end) for equal parts of the blocks. Threads live for one call: nothing to break across a fork.
template <class Work> void parallel(int64_t blocks, int threads, Work work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, blocks / kGrain));
  const auto run = [=](int64_t part) { work(part, blocks * part / parts, blocks * (part + 1) / parts); };
  std::vector<std::thread> others;
  int64_t started = 1;
  try {
    others.reserve(parts - 1);
    for (; started < parts; ++started) others.emplace_back(run, started);
  } catch (const std::exception&) {  // no more threads to be had: do their parts here
  }
  run(0);
  for (int64_t part = started; part < parts; ++part) run(part);
  for (auto& other : others) other.join();
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ C ABI

API int qgc_abi() { return 2; }
API int qgc_best_isa() { return best_isa(); }

// Arguments have been checked by the caller, kernels/__init__.py; `isa` is at most qgc_best_isa().
API void qgc_encode(const void* values, int dtype, int64_t numel, int bits, int l2, uint32_t k0, uint32_t k1,
                    uint64_t first_block, void* payload, double* statistics, int threads, int isa) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  const EncodeJob job{(const char*)values, (Dtype)dtype, numel, bits, l2 != 0, k0, k1,
                      first_block, (char*)payload, (char*)payload + 4 * blocks};
  std::vector<Statistics> parts(std::max(1, threads));
  parallel(blocks, threads, [&](int64_t part, int64_t begin, int64_t end) {
    parts[part] = kEncode[isa](job, begin, end);
  });
  statistics[0] = statistics[1] = 0;
  for (const Statistics& part : parts) {
    statistics[0] += part.variance;
    statistics[1] += part.squared_norm;
  }
}

API void qgc_decode_sum(int payloads, const void* const* payload, const int* bits, const float* coefficients,
                        int64_t numel, void* out, int accumulate, int threads, int isa) {
  const DecodeJob job{payloads, (const char* const*)payload, bits, coefficients, numel, (char*)out, accumulate != 0};
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  parallel(blocks, threads, [&](int64_t, int64_t begin, int64_t end) { kDecode[isa](job, begin, end); });
}
