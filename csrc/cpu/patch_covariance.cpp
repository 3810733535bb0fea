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
#include <vector>

#include "../kernels.h"
#include "centre.h"
#include "load.h"
#include "multiarch.h"
#include "pixel_families.h"
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
  // Those of all pixels in float64, and the distance of two in the working type.
  bool squares_fit(double largest) const {
    if (args_.x.dtype != Dtype::kFloat64 && largest > 0x1p127) return false;
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
    const double pixels = static_cast<double>(args_.x.examples * args_.height * args_.width);
    for (int64_t e = 0; e < entries_; ++e) {
      double mean = 0;
      if (largest >= 0) mean = sums.first[largest * entries_ + e] / static_cast<double>(args_.x.examples * most);
      centre_.push_back(centre_near(mean, sums.squares[e / args_.taps] / pixels - mean * mean, args_.x.dtype));
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
    if (work.own) {
      for (int64_t i = task.begin_i; i < task.end_i; ++i) {
        merge(work, slot, i, i, i + 1, parts, i - task.begin_i, args_.comoment + slot * args_.groups + i);
      }
      return;
    }
    const int64_t width = work.width, group = task.begin_i / width, begin = group * width;
    double* const comoment = args_.comoment + (slot * args_.groups + group) * width * width;
    const auto at = [&](int64_t a, int64_t b) { return comoment + (a - begin) * width + b - begin; };
    for (int64_t i = task.begin_i; i < task.end_i; ++i) {
      const int64_t j = same_pixel && task.is_diagonal() ? i : task.begin_j;
      merge(work, slot, i, j, task.end_j, parts, (i - task.begin_i) * kBlock + j - task.begin_j, at(i, j));
    }
    if (same_pixel) {
      for (int64_t i = task.begin_i; i < task.end_i; ++i) {
        for (int64_t j = std::max(i + 1, task.begin_j); j < task.end_j; ++j) *at(j, i) = *at(i, j);
      }
    } else if (!task.is_diagonal()) {
      for (int64_t j = task.begin_j; j < task.end_j; ++j) {
        merge(work, slot, j, task.begin_i, task.end_i, parts, kTile + (j - task.begin_j) * kBlock, at(j, task.begin_i));
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
