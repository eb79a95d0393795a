// The two phases of AmortizedHistoryArch, and what a DLRM makes of its vectors, on a CPU, a tile of rows at a time.
//
// A tile is [D][ROWS]: its rows stand in the lanes of vector registers. So a linear layer is a product of the weights
// as torch stores them with a tile, norms and softmax need no sums across lanes, and a tile goes through all layers
// without leaving the cache of its core. Candidates need nothing of each other: their tiles never wait.
//
// T is the type of weights, keys, values and whatever is multiplied: float, or bfloat16 where the processor multiplies
// pairs of them. Sums, norms, softmax and what is passed from layer to layer are float in either case.

// It is compiled once for each kind of processor, KERNELS being its name. Why it includes nothing of C++, kernels.h
// tells.

#include "kernels.h"

#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace torchrec_amort {
namespace {

#if defined(__AVX512F__)
constexpr int MOST_LANES = 16, MOST_ROWS = 32, SUMS = 16;
#else
constexpr int MOST_LANES = 8, MOST_ROWS = 16, SUMS = 8;
#endif
constexpr long KEYS = 128;  // keys whose products with a tile are in cache at once
constexpr float INFINITE = __builtin_inff();

constexpr long least(long one, long other) { return one < other ? one : other; }
constexpr long most(long one, long other) { return one > other ? one : other; }

// One number of each of a tile's rows, in as few vectors as they fill. Tiles are of 8, 16 or 32 rows: the fewer rows
// there are, the less is computed for none.
template <int ROWS>
constexpr int LANES = least(ROWS, MOST_LANES);
template <int ROWS>
struct Types {
  typedef float Vector __attribute__((vector_size(4 * LANES<ROWS>)));
  typedef float Unaligned __attribute__((vector_size(4 * LANES<ROWS>), aligned(4), may_alias));
  typedef int32_t Integers __attribute__((vector_size(4 * LANES<ROWS>)));
};
template <int ROWS>
using Vector = typename Types<ROWS>::Vector;
template <int ROWS>
struct Row {
  static constexpr int VECTORS = ROWS / LANES<ROWS>;
  Vector<ROWS> vector[VECTORS];
};

template <int ROWS>
inline Vector<ROWS> all(float value) {
  return value - Vector<ROWS>{};
}

template <int ROWS, class Function>
inline Row<ROWS> each(const Function& function) {
  Row<ROWS> result;
#pragma GCC unroll 2
  for (int i = 0; i < Row<ROWS>::VECTORS; ++i) result.vector[i] = function(i);
  return result;
}
template <int ROWS>
inline Row<ROWS> load(const float* from) {
  using Unaligned = typename Types<ROWS>::Unaligned;
  return each<ROWS>([&](int i) -> Vector<ROWS> { return reinterpret_cast<const Unaligned*>(from)[i]; });
}
template <int ROWS>
inline void save(float* to, Row<ROWS> row) {
  using Unaligned = typename Types<ROWS>::Unaligned;
#pragma GCC unroll 2
  for (int i = 0; i < Row<ROWS>::VECTORS; ++i) reinterpret_cast<Unaligned*>(to)[i] = row.vector[i];
}
template <int ROWS>
inline Row<ROWS> same(float value) {
  return each<ROWS>([&](int) { return all<ROWS>(value); });
}
template <int ROWS>
inline Row<ROWS> operator+(Row<ROWS> a, Row<ROWS> b) {
  return each<ROWS>([&](int i) { return a.vector[i] + b.vector[i]; });
}
template <int ROWS>
inline Row<ROWS> operator-(Row<ROWS> a, Row<ROWS> b) {
  return each<ROWS>([&](int i) { return a.vector[i] - b.vector[i]; });
}
template <int ROWS>
inline Row<ROWS> operator*(Row<ROWS> a, Row<ROWS> b) {
  return each<ROWS>([&](int i) { return a.vector[i] * b.vector[i]; });
}
template <int ROWS>
inline Row<ROWS> operator+(Row<ROWS> a, float b) {
  return each<ROWS>([&](int i) { return a.vector[i] + b; });
}
template <int ROWS>
inline Row<ROWS> operator*(Row<ROWS> a, float b) {
  return each<ROWS>([&](int i) { return a.vector[i] * b; });
}
template <int ROWS>
inline Row<ROWS> maximum(Row<ROWS> a, Row<ROWS> b) {  // b where it is not a number
  return each<ROWS>([&](int i) { return a.vector[i] > b.vector[i] ? a.vector[i] : b.vector[i]; });
}

// e^x for x <= 0, to 2 units in the last place: x = k ln 2 + r, and a polynomial for e^r (Cephes' expf). What
// float cannot hold is 0.
template <int ROWS>
inline Vector<ROWS> exponential(Vector<ROWS> x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const Vector<ROWS> lowest = all<ROWS>(-87.0f);
  const Vector<ROWS> clamped = x > lowest ? x : lowest;
  const Vector<ROWS> k = (clamped * 1.44269504088896341f + SHIFT) - SHIFT;
  const Vector<ROWS> r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
  Vector<ROWS> p = all<ROWS>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto power = (__builtin_convertvector(k, typename Types<ROWS>::Integers) + 127) << 23;
  Vector<ROWS> scale;
  memcpy(&scale, &power, sizeof scale);
  return x > lowest ? p * scale : Vector<ROWS>{};
}
template <int ROWS>
inline Row<ROWS> exponential(Row<ROWS> x) {
  return each<ROWS>([&](int i) { return exponential<ROWS>(x.vector[i]); });
}

// What is multiplied stands in a tile of T: floats as they are; of bfloat16, pairs of neighbouring rows, interleaved.
template <class T>
struct Factor;

template <>
struct Factor<float> {
  static constexpr int DEPTH = 1;  // rows that stand in one row of cells
  template <int ROWS>
  static Vector<ROWS> broadcast(const float* from) {
    return all<ROWS>(*from);
  }
  template <int ROWS>
  static void add(Vector<ROWS>& sum, Vector<ROWS> weight, Vector<ROWS> cells) {
    sum += weight * cells;
  }
  template <int ROWS>
  static void store(float* tile, long row, Row<ROWS> first, Row<ROWS> second) {
    save(tile + row * ROWS, first);
    save(tile + (row + 1) * ROWS, second);
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
  template <int ROWS>
  static Vector<ROWS> broadcast(const Bfloat16* from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (Vector<ROWS>)(pair - typename Types<ROWS>::Integers{});
  }
  template <int ROWS>
  static void add(Vector<ROWS>& sum, Vector<ROWS> pairs, Vector<ROWS> cells) {
    if constexpr (LANES<ROWS> == 16)
      sum = (Vector<ROWS>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)cells);
    else
      sum = (Vector<ROWS>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)pairs, (__m256bh)cells);
  }
  template <int ROWS>
  static Vector<ROWS> interleave(Vector<ROWS> first, Vector<ROWS> second) {
    if constexpr (LANES<ROWS> == 16) {
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
      return (Vector<ROWS>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    } else {
      const __m256i low = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)first));
      const __m256i high = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)second));
      return (Vector<ROWS>)_mm256_or_si256(low, _mm256_slli_epi32(high, 16));
    }
  }
  template <int ROWS>
  static void store(float* tile, long row, Row<ROWS> first, Row<ROWS> second) {
    save(tile + row / 2 * ROWS, each<ROWS>([&](int i) { return interleave<ROWS>(first.vector[i], second.vector[i]); }));
  }
  static Bfloat16 narrow(float value) {
    const __m128bh narrowed = _mm_cvtneps_pbh(_mm_set_ss(value));
    Bfloat16 result;
    memcpy(&result, &narrowed, sizeof result);
    return result;
  }
};
#endif

