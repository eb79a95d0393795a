// Threads that share the pieces of a call's work, on cores that others may be using, too.
//
// The thread that calls works itself; helpers join if they come. A piece is taken when somebody is free for it, so that
// a helper that the scheduler leaves waiting has taken none, and nobody waits for it: when no piece is left, the call
// closes. What has to be waited for is a helper that lost its core amid a piece. Where that costs more than helpers
// save, the governor makes calls alone for a while. All waiting spins for a while and then sleeps.
//
// Between operations of PyTorch its team shares a call instead, as many of its threads as come.

#include "threads.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace torchrec_amort {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// How long a caller looks for the last pieces of helpers before it sleeps: most are done by then, and being woken takes
// longer than what is left. And a helper for the next call, so that it is still there for the next phase of a request:
// Python needs a while in between.
constexpr Seconds CALLER_SPINS{500e-6}, HELPER_SPINS{3e-3};

// Waits a little for something to become true; whether it has.
template <class Condition>
bool spin(Seconds limit, const Condition& condition) {
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      __builtin_ia32_pause();
    }
  } while (Clock::now() < end);
  return condition();
}

double seconds_since(Clock::time_point begin) { return Seconds(Clock::now() - begin).count(); }

// Processor seconds of this thread for some work.
template <class Work>
double processor_seconds(const Work& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
  };
  const double begin = now();
  work();
  return now() - begin;
}

// A thread's own memory, kept for its next call: taken and freed by several threads again and again, it would scatter
// the heap. Null if there is none.
float* scratch(size_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64)));
    if (memory != nullptr) size = floats;
  }
  return memory.get();
}

// Decides whether calls have helpers, by the seconds that calls take for a processor second of their work. Alone that
// is 1 on an idle machine, and never less: while calls with helpers stay below, these pay. Else the cores are shared,
// and some calls work alone: if they do no worse, calls go on so, and after a while a few try helpers again. The while
// is twice as long after each trial that failed.
class Governor {
 public:
  bool lets_help() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !is_alone_;
  }

  // Of a call: how long it took, and its work in processor seconds, of all threads together.
  void learn(bool was_alone, double seconds, double work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (was_alone != is_alone_) return;
    Mean& mean = was_alone ? alone_ : together_;
    seconds = std::min(seconds, MOST * work);
    mean.seconds += seconds, mean.work += work, seconds_ += seconds;
    if (++num_calls_ < CALLS || seconds_ < (is_alone_ ? pause_ : TRIAL)) return;
    num_calls_ = 0, seconds_ = 0;
    if (is_alone_) {
      is_alone_ = false;
      together_ = {};
    } else if (together_.of() < std::max(PAYS, alone_.of())) {
      pause_ = std::max(pause_ / 2, SHORTEST);
      together_.fade(), alone_.fade();
    } else {
      is_alone_ = true;
      pause_ = std::min(2 * pause_, LONGEST);
      alone_.fade();
    }
  }

 private:
  // Both stretches are of so many calls at least, and of so many seconds of calls: the scheduler makes a process that
  // has used more than its share wait in the next ones.
  static constexpr int CALLS = 16;
  static constexpr double TRIAL = 0.05, SHORTEST = 0.1, LONGEST = 0.2, PAYS = 0.95;
  static constexpr double MOST = 20;  // a single call that was stopped for long tells little of the next ones
  // Seconds for a second's work, of the last calls more than of those before.
  struct Mean {
    double seconds = 0, work = 0;
    double of() const { return work > 0 ? seconds / work : 0; }
    void fade() { seconds /= 2, work /= 2; }
  };
  std::mutex mutex_;
  bool is_alone_ = false;
  Mean alone_, together_;
  int num_calls_ = 0;
  double seconds_ = 0, pause_ = SHORTEST / 2;
};

// What is done with pieces, and the memory that it takes.
struct Job {
  Work work;
  const void* job;
  size_t floats;
};

