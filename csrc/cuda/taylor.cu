// Taylor sums on the GPU, in three launches: the sums of every channel over parts of the batch, those of the batch, and
// one block that adds them to the running sums, if all of them are finite.
#include "channel_batch.h"
#include "kernels_cuda.h"

namespace pcafast::cuda {
namespace {

enum { kMagnitude, kSquare, kSigned, kAbsolute };  // the rows of TaylorArgs::sums; here the first two times positions

struct Taylor {
  static constexpr int kOperands = 2;
  static constexpr bool kByExample = true;

  ChannelView x[kOperands];
  double scale;

  // Of a * g and of |a * g|.
  struct Sum {
    double values[2] = {};

    // First in chains of at most eight, in float unless an operand is double. So products of 16-bit values are exact,
    // and one beyond float's range counts as infinite.
    template <int kMost, typename Valid, typename Value>
    __device__ void add(Valid, Value value) {
      static_assert(kMost <= 8);
      decltype(value(0, 0) * value(1, 0)) plain = 0, absolute = 0;
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        const auto product = value(0, k) * value(1, k);  // zero unless valid(k)
        plain += product;
        absolute += fabs(product);
      }
      values[0] += plain;
      values[1] += absolute;
    }
  };
  template <typename T>
  __device__ Sum begin(int64_t) const {
    return {};
  }

  __device__ void add_example(Sums& total, const Sum& sum) const {
    const double s = scale * sum.values[0];
    total.values[kMagnitude] += fabs(s);
    total.values[kSquare] += s * s;
    total.values[kSigned] += s;
    total.values[kAbsolute] += fabs(scale) * sum.values[1];
  }

  static __device__ void whole_example(Sums& sums) {
    const double s = sums.values[kSigned];
    sums.values[kMagnitude] = fabs(s);
    sums.values[kSquare] = s * s;
  }
};

// Examples of one position each, which are read like the positions of one example.
struct TaylorOfPoints {
  static constexpr int kOperands = 2;
  static constexpr bool kByExample = false;

  ChannelView x[kOperands];
  double scale;

  struct Sum {
    double scale, magnitude = 0, square = 0, plain = 0;

    template <int kMost, typename Valid, typename Value>
    __device__ void add(Valid, Value value) {
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        const double s = scale * (value(0, k) * value(1, k));
        magnitude += fabs(s);
        square += s * s;
        plain += s;
      }
    }
  };
  template <typename T>
  __device__ Sum begin(int64_t) const {
    return {scale};
  }

  __device__ void add_example(Sums& total, const Sum& sum) const {
    total.values[kMagnitude] += sum.magnitude;
    total.values[kSquare] += sum.square;
    total.values[kSigned] += sum.plain;
    total.values[kAbsolute] += sum.magnitude;
  }
};

// One block.
__global__ void __launch_bounds__(kCommitThreads) commit(TaylorArgs args, const Sums* batch) {
  const int64_t examples = args.activation.examples, positions = args.activation.positions;
  const int64_t channels = args.activation.channels;
  const bool finite = all_finite(batch, channels);
  for (int64_t c = threadIdx.x; finite && c < channels; c += blockDim.x) {
    for (int r = 0; r < kSums; ++r) {
      const double sum = batch[c].values[r];
      args.sums[r * channels + c] += r == kMagnitude || r == kSquare ? sum / positions : sum;
    }
  }
  if (threadIdx.x > 0) return;
  if (finite) {
    *args.examples += examples;
    *args.positions += examples * positions;
  } else {
    *args.skipped += 1;
  }
}

// Calls use(op) with the Op that suits the batch.
template <typename Use>
auto with_op(const TaylorArgs& args, Use use) {
  const ChannelView &a = args.activation, &g = args.gradient;
  return a.positions == 1 ? use(TaylorOfPoints{{joined(a), joined(g)}, args.scale})
                          : use(Taylor{{normalised(a), normalised(g)}, args.scale});
}

}  // namespace

int64_t taylor_workspace(const TaylorArgs& args) {
  return with_op(args, [](const auto& op) { return sums_workspace(op); });
}

void taylor_update(const TaylorArgs& args, cudaStream_t stream) {
  with_op(args, [&](const auto& op) { sum_channels(op, args.workspace, stream); });
  launch(commit, dim3(1), dim3(kCommitThreads), 0, stream, args, reinterpret_cast<const Sums*>(args.workspace));
}

}  // namespace pcafast::cuda
