// Patch covariance on the GPU: co-moments of pixels and their partners, lattice by lattice. The map is x itself and a
// pixel has one tap, itself.
#include <algorithm>
#include <numeric>
#include <vector>

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
          args.groups,
          args.padded != 0};
}

PairTables tables(const PatchCovarianceArgs& args) {
  const MapView& x = args.x;
  PairTables tables;
  // The largest come first, so that the blocks of small ones fill the places that are left at the end.
  std::vector<int64_t> order(args.lattices), number_of(args.lattices);
  std::iota(order.begin(), order.end(), 0);
  const auto pixels = [&](int64_t l) { return args.pairs[l].rows * args.pairs[l].columns; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return pixels(a) > pixels(b); });
  for (const int64_t l : order) {
    number_of[l] = tables.lattices.size();
    const PixelPairs& pairs = args.pairs[l];
    tables.lattices.push_back({pairs.top * x.row_stride + pairs.left * x.column_stride,
                               pairs.down * x.row_stride + pairs.right * x.column_stride, pairs.rows, pairs.columns,
                               pairs.down == 0 && pairs.right == 0, 0, 0, 0, 0, 0});
  }
  int64_t entry = 0;
  for (int64_t s = 0; s < args.slots; ++s) {
    Slot slot = {static_cast<int64_t>(tables.entries.size()), 0, 0, 0};
    for (; entry < args.slot_ends[s]; ++entry) {
      const int64_t number = number_of[args.slot_lattices[entry]];
      const Lattice& lattice = tables.lattices[number];
      if (lattice.rows == 0 || lattice.columns == 0) continue;
      slot.symmetric = lattice.symmetric;  // as all of a slot are
      slot.count += static_cast<double>(x.examples) * lattice.rows * lattice.columns;
      tables.entries.push_back(number);
    }
    slot.end = tables.entries.size();
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
  const PairState state = {1, args.count, args.left, args.right, args.comoment, args.skipped, args.patches, patches};
  update_pairs(samples(args), tables(args), state, args.workspace, stream);
}

}  // namespace pcafast::cuda
