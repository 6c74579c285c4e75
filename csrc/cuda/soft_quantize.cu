// soft_quantize: one exponential and one reciprocal for three midpoints (soft_group.h), or, where the row allows it,
// two and one for all (soft_window.h). A block makes its row's tables, then reads and writes its span. Bound by memory
// for up to four centers, by special functions and issue beyond.
#include "cut.h"
#include "elements.h"
#include "kernels.h"
#include "soft_window.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "soft_quantize";
constexpr int kElements = 8;  // of a tile, a thread: 32 bytes of float32
constexpr size_t kMostTable = 24 * 1024;

enum class Method { kOneGroup, kGroups, kGroupsOrWindow };

QK_HD size_t table_bytes(Method method, int levels) {
  return sizeof(ForwardGroup) * static_cast<size_t>(groups_of(levels)) +
         (method == Method::kGroupsOrWindow ? (WindowTable::bytes(levels) + 15) / 16 * 16 + 16 : 0);
}

// kOneGroup: held in registers. kGroupsOrWindow: a row whose sharpness allows it looks at two midpoints alone.
template <class T, Method kMethod>
__global__ __launch_bounds__(kThreads) void soft_quantize_spans(const Cut cut, const T* __restrict__ x,
                                                                const float* __restrict__ centers, int levels,
                                                                PerRow sharpness, T* __restrict__ out) {
  QK_DYNAMIC_SHARED(char, tables);
  const Place at(cut, blockIdx.x);
  const int groups = kMethod == Method::kOneGroup ? 1 : groups_of(levels);
  char* const mine = tables + static_cast<size_t>(at.local) * table_bytes(kMethod, levels);
  ForwardGroup* const table = reinterpret_cast<ForwardGroup*>(mine);
  const bool exists = at.row < cut.rows;
  const float P = exists ? sharpness.of(at.row) : 1.0f;
  const SoftRate rate(P);
  const float* const c = centers + (exists ? at.row * levels : 0);
  for (int g = at.thread; g < groups; g += cut.row_threads()) {
    table[g] = ForwardGroup(c, levels, g, P, rate.stretch);
  }
  int* const flag = reinterpret_cast<int*>(table + groups);
  const WindowTable window(reinterpret_cast<char*>(flag) + 16, levels);
  if constexpr (kMethod == Method::kGroupsOrWindow) {
    window.fill(c, levels, rate.stretch, at.thread, cut.row_threads());
    if (at.thread == 0) {
      *flag = window_suffices(c, levels, P);
    }
  }
  __syncthreads();
  const float lowest = c[0], highest = c[levels - 1];
  const auto each_tile = [&](auto&& sums_of) {
    const int64_t step = int64_t{kElements} << cut.row_shift;
    for (int64_t begin = at.begin; begin < at.end; begin += step) {
      const Tile tile{at.thread, cut.row_threads(), at.end - begin};
      const int64_t offset = at.row * cut.length + begin;
      float value[kElements], sum[kElements];
      tile.load(x + offset, value);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        value[e] *= rate.stretch;
      }
      sums_of(value, sum);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum[e] = min_or_nan(max_or_nan(sum[e], lowest), highest);  // in floats the sum can pass the ends
      }
      tile.store(out + offset, sum);
    }
  };
  if constexpr (kMethod == Method::kGroupsOrWindow) {
    if (*flag != 0) {
      return each_tile([&](const float (&value)[kElements], float (&sum)[kElements]) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          sum[e] = window.sum(rate, value[e]);
        }
      });
    }
  }
  const ForwardGroup first = table[0];
  each_tile([&](const float (&value)[kElements], float (&sum)[kElements]) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      sum[e] = lowest + group_sum(first, rate, value[e]);
    }
    for (int g = 1; g < groups; ++g) {
      const ForwardGroup group = table[g];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum[e] += group_sum(group, rate, value[e]);
      }
    }
  });
}

template <class T>
auto kernel_of(Method method) {
  return method == Method::kOneGroup ? soft_quantize_spans<T, Method::kOneGroup>
         : method == Method::kGroups ? soft_quantize_spans<T, Method::kGroups>
                                     : soft_quantize_spans<T, Method::kGroupsOrWindow>;
}

}  // namespace

void soft_quantize(Stream stream, View x, View centers, View sharpness, View out) {
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_like(kOp, "out", out, x);
  if (x.numel() == 0) {
    return;
  }
  int least = 2;
  while ((kThreads >> least) * table_bytes(Method::kGroups, rows.levels) > kMostTable) {
    ++least;
  }
  const Cut cut = cut_of(rows, kElements, least);
  const bool many = cut.rows_a_block() == 1 && cut.span >= kLeastWindowTiles * kElements * kThreads;
  const Method method = groups_of(rows.levels) == 1                 ? Method::kOneGroup
                        : many && rows.levels >= kLeastWindowLevels ? Method::kGroupsOrWindow
                                                                    : Method::kGroups;
  const size_t shared = table_bytes(method, rows.levels) * static_cast<size_t>(cut.rows_a_block());
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(kernel_of<T>(method), cut.grid(), kThreads, shared, stream.handle, cut, x.as<const T>(),
           centers.as<const float>(), rows.levels, steepness, out.as<T>());
  });
}

}  // namespace qk::cuda
