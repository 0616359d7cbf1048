// Every csrc/cpu/<op>.cpp is compiled once per instruction set, each time with another GRANVIT_ISA, and its kernels
// live in the namespace of that name. The copy compiled for the default target (GRANVIT_HOST) also holds the op's
// registration and picks a kernel when the op is called, so one binary runs on every x86-64 and uses AVX-512 where the
// machine has it.
//
// The objects are linked default first, widest last. An inline function that several of them instantiate (a std::vector
// member, say) is kept from the first one, hence never compiled for more than the machine that reaches it has.
#pragma once

#include <cstdint>
#include <string>

#ifndef GRANVIT_ISA
#error "compile csrc/cpu/*.cpp with -DGRANVIT_ISA=<isa_default|isa_avx2|isa_avx512|isa_avx512bf16>"
#endif

namespace granvit::cpu {

enum class IsaLevel : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The widest set that was compiled and that this processor has; GRANVIT_CPU_ISA=<name> lowers it.
IsaLevel isa_level();
std::string isa_name(IsaLevel level);
// Comma-separated names of the sets that were compiled.
std::string compiled_isas();

#ifdef GRANVIT_HAVE_AVX2
#define GRANVIT_CASE_AVX2(name) \
  case IsaLevel::kAvx2:         \
    return &isa_avx2::name;
#else
#define GRANVIT_CASE_AVX2(name)
#endif
#ifdef GRANVIT_HAVE_AVX512
#define GRANVIT_CASE_AVX512(name) \
  case IsaLevel::kAvx512:         \
    return &isa_avx512::name;
#else
#define GRANVIT_CASE_AVX512(name)
#endif
#ifdef GRANVIT_HAVE_AVX512BF16
#define GRANVIT_CASE_AVX512BF16(name) \
  case IsaLevel::kAvx512Bf16:         \
    return &isa_avx512bf16::name;
#else
#define GRANVIT_CASE_AVX512BF16(name)
#endif

// Declares `void name(const Args&)` in every instruction set's namespace, and `name##_kernel()`, which picks one.
#define GRANVIT_DECLARE_KERNEL(name, Args)                                \
  namespace isa_default {                                                 \
  void name(const Args&);                                                 \
  }                                                                       \
  namespace isa_avx2 {                                                    \
  void name(const Args&);                                                 \
  }                                                                       \
  namespace isa_avx512 {                                                  \
  void name(const Args&);                                                 \
  }                                                                       \
  namespace isa_avx512bf16 {                                              \
  void name(const Args&);                                                 \
  }                                                                       \
  [[maybe_unused]] static auto name##_kernel() -> void (*)(const Args&) { \
    switch (isa_level()) {                                                \
      GRANVIT_CASE_AVX512BF16(name)                                       \
      GRANVIT_CASE_AVX512(name)                                           \
      GRANVIT_CASE_AVX2(name)                                             \
      default:                                                            \
        return &isa_default::name;                                        \
    }                                                                     \
  }

}  // namespace granvit::cpu
