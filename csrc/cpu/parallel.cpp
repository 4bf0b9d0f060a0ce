#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastlm::cpu {

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

}  // namespace fastlm::cpu
