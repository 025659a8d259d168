// A layer's work between its products, in one pass each: SwiGLU, RMS norms and rotary positions,
// forwards and back, what compact_fast/lean/rows.py does in torch's operations. All float32,
// contiguous; the same bits for every thread count and instruction set.
#pragma once

#include <cstdint>

namespace compact {

// out = silu(gate) * up, of n entries; out may be either.
void gated(const float* gate, const float* up, float* out, std::int64_t n, int threads);

// Its gradients, by that of out.
void gated_back(const float* grad, const float* gate, const float* up, float* g_gate, float* g_up,
                std::int64_t n, int threads);

// inverse [n] = 1 / sqrt(mean(x^2) + eps), out [n, m] = x * inverse * weight.
void norm(const float* x, const float* weight, float eps, float* inverse, float* out, std::int64_t n,
          std::int64_t m, int threads);

// out again, from what `norm` found.
void norm_again(const float* x, const float* weight, const float* inverse, float* out,
                std::int64_t n, std::int64_t m, int threads);

// The gradient by x; to which `more` [n, m] comes, if there is any: x had another use.
void norm_back(const float* grad, const float* x, const float* weight, const float* inverse,
               const float* more, float* g_x, std::int64_t n, std::int64_t m, int threads);

// Rotary positions: in each of n tokens' heads of d, halves (x, y) become (x c - y s, y c' + x s'),
// for cos = (c, c') and sin = (s, s') [n, d]. Of `back` the transposed: a gradient. out may be x.
void rotate(const float* x, const float* cos, const float* sin, float* out, std::int64_t n,
            std::int64_t heads, std::int64_t d, bool back, int threads);

}  // namespace compact
