// The native surface on one page: every operator's schema, every argument check, and the dispatch to the kernels,
// which know nothing of torch (kernels.h). What each operator computes is said in pcafast/reference.py.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "kernels.h"
#ifdef PCAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels_cuda.h"
#endif

namespace pcafast {
namespace {

using at::Tensor;

TORCH_LIBRARY(pcafast, m) {
  m.def(
      "covariance_update_(Tensor x, int channel_dim, int groups, float scale, Tensor? weight, Tensor(a!) count, "
      "Tensor(b!) mean, Tensor(c!) comoment, Tensor(d!) skipped) -> ()");
  m.def(
      "patch_covariance_update_(Tensor x, Tensor source_rows, Tensor source_columns, Tensor taps, Tensor steps, "
      "Tensor rectangles, Tensor slot_ends, Tensor slot_rectangles, int patches_per_example, int groups, "
      "Tensor(a!) patches, Tensor(b!) count, Tensor(c!) left, Tensor(d!) right, Tensor(e!) comoment, "
      "Tensor(f!) skipped) -> ()");
  m.def(
      "taylor_update_(Tensor activation, Tensor gradient, int channel_dim, float scale, Tensor(a!) examples, "
      "Tensor(b!) positions, Tensor(c!) sums, Tensor(d!) skipped) -> ()");
  m.def(
      "channel_moments_update_(Tensor x, int channel_dim, Tensor(a!) count, Tensor(b!) mean, "
      "Tensor(c!) centred_squares, Tensor(d!) absolute, Tensor(e!) zeros, Tensor(f!) skipped) -> ()");
  m.def("feature_map_rank(Tensor x, float rtol, float atol) -> Tensor");
}

Dtype element_type(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    default:
      TORCH_CHECK_VALUE(false, name, ": expected float16, bfloat16, float32 or float64, got ", x.scalar_type());
  }
}

void check_state(const char* name, const Tensor& state, at::IntArrayRef shape, const Tensor& x,
                 at::ScalarType dtype = at::kDouble) {
  TORCH_CHECK_VALUE(
      state.scalar_type() == dtype && state.sizes() == shape && state.is_contiguous() && state.device() == x.device(),
      name, ": expected contiguous ", dtype, " of shape ", shape, " on ", x.device(), ", got ", state.scalar_type(),
      " of shape ", state.sizes(), " on ", state.device());
}

int64_t checked_channel_dim(const char* name, const Tensor& x, int64_t channel_dim) {
  TORCH_CHECK_VALUE(x.dim() >= 1, name, ": expected at least one dimension, got a scalar");
  TORCH_CHECK_VALUE(-x.dim() <= channel_dim && channel_dim < x.dim(), "channel_dim: expected one of the ", x.dim(),
                    " dimensions of ", name, ", got ", channel_dim);
  return channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
}

// An activation as (examples, channels, positions); copies it if its positions do not lie at one stride.
struct Channels {
  Tensor tensor;  // keeps the memory alive
  ChannelView view;

  Channels(const char* name, Tensor x, int64_t channel_dim) : tensor(std::move(x)) {
    channel_dim = checked_channel_dim(name, tensor, channel_dim);
    if (!collapse(channel_dim)) {
      // Positions on both sides of the channels, or strides without a pattern: one copy.
      tensor = tensor.movedim(channel_dim, has_examples(channel_dim) ? 1 : 0).contiguous();
      collapse(has_examples(channel_dim) ? 1 : 0);
    }
    view.data = tensor.const_data_ptr();
    view.dtype = element_type(name, tensor);
  }

 private:
  static bool has_examples(int64_t channel_dim) { return channel_dim != 0; }

