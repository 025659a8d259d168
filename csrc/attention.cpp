#include "attention.h"

#include "simd.h"

#if COMPACT_VECTORS

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "attention_kernels.h"
#include "host_threads.h"
#include "room.h"

namespace compact {

namespace {

// ---- by instructions ---------------------------------------------------------------------------

struct Ways {
  std::int64_t strip;         // two vectors
  int rows;                   // a tile has at most
  const SmallTile* tiles[2];  // of one vector and of two, by the number of rows, less 1
  void (*turn)(const float* const* rows, std::int64_t d, float* flat, float* turned);
  void (*dots)(const float* const* rows, const float* others, std::int64_t d, float* sums);
  void (*weights)(float* scores, std::int64_t begin, std::int64_t end, std::int64_t lanes,
                  const Sight& sight, float scale, float* peaks, float* totals);
  void (*weights_back)(float* scores, float* grads, std::int64_t begin, std::int64_t end,
                       std::int64_t lanes, const Sight& sight, float scale, const float* logsumexp,
                       const float* along);
};

// Tiles of as many rows as leave registers for two vectors of b and one entry of a.
#define COMPACT_WITH(name, instructions, bytes, most)                                             \
  template <int W, int R>                                                                         \
  instructions void tile_##name(const Factor& a, const float* b, std::ptrdiff_t next,             \
                                std::int64_t k, float* c, std::ptrdiff_t stride, bool add) {      \
    small_tile<Part<bytes>, R, W>(a, b, next, k, c, stride, add);                                 \
  }                                                                                               \
  template <int W, int... I>                                                                      \
  const SmallTile* tiles_##name(std::integer_sequence<int, I...>) {                               \
    static const SmallTile all[] = {tile_##name<W, I + 1>...};                                    \
    return all;                                                                                   \
  }                                                                                               \
  instructions void turn_##name(const float* const* rows, std::int64_t d, float* flat,            \
                                float* turned) {                                                  \
    turn_queries<Part<bytes>>(rows, d, flat, turned);                                             \
  }                                                                                               \
  instructions void dots_##name(const float* const* rows, const float* others, std::int64_t d,    \
                                float* sums) {                                                    \
    dots<Part<bytes>>(rows, others, d, sums);                                                     \
  }                                                                                               \
  instructions void weights_##name(float* scores, std::int64_t begin, std::int64_t end,           \
                                   std::int64_t lanes, const Sight& sight, float scale,           \
                                   float* peaks, float* totals) {                                 \
    weights<Part<bytes>>(scores, begin, end, lanes, sight, scale, peaks, totals);                 \
  }                                                                                               \
  instructions void weights_back_##name(                                                          \
      float* scores, float* grads, std::int64_t begin, std::int64_t end, std::int64_t lanes,      \
      const Sight& sight, float scale, const float* logsumexp, const float* along) {              \
    weights_back<Part<bytes>>(scores, grads, begin, end, lanes, sight, scale, logsumexp, along);  \
  }                                                                                               \
  const Ways& ways_##name() {                                                                     \
    constexpr std::make_integer_sequence<int, most> sizes{};                                      \
    static const Ways all{2 * Part<bytes>::kCount,                                                \
                          most,                                                                   \
                          {tiles_##name<1>(sizes), tiles_##name<2>(sizes)},                       \
                          turn_##name,                                                            \
                          dots_##name,                                                            \
                          weights_##name,                                                         \
                          weights_back_##name};                                                   \
    return all;                                                                                   \
  }
COMPACT_WITH(plain, , 16, 6)
#if COMPACT_X86
COMPACT_WITH(avx2, __attribute__((target("avx2,fma"))), 32, 6)
COMPACT_WITH(avx512, __attribute__((target("avx512f"))), 64, 14)
#endif

const Ways& widest() {
#if COMPACT_X86
  static const bool fused = __builtin_cpu_supports("fma");
  if (simd_level() > 1) return ways_avx512();
  if (simd_level() > 0 && fused) return ways_avx2();
#endif
  return ways_plain();
}

// c [m, n] (+)= a b, for m, n, k of a hundred or two; n is a multiple of kLanes.
void product(const Ways& ways, const Factor& a, const float* b, std::ptrdiff_t next, std::int64_t m,
             std::int64_t n, std::int64_t k, float* c, std::ptrdiff_t stride, bool add) {
  const std::int64_t panels = parts_of(m, ways.rows), rows = m / panels, more = m % panels;
  for (std::int64_t j = 0; j < n; j += ways.strip) {
    const SmallTile* tiles = ways.tiles[j + ways.strip <= n];
    for (std::int64_t q = 0, i = 0; q < panels; ++q) {  // of nearly the same height
      const std::int64_t height = rows + (q < more);
      tiles[height - 1]({a.data + i * a.row, a.row, a.column}, b + j, next, k, c + i * stride + j,
                        stride, add);
      i += height;
    }
  }
}

constexpr std::int64_t kChain = 32;  // terms of one sum; sums of longer rows are made of several

// Scores [m, kQueries] of rows of d, keys or values, by turned queries.
void scores_of(const Ways& ways, const Factor& rows, const float* turned, std::int64_t m,
               std::int64_t lanes, std::int64_t d, float* scores) {
  const std::int64_t chains = parts_of(d, kChain);
  for (std::int64_t i = 0; i < chains; ++i) {
    const std::int64_t begin = d * i / chains, end = d * (i + 1) / chains;
    product(ways, {rows.data + begin, rows.row, 1}, turned + begin * kQueries, kQueries, m, lanes,
            end - begin, scores, kQueries, i > 0);
  }
}

// ---- blocks ------------------------------------------------------------------------------------

constexpr std::int64_t kSpan = 256;  // keys whose values are added up before they join the rest
constexpr std::int64_t kKeys = 56;   // whose gradients are made together: four panels

std::int64_t root_of(const Segment& s) { return s.root_end - s.root_begin; }

// Queries that are worked on together, one a lane: of a segment and of the heads that share keys,
// [first, first + rows) of them, token by token. Keys are counted from the root's first on.
class Block {
 public:
  Block(const Attention& a, const Segment& s, std::int64_t kv, std::int64_t first,
        std::int64_t rows)
      : a_(a), segment_(s), group_(a.heads / a.kv_heads), kv_(kv), first_(first), rows_(rows) {
    const std::int64_t root = root_of(s);
    std::int64_t own = first / group_, head = first % group_;
    sight_.all_begin = 0, sight_.all_end = kMostSeen;
    for (std::int64_t i = 0; i < kQueries; ++i) {
      const std::int64_t last = root + own;
      const std::int64_t begin = a.window > 0 ? std::max<std::int64_t>(0, last + 1 - a.window) : 0;
      own_[i] = own, head_[i] = kv * group_ + head;
      sight_.first[i] = static_cast<float>(begin), sight_.last[i] = static_cast<float>(last);
      sight_.all_begin = std::max(sight_.all_begin, begin);
      sight_.all_end = std::min(sight_.all_end, last + 1);
      if (i + 1 >= rows) continue;  // lanes without a query see what the last one sees
      if (++head == group_) head = 0, ++own;
    }
    begin_ = static_cast<std::int64_t>(sight_.first[0]) / kSums * kSums;
    end_ = root + own_[rows - 1] + 1;
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t lanes() const { return parts_of(rows_, kLanes) * kLanes; }  // whole vectors
  std::int64_t begin() const { return begin_; }  // the keys that any lane sees
  std::int64_t end() const { return end_; }
  const Sight& sight() const { return sight_; }
  std::int64_t token(std::int64_t row) const { return segment_.own_begin + own_[row]; }
  std::int64_t head(std::int64_t row) const { return head_[row]; }

  // Where the rows of queries, or of what is shaped like them, lie; zeros in lanes without a query.
  void find(const Heads& x, const float** rows) const {
    static constexpr float kNone[kMostWidth] = {};
    for (std::int64_t i = 0; i < kQueries; ++i)
      rows[i] = i < rows_ ? x.data + token(i) * x.stride + head(i) * a_.d : kNone;
  }

  // Memory that is wanted soon: the rows of queries, or of what is shaped like them, `shift` behind.
  void fetch(const Heads& x, std::int64_t shift) const {
    const std::int64_t own = segment_.own_end - segment_.own_begin, width = group_ * a_.d;
    const std::int64_t begin = std::max<std::int64_t>(0, (first_ + shift) / group_);
    const std::int64_t end = std::min(own, parts_of(first_ + shift + kQueries, group_));
    for (std::int64_t token = segment_.own_begin + begin; token < segment_.own_begin + end; ++token)
      for (std::int64_t j = 0; j < width; j += kLine)
        __builtin_prefetch(x.data + token * x.stride + kv_ * width + j, 0, 2);
  }

  // f(begin, end, first token) of the keys, at most `size` at a time, which are parted at the same
  // places for every block.
  template <class F>
  void each_piece(std::int64_t size, F&& f) const {
    const std::int64_t root = root_of(segment_);
    const auto run = [&](std::int64_t from, std::int64_t to, std::int64_t zero,
                         std::int64_t token) {
      for (std::int64_t at = std::max(from, begin_); at < std::min(to, end_);) {
        const std::int64_t next = std::min({zero + ((at - zero) / size + 1) * size, to, end_});
        f(at, next, token + (at - zero));
        at = next;
      }
    };
    run(0, root, 0, segment_.root_begin);
    run(root, end_, root, segment_.own_begin);
  }

  // Keys or values from a token on.
  Factor of(const Heads& x, std::int64_t token) const {
    return {x.data + token * x.stride + kv_ * a_.d, x.stride, 1};
  }

 private:
  const Attention& a_;
  const Segment segment_;
  const std::int64_t group_, kv_, first_, rows_;
  std::int64_t begin_, end_, own_[kQueries], head_[kQueries];
  Sight sight_;
};

// Whoever is free takes what is next; who does what changes no result.
template <class Work>
void share_out(std::int64_t count, int threads, const Work& work) {
  struct Shared {
    const Work& work;
    const std::int64_t count;
    std::atomic<std::int64_t> next{0};
  } shared{work, count};
  const auto take_all = [](void* data, int, int) {
    Shared& s = *static_cast<Shared*>(data);
    for (std::int64_t i = s.next++; i < s.count; i = s.next++) s.work(i);
  };
  on_host_threads(static_cast<int>(std::min<std::int64_t>(threads, count)), take_all, &shared);
}

float* thread_room(std::int64_t size) {
  thread_local Room room;
  return room.of(size);
}

// ---- forwards ----------------------------------------------------------------------------------

struct Forward {
  const Attention& a;
  const Ways& ways;
  std::int64_t n;
  float *out, *logsumexp;

  void block(const Block& b) const {
    const std::int64_t d = a.d, begin = b.begin(), end = parts_of(b.end(), kSums) * kSums;
    float* rows = thread_room(2 * kQueries * d + (end - begin) * kQueries);
    float *turned = rows + kQueries * d, *scores = turned + kQueries * d;
    const auto of = [&](std::int64_t key) { return scores + (key - begin) * kQueries; };
    const float* queries[kQueries];
    b.find(a.query, queries);
    b.fetch({out, a.heads * d}, 0);
    b.fetch(a.query, kQueries);
    ways.turn(queries, d, nullptr, turned);
    b.each_piece(kSpan, [&](std::int64_t at, std::int64_t to, std::int64_t token) {
      scores_of(ways, b.of(a.key, token), turned, to - at, b.lanes(), d, of(at));
    });
    std::fill(of(b.end()), of(end), 0.0f);
    float peaks[kQueries], totals[kQueries];
    ways.weights(scores, begin, end, b.lanes(), b.sight(), a.scale, peaks, totals);
    b.each_piece(kSpan, [&](std::int64_t at, std::int64_t to, std::int64_t token) {
      product(ways, {of(at), 1, kQueries}, b.of(a.value, token).data, a.value.stride, b.rows(), d,
              to - at, rows, d, at > begin);
    });
    for (std::int64_t i = 0; i < b.rows(); ++i) {
      const std::int64_t token = b.token(i), head = b.head(i);
      const float by = 1.0f / totals[i];
      float* to = out + (token * a.heads + head) * d;
      for (std::int64_t j = 0; j < d; ++j) to[j] = rows[i * d + j] * by;
      logsumexp[head * n + token] = peaks[i] + std::log(totals[i]);
    }
  }
};

// ---- back --------------------------------------------------------------------------------------

// Queries of segments [first, end) that see one root, whose share of the gradients of keys and values
// one thread sums up: of a segment [query_begin, query_end), of several all. What is seen of the root
// has rows [0, root) of the sums, tokens [own_begin, own_end) have the ones behind.
struct Unit {
  std::int64_t first, end, query_begin, query_end, own_begin, own_end, root;
  std::int64_t before;  // rows of the units before it
  std::int64_t rows() const { return root + own_end - own_begin; }
  std::int64_t cost() const { return (query_end - query_begin) * rows(); }
};

constexpr std::int64_t kMany = 12 * kQueries;  // queries; a segment with more is parted
constexpr std::int64_t kFew = 3 * kQueries;    // so many share a unit with their neighbours
constexpr std::int64_t kUnits = 16;            // of a segment and all heads, about, at most

// Where a segment is parted depends on itself alone.
std::vector<Unit> units_of(const Attention& a) {
  const std::int64_t group = a.heads / a.kv_heads;
  std::vector<Unit> units;
  const auto joins = [&](const Segment& s) {
    if (units.empty()) return false;
    const Unit& last = units.back();
    const Segment& before = a.segments[last.end - 1];
    return before.root_begin == s.root_begin && before.root_end == s.root_end &&
           last.own_end == s.own_begin && (s.own_end - last.own_begin) * group <= kFew;
  };
  for (std::int64_t i = 0; i < a.count; ++i) {
    const Segment& s = a.segments[i];
    const std::int64_t queries = (s.own_end - s.own_begin) * group;
    if (joins(s)) {
      Unit& last = units.back();
      last.end = i + 1, last.query_end += queries, last.own_end = s.own_end;
      continue;
    }
    const std::int64_t blocks = parts_of(queries, kQueries);
    const std::int64_t parts = std::min(parts_of(queries, kMany), parts_of(kUnits, a.kv_heads));
    for (std::int64_t p = 0; p < parts; ++p) {
      const std::int64_t begin = blocks * p / parts * kQueries;
      const std::int64_t end = std::min(queries, blocks * (p + 1) / parts * kQueries);
      const std::int64_t own_end = s.own_begin + parts_of(end, group);
      units.push_back({i, i + 1, begin, end, s.own_begin, own_end, root_of(s), 0});
    }
  }
  std::int64_t rows = 0;
  for (Unit& unit : units) unit.before = rows, rows += unit.rows();
  return units;
}

struct Backward {
  const Attention& a;
  const Ways& ways;
  std::int64_t n;
  const float *grad, *out, *logsumexp;
  float *g_query, *g_key, *g_value, *room;
  std::vector<Unit> units;

  // A unit's sums for a key/value head: [rows, 2, d], of keys and of values.
  float* sums(const Unit& unit, std::int64_t kv) const {
    return room + (unit.before * a.kv_heads + kv * unit.rows()) * 2 * a.d;
  }

  void unit(const Unit& u, std::int64_t kv) const {
    const std::int64_t group = a.heads / a.kv_heads;
    const bool alone = u.end - u.first == 1;
    const bool all = alone && a.window == 0;  // the last block sees all that any sees
    float* to = sums(u, kv);
    if (!all) std::fill_n(to, u.rows() * 2 * a.d, 0.0f);
    for (std::int64_t i = u.first; i < u.end; ++i) {
      const Segment& s = a.segments[i];
      const std::int64_t begin = alone ? u.query_begin : 0;
      const std::int64_t end = alone ? u.query_end : (s.own_end - s.own_begin) * group;
      for (std::int64_t q = parts_of(end - begin, kQueries) - 1; q >= 0; --q) {
        const std::int64_t first = begin + q * kQueries, rows = std::min(kQueries, end - first);
        block(Block(a, s, kv, first, rows), u.root, s.own_begin - u.own_begin, to,
              !all || first + rows < end);
      }
    }
  }

  // `shift`: rows of the unit's sums that lie between the root's and those of the block's segment.
  void block(const Block& b, std::int64_t root, std::int64_t shift, float* to, bool add) const {
    const std::int64_t d = a.d, part = kQueries * d;
    float* query = thread_room(5 * part + 2 * kKeys * kQueries);
    float *turned_query = query + part, *grads = turned_query + part, *turned_grads = grads + part;
    float *g_rows = turned_grads + part, *scores = g_rows + part;
    float* g_scores = scores + kKeys * kQueries;
    const float* rows[kQueries];
    b.find(a.query, rows);
    ways.turn(rows, d, query, turned_query);
    b.find({grad, a.heads * d}, rows);
    ways.turn(rows, d, grads, turned_grads);
    alignas(64) float along[kQueries], totals[kQueries];
    b.find({out, a.heads * d}, rows);
    ways.dots(rows, grads, d, along);
    for (std::int64_t i = 0; i < kQueries; ++i)
      totals[i] = i < b.rows() ? logsumexp[b.head(i) * n + b.token(i)] : 0.0f;
    b.fetch({g_query, a.heads * d}, 0);
    for (const Heads& x : {a.query, Heads{grad, a.heads * d}, Heads{out, a.heads * d}})
      b.fetch(x, -kQueries);
    b.each_piece(kKeys, [&](std::int64_t at, std::int64_t end, std::int64_t token) {
      const std::int64_t keys = end - at, queries = b.rows(), lanes = b.lanes();
      const Factor key = b.of(a.key, token);
      scores_of(ways, key, turned_query, keys, lanes, d, scores);
      scores_of(ways, b.of(a.value, token), turned_grads, keys, lanes, d, g_scores);
      ways.weights_back(scores, g_scores, at, end, lanes, b.sight(), a.scale, totals, along);
      float* sum = to + (at < root ? at : at + shift) * 2 * d;
      product(ways, {g_scores, kQueries, 1}, query, d, keys, d, queries, sum, 2 * d, add);
      product(ways, {scores, kQueries, 1}, grads, d, keys, d, queries, sum + d, 2 * d, add);
      product(ways, {g_scores, 1, kQueries}, key.data, key.row, queries, d, keys, g_rows, d,
              at > b.begin());
    });
    for (std::int64_t i = 0; i < b.rows(); ++i)
      std::copy_n(g_rows + i * d, d, g_query + (b.token(i) * a.heads + b.head(i)) * d);
  }

  // Gradients of some tokens' keys and values: the units' sums, in their order.
  void add_up(std::int64_t begin, std::int64_t end) const {
    const std::int64_t width = a.kv_heads * a.d;
    for (float* g : {g_key, g_value}) std::fill(g + begin * width, g + end * width, 0.0f);
    for (const Unit& u : units) {
      const std::int64_t root = a.segments[u.first].root_begin;
      add(u, std::max(begin, root), std::min(end, root + u.root), -root);
      add(u, std::max(begin, u.own_begin), std::min(end, u.own_end), u.root - u.own_begin);
    }
  }

  // `shift`: from tokens to rows of the unit's sums.
  void add(const Unit& u, std::int64_t begin, std::int64_t end, std::int64_t shift) const {
    for (std::int64_t token = begin; token < end; ++token)
      for (std::int64_t kv = 0; kv < a.kv_heads; ++kv) {
        const float* from = sums(u, kv) + (token + shift) * 2 * a.d;
        float* key = g_key + (token * a.kv_heads + kv) * a.d;
        float* value = g_value + (token * a.kv_heads + kv) * a.d;
        for (std::int64_t j = 0; j < a.d; ++j) key[j] += from[j];
        for (std::int64_t j = 0; j < a.d; ++j) value[j] += from[a.d + j];
      }
  }
};

constexpr std::int64_t kTokens = 16;  // whose gradients are added up at a time

}  // namespace

void attend(const Attention& a, std::int64_t n, float* out, float* logsumexp) {
  const Ways& ways = widest();
  const Forward forward{a, ways, n, out, logsumexp};
  const std::int64_t group = a.heads / a.kv_heads;
  std::vector<std::pair<std::int64_t, std::int64_t>> blocks;  // segment, first query
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t queries = (a.segments[i].own_end - a.segments[i].own_begin) * group;
    for (std::int64_t r = 0; r < queries; r += kQueries) blocks.emplace_back(i, r);
  }
  const auto count = static_cast<std::int64_t>(blocks.size());
  share_out(count * a.kv_heads, a.threads, [&](std::int64_t task) {
    const auto [i, first] = blocks[static_cast<std::size_t>(task % count)];
    const Segment& s = a.segments[i];
    const std::int64_t left = (s.own_end - s.own_begin) * group - first;
    forward.block(Block(a, s, task / count, first, std::min(kQueries, left)));
  });
}

std::int64_t attend_back_room(const Attention& a) {
  const std::vector<Unit> units = units_of(a);
  return units.empty() ? 0 : (units.back().before + units.back().rows()) * a.kv_heads * 2 * a.d;
}

void attend_back(const Attention& a, std::int64_t n, const float* grad, const float* out,
                 const float* logsumexp, float* g_query, float* g_key, float* g_value, float* room) {
  const Backward backward{a,       widest(), n,       grad, out,        logsumexp,
                          g_query, g_key,    g_value, room, units_of(a)};
  const std::vector<Unit>& units = backward.units;
  std::vector<std::size_t> order(units.size());  // those that take long begin first
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) {
    return units[i].cost() > units[j].cost();
  });
  share_out(static_cast<std::int64_t>(units.size()) * a.kv_heads, a.threads, [&](std::int64_t task) {
    backward.unit(units[order[static_cast<std::size_t>(task / a.kv_heads)]], task % a.kv_heads);
  });
  share_out(parts_of(n, kTokens), a.threads, [&](std::int64_t i) {
    backward.add_up(i * kTokens, std::min(n, (i + 1) * kTokens));
  });
}

}  // namespace compact

#endif