// A call whose pieces are shared: `count` of each phase, of which none begins before all of the phase before are done.
// Calls live in the pool for good, since helpers look at them at any time; what is not atomic belongs to the caller and
// those inside.
class alignas(64) Call {
 public:
  // Takes this call for a caller, if no other has.
  bool reserve() {
    uint32_t free = 0;
    return state_.load(std::memory_order_relaxed) == 0 && state_.compare_exchange_strong(free, RESERVED);
  }
  void open(size_t count, size_t phases, int seats, const Job& job) {
    count_ = count, total_ = count * phases, job_ = job;
    next_ = 0, finished_ = 0, ready_ = count, work_ = 0;
    state_ = RESERVED | OPEN | seats * SEAT;
  }
  // Lets no more helpers in.
  void close() { state_.fetch_and(~OPEN); }
  int free_seats() const { return state_ / SEAT % MOST_SEATS; }
  bool is_empty() const { return (state_ & INSIDE) == 0; }
  void free() { state_ = 0; }

  // Lets a helper in if there is a seat and something to be done.
  bool enter() {
    uint32_t state = state_;
    while ((state & OPEN) && state / SEAT % MOST_SEATS > 0 && can_take())
      if (state_.compare_exchange_weak(state, state - SEAT + 1)) return true;
    return false;
  }
  // Whether the helper was the last one of a call that is closed; the call is not to be touched any more.
  bool leave() { return (state_.fetch_add(SEAT - 1) & (OPEN | INSIDE)) == 1; }

  // Does what can be done now. A helper that gets no memory leaves it to those that have theirs.
  template <class Tell>
  void run(const Tell& tell) {
    const auto work = [&] {
      Some<Tell> pieces(*this, tell);
      if (float* memory = scratch(job_.floats)) job_.work(job_.job, memory, pieces);
    };
    work_ += static_cast<int64_t>(1e9 * processor_seconds(work));
  }
  // Processor seconds so far, of all threads together.
  double work() const { return 1e-9 * work_; }
  bool can_take() const { return next_ < ready_; }
  bool has_taken_all() const { return next_ == total_; }
  static constexpr uint32_t MOST_SEATS = 1 << 12;

 private:
  // Pieces until none is left that can be begun now. `tell` is called at the end of each phase but the last.
  template <class Tell>
  class Some final : public Pieces {
   public:
    Some(Call& call, const Tell& tell) : call_(call), tell_(tell) {}
    bool take(Piece& piece) override {
      if (has_taken_) finish();
      has_taken_ = false;
      for (size_t next = call_.next_; next < call_.ready_;) {
        if (!call_.next_.compare_exchange_weak(next, next + 1)) continue;
        piece = {next / call_.count_, next % call_.count_};
        return has_taken_ = true;
      }
      return false;
    }

   private:
    void finish() {
      const size_t finished = call_.finished_.fetch_add(1) + 1;
      if (finished % call_.count_ == 0 && finished < call_.total_) {
        call_.ready_ = finished + call_.count_;
        tell_();
      }
    }

    Call& call_;
    const Tell& tell_;
    bool has_taken_ = false;
  };

  // Of the state: helpers inside, free seats, and two flags.
  static constexpr uint32_t INSIDE = MOST_SEATS - 1, SEAT = MOST_SEATS, OPEN = 1u << 30, RESERVED = 1u << 31;
  std::atomic<uint32_t> state_{0};
  std::atomic<size_t> next_{0}, finished_{0}, ready_{0};
  std::atomic<int64_t> work_{0};  // nanoseconds
  size_t count_ = 0, total_ = 0;
  Job job_{};
};