  // False if the positions do not lie at one stride.
  bool collapse(int64_t channel_dim) {
    view.examples = has_examples(channel_dim) ? tensor.size(0) : 1;
    view.example_stride = has_examples(channel_dim) ? tensor.stride(0) : 0;
    view.channels = tensor.size(channel_dim);
    view.channel_stride = tensor.stride(channel_dim);
    view.positions = 1;
    view.position_stride = 1;
    for (int64_t dim = tensor.dim() - 1; dim >= (has_examples(channel_dim) ? 1 : 0); --dim) {
      if (dim == channel_dim || tensor.size(dim) == 1) continue;
      if (view.positions == 1) {
        view.position_stride = tensor.stride(dim);
      } else if (tensor.stride(dim) != view.position_stride * view.positions) {
        return false;
      }
      view.positions *= tensor.size(dim);
    }
    return true;
  }
};

// The weights (examples, positions) as float64, or none.
Tensor checked_weights(const Tensor& x, int64_t channel_dim, const std::optional<Tensor>& weight) {
  if (!weight.has_value()) return {};
  auto shape = x.sizes().vec();
  shape.erase(shape.begin() + checked_channel_dim("x", x, channel_dim));
  TORCH_CHECK_VALUE(weight->sizes() == at::IntArrayRef(shape), "weight: expected the shape of x without channels, ",
                    at::IntArrayRef(shape), ", got ", weight->sizes());
  Tensor weights = weight->to(x.device(), at::kDouble).contiguous();
  // To look costs a wait on other devices. There the square root of a negative number has the batch left out.
  if (weights.numel() > 0 && weights.device().is_cpu()) {
    TORCH_CHECK_VALUE(weights.min().item<double>() >= 0, "weight: expected no negative number and no NaN, got ",
                      weights.min().item<double>());
  }
  return weights;
}

template <class WorkspaceSize, class Kernel>
void covariance_update(WorkspaceSize workspace_size, Kernel kernel, const Tensor& x, int64_t channel_dim,
                       int64_t groups, double scale, const std::optional<Tensor>& weight, Tensor& count, Tensor& mean,
                       Tensor& comoment, Tensor& skipped) {
  const Channels channels("x", x, channel_dim);
  const int64_t c = channels.view.channels;
  TORCH_CHECK_VALUE(groups >= 1 && c % groups == 0, "groups: expected a divisor of the ", c, " channels of x, got ",
                    groups);
  check_state("count", count, {}, x);
  check_state("mean", mean, {c}, x);
  check_state("comoment", comoment, {groups, c / groups, c / groups}, x);
  check_state("skipped", skipped, {}, x, at::kLong);
  const Tensor weights = checked_weights(x, channel_dim, weight);
  if (x.numel() == 0) return;
  CovarianceArgs args{channels.view,
                      weights.defined() ? weights.const_data_ptr<double>() : nullptr,
                      groups,
                      scale,
                      count.mutable_data_ptr<double>(),
                      mean.mutable_data_ptr<double>(),
                      comoment.mutable_data_ptr<double>(),
                      skipped.mutable_data_ptr<int64_t>(),
                      nullptr};
  const Tensor workspace = at::empty({workspace_size(args)}, x.options().dtype(at::kDouble));
  args.workspace = workspace.mutable_data_ptr<double>();
  kernel(args);
}

void covariance_update_cpu(const Tensor& x, int64_t channel_dim, int64_t groups, double scale,
                           const std::optional<Tensor>& weight, Tensor& count, Tensor& mean, Tensor& comoment,
                           Tensor& skipped) {
  covariance_update([](const CovarianceArgs&) { return 0; }, cpu::covariance_update, x, channel_dim, groups, scale,
                    weight, count, mean, comoment, skipped);
}

const int64_t* table(const char* name, const Tensor& numbers, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(numbers.scalar_type() == at::kLong && numbers.sizes() == shape && numbers.is_contiguous() &&
                        numbers.device().is_cpu(),
                    name, ": expected contiguous Long of shape ", shape, " on cpu, got ", numbers.scalar_type(),
                    " of shape ", numbers.sizes(), " on ", numbers.device());
  return numbers.const_data_ptr<int64_t>();
}

void check_range(const char* name, const int64_t* numbers, int64_t count, int64_t least, int64_t end) {
  for (int64_t k = 0; k < count; ++k) {
    TORCH_CHECK_VALUE(least <= numbers[k] && numbers[k] < end, name, ": expected numbers from ", least, " to below ",
                      end, ", got ", numbers[k]);
  }
}

void check_lattices(const PatchCovarianceArgs& args) {
  int64_t tap_rows = 0, tap_columns = 0;
  for (int64_t tap = 0; tap < args.taps; ++tap) {
    tap_rows = std::max(tap_rows, args.tap_offsets[2 * tap]);
    tap_columns = std::max(tap_columns, args.tap_offsets[2 * tap + 1]);
    TORCH_CHECK_VALUE(std::min(args.tap_offsets[2 * tap], args.tap_offsets[2 * tap + 1]) >= 0,
                      "taps: expected no negative number");
  }
  for (int64_t k = 0; k < args.lattices; ++k) {
    const auto& [top, left, rows, columns, down, right] = args.pairs[k];
    // Before anything is multiplied.
    const bool fits_steps =
        (rows <= 1 || args.row_step <= args.height) && (columns <= 1 || args.column_step <= args.width);
    const int64_t bottom = !fits_steps ? 0 : top + (rows - 1) * args.row_step,
                  last = !fits_steps ? 0 : left + (columns - 1) * args.column_step;
    TORCH_CHECK_VALUE(rows > 0 && columns > 0 && rows <= args.height && columns <= args.width && fits_steps &&
                          down >= 0 && std::min(top, left) >= 0 && left + right >= 0 &&
                          bottom + down + tap_rows < args.height &&
                          last + std::max<int64_t>(right, 0) + tap_columns < args.width,
                      "rectangles: expected pixels inside of a map of ", args.height, " x ", args.width,
                      " and partners not above them, got rectangle ", k, " (", top, ", ", left, ", ", rows, ", ",
                      columns, ", ", down, ", ", right, ")");
    TORCH_CHECK_VALUE(args.taps == 1 || (args.lattices == 1 && down == 0 && right == 0),
                      "taps: expected one, or one rectangle of pixels that are their own partners, got ", args.taps);
  }
}

// All but the state.
PatchCovarianceArgs checked_patch_args(const Tensor& x, const Tensor& source_rows, const Tensor& source_columns,
                                       const Tensor& taps, const Tensor& steps, const Tensor& rectangles,
                                       const Tensor& slot_ends, const Tensor& slot_rectangles, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected maps of shape (N, C, H, W), got shape ", x.sizes());
  TORCH_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0, "groups: expected a divisor of the ", x.size(1),
                    " channels of x, got ", groups);
  PatchCovarianceArgs args{};
  args.x = {x.const_data_ptr(), element_type("x", x), x.size(0),   x.size(1),   x.size(2),
            x.size(3),          x.stride(0),          x.stride(1), x.stride(2), x.stride(3)};
  args.height = source_rows.numel();
  args.width = source_columns.numel();
  args.source_rows = table("source_rows", source_rows, {args.height});
  args.source_columns = table("source_columns", source_columns, {args.width});
  check_range("source_rows", args.source_rows, args.height, -1, x.size(2));
  check_range("source_columns", args.source_columns, args.width, -1, x.size(3));
  args.taps = taps.dim() == 2 ? taps.size(0) : 0;
  args.tap_offsets = table("taps", taps, {args.taps, 2});
  TORCH_CHECK_VALUE(args.taps >= 1, "taps: expected at least one");
  const int64_t* const step = table("steps", steps, {2});
  check_range("steps", step, 2, 1, std::numeric_limits<int64_t>::max());
  args.row_step = step[0];
  args.column_step = step[1];
  args.lattices = rectangles.dim() == 2 ? rectangles.size(0) : 0;
  static_assert(sizeof(PixelPairs) == 6 * sizeof(int64_t));
  args.pairs = reinterpret_cast<const PixelPairs*>(table("rectangles", rectangles, {args.lattices, 6}));
  check_lattices(args);
  args.slots = slot_ends.numel();
  args.slot_ends = table("slot_ends", slot_ends, {args.slots});
  args.slot_lattices = table("slot_rectangles", slot_rectangles, {slot_rectangles.numel()});
  int64_t end = 0;
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    check_range("slot_ends", args.slot_ends + slot, 1, end, slot_rectangles.numel() + 1);
    end = args.slot_ends[slot];
  }
  check_range("slot_rectangles", args.slot_lattices, slot_rectangles.numel(), 0, args.lattices);
  for (int64_t slot = 0, k = 0; slot < args.slots; ++slot) {
    for (const int64_t first = k; k < args.slot_ends[slot]; ++k) {
      const PixelPairs &one = args.pairs[args.slot_lattices[first]], &other = args.pairs[args.slot_lattices[k]];
      TORCH_CHECK_VALUE(one.down == other.down && one.right == other.right, "slot_rectangles: expected rectangles of ",
                        "one offset in slot ", slot, ", got several");
    }
  }
  args.groups = groups;
  return args;
}

