// Independent items over threads, handed out in small chunks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace compact {

// Calls work(begin, end, thread) until [0, count) is done. `threads` <= 0 means all cores. The first
// exception stops the others and is rethrown here.
template <class Work>
void parallel_for(std::int64_t count, std::int64_t chunk, int threads, Work&& work) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  threads = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  if (threads <= 1) {
    for (std::int64_t at = 0; at < count; at += chunk) work(at, std::min(count, at + chunk), 0);
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  auto loop = [&](int thread) {
    for (;;) {
      const std::int64_t at = next.fetch_add(chunk);
      if (at >= count) return;
      try {
        work(at, std::min(count, at + chunk), thread);
      } catch (...) {
        std::lock_guard<std::mutex> lock(guard);
        if (!error) error = std::current_exception();
        next.store(count);
        return;
      }
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<std::size_t>(threads));
  try {
    for (int t = 1; t < threads; ++t) pool.emplace_back(loop, t);
  } catch (const std::system_error&) {
    // the system gives no more threads: those that run do all the work
  }
  loop(0);
  for (auto& t : pool) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace compact
