#include "lut_regimes.h"

#include <atomic>

namespace qk::cpu {
namespace {

std::atomic<bool> pinned_regime{false};

}  // namespace

void set_batch_invariant(bool pinned) { pinned_regime.store(pinned, std::memory_order_relaxed); }

bool batch_invariant() { return pinned_regime.load(std::memory_order_relaxed); }

}  // namespace qk::cpu
