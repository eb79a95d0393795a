// The operators of the kernels, `torch.ops.torchrec_amort`: what they are given is checked before anything is written.
//
// An encoder is a list of tensors, each of all layers, matrices as torch.nn.Linear has them: query [L, D, D], key and
// value [L, 2 D, D], output [L, D, D], widen [L, F, D], narrow [L, D, F]; and in float32 the bias of widen [L, F], of
// each layer the norms' weights and biases and the bias of narrow [L, 5, D], and those of the last norm [2, D].
//
// A head's layers are a list: dense ones, those of a cross net, and those after the interaction. Of the first and the
// last it has a weight, and then weight and bias of each that follows; of each cross layer a weight down to its rank
// [K, X], and weight and bias up again [X, K], [X]. A bias that is not there is what a request adds. Layers have even
// numbers of inputs and outputs; those that are too many are zero.
//
// Rows of embeddings are a table [R, D], and ids if they are not all of its rows in turn. A state is keys
// [L, H, n, K] and values [L, D, n + 1], whose last column is never a value; its requests' events stand one after the
// other from a first one on. Letters are those of kernels.h, and B requests.
//
// No list is ever empty: what AOTInductor compiles hands on none that is.
//
// `beside_pytorch` is whether PyTorch's own operations come right before or after: its threads then share the work, see
// threads.h.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace torchrec_amort {
namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Counts = c10::SmallVector<int64_t, 8>;

// The kernels for this processor, as far as ATEN_CPU_CAPABILITY lets them; null if there are none.
const Kernels* kernels_here() {
  static const Kernels* kernels = []() -> const Kernels* {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0)
      return __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::kernels : &avx512::kernels;
    return capability.rfind("AVX2", 0) == 0 ? &avx2::kernels : nullptr;
  }();
  return kernels;
}

bool multiplies(ScalarType dtype) {
  const Kernels* kernels = kernels_here();
  return kernels != nullptr && (dtype == at::kFloat || (dtype == at::kBFloat16 && kernels->multiplies_bfloat16));
}

const Kernels& kernels_for(ScalarType dtype) {
  TORCH_CHECK(multiplies(dtype), "no kernel for this processor multiplies ", dtype, ": its capability is ",
              at::get_cpu_capability());
  return *kernels_here();
}

std::atomic<int64_t> most_threads{std::numeric_limits<int>::max()};

void limit_threads(int64_t most) {
  TORCH_CHECK_VALUE(most >= 1, "threads are limited to ", most, ", and there is one at least");
  most_threads = most;
}

// PyTorch's choice, but no more than there are cores for.
int64_t num_threads() { return std::min<int64_t>(at::get_num_threads(), most_threads); }
Team team(bool beside_pytorch) { return {static_cast<int>(num_threads()), beside_pytorch}; }

// What an error calls an argument, or one of a list.
struct Name {
  const char* name;
  int64_t index = -1;
  const char* part = "";
};
std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.name;
  if (name.index >= 0) out << ' ' << name.index;
  return out << name.part;
}

// Where the entries of a contiguous tensor of a shape are.
template <class Entry = void>
Entry* entries(const Tensor& tensor, Name name, ScalarType dtype, IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.is_cpu() && tensor.is_contiguous(), name, " is of strides ",
                    tensor.strides(), ", ", tensor.scalar_type(), ", on ", tensor.device(),
                    "; native code reads contiguous ", dtype, " on a CPU");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " is ", tensor.sizes(), ", but native code reads ", shape);
  return static_cast<Entry*>(tensor.data_ptr());
}

const float* floats(const Tensor& tensor, Name name, IntArrayRef shape) {
  return entries<float>(tensor, name, at::kFloat, shape);
}

Counts counts(const Tensor& tensor, Name name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(tensor.dim() == 1 && (dtype == at::kLong || dtype == at::kInt) && tensor.is_cpu(), name, " is ",
                    tensor.sizes(), ", ", dtype, ", on ", tensor.device(),
                    "; native code reads whole numbers [B] on a CPU");
  Counts result(tensor.size(0));
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t place = static_cast<int64_t>(i) * tensor.stride(0);
    result[i] = dtype == at::kLong ? tensor.const_data_ptr<int64_t>()[place] : tensor.const_data_ptr<int32_t>()[place];
    TORCH_CHECK_VALUE(result[i] >= 0, name, " has ", result[i], ", and none can be negative");
  }
  return result;
}

