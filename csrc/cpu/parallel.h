// parallel_for: independent tasks on a small pool of sleeping threads.
//
// Which thread runs a task is not fixed, so a task must write only what belongs to it; sums are then added in a fixed
// order by the caller (spans.h). That is what makes results independent of the number of threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace qk::cpu {

// Below about this many elementary operations a task is not worth waking a thread for (some 10 us of work).
constexpr int64_t kGrain = 32768;

// run(context, first, last) does items [first, last).
using TaskRange = void (*)(void* context, int64_t first, int64_t last);

// Items [0, count) in tasks of `grain`, on the calling thread and up to threads - 1 others. The first exception of a
// task is thrown here once all tasks have stopped. Runs serially on the calling thread when the pool is busy with
// another caller.
void run_in_pool(int threads, int64_t count, int64_t grain, TaskRange run, void* context);

template <class Body>
void parallel_for(int threads, int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) {
    return;
  }
  if (threads <= 1 || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  const TaskRange run = [](void* context, int64_t first, int64_t last) {
    (*static_cast<Plain*>(context))(first, last);
  };
  run_in_pool(threads, count, grain, run, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace qk::cpu
