// Runs of the cuda backend on host tensors.
#include "cuda/launch.h"
#include "cuda_test.h"

namespace moba::test {

namespace {

// The problem with its rope's table on the device.
Problem on_device(Problem problem, Mirror& table) {
  if (!problem.rope || !problem.rope->cos.given()) return problem;
  problem.rope->cos = table.read(problem.rope->cos, "cos");
  problem.rope->sin = table.read(problem.rope->sin, "sin");
  return problem;
}

}  // namespace

cudaStream_t test_stream() {
  static cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    MOBA_CUDA(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return stream;
}

CudaRunner::CudaRunner(const Problem& problem, const Options& options)
    : stream_(test_stream()),
      table_(std::make_unique<Mirror>(stream_)),
      plan_(std::make_unique<Plan>(on_device(problem, *table_), options)) {}

Workspace CudaRunner::fresh(std::unique_ptr<DeviceMemory>& memory, std::size_t bytes) const {
  if (under_checker() || !memory) memory = std::make_unique<DeviceMemory>(bytes);
  if (!under_checker()) memory->poison(stream_);
  return memory->bytes();
}

Workspace CudaRunner::fresh_workspace() { return fresh(workspace_, plan_->workspace_bytes()); }

Workspace CudaRunner::fresh_backward_workspace() {
  return fresh(backward_workspace_, plan_->backward_workspace_bytes());
}

Attention CudaRunner::forward(const Inputs& inputs, const Layout& layout) {
  Attention result(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::forward(*plan_, mirror.read(inputs), mirror.write(result.outputs()), fresh_workspace(), {stream_});
  mirror.finish();
  return result;
}

Attention CudaRunner::forward(const Inputs& inputs, Chosen& chosen, const Layout& layout) {
  Attention result(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::forward(*plan_, mirror.read(inputs), mirror.write(chosen.selection()), mirror.write(result.outputs()),
                fresh_workspace(), {stream_});
  mirror.finish();
  return result;
}

Slopes CudaRunner::backward(const Inputs& inputs, Chosen& chosen, Attention& results, const Array& dout,
                            const Layout& layout) {
  Slopes slopes(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::backward(*plan_, mirror.read(inputs), mirror.read(chosen.selection()),
                 mirror.read(ConstOutputs{results.out.tensor(), results.lse.tensor()}),
                 mirror.read(dout.tensor(), "dout"), mirror.write(slopes.gradients()), fresh_backward_workspace(),
                 {stream_});
  mirror.finish();
  return slopes;
}

Slopes CudaRunner::dense_backward(const Inputs& inputs, Attention& results, const Array& dout, const Layout& layout) {
  Slopes slopes(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::dense_backward(
      *plan_, mirror.read(inputs), mirror.read(ConstOutputs{results.out.tensor(), results.lse.tensor()}),
      mirror.read(dout.tensor(), "dout"), mirror.write(slopes.gradients()), fresh_backward_workspace(), {stream_});
  mirror.finish();
  return slopes;
}

Attention CudaRunner::dense(const Inputs& inputs, const Layout& layout) {
  Attention result(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::dense(*plan_, mirror.read(inputs), mirror.write(result.outputs()), fresh_workspace(), {stream_});
  mirror.finish();
  return result;
}

Attention CudaRunner::attend(const Inputs& inputs, Chosen& chosen, const Layout& layout) {
  Attention result(plan_->problem(), layout);
  Mirror mirror(stream_);
  moba::attend(*plan_, mirror.read(inputs), mirror.read(chosen.selection()), mirror.write(result.outputs()),
               fresh_workspace(), {stream_});
  mirror.finish();
  return result;
}

Attention CudaRunner::merge(std::vector<Attention>& partials, const Layout& layout) {
  Attention result(plan_->problem(), layout);
  Mirror mirror(stream_);
  std::vector<Outputs> views;
  views.reserve(partials.size());
  for (Attention& partial : partials) views.push_back(mirror.write(partial.outputs()));
  moba::merge(*plan_, views, mirror.write(result.outputs()), {stream_});
  mirror.finish();
  return result;
}

Array CudaRunner::pool(const Inputs& inputs, const Layout& layout) {
  const Problem& p = plan_->problem();
  Array centroids(p.dtype, {plan_->max_blocks(), p.kv_heads, p.head_dim}, layout);
  Mirror mirror(stream_);
  moba::pool(*plan_, mirror.read(inputs), mirror.write(centroids.tensor(), "centroids"), fresh_workspace(), {stream_});
  mirror.finish();
  return centroids;
}

Chosen CudaRunner::gate(const Inputs& inputs, const Array& centroids, const Layout& layout) {
  Chosen chosen(*plan_, layout);
  Mirror mirror(stream_);
  moba::gate(*plan_, mirror.read(inputs), mirror.read(centroids.tensor(), "centroids"),
             mirror.write(chosen.selection()), fresh_workspace(), {stream_});
  mirror.finish();
  return chosen;
}

Chosen CudaRunner::select(const Inputs& inputs, const Layout& layout) {
  Chosen chosen(*plan_, layout);
  Mirror mirror(stream_);
  moba::select(*plan_, mirror.read(inputs), mirror.write(chosen.selection()), fresh_workspace(), {stream_});
  mirror.finish();
  return chosen;
}

void CudaRunner::index(const Inputs& inputs, Chosen& chosen) {
  Mirror mirror(stream_);
  moba::index(*plan_, mirror.read(inputs), mirror.write(chosen.selection()), fresh_workspace(), {stream_});
  mirror.finish();
}

std::pair<Array, Array> CudaRunner::rope(const Inputs& inputs, const Layout& layout) {
  const Problem& p = plan_->problem();
  std::pair<Array, Array> rotated{Array(p.dtype, {p.total_q, p.q_heads, p.head_dim}, layout),
                                  Array(p.dtype, {p.total_k, p.kv_heads, p.head_dim}, layout)};
  Mirror mirror(stream_);
  moba::rope(*plan_, mirror.read(inputs), mirror.write(rotated.first.tensor(), "q_rotated"),
             mirror.write(rotated.second.tensor(), "k_rotated"), fresh_workspace(), {stream_});
  mirror.finish();
  return rotated;
}

}  // namespace moba::test
