#include "products.h"

#include "simd.h"

#if COMPACT_VECTORS && COMPACT_X86

#include "host_threads.h"
#include "room.h"
#include "tiles.h"

namespace compact {

namespace {

constexpr std::int64_t kSpan = 320;         // terms of a sum between two visits of c
constexpr std::int64_t kHeld = 160 * 1024;  // entries that wait packed, in the second cache
constexpr std::int64_t kFew = 6;             // panels, for which packing a strip of b does not pay
constexpr std::int64_t kPackedTogether = 3;  // panels packed at a time, where strips wait
constexpr std::int64_t kSame = 256;  // rows so many floats apart share a quarter of the first cache

struct Product {
  Factor a, b;
  float* c;
  std::ptrdiff_t stride;
  std::int64_t m, n, k;
  bool add;
  std::int64_t row_parts, column_parts;  // shared out in so many by so many
};

// The panels of a block of rows: as many as are needed, of nearly the same height.
struct Panels {
  std::int64_t rows, count;
  std::int64_t first(std::int64_t i) const { return rows * i / count; }
};

// One thread's rectangle of c. One factor waits packed, as much of it as the cache takes, while the
// other one passes by: strips of b by panels of a, or in a `tall` c panels by strips.
class Share {
 public:
  Share(const Product& p, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1)
      : p_(p), m0_(m0), m1_(m1), n0_(n0), n1_(n1) {
    const std::int64_t rows = m1 - m0, columns = n1 - n0;
    const std::int64_t spans = std::max<std::int64_t>(1, parts_of(p.k, kSpan));
    span_ = parts_of(parts_of(p.k, spans), kSteps) * kSteps;
    strip_size_ = span_ * kStrip;
    const std::int64_t strips = parts_of(columns, kStrip);
    tall_ = rows > columns && strips * strip_size_ <= kHeld;
    most_rows_ = (tall_ ? kPackedTogether : std::max<std::int64_t>(1, kHeld / span_ / kRows)) * kRows;
    most_columns_ = tall_ ? columns : kStrip;

    by_columns_ = p.a.column != 1;
    in_place_ = !by_columns_ && p.a.row % kSame != 0;
    apart_ = in_place_ ? p.a.row : by_columns_ ? kLanes : padded(span_);
    panel_ = by_columns_ ? padded(span_ * apart_) : apart_;
    const std::int64_t held = std::min(rows, most_rows_);
    thread_local Room a_room, b_room;
    if (!in_place_) a_ = a_room.of((by_columns_ ? parts_of(held, kRows) : held) * panel_);
    b_ = b_room.of(tall_ ? strips * strip_size_ : strip_size_);
    // a strip is read where it lies, too, if so few panels pass by that packing it would cost more
    b_in_place_ = !tall_ && p.b.column == 1 && rows <= (p.b.row % kSame != 0 ? kFew : 1) * kRows;
  }

  void run() {
    for (std::int64_t t = 0; t < p_.k; t += span_) {
      const std::int64_t k = std::min(span_, p_.k - t);
      if (tall_) pack_b(t, k, n0_, n1_ - n0_);
      for (std::int64_t i = m0_; i < m1_; i += most_rows_) {
        const std::int64_t rows = std::min(most_rows_, m1_ - i);
        const Panels panels{rows, parts_of(rows, kRows)};
        if (!in_place_) pack_a(t, k, panels, i);
        for (std::int64_t j = n0_; j < n1_; j += most_columns_) {
          const std::int64_t width = std::min(most_columns_, n1_ - j);
          if (!tall_ && !stays(width)) pack_b(t, k, j, width);
          Ahead ahead = tall_ ? after_rows(t, k, i + rows) : after_columns(t, k, j + width);
          ahead.spread_over(panels.count * parts_of(width, kStrip) * (k / kSteps));
          tiles(t, k, panels, i, j, width, ahead);
        }
      }
    }
  }

 private:
  // A size that does not bring what follows to the same place of the cache.
  static constexpr std::int64_t padded(std::int64_t size) {
    return parts_of(size, kSame) * kSame + kLine;
  }

  // Where a is read next, in a tall c.
  Ahead after_rows(std::int64_t t, std::int64_t k, std::int64_t i) const {
    const Factor& a = p_.a;
    const float* from = a.data + i * a.row + t * a.column;
    const std::int64_t rows = std::min(most_rows_, m1_ - i);
    return by_columns_ ? Ahead{from, a.column, k, rows} : Ahead{from, a.row, rows, k};
  }

  // Where b is read next, in any other.
  Ahead after_columns(std::int64_t t, std::int64_t k, std::int64_t j) const {
    if (j >= n1_) j = n0_, t += k, k = std::min(k, p_.k - t);
    const Factor& b = p_.b;
    const float* from = b.data + t * b.row + j * b.column;
    const std::int64_t columns = std::min(most_columns_, n1_ - j);
    return b.row == 1 ? Ahead{from, b.column, columns, k} : Ahead{from, b.row, k, columns};
  }

