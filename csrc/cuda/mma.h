// Matrix units and asynchronous copies, for sm_80 and newer: one function an instruction. A lane's place in a fragment
// is named by group = lane / 4 and member = lane % 4, as in the PTX manual ("Warp Level Matrix Instructions").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace granvit::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// The bits of x in tf32, rounded to nearest: the matrix unit itself cuts the lowest 13 bits off.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// sum (16, 8) += a (16, 8) b (8, 8) in tf32.
// a: rows group, group + 8 of column member, then of column member + 4; b: rows member, member + 4 of column group.
// sum: columns 2 member, 2 member + 1 of row group, then of row group + 8.
__device__ __forceinline__ void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum (16, 8) += a (16, 16) b (16, 8) in bfloat16 or float16, two neighbours along the inner dimension a register.
// a: inner 2 member, + 1 of row group, of row group + 8; then the same 8 further. b: inner 2 member, + 1 of column
// group; then the same 8 further. sum: as in mma_tf32.
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum (16, 8) += a (16, 8) b (8, 8): half of mma, for an inner dimension that ends on a multiple of 8.
// a: inner 2 member, + 1 of row group, of row group + 8. b: inner 2 member, + 1 of column group.
__device__ __forceinline__ void mma_8(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
__device__ __forceinline__ void mma_8(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __half) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Four 8x8 matrices of 16-bit elements; lane i points to row i % 8 of matrix i / 8, 16 bytes aligned to 16. to[m] holds
// columns 2 member, + 1 of row group of matrix m; transposed, rows 2 member, + 1 of column group.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes to shared memory (both addresses aligned to 16), or writes zeros where `keep` is false; `from` has to
// be a valid address either way. Visible to this thread after wait_for_copies, to others after a barrier that follows
// it.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool keep) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(keep ? 16 : 0)
               : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Returns once all but this thread's last `kPending` groups have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// __syncthreads, which warps of different roles may reach at different places of the program.
__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

#else

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x7fffffffu) < 0x7f800000u ? (bits + 0x1000u) & ~0x1fffu : bits;
}
inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(sum, a, b, emulation::Multiply::kTf32);
}
inline void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulation::multiply(sum, a, b, emulation::Multiply::kBFloat16);
}
inline void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  emulation::multiply(sum, a, b, emulation::Multiply::kFloat16);
}
// The other half of the inner dimension is zero: the same sum.
inline void mma_8(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __nv_bfloat16) {
  emulation::multiply(sum, {a[0], a[1], 0, 0}, {b, 0}, emulation::Multiply::kBFloat16);
}
inline void mma_8(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __half) {
  emulation::multiply(sum, {a[0], a[1], 0, 0}, {b, 0}, emulation::Multiply::kFloat16);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, true); }
inline void copy_async(void* to, const void* from, bool keep) { emulation::copy_async(to, from, keep); }
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}
inline void block_barrier() { emulation::barrier("block_barrier"); }

#endif

__device__ __forceinline__ uint32_t tf32_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ __forceinline__ float tf32_value(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
// Like to_tf32, with the lowest 13 bits left for the matrix unit to cut off: one instruction less.
__device__ __forceinline__ uint32_t nearest_tf32(float x) {
  const uint32_t bits = tf32_bits(x);
  return fabsf(x) < INFINITY ? bits + 0x1000u : bits;
}
// What nearest_tf32(x) leaves out of x.
__device__ __forceinline__ float tf32_rest(float x, uint32_t nearest) { return x - tf32_value(nearest & ~0x1fffu); }

}  // namespace granvit::cuda
