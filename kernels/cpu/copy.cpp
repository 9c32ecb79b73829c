// Many small copies in one call, see kernels/copy.py.
#include <cstdint>
#include <cstring>

#include "common.h"
#include "team.h"

namespace {

struct Copy {
  int64_t source;
  int64_t is_stored;  // source is an offset into the storage
  char* place;
  int64_t step;  // from place[i] to place[i + 1]
  int64_t rows;
  int64_t width;
  int64_t source_stride;
  int64_t place_stride;
};

}  // namespace

extern "C" {

// All sizes are in bytes. Single-threaded: the caller splits the work into small pieces.
void lf_copy(const void* copies, int64_t i, int64_t count, const void* storage) {
  run_call(false, [=](Worker& worker) {
    worker.once(0, count, {count}, [=](int64_t first, int64_t last) {
      const Copy* copy = static_cast<const Copy*>(copies) + first;
      for (int64_t c = first; c < last; ++c, ++copy) {
        const int64_t begin = copy->is_stored ? reinterpret_cast<int64_t>(storage) : 0;
        const char* source = reinterpret_cast<const char*>(begin + copy->source);
        char* place = copy->place + i * copy->step;
        for (int64_t row = 0; row < copy->rows; ++row) {
          std::memcpy(place + row * copy->place_stride, source + row * copy->source_stride, copy->width);
        }
      }
    });
  });
}

LF_REPLAYABLE(lf_copy)

}  // extern "C"