int64_t sum(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

int64_t num_rows(const Tensor& table, const std::optional<Tensor>& ids) {
  return ids.has_value() ? ids->numel() : table.dim() > 0 ? table.size(0) : 0;
}

Rows rows_of(const Tensor& table, const std::optional<Tensor>& ids, Name name, int64_t count, int64_t dim) {
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == dim && num_rows(table, ids) == count, name, ": ",
                    num_rows(table, ids), " rows of a table ", table.sizes(), ", not ", count, " rows of ", dim);
  TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.is_cpu() && table.stride(1) == 1, name, ": a table of ",
                    table.scalar_type(), ", strides ", table.strides(), ", on ", table.device(), "; native code reads ",
                    at::kFloat, " on a CPU whose columns are next to each other");
  if (!ids.has_value()) return {table.const_data_ptr<float>(), nullptr, table.stride(0)};
  const auto* first = entries<const int64_t>(*ids, {name.name, name.index, ": ids"}, at::kLong, {count});
  const int64_t size = table.size(0);
  bool are_rows = true;
  for (int64_t i = 0; i < count; ++i) are_rows &= first[i] >= 0 && first[i] < size;
  if (!are_rows) {
    const auto* other = std::find_if(first, first + count, [&](int64_t id) { return id < 0 || id >= size; });
    TORCH_CHECK_VALUE(false, name, ": id ", *other, " is no row of a table of ", size);
  }
  return {table.const_data_ptr<float>(), first, table.stride(0)};
}

// Of each table from one on.
std::vector<Rows> all_rows(TensorList tables, const OptionalTensors& ids, size_t begin, const char* name, int64_t count,
                           int64_t dim) {
  TORCH_CHECK_VALUE(tables.size() == ids.size(), name, " have ", tables.size(), " tables, and ", ids.size(), " ids");
  std::vector<Rows> rows;
  for (size_t i = begin; i < tables.size(); ++i)
    rows.push_back(rows_of(tables[i], ids.get(i), {name, static_cast<int64_t>(i)}, count, dim));
  return rows;
}

// An encoder's weights, as kernels read them.
struct EncoderWeights {
  EncoderWeights(TensorList weights, int64_t num_heads, double epsilon, bool is_causal = false) {
    TORCH_CHECK_VALUE(weights.size() == 8, "encoder has ", weights.size(), " tensors, but native code reads 8");
    TORCH_CHECK_VALUE(weights[3].dim() == 3, "encoder: widen is ", weights[3].sizes(), ", not [layers, width, dim]");
    dtype = weights[3].scalar_type();
    const int64_t depth = weights[3].size(0), width = weights[3].size(1), dim = weights[3].size(2);
    TORCH_CHECK_VALUE(num_heads > 0 && dim % (2 * num_heads) == 0 && width % 2 == 0 && depth > 0, "encoder: ", depth,
                      " layers of dimension ", dim, ", width ", width, " and ", num_heads,
                      " heads, but native code needs one layer and even dimensions of each head and width");
    const auto matrices = [&](int place, const char* part, int64_t outputs, int64_t inputs) {
      return entries<char>(weights[place], {"encoder", -1, part}, dtype, {depth, outputs, inputs});
    };
    const char* query = matrices(0, ": query", dim, dim);
    const char* key_value = matrices(1, ": key_value", 2 * dim, dim);
    const char* output = matrices(2, ": output", dim, dim);
    const char* widen = matrices(3, ": widen", width, dim);
    const char* narrow = matrices(4, ": narrow", dim, width);
    const float* widen_bias = floats(weights[5], {"encoder", -1, ": widen_bias"}, {depth, width});
    const float* vectors = floats(weights[6], {"encoder", -1, ": layer_vectors"}, {depth, 5, dim});
    const float* output_norm = floats(weights[7], {"encoder", -1, ": output_norm"}, {2, dim});
    const int64_t square = dim * dim * weights[0].itemsize(), wide = width * dim * weights[0].itemsize();
    for (int64_t i = 0; i < depth; ++i) {
      const float* of_layer = vectors + i * 5 * dim;
      layers.push_back({of_layer, of_layer + dim, query + i * square, key_value + i * 2 * square, output + i * square,
                        of_layer + 2 * dim, of_layer + 3 * dim, widen + i * wide, widen_bias + i * width,
                        narrow + i * wide, of_layer + 4 * dim});
    }
    encoder = {dim, num_heads, width, depth, is_causal, epsilon, layers.data(), output_norm, output_norm + dim};
  }
  EncoderWeights(const EncoderWeights&) = delete;

  c10::SmallVector<Layer, 4> layers;
  Encoder encoder;
  ScalarType dtype;
};

