// Plays a thread that is put off in the middle of its block. Prints "ok", or what was wrong.
#include <cstdio>
#include <thread>
#include <vector>

#include "team.h"

extern "C" {
void* lf_team_create(int64_t size);
void lf_team_use(void* team);
void lf_team_help(void* team, int64_t index);
void lf_team_close(void* team);
void lf_team_free(void* team);
}

constexpr int64_t kBlocks = 40;
std::atomic<int> num_puts[2][kBlocks];
std::atomic<bool> has_stuck{false}, may_go_on{false};
std::atomic<int64_t> num_alone{0};
thread_local bool is_helper = false;

// Call 0 is repeatable: the helper stays in the first block that it claims until call 1 runs. Call 1 is done once.
const auto body = [](Worker& worker, int64_t call) {
  if (call == 0)
    worker.repeatable(
        0, kBlocks, {1, 3},
        [](int64_t, int64_t, int64_t) {
          if (is_helper && !has_stuck.exchange(true))
            while (!may_go_on) std::this_thread::yield();
          else if (!is_helper)
            while (!has_stuck) std::this_thread::yield();
        },
        [](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) ++num_puts[0][i];
        });
  else
    worker.once(0, kBlocks, {1, 3}, [](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) ++num_puts[1][i];
      num_alone += is_helper ? 0 : last - first;
      may_go_on = true;
    });
};

int main() {
  void* team = lf_team_create(2);
  lf_team_use(team);
  std::thread helper([team] {
    is_helper = true;
    lf_team_help(team, 1);
  });
  for (int round = 0; round < 50; ++round) {
    has_stuck = may_go_on = false;
    for (auto& row : num_puts)
      for (auto& count : row) count = 0;
    static_cast<Team*>(team)->run(2, body);
    for (int call = 0; call < 2; ++call)
      for (int64_t i = 0; i < kBlocks; ++i)
        if (num_puts[call][i] != 1) return std::printf("round %d: block %d of call %d was put in place %d times\n", round,
                                                       int(i), call, num_puts[call][i].load()), 1;
  }
  if (num_alone == 0) return std::puts("nobody went on while the helper was put off"), 1;
  lf_team_close(team);
  helper.join();
  lf_team_free(team);
  std::puts("ok");
}
