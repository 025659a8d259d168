// The Python module: arrays in, arrays out, the GIL released around all work. Arguments are checked
// by compact_fast.graphs, the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "attention.h"
#include "consensus.h"
#include "dropout.h"
#include "layers.h"
#include "pairs.h"
#include "parallel.h"
#include "products.h"
#include "row_softmax.h"
#include "simd.h"

namespace py = pybind11;
using namespace compact;

namespace {

constexpr int kAbi = 9;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The array owns the vector's memory: nothing is copied.
template <class T>
py::array_t<T> to_array(std::vector<T>&& values) {
  auto held = std::make_unique<std::vector<T>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(held->size());
  const T* data = held->data();
  py::capsule owner(held.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  held.release();
  return py::array_t<T>(size, data, owner);
}

template <class T>
std::vector<T> to_vector(const py::handle& object) {
  auto array = Array<T>::ensure(object);
  if (!array) throw py::error_already_set();
  return std::vector<T>(array.data(), array.data() + array.size());
}

// Views of the strings' UTF-8; valid while the list lives and is unchanged.
std::vector<std::string_view> views(const py::list& texts, std::vector<std::uint8_t>* given = nullptr) {
  std::vector<std::string_view> out;
  out.reserve(texts.size());
  if (given) given->reserve(texts.size());
  for (py::handle text : texts) {
    if (given) given->push_back(!text.is_none());
    if (given && text.is_none()) {
      out.emplace_back();
      continue;
    }
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();
    out.emplace_back(data, static_cast<std::size_t>(size));
  }
  return out;
}

Options read_options(const py::dict& d) {
  Options o;
  auto get = [&](const char* name) { return d[name].cast<std::int64_t>(); };
  auto small = [&](const char* name) { return static_cast<std::int32_t>(get(name)); };
  o.weight_result = small("weight_result");
  o.weight_numbers = small("weight_numbers");
  o.weight_operators = small("weight_operators");
  o.weight_text = small("weight_text");
  o.weight_embedding = small("weight_embedding");
  o.ramp_low = small("ramp_low");
  o.ramp_high = small("ramp_high");
  o.step_stated = small("step_stated");
  o.step_numbers = small("step_numbers");
  o.step_words = small("step_words");
  o.edge_half[kNext] = small("edge_next");
  o.edge_half[kUses] = small("edge_uses");
  o.answer_share = small("answer_share");
  o.soundness = small("soundness");
  o.dedupe = small("dedupe");
  o.dedupe_min_shingles = small("dedupe_min_shingles");
  o.max_steps = get("max_steps");
  o.max_bytes = get("max_bytes");
  return o;
}

ConsensusOptions read_consensus(const py::dict& d) {
  ConsensusOptions o;
  o.graph = read_options(d);
  o.mode = static_cast<Mode>(d["mode"].cast<int>());
  o.centrality = static_cast<Centrality>(d["centrality"].cast<int>());
  o.node_budget = d["node_budget"].cast<std::int64_t>();
  o.cluster_at = d["cluster_at"].cast<std::int64_t>();
  return o;
}

py::dict graphs_out(std::vector<StepGraphs>& parts, int threads) {
  py::dict d;
  Join join(parts, [&](const char* name, std::size_t count, auto value) {
    using Value = decltype(value);
    const auto rows = static_cast<py::ssize_t>(count);
    if constexpr (std::is_same_v<Value, Signature>) {
      py::array_t<std::uint64_t> array({rows, py::ssize_t{8}});
      d[name] = array;
      return reinterpret_cast<Signature*>(array.mutable_data());
    } else {
      py::array_t<Value> array(rows);
      d[name] = array;
      return array.mutable_data();
    }
  });
  {
    py::gil_scoped_release release;
    join.run(threads);
  }
  return d;
}

StepGraphs graphs_in(const py::dict& d) {
  StepGraphs g;
  each_column([&](const char* name, auto member, bool) {
    using Value = typename std::decay_t<decltype(g.*member)>::value_type;
    if constexpr (std::is_same_v<Value, Signature>) {
      auto array = Array<std::uint64_t>::ensure(d[name]);
      if (!array) throw py::error_already_set();
      g.signature.resize(static_cast<std::size_t>(array.shape(0)));
      if (!g.signature.empty()) std::memcpy(g.signature.data(), array.data(), array.nbytes());
    } else {
      g.*member = to_vector<Value>(d[name]);
    }
  });
  return g;
}

void raise_on(const ParseError& error) {
  if (error.text < 0) return;
  // ("text index", "reason"): compact_fast.graphs names question and teacher
  PyErr_SetObject(PyExc_OverflowError, py::make_tuple(error.text, error.reason).ptr());
  throw py::error_already_set();
}

py::dict parse(const py::list& texts, const py::dict& options, int threads) {
  const Options o = read_options(options);
  const auto all = views(texts);
  std::vector<StepGraphs> parts;
  ParseError error;
  {
    py::gil_scoped_release release;
    parse_all(all, o, threads, parts, error);
  }
  raise_on(error);
  return graphs_out(parts, threads);
}

py::tuple answer_keys(const py::list& answers) {
  std::vector<std::uint8_t> given;
  const auto all = views(answers, &given);
  std::vector<std::int64_t> keys(all.size(), 0);
  {
    py::gil_scoped_release release;
    Parser parser;
    for (std::size_t s = 0; s < all.size(); ++s)
      if (given[s] && !parser.answer_key(all[s], keys[s])) given[s] = 0;
  }
  return py::make_tuple(to_array(std::move(keys)), to_array(std::move(given)));
}

Embeddings embedding_rows(const py::object& array, Array<std::int8_t>& hold) {
  if (array.is_none()) return {};
  hold = Array<std::int8_t>::ensure(array);
  return {hold.data(), hold.shape(1)};
}

py::tuple match_graphs(const py::dict& graphs, const py::object& embedding,
                       const Array<std::int64_t>& pairs, const py::dict& options, int threads) {
  const ConsensusOptions o = read_consensus(options);
  const StepGraphs g = graphs_in(graphs);
  Array<std::int8_t> hold;
  const Embeddings e = embedding_rows(embedding, hold);
  const auto count = pairs.shape(0);
  const std::int64_t* pair = pairs.data();
  std::vector<std::int64_t> cu{0};
  for (py::ssize_t p = 0; p < count; ++p)
    cu.push_back(cu.back() + g.cu_nodes[pair[2 * p] + 1] - g.cu_nodes[pair[2 * p]]);
  std::vector<std::int64_t> value(count), bound(count), self(2 * count);
  std::vector<std::uint8_t> proven(count);
  std::vector<std::int32_t> assigned(cu.back());
  {
    py::gil_scoped_release release;
    parallel_for(count, 64, threads, [&](std::int64_t begin, std::int64_t end, int) {
      QuestionScorer scorer(o);
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t a = pair[2 * p], b = pair[2 * p + 1];
        const MatchOutcome out = scorer.match(g, a, b, e, assigned.data() + cu[p]);
        value[p] = out.value, bound[p] = out.bound, proven[p] = out.proven;
        self[2 * p] = scorer.self_match(g, a, e.rows != nullptr);
        self[2 * p + 1] = scorer.self_match(g, b, e.rows != nullptr);
      }
    });
  }
  return py::make_tuple(to_array(std::move(value)), to_array(std::move(bound)),
                        to_array(std::move(proven)), to_array(std::move(self)),
                        to_array(std::move(cu)), to_array(std::move(assigned)));
}

// Pairs given by their similarity matrices: pair p has sizes[p] = (n, m), similarity from cu[p], and
// edges [cu_a[p], cu_a[p+1]) and [cu_b[p], cu_b[p+1]).
py::tuple match_arrays(const Array<std::int32_t>& similarity, const Array<std::int64_t>& cu,
                       const Array<std::int64_t>& sizes, const py::list& edges_a,
                       const py::list& edges_b, const Array<std::int64_t>& half, int mode,
                       std::int64_t budget, int threads) {
  struct Edges {
    std::vector<std::int64_t> cu;
    std::vector<std::int32_t> source, target;
    std::vector<std::uint8_t> type;
    explicit Edges(const py::list& l)
        : cu(to_vector<std::int64_t>(l[0])), source(to_vector<std::int32_t>(l[1])),
          target(to_vector<std::int32_t>(l[2])), type(to_vector<std::uint8_t>(l[3])) {}
    EdgeList of(std::int64_t p) const {
      return {source.data() + cu[p], target.data() + cu[p], type.data() + cu[p], cu[p + 1] - cu[p]};
    }
  };
  const Edges ea(edges_a), eb(edges_b);
  const auto count = sizes.shape(0);
  const std::int64_t* size = sizes.data();
  const std::int64_t* start = cu.data();
  const std::int32_t* s = similarity.data();
  const std::int32_t weights[kEdgeTypes] = {static_cast<std::int32_t>(half.at(0)),
                                            static_cast<std::int32_t>(half.at(1))};
  std::vector<std::int64_t> rows{0};
  for (py::ssize_t p = 0; p < count; ++p) rows.push_back(rows.back() + size[2 * p]);
  std::vector<std::int64_t> value(count), bound(count);
  std::vector<std::uint8_t> proven(count);
  std::vector<std::int32_t> assigned(rows.back());
  {
    py::gil_scoped_release release;
    const std::int64_t chunk = mode == static_cast<int>(Mode::kRelaxed) ? 128 : 16;  // some 200 us
    parallel_for(count, chunk, threads, [&](std::int64_t begin, std::int64_t end, int) {
      Matcher matcher;
      for (std::int64_t p = begin; p < end; ++p) {
        const MatchOutcome out =
            matcher.match(static_cast<Mode>(mode), s + start[p], size[2 * p], size[2 * p + 1],
                          ea.of(p), eb.of(p), weights, budget, assigned.data() + rows[p]);
        value[p] = out.value, bound[p] = out.bound, proven[p] = out.proven;
      }
    });
  }
  return py::make_tuple(to_array(std::move(value)), to_array(std::move(bound)),
                        to_array(std::move(proven)), to_array(std::move(rows)),
                        to_array(std::move(assigned)));
}

py::tuple assignment(const Array<std::int32_t>& weights, const Array<std::int64_t>& cu,
                     const Array<std::int64_t>& sizes, int threads) {
  const auto count = sizes.shape(0);
  const std::int64_t *size = sizes.data(), *start = cu.data();
  const std::int32_t* w = weights.data();
  std::vector<std::int64_t> rows{0}, value(count);
  for (py::ssize_t p = 0; p < count; ++p) rows.push_back(rows.back() + size[2 * p]);
  std::vector<std::int32_t> assigned(rows.back());
  {
    py::gil_scoped_release release;
    parallel_for(count, 64, threads, [&](std::int64_t begin, std::int64_t end, int) {
      Assignment lap;
      for (std::int64_t p = begin; p < end; ++p)
        value[p] = lap.solve(w + start[p], size[2 * p], size[2 * p + 1], assigned.data() + rows[p]);
    });
  }
  return py::make_tuple(to_array(std::move(value)), to_array(std::move(rows)),
                        to_array(std::move(assigned)));
}

std::vector<std::int64_t> agreement_offsets(const std::vector<std::int64_t>& cu) {
  std::vector<std::int64_t> out{0};
  for (std::size_t q = 1; q < cu.size(); ++q) {
    const std::int64_t k = cu[q] - cu[q - 1];
    out.push_back(out.back() + k * k);
  }
  return out;
}

struct Scores {
  explicit Scores(const std::vector<std::int64_t>& cu)
      : cu_agreement(agreement_offsets(cu)), agreement(cu_agreement.back()), score(cu.back()),
        group(cu.back()), flags(cu.size() - 1) {}
  std::vector<std::int64_t> cu_agreement, agreement;
  std::vector<double> score;
  std::vector<std::int32_t> group;
  std::vector<std::uint8_t> flags;
  py::tuple out() {
    return py::make_tuple(to_array(std::move(agreement)), to_array(std::move(score)),
                          to_array(std::move(group)), to_array(std::move(flags)));
  }
};

py::tuple score_texts(const py::list& texts, const Array<std::int64_t>& cu_teachers,
                      const py::object& answers, const py::dict& options, int threads) {
  const ConsensusOptions o = read_consensus(options);
  const auto all = views(texts);
  std::vector<std::uint8_t> given;
  std::vector<std::string_view> finals;
  if (!answers.is_none()) finals = views(answers.cast<py::list>(), &given);
  const auto cu = to_vector<std::int64_t>(cu_teachers);
  Scores s(cu);
  ParseError error;
  {
    py::gil_scoped_release release;
    score_questions(all, cu, finals, given, o, threads, s.cu_agreement, s.agreement.data(),
                    s.score.data(), s.group.data(), s.flags.data(), error);
  }
  raise_on(error);
  return s.out();
}

py::tuple score_graphs(const py::dict& graphs, const py::object& embedding,
                       const Array<std::int64_t>& cu_teachers, const py::dict& options, int threads) {
  const ConsensusOptions o = read_consensus(options);
  const StepGraphs g = graphs_in(graphs);
  Array<std::int8_t> hold;
  const Embeddings e = embedding_rows(embedding, hold);
  const auto cu = to_vector<std::int64_t>(cu_teachers);
  Scores s(cu);
  {
    py::gil_scoped_release release;
    parallel_for(static_cast<std::int64_t>(cu.size()) - 1, 16, threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                   QuestionScorer scorer(o);
                   for (std::int64_t q = begin; q < end; ++q)
                     s.flags[q] = scorer.question(g, cu[q], cu[q + 1], e,
                                                  s.agreement.data() + s.cu_agreement[q],
                                                  s.score.data() + cu[q], s.group.data() + cu[q]);
                 });
  }
  return s.out();
}