// Appends the histories of a state's requests, of so many events each and so many that come after them.
void append_histories(std::vector<History>& histories, const Tensor& keys, const Tensor& values, int64_t start,
                      const Counts& past, const Counts& added, const EncoderWeights& weights) {
  const Encoder& encoder = weights.encoder;
  const int64_t head_dim = encoder.dim / encoder.heads;
  for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{keys, "keys"}, {values, "values"}})
    TORCH_CHECK_VALUE(tensor.scalar_type() == weights.dtype && tensor.is_cpu() && tensor.is_contiguous(), name,
                      " are of strides ", tensor.strides(), ", ", tensor.scalar_type(), ", on ", tensor.device(),
                      "; native code reads contiguous ", weights.dtype, " on a CPU");
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.dim() == 3, "keys are ", keys.sizes(), " and values ", values.sizes(),
                    ", not [layers, heads, events, head_dim] and [layers, dim, events + 1]");
  TORCH_CHECK_VALUE(keys.size(0) == encoder.num_layers && keys.size(1) == encoder.heads && keys.size(3) == head_dim,
                    "state is of ", keys.size(0), " layers, ", keys.size(1), " heads, dimension ",
                    keys.size(1) * keys.size(3), ", but the encoder has ", encoder.num_layers, ", ", encoder.heads,
                    ", ", encoder.dim, ": encode the history with it");
  TORCH_CHECK_VALUE(
      values.size(0) == encoder.num_layers && values.size(1) == encoder.dim && values.size(2) == keys.size(2) + 1,
      "values are ", values.sizes(), ", but with keys of ", keys.size(2), " events native code reads [",
      encoder.num_layers, ", ", encoder.dim, ", ", keys.size(2) + 1, "]");
  TORCH_CHECK_VALUE(start >= 0 && start + sum(past) + sum(added) <= keys.size(2), "a state of ", keys.size(2),
                    " events has none from ", start, " to ", start + sum(past) + sum(added));
  const int64_t size = keys.itemsize(), events = keys.size(2);
  for (size_t i = 0; i < past.size(); start += past[i] + added[i], ++i)
    histories.push_back({static_cast<char*>(keys.data_ptr()) + start * head_dim * size,
                         static_cast<char*>(values.data_ptr()) + start * size, encoder.dim * events, events * head_dim,
                         head_dim, encoder.dim * (events + 1), events + 1, past[i], added[i]});
}

std::vector<History> histories_of(TensorList keys, TensorList values, IntArrayRef starts, TensorList lengths,
                                  int64_t num_requests, const EncoderWeights& weights) {
  TORCH_CHECK_VALUE(values.size() == keys.size() && starts.size() == keys.size() && lengths.size() == keys.size(),
                    "states have ", keys.size(), " keys, ", values.size(), " values, ", starts.size(), " starts and ",
                    lengths.size(), " lengths");
  std::vector<History> histories;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Counts past = counts(lengths[i], {"lengths", static_cast<int64_t>(i)});
    append_histories(histories, keys[i], values[i], starts[i], past, Counts(past.size()), weights);
  }
  TORCH_CHECK_VALUE(static_cast<int64_t>(histories.size()) == num_requests, "the state is of ", histories.size(),
                    " requests, the candidates of ", num_requests, ": they need one history each");
  return histories;
}

// Tiles of the fewest rows that hold all of any request's, or of most rows.
struct Tiles {
  Tiles(const Counts& counts, const Kernels& kernels) {
    const int64_t longest = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
    rows = longest <= 8 ? 8 : longest <= 16 ? 16 : kernels.most_rows;
    int64_t start = 0, request = 0;
    for (const int64_t count : counts) {
      for (int64_t first = 0; first < count; first += rows)
        places.push_back({request, first, start + first, std::min<int64_t>(rows, count - first)});
      start += count, ++request;
    }
  }

  int rows;
  std::vector<Place> places;
};

// Layers of a list of weights, and their places there.
c10::SmallVector<Linear, 4> layers_of(TensorList weights, int64_t begin, int64_t end, ScalarType dtype) {
  c10::SmallVector<Linear, 4> layers;
  for (int64_t i = begin; i < end; i += i == begin ? 1 : 2) {
    const Tensor& weight = weights[i];
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) % 2 == 0 && weight.size(1) % 2 == 0, "layers ", i, " is ",
                      weight.sizes(), ", not of even numbers of outputs and inputs");
    const int64_t outputs = weight.size(0), inputs = layers.empty() ? weight.size(1) : layers.back().outputs;
    const float* bias = i == begin ? nullptr : floats(weights[i + 1], {"layers", i + 1}, {outputs});
    layers.push_back({entries(weight, {"layers", i}, dtype, {outputs, inputs}), bias, inputs, outputs});
  }
  return layers;
}

// How many layers a head has of each kind but the last.
struct Depth {
  int64_t dense, cross;
};