// M rows of the product of a matrix [rows][depth] with a tile [depth], handed on in pairs; a single one with zeros.
template <int M, int ROWS, class T, class Take>
inline void multiply_block(const T* matrix, long stride, long row, const float* tile, long depth, const Take& take) {
  using F = Factor<T>;
  Row<ROWS> sums[M + M % 2];
#pragma GCC unroll 16
  for (int m = 0; m < M + M % 2; ++m) sums[m] = same<ROWS>(0.0f);
  const T* first = matrix + row * stride;
  for (long k = 0; k < depth; k += F::DEPTH) {
    // A few rows are done with a block sooner than the next one comes from memory: ask for it now.
    if (Row<ROWS>::VECTORS == 1 && k % (64 / sizeof(T)) == 0)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) __builtin_prefetch(first + (2 * M + m) * stride + k, 0, 2);
    const Row<ROWS> cells = load<ROWS>(tile + k / F::DEPTH * ROWS);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vector<ROWS> weight = F::template broadcast<ROWS>(first + m * stride + k);
#pragma GCC unroll 2
      for (int i = 0; i < Row<ROWS>::VECTORS; ++i) F::template add<ROWS>(sums[m].vector[i], weight, cells.vector[i]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m += 2) take(row + m, sums[m], sums[m + 1]);
}

