// Threads that share the pieces of a call's work. Included by code that is compiled for newer processors: see
// kernels.h.

#pragma once

#include <stddef.h>

namespace torchrec_amort {

struct Piece {
  size_t phase, index;
};

// Some of a call's pieces, for one thread, which has done each when it asks for the next.
class Pieces {
 public:
  // Whether there is one that can be begun now.
  virtual bool take(Piece& piece) = 0;

 protected:
  ~Pieces() = default;
};

// Does pieces until none is left, in memory of the thread's own. It must not throw: helpers have nobody to tell.
using Work = void (*)(const void* job, float* memory, Pieces& pieces);

// Who shares a call's work: so many threads at most, the caller among them. The others are helpers of our own, or those
// of PyTorch's operations: these stay awake for a while after each operation, and helpers would get half a core beside
// them.
struct Team {
  int num_threads;
  bool is_of_pytorch;
};

// Calls `work` in each thread that comes, the caller's among them, for `count` pieces of each phase; all of a phase are
// done before the next begins. Each thread has memory of so many floats, the caller's before anything has begun.
void share(const Team& team, size_t count, size_t phases, size_t floats, Work work, const void* job);

}  // namespace torchrec_amort
