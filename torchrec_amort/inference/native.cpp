// The two phases of AmortizedHistoryArch, and what a DLRM makes of its vectors, on a CPU, a tile of rows at a time.
//
// A tile is [D][ROWS]: its rows stand in the lanes of vector registers. So a linear layer is a product of the weights
// as torch stores them with a tile, norms and softmax need no sums across lanes, and a tile goes through all layers
// without leaving the cache of its core. Candidates need nothing of each other: their tiles never wait.
//
// Letters: N history events and C candidates, all requests together; n events of one request; D model dimension; H
// heads of dimension K; F width of the feed-forward networks; L layers; R vectors of a request and U of a candidate
// that a DLRM interacts; T tasks.
//
// T is the type of weights, keys, values and whatever is multiplied: float, or bfloat16 where the processor multiplies
// pairs of them. Sums, norms, softmax and what is passed from layer to layer are float in either case.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, BLOCK = 8;
#else
constexpr int LANES = 8, BLOCK = 4;
#endif
constexpr long KEYS = 128;  // keys whose products with a tile are in cache at once

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

// One row of a tile: V vectors, that is, ROWS = V * LANES numbers. Tiles of one vector are for few rows.
template <int V>
constexpr int ROWS = V * LANES;
template <int V>
struct Row {
  Vector vector[V];
};

inline Vector all(float value) { return value - Vector{}; }

template <int V, class Function>
inline Row<V> each(const Function& function) {
  Row<V> result;
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) result.vector[i] = function(i);
  return result;
}
template <int V>
inline Row<V> load(const float* from) {
  return each<V>([&](int i) -> Vector { return reinterpret_cast<const Unaligned*>(from)[i]; });
}
template <int V>
inline void save(float* to, Row<V> row) {
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) reinterpret_cast<Unaligned*>(to)[i] = row.vector[i];
}
template <int V>
inline Row<V> same(float value) {
  return each<V>([&](int) { return all(value); });
}
template <int V>
inline Row<V> operator+(Row<V> a, Row<V> b) {
  return each<V>([&](int i) { return a.vector[i] + b.vector[i]; });
}
template <int V>
inline Row<V> operator-(Row<V> a, Row<V> b) {
  return each<V>([&](int i) { return a.vector[i] - b.vector[i]; });
}
template <int V>
inline Row<V> operator*(Row<V> a, Row<V> b) {
  return each<V>([&](int i) { return a.vector[i] * b.vector[i]; });
}
template <int V>
inline Row<V> operator+(Row<V> a, float b) {
  return each<V>([&](int i) { return a.vector[i] + b; });
}
template <int V>
inline Row<V> operator*(Row<V> a, float b) {
  return each<V>([&](int i) { return a.vector[i] * b; });
}
template <int V>
inline Row<V> maximum(Row<V> a, Row<V> b) {  // b where it is not a number
  return each<V>([&](int i) { return a.vector[i] > b.vector[i] ? a.vector[i] : b.vector[i]; });
}

// e^x for x <= 0, to 2 units in the last place: x = k ln 2 + r, and a polynomial for e^r (Cephes' expf). What
// float cannot hold is 0.
inline Vector exponential(Vector x) {
  const Vector shift = all(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction
  const Vector clamped = x > all(-87.0f) ? x : all(-87.0f);
  const Vector k = (clamped * 1.44269504088896341f + shift) - shift;
  const Vector r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(k, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x > all(-87.0f) ? p * scale : Vector{};
}
template <int V>
inline Row<V> exponential(Row<V> x) {
  return each<V>([&](int i) { return exponential(x.vector[i]); });
}

// What is multiplied stands in a tile of T: floats as they are; of bfloat16, pairs of neighbouring rows, interleaved.
template <class T>
struct Factor;

template <>
struct Factor<float> {
  static constexpr int DEPTH = 1;  // rows that stand in one row of cells
  static Vector broadcast(const float* from) { return all(*from); }
  static void add(Vector& sum, Vector weight, Vector cells) { sum += weight * cells; }
  template <int V>
  static void store(float* tile, long row, Row<V> first, Row<V> second) {
    save(tile + row * ROWS<V>, first);
    save(tile + (row + 1) * ROWS<V>, second);
  }
  static float narrow(float value) { return value; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  uint16_t bits;
};

template <>
struct Factor<Bfloat16> {
  static constexpr int DEPTH = 2;
  static Vector broadcast(const Bfloat16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (Vector)_mm512_set1_epi32(pair);
  }
  static void add(Vector& sum, Vector pairs, Vector cells) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)cells);
  }
  static Vector interleave(Vector first, Vector second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Vector)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  template <int V>
  static void store(float* tile, long row, Row<V> first, Row<V> second) {
    save(tile + row / 2 * ROWS<V>, each<V>([&](int i) { return interleave(first.vector[i], second.vector[i]); }));
  }
  static Bfloat16 narrow(float value) {
    const __m128bh narrowed = _mm_cvtneps_pbh(_mm_set_ss(value));
    Bfloat16 result;
    std::memcpy(&result, &narrowed, sizeof result);
    return result;
  }
};
#endif