// The product of a matrix [rows][depth] with a tile [depth], as pairs of rows: take(row, first, second).
template <int ROWS, class T, class Take>
inline void multiply(const T* matrix, long stride, long rows, const float* tile, long depth, const Take& take) {
  constexpr int BLOCK = SUMS / Row<ROWS>::VECTORS;
  long row = 0;
  for (; row + BLOCK <= rows; row += BLOCK) multiply_block<BLOCK, ROWS>(matrix, stride, row, tile, depth, take);
  for (; row + 2 <= rows; row += 2) multiply_block<2, ROWS>(matrix, stride, row, tile, depth, take);
  if (row < rows) multiply_block<1, ROWS>(matrix, stride, row, tile, depth, take);
}

// Keys and values of one request in one layer.
template <class T>
struct State {
  T *keys, *values;
  long head_stride, key_stride, value_stride;
};

template <class T>
State<T> state_of(const History& history, long depth) {
  return {static_cast<T*>(history.keys) + depth * history.key_layer,
          static_cast<T*>(history.values) + depth * history.value_layer, history.key_head, history.key_event,
          history.value_row};
}

// Which keys a tile reads: the first `count`; if causal, its row i reads only those up to `first + i`.
struct Reach {
  long count;
  bool is_causal;
  long first;
};

// What a thread works in, one at a time: one tile and what becomes of it.
template <int ROWS>
class Workspace {
 public:
  // Without memory it only tells how much it takes.
  Workspace(const Encoder* encoder, const Head* head, float* memory) : memory_(memory) {
    if (encoder != nullptr) {
      const long dim = encoder->dim;
      reserve(&rows, dim), reserve(&factor, dim), reserve(&queries, dim), reserve(&read, dim);
      reserve(&hidden, encoder->width), reserve(&logits, KEYS), reserve(&weights, KEYS);
      reserve(&sums, dim / encoder->heads);
    }
    if (head != nullptr) {
      long widest = 0;
      for (long i = 0; i < head->num_dense_layers; ++i) widest = most(widest, head->dense[i].outputs);
      for (long i = 0; i < head->num_over_layers; ++i) widest = most(widest, head->over[i].outputs);
      const long inputs = head->num_dense_layers > 0 ? head->dense[0].inputs : 0;
      const long widest_input = most(head->over[0].inputs, inputs);
      reserve(&vectors, ((head->num_dense_layers > 0) + head->num_slots + (encoder != nullptr)) * head->dim);
      const long rank = head->num_cross_layers > 0 ? head->cross[0].outputs : 0;
      reserve(&features, widest_input), reserve(&narrowed, most(widest_input, rank));
      reserve(&layers[0], widest), reserve(&layers[1], widest);
      reserve(&low_ranks, head->num_cross_layers * rank);
    }
  }
  size_t floats() const { return ROWS * (total_ + total_ % 2); }

  float *rows, *factor, *queries, *read, *hidden, *logits, *weights, *sums;
  float *vectors, *features, *narrowed, *layers[2], *low_ranks;

 private:
  void reserve(float** tile, long rows) {
    *tile = memory_ == nullptr ? nullptr : memory_ + total_ * ROWS;
    total_ += rows;
  }

  float* memory_;
  long total_ = 0;
};

// What becomes of pairs of rows: they go to a tile, or are added to it. Called, and not inlined, they would have the sums
// of a block leave their registers, at half the speed.
template <int ROWS>
inline auto save_to(float* tile) {
  return [tile](long row, auto first, auto second) __attribute__((always_inline)) {
    save(tile + row * ROWS, first);
    save(tile + (row + 1) * ROWS, second);
  };
}
template <int ROWS>
inline auto add_to(float* tile) {
  return [tile](long row, auto first, auto second) __attribute__((always_inline)) {
    save(tile + row * ROWS, load<ROWS>(tile + row * ROWS) + first);
    save(tile + (row + 1) * ROWS, load<ROWS>(tile + (row + 1) * ROWS) + second);
  };
}

template <int ROWS, class Take>
inline void norm(const float* tile, long dim, double epsilon, const float* weight, const float* bias,
                 const Take& take) {
  Row<ROWS> mean = same<ROWS>(0.0f), variance = same<ROWS>(0.0f);
  for (long d = 0; d < dim; ++d) mean = mean + load<ROWS>(tile + d * ROWS);
  mean = mean * (1.0f / dim);
  for (long d = 0; d < dim; ++d) {
    const Row<ROWS> centred = load<ROWS>(tile + d * ROWS) - mean;
    variance = variance + centred * centred;
  }
  float lanes[ROWS];
  save(lanes, variance);
  for (float& lane : lanes) lane = 1.0f / __builtin_sqrtf(lane / dim + static_cast<float>(epsilon));
  const Row<ROWS> scale = load<ROWS>(lanes);
  for (long d = 0; d < dim; d += 2) {
    const Row<ROWS> first = (load<ROWS>(tile + d * ROWS) - mean) * scale;
    const Row<ROWS> second = (load<ROWS>(tile + (d + 1) * ROWS) - mean) * scale;
    take(d, first * weight[d] + bias[d], second * weight[d + 1] + bias[d + 1]);
  }
}