#if COMPACT_VECTORS && COMPACT_X86
// Addresses of torch's memory.
void multiply_at(std::uintptr_t a, std::ptrdiff_t a_row, std::ptrdiff_t a_column, std::uintptr_t b,
                 std::ptrdiff_t b_row, std::ptrdiff_t b_column, std::uintptr_t c,
                 std::ptrdiff_t stride, std::int64_t m, std::int64_t n, std::int64_t k, bool add,
                 int threads) {
  py::gil_scoped_release release;
  multiply({reinterpret_cast<const float*>(a), a_row, a_column},
           {reinterpret_cast<const float*>(b), b_row, b_column}, reinterpret_cast<float*>(c), stride,
           m, n, k, add, threads);
}
#endif

#if COMPACT_VECTORS
// Addresses of torch's memory; 0 for null.
void softmax_rows(std::uintptr_t z, std::ptrdiff_t stride, std::int64_t n, std::int64_t width,
                  std::int64_t first, std::uintptr_t target, std::uintptr_t peak,
                  std::uintptr_t rest, std::uintptr_t at_target, std::uintptr_t weighted,
                  std::uintptr_t preceded, std::uintptr_t shrink, std::int64_t raw_begin,
                  std::int64_t raw_end, int threads) {
  auto floats = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const RunningRows rows{reinterpret_cast<const std::int64_t*>(target), floats(peak), floats(rest),
                         floats(at_target), floats(weighted),
                         reinterpret_cast<std::uint8_t*>(preceded), raw_begin, raw_end};
  py::gil_scoped_release release;
  update_rows(floats(z), stride, n, width, first, rows, floats(shrink), threads);
}