// What a head reads of requests or candidates: its weights, and the job of its kernel but for what requests add.
struct HeadJob {
  HeadJob(TensorList layers, Depth depth, int64_t num_tasks, TensorList tables, const OptionalTensors& ids,
          int64_t count, int64_t dim, int64_t num_request_vectors, const EncoderWeights* encoder) {
    const int64_t has_encoder = encoder != nullptr, num_slots = static_cast<int64_t>(tables.size()) - 1 - has_encoder;
    const int64_t num_layers = layers.size(), num_of_dense = std::max<int64_t>(2 * depth.dense - 1, 0);
    const int64_t num_before = num_of_dense + 3 * depth.cross;
    TORCH_CHECK_VALUE(depth.dense >= 0 && num_layers > num_before && (num_layers - num_before) % 2 == 1, "layers are ",
                      num_layers, " tensors, not those of ", depth.dense, " dense layers, ", depth.cross,
                      " cross layers and more");
    TORCH_CHECK_VALUE(num_slots >= 0 && tables[0].dim() == 2, "tables are ", tables.size(),
                      ", not dense inputs, slots, and items for an encoder");
    dtype = layers[0].scalar_type();
    dense = layers_of(layers, 0, num_of_dense, dtype), over = layers_of(layers, num_before, num_layers, dtype);
    const int64_t has_dense = !dense.empty(), num_inputs = tables[0].size(1);
    num_vectors = has_dense + num_slots + has_encoder;
    for (int64_t i = num_of_dense; i < num_before; i += 3)
      for (const Linear& layer : layers_of(layers, i, i + 3, dtype)) cross.push_back(layer);
    if (depth.cross > 0) dim = cross.front().inputs / std::max<int64_t>(num_vectors, 1);
    const int64_t num_pairs = num_vectors * num_request_vectors + num_vectors * (num_vectors - 1) / 2;
    const int64_t features = depth.cross > 0 ? num_vectors * dim : has_dense * dim + num_pairs;
    for (size_t i = 0; i < cross.size(); i += 2)
      TORCH_CHECK_VALUE(
          cross[i].inputs == features && cross[i].outputs == cross[0].outputs && cross[i + 1].outputs == features,
          num_vectors, " vectors are crossed, but cross layer ", i / 2, " goes from ", cross[i].inputs, " down to ",
          cross[i].outputs, " and up to ", cross[i + 1].outputs, ", and the first one from ", cross[0].inputs,
          " down to ", cross[0].outputs);
    TORCH_CHECK_VALUE(over.front().inputs == features + features % 2, "vectors make ", features,
                      " features, but the first layer after the interaction has ", over.front().inputs);
    TORCH_CHECK_VALUE(over.back().outputs == num_tasks + num_tasks % 2, "tasks are ", num_tasks,
                      ", but the last layer has ", over.back().outputs);
    head = {dim,
            num_request_vectors,
            num_slots,
            num_inputs,
            depth.dense,
            depth.cross,
            static_cast<int64_t>(over.size()),
            num_tasks,
            dense.data(),
            cross.data(),
            over.data()};
    job.head = &head;
    if (has_dense) {
      TORCH_CHECK_VALUE(dense.front().inputs == num_inputs + num_inputs % 2, "dense inputs are ", num_inputs,
                        ", but the first layer has ", dense.front().inputs);
      TORCH_CHECK_VALUE(dense.back().outputs == dim, "the last dense layer has ", dense.back().outputs,
                        " outputs, but embeddings ", dim);
      job.dense = floats(tables[0], {"dense inputs"}, {count, num_inputs});
    }
    rows = all_rows(tables, ids, 1, "rows", count, dim);
    job.slots = rows.data();
    if (encoder == nullptr) return;
    TORCH_CHECK_VALUE(encoder->encoder.dim == dim && encoder->dtype == dtype, "the encoder is of dimension ",
                      encoder->encoder.dim, ", ", encoder->dtype, ", but the head of ", dim, ", ", dtype);
    job.encoder = &encoder->encoder, job.items = rows.back();
  }
  HeadJob(const HeadJob&) = delete;

  void run(const Counts& counts, const Requests& requests, const Tensor& scores, float* interacted) {
    const Kernels& kernels = kernels_for(dtype);
    const Tiles tiles(counts, kernels);
    job.requests = requests, job.scores = scores.data_ptr<float>(), job.interacted = interacted;
    job.places = tiles.places.data(), job.num_places = tiles.places.size();
    kernels.score(job, tiles.rows, dtype == at::kBFloat16, team(false));
  }

  c10::SmallVector<Linear, 4> dense, cross, over;
  std::vector<Rows> rows;
  int64_t num_vectors;
  ScalarType dtype;
  Head head;
  Score job{};
};

void encode(const EncoderWeights& weights, TensorList tables, const OptionalTensors& ids, const Counts& added,
            const std::vector<History>& histories, bool beside_pytorch) {
  const Kernels& kernels = kernels_for(weights.dtype);
  const int64_t dim = weights.encoder.dim;
  const std::vector<Rows> terms = all_rows(tables, ids, 0, "events", sum(added), dim);
  TORCH_CHECK_VALUE(!terms.empty() || sum(added) == 0, "events are ", sum(added), ", but of no table");
  const Tiles tiles(added, kernels);
  const auto memory = c10::GetCPUAllocator()->allocate(tiles.places.size() * dim * tiles.rows * sizeof(float));
  const Encode job = {&weights.encoder,
                      terms.data(),
                      static_cast<int64_t>(terms.size()),
                      histories.data(),
                      tiles.places.data(),
                      static_cast<int64_t>(tiles.places.size()),
                      static_cast<float*>(memory.get())};
  kernels.encode(job, tiles.rows, weights.dtype == at::kBFloat16, team(beside_pytorch));
}

