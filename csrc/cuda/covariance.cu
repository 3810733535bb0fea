// Covariance on the GPU: all samples of a batch are one lattice, whose pixels are their own partners.
#include "channel_view.h"
#include "kernels_cuda.h"
#include "pair_plan.h"

namespace pcafast::cuda {
namespace {

Samples samples(const CovarianceArgs& args) {
  const ChannelView x = joined(args.x);
  return {x.data,      x.dtype,     x.examples, x.channels, x.example_stride, x.channel_stride, 0, x.position_stride,
          args.weight, args.groups, false};
}

PairTables tables(const CovarianceArgs& args) {
  const double count = static_cast<double>(args.x.examples) * args.x.positions;
  return {{{0, 0, 1, joined(args.x).positions, 1, 0, 0, 0, 0, 0}}, {{0, 1, 1, count}}, {0}};
}

}  // namespace

int64_t covariance_workspace(const CovarianceArgs& args) { return pair_workspace(samples(args), tables(args)); }

void covariance_update(const CovarianceArgs& args, cudaStream_t stream) {
  const PairState state = {args.scale, args.count, args.mean, nullptr, args.comoment, args.skipped, nullptr, 0};
  update_pairs(samples(args), tables(args), state, args.workspace, stream);
}

}  // namespace pcafast::cuda
