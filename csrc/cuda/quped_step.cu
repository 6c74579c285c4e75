// quped_step: gradients, optimizer, prox, codes and statistics of many tensors, one launch for each run of kStepTensors
// of them and a second one that adds up. Bound by memory for up to four centers, by the search and the counts beyond.
#include "../cpu/overlap.h"
#include "../math/pack_codes.h"
#include "kernels.h"
#include "quped_spans.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "quped_step";
constexpr int kMostBits = 8;
constexpr size_t kMostTable = 16 * 1024;
constexpr int kPackThreads = 256;

template <bool kSoft, bool kAdaptive, bool kNarrow>
__global__ __launch_bounds__(kThreads) void quped_spans(const __grid_constant__ StepTable table) {
  QK_DYNAMIC_SHARED(float, shared);
  int at = table.count - 1;
  while (table.tensor[at].first_block > static_cast<int>(blockIdx.x)) {
    --at;
  }
  step_span<kSoft, kAdaptive, kNarrow>(table, table.tensor[at], shared);
}

// Blocks below table.rows take a row each, the others a tensor each.
__global__ __launch_bounds__(kSumThreads) void quped_totals(const __grid_constant__ StepTable table) {
  QK_DYNAMIC_SHARED(double, sums);
  const int block = static_cast<int>(blockIdx.x);
  if (block < table.rows) {
    int at = table.count - 1;
    while (table.tensor[at].cut.spans == 1 || table.tensor[at].first_row > block) {
      --at;
    }
    finish_row(table, table.tensor[at], block - table.tensor[at].first_row, sums);
  } else {
    const int at = block - table.rows;
    const int next = at + 1 < table.count ? table.tensor[at + 1].first_block : table.blocks;
    finish_distance(table, table.tensor[at], next, sums);
  }
}

// Eight codes a thread, which fill kBits bytes.
template <int kBits>
__global__ __launch_bounds__(kPackThreads) void pack_bytes(const uint8_t* codes, int64_t n, uint8_t* packed) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t left = n - 8 * word;
  if (left > 0) {
    const int count = left < 8 ? static_cast<int>(left) : 8;
    const uint64_t eight = math::load_bytes(codes + 8 * word, count);
    math::store_bytes(math::pack_eight<kBits>(eight), (count * kBits + 7) / 8, packed + kBits * word);
  }
}

template <int kBits = 1>
void pack(Stream stream, const uint8_t* codes, int64_t n, int64_t bits, uint8_t* packed) {
  if constexpr (kBits <= kMostBits) {
    if (bits != kBits) {
      return pack<kBits + 1>(stream, codes, n, bits, packed);
    }
    launch(pack_bytes<kBits>, dim3(static_cast<unsigned>(ceil_div(n, 8 * kPackThreads))), kPackThreads, 0,
           stream.handle, codes, n, packed);
  }
}

Chain chain_of(const std::string& name) {
  constexpr const char* names[] = {"none", "soft", "hard", "straight_through"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) {
      return static_cast<Chain>(i);
    }
  }
  fail(text(kOp, ": chain must be 'none', 'soft', 'hard' or 'straight_through'"), "'" + name + "'");
}

Cut cut_for(const Rows& rows, Chain chain) {
  if (rows.levels > kNarrowLevels) {
    return cut_of(rows, kStepElements, 7, kStepTiles);  // whole blocks
  }
  const size_t row = sizeof(float) * static_cast<size_t>((1 << bits_for(rows.levels)) + 2 * rows.levels) +
                     (chain == Chain::kSoft ? sizeof(BackwardGroup) * static_cast<size_t>(groups_of(rows.levels)) : 0);
  int least = 3;
  while ((kThreads >> least) * row > kMostTable) {
    ++least;
  }
  return cut_of(rows, kStepElements, least, kStepTiles);
}

// Tensors that one launch takes, by their places in the lists; and bytes of the scratch memory.
struct Batch {
  bool narrow;
  std::vector<size_t> members;
};

struct StepPlan {
  std::vector<Cut> cuts;
  std::vector<Batch> batches;
  std::vector<int64_t> partials, plain;  // byte offsets of a tensor's partials and unpacked codes
  int64_t distances = 0, bytes = 0;      // distances: one of each block of the longest batch, at 0

