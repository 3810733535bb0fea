// Calls the CPU kernels from Python, where they are compiled for one level of the instruction set.
#include <cstddef>

#include "kernels.h"

// Elsewhere it stands for the level chosen.
#undef __builtin_cpu_supports

using namespace pcafast;

extern "C" {

// The x86-64 level of this processor, as far as there are kernels for it.
int processor_level() {
#ifdef __x86_64__
  return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
#else
  return 1;
#endif
}

int64_t rank_args_bytes() { return sizeof(RankArgs); }
int64_t taylor_args_bytes() { return sizeof(TaylorArgs); }
int64_t channel_moments_args_bytes() { return sizeof(MomentsArgs); }
int64_t covariance_args_bytes() { return sizeof(CovarianceArgs); }
int64_t patch_covariance_args_bytes() { return sizeof(PatchCovarianceArgs); }

int64_t rank_workspace(const RankArgs*) { return 0; }
int64_t taylor_workspace(const TaylorArgs* args) { return cpu::taylor_workspace(*args); }
int64_t channel_moments_workspace(const MomentsArgs* args) { return cpu::channel_moments_workspace(*args); }

void rank(const RankArgs* args) { cpu::feature_map_rank(*args); }
void taylor_update(const TaylorArgs* args) { cpu::taylor_update(*args); }
void channel_moments_update(const MomentsArgs* args) { cpu::channel_moments_update(*args); }
void covariance_update(const CovarianceArgs* args) { cpu::covariance_update(*args); }
void patch_covariance_update(const PatchCovarianceArgs* args) { cpu::patch_covariance_update(*args); }
}