// M rows of the product of a matrix [rows][depth] with a tile [depth], handed on in pairs; a single one with zeros.
template <int M, int V, class T, class Take>
inline void multiply_block(const T* matrix, long stride, long row, const float* tile, long depth, const Take& take) {
  using F = Factor<T>;
  Row<V> sums[M + M % 2];
#pragma GCC unroll 16
  for (int m = 0; m < M + M % 2; ++m) sums[m] = same<V>(0.0f);
  const T* first = matrix + row * stride;
  for (long k = 0; k < depth; k += F::DEPTH) {
    const Row<V> cells = load<V>(tile + k / F::DEPTH * ROWS<V>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vector weight = F::broadcast(first + m * stride + k);
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) F::add(sums[m].vector[i], weight, cells.vector[i]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m += 2) take(row + m, sums[m], sums[m + 1]);
}

// The product of a matrix [rows][depth] with a tile [depth], as pairs of rows: take(row, first, second).
template <int V, class T, class Take>
inline void multiply(const T* matrix, long stride, long rows, const float* tile, long depth, const Take& take) {
  long row = 0;
  for (; row + BLOCK <= rows; row += BLOCK) multiply_block<BLOCK, V>(matrix, stride, row, tile, depth, take);
  for (; row + 2 <= rows; row += 2) multiply_block<2, V>(matrix, stride, row, tile, depth, take);
  if (row < rows) multiply_block<1, V>(matrix, stride, row, tile, depth, take);
}

}  // namespace

extern "C" {

// Pointers of one layer; matrices are [out][in], as torch.nn.Linear has them.
struct Layer {
  const float *attention_norm_weight, *attention_norm_bias;
  const void *query, *key_value, *output;
  const float *feedforward_norm_weight, *feedforward_norm_bias;
  const void* widen;
  const float* widen_bias;
  const void* narrow;
  const float* narrow_bias;
};

struct Encoder {
  int64_t dim, heads, width, num_layers, is_causal;
  double epsilon;
  const Layer* layers;
  const float *output_norm_weight, *output_norm_bias;
};

// Inputs and outputs are even in number; without a bias there is one for each request.
struct Linear {
  const void* weight;
  const float* bias;
  int64_t inputs, outputs;
};

// All of a DLRM but its lookups and its encoder, for candidates; see heads.py. The last of the U vectors may come from
// the encoder, and the first one is the dense one if there are dense layers; columns of the first layer of `over` are
// for the dense vector, pairs of a candidate's and a request's vector, and pairs of two of a candidate's.
struct Head {
  int64_t dim, num_request_vectors, num_slots, num_dense_inputs, num_dense_layers, num_over_layers, num_tasks;
  const Linear *dense, *over;
};

// What a request adds: to the first dense layer, vectors [R][D], to the first layer of `over`.
struct Request {
  const float *dense, *vectors, *first;
};

// Rows of embeddings of all candidates: those of a table by their ids, or one after the other if there are none.
struct Rows {
  const float* table;
  const int64_t* ids;
  int64_t stride;
};

// What candidates are scored from, all requests together: items, dense inputs [C][inputs], and rows of each slot.
struct Candidates {
  Rows items;
  const float* dense;
  const Rows* slots;
};

// Of one layer and request: keys [H][n][K], and values [D][n], so that products read both in order. Strides count
// entries; after the n values of each row there is one entry more, finite.
struct State {
  void *keys, *values;
  int64_t head_stride, key_stride, value_stride;
};

}  // extern "C"

