// Waiting of a team's threads: for work, for each other and for the end of a job.
#include "team.h"

#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// How long to spin, in nanoseconds: for the rest of a phase, before recomputing its blocks or sleeping; and for the
// next job, which comes after some Python code while tokens are generated.
constexpr int64_t kSpinInPhase = 20'000;
constexpr int64_t kSpinForJob = 200'000;
constexpr int64_t kLongestSleep = 2'000'000;  // in a job; limits the cost of a lost wake-up

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec;
}

// Returns whether `condition` came true within `duration` nanoseconds.
template <typename Condition>
bool spin(int64_t duration, Condition condition) {
  for (int64_t end = 0;;) {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      relax();
    }
    const int64_t time = now();
    if (end == 0) end = time + duration;
    if (time >= end) return condition();
  }
}

void sleep_while(const std::atomic<uint32_t>& word, uint32_t value, int64_t longest) {
  const timespec timeout{longest / 1'000'000'000, longest % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, longest > 0 ? &timeout : nullptr, nullptr, 0);
}

void wake(const std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }

}  // namespace

__attribute__((noinline)) Team*& Team::own() {
  static thread_local Team* team = nullptr;
  return team;
}

__attribute__((noinline)) Worker*& Worker::current() {
  static thread_local Worker* worker = nullptr;
  return worker;
}

void Team::run_job(int64_t num_calls) {
  // No thread is inside: the previous job waited for that.
  num_calls_ = num_calls;
  if (calls_.size() < static_cast<size_t>(num_calls)) calls_ = std::vector<Call>(num_calls);
  for (int64_t i = 0; i < num_calls; ++i)
    for (Phase& phase : calls_[i].phases) {
      phase.next.store(0, std::memory_order_relaxed);
      phase.done.store(0, std::memory_order_relaxed);
    }
  num_done_.store(0, std::memory_order_relaxed);
  turn_.fetch_add(1);
  if (num_sleeping_.load() > 0) wake(turn_);
  work(0);
  turn_.fetch_add(1);
  // A thread that was descheduled in the job may still read the job's data, which the caller may free. By sleeping,
  // this thread leaves it its core.
  const auto all_left = [this] { return num_inside_.load() == 0; };
  if (!spin(kSpinInPhase, all_left)) {
    num_waiting_.fetch_add(1);
    for (uint32_t seen = progress_.load(); !all_left(); seen = progress_.load())
      sleep_while(progress_, seen, kLongestSleep);
    num_waiting_.fetch_sub(1);
  }
  if (shared_.size() > 1) shared_.erase(shared_.begin(), shared_.end() - 1);
}

void Team::work(int64_t index) {
  Worker worker(*this, index);
  Worker::current() = &worker;
  for (int64_t call = 0; (call = std::max(call, num_done_.load(std::memory_order_acquire))) < num_calls_; ++call) {
    worker.set_call(call);
    job_(context_, worker, call);
    int64_t known = call;  // others that are further ahead have updated num_done_
    num_done_.compare_exchange_strong(known, call + 1, std::memory_order_release, std::memory_order_relaxed);
  }
  Worker::current() = nullptr;
}

void Team::help(int64_t index) {
  uint32_t seen = 0;  // the last turn this thread worked in, or 0
  while (!closed_.load()) {
    const auto is_on = [&] { return closed_.load() || ((turn_.load() & 1) != 0 && turn_.load() != seen); };
    if (!spin(kSpinForJob, is_on)) {
      num_sleeping_.fetch_add(1);
      for (uint32_t turn = turn_.load(); !is_on(); turn = turn_.load()) sleep_while(turn_, turn, 0);
      num_sleeping_.fetch_sub(1);
    }
    num_inside_.fetch_add(1);
    const uint32_t turn = turn_.load();  // either the job's end sees this thread inside, or this thread sees the end
    if ((turn & 1) != 0 && turn != seen && !closed_.load()) {
      seen = turn;
      work(index);
    }
    if (num_inside_.fetch_sub(1) == 1) wake_waiting();
  }
}

void Team::close() {
  closed_.store(true);
  turn_.fetch_add(2);
  wake(turn_);
}

void Team::wake_waiting() {
  if (num_waiting_.load() == 0) return;
  progress_.fetch_add(1);
  wake(progress_);
}

void Team::finish(Phase& phase, int64_t blocks, int64_t count) {
  if (phase.done.fetch_add(blocks) + blocks == count) wake_waiting();
}

// Sleeps until some work is finished.
void Team::nap(const Phase& phase, int64_t count) {
  num_waiting_.fetch_add(1);
  const uint32_t seen = progress_.load();
  if (phase.done.load() < count) sleep_while(progress_, seen, kLongestSleep);
  num_waiting_.fetch_sub(1);
}

bool Worker::is_done_soon(const Team::Phase& phase, int64_t count) {
  return spin(kSpinInPhase, [&] { return phase.done.load(std::memory_order_acquire) >= count; });
}

float* Worker::shared_floats(int phase, int64_t count) {
  Team* const team = team_;
  if (team == nullptr) {
    static thread_local std::vector<float> own;
    if (own.size() < static_cast<size_t>(count)) own.resize(count);
    return own.data();
  }
  // A thread that finds enough memory may skip the phase, since no other thread can then be in it.
  if (team->num_shared_.load(std::memory_order_acquire) < count)
    once(phase, 1, {}, [=](int64_t, int64_t) {
      if (team->num_shared_.load(std::memory_order_relaxed) >= count) return;
      team->shared_.emplace_back(count);
      team->shared_floats_.store(team->shared_.back().data(), std::memory_order_relaxed);
      team->num_shared_.store(count, std::memory_order_release);
    });
  return team->shared_floats_.load(std::memory_order_relaxed);
}

extern "C" {

// Creates a team of `size` threads: the caller's and size - 1 that `help`.
void* lf_team_create(int64_t size) { return new Team(size); }
void lf_team_use(void* team) { Team::own() = static_cast<Team*>(team); }
void lf_team_help(void* team, int64_t index) { static_cast<Team*>(team)->help(index); }
void lf_team_close(void* team) { static_cast<Team*>(team)->close(); }
void lf_team_free(void* team) { delete static_cast<Team*>(team); }

}  // extern "C"
