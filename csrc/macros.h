#pragma once

#ifdef __CUDACC__
#define NASFCOS_INLINE __host__ __device__ __forceinline__
#else
#define NASFCOS_INLINE inline __attribute__((always_inline))
#endif

// A function so marked is compiled for several instruction sets, and the loader picks the best that
// the processor has: one library runs everywhere and still uses AVX2 or AVX-512.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define NASFCOS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NASFCOS_CLONES
#endif

// For code that is written with vectors of a given width: NASFCOS_BY_WIDTH(name, Arguments, call)
// defines `void name(const Arguments& a)`, which runs `call` with a constant `kBytes`, the width of
// this processor's vectors. `call` is compiled for each width, and all that it calls must be
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
