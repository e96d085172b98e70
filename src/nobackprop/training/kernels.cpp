// Products of matrices, tanh, max pooling, and the step of Adam, in float32 on a CPU, in the place of torch's own.
//
// torch multiplies by MKL, which takes twice as long on AMD's processors, or by oneDNN, of which each call costs ten
// microseconds. Its tanh takes nine cycles a number, its max pooling takes longer than a convolution where channels are
// not last in memory, and its Adam divides twice where once will do. On small nets these are a third of a training step
// and more. What the functions here do not know, such as other types and factors, they leave to torch's, and so all
// errors.
//
// `Floats` is one register. GCC makes the instructions of the processor for which it is told to compile.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adam_cpu_dispatch.h>
#include <ATen/ops/_fused_adamw_cpu_dispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool2d_with_indices_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/tanh_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::Tensor;
using at::TensorList;

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 14;  // rows of a tile, of which two registers each hold sums
#else
constexpr int64_t LANES = 8, ROWS = 6;
#endif
constexpr int64_t DEPTH = 256;     // so much of a panel, two registers wide, fits into the innermost cache
constexpr int64_t MOST = 1 << 28;  // multiplications; torch's products are faster from there on
bool own_products = false, own_others = false;
using Floats [[gnu::vector_size(4 * LANES), gnu::aligned(4), gnu::may_alias]] = float;
using Ints [[gnu::vector_size(4 * LANES), gnu::aligned(4), gnu::may_alias]] = int32_t;

struct Matrix {
  const float* at;
  int64_t row, column;  // strides

  Matrix(const float* at, int64_t row, int64_t column) : at(at), row(row), column(column) {}
  explicit Matrix(const Tensor& t) : Matrix(t.const_data_ptr<float>(), t.stride(0), t.stride(1)) {}
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// c = a b + added, for `rows` rows and `vectors` registers of columns. The rows of b are contiguous. Those of `added`,
// which may be null, are `step` apart.
template <int64_t rows, int64_t vectors>
void tile(Matrix a, Matrix b, const float* added, int64_t step, float* c, int64_t c_row, int64_t depth) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Floats of_b[vectors];
    for (int64_t j = 0; j < vectors; j++) of_b[j] = *(const Floats*)(b.at + k * b.row + j * LANES);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < vectors; j++) sums[i][j] += a.at[i * a.row + k * a.column] * of_b[j];
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < vectors; j++) {
      if (added) sums[i][j] += *(const Floats*)(added + i * step + j * LANES);
      *(Floats*)(c + i * c_row + j * LANES) = sums[i][j];
    }
}

using Tile = decltype(&tile<1, 1>);

template <int64_t vectors, size_t... i>
constexpr std::array<Tile, ROWS> tiles(std::index_sequence<i...>) {
  return {tile<i + 1, vectors>...};
}

constexpr auto EACH_ROW = std::make_index_sequence<ROWS>();
constexpr std::array<std::array<Tile, ROWS>, 2> TILES = {tiles<1>(EACH_ROW), tiles<2>(EACH_ROW)};  // by vectors, rows

// Writes a square of LANES columns, each contiguous from `from` on, as rows.
void transpose(const float* from, int64_t step, float* to, int64_t to_step) {
  Floats r[LANES];
  for (int64_t i = 0; i < LANES; i++) r[i] = *(const Floats*)(from + i * step);
#pragma GCC unroll 4
  for (int64_t half = 1; half < LANES; half *= 2) {
    Ints low, high;
    for (int64_t i = 0; i < LANES; i++) {
      low[i] = i & half ? i - half + LANES : i;
      high[i] = i & half ? i + LANES : i + half;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++)
      if (!(i & half)) {
        Floats x = r[i], y = r[i + half];
        r[i] = __builtin_shuffle(x, y, low);
        r[i + half] = __builtin_shuffle(x, y, high);
      }
  }
  for (int64_t i = 0; i < LANES; i++) *(Floats*)(to + i * to_step) = r[i];
}

