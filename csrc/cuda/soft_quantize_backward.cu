// soft_quantize_backward: a block walks over its span with the sums for the centers in columns of shared memory. Where
// a row has one span its block finishes the row's gradient, else a second kernel does. Bound by memory for up to four
// centers, by issue beyond.
#include "elements.h"
#include "kernels.h"
#include "soft_gradient.h"
#include "span_sums.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "soft_quantize_backward";
constexpr int kElements = 8;
constexpr size_t kMostTable = 16 * 1024;

template <class T, bool kOfThreads>
__global__ __launch_bounds__(kThreads) void soft_backward_spans(
    const Cut cut, const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ centers, int levels,
    PerRow sharpness, T* __restrict__ grad_x, float* __restrict__ partials, float* __restrict__ grad_centers) {
  QK_DYNAMIC_SHARED(BackwardGroup, tables);
  const Place at(cut, blockIdx.x);
  const int groups = groups_of(levels), columns = soft_columns(groups), rows = cut.rows_a_block();
  BackwardGroup* const table = tables + at.local * groups;
  float* const memory = reinterpret_cast<float*>(tables + rows * groups);
  float* const totals = memory + columns * Columns<kOfThreads>::kPlaces;
  const bool exists = at.row < cut.rows;
  const float P = exists ? sharpness.of(at.row) : 1.0f;
  const SoftRate rate(P);
  const float* const c = centers + (exists ? at.row * levels : 0);
  for (int g = at.thread; g < groups; g += cut.row_threads()) {
    table[g] = BackwardGroup(c, levels, g, P, rate.stretch);
  }
  Columns<kOfThreads> sums(memory);
  sums.clear(columns);
  __syncthreads();
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
    soft_gradient(table, groups, rate, value, g, slope, sums);
    tile.store(grad_x + offset, slope);
  }
  __syncthreads();
  sums.total(cut, columns, totals);
  __syncthreads();
  if (cut.spans > 1) {
    float* const mine = partials + static_cast<int64_t>(blockIdx.x) * columns;
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) {
      mine[i] = totals[i];
    }
  } else if (exists) {
    for (int k = at.thread; k < levels; k += cut.row_threads()) {
      const auto sum_of = [&](int column) { return totals[column * rows + at.local]; };
      grad_centers[at.row * levels + k] = center_gradient(c, levels, P, k, sum_of);
    }
  }
}

__global__ __launch_bounds__(kSumThreads) void soft_backward_centers(const float* __restrict__ partials, int spans,
                                                                     const float* __restrict__ centers, int levels,
                                                                     PerRow sharpness,
                                                                     float* __restrict__ grad_centers) {
  QK_DYNAMIC_SHARED(double, sums);
  const int columns = soft_columns(groups_of(levels));
  const int64_t row = blockIdx.x;
  sum_spans(partials + row * spans * columns, spans, columns, columns, sums);
  const auto sum_of = [&](int column) { return sums[column]; };
  for (int k = static_cast<int>(threadIdx.x); k < levels; k += kSumThreads) {
    grad_centers[row * levels + k] = center_gradient(centers + row * levels, levels, sharpness.of(row), k, sum_of);
  }
}

struct Plan {
  Rows rows;
  int groups, columns;
  bool of_threads;
  Cut cut;
  size_t shared;

  Plan(View x, View centers) : rows(rows_of(kOp, x, centers)) {
    groups = groups_of(rows.levels);
    columns = soft_columns(groups);
    of_threads = groups <= kGroupsOfThreads;
    const size_t table = sizeof(BackwardGroup) * static_cast<size_t>(groups);
    int least = of_threads ? 3 : 5;
    while ((kThreads >> least) * table > kMostTable) {
      ++least;
    }
    cut = cut_of(rows, kElements, least);
    const auto block_rows = static_cast<size_t>(cut.rows_a_block());
    shared = table * block_rows + sizeof(float) * static_cast<size_t>(columns) * block_rows +
             (of_threads ? Columns<true>::bytes(columns) : Columns<false>::bytes(columns));
  }

  int64_t partials() const { return cut.spans > 1 ? cut.blocks() * columns : 0; }
};

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
  auto* partials = workspace.as<float>();
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = plan.of_threads ? soft_backward_spans<T, true> : soft_backward_spans<T, false>;
    launch(kernel, plan.cut.grid(), kThreads, plan.shared, stream.handle, plan.cut, grad.as<const T>(), x.as<const T>(),
           centers.as<const float>(), rows.levels, steepness, grad_x.as<T>(), partials, grad_centers.as<float>());
  });
  if (plan.cut.spans > 1) {
    launch(soft_backward_centers, dim3(static_cast<unsigned>(rows.count)), kSumThreads,
           sizeof(double) * static_cast<size_t>(plan.columns), stream.handle, partials, plan.cut.spans,
           centers.as<const float>(), rows.levels, steepness, grad_centers.as<float>());
  }
}

}  // namespace qk::cuda
