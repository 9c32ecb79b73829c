// Runs recorded calls of the library's functions in order: a whole step for one call from Python.
#include "team.h"

struct RecordedCall {
  void (*run)(const uint64_t* words);
  const uint64_t* words;  // one per parameter, in its low bytes
};

// All calls are one job, so that threads wait neither for each other nor for the caller between the calls.
extern "C" void lf_replay(const RecordedCall* calls, int64_t count) {
  const auto body = [=](Worker&, int64_t i) { calls[i].run(calls[i].words); };
  if (Team* team = Team::own()) return team->run(count, body);
  Worker alone;
  for (int64_t i = 0; i < count; ++i) body(alone, i);
}
