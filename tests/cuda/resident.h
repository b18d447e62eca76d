// What the tests of repeated training share: cases with a choice, and their tensors on the device, where they stay from
// call to call.
#pragma once

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "training.h"

namespace moba::test {

// A case and what its rows attend to: what the gate chooses, or block 0 and their own, which makes one list as long as
// all others together.
struct Choice {
  Given given;
  bool sink;

  std::optional<Chosen> chosen() const;
};

// Sequences of many lengths, causal with a rope and neither, for the blocks that the kernels tell apart.
std::vector<Choice> small_choices();
// One sequence.
Choice long_choice(std::int64_t tokens, std::int64_t d, std::int64_t block_size, bool sink);

using Bytes = std::vector<std::byte>;

// A tensor of the device that calls write.
class Written {
 public:
  explicit Written(Array nothing) : nothing_(std::move(nothing)), device_(std::as_const(nothing_).tensor()) {}

  Tensor tensor() const { return device_.tensor(); }
  // As it was before any call.
  void forget(cudaStream_t stream) const { device_.upload(nothing_.tensor().data, stream); }
  // The elements without gaps, once the stream is done.
  Bytes bytes(cudaStream_t stream) const;
  const Array& nothing() const { return nothing_; }

 private:
  Array nothing_;
  DeviceTensor device_;
};

// What forward keeps of its selection.
enum class Keeps { ids, all };

// The tensors of forward (where the choice is not the gate's: attend), backward, dense and dense_backward.
struct ResidentTraining {
  Plan plan;
  const bool gated;
  const Keeps keeps;
  DeviceTensor q, k, v, dout;
  std::optional<DeviceTensor> cu_seqlens_q, cu_seqlens_k;
  Written out, lse, ids, counts, offsets, rows, dq, dk, dv;
  DeviceMemory workspace;

  ResidentTraining(const Choice& choice, const Options& options, Keeps kept = Keeps::ids);

  Inputs inputs() const;
  Selection selection() const;

  void upload(const Given& given, cudaStream_t stream) const;
  // Outputs without results.
  void forget(cudaStream_t stream) const;
  // Over the choice, or over all keys.
  void forward_pass(bool all_keys, const Selection& kept, const Outputs& outputs, Workspace memory,
                    cudaStream_t stream) const;
  void backward_pass(bool all_keys, const Selection& kept, const ConstOutputs& results, const Gradients& gradients,
                     Workspace memory, cudaStream_t stream) const;
  void run(bool all_keys, cudaStream_t stream) const;
  // Of everything that run() writes.
  std::vector<Bytes> results(cudaStream_t stream) const;
};

}  // namespace moba::test
