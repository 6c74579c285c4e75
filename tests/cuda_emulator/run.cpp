#include "run.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_emulator.h"
#include "fiber.h"

namespace qk::emulator {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kShared = 48 * 1024;
constexpr size_t kMostShared = 163 * 1024;  // sm_80; later ones have more
constexpr unsigned kMostBlocks = 65535;     // of a grid's second and third dimension
constexpr int kPoison = 0xff;               // NaN as float32, bfloat16 and float16

enum class State { kReady, kBarrier, kCollective, kEnded };

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

struct Worker {
  Thread thread;
  Fiber fiber;
  State state = State::kEnded;
  Site site;
  unsigned mask = 0;
  void* argument = nullptr;
};

using Memory = std::unique_ptr<void, void (*)(void*)>;

// A block's own: AddressSanitizer sees a step past its end.
Memory poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(memory, kPoison, bytes);
  return Memory(memory, std::free);
}

struct Machine {
  std::mutex one_launch;
  std::vector<std::unique_ptr<Worker>> workers;
  size_t count = 0;  // of them in this block
  Worker* running = nullptr;
  const std::function<void()>* body = nullptr;
  Memory dynamic{nullptr, std::free};
  std::map<const void*, Memory> fixed;  // by its site
  size_t shared_bytes = 0;              // of both
  std::string order = "forward";
  std::mt19937 random{0};
  std::map<const void*, size_t> limits;
  std::string error;
};

Machine& machine() {
  static Machine only;
  return only;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("CUDA emulator: " + what); }

void entry() {
  Machine& m = machine();
  m.running->fiber.arrived();
  (*m.body)();
  m.running->state = State::kEnded;
  m.running->fiber.leave(true);
  std::abort();
}

// An error in a fiber: the launch ends, its fibers are left where they are.
[[noreturn]] void fail_in_fiber(const std::string& what) {
  Machine& m = machine();
  m.error = what;
  m.running->fiber.leave();
  std::abort();
}

std::string where_they_are(const Machine& m) {
  std::map<std::string, int> found;
  for (size_t i = 0; i < m.count; ++i) {
    const Worker& w = *m.workers[i];
    const std::string place = w.state == State::kEnded ? "ended" : "at " + w.site.text();
    ++found[place];
  }
  std::string text;
  for (const auto& [place, count] : found) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + place;
  }
  return text;
}

void release_barrier(Machine& m) {
  for (size_t i = 0; i < m.count; ++i) {
    const Worker& w = *m.workers[i];
    if (w.state != State::kBarrier || !(w.site == m.workers[0]->site)) {
      fail("a barrier that not every thread of the block reaches: " + where_they_are(m));
    }
  }
  for (size_t i = 0; i < m.count; ++i) {
    m.workers[i]->state = State::kReady;
  }
}

void run_block(Machine& m) {
  std::vector<size_t> order(m.count);
  for (size_t i = 0; i < m.count; ++i) {
    order[i] = m.order == "backward" ? m.count - 1 - i : i;
    m.workers[i]->state = State::kReady;
    m.workers[i]->fiber.start(entry);
  }
  while (true) {
    if (m.order == "shuffled") {
      std::shuffle(order.begin(), order.end(), m.random);
    }
    bool ran = false;
    for (size_t i : order) {
      Worker& w = *m.workers[i];
      if (w.state == State::kReady) {
        ran = true;
        m.running = &w;
        w.fiber.enter();
        if (!m.error.empty()) {
          fail(m.error);
        }
      }
    }
    if (!ran) {
      const auto in = [&](State state) {
        return std::count_if(m.workers.begin(), m.workers.begin() + static_cast<std::ptrdiff_t>(m.count),
                             [&](const auto& w) { return w->state == state; });
      };
      if (in(State::kEnded) == static_cast<std::ptrdiff_t>(m.count)) {
        return;
      }
      if (in(State::kBarrier) == 0) {
        fail("a warp waits for lanes that do not come: " + where_they_are(m));
      }
      release_barrier(m);
    }
  }
}

size_t limit_of(const Machine& m, const void* kernel) {
  const auto raised = m.limits.find(kernel);
  return raised == m.limits.end() ? kShared : raised->second;
}

void check_launch(const Machine& m, const Launch& launch) {
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > kMostThreads) {
    fail("a block of " + std::to_string(threads) + " threads");
  }
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.x > 0x7fffffffu ||
      launch.grid.y > kMostBlocks || launch.grid.z > kMostBlocks) {
    fail("a grid of " + std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) + " x " +
         std::to_string(launch.grid.z) + " blocks");
  }
  const size_t limit = limit_of(m, launch.kernel);
  if (launch.shared_bytes > limit) {
    fail(std::to_string(launch.shared_bytes) + " bytes of shared memory where " + std::to_string(limit) +
         " are allowed");
  }
}

}  // namespace

const Thread& current() { return machine().running->thread; }

void* dynamic_shared() { return machine().dynamic.get(); }

void* shared(const void* site, size_t bytes) {
  Machine& m = machine();
  auto found = m.fixed.find(site);
  if (found == m.fixed.end()) {
    m.shared_bytes += bytes;
    found = m.fixed.emplace(site, poisoned(bytes)).first;
  }
  return found->second.get();
}