namespace {

// Which keys a tile reads: the first `count`; if causal, its row i reads only those up to `first + i`.
struct Reach {
  long count;
  bool is_causal;
  long first;
};

// Memory that a thread works in: one tile and what becomes of it.
template <int V>
class Workspace {
 public:
  Workspace(const Encoder* encoder, const Head* head) {
    if (encoder != nullptr) {
      const long dim = encoder->dim;
      for (float** tile : {&rows, &factor, &queries, &read}) reserve(tile, dim);
      reserve(&hidden, encoder->width), reserve(&logits, KEYS), reserve(&weights, KEYS);
      reserve(&sums, dim / encoder->heads);
    }
    if (head != nullptr) {
      long widest = 0;
      for (long i = 0; i < head->num_dense_layers; ++i) widest = std::max<long>(widest, head->dense[i].outputs);
      for (long i = 0; i < head->num_over_layers; ++i) widest = std::max<long>(widest, head->over[i].outputs);
      const long inputs = head->num_dense_layers > 0 ? head->dense[0].inputs : 0;
      const long widest_input = std::max<long>(head->over[0].inputs, inputs);
      reserve(&vectors, ((head->num_dense_layers > 0) + head->num_slots + (encoder != nullptr)) * head->dim);
      reserve(&features, widest_input), reserve(&narrowed, widest_input);
      reserve(&layers[0], widest), reserve(&layers[1], widest);
    }
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, sizeof(float) * ROWS<V> * (total_ + 1))));
    if (memory_ == nullptr) std::abort();
    for (const auto& [tile, start] : places_) *tile = memory_.get() + start * ROWS<V>;
  }

  float *rows, *factor, *queries, *read, *hidden, *logits, *weights, *sums;
  float *vectors, *features, *narrowed, *layers[2];

 private:
  void reserve(float** tile, long rows) {
    places_.push_back({tile, total_});
    total_ += rows;
  }

  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::vector<std::pair<float**, long>> places_;
  long total_ = 0;
  std::unique_ptr<float, Free> memory_;
};

template <int V, class Take>
inline void norm(const float* tile, long dim, double epsilon, const float* weight, const float* bias,
                 const Take& take) {
  Row<V> mean = same<V>(0.0f), variance = same<V>(0.0f);
  for (long d = 0; d < dim; ++d) mean = mean + load<V>(tile + d * ROWS<V>);
  mean = mean * (1.0f / dim);
  for (long d = 0; d < dim; ++d) {
    const Row<V> centred = load<V>(tile + d * ROWS<V>) - mean;
    variance = variance + centred * centred;
  }
  float lanes[ROWS<V>];
  save(lanes, variance);
  for (float& lane : lanes) lane = 1.0f / std::sqrt(lane / dim + static_cast<float>(epsilon));
  const Row<V> scale = load<V>(lanes);
  for (long d = 0; d < dim; d += 2) {
    const Row<V> first = (load<V>(tile + d * ROWS<V>) - mean) * scale;
    const Row<V> second = (load<V>(tile + (d + 1) * ROWS<V>) - mean) * scale;
    take(d, first * weight[d] + bias[d], second * weight[d + 1] + bias[d + 1]);
  }
}