std::tuple<Tensor, Tensor> encode_history(TensorList encoder, int64_t num_heads, bool is_causal, double epsilon,
                                          TensorList tables, const OptionalTensors& ids, const Tensor& lengths,
                                          bool beside_pytorch) {
  const EncoderWeights weights(encoder, num_heads, epsilon, is_causal);
  const Encoder& of = weights.encoder;
  const Counts added = counts(lengths, {"lengths"});
  const int64_t num_events = sum(added);
  const auto options = at::TensorOptions(weights.dtype);
  Tensor keys = at::empty({of.num_layers, num_heads, num_events, of.dim / num_heads}, options);
  // Products of pairs read one event beyond a request's last, times zero: it must be finite, written by now or not.
  Tensor values = at::zeros({of.num_layers, of.dim, num_events + 1}, options);
  std::vector<History> histories;
  append_histories(histories, keys, values, 0, Counts(added.size()), added, weights);
  encode(weights, tables, ids, added, histories, beside_pytorch);
  return {keys, values};
}

void extend_history(TensorList encoder, int64_t num_heads, double epsilon, TensorList tables,
                    const OptionalTensors& ids, const Tensor& lengths, const Tensor& past, Tensor& keys, Tensor& values,
                    int64_t start, bool beside_pytorch) {
  const EncoderWeights weights(encoder, num_heads, epsilon, true);
  const Counts added = counts(lengths, {"lengths"}), before = counts(past, {"past"});
  TORCH_CHECK_VALUE(added.size() == before.size(), "lengths are of ", added.size(), " requests, past of ",
                    before.size());
  std::vector<History> histories;
  append_histories(histories, keys, values, start, before, added, weights);
  encode(weights, tables, ids, added, histories, beside_pytorch);
}

Tensor score_candidates(TensorList encoder, int64_t num_heads, double epsilon, TensorList keys, TensorList values,
                        IntArrayRef starts, TensorList lengths, const Tensor& items, const std::optional<Tensor>& ids,
                        const Tensor& num_candidates, bool beside_pytorch) {
  const EncoderWeights weights(encoder, num_heads, epsilon);
  const Kernels& kernels = kernels_for(weights.dtype);
  const Counts candidates = counts(num_candidates, {"num_candidates"});
  const auto histories = histories_of(keys, values, starts, lengths, candidates.size(), weights);
  const Tiles tiles(candidates, kernels);
  Score job{};
  job.encoder = &weights.encoder, job.histories = histories.data();
  job.items = rows_of(items, ids, {"items"}, sum(candidates), weights.encoder.dim);
  job.places = tiles.places.data(), job.num_places = tiles.places.size();
  Tensor vectors = at::empty({sum(candidates), weights.encoder.dim}, at::kFloat);
  job.scores = vectors.data_ptr<float>();
  kernels.score(job, tiles.rows, weights.dtype == at::kBFloat16, team(beside_pytorch));
  return vectors;
}

std::tuple<Tensor, Tensor> dot_request(TensorList layers, int64_t num_dense_layers, const Tensor& dense_bias,
                                       const Tensor& over_bias, int64_t dim, TensorList tables,
                                       const OptionalTensors& ids) {
  const int64_t num_requests = tables.empty() || tables[0].dim() == 0 ? 0 : tables[0].size(0);
  HeadJob job(layers, {num_dense_layers, 0}, over_bias.numel(), tables, ids, num_requests, dim, 0, nullptr);
  TORCH_CHECK_VALUE(job.over.size() == 1, "after the dense layers there are ", job.over.size(), ", not 1");
  const float* constant = floats(over_bias, {"over_bias"}, {job.over.front().outputs});
  Requests requests{};
  requests.constants = &constant;
  if (num_dense_layers > 0) requests.dense = floats(dense_bias, {"dense_bias"}, {job.dense.front().outputs});
  Tensor first = at::empty({num_requests, over_bias.numel()}, at::kFloat);
  Tensor vectors = at::empty({num_requests, job.num_vectors, dim}, at::kFloat);
  job.run({num_requests}, requests, first, vectors.data_ptr<float>());
  return {first, vectors};
}

// Logits of candidates; `job` has what is read of them.
Tensor logits_of(HeadJob& job, const Counts& candidates, const Tensor& dense_term, Name name, Requests requests) {
  if (!job.dense.empty())
    requests.dense = floats(dense_term, name, {static_cast<int64_t>(candidates.size()), job.dense.front().outputs});
  Tensor logits = at::empty({sum(candidates), job.head.num_tasks}, at::kFloat);
  job.run(candidates, requests, logits, nullptr);
  return logits;
}

