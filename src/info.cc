#include "moba/info.h"

namespace moba {

const char* version() { return MOBA_VERSION; }

}  // namespace moba