// The softmax of a head, block of keys by block of keys, as FlashAttention does (Dao et al., arXiv 2205.14135,
// section 3.1). `keys` points at the head's entries of the first key, `values` at the head's first row.
template <int V, class T>
void attend(Workspace<V>& space, const float* queries, const T* keys, const T* values, const State& state,
            const Reach& reach, long head_dim, float* read) {
  const long most = reach.is_causal ? std::min(reach.count, reach.first + ROWS<V>) : reach.count;
  std::memset(space.sums, 0, sizeof(float) * head_dim * ROWS<V>);
  Row<V> highest = same<V>(-INFINITY), total = same<V>(0.0f);
  for (long begin = 0; begin < most; begin += KEYS) {
    const long count = std::min(KEYS, most - begin);
    Row<V> now_highest = highest;
    multiply<V>(keys + begin * state.key_stride, state.key_stride, count, queries, head_dim,
                [&](long key, auto first, auto second) {
                  save(space.logits + key * ROWS<V>, first);
                  save(space.logits + (key + 1) * ROWS<V>, second);
                });
    for (long key = 0; key < count; ++key) {
      float* logits = space.logits + key * ROWS<V>;
      if (reach.is_causal)
        for (long row = 0; row < std::min<long>(ROWS<V>, begin + key - reach.first); ++row) logits[row] = -INFINITY;
      now_highest = maximum(now_highest, load<V>(logits));
    }
    const Row<V> shrink = exponential(highest - now_highest);
    highest = now_highest;
    total = total * shrink;
    for (long key = 0; key < count; key += 2) {
      const Row<V> first = exponential(load<V>(space.logits + key * ROWS<V>) - highest);
      const Row<V> second =
          key + 1 < count ? exponential(load<V>(space.logits + (key + 1) * ROWS<V>) - highest) : same<V>(0.0f);
      total = total + (first + second);
      Factor<T>::store(space.weights, key, first, second);
    }
    multiply<V>(values + begin, state.value_stride, head_dim, space.weights, count,
                [&](long d, auto first, auto second) {
                  save(space.sums + d * ROWS<V>, load<V>(space.sums + d * ROWS<V>) * shrink + first);
                  save(space.sums + (d + 1) * ROWS<V>, load<V>(space.sums + (d + 1) * ROWS<V>) * shrink + second);
                });
  }
  // Who has no key reads zero.
  const Row<V> inverse = each<V>([&](int i) { return most > 0 ? all(1.0f) / total.vector[i] : Vector{}; });
  for (long d = 0; d < head_dim; d += 2)
    Factor<T>::store(read, d, load<V>(space.sums + d * ROWS<V>) * inverse,
                     load<V>(space.sums + (d + 1) * ROWS<V>) * inverse);
}