Tensor dot_logits(HeadJob& job, const Counts& candidates, const Tensor& dense_term, const Tensor& first_term,
                  const Tensor& vectors) {
  const int64_t num_requests = candidates.size();
  const float* constant = floats(first_term, {"first_term"}, {num_requests, job.over.front().outputs});
  Requests requests{};
  requests.vectors = floats(vectors, {"vectors"}, {num_requests, job.head.num_request_vectors, job.head.dim});
  requests.constants = &constant;
  return logits_of(job, candidates, dense_term, {"dense_term"}, requests);
}

Tensor cross_logits(HeadJob& job, const Counts& candidates, TensorList terms) {
  const int64_t num_requests = candidates.size(), num_layers = job.head.num_cross_layers;
  const int64_t num_terms = terms.size(), rank = job.cross.front().outputs;
  TORCH_CHECK_VALUE(num_terms == 2 * num_layers + 2, "terms are ", num_terms, " tensors, but of ", num_layers,
                    " cross layers native code reads ", 2 * num_layers + 2);
  c10::SmallVector<const float*, 4> constants, matrices;
  for (int64_t i = 0; i <= num_layers; ++i) {
    const int64_t outputs = i < num_layers ? rank : job.over.front().outputs, place = i == 0 ? 1 : 2 * i;
    constants.push_back(floats(terms[place], {"terms", place}, {num_requests, outputs}));
    // The first layer reads no low ranks.
    matrices.push_back(i == 0 ? nullptr
                              : floats(terms[place + 1], {"terms", place + 1}, {num_requests, outputs, i * rank}));
  }
  return logits_of(job, candidates, terms[0], {"terms", 0}, {nullptr, nullptr, constants.data(), matrices.data()});
}

Depth with_cross_net(int64_t num_dense_layers, int64_t num_cross_layers) {
  TORCH_CHECK_VALUE(num_cross_layers >= 1, "cross layers are ", num_cross_layers, ", and there is one at least");
  return {num_dense_layers, num_cross_layers};
}

Tensor dot_candidates(TensorList layers, int64_t num_dense_layers, int64_t num_tasks, const Tensor& dense_term,
                      const Tensor& first_term, const Tensor& vectors, TensorList tables, const OptionalTensors& ids,
                      const Tensor& num_candidates) {
  const Counts candidates = counts(num_candidates, {"num_candidates"});
  TORCH_CHECK_VALUE(vectors.dim() == 3, "vectors are ", vectors.sizes(), ", not [requests, vectors, dim]");
  HeadJob job(layers, {num_dense_layers, 0}, num_tasks, tables, ids, sum(candidates), vectors.size(2), vectors.size(1),
              nullptr);
  return dot_logits(job, candidates, dense_term, first_term, vectors);
}

Tensor dot_history_candidates(TensorList layers, int64_t num_dense_layers, int64_t num_tasks, const Tensor& dense_term,
                              const Tensor& first_term, const Tensor& vectors, TensorList tables,
                              const OptionalTensors& ids, const Tensor& num_candidates, TensorList encoder,
                              int64_t num_heads, double epsilon, TensorList keys, TensorList values, IntArrayRef starts,
                              TensorList lengths) {
  const Counts candidates = counts(num_candidates, {"num_candidates"});
  TORCH_CHECK_VALUE(vectors.dim() == 3, "vectors are ", vectors.sizes(), ", not [requests, vectors, dim]");
  const EncoderWeights weights(encoder, num_heads, epsilon);
  HeadJob job(layers, {num_dense_layers, 0}, num_tasks, tables, ids, sum(candidates), vectors.size(2), vectors.size(1),
              &weights);
  const auto histories = histories_of(keys, values, starts, lengths, candidates.size(), weights);
  job.job.histories = histories.data();
  return dot_logits(job, candidates, dense_term, first_term, vectors);
}

Tensor cross_candidates(TensorList layers, int64_t num_dense_layers, int64_t num_cross_layers, int64_t num_tasks,
                        TensorList terms, TensorList tables, const OptionalTensors& ids, const Tensor& num_candidates) {
  const Counts candidates = counts(num_candidates, {"num_candidates"});
  HeadJob job(layers, with_cross_net(num_dense_layers, num_cross_layers), num_tasks, tables, ids, sum(candidates), 0, 0,
              nullptr);
  return cross_logits(job, candidates, terms);
}

Tensor cross_history_candidates(TensorList layers, int64_t num_dense_layers, int64_t num_cross_layers,
                                int64_t num_tasks, TensorList terms, TensorList tables, const OptionalTensors& ids,
                                const Tensor& num_candidates, TensorList encoder, int64_t num_heads, double epsilon,
                                TensorList keys, TensorList values, IntArrayRef starts, TensorList lengths) {
  const Counts candidates = counts(num_candidates, {"num_candidates"});
  const EncoderWeights weights(encoder, num_heads, epsilon);
  HeadJob job(layers, with_cross_net(num_dense_layers, num_cross_layers), num_tasks, tables, ids, sum(candidates), 0, 0,
              &weights);
  const auto histories = histories_of(keys, values, starts, lengths, candidates.size(), weights);
  job.job.histories = histories.data();
  return cross_logits(job, candidates, terms);
}

