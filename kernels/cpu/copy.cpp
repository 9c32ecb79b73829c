// Many small copies in one call, see kernels/copy.py.
#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

struct Copy {
  const char* source;
  char* place;
  int64_t step;  // from place[i] to place[i + 1]
  int64_t rows;
  int64_t width;
  int64_t source_stride;
  int64_t place_stride;
};

}  // namespace

extern "C" {

// All sizes in bytes. Single-threaded: the caller makes small pieces of it.
void lf_copy(const void* copies, int64_t i, int64_t count) {
  const Copy* copy = static_cast<const Copy*>(copies);
  for (int64_t c = 0; c < count; ++c, ++copy) {
    char* place = copy->place + i * copy->step;
    for (int64_t row = 0; row < copy->rows; ++row) {
      std::memcpy(place + row * copy->place_stride, copy->source + row * copy->source_stride, copy->width);
    }
  }
}

LF_REPLAYABLE(lf_copy)

}  // extern "C"
