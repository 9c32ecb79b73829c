// A team of threads that share out calls of the kernels in small blocks, which each claims when it has time.
//
// The machine may take a thread's core away at any moment, for milliseconds, where another process wants it. So nobody
// waits for a thread that does not run:
// - Every thread walks through all calls of a job by itself and claims blocks of each. Whoever runs does the work, the
//   thread that began the job has no part that only it could do, and one that comes late passes over what is done.
// - A block is computed into its thread's own memory, and only then put in its place ("commit", a microsecond). A block
//   that is claimed but not put in place is computed again by those that have nothing else to do, and counts once.
// - Blocks that change their input in place, or are not worth it, are computed once ("once"): they are short.
// - Threads spin for some microseconds; then they sleep, so that the core is free for the one that is waited for.
//
// A block claimed twice gives the same result twice, so results do not depend on which thread did what.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

constexpr int kPhases = 3;  // of a call: each begins when all blocks of the one before are done

class Worker;

// What the threads know of each other. A job is a row of calls.
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

  // What another thread of the team does until `close`: helps with each job.
  void help(int64_t index);
  void close();

  // The team of jobs that this thread begins; null: it has none to help.
  static Team*& own();

 private:
  friend class Worker;

  // How far a phase is. Blocks below `next` are claimed.
  struct Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct alignas(64) Call {
    Phase phases[kPhases];
  };

  // What a thread computes into its own memory, for others to see. `state` is the number of the claim, four times, and:
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
  const std::unique_ptr<Claim[]> claims_;  // one a thread
  void (*job_)(const void* context, Worker& worker, int64_t call) = nullptr;
  const void* context_ = nullptr;
  int64_t num_calls_ = 0;
  std::vector<Call> calls_;
  std::vector<std::vector<float>> shared_;  // the last one counts; those before may still be read by late threads

  alignas(64) std::atomic<int64_t> num_done_{0};  // calls: all up to there
  alignas(64) std::atomic<uint32_t> turn_{0};     // odd while a job runs
  std::atomic<uint32_t> num_sleeping_{0};         // helpers that wait for a turn
  std::atomic<bool> closed_{false};
  alignas(64) std::atomic<int64_t> num_inside_{0};  // helpers in a job
  alignas(64) std::atomic<uint32_t> progress_{0};   // changes when somebody who sleeps in a job should look again
  std::atomic<uint32_t> num_waiting_{0};
  std::atomic<float*> shared_floats_{nullptr};
  std::atomic<int64_t> num_shared_{0};
};

// How a phase is cut into claims: large ones first, so that they are few, and small ones in the end, so that threads end
// together.
struct Cut {
  int64_t least = 1;         // blocks that are worth a claim of their own; fewer only where shares are smaller
  int64_t most = INT64_MAX;  // blocks of a claim
  int64_t multiple = 1;      // of which larger claims are made

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

  // The one that this thread is while it works on a job; else null.
  static Worker*& current();

  // Calls body(first, behind the last) until all of `count` blocks are covered, each of them once.
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

  // The same with compute(first, behind the last, first of the next claim) into memory of the calling thread, maybe
  // several times for a block, and commit(first, behind the last) to put that in place, once. What compute reads may
  // have changed already when its result is not wanted any more.
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

  // Memory for `count` floats that all threads see, until the call ends. Takes a phase, in which nothing else is done.
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

  // Waits as long as a thread that runs takes to end what it has claimed.
  static bool is_done_soon(const Team::Phase& phase, int64_t count);

  // Computes one claim of another thread again, and puts it in place if that has not been done meanwhile. False: there is
  // none.
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

// Runs body(worker) as one call: within a job on the threads that walk through it; else, if it is worth it, as a job.
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