// One layer of the encoder, on the tile of a workspace.
template <int V, class T>
void apply_layer(Workspace<V>& space, const Encoder& encoder, const Layer& layer, const State& state,
                 const Reach& reach) {
  const long dim = encoder.dim, head_dim = dim / encoder.heads;
  const auto as_factor = [&](long d, auto first, auto second) { Factor<T>::store(space.factor, d, first, second); };
  const auto add = [&](long d, auto first, auto second) {
    save(space.rows + d * ROWS<V>, load<V>(space.rows + d * ROWS<V>) + first);
    save(space.rows + (d + 1) * ROWS<V>, load<V>(space.rows + (d + 1) * ROWS<V>) + second);
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  norm<V>(space.rows, dim, encoder.epsilon, layer.attention_norm_weight, layer.attention_norm_bias, as_factor);
  multiply<V>(static_cast<const T*>(layer.query), dim, dim, space.factor, dim, [&](long d, auto first, auto second) {
    Factor<T>::store(space.queries, d, first * scale, second * scale);
  });
  const T* keys = static_cast<const T*>(state.keys);
  const T* values = static_cast<const T*>(state.values);
  for (long d = 0; d < dim; d += head_dim) {
    const long cells = d / Factor<T>::DEPTH * ROWS<V>;
    attend<V, T>(space, space.queries + cells, keys + d / head_dim * state.head_stride, values + d * state.value_stride,
                 state, reach, head_dim, space.read + cells);
  }
  multiply<V>(static_cast<const T*>(layer.output), dim, dim, space.read, dim, add);
  norm<V>(space.rows, dim, encoder.epsilon, layer.feedforward_norm_weight, layer.feedforward_norm_bias, as_factor);
  multiply<V>(static_cast<const T*>(layer.widen), dim, encoder.width, space.factor, dim,
              [&](long f, auto first, auto second) {
                Factor<T>::store(space.hidden, f, maximum(same<V>(0.0f), first + layer.widen_bias[f]),
                                 maximum(same<V>(0.0f), second + layer.widen_bias[f + 1]));
              });
  multiply<V>(static_cast<const T*>(layer.narrow), encoder.width, dim, space.hidden, encoder.width,
              [&](long d, auto first, auto second) {
                add(d, first + layer.narrow_bias[d], second + layer.narrow_bias[d + 1]);
              });
}

// Keys and values of the tile's `count` rows, which are rows `start` on of the state.
template <int V, class T>
void write_keys_and_values(Workspace<V>& space, const Encoder& encoder, const Layer& layer, const State& state,
                           long start, long count) {
  const long dim = encoder.dim, head_dim = dim / encoder.heads;
  norm<V>(space.rows, dim, encoder.epsilon, layer.attention_norm_weight, layer.attention_norm_bias,
          [&](long d, auto first, auto second) { Factor<T>::store(space.factor, d, first, second); });
  T* keys = static_cast<T*>(state.keys) + start * state.key_stride;
  T* values = static_cast<T*>(state.values) + start;
  // Rows d of the product are keys for d below D, then values.
  multiply<V>(
      static_cast<const T*>(layer.key_value), dim, 2 * dim, space.factor, dim, [&](long d, auto first, auto second) {
        float lanes[2][ROWS<V>];
        save(lanes[0], first), save(lanes[1], second);
        for (int side = 0; side < 2; ++side)
          for (long row = 0; row < count; ++row) {
            const long place = d + side;
            T* to = place < dim
                        ? keys + place / head_dim * state.head_stride + row * state.key_stride + place % head_dim
                        : values + (place - dim) * state.value_stride + row;
            *to = Factor<T>::narrow(lanes[side][row]);
          }
      });
}

// Rows `start` to `start + count` as a tile.
template <int V>
void load_rows(const Rows& rows, long dim, long start, long count, float* tile) {
  const auto row_of = [&](long row) { return rows.table + (rows.ids != nullptr ? rows.ids[row] : row) * rows.stride; };
  // Rows of a table are anywhere: all are asked for before the first is waited for.
  for (long row = start; row < start + count; ++row)
    for (long d = 0; d < dim; d += 16) __builtin_prefetch(row_of(row) + d);
  if (count < ROWS<V>) std::memset(tile, 0, sizeof(float) * dim * ROWS<V>);
  for (long row = 0; row < count; ++row) {
    const float* from = row_of(start + row);
    for (long d = 0; d < dim; ++d) tile[d * ROWS<V> + row] = from[d];
  }
}

template <int V>
void save_rows(const float* tile, long dim, long count, float* rows) {
  for (long row = 0; row < count; ++row)
    for (long d = 0; d < dim; ++d) rows[row * dim + d] = tile[d * ROWS<V> + row];
}

// A tile's rows: `count` of `request`, from its row `first` on, which is row `start` of all.
struct Place {
  long request, first, start, count;
};

template <int V>
std::vector<Place> places_of(const int64_t* lengths, long num_requests) {
  std::vector<Place> places;
  long start = 0;
  for (long request = 0; request < num_requests; start += lengths[request++])
    for (long first = 0; first < lengths[request]; first += ROWS<V>)
      places.push_back({request, first, start + first, std::min<long>(ROWS<V>, lengths[request] - first)});
  return places;
}

int threads_for(const std::vector<Place>& places, int num_threads) {
  return std::max(1, std::min<int>(num_threads, places.size()));
}

template <int V, class T>
void encode(const Encoder& encoder, const Rows* terms, long num_terms, const int64_t* lengths, const int64_t* past,
            long num_requests, const State* states, int num_threads) {
  const long dim = encoder.dim;
  const std::vector<Place> places = places_of<V>(lengths, num_requests);
  std::vector<float> tiles(places.size() * dim * ROWS<V>);
#pragma omp parallel num_threads(threads_for(places, num_threads))
  {
    Workspace<V> space(&encoder, nullptr);
    for (long depth = 0; depth < encoder.num_layers; ++depth) {
      const Layer& layer = encoder.layers[depth];
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < places.size(); ++i) {
        const Place& place = places[i];
        space.rows = tiles.data() + i * dim * ROWS<V>;
        for (long term = 0; depth == 0 && term < num_terms; ++term) {
          load_rows<V>(terms[term], dim, place.start, place.count, term == 0 ? space.rows : space.factor);
          for (long d = 0; term > 0 && d < dim; ++d)
            save(space.rows + d * ROWS<V>, load<V>(space.rows + d * ROWS<V>) + load<V>(space.factor + d * ROWS<V>));
        }
        const State& state = states[place.request * encoder.num_layers + depth];
        write_keys_and_values<V, T>(space, encoder, layer, state, past[place.request] + place.first, place.count);
      }
      // After the last layer's keys and values nothing reads the events.
      if (depth + 1 == encoder.num_layers) break;
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < places.size(); ++i) {
        const Place& place = places[i];
        space.rows = tiles.data() + i * dim * ROWS<V>;
        const Reach reach = {past[place.request] + lengths[place.request], encoder.is_causal != 0,
                             past[place.request] + place.first};
        apply_layer<V, T>(space, encoder, layer, states[place.request * encoder.num_layers + depth], reach);
      }
    }
  }
}

