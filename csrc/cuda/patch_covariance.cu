// Patch covariance on the GPU: co-moments of pixels and their partners, lattice by lattice. The map is x itself and a
// pixel has one tap, itself.
#include "kernels_cuda.h"
#include "pair_plan.h"

namespace pcafast::cuda {
namespace {

Samples samples(const PatchCovarianceArgs& args) {
  const MapView& x = args.x;
  return {x.data,
          x.dtype,
          x.examples,
          x.channels,
          x.example_stride,
          x.channel_stride,
          args.row_step * x.row_stride,
          args.column_step * x.column_stride,
          nullptr,
          args.groups};
}

PairTables tables(const PatchCovarianceArgs& args) {
  const MapView& x = args.x;
  PairTables tables;
  for (int64_t l = 0; l < args.lattices; ++l) {
    const PixelPairs& pairs = args.pairs[l];
    tables.lattices.push_back({pairs.top * x.row_stride + pairs.left * x.column_stride,
                               pairs.down * x.row_stride + pairs.right * x.column_stride, pairs.rows, pairs.columns, 0,
                               0, pairs.down == 0 && pairs.right == 0});
  }
  int64_t begin = 0;
  for (int64_t s = 0; s < args.slots; ++s) {
    Slot slot = {begin, args.slot_ends[s], 0, 0};
    for (int64_t e = begin; e < slot.end; ++e) {
      const Lattice& lattice = tables.lattices[args.slot_lattices[e]];
      slot.symmetric = lattice.symmetric;
      slot.count += static_cast<double>(x.examples) * lattice.rows * lattice.columns;
      tables.entries.push_back(args.slot_lattices[e]);
    }
    begin = slot.end;
    tables.slots.push_back(slot);
  }
  return tables;
}

}  // namespace

int64_t patch_covariance_workspace(const PatchCovarianceArgs& args) {
  return pair_workspace(samples(args), tables(args));
}

void patch_covariance_update(const PatchCovarianceArgs& args, cudaStream_t stream) {
  const double patches = static_cast<double>(args.x.examples) * args.patches_per_example;
  const PairState state = {1,          args.count,    args.left, args.right, args.comoment, args.skipped,
                           args.patches, patches};
  update_pairs(samples(args), tables(args), state, args.workspace, stream);
}

}  // namespace pcafast::cuda
