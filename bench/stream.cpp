// The limit: this machine's memory streams, without arithmetic worth naming. Built by bench/streams.py for this machine.
//
// stream() reads R arrays and writes W arrays of the same size once, in step: target_k[i] = source_1[i] + ... +
// source_R[i] in integers, so that no read can be left out and no value is slow. A target may be a source (in place),
// as a weight update has it. Each thread has one contiguous share. Bound by memory, or by the cache the arrays fit in.
//
// Each call starts its threads anew: some 20 us, under 1 % of the times two threads are used for.
//
// nontemporal writes around the caches: no line is read before it is written. It wins where the arrays exceed the last
// cache and loses where they fit; which is the limit, the caller finds out by timing both.
//
// read_only() reads one array and returns the sum of its 32-bit integers: what a kernel that only consumes weights is
// held against. Each thread reads its share as one stream or as two in step, prefetched past the caches' own guesses.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
// unsigned: sums may wrap
typedef uint32_t Vector __attribute__((vector_size(kBytes), aligned(kBytes), may_alias));

constexpr int kUnroll = 4;  // vectors of one stream in a row: whole lines, and enough loads in flight
constexpr int64_t kStep = int64_t{kBytes} * kUnroll;
constexpr int64_t kAhead = 2048;  // bytes; half a page

inline void store_around_caches(void* to, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#else
  *static_cast<Vector*>(to) = value;
#endif
}

// Bytes [first, last), both multiples of kStep, of every stream.
template <int R, int W, bool Nontemporal>
void share(const char* const* sources, char* const* targets, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; at += kStep) {
    Vector sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] = *reinterpret_cast<const Vector*>(sources[0] + at + u * kBytes);
    }
    for (int r = 1; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) {
        sum[u] += *reinterpret_cast<const Vector*>(sources[r] + at + u * kBytes);
      }
    }
    for (int w = 0; w < W; ++w) {
      for (int u = 0; u < kUnroll; ++u) {
        if constexpr (Nontemporal) {
          store_around_caches(targets[w] + at + u * kBytes, sum[u]);
        } else {
          *reinterpret_cast<Vector*>(targets[w] + at + u * kBytes) = sum[u];
        }
      }
    }
  }
#if defined(__SSE2__)
  if constexpr (Nontemporal) {
    _mm_sfence();
  }
#endif
}

// The sum of the integers in bytes [first, last), multiples of kStep, read as Streams parts in step; wraps around.
template <int Streams, bool Prefetched>
void sum_share(const char* source, int64_t first, int64_t last, int32_t* sum) {
  const int64_t each = (last - first) / Streams / kStep * kStep;
  Vector sums[Streams][kUnroll] = {};
  const auto add = [&](Vector(&to)[kUnroll], const char* from) {
    for (int u = 0; u < kUnroll; ++u) {
      to[u] += *reinterpret_cast<const Vector*>(from + u * kBytes);
    }
  };
  for (int64_t at = first; at < first + each; at += kStep) {
    for (int s = 0; s < Streams; ++s) {
      const char* from = source + at + s * each;
      if constexpr (Prefetched) {
        for (int line = 0; line < kStep; line += 64) {
          __builtin_prefetch(from + kAhead + line, 0, 0);  // past the end it is ignored
        }
      }
      add(sums[s], from);
    }
  }
  for (int64_t at = first + Streams * each; at < last; at += kStep) {  // what does not divide by the streams
    add(sums[0], source + at);
  }
  Vector total = {};
  for (int s = 0; s < Streams; ++s) {
    for (int u = 0; u < kUnroll; ++u) {
      total += sums[s][u];
    }
  }
  uint32_t wrapped = 0;  // unsigned: a sum of weights' bits may pass 2^31
  for (int lane = 0; lane < kBytes / 4; ++lane) {
    wrapped += static_cast<uint32_t>(total[lane]);
  }
  *sum = static_cast<int32_t>(wrapped);
}

using Share = void (*)(const char* const*, char* const*, int64_t, int64_t);

template <bool Nontemporal>
Share share_for(int sources, int targets) {
  static constexpr Share table[4][4] = {
      {share<1, 1, Nontemporal>, share<1, 2, Nontemporal>, share<1, 3, Nontemporal>, share<1, 4, Nontemporal>},
      {share<2, 1, Nontemporal>, share<2, 2, Nontemporal>, share<2, 3, Nontemporal>, share<2, 4, Nontemporal>},
      {share<3, 1, Nontemporal>, share<3, 2, Nontemporal>, share<3, 3, Nontemporal>, share<3, 4, Nontemporal>},
      {share<4, 1, Nontemporal>, share<4, 2, Nontemporal>, share<4, 3, Nontemporal>, share<4, 4, Nontemporal>}};
  return table[sources - 1][targets - 1];
}

}  // namespace

// Every array: `bytes` long, aligned to 64, bytes a multiple of 256. Returns 0, or 1 where that does not hold.
extern "C" int stream(int threads, int sources, const char* const* source, int targets, char* const* target,
                      int64_t bytes, int nontemporal) {
  bool fits = sources >= 1 && sources <= 4 && targets >= 1 && targets <= 4 && threads >= 1 && bytes % kStep == 0;
  for (int r = 0; fits && r < sources; ++r) {
    fits = reinterpret_cast<uintptr_t>(source[r]) % 64 == 0;
  }
  for (int w = 0; fits && w < targets; ++w) {
    fits = reinterpret_cast<uintptr_t>(target[w]) % 64 == 0;
  }
  if (!fits) {
    return 1;
  }
  const Share run = nontemporal ? share_for<true>(sources, targets) : share_for<false>(sources, targets);
  const int64_t each = (bytes / kStep + threads - 1) / threads * kStep;
  std::vector<std::thread> others;
  for (int64_t first = each; first < bytes; first += each) {
    others.emplace_back(run, source, target, first, std::min(first + each, bytes));
  }
  run(source, target, 0, std::min(each, bytes));
  for (std::thread& other : others) {
    other.join();
  }
  return 0;
}

// source: `bytes` long, aligned to 64, bytes a multiple of 256; two_streams: as sum_share. Stores the sum of its 32-bit
// integers. Returns 0, or 1 where that does not hold.
extern "C" int read_only(int threads, const char* source, int64_t bytes, int two_streams, int32_t* sum) {
  if (threads < 1 || bytes % kStep != 0 || reinterpret_cast<uintptr_t>(source) % 64 != 0) {
    return 1;
  }
  const auto run = two_streams ? sum_share<2, true> : sum_share<1, false>;
  const int64_t each = (bytes / kStep + threads - 1) / threads * kStep;
  std::vector<int32_t> sums(threads);
  std::vector<std::thread> others;
  for (int64_t first = each; first < bytes; first += each) {
    others.emplace_back(run, source, first, std::min(first + each, bytes), &sums[first / each]);
  }
  run(source, 0, std::min(each, bytes), &sums[0]);
  for (std::thread& other : others) {
    other.join();
  }
  uint32_t total = 0;
  for (const int32_t one : sums) {
    total += static_cast<uint32_t>(one);
  }
  *sum = static_cast<int32_t>(total);
  return 0;
}