  StepPlan(Views x, Views centers, Chain chain, bool l1, bool packs) {
    std::vector<int64_t> blocks;
    for (size_t i = 0; i < x.size(); ++i) {
      const Rows rows = rows_of(kOp, x[i], centers[i]);
      cuts.push_back(cut_for(rows, chain));
      const bool narrow = rows.levels <= kNarrowLevels;
      size_t at = 0;
      while (at < batches.size() && (batches[at].narrow != narrow || batches[at].members.size() == kStepTensors)) {
        ++at;
      }
      if (at == batches.size()) {
        batches.push_back({narrow, {}});
        blocks.push_back(0);
      }
      batches[at].members.push_back(i);
      blocks[at] += cuts[i].blocks();
      distances = std::max(distances, blocks[at]);
    }
    take(distances * static_cast<int64_t>(sizeof(double)));
    for (size_t i = 0; i < x.size(); ++i) {
      const int words = PartialWords(chain, l1, static_cast<int>(centers[i].sizes.back())).all();
      partials.push_back(take(cuts[i].spans > 1 ? cuts[i].blocks() * words * 4 : 0));
      plain.push_back(take(packs ? x[i].numel() : 0));
    }
  }

 private:
  int64_t take(int64_t size) {
    const int64_t at = ceil_div(bytes, 16) * 16;
    bytes = at + size;
    return at;
  }
};

float* data_of(const char* name, Views tensors, size_t i, View like) {
  if (tensors.empty()) {
    return nullptr;
  }
  check_like(kOp, name, tensors[i], like);
  return tensors[i].as<float>();
}

void check_list(const char* name, Views tensors, size_t count, bool wanted) {
  QK_CHECK(tensors.size() == (wanted ? count : 0), text(kOp, ": ", name, " must hold ", wanted ? count : 0, " tensors"),
           std::to_string(tensors.size()));
}

template <bool kSoft, bool kAdaptive>
void launch_spans(Stream stream, const StepTable& table, bool narrow, size_t shared) {
  const auto kernel = narrow ? quped_spans<kSoft, kAdaptive, true> : quped_spans<kSoft, kAdaptive, false>;
  if (shared > kStaticSharedLimit) {
    raise_shared_limit(kernel, shared);
  }
  launch(kernel, dim3(static_cast<unsigned>(table.blocks)), kThreads, shared, stream.handle, table);
}

void launch_batch(Stream stream, const StepTable& table, bool narrow) {
  size_t shared = 0, totals = kSumWarps * sizeof(double);
  for (int i = 0; i < table.count; ++i) {
    const StepTensor& t = table.tensor[i];
    const StepLayout layout(table.chain, table.l1, t.levels, t.cut.rows_a_block(), narrow);
    shared = std::max(shared, layout.bytes());
    totals =
        std::max(totals, sizeof(double) * static_cast<size_t>(PartialWords(table.chain, table.l1, t.levels).all()));
  }
  if (table.blocks > 0) {
    if (table.chain == Chain::kSoft) {
      table.factors.adaptive ? launch_spans<true, true>(stream, table, narrow, shared)
                             : launch_spans<true, false>(stream, table, narrow, shared);
    } else {
      table.factors.adaptive ? launch_spans<false, true>(stream, table, narrow, shared)
                             : launch_spans<false, false>(stream, table, narrow, shared);
    }
  }
  launch(quped_totals, dim3(static_cast<unsigned>(table.rows + table.count)), kSumThreads, totals, stream.handle,
         table);
}

}  // namespace

int64_t quped_step_workspace(Views x, Views, Views, Views, Views, Views centers, Views, Views, const std::string& chain,
                             const std::string&, const std::string& norm, double, double, double, double, double, bool,
                             int64_t, bool, bool wants_codes, int64_t pack_bits) {
  return StepPlan(x, centers, chain_of(chain), norm == "l1", wants_codes && pack_bits > 0).bytes;
}

