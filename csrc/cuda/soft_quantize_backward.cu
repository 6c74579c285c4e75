// soft_quantize_backward: a block walks over its span with the sums for the centers in columns of shared memory and
// makes of them its part of the row's gradient; where a row has several spans a second kernel adds those up. A row that
// allows it looks at two midpoints an element (soft_gradient_window.h). Bound by memory for up to four centers, by
// issue beyond, with two midpoints by shared memory as well.
#include "elements.h"
#include "kernels.h"
#include "soft_gradient.h"
#include "soft_gradient_window.h"
#include "span_sums.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "soft_quantize_backward";
constexpr int kElements = 8;
constexpr size_t kMostTable = 16 * 1024;

// Of the searches for an element's cell.
template <bool kOfThreads>
constexpr int kSteps = kOfThreads ? 4 : 6;
static_assert(kGroup * kGroupsOfThreads < 1 << kSteps<true>, "midpoints of the narrow kernel");
static_assert(kMostGradientWindowLevels <= 1 << kSteps<false>, "midpoints of the wide kernel");

// Of shared memory, in words: the table of groups, the columns, the tables of the window with its flag, the totals.
struct Layout {
  int columns, window, totals, words;

  QK_HD Layout(int levels, int rows, bool of_threads, bool windowed) {
    const int groups = groups_of(levels), of_groups = soft_columns(groups);
    const int places = of_groups * (of_threads ? Columns<true>::kPlaces : Columns<false>::kPlaces);
    const int of_window = windowed ? GradientWindowSums::columns(levels) : 0;
    const int steps = of_threads ? kSteps<true> : kSteps<false>;
    columns = rows * groups * static_cast<int>(sizeof(BackwardGroup) / sizeof(float));
    window = columns + (places > of_window * kThreads ? places : of_window * kThreads);
    totals = window + (windowed ? GradientWindow::words(levels, steps) + 1 : 0);
    words = totals + (rows * of_groups > of_window ? rows * of_groups : of_window);
  }
};

// kWindow: a row whose sharpness allows it looks at two midpoints alone; it then has the block for itself.
template <class T, bool kOfThreads, bool kWindow>
__global__ __launch_bounds__(kThreads) void soft_backward_spans(const Cut cut, const T* __restrict__ grad,
                                                                const T* __restrict__ x,
                                                                const float* __restrict__ centers, int levels,
                                                                PerRow sharpness, T* __restrict__ grad_x,
                                                                float* __restrict__ center_parts) {
  QK_DYNAMIC_SHARED(float, shared);
  const Place at(cut, blockIdx.x);
  const int groups = groups_of(levels), columns = soft_columns(groups), rows = cut.rows_a_block();
  const Layout layout(levels, rows, kOfThreads, kWindow);
  BackwardGroup* const table = reinterpret_cast<BackwardGroup*>(shared) + at.local * groups;
  float* const memory = shared + layout.columns;
  float* const totals = shared + layout.totals;
  const bool exists = at.row < cut.rows;
  const float P = exists ? sharpness.of(at.row) : 1.0f;
  const SoftRate rate(P);
  const float* const c = centers + (exists ? at.row * levels : 0);
  for (int g = at.thread; g < groups; g += cut.row_threads()) {
    table[g] = BackwardGroup(c, levels, g, P, rate.stretch);
  }
  const GradientWindow window(reinterpret_cast<char*>(shared + layout.window), levels);
  int* const flag = reinterpret_cast<int*>(totals - 1);
  Columns<kOfThreads> sums(memory);
  if constexpr (kWindow) {
    window.fill(c, levels, kSteps<kOfThreads>, P, rate.stretch, at.thread, kThreads);
    if (at.thread == 0) {
      *flag = gradient_window_suffices(c, levels, P);
    }
    Columns<true>(memory).clear(GradientWindowSums::columns(levels));  // the larger of the two
  } else {
    sums.clear(columns);
  }
  __syncthreads();
  const auto each_tile = [&](auto&& gradient) {
    const int64_t step = int64_t{kElements} << cut.row_shift;
    for (int64_t begin = at.begin; begin < at.end; begin += step) {
      const Tile tile{at.thread, cut.row_threads(), at.end - begin};
      const int64_t offset = at.row * cut.length + begin;
      float value[kElements], g[kElements], slope[kElements];
      tile.load(x + offset, value);
      tile.load(grad + offset, g);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        value[e] *= rate.stretch;
      }
      gradient(value, g, slope);
      tile.store(grad_x + offset, slope);
    }
  };
  // Of a row's spans one behind the other: [row, span, center].
  const auto each_center = [&](auto&& gradient_of) {
    float* const mine = center_parts + (at.row * cut.spans + blockIdx.x % cut.spans) * levels;
    for (int k = at.thread; exists && k < levels; k += cut.row_threads()) {
      mine[k] = gradient_of(k);
    }
  };
  if constexpr (kWindow) {
    if (*flag != 0) {
      const GradientWindowSums near(memory, levels);
      each_tile([&](const float (&value)[kElements], const float (&g)[kElements], float (&slope)[kElements]) {
        soft_gradient_near<kSteps<kOfThreads>>(window, rate, value, g, slope, near);
      });
      __syncthreads();
      GradientWindowSums::total(cut, memory, levels, totals);
      __syncthreads();
      return each_center([&](int k) { return window_center_gradient(window, totals, c, levels, P, k); });
    }
  }
  each_tile([&](const float (&value)[kElements], const float (&g)[kElements], float (&slope)[kElements]) {
    soft_gradient(table, groups, rate, value, g, slope, sums);
  });
  __syncthreads();
  sums.total(cut, columns, totals);
  __syncthreads();
  const auto sum_of = [&](int column) { return totals[column * rows + at.local]; };
  each_center([&](int k) { return center_gradient(c, levels, P, k, sum_of); });
}