Tensor fold(const Tensor& matrix, const Tensor& rows, const Tensor& factors) {
  TORCH_CHECK_VALUE(matrix.dim() == 2 && rows.dim() == 2 && factors.dim() == 2, "matrix, rows and factors are ",
                    matrix.sizes(), ", ", rows.sizes(), " and ", factors.sizes(),
                    ", not [outputs, size], [B, size] and [size, columns]");
  const int64_t num_rows = rows.size(0), outputs = matrix.size(0), size = matrix.size(1), columns = factors.size(1);
  Tensor folded = at::empty({num_rows, outputs, columns}, at::kFloat);
  const Fold job = {floats(matrix, {"matrix"}, {outputs, size}),
                    floats(rows, {"rows"}, {num_rows, size}),
                    floats(factors, {"factors"}, {size, columns}),
                    num_rows,
                    outputs,
                    size,
                    columns,
                    folded.data_ptr<float>()};
  kernels_for(at::kFloat).fold(job, team(false));
  return folded;
}

// What torch.export and the like ask instead of computing: shapes and types.
namespace fake {

c10::SymInt num_rows(const Tensor& table, const std::optional<Tensor>& ids) {
  return ids.has_value() ? ids->sym_size(0) : table.sym_size(0);
}

Tensor empty(c10::SymIntArrayRef shape, const Tensor& like, ScalarType dtype) {
  return at::empty_symint(shape, like.options().dtype(dtype));
}

std::tuple<Tensor, Tensor> encode_history(TensorList encoder, int64_t num_heads, bool, double, TensorList tables,
                                          const OptionalTensors& ids, const Tensor&, bool) {
  const Tensor& widen = encoder[3];
  const auto depth = widen.sym_size(0), dim = widen.sym_size(2), num_events = num_rows(tables[0], ids.get(0));
  return {empty({depth, num_heads, num_events, dim / num_heads}, widen, widen.scalar_type()),
          empty({depth, dim, num_events + 1}, widen, widen.scalar_type())};
}

void extend_history(TensorList, int64_t, double, TensorList, const OptionalTensors&, const Tensor&, const Tensor&,
                    Tensor&, Tensor&, int64_t, bool) {}

Tensor score_candidates(TensorList encoder, int64_t, double, TensorList, TensorList, IntArrayRef, TensorList,
                        const Tensor& items, const std::optional<Tensor>& ids, const Tensor&, bool) {
  return empty({num_rows(items, ids), encoder[3].sym_size(2)}, items, at::kFloat);
}

std::tuple<Tensor, Tensor> dot_request(TensorList, int64_t num_dense_layers, const Tensor&, const Tensor& over_bias,
                                       int64_t dim, TensorList tables, const OptionalTensors&) {
  const int64_t num_vectors = (num_dense_layers > 0) + static_cast<int64_t>(tables.size()) - 1;
  return {empty({tables[0].sym_size(0), over_bias.sym_size(0)}, tables[0], at::kFloat),
          empty({tables[0].sym_size(0), num_vectors, dim}, tables[0], at::kFloat)};
}

Tensor dot_candidates(TensorList, int64_t, int64_t num_tasks, const Tensor&, const Tensor&, const Tensor&,
                      TensorList tables, const OptionalTensors&, const Tensor&) {
  return empty({tables[0].sym_size(0), num_tasks}, tables[0], at::kFloat);
}

Tensor dot_history_candidates(TensorList, int64_t, int64_t num_tasks, const Tensor&, const Tensor&, const Tensor&,
                              TensorList tables, const OptionalTensors&, const Tensor&, TensorList, int64_t, double,
                              TensorList, TensorList, IntArrayRef, TensorList) {
  return empty({tables[0].sym_size(0), num_tasks}, tables[0], at::kFloat);
}

Tensor cross_candidates(TensorList, int64_t, int64_t, int64_t num_tasks, TensorList, TensorList tables,
                        const OptionalTensors&, const Tensor&) {
  return empty({tables[0].sym_size(0), num_tasks}, tables[0], at::kFloat);
}

Tensor cross_history_candidates(TensorList, int64_t, int64_t, int64_t num_tasks, TensorList, TensorList tables,
                                const OptionalTensors&, const Tensor&, TensorList, int64_t, double, TensorList,
                                TensorList, IntArrayRef, TensorList) {
  return empty({tables[0].sym_size(0), num_tasks}, tables[0], at::kFloat);
}

Tensor fold(const Tensor& matrix, const Tensor& rows, const Tensor& factors) {
  return empty({rows.sym_size(0), matrix.sym_size(0), factors.sym_size(1)}, rows, at::kFloat);
}

}  // namespace fake

}  // namespace