RowSets row_sets(std::uintptr_t z, std::ptrdiff_t stride, std::int64_t width, std::int64_t count,
                 std::uintptr_t cu, std::uintptr_t members, std::uintptr_t logsumexp) {
  return {reinterpret_cast<float*>(z), stride, width, count,
          reinterpret_cast<const std::int64_t*>(cu),
          reinterpret_cast<const std::int64_t*>(members),
          reinterpret_cast<const double*>(logsumexp)};
}

void pair_divergences(std::uintptr_t z, std::ptrdiff_t stride, std::int64_t width,
                      std::int64_t count, std::uintptr_t cu, std::uintptr_t members,
                      std::uintptr_t logsumexp, std::uintptr_t kl, int threads) {
  py::gil_scoped_release release;
  add_divergences(row_sets(z, stride, width, count, cu, members, logsumexp),
                  reinterpret_cast<double*>(kl), threads);
}

void pair_gradients(std::uintptr_t z, std::ptrdiff_t stride, std::int64_t width,
                    std::int64_t count, std::uintptr_t cu, std::uintptr_t members,
                    std::uintptr_t logsumexp, std::uintptr_t constant, std::uintptr_t c,
                    int threads) {
  py::gil_scoped_release release;
  divergence_gradients(row_sets(z, stride, width, count, cu, members, logsumexp),
                       reinterpret_cast<const float*>(constant), reinterpret_cast<const float*>(c),
                       threads);
}