// The helpers of a process. It is never destroyed: they sleep until the process ends.
class Pool {
 public:
  static Pool& of_process() {
    static std::atomic<Pool*> pool{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
      pool = new Pool;
      // A forked child has none of the helpers, and locks as they were: it starts anew.
      pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    return *pool.load();
  }

  void share(const Team& team, size_t count, size_t phases, const Job& job) {
    const int most = std::max(team.num_threads, 1);
    const int seats = std::min<size_t>({static_cast<size_t>(most), count, Call::MOST_SEATS}) - 1;
    float* memory = scratch(job.floats);
    if (memory == nullptr) throw std::bad_alloc();
    const auto work_alone = [&] {
      All pieces(count, phases);
      job.work(job.job, memory, pieces);
    };
    if (seats <= 0) return work_alone();
    if (team.is_of_pytorch) {
      Call call;
      call.open(count, phases, 0, job);
      // Threads that come late find nothing to do, and where none comes the caller does all.
      at::parallel_for(0, seats + 1, 1, [&](int64_t, int64_t) { take_part(call); });
      return;
    }
    const Clock::time_point begin = Clock::now();
    Call* call = governor_.lets_help() ? reserve() : nullptr;
    if (call == nullptr) {
      const double work = processor_seconds(work_alone);
      return governor_.learn(true, seconds_since(begin), work);
    }
    call->open(count, phases, seats, job);
    need(seats);
    tell(*call);
    take_part(*call);
    call->close();
    wait([call] { return call->is_empty(); });
    const double work = call->work();
    call->free();
    needed_ -= seats;
    governor_.learn(false, seconds_since(begin), work);
  }

 private:
  // All pieces of a call, one after the other.
  class All final : public Pieces {
   public:
    All(size_t count, size_t phases) : count_(count), total_(count * phases) {}
    bool take(Piece& piece) override {
      if (next_ == total_) return false;
      piece = {next_ / count_, next_ % count_};
      ++next_;
      return true;
    }

   private:
    const size_t count_, total_;
    size_t next_ = 0;
  };

  void run(Call& call) {
    call.run([&] { tell(call); });
  }

  // Until all pieces are taken.
  void take_part(Call& call) {
    for (run(call); !call.has_taken_all(); run(call)) wait([&] { return call.can_take() || call.has_taken_all(); });
  }

  Call* reserve() {
    for (Call& call : calls_)
      if (call.reserve()) return &call;
    return nullptr;
  }

  // As many helpers as calls have seats, at most one less than there are cores or this call wants threads.
  void need(int seats) {
    const int wanted = std::min<int>(needed_ += seats, std::max(num_cores_ - 1, seats));
    if (num_helpers_ >= wanted) return;
    const std::lock_guard<std::mutex> lock(starting_);
    // Signals are for the threads of who uses this library.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; num_helpers_ < wanted; ++num_helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // Those that are there do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Threads of one kind that sleep until a condition is true; it is told after what makes it true.
  class Sleepers {
   public:
    template <class Condition>
    void sleep(const Condition& condition) {
      std::unique_lock<std::mutex> lock(mutex_);
      ++count_;
      told_.wait(lock, condition);
      --count_;
    }
    void tell(int most) {
      const int count = std::min<int>(count_, most);
      if (count == 0) return;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      for (int i = 0; i < count; ++i) told_.notify_one();
    }
    void tell_all() {
      if (count_ == 0) return;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      told_.notify_all();
    }

   private:
    std::mutex mutex_;
    std::condition_variable told_;
    std::atomic<int> count_{0};
  };

  // Pieces of a call can be begun.
  void tell(const Call& call) {
    ++news_;
    helpers_.tell(call.free_seats());
    callers_.tell_all();
  }

  // Waits for helpers.
  template <class Condition>
  void wait(const Condition& condition) {
    if (!condition() && !spin(CALLER_SPINS, condition)) callers_.sleep(condition);
  }

  void help() {
    for (;;) {
      const uint64_t news = news_;
      bool has_helped = false;
      for (Call& call : calls_) {
        if (!call.enter()) continue;
        has_helped = true;
        run(call);
        if (call.leave()) callers_.tell_all();
      }
      const auto is_new = [&] { return news_ != news; };
      if (!has_helped && !spin(HELPER_SPINS, is_new)) helpers_.sleep(is_new);
    }
  }

  Governor governor_;
  Call calls_[32];
  std::atomic<uint64_t> news_{0};
  const int num_cores_ = std::thread::hardware_concurrency();
  std::atomic<int> needed_{0}, num_helpers_{0};
  std::mutex starting_;
  Sleepers helpers_, callers_;
};

}  // namespace

void share(const Team& team, size_t count, size_t phases, size_t floats, Work work, const void* job) {
  Pool::of_process().share(team, count, phases, {work, job, floats});
}

}  // namespace torchrec_amort
