// What kernels compute with, and the kernels of each kind of processor.
//
// kernels.cpp is compiled once for each kind, all else for any x86-64. An inline function or a template of a header is
// emitted wherever it is used, and the linker keeps one copy for all: it might keep the one with instructions that the
// processor at hand lacks. So what kernels.cpp includes has neither, and all that it defines is its own, but a table.
//
// Letters: N history events and C candidates, all requests together; n events of one request; D model dimension; H
// heads of dimension K; F width of the feed-forward networks; L layers; R vectors of a request and U of a candidate
// that a DLRM interacts; X = U D coordinates of a candidate; T tasks.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "threads.h"

namespace torchrec_amort {

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
  int64_t dim, heads, width, num_layers;
  bool is_causal;
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
// the encoder, and the first one is the dense one if there are dense layers. They meet in a cross net, or in dot
// products if that has no layers.
//
// Dot products: columns of the first layer of `over` are for the dense vector, pairs of a candidate's and a request's
// vector, and pairs of two of a candidate's. What a request adds to that layer is a head of its own, whose candidates
// are requests, without vectors of others.
//
// Cross net: `cross` has two matrices of each layer, down to its rank [K][X] and up again [X][K]; the first layer of
// `over` reads all coordinates.
struct Head {
  int64_t dim, num_request_vectors, num_slots, num_dense_inputs, num_dense_layers, num_cross_layers, num_over_layers,
      num_tasks;
  const Linear *dense, *cross, *over;
};

// What requests add, one after the other: constants [W] to the first dense layer, vectors [R][D] to dot products, and,
// to what each cross layer and then the first layer of `over` multiply with [O][X], constants [O] and the low ranks of
// the layers before, through matrices [O][l K].
struct Requests {
  const float *dense, *vectors;
  const float *const *constants, *const *matrices;
};

// Rows of embeddings of all candidates: those of a table by their ids, or one after the other if there are none.
struct Rows {
  const float* table;
  const int64_t* ids;
  int64_t stride;
};

// Of one request, from its first event on: keys [L][H][n][K], and values [L][D][n], so that products read both in
// order; how many events there are, and how many come after them. Strides count entries; after the n values of each row
// there is one entry more, finite if it is bfloat16.
struct History {
  void *keys, *values;
  int64_t key_layer, key_head, key_event, value_layer, value_row;
  int64_t past, added;
};

// A tile's rows: `count` of `request`, from its row `first` on, which is row `start` of all.
struct Place {
  int64_t request, first, start, count;
};

// Phase one: writes the keys and values of the events that are added, each the sum of rows of `terms`. `tiles` has
// memory for D numbers of each row of each place.
struct Encode {
  const Encoder* encoder;
  const Rows* terms;
  int64_t num_terms;
  const History* histories;
  const Place* places;
  int64_t num_places;
  float* tiles;
};

// Phase two: of candidates, with rows of their items, dense inputs [C][inputs] and rows of each slot, logits [C][T]
// with a head, and vectors [C][D] without. Without an encoder the slots hold all, and there are no histories. A head's
// vectors [C][U][D] go to `interacted`, unless it is null.
struct Score {
  const Encoder* encoder;
  const Head* head;
  Rows items;
  const float* dense;
  const Rows* slots;
  const History* histories;
  Requests requests;
  const Place* places;
  int64_t num_places;
  float *scores, *interacted;
};

// Of each of `num_rows` rows x: the matrix [outputs][size] times x times the factors [size][columns], to `folded`
// [num_rows][outputs][columns].
struct Fold {
  const float *matrix, *rows, *factors;
  int64_t num_rows, outputs, size, columns;
  float* folded;
};

// Tiles are of 8, 16 or `most_rows` rows. Weights, keys and values are float32, or bfloat16 where it is multiplied.
struct Kernels {
  int most_rows;
  bool multiplies_bfloat16;
  void (*encode)(const Encode& encode, int rows, bool is_bfloat16, const Team& team);
  void (*score)(const Score& score, int rows, bool is_bfloat16, const Team& team);
  void (*fold)(const Fold& fold, const Team& team);
};

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace torchrec_amort
