// The CUDA execution model on one host thread, for tests: the threads of a block are fibers that take turns at barriers
// and warp operations, blocks run one after another. Semantics, not speed: what a GPU would leave undefined is an error
// here wherever it can be seen.
#pragma once

#include <cstdint>
#include <functional>

namespace emulation {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A warp operation moves at most this many bytes a lane.
constexpr int kOperandBytes = 40;
constexpr int kWarp = 32;

// One lane's part in a warp operation. `site` tells operations apart; `source` is the lane whose operand it wants.
struct WarpOperation {
  const char* site;
  uint32_t mask;
  int source;
  int bytes;
  unsigned char operand[kOperandBytes];
  unsigned char result[kOperandBytes];
  uint32_t ballot;  // lanes whose operand's first byte is not zero
  // Where it is not null: makes the results of all lanes from the operands of all lanes.
  void (*together)(WarpOperation* const* lanes) = nullptr;
};

void barrier(const char* site);
void warp_operation(WarpOperation& operation);  // returns once every lane of the mask has come to the same site
unsigned char* shared_memory();

// See csrc/cuda/mma.h, which calls these.
enum class Multiply { kTf32, kBFloat16, kFloat16 };
void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiply kind);
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed);
// Copies are made when they are waited for, so that what is read too early is still poison.
void copy_async(void* to, const void* from, bool keep);
void commit_copies();
void wait_for_copies(int pending);

// Runs `thread` once for every thread of the grid. Returns null, or what went wrong.
const char* launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& thread);

}  // namespace emulation

// Of the thread that runs.
extern emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;
