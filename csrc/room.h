// Memory of a thread, kept from call to call: fresh memory costs more than filling it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace compact {

constexpr std::int64_t kLine = 16;  // floats of a cache line

constexpr std::int64_t parts_of(std::int64_t all, std::int64_t most) {
  return (all + most - 1) / most;
}

class Room {
 public:
  float* of(std::int64_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const auto bytes = static_cast<std::size_t>(parts_of(size, kLine) * kLine) * sizeof(float);
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }
  ~Room() { std::free(data_); }

 private:
  float* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace compact
