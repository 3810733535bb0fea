// Co-moments of pairs of pixels on the CPU, from which the covariance of patches is put together (pcafast/patches.py).
//
// A first, cheap pass over the batch finds the sums over all lattices, and with them whether it counts at all and about
// which mean to centre it. Then, for a pair of blocks of channels at a time, pixels are centred, packed once in bands
// that stay in cache, and multiplied at all offsets, in the input's precision over a few hundred pixels and in float64
// from there. Nothing else of the size of the input, or of the state, is ever held.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <numeric>
#include <vector>

#include "../kernels.h"
#include "centre.h"
#include "load.h"
#include "multiarch.h"
#include "pixel_products.h"
#include "pixel_sums.h"
#include "vectors.h"

namespace pcafast::cpu {
namespace {

#define PCAFAST_PIXEL_PRODUCTS(name, Floats, Doubles, ...)                                \
  __VA_ARGS__ void name(const PixelWork& work, const PixelTask& task, double* products) { \
    with_element_type(work.grid.x.dtype, [&](auto element) {                              \
      using T = decltype(element);                                                        \
      using Vector = std::conditional_t<std::is_same_v<T, double>, Doubles, Floats>;      \
      add_products<Vector, T>(work, task, products);                                      \
    });                                                                                   \
  }

PCAFAST_PIXEL_PRODUCTS(add_products_128, Floats16, Doubles16)
#if PCAFAST_INSTRUCTION_SETS
PCAFAST_PIXEL_PRODUCTS(add_products_256, Floats32, Doubles32, PCAFAST_V3)
PCAFAST_PIXEL_PRODUCTS(add_products_512, Floats64, Doubles64, PCAFAST_V4)

const auto add_products_here = __builtin_cpu_supports("x86-64-v4")   ? add_products_512
                               : __builtin_cpu_supports("x86-64-v3") ? add_products_256
                                                                     : add_products_128;
#else
const auto add_products_here = add_products_128;
#endif

// Lattices that no slot of another family has: those of one offset.
struct Family {
  std::vector<int64_t> lattices, slots;
  int64_t work = 0;
};

std::vector<int64_t> lattices_of(const PatchCovarianceArgs& args, int64_t slot) {
  return {args.slot_lattices + (slot == 0 ? 0 : args.slot_ends[slot - 1]), args.slot_lattices + args.slot_ends[slot]};
}

// Families, gathered into at least `least` groups where there are so many, of about equal work.
std::vector<Family> gather(const PatchCovarianceArgs& args, int64_t least) {
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

// What a batch adds to one slot. Of the first pixels and of their partners, for every channel (times taps): their mean
// from the centre, and how far that mean is from the running one.
struct SlotSums {
  double count = 0;
  std::vector<double> first, partner, first_delta, partner_delta;
};

class Update {
 public:
  explicit Update(const PatchCovarianceArgs& args) : args_(args), entries_(args.x.channels * args.taps) {}

  void run() {
    PixelSums sums = sum_pixels(args_);
    if (!sums.finite || !squares_fit(sums.largest)) {
      ++*args_.skipped;
      return;
    }
    set_centre(sums);
    for (int64_t slot = 0; slot < args_.slots; ++slot) slots_.push_back(slot_sums(sums, slot));
    // Squares of very large or small float32 are no float32.
    const double unit = sums.largest > 0 ? std::exp2(std::clamp(-std::ilogb(sums.largest), -126, 126)) : 1;
    const int64_t width = entries_ / args_.groups;
    const PixelWork work{PixelGrid(args_), centre_.data(), unit, width, width == 1};
    std::vector<PixelTask> tasks = cut(work);
    std::atomic<size_t> next{0};
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks.size()), 1, [&](int64_t, int64_t) {
      std::vector<double> products;
      for (size_t k; (k = next++) < tasks.size();) {
        products.assign(2 * kTile * tasks[k].lattices.size(), 0.0);
        add_products_here(work, tasks[k], products.data());
        for (const int64_t slot : task_slots_[k]) commit(work, tasks[k], slot, products.data());
      }
    });
    finish();
  }

 private:
  bool squares_fit(double largest) const {
    return std::isfinite(4 * largest * largest * args_.x.examples * args_.height * args_.width);
  }

  // The mean over the largest lattice of pixels that are their own partners: if the border of the maps is out of the
  // ordinary, it does not lie in that.
  void set_centre(const PixelSums& sums) {
    int64_t largest = -1, most = 0;
    for (int64_t k = 0; k < args_.lattices; ++k) {
      const PixelPairs& pairs = args_.pairs[k];
      if (pairs.down != 0 || pairs.right != 0 || pairs.rows * pairs.columns <= most) continue;
      largest = k;
      most = pairs.rows * pairs.columns;
    }
    for (int64_t e = 0; e < entries_; ++e) {
      double mean = 0;
      if (largest >= 0) mean = sums.first[largest * entries_ + e] / static_cast<double>(args_.x.examples * most);
      const double zeros =
          sums.zeros[e / args_.taps] / static_cast<double>(args_.x.examples * args_.height * args_.width);
      centre_.push_back(centre_near(mean, zeros, args_.x.dtype));
    }
  }

  SlotSums slot_sums(const PixelSums& sums, int64_t slot) const {
    SlotSums result{0, std::vector<double>(entries_), std::vector<double>(entries_), {}, {}};
    for (const int64_t k : lattices_of(args_, slot)) {
      const double count = static_cast<double>(args_.x.examples * args_.pairs[k].rows * args_.pairs[k].columns);
      result.count += count;
      for (int64_t e = 0; e < entries_; ++e) {
        result.first[e] += sums.first[k * entries_ + e] - count * centre_[e];
        result.partner[e] += sums.partner[k * entries_ + e] - count * centre_[e];
      }
    }
    for (int64_t e = 0; e < entries_ && result.count > 0; ++e) {
      result.first[e] /= result.count;
      result.partner[e] /= result.count;
      result.first_delta.push_back(centre_[e] + result.first[e] - args_.left[slot * entries_ + e]);
      result.partner_delta.push_back(centre_[e] + result.partner[e] - args_.right[slot * entries_ + e]);
    }
    return result;
  }

