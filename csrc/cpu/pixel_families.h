// Which lattices of a patch covariance belong together, and how they are shared out.
#pragma once

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace pcafast::cpu {

// Lattices that no slot of another family has: those of one offset.
struct Family {
  std::vector<int64_t> lattices, slots;
  int64_t work = 0;
};

inline std::vector<int64_t> lattices_of(const PatchCovarianceArgs& args, int64_t slot) {
  return {args.slot_lattices + (slot == 0 ? 0 : args.slot_ends[slot - 1]), args.slot_lattices + args.slot_ends[slot]};
}

// Families, gathered into at least `least` groups where there are so many, of about equal work.
inline std::vector<Family> gather(const PatchCovarianceArgs& args, int64_t least) {
  std::vector<int64_t> parent(args.lattices);
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t k) {
    while (parent[k] != k) k = parent[k];
    return k;
  };
  std::vector<std::vector<int64_t>> slots;
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    slots.push_back(lattices_of(args, slot));
    for (const int64_t k : slots.back()) parent[root(k)] = root(slots.back()[0]);
  }
  std::map<int64_t, Family> families;
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    if (!slots[slot].empty()) families[root(slots[slot][0])].slots.push_back(slot);
  }
  for (int64_t k = 0; k < args.lattices; ++k) {
    const PixelPairs& pairs = args.pairs[k];
    Family& family = families[root(k)];
    family.lattices.push_back(k);
    family.work += pairs.rows * pairs.columns * (pairs.down == 0 && pairs.right == 0 ? 1 : 2);
  }

  constexpr int64_t kMostLattices = 32;  // two products each, so that they stay in cache
  std::vector<Family> sorted;
  for (auto& [_, family] : families) sorted.push_back(std::move(family));
  std::stable_sort(sorted.begin(), sorted.end(), [](const Family& a, const Family& b) { return a.work > b.work; });
  const int64_t count = std::clamp<int64_t>((args.lattices + kMostLattices - 1) / kMostLattices, least,
                                            std::max<int64_t>(least, sorted.size()));
  std::vector<Family> groups(std::min<int64_t>(count, sorted.size()));
  for (const Family& family : sorted) {
    Family& lightest = *std::min_element(groups.begin(), groups.end(),
                                         [](const Family& a, const Family& b) { return a.work < b.work; });
    lightest.lattices.insert(lightest.lattices.end(), family.lattices.begin(), family.lattices.end());
    lightest.slots.insert(lightest.slots.end(), family.slots.begin(), family.slots.end());
    lightest.work += family.work;
  }
  return groups;
}

}  // namespace pcafast::cpu
