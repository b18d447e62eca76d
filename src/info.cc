#include "moba/info.h"

#include "cuda/backend.h"

namespace moba {

const char* version() { return MOBA_VERSION; }

CudaSupport cuda_support() { return cuda::support(); }

}  // namespace moba