template <class WorkspaceSize, class Kernel>
void patch_covariance_update(WorkspaceSize workspace_size, Kernel kernel, const Tensor& x, const Tensor& source_rows,
                             const Tensor& source_columns, const Tensor& taps, const Tensor& steps,
                             const Tensor& rectangles, const Tensor& slot_ends, const Tensor& slot_rectangles,
                             int64_t patches_per_example, int64_t groups, Tensor& patches, Tensor& count, Tensor& left,
                             Tensor& right, Tensor& comoment, Tensor& skipped) {
  PatchCovarianceArgs args =
      checked_patch_args(x, source_rows, source_columns, taps, steps, rectangles, slot_ends, slot_rectangles, groups);
  const int64_t entries = x.size(1) * args.taps, side = entries / groups;
  check_state("patches", patches, {}, x);
  check_state("count", count, {args.slots}, x);
  check_state("left", left, {args.slots, entries}, x);
  check_state("right", right, {args.slots, entries}, x);
  check_state("comoment", comoment, {args.slots, groups, side, side}, x);
  check_state("skipped", skipped, {}, x, at::kLong);
  if (x.numel() == 0) return;
  args.patches_per_example = patches_per_example;
  args.patches = patches.mutable_data_ptr<double>();
  args.count = count.mutable_data_ptr<double>();
  args.left = left.mutable_data_ptr<double>();
  args.right = right.mutable_data_ptr<double>();
  args.comoment = comoment.mutable_data_ptr<double>();
  args.skipped = skipped.mutable_data_ptr<int64_t>();
  const Tensor workspace = at::empty({workspace_size(args)}, x.options().dtype(at::kDouble));
  args.workspace = workspace.mutable_data_ptr<double>();
  kernel(args);
}

