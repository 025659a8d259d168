#include "surface.h"

#include <algorithm>

namespace compact {

namespace {

// Hashes are spread evenly: deal them out by their top bits, then straighten what is nearly sorted.
template <int kBits>
void deal(const std::vector<std::uint64_t>& hashes, std::vector<std::uint64_t>& out) {
  constexpr int shift = 64 - kBits;
  std::uint16_t place[(1 << kBits) + 1] = {};
  for (std::uint64_t h : hashes) ++place[(h >> shift) + 1];
  for (int b = 0; b < 1 << kBits; ++b)
    place[b + 1] = static_cast<std::uint16_t>(place[b + 1] + place[b]);
  for (std::uint64_t h : hashes) out[place[h >> shift]++] = h;
  for (std::size_t i = 1; i < out.size(); ++i) {
    const std::uint64_t h = out[i];
    std::size_t j = i;
    for (; j > 0 && out[j - 1] > h; --j) out[j] = out[j - 1];
    out[j] = h;
  }
}

}  // namespace

void Surface::finish(std::vector<std::uint64_t>& out) {
  sorted_.resize(hashes_.size());
  if (hashes_.size() <= 128) {
    deal<6>(hashes_, sorted_);
  } else if (hashes_.size() <= 4096) {
    deal<8>(hashes_, sorted_);
  } else {
    sorted_ = hashes_;
    std::sort(sorted_.begin(), sorted_.end());
  }
  out.insert(out.end(), sorted_.begin(), std::unique(sorted_.begin(), sorted_.end()));
}

}  // namespace compact
