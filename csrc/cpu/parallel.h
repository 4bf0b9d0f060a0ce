// Threads without torch's headers: torch's OpenMP pool, with the number of threads that the caller passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

namespace fastlm::cpu {

// Set in a forked child. The pool's threads do not exist there, and a parallel region would wait for them forever.
extern std::atomic<bool> forked;

// The fewest items for a thread, of `elements` each: their work must be worth starting it, some microseconds.
inline int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Calls f(begin, end) on contiguous pieces of [0, n), at least `grain` items each, on at most `threads` threads.
// The division into pieces must not change a result: sums across items use partials of fixed blocks.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, F f) {
  if (n <= 0) return;
  const int64_t pieces = std::min<int64_t>(threads, (n + grain - 1) / grain);
  if (pieces <= 1 || forked.load(std::memory_order_relaxed)) {
    f(int64_t(0), n);
    return;
  }
  std::exception_ptr error;  // an exception that leaves the parallel region ends the process
#pragma omp parallel for num_threads(int(pieces)) schedule(static, 1)
  for (int64_t p = 0; p < pieces; ++p) {
    try {
      f(n * p / pieces, n * (p + 1) / pieces);
    } catch (...) {
#pragma omp critical(fastlm_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Uninitialised, cache-line aligned scratch of n items, freed with the returned pointer.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
inline std::unique_ptr<T[], Free> scratch(int64_t n) {
  const size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

}  // namespace fastlm::cpu