void patch_covariance_update_cpu(const Tensor& x, const Tensor& source_rows, const Tensor& source_columns,
                                 const Tensor& taps, const Tensor& steps, const Tensor& rectangles,
                                 const Tensor& slot_ends, const Tensor& slot_rectangles, int64_t patches_per_example,
                                 int64_t groups, Tensor& patches, Tensor& count, Tensor& left, Tensor& right,
                                 Tensor& comoment, Tensor& skipped) {
  patch_covariance_update([](const PatchCovarianceArgs&) { return 0; }, cpu::patch_covariance_update, x, source_rows,
                          source_columns, taps, steps, rectangles, slot_ends, slot_rectangles, patches_per_example,
                          groups, patches, count, left, right, comoment, skipped);
}

template <class WorkspaceSize, class Kernel>
void taylor_update(WorkspaceSize workspace_size, Kernel kernel, const Tensor& activation, const Tensor& gradient,
                   int64_t channel_dim, double scale, Tensor& examples, Tensor& positions, Tensor& sums,
                   Tensor& skipped) {
  TORCH_CHECK_VALUE(gradient.sizes() == activation.sizes(), "gradient: expected the shape of the activation, ",
                    activation.sizes(), ", got ", gradient.sizes());
  TORCH_CHECK_VALUE(gradient.device() == activation.device(), "gradient: expected it on the activation's device, ",
                    activation.device(), ", got ", gradient.device());
  const Channels a("activation", activation, channel_dim), g("gradient", gradient, channel_dim);
  check_state("examples", examples, {}, activation);
  check_state("positions", positions, {}, activation);
  check_state("sums", sums, {4, a.view.channels}, activation);
  check_state("skipped", skipped, {}, activation, at::kLong);
  if (activation.numel() == 0) return;
  TaylorArgs args{a.view,
                  g.view,
                  scale,
                  examples.mutable_data_ptr<double>(),
                  positions.mutable_data_ptr<double>(),
                  sums.mutable_data_ptr<double>(),
                  skipped.mutable_data_ptr<int64_t>(),
                  nullptr};
  const Tensor workspace = at::empty({workspace_size(args)}, activation.options().dtype(at::kDouble));
  args.workspace = workspace.mutable_data_ptr<double>();
  kernel(args);
}

