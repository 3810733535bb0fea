// Portable binaries with wide vectors: what an instruction set can do best is compiled once for each of them, and the
// processor at hand decides at run time. A function marked PCAFAST_MULTIARCH is cloned, and the loader picks the clone;
// code that is written for one length of vector is marked PCAFAST_V4 (AVX-512) or PCAFAST_V3 (AVX2), and picked by
// __builtin_cpu_supports. Everything they call is inlined into them, so that the callees get the same instruction set.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PCAFAST_INSTRUCTION_SETS 1
#define PCAFAST_V3 __attribute__((target("arch=x86-64-v3"), flatten))
#define PCAFAST_V4 __attribute__((target("arch=x86-64-v4"), flatten))
#else
#define PCAFAST_INSTRUCTION_SETS 0
#endif

#ifndef PCAFAST_MULTIARCH  // tests define it as a single one of them
#if PCAFAST_INSTRUCTION_SETS
#define PCAFAST_MULTIARCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define PCAFAST_MULTIARCH
#endif
#endif

#if defined(__has_builtin)
#define PCAFAST_HAS_SHUFFLEVECTOR __has_builtin(__builtin_shufflevector)
#else
#define PCAFAST_HAS_SHUFFLEVECTOR 0
#endif
