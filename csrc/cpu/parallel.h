// Work on torch's own thread pool, handed out task by task, and scratch memory for it.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "isa.h"

namespace granvit::cpu::GRANVIT_ISA {

// Scratch memory of one worker: take() until reset(); contents are not initialised.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    if (blocks_.empty() || blocks_.back().used + bytes > blocks_.back().size) add_block(bytes);
    Block& block = blocks_.back();
    T* p = reinterpret_cast<T*>(static_cast<char*>(block.data) + block.used);
    block.used += bytes;
    return p;
  }

  // Forgets all that was taken. Several blocks become one, so that a steady task size allocates once.
  void reset() {
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (const Block& block : blocks_) {
        total += block.size;
        std::free(block.data);
      }
      blocks_.clear();
      add_block(total);
    }
    if (!blocks_.empty()) blocks_.back().used = 0;
  }

 private:
  struct Block {
    void* data;
    size_t size;
    size_t used;
  };
  void add_block(size_t bytes) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(64, size);
    if (data == nullptr) throw std::bad_alloc();
    blocks_.push_back({data, size, 0});
  }
  std::vector<Block> blocks_;
};

// Runs body(task, scratch) for every task in [0, tasks). Tasks are handed out one by one, so uneven ones balance; a
// task's result must depend on the task alone, which is what makes every kernel here give the same bits for any thread
// count.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  struct Shared {
    const Body* body = nullptr;
    int64_t tasks = 0;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
  } shared;
  shared.body = &body;
  shared.tasks = tasks;

  // An exception must not cross the thread pool's C interface: the first one is carried over and rethrown here.
  auto work = [](int64_t, int64_t, void* context) {
    auto* s = static_cast<Shared*>(context);
    try {
      Scratch scratch;
      for (int64_t task; (task = s->next.fetch_add(1, std::memory_order_relaxed)) < s->tasks;) {
        scratch.reset();
        (*s->body)(task, scratch);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(s->error_mutex);
      if (!s->error) s->error = std::current_exception();
      s->next.store(s->tasks);
    }
  };
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("granvit: torch reports no thread count");
  const int64_t workers = tasks < static_cast<int64_t>(threads) ? tasks : static_cast<int64_t>(threads);
  if (workers == 1) {
    work(0, 1, &shared);
  } else if (torch_parallel_for(0, workers, 1, work, &shared) != 0) {
    throw std::runtime_error("granvit: torch's thread pool refused the work");
  }
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace granvit::cpu::GRANVIT_ISA
