// The emulator against kernels that are known to be right, and known to be wrong. One name an argument; the last line
// says what was seen, the status whether it is what should be.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "platform.h"
#include "run.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 96;

template <bool kBarrier>
__global__ void reverse_in_shared(const int* from, int* to) {
  QK_SHARED(int, held, kThreads);
  held[threadIdx.x] = from[threadIdx.x];
  if (kBarrier) {
    __syncthreads();
  }
  to[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBarrier>
bool reverses(const char* order) {
  emulator::set_order(order, 1);
  std::vector<int> from(kThreads), to(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    from[i] = i + 1;
  }
  launch(reverse_in_shared<kBarrier>, 1, kThreads, 0, nullptr, from.data(), to.data());
  for (int i = 0; i < kThreads; ++i) {
    if (to[i] != from[kThreads - 1 - i]) {
      return false;
    }
  }
  return true;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 5) {
    __syncthreads();
  }
}

__global__ void barriers_of_different_lines() {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_some(int* to) {
  if (threadIdx.x < 7) {
    to[threadIdx.x] = __shfl_xor_sync(kEveryLane, static_cast<int>(threadIdx.x), 1);
  }
}

__global__ void sum_of_a_warp(const float* from, float* to) {
  float value = from[threadIdx.x];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kEveryLane, value, offset);
  }
  to[threadIdx.x] = value;
}

__global__ void read_what_nobody_wrote(float* to) {
  QK_SHARED(float, fixed, 4);
  QK_DYNAMIC_SHARED(float, dynamic);
  to[0] = fixed[threadIdx.x];
  to[1] = dynamic[threadIdx.x];
}

__global__ void write_past_the_end(float* to) {
  QK_DYNAMIC_SHARED(float, dynamic);
  dynamic[32] = 1.0f;
  to[0] = dynamic[32];
}

__global__ void multiply_fragments(const float* a, const float* b, float* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const float* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = pack_pair<bfloat16>(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * t + 8 * i;
    right[i] = pack_pair<bfloat16>(b[k * 8 + g], b[(k + 1) * 8 + g]);
  }
  float sums[4] = {};
  mma_m16n8k16_bf16(sums, left, right);
  for (int i = 0; i < 4; ++i) {
    d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
  }
}

bool tensor_core_multiplies() {
  std::vector<float> a(256), b(128), d(128);
  for (int i = 0; i < 256; ++i) {
    a[i] = static_cast<float>(i % 17 - 8);
  }
  for (int i = 0; i < 128; ++i) {
    b[i] = static_cast<float>(i % 11 - 5) / 4;
  }
  launch(multiply_fragments, 1, kWarp, 0, nullptr, a.data(), b.data(), d.data());
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        sum += a[r * 16 + k] * b[k * 8 + c];
      }
      if (sum != d[r * 8 + c]) {
        return false;
      }
    }
  }
  return true;
}

bool special_functions_err_as_documented() {
  double worst = 0.0, exact = 0.0;
  for (int i = -4000; i < 4000; ++i) {
    const float x = static_cast<float>(i) * 0.01f, y = std::exp2(x);
    const double e = std::fabs(exp2_approx(x) / std::exp2(static_cast<double>(x)) - 1) / 0x1p-22;
    const double r = std::fabs(rcp_approx(y) * static_cast<double>(y) - 1) / 0x1p-23;
    const double q = std::fabs(rsqrt_approx(y) * std::sqrt(static_cast<double>(y)) - 1) / 0x1.8p-23;
    worst = std::fmax(worst, std::fmax(e, std::fmax(r, q)));
    exact += e == 0.0;
  }
  return worst <= 1.0 && worst > 0.9 && exact < 100 && exp2_approx(-200.0f) == 0.0f && rcp_approx(INFINITY) == 0.0f &&
         std::isnan(min_or_nan(NAN, 1.0f)) && std::isnan(max_or_nan(1.0f, NAN));
}

template <class Run>
bool raises(const char* wanted, Run&& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return std::strstr(error.what(), wanted) != nullptr;
  }
  return false;
}

bool holds(const std::string& name) {
  float out[kThreads] = {};
  int numbers[kThreads] = {};
  if (name == "a_barrier_makes_every_order_agree") {
    return reverses<true>("forward") && reverses<true>("backward") && reverses<true>("shuffled");
  }
  if (name == "a_missing_barrier_is_seen") {
    return !reverses<false>("forward") && !reverses<false>("backward") && !reverses<false>("shuffled");
  }
  if (name == "a_divergent_barrier_is_an_error") {
    return raises("not every thread", [] { launch(divergent_barrier, 1, kWarp, 0, nullptr); });
  }
  if (name == "barriers_of_different_lines_are_an_error") {
    return raises("not every thread", [] { launch(barriers_of_different_lines, 1, kWarp, 0, nullptr); });
  }
  if (name == "a_shuffle_that_waits_for_ever_is_an_error") {
    return raises("a warp waits for", [&] { launch(shuffle_without_some, 1, kWarp, 0, nullptr, numbers); });
  }
  if (name == "a_warp_adds_up") {
    float in[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      in[i] = static_cast<float>(i);
    }
    launch(sum_of_a_warp, 1, kWarp, 0, nullptr, in, out);
    return out[0] == 496.0f && out[31] == 496.0f;
  }
  if (name == "shared_memory_starts_as_nan") {
    launch(read_what_nobody_wrote, 3, 1, 64, nullptr, out);
    return std::isnan(out[0]) && std::isnan(out[1]);
  }
  if (name == "too_much_shared_memory_is_refused") {
    const auto run = [&] { launch(read_what_nobody_wrote, 1, 1, 60'000, nullptr, out); };
    if (!raises("bytes of shared memory", run)) {
      return false;
    }
    raise_shared_limit(read_what_nobody_wrote, 60'000);
    run();
    return true;
  }
  if (name == "an_error_leaves_the_emulator_working") {
    for (int i = 0; i < 3; ++i) {
      raises("not every thread", [] { launch(divergent_barrier, 1, kWarp, 0, nullptr); });
    }
    return reverses<true>("forward");
  }
  if (name == "tensor_cores_multiply") {
    return tensor_core_multiplies();
  }
  if (name == "special_functions_err_as_documented") {
    return special_functions_err_as_documented();
  }
  if (name == "overrun") {  // only AddressSanitizer sees it
    launch(write_past_the_end, 1, 1, 128, nullptr, out);
    return true;
  }
  return false;
}

}  // namespace
}  // namespace qk::cuda

int main(int count, char** names) {
  int status = 0;
  for (int i = 1; i < count; ++i) {
    const bool good = qk::cuda::holds(names[i]);
    std::printf("%s: %s\n", names[i], good ? "held" : "FAILED");
    status |= good ? 0 : 1;
  }
  return count > 1 ? status : 2;
}
