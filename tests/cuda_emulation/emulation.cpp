#include "emulation.h"

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// Tests set these through ctypes. Threads and blocks in the opposite order: a kernel whose results change lacks a
// barrier.
extern "C" {
__attribute__((visibility("default"))) int emulation_reverse_order = 0;
__attribute__((visibility("default"))) int emulation_integers_on_device = 0;
// What a block may ask for; at first that of sm_90.
__attribute__((visibility("default"))) int emulation_shared_bytes = 227 << 10;
}

emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kCopyBytes = 16;  // of one asynchronous copy

enum class State { kReady, kBarrier, kWarp, kDone };

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null for zeros
};

struct Fiber {
  Dim3 thread;
  State state = State::kDone;
  const char* site = nullptr;                // of the barrier that it waits at
  WarpOperation* operation = nullptr;        // that it waits for
  std::vector<std::vector<Copy>> copies{1};  // groups that are under way; the last one is open
  bool running = false;                      // has a frame of the loop below on its stack
  jmp_buf resume;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::unique_ptr<unsigned char[]> shared;
std::string message;
std::mutex one_launch_at_a_time;

// setjmp and longjmp, because swapcontext makes a system call every time.
__attribute__((noinline)) void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {  // the fiber is used again by later blocks
    (*body)();
    current->state = State::kDone;
    yield();
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.running) _longjmp(fiber.resume, 1);
  fiber.running = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

bool fail(const std::string& what, const Fiber& fiber) {
  const auto text = [](Dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  message = "CUDA emulation: thread " + text(fiber.thread) + " of block " + text(blockIdx) + ": " + what;
  return false;
}

// Completes the operations of one warp whose lanes have all arrived. Returns false where none could be.
bool complete_warp(Fiber* warp, int lanes) {
  bool any = false;
  for (int lane = 0; lane < lanes; ++lane) {
    if (warp[lane].state != State::kWarp) continue;
    const WarpOperation& first = *warp[lane].operation;
    bool complete = true;
    for (int other = 0; other < kWarp; ++other)
      if (first.mask >> other & 1)
        complete = complete && other < lanes && warp[other].state == State::kWarp &&
                   std::strcmp(warp[other].operation->site, first.site) == 0 &&
                   warp[other].operation->mask == first.mask;
    if (!complete) continue;
    any = true;
    const uint32_t mask = first.mask;
    uint32_t ballot = 0;
    for (int i = 0; i < lanes; ++i)
      if (mask >> i & 1 && warp[i].operation->operand[0] != 0) ballot |= 1u << i;
    if (first.together != nullptr) {
      WarpOperation* all[kWarp];
      for (int i = 0; i < kWarp; ++i) all[i] = warp[i].operation;  // its mask is that of a whole warp
      first.together(all);
    }
    for (int i = 0; i < lanes; ++i) {
      if (!(mask >> i & 1) || first.together != nullptr) continue;
      WarpOperation& operation = *warp[i].operation;
      // What a lane outside the mask would give is undefined: poison.
      if (mask >> operation.source & 1)
        std::memcpy(operation.result, warp[operation.source].operation->operand, operation.bytes);
      else
        std::memset(operation.result, 0xff, operation.bytes);
      operation.ballot = ballot;
    }
    for (int i = 0; i < lanes; ++i)
      if (mask >> i & 1) warp[i].state = State::kReady;
  }
  return any;
}

bool release_barrier(unsigned threads) {
  const Fiber& first = fibers[0];
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::kWarp)
      return fail(std::string("waits at ") + fiber.operation->site + " for lanes of its warp that do not come", fiber);
    if (fiber.state == State::kDone) return fail("exited while others wait at a barrier", fiber);
    if (std::strcmp(fiber.site, first.site) != 0)
      return fail(std::string("waits at ") + fiber.site + ", others at " + first.site, fiber);
  }
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  return true;
}

bool run_block(unsigned threads) {
  for (;;) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[emulation_reverse_order ? threads - 1 - i : i];
      if (fiber.state == State::kReady) resume(fiber);
    }
    bool ready = false, done = true;
    for (unsigned i = 0; i < threads; i += kWarp)
      ready = complete_warp(&fibers[i], std::min<int>(kWarp, threads - i)) || ready;
    for (unsigned i = 0; i < threads; ++i) done = done && fibers[i].state == State::kDone;
    if (done) return true;
    if (!ready && !release_barrier(threads)) return false;
  }
}

// A warp operation of all 32 lanes that is more than a shuffle.
WarpOperation whole_warp(const char* site, void (*together)(WarpOperation* const*)) {
  return {site, 0xffffffffu, 0, 0, {}, {}, 0, together};
}

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct Fragments {
  float sum[4];
  uint32_t a[4];
  uint32_t b[2];
};
static_assert(sizeof(Fragments) <= kOperandBytes);

// Element `half` of a register of two.
template <typename T>
float part(uint32_t word, int half) {
  T x;
  x.x = static_cast<uint16_t>(word >> 16 * half);
  return static_cast<float>(x);
}

