// The CUDA library's own entry: what it was compiled for and which runtime it carries. Kernels register beside it, one
// file an op.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace granvit::cuda {
namespace {

std::string cuda_build_info() {
  int runtime = 0;
  cudaRuntimeGetVersion(&runtime);
  return "CUDA runtime " + std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) +
         " (static), nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) { m.def("cuda_build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(granvit, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

}  // namespace granvit::cuda