// The first `columns` columns of b in contiguous rows of `width`: b's own, or a copy in `room`, filled up with zeros.
Matrix panel(Matrix b, int64_t depth, int64_t columns, int64_t width, std::vector<float>& room) {
  if (b.column == 1 && columns == width) return b;
  room.resize(depth * width);
  int64_t k = 0;
  if (b.row == 1 && columns == width)
    for (; k + LANES <= depth; k += LANES)
      for (int64_t j = 0; j < width; j += LANES) transpose(b.from(k, j).at, b.column, &room[k * width + j], width);
  for (; k < depth; k++)
    for (int64_t j = 0; j < width; j++) room[k * width + j] = j < columns ? *b.from(k, j).at : 0;
  return {room.data(), width, 1};
}

// c (m, n) = a (m, depth) b (depth, n) + bias (n). The rows of c are contiguous. Threads share the rows, so each number
// is summed in the same order on any number of them.
void product(Matrix a, Matrix b, const float* bias, float* c, int64_t c_row, int64_t m, int64_t n, int64_t depth) {
  int64_t tiles = (m + ROWS - 1) / ROWS, wide = 2 * LANES;
  at::parallel_for(0, tiles, 1 + (1 << 20) / (ROWS * depth * n), [&](int64_t first, int64_t last) {
    thread_local std::vector<float> room;
    for (int64_t j = 0, width; j < n; j += width) {
      width = n - j > LANES && n >= wide ? wide : LANES;
      int64_t columns = std::min(n, width), left = std::min(j, n - columns);  // the last panel overlaps the one before
      for (int64_t k = 0, deep; k < depth; k += deep) {
        deep = std::min(DEPTH, depth - k);
        Matrix part = panel(b.from(k, left), deep, columns, width, room);
        for (int64_t t = first; t < last; t++) {
          int64_t top = t * m / tiles, rows = (t + 1) * m / tiles - top;
          Tile multiply = TILES[width / LANES - 1][rows - 1];
          float* to = c + top * c_row + left;
          const float* added = k ? to : bias ? bias + left : nullptr;
          int64_t step = k ? c_row : 0;
          if (columns == width) {
            multiply(a.from(top, k), part, added, step, to, c_row, deep);
          } else {
            float edge[ROWS * LANES] = {};
            for (int64_t i = 0; added && i < rows; i++)
              memcpy(edge + i * LANES, added + i * step, columns * sizeof(float));
            multiply(a.from(top, k), part, edge, LANES, edge, LANES, deep);
            for (int64_t i = 0; i < rows; i++) memcpy(to + i * c_row, edge + i * LANES, columns * sizeof(float));
          }
        }
      }
    }
  });
}

bool known(const Tensor& a, const Tensor& b) {
  bool matrices = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && a.dim() == 2 && b.dim() == 2;
  if (!own_products || !matrices || a.size(1) != b.size(0) || !a.numel() || !b.numel()) return false;
  return a.numel() * b.size(1) < MOST && (a.size(0) >= 4 || b.stride(1) == 1);  // few rows do not repay a copy of b
}

bool known(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  return known(a, b) && bias.scalar_type() == at::kFloat && bias.dim() == 1 && bias.size(0) == b.size(1) &&
         bias.is_contiguous() && beta.toDouble() == 1 && alpha.toDouble() == 1;
}

void product(const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& c) {
  const float* added = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* to = c.mutable_data_ptr<float>();
  product(Matrix(a), Matrix(b), added, to, c.stride(0), a.size(0), b.size(1), a.size(1));
}

Tensor product(const Tensor& a, const Tensor& b, const Tensor& bias = {}) {
  Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  product(a, b, bias, c);
  return c;
}

bool takes(const Tensor& c, const Tensor& a, const Tensor& b) {
  return c.scalar_type() == at::kFloat && c.dim() == 2 && c.size(0) == a.size(0) && c.size(1) == b.size(1);
}

Tensor& product_out(const Tensor& a, const Tensor& b, const Tensor& bias, Tensor& c) {
  bool rows = c.stride(1) == 1 && c.stride(0) >= c.size(1);
  if (!rows || c.is_alias_of(a) || c.is_alias_of(b) || (bias.defined() && c.is_alias_of(bias)))
    return c.copy_(product(a, b, bias));
  product(a, b, bias, c);
  return c;
}