void quped_step(Stream stream, Views x, Views grad, Views quantized_grad, Views first, Views second, Views centers,
                Views sharpness, Views strength, const std::string& chain_name, const std::string& optimizer,
                const std::string& norm, double lr, double weight_decay, double beta1, double beta2, double eps,
                bool nesterov, int64_t step_number, bool clamp, bool wants_codes, int64_t pack_bits, Views center_grad,
                Views counts, Views sums, View distance, Views codes, View workspace) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  QK_CHECK(pack_bits >= 0 && pack_bits <= kMostBits, text(kOp, ": pack_bits must be between 0 and ", kMostBits),
           std::to_string(pack_bits));
  const Chain chain = chain_of(chain_name);
  const math::StepFactors factors(kOp, optimizer, lr, weight_decay, beta1, beta2, eps, nesterov, step_number);
  const bool l1 = norm == "l1", packs = wants_codes && pack_bits > 0;
  const bool through = chain == Chain::kSoft || chain == Chain::kStraightThrough;
  const size_t count = x.size();
  check_list("grad", grad, count, !(through && grad.empty()));
  check_list("quantized_grad", quantized_grad, count, chain != Chain::kNone);
  check_list("first", first, count, factors.has_first());
  check_list("second", second, count, factors.has_second());
  check_list("centers", centers, count, true);
  check_list("sharpness", sharpness, count, chain == Chain::kSoft);
  check_list("strength", strength, count, true);
  check_list("center_grad", center_grad, count, chain != Chain::kNone);
  check_list("counts", counts, count, true);
  check_list("sums", sums, count, !l1);
  check_list("codes", codes, count, wants_codes);
  cpu::check_apart(kOp, "x, first and second must share no memory with another tensor of the call",
                   {&x, &first, &second}, {&grad, &quantized_grad});
  const StepPlan plan(x, centers, chain, l1, packs);
  check_workspace(kOp, workspace, plan.bytes);
  auto* const scratch = workspace.as<uint8_t>();
  for (const Batch& batch : plan.batches) {
    StepTable table{factors, reinterpret_cast<double*>(scratch), chain, l1, clamp, 0, 0, 0, {}};
    for (size_t i : batch.members) {
      const Rows rows = rows_of(kOp, x[i], centers[i]);
      const PerRow pull = per_row(kOp, "strength", strength[i], rows);
      const PerRow steep = chain == Chain::kSoft ? per_row(kOp, "sharpness", sharpness[i], rows) : PerRow{nullptr, 0};
      QK_CHECK(counts[i].numel() == 3 * centers[i].numel(), text(kOp, ": counts must hold three a center"),
               "shape " + shape_of(counts[i].sizes));
      if (wants_codes) {
        const int64_t bytes = packs ? ceil_div(x[i].numel() * pack_bits, 8) : x[i].numel();
        QK_CHECK(codes[i].numel() == bytes, text(kOp, ": codes must have ", bytes, " bytes"),
                 std::to_string(codes[i].numel()));
        QK_CHECK(!packs || rows.levels <= 1 << pack_bits, text(kOp, ": pack_bits must hold codes below ", rows.levels),
                 std::to_string(pack_bits));
      }
      const Cut& cut = plan.cuts[i];
      StepTensor& t = table.tensor[table.count++];
      t.x = x[i].as<float>();
      t.grad = data_of("grad", grad, i, x[i]);
      t.through = data_of("quantized_grad", quantized_grad, i, x[i]);
      t.first = data_of("first", first, i, x[i]);
      t.second = data_of("second", second, i, x[i]);
      t.codes = !wants_codes ? nullptr : packs ? scratch + plan.plain[i] : codes[i].as<uint8_t>();
      t.centers = centers[i].as<float>();
      t.sharpness = steep.values;
      t.strength = pull.values;
      t.center_grad = data_of("center_grad", center_grad, i, centers[i]);
      t.counts = counts[i].as<int64_t>();
      t.sums = data_of("sums", sums, i, centers[i]);
      t.distance = distance.as<float>() + i;
      t.partials = reinterpret_cast<float*>(scratch + plan.partials[i]);
      t.cut = cut;
      t.levels = rows.levels;
      t.sharpness_stride = static_cast<int>(steep.stride);
      t.strength_stride = static_cast<int>(pull.stride);
      t.first_block = table.blocks;
      t.first_row = table.rows;
      table.blocks += static_cast<int>(cut.blocks());
      table.rows += cut.spans > 1 ? static_cast<int>(cut.rows) : 0;
    }
    launch_batch(stream, table, batch.narrow);
  }
  for (size_t i = 0; packs && i < count; ++i) {
    if (x[i].numel() > 0) {
      pack(stream, scratch + plan.plain[i], x[i].numel(), pack_bits, codes[i].as<uint8_t>());
    }
  }
}

}  // namespace qk::cuda