__global__ __launch_bounds__(kSumThreads) void soft_backward_centers(const float* __restrict__ center_parts, int spans,
                                                                     int levels, float* __restrict__ grad_centers) {
  QK_DYNAMIC_SHARED(double, sums);
  const int64_t row = blockIdx.x;
  sum_spans(center_parts + row * spans * levels, spans, levels, levels, sums);
  for (int k = static_cast<int>(threadIdx.x); k < levels; k += kSumThreads) {
    grad_centers[row * levels + k] = static_cast<float>(sums[k]);
  }
}

struct Plan {
  Rows rows;
  bool of_threads, windowed;
  Cut cut;
  size_t shared;

  Plan(View x, View centers) : rows(rows_of(kOp, x, centers)) {
    const int groups = groups_of(rows.levels);
    of_threads = groups <= kGroupsOfThreads;
    int least = of_threads ? 3 : 5;
    while ((kThreads >> least) * sizeof(BackwardGroup) * static_cast<size_t>(groups) > kMostTable) {
      ++least;
    }
    cut = cut_of(rows, kElements, least);
    windowed = rows.levels >= kLeastWindowLevels && rows.levels <= kMostGradientWindowLevels &&
               cut.rows_a_block() == 1 && cut.span >= kLeastWindowTiles * kElements * kThreads;
    shared = sizeof(float) * static_cast<size_t>(Layout(rows.levels, cut.rows_a_block(), of_threads, windowed).words);
  }

  int64_t partials() const { return cut.spans > 1 ? rows.count * cut.spans * rows.levels : 0; }
};

template <class T>
auto kernel_of(const Plan& plan) {
  return plan.windowed     ? plan.of_threads ? soft_backward_spans<T, true, true> : soft_backward_spans<T, false, true>
         : plan.of_threads ? soft_backward_spans<T, true, false>
                           : soft_backward_spans<T, false, false>;
}

}  // namespace

int64_t soft_quantize_backward_workspace(View, View x, View centers, View) {
  return Plan(x, centers).partials() * static_cast<int64_t>(sizeof(float));
}

void soft_quantize_backward(Stream stream, View grad, View x, View centers, View sharpness, View grad_x,
                            View grad_centers, View workspace) {
  const Plan plan(x, centers);
  const Rows& rows = plan.rows;
  const PerRow steepness = per_row(kOp, "sharpness", sharpness, rows);
  check_like(kOp, "grad", grad, x);
  check_like(kOp, "grad_x", grad_x, x);
  check_like(kOp, "grad_centers", grad_centers, centers);
  check_workspace(kOp, workspace, plan.partials() * static_cast<int64_t>(sizeof(float)));
  if (x.numel() == 0) {
    return fill_zero(grad_centers.data, static_cast<size_t>(centers.numel()) * sizeof(float), stream.handle);
  }
  float* const parts = plan.cut.spans > 1 ? workspace.as<float>() : grad_centers.as<float>();
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = kernel_of<T>(plan);
    if (plan.shared > kStaticSharedLimit) {
      raise_shared_limit(kernel, plan.shared);
    }
    launch(kernel, plan.cut.grid(), kThreads, plan.shared, stream.handle, plan.cut, grad.as<const T>(), x.as<const T>(),
           centers.as<const float>(), rows.levels, steepness, grad_x.as<T>(), parts);
  });
  if (plan.cut.spans > 1) {
    launch(soft_backward_centers, dim3(static_cast<unsigned>(rows.count)), kSumThreads,
           sizeof(double) * static_cast<size_t>(rows.levels), stream.handle, parts, plan.cut.spans, rows.levels,
           grad_centers.as<float>());
  }
}

}  // namespace qk::cuda