void taylor_update_cpu(const Tensor& activation, const Tensor& gradient, int64_t channel_dim, double scale,
                       Tensor& examples, Tensor& positions, Tensor& sums, Tensor& skipped) {
  element_type("activation", activation);
  element_type("gradient", gradient);
  const auto common = at::promoteTypes(activation.scalar_type(), gradient.scalar_type());
  taylor_update(cpu::taylor_workspace, cpu::taylor_update, activation.to(common), gradient.to(common), channel_dim,
                scale, examples, positions, sums, skipped);
}

template <class WorkspaceSize, class Kernel>
void channel_moments_update(WorkspaceSize workspace_size, Kernel kernel, const Tensor& x, int64_t channel_dim,
                            Tensor& count, Tensor& mean, Tensor& centred_squares, Tensor& absolute, Tensor& zeros,
                            Tensor& skipped) {
  const Channels channels("x", x, channel_dim);
  check_state("count", count, {}, x);
  for (const auto& [name, state] : {std::pair<const char*, Tensor&>{"mean", mean},
                                    {"centred_squares", centred_squares},
                                    {"absolute", absolute},
                                    {"zeros", zeros}}) {
    check_state(name, state, {channels.view.channels}, x);
  }
  check_state("skipped", skipped, {}, x, at::kLong);
  if (x.numel() == 0) return;
  MomentsArgs args{channels.view,
                   count.mutable_data_ptr<double>(),
                   mean.mutable_data_ptr<double>(),
                   centred_squares.mutable_data_ptr<double>(),
                   absolute.mutable_data_ptr<double>(),
                   zeros.mutable_data_ptr<double>(),
                   skipped.mutable_data_ptr<int64_t>(),
                   nullptr};
  const Tensor workspace = at::empty({workspace_size(args)}, x.options().dtype(at::kDouble));
  args.workspace = workspace.mutable_data_ptr<double>();
  kernel(args);
}

void channel_moments_update_cpu(const Tensor& x, int64_t channel_dim, Tensor& count, Tensor& mean,
                                Tensor& centred_squares, Tensor& absolute, Tensor& zeros, Tensor& skipped) {
  channel_moments_update(cpu::channel_moments_workspace, cpu::channel_moments_update, x, channel_dim, count, mean,
                         centred_squares, absolute, zeros, skipped);
}

void check_maps(const Tensor& x, double rtol, double atol) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected feature maps of shape (N, C, H, W), got shape ", x.sizes());
  TORCH_CHECK_VALUE(rtol >= 0 && std::isfinite(rtol), "rtol: expected a finite number that is not negative, got ",
                    rtol);
  TORCH_CHECK_VALUE(atol >= 0 && std::isfinite(atol), "atol: expected a finite number that is not negative, got ",
                    atol);
  element_type("x", x);
}

template <class WorkspaceSize, class Kernel>
Tensor feature_map_rank(WorkspaceSize workspace_size, Kernel kernel, const Tensor& x, double rtol, double atol) {
  Tensor ranks =
      at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous));
  RankArgs args{{x.const_data_ptr(), element_type("x", x), x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0),
                 x.stride(1), x.stride(2), x.stride(3)},
                rtol,
                atol,
                ranks.mutable_data_ptr<int64_t>(),
                nullptr};
  if (x.numel() == 0) return ranks.zero_();
  const Tensor workspace = at::empty({workspace_size(args)}, x.options().dtype(at::kDouble));
  args.workspace = workspace.mutable_data_ptr<double>();
  kernel(args);
  return ranks;
}

Tensor feature_map_rank_cpu(const Tensor& x, double rtol, double atol) {
  check_maps(x, rtol, atol);
  return feature_map_rank([](const RankArgs&) { return 0; }, cpu::feature_map_rank, x, rtol, atol);
}

TORCH_LIBRARY_IMPL(pcafast, CPU, m) {
  m.impl("covariance_update_", covariance_update_cpu);
  m.impl("patch_covariance_update_", patch_covariance_update_cpu);
  m.impl("taylor_update_", taylor_update_cpu);
  m.impl("channel_moments_update_", channel_moments_update_cpu);
  m.impl("feature_map_rank", feature_map_rank_cpu);
}

