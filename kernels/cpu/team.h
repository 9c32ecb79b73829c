// A team of threads that share the kernels' calls in small blocks, which each thread claims when it has time.
//
// The system may take a thread's core away at any moment, for milliseconds, if another process needs it. So no thread
// waits for one that is not running:
// - Every thread goes through all calls of a job by itself and claims blocks of each. The threads that run do the
//   work; the thread that began the job has no exclusive part, and a late thread skips finished blocks.
// - A block is computed into its thread's own memory and then copied to its place ("commit", a microsecond). A block
//   that is claimed but not committed is computed again by idle threads, and committed once.
// - Blocks that change their input in place, or are too cheap, are computed once ("once"): they are short.
// - Threads spin for some microseconds and then sleep, so that the core is free for the thread they wait for.
//
// A block claimed twice gives the same result twice, so results do not depend on which thread computed it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

constexpr int kPhases = 3;  // per call: each begins when all blocks of the previous one are done

class Worker;

// The state shared by the threads. A job is a sequence of calls.
class Team {
 public:
  explicit Team(int64_t size) : size_(size), claims_(new Claim[size]) {}

  // Runs body(worker, call) for every call, on all threads at once. The calling thread is the team's first.
  template <typename Body>
  void run(int64_t num_calls, const Body& body) {
    job_ = [](const void* context, Worker& worker, int64_t call) { (*static_cast<const Body*>(context))(worker, call); };
    context_ = &body;
    run_job(num_calls);
  }

  // The loop of the other threads until `close`: help with each job.
  void help(int64_t index);
  void close();

  // The team for jobs that this thread begins; null if it has none.
  static Team*& own();

 private:
  friend class Worker;

  // A phase's progress. Blocks below `next` are claimed.
  struct Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct alignas(64) Call {
    Phase phases[kPhases];
  };

  // A thread's claim of blocks computed into its own memory, visible to others. `state` is 4 · the claim's number plus:
  enum Step : uint64_t { kNothing = 0, kComputing = 1, kCommitting = 2, kTaken = 3 };
  struct alignas(64) Claim {
    std::atomic<uint64_t> state{0};
    std::atomic<const Phase*> phase{nullptr};
    std::atomic<int64_t> begin{0}, end{0};
  };

  void run_job(int64_t num_calls);
  void work(int64_t index);
  void nap(const Phase& phase, int64_t count);
  void finish(Phase& phase, int64_t blocks, int64_t count);
  void wake_waiting();

  const int64_t size_;
  const std::unique_ptr<Claim[]> claims_;  // one per thread
  void (*job_)(const void* context, Worker& worker, int64_t call) = nullptr;
  const void* context_ = nullptr;
  int64_t num_calls_ = 0;
  std::vector<Call> calls_;
  std::vector<std::vector<float>> shared_;  // the last one is in use; late threads may still read earlier ones

  alignas(64) std::atomic<int64_t> num_done_{0};  // all calls up to here
  alignas(64) std::atomic<uint32_t> turn_{0};     // odd while a job runs
  std::atomic<uint32_t> num_sleeping_{0};         // helpers waiting for a turn
  std::atomic<bool> closed_{false};
  alignas(64) std::atomic<int64_t> num_inside_{0};  // helpers in a job
  alignas(64) std::atomic<uint32_t> progress_{0};   // changes when threads sleeping in a job should check again
  std::atomic<uint32_t> num_waiting_{0};
  std::atomic<float*> shared_floats_{nullptr};
  std::atomic<int64_t> num_shared_{0};
};

// The division of a phase into claims: large ones first, so that they are few, and small ones at the end, so that
// threads finish together.
struct Cut {
  int64_t least = 1;         // minimum blocks per claim; fewer only if shares are smaller
  int64_t most = INT64_MAX;  // maximum blocks per claim
  int64_t multiple = 1;      // larger claims are multiples of this

  int64_t next(int64_t left, int64_t count, int64_t threads) const {
    int64_t size = left / (2 * threads);
    if (size > multiple) size -= size % multiple;
    size = std::max({int64_t{1}, size, std::min(least, (count + threads - 1) / threads)});
    return std::min({left, size, most});
  }
};

// One thread's part in a call. Without a team it does all.
class Worker {
 public:
  Worker() = default;
  Worker(Team& team, int64_t index) : team_(&team), index_(index) {}

  // This thread's worker while it works on a job; else null.
  static Worker*& current();

