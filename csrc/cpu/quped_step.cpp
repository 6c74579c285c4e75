// quped_step: gradients, optimizer, prox, codes and statistics of many tensors in one pass. Every span of every tensor
// is one task; within it a block's gradient is chained in L1, and runs of kPart elements go through the optimizer and
// the prox. Reads weights, gradients and state once and writes weights and state once, which bounds it from 16M
// elements on; in cache the prox does (quped_narrow.h, quped_wide.h).

#include <optional>

#include "../kernels.h"
#include "overlap.h"
#include "quped_item.h"
#include "quped_narrow.h"
#include "quped_optimizer.h"
#include "quped_sums.h"
#include "quped_wide.h"
#include "soft_backward_block.h"
#include "span_list.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "quped_step";
static_assert(kPart <= SpanPacker::kMost, "a run of codes is packed at once");
constexpr int64_t kWork = 24;  // elementary operations an element

enum class Chain { kNone, kSoft, kHard, kStraightThrough };

Chain chain_of(const std::string& name) {
  if (name == "none") {
    return Chain::kNone;
  }
  if (name == "soft") {
    return Chain::kSoft;
  }
  if (name == "hard") {
    return Chain::kHard;
  }
  QK_CHECK(name == "straight_through", text(kOp, ": chain must be 'none', 'soft', 'hard' or 'straight_through'"),
           "'" + name + "'");
  return Chain::kStraightThrough;
}

// What does not change from tensor to tensor.
struct Step {
  Chain chain;
  Optimizer optimizer;
  bool l1;
  bool clamp;
  int pack_bits;  // 0: codes are written as they are
};

// The gradient of x for elements [offset, offset + n) of a block that begins at `begin`; soft: chained in `buffer`.
const float* total_gradient(Chain chain, const Item& item, int64_t begin, int64_t offset, int n, float* buffer) {
  const float* grad = item.grad == nullptr ? nullptr : item.grad + begin + offset;
  if (chain == Chain::kNone || chain == Chain::kHard) {
    return grad;
  }
  const float* through = chain == Chain::kSoft ? buffer + offset : item.through + begin + offset;
  if (grad == nullptr) {
    return through;
  }
  for (int i = 0; i < n; ++i) {
    buffer[offset + i] = grad[i] + through[i];
  }
  return buffer + offset;
}

template <class Row>
void run_span(const Step& step, Item& item, const Span& span, const Cells& cells, Row& row, SpanTotals& totals) {
  Part part;
  alignas(64) float buffer[kBlock];
  CellSums new_sums(cells.levels, totals.sums), old_sums(cells.levels, totals.center_grad);
  std::optional<SoftRow> soft;
  if (step.chain == Chain::kSoft) {
    soft.emplace(item.rows.centers_of(span.row), cells.levels, item.sharpness.of(span.row), Midpoints::kAll);
  }
  std::optional<SpanPacker> packer;
  uint8_t narrow[kPart];
  if (!item.edges.empty()) {
    packer.emplace(kOp, step.pack_bits, span.begin, item.codes, &item.edges[static_cast<size_t>(span.index)]);
  }
  const bool by_cell = step.chain == Chain::kHard || step.chain == Chain::kStraightThrough;
  for_each_block(span, [&](const Span& block) {
    alignas(64) float distance[kVec] = {};
    const int64_t length = block.end - block.begin;
    if (soft) {
      soft_backward_block(*soft, item.through + block.begin, item.x + block.begin, length, buffer, totals.center_grad);
    }
    for (int64_t offset = 0; offset < length; offset += kPart) {
      const int64_t at = block.begin + offset;
      const int n = static_cast<int>(std::min<int64_t>(kPart, length - offset));
      float* x = item.x + at;
      if (by_cell) {
        row.find(x, n, part.cell);
        old_sums.add(item.through + at, part.cell, n);
      }
      const float* g = total_gradient(step.chain, item, block.begin, offset, n, buffer);
      float* first = item.first == nullptr ? nullptr : item.first + at;
      float* second = item.second == nullptr ? nullptr : item.second + at;
      uint8_t* codes = item.codes == nullptr ? nullptr : packer ? narrow : item.codes + at;
      const auto finish = [&](const auto& source) { row.run(source, part, n, x, codes, distance); };
      if (!row.streams() || !step.optimizer.stream(x, g, first, second, finish)) {
        step.optimizer.run(x, g, first, second, n, part.moved);
        std::fill(part.moved + n, part.moved + (n + kVec - 1) / kVec * kVec, 0.0f);  // read, and not used
        const auto next = [&](const float* from) { return (from == nullptr ? item.x : from) + at + kPart; };
        finish(Buffered{part.moved, {next(item.x), next(item.grad), next(item.first), next(item.second)}});
      }
      if (codes != nullptr && cells.repeats) {
        for (int i = 0; i < n; ++i) {
          codes[i] = static_cast<uint8_t>(cells.first[codes[i]]);
        }
      }
      if (packer) {
        packer->put(narrow, n);
      }
      if (item.sums != nullptr) {
        new_sums.add(part.gap, part.cell, n);
      }
      if (row.full()) {
        row.flush(totals);
      }
    }
    totals.distance += sum_of_lanes(distance);
    new_sums.end_block();
    old_sums.end_block();
  });
  if (packer) {
    packer->end();
  }
  row.flush(totals);
}

