// soft_quantize: one exponential and one reciprocal for three midpoints (soft_group.h). A block makes its row's groups,
// then reads and writes its span. Bound by memory for up to four centers, by special functions beyond.
#include "cut.h"
#include "elements.h"
#include "kernels.h"
#include "soft_group.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "soft_quantize";
constexpr int kElements = 8;  // of a tile, a thread: 32 bytes of float32
constexpr size_t kMostTable = 24 * 1024;

// kOne: a single group, held in registers.
template <class T, bool kOne>
__global__ __launch_bounds__(kThreads) void soft_quantize_spans(const Cut cut, const T* __restrict__ x,
                                                                const float* __restrict__ centers, int levels,
                                                                PerRow sharpness, T* __restrict__ out) {
  QK_DYNAMIC_SHARED(ForwardGroup, tables);
  const Place at(cut, blockIdx.x);
  const int groups = kOne ? 1 : groups_of(levels);
  ForwardGroup* const table = tables + at.local * groups;
  const bool exists = at.row < cut.rows;
  const float P = exists ? sharpness.of(at.row) : 1.0f;
  const SoftRate rate(P);
  const float* const c = centers + (exists ? at.row * levels : 0);
  for (int g = at.thread; g < groups; g += cut.row_threads()) {
    table[g] = ForwardGroup(c, levels, g, P, rate.stretch);
  }
  __syncthreads();
  const ForwardGroup first = table[0];
  const float lowest = c[0], highest = c[levels - 1];
  const int64_t step = int64_t{kElements} << cut.row_shift;
  for (int64_t begin = at.begin; begin < at.end; begin += step) {
    const Tile tile{at.thread, cut.row_threads(), at.end - begin};
    const int64_t offset = at.row * cut.length + begin;
    float value[kElements], sum[kElements];
    tile.load(x + offset, value);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      value[e] *= rate.stretch;
      sum[e] = lowest + group_sum(first, rate, value[e]);
    }
    for (int g = 1; g < groups; ++g) {
      const ForwardGroup group = table[g];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum[e] += group_sum(group, rate, value[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      sum[e] = min_or_nan(max_or_nan(sum[e], lowest), highest);  // in floats the sum can pass the ends
    }
    tile.store(out + offset, sum);
  }
}

}  // namespace

void soft_quantize(Stream stream, View x, View centers, View sharpness, View out) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_like(kOp, "out", out, x);
  if (x.numel() == 0) {
    return;
  }
  const size_t table = sizeof(ForwardGroup) * static_cast<size_t>(groups_of(rows.levels));
  int least = 2;
  while ((kThreads >> least) * table > kMostTable) {
    ++least;
  }
  const Cut cut = cut_of(rows, kElements, least);
  const size_t shared = table * static_cast<size_t>(cut.rows_a_block());
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = groups_of(rows.levels) == 1 ? soft_quantize_spans<T, true> : soft_quantize_spans<T, false>;
    launch(kernel, cut.grid(), kThreads, shared, stream.handle, cut, x.as<const T>(), centers.as<const float>(),
           rows.levels, steepness, out.as<T>());
  });
}

}  // namespace qk::cuda