void dropout_apply(std::uintptr_t x, int size, std::uint64_t seed, std::uint32_t most,
                   std::uintptr_t out, std::int64_t n, int threads) {
  py::gil_scoped_release release;
  drop(reinterpret_cast<const void*>(x), size, {seed, most}, reinterpret_cast<void*>(out), n,
       threads);
}

void dropout_add(std::uintptr_t x, std::uint64_t seed, std::uint32_t most, std::uintptr_t out,
                 std::int64_t n, int threads) {
  py::gil_scoped_release release;
  add_kept(reinterpret_cast<const float*>(x), {seed, most}, reinterpret_cast<float*>(out), n,
           threads);
}

float* floats_at(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

void gate_rows(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, std::int64_t n,
               int threads) {
  py::gil_scoped_release release;
  gated(floats_at(gate), floats_at(up), floats_at(out), n, threads);
}

void gate_gradients(std::uintptr_t grad, std::uintptr_t gate, std::uintptr_t up,
                    std::uintptr_t g_gate, std::uintptr_t g_up, std::int64_t n, int threads) {
  py::gil_scoped_release release;
  gated_back(floats_at(grad), floats_at(gate), floats_at(up), floats_at(g_gate), floats_at(g_up), n,
             threads);
}

void norm_rows(std::uintptr_t x, std::uintptr_t weight, float eps, std::uintptr_t inverse,
               std::uintptr_t out, std::int64_t n, std::int64_t m, int threads) {
  py::gil_scoped_release release;
  norm(floats_at(x), floats_at(weight), eps, floats_at(inverse), floats_at(out), n, m, threads);
}

void norm_rows_again(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t inverse,
                     std::uintptr_t out, std::int64_t n, std::int64_t m, int threads) {
  py::gil_scoped_release release;
  norm_again(floats_at(x), floats_at(weight), floats_at(inverse), floats_at(out), n, m, threads);
}

void norm_gradient(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight,
                   std::uintptr_t inverse, std::uintptr_t more, std::uintptr_t g_x, std::int64_t n,
                   std::int64_t m, int threads) {
  py::gil_scoped_release release;
  norm_back(floats_at(grad), floats_at(x), floats_at(weight), floats_at(inverse), floats_at(more),
            floats_at(g_x), n, m, threads);
}

void rotate_heads(std::uintptr_t x, std::uintptr_t cos, std::uintptr_t sin, std::uintptr_t out,
                  std::int64_t n, std::int64_t heads, std::int64_t d, bool back, int threads) {
  py::gil_scoped_release release;
  rotate(floats_at(x), floats_at(cos), floats_at(sin), floats_at(out), n, heads, d, back, threads);
}

Attention attention_at(std::uintptr_t query, std::ptrdiff_t query_stride, std::uintptr_t key,
                       std::ptrdiff_t key_stride, std::uintptr_t value,
                       std::ptrdiff_t value_stride, std::uintptr_t segments, std::int64_t count,
                       std::int64_t heads, std::int64_t kv_heads, std::int64_t d,
                       std::int64_t window, float scale, int threads) {
  return {{floats_at(query), query_stride},
          {floats_at(key), key_stride},
          {floats_at(value), value_stride},
          reinterpret_cast<const Segment*>(segments),
          count,
          heads,
          kv_heads,
          d,
          window,
          scale,
          threads};
}

void attend_at(const Attention& a, std::int64_t n, std::uintptr_t out, std::uintptr_t logsumexp) {
  py::gil_scoped_release release;
  attend(a, n, floats_at(out), floats_at(logsumexp));
}

void attend_back_at(const Attention& a, std::int64_t n, std::uintptr_t grad, std::uintptr_t out,
                    std::uintptr_t logsumexp, std::uintptr_t g_query, std::uintptr_t g_key,
                    std::uintptr_t g_value, std::uintptr_t room) {
  py::gil_scoped_release release;
  attend_back(a, n, floats_at(grad), floats_at(out), floats_at(logsumexp), floats_at(g_query),
              floats_at(g_key), floats_at(g_value), floats_at(room));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("abi") = kAbi;
  m.def("simd_level", &simd_level);
  m.def("force_simd_level", &force_simd_level);
  m.def("parse", &parse);
  m.def("answer_keys", &answer_keys);
  m.def("match_graphs", &match_graphs);
  m.def("match_arrays", &match_arrays);
  m.def("assignment", &assignment);
  m.def("score_texts", &score_texts);
  m.def("score_graphs", &score_graphs);
#if COMPACT_VECTORS && COMPACT_X86
  m.def("can_multiply", &can_multiply);
  m.def("multiply", &multiply_at);
#endif
#if COMPACT_VECTORS
  m.def("softmax_rows", &softmax_rows);
  m.attr("most_compared") = kMostCompared;
  m.def("pair_divergences", &pair_divergences);
  m.def("pair_gradients", &pair_gradients);
  m.def("dropout_apply", &dropout_apply);
  m.def("dropout_add", &dropout_add);
  m.def("gated", &gate_rows);
  m.def("gated_back", &gate_gradients);
  m.def("norm", &norm_rows);
  m.def("norm_again", &norm_rows_again);
  m.def("norm_back", &norm_gradient);
  m.def("rotate", &rotate_heads);
  py::class_<Attention>(m, "Attention").def(py::init(&attention_at));
  m.def("attend", &attend_at);
  m.def("attend_back", &attend_back_at);
  m.def("attend_back_room", &attend_back_room);
  m.attr("most_seen") = kMostSeen;
  m.attr("most_width") = kMostWidth;
#endif
}