// Layers one after the other, ReLU between them; the first one's bias is given if it has none of its own.
template <int V, class T, class Take>
void feed_forward(Workspace<V>& space, const Linear* layers, long num_layers, const float* first_bias,
                  const float* input, const Take& take) {
  for (long i = 0; i < num_layers; ++i) {
    const Linear& layer = layers[i];
    const float* bias = layer.bias != nullptr ? layer.bias : first_bias;
    const T* weight = static_cast<const T*>(layer.weight);
    if (i + 1 == num_layers) {
      multiply<V>(weight, layer.inputs, layer.outputs, input, layer.inputs,
                  [&](long row, auto first, auto second) { take(row, first + bias[row], second + bias[row + 1]); });
    } else {
      float* output = space.layers[i % 2];
      multiply<V>(weight, layer.inputs, layer.outputs, input, layer.inputs, [&](long row, auto first, auto second) {
        Factor<T>::store(output, row, maximum(same<V>(0.0f), first + bias[row]),
                         maximum(same<V>(0.0f), second + bias[row + 1]));
      });
      input = output;
    }
  }
}

// A tile of floats as factor.
template <int V, class T>
const float* narrow(const float* tile, long rows, float* narrowed) {
  if (std::is_same_v<T, float>) return tile;
  for (long row = 0; row < rows; row += 2)
    Factor<T>::store(narrowed, row, load<V>(tile + row * ROWS<V>), load<V>(tile + (row + 1) * ROWS<V>));
  return narrowed;
}

// Logits of the tile whose vectors, but the dense one, are in place.
template <int V, class T, class Take>
void apply_head(Workspace<V>& space, const Head& head, const Request& request, long num_vectors, const Take& take) {
  const long dim = head.dim;
  float* features = space.features;
  if (head.num_dense_layers > 0) {
    const float* inputs = narrow<V, T>(features, head.dense[0].inputs, space.narrowed);
    feed_forward<V, T>(space, head.dense, head.num_dense_layers, request.dense, inputs,
                       [&](long d, auto first, auto second) {
                         save(space.vectors + d * ROWS<V>, maximum(same<V>(0.0f), first));
                         save(space.vectors + (d + 1) * ROWS<V>, maximum(same<V>(0.0f), second));
                       });
    std::memcpy(features, space.vectors, sizeof(float) * dim * ROWS<V>);
    features += dim * ROWS<V>;
  }
  for (long one = 0; one < num_vectors; ++one, features += head.num_request_vectors * ROWS<V>)
    multiply<V>(request.vectors, dim, head.num_request_vectors, space.vectors + one * dim * ROWS<V>, dim,
                [&](long row, auto first, auto second) {
                  save(features + row * ROWS<V>, first);
                  if (row + 1 < head.num_request_vectors) save(features + (row + 1) * ROWS<V>, second);
                });
  for (long one = 0; one < num_vectors; ++one)
    for (long other = one + 1; other < num_vectors; ++other, features += ROWS<V>) {
      Row<V> sums[2] = {same<V>(0.0f), same<V>(0.0f)};
      for (long d = 0; d < dim; ++d)
        sums[d % 2] = sums[d % 2] + load<V>(space.vectors + (one * dim + d) * ROWS<V>) *
                                        load<V>(space.vectors + (other * dim + d) * ROWS<V>);
      save(features, sums[0] + sums[1]);
    }
  if (features < space.features + head.over[0].inputs * ROWS<V>) save(features, same<V>(0.0f));
  const float* inputs = narrow<V, T>(space.features, head.over[0].inputs, space.narrowed);
  feed_forward<V, T>(space, head.over, head.num_over_layers, request.first, inputs, take);
}

// What the encoder makes of a tile of candidates, to `vectors`.
template <int V, class T>
void encode_candidates(Workspace<V>& space, const Encoder& encoder, const State* states, long num_events,
                       float* vectors) {
  const Reach reach = {num_events, false, 0};
  for (long depth = 0; depth < encoder.num_layers; ++depth)
    apply_layer<V, T>(space, encoder, encoder.layers[depth], states[depth], reach);
  norm<V>(space.rows, encoder.dim, encoder.epsilon, encoder.output_norm_weight, encoder.output_norm_bias,
          [&](long d, auto first, auto second) {
            save(vectors + d * ROWS<V>, first);
            save(vectors + (d + 1) * ROWS<V>, second);
          });
}