template <Multiply kKind>
void multiply_together(WarpOperation* const* lanes) {
  constexpr int kDepth = kKind == Multiply::kTf32 ? 8 : 16;
  double a[16][kDepth], b[kDepth][8];
  Fragments fragments[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, member = lane % 4;
    Fragments& f = fragments[lane];
    std::memcpy(&f, lanes[lane]->operand, sizeof(f));
    if constexpr (kKind == Multiply::kTf32) {
      constexpr uint32_t kKept = ~0x1fffu;
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][member + i / 2 * 4] = as_float(f.a[i] & kKept);
      for (int i = 0; i < 2; ++i) b[member + i * 4][group] = as_float(f.b[i] & kKept);
    } else {
      using T = std::conditional_t<kKind == Multiply::kBFloat16, c10::BFloat16, c10::Half>;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][2 * member + half + i / 2 * 8] = part<T>(f.a[i], half);
        for (int i = 0; i < 2; ++i) b[2 * member + half + i * 8][group] = part<T>(f.b[i], half);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float result[4];
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      double sum = fragments[lane].sum[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      result[i] = static_cast<float>(sum);
    }
    std::memcpy(lanes[lane]->result, result, sizeof(result));
  }
}

template <bool kTransposed>
void load_matrices_together(WarpOperation* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    uint32_t result[4];
    for (int m = 0; m < 4; ++m) {
      uint16_t halves[2];
      for (int half = 0; half < 2; ++half) {
        const int along = 2 * (lane % 4) + half, across = lane / 4;
        const int row = kTransposed ? along : across, column = kTransposed ? across : along;
        const uint16_t* from;
        std::memcpy(&from, lanes[8 * m + row]->operand, sizeof(from));
        halves[half] = from[column];
      }
      result[m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
    std::memcpy(lanes[lane]->result, result, sizeof(result));
  }
}

void arrive(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, kCopyBytes);
    else
      std::memset(copy.to, 0, kCopyBytes);
  }
  group.clear();
}

void expect_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % kCopyBytes != 0)
    throw std::runtime_error(std::string("CUDA emulation: ") + what + " is not aligned to 16 bytes");
}

}  // namespace

void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiply kind) {
  WarpOperation operation = kind == Multiply::kTf32 ? whole_warp("mma tf32", multiply_together<Multiply::kTf32>)
                            : kind == Multiply::kBFloat16
                                ? whole_warp("mma bf16", multiply_together<Multiply::kBFloat16>)
                                : whole_warp("mma f16", multiply_together<Multiply::kFloat16>);
  Fragments fragments;
  std::memcpy(fragments.sum, sum, sizeof(sum));
  std::memcpy(fragments.a, a, sizeof(a));
  std::memcpy(fragments.b, b, sizeof(b));
  std::memcpy(operation.operand, &fragments, sizeof(fragments));
  warp_operation(operation);
  std::memcpy(sum, operation.result, sizeof(sum));
}

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  expect_aligned(row, "a row of ldmatrix");
  WarpOperation operation = transposed ? whole_warp("ldmatrix.trans", load_matrices_together<true>)
                                       : whole_warp("ldmatrix", load_matrices_together<false>);
  std::memcpy(operation.operand, &row, sizeof(row));
  warp_operation(operation);
  std::memcpy(to, operation.result, sizeof(to));
}

void copy_async(void* to, const void* from, bool keep) {
  expect_aligned(to, "the destination of cp.async");
  expect_aligned(from, "the source of cp.async");
  current->copies.back().push_back(
      {static_cast<unsigned char*>(to), keep ? static_cast<const unsigned char*>(from) : nullptr});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_for_copies(int pending) {
  const int closed = static_cast<int>(current->copies.size()) - 1;
  const int arrived = std::max(0, closed - pending);
  for (int i = 0; i < arrived; ++i) arrive(current->copies[i]);
  current->copies.erase(current->copies.begin(), current->copies.begin() + arrived);
}

unsigned char* shared_memory() { return shared.get(); }

void barrier(const char* site) {
  current->site = site;
  current->state = State::kBarrier;
  yield();
}

void warp_operation(WarpOperation& operation) {
  current->operation = &operation;
  current->state = State::kWarp;
  yield();
}

const char* launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool valid = threads >= 1 && threads <= kMaxThreads && blocks >= 1 && grid.x <= 0x7fffffffu &&
                     grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= static_cast<size_t>(emulation_shared_bytes);
  if (!valid) return "CUDA emulation: invalid configuration argument";
  if (fibers.size() < threads) fibers.resize(threads);  // fibers are between blocks: nothing points into them
  body = &thread;
  blockDim = block;
  gridDim = grid;
  shared.reset(new unsigned char[shared_bytes]);  // exactly: the address sanitizer sees an index beyond it
  for (uint64_t n = 0; n < blocks; ++n) {
    const uint64_t at = emulation_reverse_order ? blocks - 1 - n : n;
    blockIdx = Dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    std::memset(shared.get(), 0xff, shared_bytes);  // NaN in every floating type
    for (unsigned i = 0; i < threads; ++i) {
      fibers[i].thread = Dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      fibers[i].state = State::kReady;
      fibers[i].copies.assign(1, {});
    }
    if (!run_block(threads)) {
      // Fibers that were left in the middle of a kernel cannot be resumed; they start on their stacks anew.
      for (Fiber& fiber : fibers) fiber.running = false;
      return message.c_str();
    }
  }
  return nullptr;
}

}  // namespace emulation
