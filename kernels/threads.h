// Work handed out to the threads that torch has, for the C++ kernels.
//
// Threads come from the caller's `parallel`, the GOMP_parallel of the runtime that torch has loaded:
// a second one would fight with it for the cores.

#pragma once

#include <atomic>

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <class Work>
struct Shared {
  std::atomic<long> next;
  long tasks;
  const Work* work;
};

template <class Work>
void worker(void* data) {
  auto* shared = (Shared<Work>*)data;
  for (long i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < shared->tasks;)
    (*shared->work)(i);
}

// work(0) … work(tasks − 1), each by the next thread that is free.
template <class Work>
void for_each(Parallel parallel, long threads, long tasks, const Work& work) {
  Shared<Work> shared{{0}, tasks, &work};
  threads = threads < tasks ? threads : tasks;
  if (threads > 1)
    parallel(worker<Work>, &shared, (unsigned)threads, 0);
  else
    worker<Work>(&shared);
}

}  // namespace