// The softmax of a head, block of keys by block of keys, as FlashAttention does (Dao et al., arXiv 2205.14135,
// section 3.1). `keys` points at the head's entries of the first key, `values` at the head's first row.
template <int ROWS, class T>
void attend(Workspace<ROWS>& space, const float* queries, const T* keys, const T* values, const State<T>& state,
            const Reach& reach, long head_dim, float* read) {
  const long end = reach.is_causal ? least(reach.count, reach.first + ROWS) : reach.count;
  memset(space.sums, 0, sizeof(float) * head_dim * ROWS);
  Row<ROWS> highest = same<ROWS>(-INFINITE), total = same<ROWS>(0.0f);
  for (long begin = 0; begin < end; begin += KEYS) {
    const long count = least(KEYS, end - begin);
    Row<ROWS> now_highest = highest;
    multiply<ROWS>(keys + begin * state.key_stride, state.key_stride, count, queries, head_dim,
                   save_to<ROWS>(space.logits));
    for (long key = 0; key < count; ++key) {
      float* logits = space.logits + key * ROWS;
      if (reach.is_causal)
        for (long row = 0; row < least(ROWS, begin + key - reach.first); ++row) logits[row] = -INFINITE;
      now_highest = maximum(now_highest, load<ROWS>(logits));
    }
    const Row<ROWS> shrink = exponential(highest - now_highest);
    highest = now_highest;
    total = total * shrink;
    for (long key = 0; key < count; key += 2) {
      const Row<ROWS> first = exponential(load<ROWS>(space.logits + key * ROWS) - highest);
      const Row<ROWS> second =
          key + 1 < count ? exponential(load<ROWS>(space.logits + (key + 1) * ROWS) - highest) : same<ROWS>(0.0f);
      total = total + (first + second);
      Factor<T>::store(space.weights, key, first, second);
    }
    multiply<ROWS>(values + begin, state.value_stride, head_dim, space.weights, count,
                   [&](long d, auto first, auto second) {
                     save(space.sums + d * ROWS, load<ROWS>(space.sums + d * ROWS) * shrink + first);
                     save(space.sums + (d + 1) * ROWS, load<ROWS>(space.sums + (d + 1) * ROWS) * shrink + second);
                   });
  }
  // Who has no key reads zero.
  const Row<ROWS> inverse =
      each<ROWS>([&](int i) { return end > 0 ? all<ROWS>(1.0f) / total.vector[i] : Vector<ROWS>{}; });
  for (long d = 0; d < head_dim; d += 2)
    Factor<T>::store(read, d, load<ROWS>(space.sums + d * ROWS) * inverse,
                     load<ROWS>(space.sums + (d + 1) * ROWS) * inverse);
}

// One layer of the encoder, on the tile of a workspace.
template <int ROWS, class T>
void apply_layer(Workspace<ROWS>& space, const Encoder& encoder, const Layer& layer, const State<T>& state,
                 const Reach& reach) {
  const long dim = encoder.dim, head_dim = dim / encoder.heads;
  const auto as_factor = [&](long d, auto first, auto second) { Factor<T>::store(space.factor, d, first, second); };
  const auto add = add_to<ROWS>(space.rows);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  norm<ROWS>(space.rows, dim, encoder.epsilon, layer.attention_norm_weight, layer.attention_norm_bias, as_factor);
  multiply<ROWS>(static_cast<const T*>(layer.query), dim, dim, space.factor, dim, [&](long d, auto first, auto second) {
    Factor<T>::store(space.queries, d, first * scale, second * scale);
  });
  for (long d = 0; d < dim; d += head_dim) {
    const long cells = d / Factor<T>::DEPTH * ROWS;
    attend<ROWS, T>(space, space.queries + cells, state.keys + d / head_dim * state.head_stride,
                    state.values + d * state.value_stride, state, reach, head_dim, space.read + cells);
  }
  multiply<ROWS>(static_cast<const T*>(layer.output), dim, dim, space.read, dim, add);
  norm<ROWS>(space.rows, dim, encoder.epsilon, layer.feedforward_norm_weight, layer.feedforward_norm_bias, as_factor);
  multiply<ROWS>(static_cast<const T*>(layer.widen), dim, encoder.width, space.factor, dim,
                 [&](long f, auto first, auto second) {
                   Factor<T>::store(space.hidden, f, maximum(same<ROWS>(0.0f), first + layer.widen_bias[f]),
                                    maximum(same<ROWS>(0.0f), second + layer.widen_bias[f + 1]));
                 });
  multiply<ROWS>(static_cast<const T*>(layer.narrow), encoder.width, dim, space.hidden, encoder.width,
                 [&](long d, auto first, auto second) {
                   add(d, first + layer.narrow_bias[d], second + layer.narrow_bias[d + 1]);
                 });
}

