#include "host_threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace compact {

namespace {

// What GCC's and LLVM's OpenMP both export.
struct OpenMp {
  void (*run)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*number)() = nullptr;
  int (*count)() = nullptr;
};

template <class Function>
void find(const char* name, Function& into) {
#if defined(__unix__) || defined(__APPLE__)
  into = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
#else
  (void)name;
  (void)into;
#endif
}

OpenMp find_all() {
  OpenMp found;
  find("GOMP_parallel", found.run);
  find("omp_get_thread_num", found.number);
  find("omp_get_num_threads", found.count);
  return found;
}

struct Call {
  const OpenMp* openmp;
  void (*work)(void*, int, int);
  void* data;
};

void part(void* data) {
  const Call& call = *static_cast<Call*>(data);
  call.work(call.data, call.openmp->number(), call.openmp->count());
}

}  // namespace

void on_host_threads(int threads, void (*work)(void* data, int part, int parts), void* data) {
  static const OpenMp openmp = find_all();
  if (threads <= 1 || !openmp.run || !openmp.number || !openmp.count) {
    work(data, 0, 1);
    return;
  }
  Call call{&openmp, work, data};
  openmp.run(part, &call, static_cast<unsigned>(threads), 0);
}

}  // namespace compact
