// Which kernel lut_linear runs for a batch: the one place that knows the crossovers.
//
// Within a regime a row's sum has one order, whatever batch it comes in; batch_invariant pins one regime for all.
#pragma once

namespace qk::cpu {

void set_batch_invariant(bool pinned);  // for the whole process
bool batch_invariant();

}  // namespace qk::cpu