// Keys and values of the tile's `count` rows, which are rows `start` on of the state.
template <int ROWS, class T>
void write_keys_and_values(Workspace<ROWS>& space, const Encoder& encoder, const Layer& layer, const State<T>& state,
                           long start, long count) {
  const long dim = encoder.dim, head_dim = dim / encoder.heads;
  norm<ROWS>(space.rows, dim, encoder.epsilon, layer.attention_norm_weight, layer.attention_norm_bias,
             [&](long d, auto first, auto second) { Factor<T>::store(space.factor, d, first, second); });
  T* keys = state.keys + start * state.key_stride;
  T* values = state.values + start;
  // Rows d of the product are keys for d below D, then values.
  const auto write = [&](long d, auto first, auto second) {
    float lanes[2][ROWS];
    save(lanes[0], first), save(lanes[1], second);
    for (int side = 0; side < 2; ++side)
      for (long row = 0; row < count; ++row) {
        const long place = d + side;
        T* to = place < dim ? keys + place / head_dim * state.head_stride + row * state.key_stride + place % head_dim
                            : values + (place - dim) * state.value_stride + row;
        *to = Factor<T>::narrow(lanes[side][row]);
      }
  };
  multiply<ROWS>(static_cast<const T*>(layer.key_value), dim, 2 * dim, space.factor, dim, write);
}

// Transposes as many vectors as they have lanes: of each four blocks, ever larger ones, the two off the diagonal change
// places.
template <int ROWS>
inline void transpose(Vector<ROWS>* vectors) {
  constexpr int N = LANES<ROWS>;
#pragma GCC unroll 4
  for (int size = 1; size < N; size *= 2) {
    typename Types<ROWS>::Integers low, high;
    for (int lane = 0; lane < N; ++lane) {
      low[lane] = lane & size ? N + lane - size : lane;
      high[lane] = lane & size ? N + lane : lane + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & size) continue;
      const Vector<ROWS> one = vectors[i], other = vectors[i + size];
      vectors[i] = __builtin_shuffle(one, other, low);
      vectors[i + size] = __builtin_shuffle(one, other, high);
    }
  }
}

// Rows `start` to `start + count` as a tile.
template <int ROWS>
void load_rows(const Rows& rows, long dim, long start, long count, float* tile) {
  using Unaligned = typename Types<ROWS>::Unaligned;
  constexpr int N = LANES<ROWS>;
  const float* from[ROWS];
  for (long row = 0; row < count; ++row) {
    from[row] = rows.table + (rows.ids != nullptr ? rows.ids[start + row] : start + row) * rows.stride;
    // Rows of a table are anywhere: all are asked for before the first is waited for.
    for (long d = 0; d < dim; d += 16) __builtin_prefetch(from[row] + d);
  }
  const long whole = dim / N * N;
  for (long first = 0; first < ROWS; first += N) {
    for (long d = 0; d < whole; d += N) {
      Vector<ROWS> vectors[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        vectors[i] = first + i < count ? *reinterpret_cast<const Unaligned*>(from[first + i] + d) : Vector<ROWS>{};
      transpose<ROWS>(vectors);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) *reinterpret_cast<Unaligned*>(tile + (d + i) * ROWS + first) = vectors[i];
    }
  }
  for (long d = whole; d < dim; ++d)
    for (long row = 0; row < ROWS; ++row) tile[d * ROWS + row] = row < count ? from[row][d] : 0.0f;
}

template <int ROWS>
void save_rows(const float* tile, long dim, long count, float* rows, long stride) {
  for (long row = 0; row < count; ++row)
    for (long d = 0; d < dim; ++d) rows[row * stride + d] = tile[d * ROWS + row];
}

// The sums of rows of all terms.
template <int ROWS>
void load_events(Workspace<ROWS>& space, const Rows* terms, long num_terms, long dim, const Place& place) {
  for (long term = 0; term < num_terms; ++term) {
    load_rows<ROWS>(terms[term], dim, place.start, place.count, term == 0 ? space.rows : space.factor);
    for (long d = 0; term > 0 && d < dim; ++d)
      save(space.rows + d * ROWS, load<ROWS>(space.rows + d * ROWS) + load<ROWS>(space.factor + d * ROWS));
  }
}

