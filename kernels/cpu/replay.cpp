// Runs recorded calls of the other files' faces one after the other: a whole step for one call from Python.
#include <cstdint>

struct Call {
  void (*run)(const uint64_t* words);
  const uint64_t* words;  // one a parameter, in its low bytes
};

extern "C" void lf_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) calls[i].run(calls[i].words);
}
