// A build without CUDA.
#include "gpu.h"
#include "moba/error.h"

namespace moba::cli::gpu {
namespace {

[[noreturn]] void refuse() { throw Error("this program was built without CUDA"); }

}  // namespace

std::byte* allocate(int, std::size_t) { refuse(); }
void release(int, std::byte*) noexcept {}
MemoryState memory_state(int) { refuse(); }
void copy_to_device(int, void*, const void*, std::size_t) { refuse(); }
void copy_to_host(int, void*, const void*, std::size_t) { refuse(); }

struct Marks::State {};

Marks::Marks(int) { refuse(); }
Marks::~Marks() = default;
void Marks::set() { refuse(); }
std::vector<double> Marks::seconds() { refuse(); }

}  // namespace moba::cli::gpu