template <int ROWS, class T>
void encode(const void* job, float* memory, Pieces& pieces) {
  const Encode& encode = *static_cast<const Encode*>(job);
  const Encoder& encoder = *encode.encoder;
  const long dim = encoder.dim;
  Workspace<ROWS> space(&encoder, nullptr, memory);
  for (Piece piece; pieces.take(piece);) {
    const Place& place = encode.places[piece.index];
    const History& history = encode.histories[place.request];
    const long depth = piece.phase / 2, start = history.past + place.first;
    const Layer& layer = encoder.layers[depth];
    const State<T> state = state_of<T>(history, depth);
    space.rows = encode.tiles + piece.index * dim * ROWS;
    if (piece.phase == 0) load_events(space, encode.terms, encode.num_terms, dim, place);
    if (piece.phase % 2 == 0) {
      write_keys_and_values<ROWS, T>(space, encoder, layer, state, start, place.count);
    } else {
      const Reach reach = {history.past + history.added, encoder.is_causal, start};
      apply_layer<ROWS, T>(space, encoder, layer, state, reach);
    }
  }
}

// The product of a layer's weights with a tile, and a bias.
template <int ROWS, class T, class Take>
inline void apply_linear(const Linear& layer, const float* bias, const float* input, const Take& take) {
  multiply<ROWS>(static_cast<const T*>(layer.weight), layer.inputs, layer.outputs, input, layer.inputs,
                 [&](long row, auto first, auto second) { take(row, first + bias[row], second + bias[row + 1]); });
}

// Layers one after the other, ReLU between them. The first one has no bias of its own: one is given, and a tile that is
// added to it, or null.
template <int ROWS, class T, class Take>
void feed_forward(Workspace<ROWS>& space, const Linear* layers, long num_layers, const float* bias, const float* added,
                  const float* input, const Take& take) {
  for (long i = 0; i < num_layers; ++i) {
    if (i > 0) bias = layers[i].bias, added = nullptr;
    const auto sum = [&](long row, Row<ROWS> product) {
      return added != nullptr ? product + load<ROWS>(added + row * ROWS) : product;
    };
    // Two products: with what is long at the end of either, sums do not stay in registers.
    if (i + 1 == num_layers) {
      apply_linear<ROWS, T>(layers[i], bias, input, [&](long row, auto first, auto second) {
        take(row, sum(row, first), sum(row + 1, second));
      });
    } else {
      float* output = space.layers[i % 2];
      apply_linear<ROWS, T>(layers[i], bias, input, [&](long row, auto first, auto second) {
        Factor<T>::store(output, row, maximum(same<ROWS>(0.0f), sum(row, first)),
                         maximum(same<ROWS>(0.0f), sum(row + 1, second)));
      });
      input = output;
    }
  }
}

// A tile of floats as factor.
template <int ROWS, class T>
const float* narrow(const float* tile, long rows, float* narrowed) {
  if (Factor<T>::DEPTH == 1) return tile;
  for (long row = 0; row < rows; row += 2)
    Factor<T>::store(narrowed, row, load<ROWS>(tile + row * ROWS), load<ROWS>(tile + (row + 1) * ROWS));
  return narrowed;
}

// Features are the dot products of the tile's vectors, after the dense one.
template <int ROWS>
void multiply_pairs(Workspace<ROWS>& space, const Head& head, const float* request_vectors, long num_vectors) {
  const long dim = head.dim;
  float* features = space.features;
  if (head.num_dense_layers > 0) {
    memcpy(features, space.vectors, sizeof(float) * dim * ROWS);
    features += dim * ROWS;
  }
  for (long one = 0; one < num_vectors; ++one, features += head.num_request_vectors * ROWS)
    multiply<ROWS>(request_vectors, dim, head.num_request_vectors, space.vectors + one * dim * ROWS, dim,
                   [&](long row, auto first, auto second) {
                     save(features + row * ROWS, first);
                     if (row + 1 < head.num_request_vectors) save(features + (row + 1) * ROWS, second);
                   });
  for (long one = 0; one < num_vectors; ++one)
    for (long other = one + 1; other < num_vectors; ++other, features += ROWS) {
      Row<ROWS> sums[2] = {same<ROWS>(0.0f), same<ROWS>(0.0f)};
      for (long d = 0; d < dim; ++d)
        sums[d % 2] = sums[d % 2] + load<ROWS>(space.vectors + (one * dim + d) * ROWS) *
                                        load<ROWS>(space.vectors + (other * dim + d) * ROWS);
      save(features, sums[0] + sums[1]);
    }
  if (features < space.features + head.over[0].inputs * ROWS) save(features, same<ROWS>(0.0f));
}

