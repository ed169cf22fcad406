#pragma once

#ifdef __CUDACC__
#define NASFCOS_INLINE __host__ __device__ __forceinline__
#else
#define NASFCOS_INLINE inline __attribute__((always_inline))
#endif

// Compiles a function for several instruction sets, of which the loader picks the best that the
// processor has. So one library runs everywhere and still uses AVX2 or AVX-512.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define NASFCOS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NASFCOS_CLONES
#endif

// Defines functions for the types of maps, with clones of those that the compiler vectorises.
// DEFINE(CLONES, T, ACC) and DEFINE(CLONES, T) define the function for values T in memory (bfloat16
// as uint16_t) and arithmetic in ACC. Gradients have no half precision.
#define NASFCOS_FOR_MAP_TYPES(DEFINE)      \
  DEFINE(NASFCOS_CLONES, float, float)     \
  DEFINE(NASFCOS_CLONES, uint16_t, float)  \
  DEFINE(, double, double)
#define NASFCOS_FOR_GRAD_TYPES(DEFINE) \
  DEFINE(NASFCOS_CLONES, float)        \
  DEFINE(, double)

// For code with vectors of explicit width: NASFCOS_BY_WIDTH(name, Arguments, call) defines
// `void name(const Arguments& a)`, which runs `call` with a constant `kBytes`, the width of this
// processor's vectors. `call` is compiled once per width, so everything it calls must be
// NASFCOS_INLINE.
#if defined(__x86_64__) && defined(__GNUC__)
#define NASFCOS_BY_WIDTH(NAME, ARGUMENTS, CALL)                                             \
  __attribute__((target("avx512f"))) void NAME##_64(const ARGUMENTS& a) {                   \
    constexpr int kBytes = 64;                                                              \
    CALL;                                                                                   \
  }                                                                                         \
  __attribute__((target("avx2,fma"))) void NAME##_32(const ARGUMENTS& a) {                  \
    constexpr int kBytes = 32;                                                              \
    CALL;                                                                                   \
  }                                                                                         \
  void NAME##_16(const ARGUMENTS& a) {                                                      \
    constexpr int kBytes = 16;                                                              \
    CALL;                                                                                   \
  }                                                                                         \
  void NAME(const ARGUMENTS& a) {                                                           \
    static const auto best = __builtin_cpu_supports("avx512f") ? NAME##_64                  \
                             : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") \
                                 ? NAME##_32                                                \
                                 : NAME##_16;                                               \
    best(a);                                                                                \
  }
#else
#define NASFCOS_BY_WIDTH(NAME, ARGUMENTS, CALL) \
  void NAME(const ARGUMENTS& a) {               \
    constexpr int kBytes = 16;                  \
    CALL;                                       \
  }
#endif
