// The one exception type of the library.
#pragma once

#include <stdexcept>

#include "moba/export.h"

namespace moba {

// Thrown for every refused input, before anything is written. what() names the argument, what it was and what is
// allowed, in one line, e.g. "q: dtype is i32; allowed are f32, f16, bf16".
class MOBA_EXPORT Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moba