void set_order(const std::string& order, uint32_t seed) {
  if (order != "forward" && order != "backward" && order != "shuffled") {
    fail("order must be forward, backward or shuffled, got " + order);
  }
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.order = order;
  m.random.seed(seed);
}

void raise_limit(const void* kernel, size_t bytes) {
  if (bytes > kMostShared) {
    fail(std::to_string(bytes) + " bytes of shared memory, more than an sm_80 has");
  }
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.limits[kernel] = std::max(m.limits[kernel], bytes);
}

void run(const Launch& launch, const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  check_launch(m, launch);
  m.count = size_t{launch.block.x} * launch.block.y * launch.block.z;
  while (m.workers.size() < m.count) {
    m.workers.push_back(std::make_unique<Worker>());
  }
  m.body = &body;
  m.error.clear();
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) {
        m.dynamic = poisoned(launch.shared_bytes);
        m.fixed.clear();
        m.shared_bytes = launch.shared_bytes;
        for (size_t i = 0; i < m.count; ++i) {
          const auto at = static_cast<unsigned>(i);
          const dim3 b = launch.block;
          m.workers[i]->thread = {{at % b.x, at / b.x % b.y, at / b.x / b.y}, {x, y, z}, b, launch.grid};
        }
        run_block(m);
        if (m.shared_bytes > (m.limits.count(launch.kernel) != 0 ? kMostShared : kShared)) {
          fail(std::to_string(m.shared_bytes) + " bytes of shared memory, fixed and dynamic, are too many");
        }
      }
    }
  }
}

void barrier(const char* file, int line) {
  Worker& w = *machine().running;
  w.site = {file, line};
  w.state = State::kBarrier;
  w.fiber.leave();
}

void collective(unsigned mask, Complete complete, void* argument, const char* file, int line) {
  Machine& m = machine();
  Worker& mine = *m.running;
  const Thread& t = mine.thread;
  const size_t index = t.index.x + t.block_size.x * (t.index.y + size_t{t.block_size.y} * t.index.z);
  const size_t first = index / kLanes * kLanes;
  mine.site = {file, line};
  if (!(mask >> (index - first) & 1u)) {
    fail_in_fiber("a lane that its own mask leaves out, at " + mine.site.text());
  }
  mine.mask = mask;
  mine.argument = argument;
  void* arguments[kLanes] = {};
  bool all = true;
  for (size_t l = 0; l < kLanes && all; ++l) {
    if (mask >> l & 1u) {
      const size_t at = first + l;
      if (at >= m.count || m.workers[at]->state == State::kEnded) {
        // A mask may name lanes the block does not have: hardware treats them as ended. Lanes that have ended
        // otherwise do not come.
        if (at < m.count) {
          fail_in_fiber("a warp waits for a lane that has ended, at " + mine.site.text());
        }
        continue;
      }
      Worker& other = *m.workers[at];
      all = &other == &mine || (other.state == State::kCollective && other.mask == mask && other.site == mine.site);
      arguments[l] = other.argument;
    }
  }
  if (!all) {
    mine.state = State::kCollective;
    mine.fiber.leave();
    return;
  }
  complete(arguments);
  for (size_t l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1u) && first + l < m.count) {
      m.workers[first + l]->state = State::kReady;
    }
  }
}

// PTX ISA, matrix fragments for mma.m16n8k16: lane 4 g + t holds of A rows g and g + 8 at k = 2t, 2t + 1 and 2t + 8, 2t
// + 9, of B column g at the same k, of D rows g and g + 8 at columns 2t and 2t + 1. Products are exact; the sum is
// taken as tensor cores are known to take it, terms cut off one bit below the largest one's last place.
void multiply(void* const* lanes, float (*value_of)(uint16_t)) {
  double a[16][16], b[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto* own = static_cast<const Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = own->a[i / 2];
      const int row = g + (i / 2 % 2) * 8, k = 2 * t + i % 2 + (i / 4) * 8;
      a[row][k] = value_of(static_cast<uint16_t>(word >> (16 * (i % 2))));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i % 2 + (i / 2) * 8][g] = value_of(static_cast<uint16_t>(own->b[i / 2] >> (16 * (i % 2))));
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    auto* own = static_cast<Mma*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + (i / 2) * 8, column = 2 * (l % 4) + i % 2;
      double largest = std::fabs(static_cast<double>(own->d[i])), sum = 0.0;
      for (int k = 0; k < 16; ++k) {
        largest = std::max(largest, std::fabs(a[row][k] * b[k][column]));
      }
      const auto cut = [&](double term) {
        if (!(largest > 0.0) || !std::isfinite(largest) || !std::isfinite(term)) {
          return term;
        }
        const double quantum = std::ldexp(1.0, std::ilogb(largest) - 24);
        return std::trunc(term / quantum) * quantum;
      };
      sum = cut(own->d[i]);
      for (int k = 0; k < 16; ++k) {
        sum += cut(a[row][k] * b[k][column]);
      }
      own->d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace qk::emulator