  // Calls body(first, end) until all of `count` blocks are covered, each of them once.
  template <typename Body>
  void once(int phase, int64_t count, const Cut& cut, Body body) {
    if (team_ == nullptr) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    Team::Phase& own = team_->calls_[call_].phases[phase];
    for (int64_t begin, end; claim(own, count, cut, begin, end);) {
      body(begin, end);
      team_->finish(own, end - begin, count);
    }
    while (!is_done_soon(own, count)) team_->nap(own, count);
  }

  // Like `once`, but split into compute(first, end, first of the next claim), into memory of the calling thread, maybe
  // several times per block, and commit(first, end), which copies the result to its place, once. The input of a compute
  // may already have changed if its result is no longer needed.
  template <typename Compute, typename Commit>
  void repeatable(int phase, int64_t count, const Cut& cut, Compute compute, Commit commit) {
    if (team_ == nullptr) {
      for (int64_t begin = 0, end; begin < count; begin = end) {
        end = begin + std::min(cut.most, count - begin);
        compute(begin, end, end);
        commit(begin, end);
      }
      return;
    }
    Team::Phase& own = team_->calls_[call_].phases[phase];
    Team::Claim& seen = team_->claims_[index_];
    for (int64_t begin, end; claim(own, count, cut, begin, end);) {
      const uint64_t state = (seen.state.load(std::memory_order_relaxed) | 3) + 1 + Team::kComputing;
      seen.phase.store(&own, std::memory_order_relaxed);
      seen.begin.store(begin, std::memory_order_relaxed);
      seen.end.store(end, std::memory_order_relaxed);
      seen.state.store(state, std::memory_order_release);
      compute(begin, end, std::min(own.next.load(std::memory_order_relaxed), count));
      uint64_t expected = state;
      if (!seen.state.compare_exchange_strong(expected, state - Team::kComputing + Team::kCommitting)) continue;
      commit(begin, end);
      seen.state.store(state - Team::kComputing, std::memory_order_release);
      team_->finish(own, end - begin, count);
    }
    while (!is_done_soon(own, count))
      if (!take_over(own, count, compute, commit)) team_->nap(own, count);
  }

  // Returns memory for `count` floats shared by all threads until the call ends. Uses up a phase.
  float* shared_floats(int phase, int64_t count);

  void set_call(int64_t call) { call_ = call; }

 private:
  static bool claim(Team::Phase& phase, int64_t count, const Cut& cut, int64_t threads, int64_t& begin, int64_t& end) {
    begin = phase.next.load(std::memory_order_relaxed);
    do {
      if (begin >= count) return false;
      end = begin + cut.next(count - begin, count, threads);
    } while (!phase.next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }
  bool claim(Team::Phase& phase, int64_t count, const Cut& cut, int64_t& begin, int64_t& end) const {
    return claim(phase, count, cut, team_->size_, begin, end);
  }

  // Waits as long as a running thread needs to finish its claim.
  static bool is_done_soon(const Team::Phase& phase, int64_t count);

  // Computes another thread's claim again, and commits it unless that has happened meanwhile. Returns false without one.
  template <typename Compute, typename Commit>
  bool take_over(Team::Phase& phase, int64_t count, Compute& compute, Commit& commit) {
    for (int64_t i = 1; i < team_->size_; ++i) {
      Team::Claim& other = team_->claims_[(index_ + i) % team_->size_];
      uint64_t state = other.state.load(std::memory_order_acquire);
      if (state % 4 != Team::kComputing || other.phase.load(std::memory_order_relaxed) != &phase) continue;
      const int64_t begin = other.begin.load(std::memory_order_relaxed);
      const int64_t end = other.end.load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (other.state.load(std::memory_order_relaxed) != state) continue;
      compute(begin, end, count);
      if (other.state.compare_exchange_strong(state, state - Team::kComputing + Team::kTaken)) {
        commit(begin, end);
        team_->finish(phase, end - begin, count);
      }
      return true;
    }
    return false;
  }

  Team* team_ = nullptr;
  int64_t index_ = 0, call_ = 0;
};

// Runs body(worker) as one call: within a job on the threads that go through it; else, if it is worth it, as a job.
template <typename Body>
void run_call(bool is_worth_it, Body body) {
  if (Worker* worker = Worker::current()) return body(*worker);
  Team* team = Team::own();
  if (team == nullptr || !is_worth_it) {
    Worker alone;
    return body(alone);
  }
  team->run(1, [&](Worker& worker, int64_t) { body(worker); });
}
