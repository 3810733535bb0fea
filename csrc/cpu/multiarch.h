// Portable binaries with wide vectors: a function marked PCAFAST_MULTIARCH is compiled once per instruction set
// and the loader picks the widest that the processor has. Everything it calls is inlined into it, so that the
// callees get the same instruction set. Tests define it as a single one of them.
#pragma once

#ifndef PCAFAST_MULTIARCH
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PCAFAST_MULTIARCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define PCAFAST_MULTIARCH
#endif
#endif