Tensor mm(const Tensor& a, const Tensor& b) { return known(a, b) ? product(a, b) : at::cpu::mm(a, b); }

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& c) {
  return known(a, b) && takes(c, a, b) ? product_out(a, b, {}, c) : at::cpu::mm_out(c, a, b);
}

Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  return known(bias, a, b, beta, alpha) ? product(a, b, bias) : at::cpu::addmm(bias, a, b, beta, alpha);
}

Tensor& addmm_out(
    const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha, Tensor& c) {
  if (!known(bias, a, b, beta, alpha) || !takes(c, a, b)) return at::cpu::addmm_out(c, bias, a, b, beta, alpha);
  return product_out(a, b, bias, c);
}

// e^x for x from 0 to 20, as 2^n e^r with |r| <= log(2) / 2 (the coefficients of Cephes' expf).
Floats exponential(Floats x) {
  constexpr float SHIFT = 3 << 22;  // a number to which it is added is rounded to an integer
  Floats shifted = x * 1.44269504089f + SHIFT, n = shifted - SHIFT;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1) * (Floats)(((Ints)shifted << 23) + (127 << 23));
}

// tanh within 1.5 units in the last place: a polynomial near zero (Cephes' tanhf), and 1 - 2 / (e^2x + 1) elsewhere.
Floats hyperbolic_tangent(Floats x) {
  Ints sign = (Ints)x & INT32_MIN;
  Floats size = (Floats)((Ints)x ^ sign), s = x * x;
  Floats p = -5.70498872745e-3f * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  Floats near = p * s * size + size;
  Floats far = 1 - 2 / (exponential(2 * (size < 10 ? size : Floats{} + 10)) + 1);
  Floats y = (Floats)((Ints)(size < 0.625f ? near : far) | sign);
  return x == x ? y : x;
}

void hyperbolic_tangent(const Tensor& x, const Tensor& y) {
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), 1 << 15, [&](int64_t i, int64_t end) {
    for (; i + LANES <= end; i += LANES) *(Floats*)(to + i) = hyperbolic_tangent(*(const Floats*)(from + i));
    Floats rest{};
    memcpy(&rest, from + i, (end - i) * sizeof(float));
    rest = hyperbolic_tangent(rest);
    memcpy(to + i, &rest, (end - i) * sizeof(float));
  });
}

Tensor& tanh_out(const Tensor& x, Tensor& y) {
  bool floats = x.scalar_type() == at::kFloat && y.scalar_type() == at::kFloat && y.sizes() == x.sizes();
  bool shifted = y.is_alias_of(x) && y.const_data_ptr() != x.const_data_ptr();  // an error
  if (!own_others || !floats || shifted) return at::cpu::tanh_out(y, x);
  if (!x.is_non_overlapping_and_dense() || y.strides() != x.strides()) return y.copy_(x.contiguous().tanh());
  hyperbolic_tangent(x, y);
  return y;
}

Tensor tanh_new(const Tensor& x) {
  if (!own_others || x.scalar_type() != at::kFloat) return at::cpu::tanh(x);
  Tensor y = at::empty_like(x);
  return tanh_out(x, y);
}

// Windows of `size` x `size` pixels, `step` apart, without a border.
struct Pooling {
  int64_t size, step;

  int64_t outputs(int64_t pixels) const { return (pixels - size) / step + 1; }
};

// Takes, for each of n windows, the pixel that is `further` behind its first one, where it is larger than what was taken
// before, and the pixel's number in its image. A NaN counts as larger, as for torch.
void take_larger(
    const float* from, const int32_t* first, const int32_t* number, int32_t further, float* taken, int32_t* at,
    int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    float x = from[first[i] + further];
    bool larger = (x > taken[i]) | (x != x);
    taken[i] = larger ? x : taken[i];
    at[i] = larger ? number[i] + further : at[i];
  }
}

