// Attention by segments over a packed row, forwards and back, one call for all heads: what
// compact_fast/lean/attention.py does with torch's operator segment by segment. All float32.
//
// What a token gets does not depend on what else is in the row; no bit depends on the number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compact {

constexpr std::int64_t kMostSeen = 8192;  // tokens that one sees, for whose scores there is room
constexpr std::int64_t kMostWidth = 256;  // of a head; widths are multiples of kLanes

// Tokens [own_begin, own_end) that see those of the root, which lie before them, and each other
// causally.
struct Segment {
  std::int64_t root_begin, root_end, own_begin, own_end;
};

// A token's heads lie together, tokens `stride` floats apart.
struct Heads {
  const float* data;
  std::ptrdiff_t stride;
};

struct Attention {
  Heads query, key, value;
  const Segment* segments;  // every token is in one
  std::int64_t count;
  std::int64_t heads, kv_heads, d;  // heads is a multiple of kv_heads
  std::int64_t window;              // a token sees at most so many, itself included; 0: all
  float scale;                      // of scores
  int threads;
};

// out [N, heads, d], and logsumexp [heads, N] of the scaled scores, where n is the row's length.
void attend(const Attention& a, std::int64_t n, float* out, float* logsumexp);

// So many floats `attend_back` needs to sum up gradients of keys and values.
std::int64_t attend_back_room(const Attention& a);

// The gradients by queries, keys and values, [N, (kv_)heads, d], by `grad`, that of out.
void attend_back(const Attention& a, std::int64_t n, const float* grad, const float* out,
                 const float* logsumexp, float* g_query, float* g_key, float* g_value, float* room);

}  // namespace compact
