// The thread pool behind parallel_for. Workers sleep on a condition variable between jobs and never spin, and a worker
// that has not woken when the work is done is not waited for.
//
// Linux may wake a worker on its caller's core, where it then waits until the work is done or for a tick to move it; so
// workers are kept off that core. On two cores calls of 0.6 ms gained nothing from a second thread before, and take two
// thirds of the time since.
//
// Why not the OpenMP threads that torch has: its regions wait for every thread. On two cores under Linux 6 a call after
// 20 ms of rest took 8 ms in libgomp, torch's own operations too, for the woken thread shares the core on which the
// caller spins; here it takes 0.1 ms. Within 3 ms after an operation of torch's, while libgomp's threads still spin,
// ours get half of their cores (a call of 3 ms took 3.5); OMP_WAIT_POLICY=passive leaves them whole.
//
// The pool is reached through one pointer and never destroyed: at exit its threads are asleep and end with the process.
// A forked child has the pointer but not the threads; it sees another process id and makes a pool of its own.

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#define QK_PROCESS_ID _getpid
#else
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#define QK_PROCESS_ID getpid
#endif

namespace qk::cpu {
namespace {

struct Job {
  TaskRange run;
  void* context;
  int64_t count;
  int64_t grain;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  Job(TaskRange run_, void* context_, int64_t count_, int64_t grain_)
      : run(run_), context(context_), count(count_), grain(grain_) {}

  // Takes tasks until none is left; a failed task ends the job.
  void work() {
    try {
      for (;;) {
        const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
        if (first >= count) {
          return;
        }
        run(context, first, std::min(first + grain, count));
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) {
        error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  Pool() : process_(QK_PROCESS_ID()) {}

  bool belongs_here() const { return process_ == QK_PROCESS_ID(); }

  // False where another caller has the pool; nothing has run then.
  bool try_run(Job& job, int helpers) {
    if (busy_.test_and_set(std::memory_order_acquire)) {
      return false;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      keep_off_callers_core();
      job_ = &job;
      tickets_ = std::min(helpers, static_cast<int>(workers_.size()));
    }
    for (int i = 0; i < helpers; ++i) {
      wake_.notify_one();
    }
    job.work();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      tickets_ = 0;  // a worker that has not woken yet is not waited for
      idle_.wait(lock, [this] { return working_ == 0; });
      job_ = nullptr;
    }
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  void grow(int wanted) {
    try {
      workers_.reserve(static_cast<size_t>(wanted));
      while (static_cast<int>(workers_.size()) < wanted) {
        std::thread worker([this] { serve(); });
        workers_.push_back(worker.native_handle());
        worker.detach();
        avoided_core_ = -1;
      }
    } catch (const std::exception&) {
      // The system gives no more threads: those there are, or the caller alone, do the same work to the same bits.
    }
  }

#if defined(__linux__)
  void keep_off_callers_core() {
    const int core = sched_getcpu();
    if (core == avoided_core_) {
      return;
    }
    cpu_set_t allowed;  // where the caller may run; an error means more processors than this type can name
    if (core < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) {
      return;
    }
    CPU_CLR(static_cast<unsigned>(core), &allowed);
    for (const pthread_t worker : workers_) {
      pthread_setaffinity_np(worker, sizeof allowed, &allowed);
    }
    avoided_core_ = core;
  }
#else
  void keep_off_callers_core() {}
#endif

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return tickets_ > 0; });
      --tickets_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) {
        idle_.notify_one();
      }
    }
  }

  const int process_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  std::vector<std::thread::native_handle_type> workers_;  // they never end, so the handles stay good
  int avoided_core_ = -1;
  int working_ = 0;  // workers inside job_
  int tickets_ = 0;  // workers that may still join job_
};

std::atomic<Pool*> shared_pool{nullptr};

Pool& pool_of_this_process() {
  Pool* pool = shared_pool.load(std::memory_order_acquire);
  while (pool == nullptr || !pool->belongs_here()) {
    Pool* fresh = new Pool;  // has no threads until its first job
    if (shared_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) {
      return *fresh;
    }
    delete fresh;  // another thread was quicker; pool is now what it stored
  }
  return *pool;
}

}  // namespace

void run_in_pool(int threads, int64_t count, int64_t grain, TaskRange run, void* context) {
  const int64_t tasks = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
  Job job(run, context, count, grain);
  if (helpers <= 0 || !pool_of_this_process().try_run(job, helpers)) {
    run(context, 0, count);
    return;
  }
  if (job.error) {
    std::rethrow_exception(job.error);
  }
}

}  // namespace qk::cpu