// The largest of each window, and where it is. Small images are taken several at a time, so that inner loops are long.
void max_pool(const Tensor& x, Pooling pooling, const Tensor& y, const Tensor& where) {
  int64_t width = x.size(-1), pixels = x.size(-2) * width, images = x.numel() / pixels;
  int64_t columns = y.size(-1), windows = y.size(-2) * columns, most = 1 + 512 / windows;
  std::vector<int32_t> first(most * windows), number(most * windows);
  for (int64_t i = 0; i < most * windows; i++) {
    number[i] = (i % windows / columns * width + i % columns) * pooling.step;
    first[i] = i / windows * pixels + number[i];
  }
  const float* from = x.const_data_ptr<float>();
  float* taken = y.mutable_data_ptr<float>();
  int64_t* places = where.mutable_data_ptr<int64_t>();
  std::fill_n(taken, y.numel(), -INFINITY);
  at::parallel_for(0, (images + most - 1) / most, 1 + (1 << 15) / (most * pixels), [&](int64_t turn, int64_t end) {
    std::vector<int32_t> at;
    for (; turn < end; turn++) {
      int64_t image = turn * most, n = std::min(most, images - image) * windows;
      at = number;
      for (int64_t row = 0; row < pooling.size; row++)
        for (int64_t column = 0; column < pooling.size; column++)
          take_larger(
              from + image * pixels, first.data(), number.data(), row * width + column, taken + image * windows,
              at.data(), n);
      std::copy_n(at.data(), n, places + image * windows);
    }
  });
}

// The windows that torch's arguments stand for, where `max_pool` knows them.
std::optional<Pooling> pooling(
    const Tensor& x, IntArrayRef size, IntArrayRef step, IntArrayRef padding, IntArrayRef apart, bool partly) {
  bool images = x.scalar_type() == at::kFloat && (x.dim() == 3 || x.dim() == 4) && x.is_contiguous() && x.numel();
  if (!own_others || !images || partly || x.size(-2) * x.size(-1) > 1 << 20) return {};
  if (step.empty()) step = size;
  for (IntArrayRef given : {size, step, padding, apart})
    if (given.size() < 1 || given.size() > 2 || given.front() != given.back() || given[0] > 1 << 20) return {};
  if (size[0] < 1 || step[0] < 1 || padding[0] != 0 || apart[0] != 1) return {};
  if (std::min(x.size(-2), x.size(-1)) < size[0]) return {};
  return Pooling{size[0], step[0]};
}

std::vector<int64_t> pooled_shape(const Tensor& x, Pooling pooling) {
  std::vector<int64_t> shape = x.sizes().vec();
  for (int64_t axis = x.dim() - 2; axis < x.dim(); axis++) shape[axis] = pooling.outputs(shape[axis]);
  return shape;
}

std::tuple<Tensor&, Tensor&> max_pool_out(
    const Tensor& x, IntArrayRef size, IntArrayRef step, IntArrayRef padding, IntArrayRef apart, bool partly,
    Tensor& y, Tensor& where) {
  auto known = pooling(x, size, step, padding, apart, partly);
  auto takes = [&](const Tensor& t, at::ScalarType type) {
    return t.scalar_type() == type && t.is_contiguous() && !t.is_alias_of(x) && t.sizes() == pooled_shape(x, *known);
  };
  if (!known || !takes(y, at::kFloat) || !takes(where, at::kLong) || y.is_alias_of(where))
    return at::cpu::max_pool2d_with_indices_out(y, where, x, size, step, padding, apart, partly);
  max_pool(x, *known, y, where);
  return {y, where};
}

std::tuple<Tensor, Tensor> max_pool_new(
    const Tensor& x, IntArrayRef size, IntArrayRef step, IntArrayRef padding, IntArrayRef apart, bool partly) {
  auto known = pooling(x, size, step, padding, apart, partly);
  if (!known) return at::cpu::max_pool2d_with_indices(x, size, step, padding, apart, partly);
  std::vector<int64_t> shape = pooled_shape(x, *known);
  Tensor y = at::empty(shape, x.options()), where = at::empty(shape, x.options().dtype(at::kLong));
  max_pool(x, *known, y, where);
  return {y, where};
}