  std::vector<PixelTask> cut(const PixelWork& work) {
    // Single channels are taken together as if they were a group.
    const int64_t groups = work.own ? 1 : args_.groups, width = work.own ? entries_ : work.width;
    const int64_t blocks = (width + kBlock - 1) / kBlock, pairs = work.own ? blocks : blocks * (blocks + 1) / 2;
    // Pixels are packed anew in every task.
    const int64_t threads = at::get_num_threads();
    const std::vector<Family> families = gather(args_, groups * pairs >= 4 * threads ? 1 : threads);
    std::vector<PixelTask> tasks;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < blocks; ++i) {
        for (int64_t j = i; j < (work.own ? i + 1 : blocks); ++j) {
          for (const Family& family : families) {
            const auto end = [&](int64_t block) { return g * width + std::min((block + 1) * kBlock, width); };
            tasks.push_back({g * width + i * kBlock, end(i), g * width + j * kBlock, end(j), family.lattices});
            task_slots_.push_back(family.slots);
          }
        }
      }
    }
    return tasks;
  }

  void commit(const PixelWork& work, const PixelTask& task, int64_t slot, const double* products) {
    if (slots_[slot].count == 0) return;
    std::vector<const double*> parts;
    bool same_pixel = false;
    for (const int64_t lattice : lattices_of(args_, slot)) {
      const int64_t k = std::find(task.lattices.begin(), task.lattices.end(), lattice) - task.lattices.begin();
      parts.push_back(products + 2 * k * kTile);
      same_pixel = args_.pairs[lattice].down == 0 && args_.pairs[lattice].right == 0;
    }
    const int64_t width = work.width, group = work.own ? 0 : task.begin_i / width, begin = group * width;
    double* const comoment = args_.comoment + (slot * args_.groups + group) * width * width;
    if (work.own) {
      for (int64_t i = task.begin_i; i < task.end_i; ++i) {
        merge(work, slot, i, i, i + 1, parts, i - task.begin_i, comoment + i);
      }
      return;
    }
    for (int64_t i = task.begin_i; i < task.end_i; ++i) {
      merge(work, slot, i, same_pixel && task.is_diagonal() ? i : task.begin_j, task.end_j, parts,
            (i - task.begin_i) * kBlock + (same_pixel && task.is_diagonal() ? i - task.begin_j : 0),
            comoment + (i - begin) * width + (same_pixel && task.is_diagonal() ? i : task.begin_j) - begin);
    }
    if (same_pixel) {
      for (int64_t i = task.begin_i; i < task.end_i; ++i) {
        for (int64_t j = std::max(i + 1, task.begin_j); j < task.end_j; ++j) {
          comoment[(j - begin) * width + i - begin] = comoment[(i - begin) * width + j - begin];
        }
      }
    } else if (!task.is_diagonal()) {
      for (int64_t j = task.begin_j; j < task.end_j; ++j) {
        merge(work, slot, j, task.begin_i, task.end_i, parts, kTile + (j - task.begin_j) * kBlock,
              comoment + (j - begin) * width + task.begin_i - begin);
      }
    }
  }

  // Adds to the co-moments of channel a at the first pixels and channels [begin, end) at their partners, of which each
  // of the parts has the products about the centre.
  void merge(const PixelWork& work, int64_t slot, int64_t a, int64_t begin, int64_t end,
             const std::vector<const double*>& parts, int64_t offset, double* comoment) const {
    const SlotSums& batch = slots_[slot];
    const double before = args_.count[slot], unscaled = 1 / (work.unit * work.unit);
    const double of_centre = batch.count * batch.first[a];
    const double of_delta = before * batch.count / (before + batch.count) * batch.first_delta[a];
    const double *partner = batch.partner.data() + begin, *delta = batch.partner_delta.data() + begin;
    double products[kBlock] = {};
    for (const double* part : parts) {
      for (int64_t k = 0; k < end - begin; ++k) products[k] += part[offset + k];
    }
    // Rows are too far apart for the processor to see where it goes on.
    for (int64_t k = 0; k < end - begin; k += 8) __builtin_prefetch(comoment + 4 * work.width + k, 1);
    for (int64_t k = 0; k < end - begin; ++k) {
      comoment[k] += products[k] * unscaled - of_centre * partner[k] + of_delta * delta[k];
    }
  }

  void finish() {
    for (int64_t slot = 0; slot < args_.slots; ++slot) {
      const SlotSums& batch = slots_[slot];
      if (batch.count == 0) continue;
      const double total = args_.count[slot] + batch.count;
      for (int64_t e = 0; e < entries_; ++e) {
        args_.left[slot * entries_ + e] += batch.first_delta[e] * (batch.count / total);
        args_.right[slot * entries_ + e] += batch.partner_delta[e] * (batch.count / total);
      }
      args_.count[slot] = total;
    }
    *args_.patches += static_cast<double>(args_.x.examples * args_.patches_per_example);
  }

  const PatchCovarianceArgs& args_;
  const int64_t entries_;
  std::vector<double> centre_;
  std::vector<SlotSums> slots_;
  std::vector<std::vector<int64_t>> task_slots_;
};

}  // namespace

void patch_covariance_update(const PatchCovarianceArgs& args) { Update(args).run(); }

}  // namespace pcafast::cpu