// Features are what the cross net makes of the tile's vectors; low ranks are those of all its layers.
template <int ROWS, class T>
void cross(Workspace<ROWS>& space, const Head& head, const Requests& requests, long request) {
  const long size = head.over[0].inputs, rank = head.cross[0].outputs;
  memcpy(space.features, space.vectors, sizeof(float) * size * ROWS);
  float* low_rank = space.low_ranks;
  for (long i = 0; i < head.num_cross_layers; ++i, low_rank += rank * ROWS) {
    const Linear &down = head.cross[2 * i], &up = head.cross[2 * i + 1];
    apply_linear<ROWS, T>(down, requests.constants[i] + request * rank,
                          narrow<ROWS, T>(space.features, size, space.narrowed), save_to<ROWS>(low_rank));
    if (i > 0)
      multiply<ROWS>(requests.matrices[i] + request * rank * i * rank, i * rank, rank, space.low_ranks, i * rank,
                     add_to<ROWS>(low_rank));
    apply_linear<ROWS, T>(up, up.bias, narrow<ROWS, T>(low_rank, rank, space.narrowed),
                          [&](long row, auto first, auto second) {
                            add_to<ROWS>(space.features)(row, load<ROWS>(space.vectors + row * ROWS) * first,
                                                         load<ROWS>(space.vectors + (row + 1) * ROWS) * second);
                          });
  }
}

// Logits of the tile whose vectors, but the dense one, are in place.
template <int ROWS, class T, class Take>
void apply_head(Workspace<ROWS>& space, const Head& head, const Requests& requests, long request, long num_vectors,
                const Take& take) {
  if (head.num_dense_layers > 0) {
    const Linear& first = head.dense[0];
    feed_forward<ROWS, T>(space, head.dense, head.num_dense_layers, requests.dense + request * first.outputs, nullptr,
                          narrow<ROWS, T>(space.features, first.inputs, space.narrowed),
                          [&](long d, auto one, auto other) {
                            save(space.vectors + d * ROWS, maximum(same<ROWS>(0.0f), one));
                            save(space.vectors + (d + 1) * ROWS, maximum(same<ROWS>(0.0f), other));
                          });
  }
  const Linear& first = head.over[0];
  const long depth = head.num_cross_layers;
  float* added = nullptr;
  if (depth > 0) {
    cross<ROWS, T>(space, head, requests, request);
    // The first layer after it writes to the other tile.
    added = space.layers[1];
    const long rows = depth * head.cross[0].outputs;
    multiply<ROWS>(requests.matrices[depth] + request * first.outputs * rows, rows, first.outputs, space.low_ranks,
                   rows, save_to<ROWS>(added));
  } else {
    multiply_pairs<ROWS>(space, head, requests.vectors + request * head.num_request_vectors * head.dim, num_vectors);
  }
  feed_forward<ROWS, T>(space, head.over, head.num_over_layers, requests.constants[depth] + request * first.outputs,
                        added, narrow<ROWS, T>(space.features, first.inputs, space.narrowed), take);
}

// What the encoder makes of a tile of candidates, to `vectors`.
template <int ROWS, class T>
void encode_candidates(Workspace<ROWS>& space, const Encoder& encoder, const History& history, float* vectors) {
  const Reach reach = {history.past, false, 0};
  for (long depth = 0; depth < encoder.num_layers; ++depth)
    apply_layer<ROWS, T>(space, encoder, encoder.layers[depth], state_of<T>(history, depth), reach);
  norm<ROWS>(space.rows, encoder.dim, encoder.epsilon, encoder.output_norm_weight, encoder.output_norm_bias,
             save_to<ROWS>(vectors));
}

template <int ROWS, class T>
void score(const void* job, float* memory, Pieces& pieces) {
  const Score& score = *static_cast<const Score*>(job);
  const Encoder* encoder = score.encoder;
  const Head* head = score.head;
  Workspace<ROWS> space(encoder, head, memory);
  for (Piece piece; pieces.take(piece);) {
    const auto& [request, first, start, count] = score.places[piece.index];
    float* vectors = head != nullptr ? space.vectors : space.rows;
    if (head != nullptr && head->num_dense_layers > 0) {
      const long inputs = head->num_dense_inputs;
      memset(space.features, 0, sizeof(float) * head->dense[0].inputs * ROWS);
      load_rows<ROWS>({score.dense, nullptr, inputs}, inputs, start, count, space.features);
      vectors += head->dim * ROWS;
    }
    if (head != nullptr) {
      for (long slot = 0; slot < head->num_slots; ++slot, vectors += head->dim * ROWS)
        load_rows<ROWS>(score.slots[slot], head->dim, start, count, vectors);
    }
    if (encoder != nullptr) {
      load_rows<ROWS>(score.items, encoder->dim, start, count, space.rows);
      encode_candidates<ROWS, T>(space, *encoder, score.histories[request], vectors);
      vectors += encoder->dim * ROWS;
    }
    if (head == nullptr) {
      save_rows<ROWS>(space.rows, encoder->dim, count, score.scores + start * encoder->dim, encoder->dim);
      continue;
    }
    const long num_vectors = (vectors - space.vectors) / (head->dim * ROWS), num_tasks = head->num_tasks;
    apply_head<ROWS, T>(space, *head, score.requests, request, num_vectors, [&](long task, auto one, auto other) {
      float lanes[2][ROWS];
      save(lanes[0], one), save(lanes[1], other);
      for (long side = 0; side < 2 && task + side < num_tasks; ++side)
        for (long row = 0; row < count; ++row) score.scores[(start + row) * num_tasks + task + side] = lanes[side][row];
    });
    for (long one = 0; score.interacted != nullptr && one < num_vectors; ++one)
      save_rows<ROWS>(space.vectors + one * head->dim * ROWS, head->dim, count,
                      score.interacted + (start * num_vectors + one) * head->dim, num_vectors * head->dim);
  }
}