template <int V, class T>
void score(const Encoder* encoder, const Head* head, const Candidates& candidates, const int64_t* num_candidates,
           const int64_t* num_events, long num_requests, const State* states, const Request* requests, float* scores,
           int num_threads) {
  const std::vector<Place> places = places_of<V>(num_candidates, num_requests);
#pragma omp parallel num_threads(threads_for(places, num_threads))
  {
    Workspace<V> space(encoder, head);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < places.size(); ++i) {
      const auto& [request, first, start, count] = places[i];
      float* vectors = head != nullptr ? space.vectors : space.rows;
      if (head != nullptr && head->num_dense_layers > 0) {
        const long inputs = head->num_dense_inputs;
        std::memset(space.features, 0, sizeof(float) * head->dense[0].inputs * ROWS<V>);
        load_rows<V>({candidates.dense, nullptr, inputs}, inputs, start, count, space.features);
        vectors += head->dim * ROWS<V>;
      }
      if (head != nullptr) {
        for (long slot = 0; slot < head->num_slots; ++slot, vectors += head->dim * ROWS<V>)
          load_rows<V>(candidates.slots[slot], head->dim, start, count, vectors);
      }
      if (encoder != nullptr) {
        load_rows<V>(candidates.items, encoder->dim, start, count, space.rows);
        encode_candidates<V, T>(space, *encoder, states + request * encoder->num_layers, num_events[request], vectors);
        vectors += encoder->dim * ROWS<V>;
      }
      if (head == nullptr) {
        save_rows<V>(space.rows, encoder->dim, count, scores + start * encoder->dim);
        continue;
      }
      const long num_vectors = (vectors - space.vectors) / (head->dim * ROWS<V>), num_tasks = head->num_tasks;
      apply_head<V, T>(space, *head, requests[request], num_vectors, [&](long task, auto one, auto other) {
        float lanes[2][ROWS<V>];
        save(lanes[0], one), save(lanes[1], other);
        for (long side = 0; side < 2 && task + side < num_tasks; ++side)
          for (long row = 0; row < count; ++row) scores[(start + row) * num_tasks + task + side] = lanes[side][row];
      });
    }
  }
}

// Whether no request has more rows than fill a tile of one vector.
bool are_few(const int64_t* lengths, long num_requests) {
  return std::all_of(lengths, lengths + num_requests, [](int64_t length) { return length <= LANES; });
}

}  // namespace

// Phase one: writes the keys and values of events, each the sum of rows of `terms`, after the `past` ones of each
// request. `states` has those of the first request, layer by layer, then those of the second one, and so on.
#define ENCODE(NAME, TYPE)                                                                                   \
  extern "C" void NAME(const Encoder* encoder, const Rows* terms, int64_t num_terms, const int64_t* lengths, \
                       const int64_t* past, int64_t num_requests, const State* states, int num_threads) {    \
    const auto run = are_few(lengths, num_requests) ? encode<1, TYPE> : encode<2, TYPE>;                     \
    run(*encoder, terms, num_terms, lengths, past, num_requests, states, num_threads);                       \
  }

// Phase two: of candidates, logits [C][T] with a head, and vectors [C][D] without. Without an encoder the slots hold
// all.
#define SCORE(NAME, TYPE)                                                                                             \
  extern "C" void NAME(const Encoder* encoder, const Head* head, const Candidates* candidates,                        \
                       const int64_t* num_candidates, const int64_t* num_events, int64_t num_requests,                \
                       const State* states, const Request* requests, float* scores, int num_threads) {                \
    const auto run = are_few(num_candidates, num_requests) ? score<1, TYPE> : score<2, TYPE>;                         \
    run(encoder, head, *candidates, num_candidates, num_events, num_requests, states, requests, scores, num_threads); \
  }

ENCODE(torchrec_amort_encode, float)
SCORE(torchrec_amort_score, float)
#if defined(__AVX512BF16__)
ENCODE(torchrec_amort_encode_bfloat16, Bfloat16)
SCORE(torchrec_amort_score_bfloat16, Bfloat16)
#endif