#ifdef PCAFAST_WITH_CUDA
// The kernels of products take elements one by one unless whole groups of four lie side by side, of channels or of
// positions. Then copying x first, with its channels side by side, takes less time, if there are not few of them.
Tensor with_channels_inside(const Tensor& x, bool positions_fit) {
  const bool copy = x.dim() > 2 && x.stride(1) != 1 && x.size(1) % 4 == 0 && !positions_fit;
  return copy ? x.movedim(1, -1).contiguous().movedim(-1, 1) : x;
}

// With room after the channels of a pixel for whole vectors of 16 bytes.
Tensor with_padded_channels(const Tensor& maps) {
  const int64_t channels = maps.size(1), vector = 16 / maps.element_size();
  const int64_t room = (channels + vector - 1) / vector * vector;
  const Tensor all = at::zeros({maps.size(0), maps.size(2), maps.size(3), room}, maps.options());
  return all.narrow(3, 0, channels).copy_(maps.movedim(1, 3)).movedim(3, 1);
}

void covariance_update_cuda(const Tensor& x, int64_t channel_dim, int64_t groups, double scale,
                            const std::optional<Tensor>& weight, Tensor& count, Tensor& mean, Tensor& comoment,
                            Tensor& skipped) {
  const c10::cuda::CUDAGuard device(x.device());
  const bool few = channel_dim != 1 || x.dim() < 3 || x.size(1) <= 64 || weight.has_value();  // weighted ones anyway
  const bool positions_fit = few || x.numel() / std::max<int64_t>(x.size(0) * x.size(1), 1) % 4 == 0;
  covariance_update(
      cuda::covariance_workspace,
      [](const CovarianceArgs& args) { cuda::covariance_update(args, c10::cuda::getCurrentCUDAStream()); },
      with_channels_inside(x, positions_fit), channel_dim, groups, scale, weight, count, mean, comoment, skipped);
}

// What the CUDA kernel does not know, maps read through tables of rows and columns and pixels of several taps, becomes
// a tensor of its own here: the padded map, or all patches where there are few channels.
void patch_covariance_update_cuda(const Tensor& x, const Tensor& source_rows, const Tensor& source_columns,
                                  const Tensor& taps, const Tensor& steps, const Tensor& rectangles,
                                  const Tensor& slot_ends, const Tensor& slot_rectangles, int64_t patches_per_example,
                                  int64_t groups, Tensor& patches, Tensor& count, Tensor& left, Tensor& right,
                                  Tensor& comoment, Tensor& skipped) {
  const c10::cuda::CUDAGuard device(x.device());
  const auto update = [&](const Tensor& maps, const Tensor& tap, const Tensor& step, const Tensor& lattices) {
    // Whether all rows of pixels and of their partners begin and end at multiples of four.
    const auto four = [](int64_t number) { return number % 4 == 0; };
    bool positions_fit = maps.stride(3) == 1 && step[1].item<int64_t>() == 1 && four(maps.stride(0)) &&
                         four(maps.stride(1)) && four(maps.stride(2));
    const auto* const pairs = reinterpret_cast<const PixelPairs*>(lattices.const_data_ptr<int64_t>());
    for (int64_t l = 0; l < lattices.size(0); ++l) {
      positions_fit &= four(pairs[l].left) && four(pairs[l].columns) && four(pairs[l].right);
    }
    const bool padded = !positions_fit && maps.size(1) % 4 != 0;
    const auto of_padded = [&](PatchCovarianceArgs args) {
      args.padded = padded;
      return args;
    };
    patch_covariance_update(
        [&](const PatchCovarianceArgs& args) { return cuda::patch_covariance_workspace(of_padded(args)); },
        [&](const PatchCovarianceArgs& args) {
          cuda::patch_covariance_update(of_padded(args), c10::cuda::getCurrentCUDAStream());
        },
        padded ? with_padded_channels(maps) : with_channels_inside(maps, positions_fit),
        at::arange(maps.size(2), at::kLong), at::arange(maps.size(3), at::kLong), tap, step, lattices, slot_ends,
        slot_rectangles, patches_per_example, groups, patches, count, left, right, comoment, skipped);
  };
  // The tables lead nowhere outside of x: only then are they followed.
  const PatchCovarianceArgs args =
      checked_patch_args(x, source_rows, source_columns, taps, steps, rectangles, slot_ends, slot_rectangles, groups);
  const auto is_whole = [](const Tensor& source, int64_t size) {
    return source.numel() == size && at::equal(source, at::arange(size, at::kLong));
  };
  Tensor maps = x;
  if (!is_whole(source_rows, x.size(2)) || !is_whole(source_columns, x.size(3))) {
    const auto at_end = [&](const Tensor& source, int64_t size) {
      return at::where(source.lt(0), size, source).to(x.device());
    };
    maps = at::constant_pad_nd(x, {0, 1, 0, 1});  // -1 takes these zeros
    maps = maps.index_select(2, at_end(source_rows, x.size(2))).index_select(3, at_end(source_columns, x.size(3)));
  }
  if (args.taps == 1) return update(maps, taps, steps, rectangles);
  const auto& [top, first_column, rows, columns, down, across] = args.pairs[0];
  // Positions side by side, or if their rows are not of multiples of four, channels.
  const int64_t channel_dim = columns % 4 == 0 ? 1 : 3;
  std::vector<Tensor> shifted;
  for (int64_t tap = 0; tap < args.taps; ++tap) {
    const int64_t row = top + args.tap_offsets[2 * tap], column = first_column + args.tap_offsets[2 * tap + 1];
    shifted.push_back(maps.slice(2, row, row + (rows - 1) * args.row_step + 1, args.row_step)
                          .slice(3, column, column + (columns - 1) * args.column_step + 1, args.column_step)
                          .movedim(1, channel_dim));
  }
  const Tensor all = at::stack(shifted, channel_dim + 1).flatten(channel_dim, channel_dim + 1).movedim(channel_dim, 1);
  update(all, at::zeros({1, 2}, at::kLong), at::ones({2}, at::kLong),
         at::tensor({int64_t{0}, int64_t{0}, rows, columns, int64_t{0}, int64_t{0}}, at::kLong).view({1, 6}));
}