TORCH_LIBRARY(torchrec_amort, library) {
  // Phase one of histories whose events are sums of rows of each table.
  library.def(
      "encode_history(Tensor[] encoder, int num_heads, bool is_causal, float epsilon, Tensor[] tables, Tensor?[] ids, "
      "Tensor lengths, bool beside_pytorch) -> (Tensor keys, Tensor values)");
  // Phase one of the events that follow `past` others of each request, causal, into the memory after these.
  library.def(
      "extend_history(Tensor[] encoder, int num_heads, float epsilon, Tensor[] tables, Tensor?[] ids, Tensor lengths, "
      "Tensor past, Tensor(a!) keys, Tensor(b!) values, int start, bool beside_pytorch) -> ()");
  // Phase two of the encoder: vectors [C, D]. States of some of the requests each stand in the candidates' order.
  library.def(
      "score_candidates(Tensor[] encoder, int num_heads, float epsilon, Tensor[] keys, Tensor[] values, int[] starts, "
      "Tensor[] lengths, Tensor items, Tensor? ids, Tensor num_candidates, bool beside_pytorch) -> Tensor");
  // Phase one of a dot head: what requests add to the first layer after the dense ones, and their vectors [B, R, D].
  // Tables are dense inputs [B, I], and of each slot.
  library.def(
      "dot_request(Tensor[] layers, int num_dense_layers, Tensor dense_bias, Tensor over_bias, int dim, "
      "Tensor[] tables, Tensor?[] ids) -> (Tensor first_term, Tensor vectors)");
  // Phase two of a dot head: logits [C, T]. Tables are dense inputs [C, I], and of each slot.
  library.def(
      "dot_candidates(Tensor[] layers, int num_dense_layers, int num_tasks, Tensor dense_term, Tensor first_term, "
      "Tensor vectors, Tensor[] tables, Tensor?[] ids, Tensor num_candidates) -> Tensor");
  // The same, and that of the encoder, which makes the last vector of each candidate from a row of the last table.
  library.def(
      "dot_history_candidates(Tensor[] layers, int num_dense_layers, int num_tasks, Tensor dense_term, "
      "Tensor first_term, Tensor vectors, Tensor[] tables, Tensor?[] ids, Tensor num_candidates, Tensor[] encoder, "
      "int num_heads, float epsilon, Tensor[] keys, Tensor[] values, int[] starts, Tensor[] lengths) -> Tensor");
  // Phase two of a head with a low-rank cross net: logits [C, T]. Terms are what requests add: to the first dense layer
  // [B, W], to the cross layers' low ranks [B, K], and to the first layer after them [B, O]; each but the first two is
  // followed by a matrix [B, K or O, l K] for the low ranks of the l cross layers before.
  library.def(
      "cross_candidates(Tensor[] layers, int num_dense_layers, int num_cross_layers, int num_tasks, Tensor[] terms, "
      "Tensor[] tables, Tensor?[] ids, Tensor num_candidates) -> Tensor");
  // The same, and that of the encoder, which makes the last vector of each candidate from a row of the last table.
  library.def(
      "cross_history_candidates(Tensor[] layers, int num_dense_layers, int num_cross_layers, int num_tasks, "
      "Tensor[] terms, Tensor[] tables, Tensor?[] ids, Tensor num_candidates, Tensor[] encoder, int num_heads, "
      "float epsilon, Tensor[] keys, Tensor[] values, int[] starts, Tensor[] lengths) -> Tensor");
  // Of each of rows x [B, X]: the matrix [O, X] times x times the factors [X, C]: [B, O, C]. It is what a request's
  // coordinates make of a linear layer, of what they are multiplied with.
  library.def("fold(Tensor matrix, Tensor rows, Tensor factors) -> Tensor");
  library.def("multiplies(ScalarType dtype) -> bool", multiplies);
  library.def("limit_threads(int most) -> ()", limit_threads);
  library.def("num_threads() -> int", num_threads);
}

TORCH_LIBRARY_IMPL(torchrec_amort, CPU, library) {
  library.impl("encode_history", encode_history);
  library.impl("extend_history", extend_history);
  library.impl("score_candidates", score_candidates);
  library.impl("dot_request", dot_request);
  library.impl("dot_candidates", dot_candidates);
  library.impl("dot_history_candidates", dot_history_candidates);
  library.impl("cross_candidates", cross_candidates);
  library.impl("cross_history_candidates", cross_history_candidates);
  library.impl("fold", fold);
}

TORCH_LIBRARY_IMPL(torchrec_amort, Meta, library) {
  library.impl("encode_history", fake::encode_history);
  library.impl("extend_history", fake::extend_history);
  library.impl("score_candidates", fake::score_candidates);
  library.impl("dot_request", fake::dot_request);
  library.impl("dot_candidates", fake::dot_candidates);
  library.impl("dot_history_candidates", fake::dot_history_candidates);
  library.impl("cross_candidates", fake::cross_candidates);
  library.impl("cross_history_candidates", fake::cross_history_candidates);
  library.impl("fold", fake::fold);
}

}  // namespace torchrec_amort