template <int kBits = 1>
void run_levels(const Step& step, Item& item, const Span& span, const Cells& cells, const Prox& how,
                SpanTotals& totals) {
  if constexpr (kBits <= kMaxCellBits) {
    if (cells.levels > 1 << kBits) {
      return run_levels<kBits + 1>(step, item, span, cells, how, totals);
    }
    NarrowRow<kBits> row(cells, how);
    run_span(step, item, span, cells, row, totals);
  } else {
    WideRow row(cells, how);
    run_span(step, item, span, cells, row, totals);
  }
}

const float* data_of(const char* name, Views tensors, size_t i, View like) {
  if (tensors.empty()) {
    return nullptr;
  }
  check_same(kOp, name, tensors[i], like);
  return tensors[i].as<float>();
}

void check_list(const char* name, Views tensors, size_t count, bool wanted) {
  check_count(kOp, name, tensors.size(), wanted ? count : 0);
}

}  // namespace

void quped_step(int threads, Views x, Views grad, Views quantized_grad, Views first, Views second, Views centers,
                Views sharpness, Views strength, const std::string& chain, const std::string& optimizer,
                const std::string& norm, double lr, double weight_decay, double beta1, double beta2, double eps,
                bool nesterov, int64_t step_number, bool clamp, bool wants_codes, int64_t pack_bits, Views center_grad,
                Views counts, Views sums, View distance, Views codes) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  const Step step{
      chain_of(chain),
      Optimizer(math::StepFactors(kOp, optimizer, lr, weight_decay, beta1, beta2, eps, nesterov, step_number)),
      norm == "l1", clamp, wants_codes ? static_cast<int>(pack_bits) : 0};
  const size_t count = x.size();
  const bool through = step.chain == Chain::kSoft || step.chain == Chain::kStraightThrough;
  check_list("grad", grad, count, !(through && grad.empty()));
  check_list("quantized_grad", quantized_grad, count, step.chain != Chain::kNone);
  check_list("first", first, count, step.optimizer.has_first());
  check_list("second", second, count, step.optimizer.has_second());
  check_list("centers", centers, count, true);
  check_list("sharpness", sharpness, count, step.chain == Chain::kSoft);
  check_list("strength", strength, count, true);
  check_list("center_grad", center_grad, count, step.chain != Chain::kNone);
  check_list("counts", counts, count, true);
  check_list("sums", sums, count, !step.l1);
  check_list("codes", codes, count, wants_codes);
  check_apart(kOp, "x, first and second must share no memory with another tensor of the call", {&x, &first, &second},
              {&grad, &quantized_grad});
  QK_CHECK(pack_bits >= 0 && pack_bits <= kMaxBits, text(kOp, ": pack_bits must be between 0 and ", kMaxBits),
           std::to_string(pack_bits));

  std::vector<Item> items;
  items.reserve(count);
  SpanList spans;
  for (size_t i = 0; i < count; ++i) {
    const Rows rows = rows_of(kOp, x[i], centers[i]);
    Item item{};
    item.rows = rows;
    item.strength = per_row(kOp, "strength", strength[i], rows);
    if (step.chain == Chain::kSoft) {
      item.sharpness = per_row(kOp, "sharpness", sharpness[i], rows);
    }
    item.x = x[i].as<float>();
    item.grad = data_of("grad", grad, i, x[i]);
    item.through = data_of("quantized_grad", quantized_grad, i, x[i]);
    item.first = const_cast<float*>(data_of("first", first, i, x[i]));
    item.second = const_cast<float*>(data_of("second", second, i, x[i]));
    item.center_grad = const_cast<float*>(data_of("center_grad", center_grad, i, centers[i]));
    item.sums = const_cast<float*>(data_of("sums", sums, i, centers[i]));
    QK_CHECK(counts[i].numel() == 3 * centers[i].numel(), text(kOp, ": counts must hold three a center"),
             "shape " + shape_of(counts[i].sizes));
    item.counts = counts[i].as<int64_t>();
    if (wants_codes) {
      const int64_t bytes = step.pack_bits == 0 ? x[i].numel() : packed_bytes(x[i].numel(), pack_bits);
      QK_CHECK(codes[i].numel() == bytes, text(kOp, ": codes must have ", bytes, " bytes"),
               std::to_string(codes[i].numel()));
      QK_CHECK(step.pack_bits == 0 || rows.levels <= 1 << step.pack_bits,
               text(kOp, ": pack_bits must hold codes below ", rows.levels), std::to_string(pack_bits));
      item.codes = codes[i].as<uint8_t>();
    }
    spans.add(rows, kWork);
    item.spans = spans.of(i);
    item.distance.resize(static_cast<size_t>(item.spans.count));
    if (wants_codes && pack_bits > 0) {
      item.edges.resize(static_cast<size_t>(item.spans.count));
    }
    if (item.spans.per_row > 1) {
      item.span_counts.resize(static_cast<size_t>(item.spans.count * 3 * rows.levels));
      item.span_sums.resize(static_cast<size_t>(item.spans.count * rows.levels));
      item.span_gradient.resize(static_cast<size_t>(item.spans.count * rows.levels));
    }
    items.push_back(std::move(item));
  }

  spans.for_each(threads, [&](size_t tensor, const Span& span) {
    Item& item = items[tensor];
    const Cells cells(item.rows.centers_of(span.row), item.rows.levels);
    const Prox how(step.l1, step.clamp, item.strength.of(span.row), cells);
    SpanTotals totals(item.rows.levels);
    run_levels(step, item, span, cells, how, totals);
    to_first(cells, totals.members);
    to_first(cells, totals.above);
    to_first(cells, totals.below);
    to_first(cells, totals.sums);
    if (step.chain != Chain::kSoft) {
      to_first(cells, totals.center_grad);
    }
    keep_totals(item, span, totals);
  });

  for (size_t i = 0; i < count; ++i) {
    add_spans(items[i]);
    if (!items[i].edges.empty()) {
      stitch_edges(items[i].edges, step.pack_bits, x[i].numel(), items[i].codes);
    }
    double sum = 0.0;
    for (double part : items[i].distance) {
      sum += part;
    }
    distance.as<float>()[i] = static_cast<float>(sum);
  }
}

}  // namespace qk::cpu