constexpr long OUTPUTS = 64;  // of a piece of a fold: their weights stay in cache from one tile to the next

constexpr long pieces_of(long size, long of_one) { return (size + of_one - 1) / of_one; }

template <int ROWS>
void fold(const void* job, float* memory, Pieces& pieces) {
  const Fold& fold = *static_cast<const Fold*>(job);
  const long columns = fold.columns, blocks = pieces_of(fold.outputs, OUTPUTS), tiles = pieces_of(columns, ROWS);
  for (Piece piece; pieces.take(piece);) {
    const long place = piece.index / tiles, column = piece.index % tiles * ROWS, count = least(ROWS, columns - column);
    const long row = place / blocks, output = place % blocks * OUTPUTS;
    const float *x = fold.rows + row * fold.size, *factors = fold.factors + column;
    float lanes[2][ROWS] = {};
    for (long i = 0; i < fold.size; ++i) {
      memcpy(lanes[0], factors + i * columns, sizeof(float) * count);
      save(memory + i * ROWS, load<ROWS>(lanes[0]) * x[i]);
    }
    float* to = fold.folded + (row * fold.outputs + output) * columns + column;
    const long outputs = least(OUTPUTS, fold.outputs - output);
    multiply<ROWS>(fold.matrix + output * fold.size, fold.size, outputs, memory, fold.size,
                   [&](long one, auto first, auto second) {
                     save(lanes[0], first), save(lanes[1], second);
                     for (long side = 0; side < 2 && one + side < outputs; ++side)
                       memcpy(to + (one + side) * columns, lanes[side], sizeof(float) * count);
                   });
  }
}

void share_fold(const Fold& job, const Team& team) {
  const size_t count = job.num_rows * pieces_of(job.outputs, OUTPUTS) * pieces_of(job.columns, MOST_ROWS);
  share(team, count, 1, job.size * MOST_ROWS, fold<MOST_ROWS>, &job);
}

template <int ROWS, class T>
void share_encode(const Encode& job, const Team& team) {
  const size_t floats = Workspace<ROWS>(job.encoder, nullptr, nullptr).floats();
  // After the last layer's keys and values nothing reads the events.
  share(team, job.num_places, 2 * job.encoder->num_layers - 1, floats, encode<ROWS, T>, &job);
}

template <int ROWS, class T>
void share_score(const Score& job, const Team& team) {
  const size_t floats = Workspace<ROWS>(job.encoder, job.head, nullptr).floats();
  share(team, job.num_places, 1, floats, score<ROWS, T>, &job);
}

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
using Bfloat16 = float;  // never asked for: operators.cpp refuses it
#endif

// Calls with tiles of so many rows.
#define WITH_ROWS(FUNCTION, TYPE)               \
  (rows == 8    ? FUNCTION<8, TYPE>(job, team)  \
   : rows == 16 ? FUNCTION<16, TYPE>(job, team) \
                : FUNCTION<MOST_ROWS, TYPE>(job, team))

void encode_rows(const Encode& job, int rows, bool is_bfloat16, const Team& team) {
  is_bfloat16 ? WITH_ROWS(share_encode, Bfloat16) : WITH_ROWS(share_encode, float);
}

void score_rows(const Score& job, int rows, bool is_bfloat16, const Team& team) {
  is_bfloat16 ? WITH_ROWS(share_score, Bfloat16) : WITH_ROWS(share_score, float);
}

}  // namespace

const Kernels KERNELS::kernels = {MOST_ROWS, MULTIPLIES_BFLOAT16, encode_rows, score_rows, share_fold};

}  // namespace torchrec_amort