Floats square_root(Floats x) {
  for (int64_t i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
  return x;
}

// A step of Adam, or of AdamW where weight decay is `decoupled` from the gradient.
struct Adam {
  bool decoupled;
  float decay, keep, beta1, beta2, of_g, of_g2, rate, root, eps;

  Adam(bool decoupled, double step, double lr, double beta1, double beta2, double decay, double eps)
      : decoupled(decoupled),
        decay(decay),
        keep(1 - lr * decay),
        beta1(beta1),
        beta2(beta2),
        of_g(1 - beta1),
        of_g2(1 - beta2),
        rate(lr / (1 - std::pow(beta1, step))),
        root(1 / std::sqrt(1 - std::pow(beta2, step))),
        eps(eps) {}

  void operator()(Floats& w, const Floats& gradient, Floats& m, Floats& v) const {
    Floats g = gradient;
    if (decay && decoupled) w *= keep;
    if (decay && !decoupled) g += decay * w;
    m = beta1 * m + of_g * g;
    v = beta2 * v + of_g2 * g * g;
    w -= rate * m / (square_root(v) * root + eps);
  }

  // For n numbers each of a weight, its gradient, and their means. RMSprop gives the gradient as its own mean.
  void operator()(float* w, float* g, float* m, float* v, int64_t n) const {
    at::parallel_for(0, n, 1 << 15, [=, this](int64_t i, int64_t end) {
      for (; i + LANES <= end; i += LANES)
        (*this)(*(Floats*)(w + i), *(Floats*)(g + i), *(Floats*)(m + i), *(Floats*)(v + i));
      Floats rest[4] = {};
      float* from[4] = {w + i, g + i, m + i, v + i};
      for (int64_t j = 0; j < 4; j++) memcpy(&rest[j], from[j], (end - i) * sizeof(float));
      (*this)(rest[0], rest[1], rest[2], rest[3]);
      for (int64_t j : {0, 2, 3}) memcpy(from[j], &rest[j], (end - i) * sizeof(float));
    });
  }
};

bool alike(const Tensor& t, const Tensor& w) {
  return t.scalar_type() == at::kFloat && t.is_non_overlapping_and_dense() && t.strides() == w.strides();
}

using Steps = void(
    TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, double, double, double, double, double,
    bool, bool, const std::optional<Tensor>&, const std::optional<Tensor>&);

template <bool decoupled, Steps torchs>
void adam(
    TensorList w, TensorList g, TensorList m, TensorList v, TensorList largest, TensorList step, double lr,
    double beta1, double beta2, double decay, double eps, bool amsgrad, bool maximize,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& overflow) {
  bool known = own_others && !amsgrad && !maximize && !scale && !overflow;
  for (size_t i = 0; known && i < w.size(); i++)
    known = alike(w[i], w[i]) && alike(g[i], w[i]) && alike(m[i], w[i]) && alike(v[i], w[i]);
  if (!known)
    return torchs(w, g, m, v, largest, step, lr, beta1, beta2, decay, eps, amsgrad, maximize, scale, overflow);
  for (size_t i = 0; i < w.size(); i++) {
    auto at = [i](TensorList list) { return list[i].mutable_data_ptr<float>(); };
    Adam(decoupled, step[i].item<float>(), lr, beta1, beta2, decay, eps)(at(w), at(g), at(m), at(v), w[i].numel());
  }
}

void use(bool products, bool others) {
  own_products = products;
  own_others = others;
}

}  // namespace

TORCH_LIBRARY(nobackprop, library) {
  library.def("use(bool products, bool others) -> ()", use);
  library.def("used() -> bool", [] { return own_others; });
}

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("mm", mm);
  library.impl("mm.out", mm_out);
  library.impl("addmm", addmm);
  library.impl("addmm.out", addmm_out);
  library.impl("tanh", tanh_new);
  library.impl("tanh.out", tanh_out);
  library.impl("tanh_", [](Tensor& x) -> Tensor& { return tanh_out(x, x); });
  library.impl("max_pool2d_with_indices", max_pool_new);
  library.impl("max_pool2d_with_indices.out", max_pool_out);
  library.impl("_fused_adam_", adam<false, at::cpu::_fused_adam_>);
  library.impl("_fused_adamw_", adam<true, at::cpu::_fused_adamw_>);
}