  void tiles(std::int64_t t, std::int64_t k, const Panels& panels, std::int64_t i, std::int64_t j,
             std::int64_t width, Ahead& ahead) {
    const bool add = p_.add || t > 0;
    constexpr std::make_integer_sequence<int, kRows> sizes{};
    const Tile* of = by_columns_ ? tiles_of<true>(sizes) : tiles_of<false>(sizes);
    const float* b = stays(width) ? p_.b.data + t * p_.b.row + j : b_;
    const std::ptrdiff_t next = stays(width) ? p_.b.row : kStrip;
    for (std::int64_t x = 0; x < width; x += kStrip, b += strip_size_)
      for (std::int64_t q = 0; q < panels.count; ++q) {
        const std::int64_t first = panels.first(q), rows = panels.first(q + 1) - first;
        const float* a = in_place_ ? p_.a.data + (i + first) * p_.a.row + t
                                   : a_ + (by_columns_ ? q : first) * panel_;
        float* c = p_.c + (i + first) * p_.stride + j + x;
        if (x + kStrip <= width)
          of[rows - 1](a, apart_, b, next, k, c, p_.stride, add, ahead);
        else
          edge(of[rows - 1], a, b, k, c, rows, width - x, add, ahead);
      }
  }

  // Whether a strip of b, or what is left of one, is read where it lies.
  bool stays(std::int64_t width) const { return b_in_place_ && width == kStrip; }

  // A tile of which c has not all columns.
  void edge(Tile tile, const float* a, const float* b, std::int64_t k, float* c, std::int64_t rows,
            std::int64_t width, bool add, Ahead& ahead) {
    alignas(64) float whole[kRows * kStrip];
    tile(a, apart_, b, kStrip, k, whole, kStrip, false, ahead);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t x = 0; x < width; ++x)
        c[r * p_.stride + x] = (add ? c[r * p_.stride + x] : 0.0f) + whole[r * kStrip + x];
  }

  void pack_a(std::int64_t t, std::int64_t k, const Panels& panels, std::int64_t i) {
    const Factor& a = p_.a;
    const float* from = a.data + i * a.row + t * a.column;
    if (!by_columns_) {
      for (std::int64_t r = 0; r < panels.rows; ++r)
        std::copy_n(from + r * a.row, k, a_ + r * panel_);
      return;
    }
    for (std::int64_t q = 0; q < panels.count; ++q) {
      const std::int64_t first = panels.first(q), rows = panels.first(q + 1) - first;
      float* to = a_ + q * panel_;
      if (i + first + apart_ <= p_.m) {  // more than the panel has, but in one instruction
        pack_rows<1>(from + first, a.column, k, to);
      } else {
        for (std::int64_t x = 0; x < k; ++x)
          std::copy_n(from + x * a.column + first, rows, to + x * apart_);
      }
    }
  }

  void pack_b(std::int64_t t, std::int64_t k, std::int64_t j, std::int64_t width) {
    const Factor& b = p_.b;
    const float* from = b.data + t * b.row + j * b.column;
    float* to = b_;
    for (; width >= kStrip; width -= kStrip, from += kStrip * b.column, to += strip_size_)
      if (b.row == 1)
        pack_columns(from, b.column, k, to);
      else
        pack_rows<2>(from, b.row, k, to);
    for (std::int64_t x = 0; width > 0 && x < k; ++x)  // the last strip, filled up with zeros
      for (std::int64_t y = 0; y < kStrip; ++y)
        to[x * kStrip + y] = y < width ? from[x * b.row + y * b.column] : 0.0f;
  }

  const Product& p_;
  const std::int64_t m0_, m1_, n0_, n1_;
  bool tall_, by_columns_, in_place_, b_in_place_;
  std::int64_t span_, strip_size_, most_rows_, most_columns_;
  std::ptrdiff_t apart_, panel_;  // packed rows or columns of a, and packed rows or panels
  float* a_ = nullptr;
  float* b_ = nullptr;
};

void share(void* data, int part, int parts) {
  const Product& p = *static_cast<Product*>(data);
  const std::int64_t strips = parts_of(p.n, kStrip);
  // there may be fewer threads than were asked for
  for (std::int64_t at = part; at < p.row_parts * p.column_parts; at += parts) {
    const std::int64_t row = at % p.row_parts, column = at / p.row_parts;
    const std::int64_t m0 = p.m * row / p.row_parts, m1 = p.m * (row + 1) / p.row_parts;
    const std::int64_t n0 = strips * column / p.column_parts * kStrip;
    const std::int64_t n1 = std::min(p.n, strips * (column + 1) / p.column_parts * kStrip);
    if (m0 < m1 && n0 < n1) Share(p, m0, m1, n0, n1).run();
  }
}

// Threads times the longest share's work: its tiles, and what it packs for them.
double cost(const Product& p, std::int64_t row_parts, std::int64_t column_parts) {
  const auto rows = static_cast<double>(parts_of(p.m, row_parts));
  const auto columns =
      static_cast<double>(parts_of(parts_of(p.n, kStrip), column_parts) * kStrip);
  return rows * columns + 4.0 * (rows + 2.0 * columns);
}

}  // namespace

bool can_multiply() { return simd_level() > 1; }

void multiply(const Factor& a, const Factor& b, float* c, std::ptrdiff_t stride, std::int64_t m,
              std::int64_t n, std::int64_t k, bool add, int threads) {
  Product p{a, b, c, stride, m, n, k, add, 1, 1};
  if (m * n * k < 1 << 18) threads = 1;  // too little to share
  double least = -1.0;
  for (std::int64_t rows = 1; rows <= threads; ++rows) {
    if (threads % rows != 0) continue;
    const double found = cost(p, rows, threads / rows);
    if (least >= 0.0 && found >= least) continue;
    least = found, p.row_parts = rows, p.column_parts = threads / rows;
  }
  on_host_threads(threads, share, &p);
}

}  // namespace compact

#endif
