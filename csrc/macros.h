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
