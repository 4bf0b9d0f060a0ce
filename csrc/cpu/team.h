// The threads of one parallel region with many short phases: a step of decoding has 60 of them in 5 ms.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "parallel.h"

#ifdef _OPENMP
extern "C" int omp_get_num_threads(void) noexcept;  // of the library that torch has loaded
#endif

namespace fastlm::cpu {

// A phase is a number of items that the threads take one by one; it ends when all are done. So a thread that loses its
// core for a while holds up one item. Which thread takes an item must not change a result.
class Team {
 public:
  // Calls f(item) for each of [0, items), on this thread or another one of the team. Every thread calls it, with the
  // same number of items; it returns after the last item is done.
  template <class F>
  void phase(int64_t items, F f) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < SPINS) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Calls f(team, thread) on at most `threads` threads at once, numbered from 0. f must not throw.
  template <class F>
  static void run(int threads, F f) {
    Team team;
#ifdef _OPENMP
    if (threads > 1 && !forked.load(std::memory_order_relaxed)) {
      std::atomic<int> number{0};
#pragma omp parallel num_threads(threads)
      {
        // The library may start fewer threads than asked. All see the same number.
        team.threads_ = omp_get_num_threads();
#pragma omp barrier
        f(team, number.fetch_add(1));
      }
      return;
    }
#endif
    f(team, 0);
  }

 private:
  static constexpr int SPINS = 20000;  // some 0.3 ms, longer than the last item of a phase; then the core is given up

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  std::atomic<int> threads_{1};
};

}  // namespace fastlm::cpu