void taylor_update_cuda(const Tensor& activation, const Tensor& gradient, int64_t channel_dim, double scale,
                        Tensor& examples, Tensor& positions, Tensor& sums, Tensor& skipped) {
  const c10::cuda::CUDAGuard device(activation.device());
  taylor_update(
      cuda::taylor_workspace,
      [](const TaylorArgs& args) { cuda::taylor_update(args, c10::cuda::getCurrentCUDAStream()); }, activation,
      gradient, channel_dim, scale, examples, positions, sums, skipped);
}

void channel_moments_update_cuda(const Tensor& x, int64_t channel_dim, Tensor& count, Tensor& mean,
                                 Tensor& centred_squares, Tensor& absolute, Tensor& zeros, Tensor& skipped) {
  const c10::cuda::CUDAGuard device(x.device());
  channel_moments_update(
      cuda::channel_moments_workspace,
      [](const MomentsArgs& args) { cuda::channel_moments_update(args, c10::cuda::getCurrentCUDAStream()); }, x,
      channel_dim, count, mean, centred_squares, absolute, zeros, skipped);
}

Tensor feature_map_rank_cuda(const Tensor& x, double rtol, double atol) {
  const c10::cuda::CUDAGuard device(x.device());
  check_maps(x, rtol, atol);
  TORCH_CHECK_VALUE(std::max(x.size(2), x.size(3)) <= cuda::kMostRankRows || x.numel() == 0, "x: expected at most ",
                    cuda::kMostRankRows, " rows and columns on CUDA, got shape ", x.sizes(),
                    "; pcafast.functional.feature_map_rank takes larger maps");
  return feature_map_rank(
      cuda::feature_map_rank_workspace,
      [](const RankArgs& args) { cuda::feature_map_rank(args, c10::cuda::getCurrentCUDAStream()); }, x, rtol, atol);
}

TORCH_LIBRARY_IMPL(pcafast, CUDA, m) {
  m.impl("covariance_update_", covariance_update_cuda);
  m.impl("patch_covariance_update_", patch_covariance_update_cuda);
  m.impl("taylor_update_", taylor_update_cuda);
  m.impl("channel_moments_update_", channel_moments_update_cuda);
  m.impl("feature_map_rank", feature_map_rank_cuda);
}
#endif

}  // namespace
}  // namespace pcafast

// Importing the module loads the library, which registers the operators; it has nothing else to offer.
PYBIND11_MODULE(_C, m) { m.doc() = "pcafast's native operators, registered as torch.ops.pcafast"; }
