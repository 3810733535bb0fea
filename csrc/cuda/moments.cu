// Channel moments on the GPU, in three launches: the sums of every channel over parts of the batch, those of the batch,
// and one block that merges them into the running moments, if all of them are finite.
#include "channel_batch.h"
#include "kernels_cuda.h"

namespace pcafast::cuda {
namespace {

enum { kCentred, kSquares, kAbsolute, kZeros };

// Subtracting any value of the channel keeps the squares from cancelling; the first is at hand.
template <typename T>
__device__ double shift_of(const ChannelView& x, int64_t channel) {
  return to_real(element<T>(x.data, x.dtype, channel * x.channel_stride));
}

struct Moments {
  static constexpr int kOperands = 1;
  static constexpr bool kByExample = false;

  ChannelView x[kOperands];

  // In double, so that an outlier as shift does no harm.
  struct Sum {
    double shift, centred = 0, squares = 0, absolute = 0;
    int zeros = 0;

    template <int kMost, typename Valid, typename Value>
    __device__ void add(Valid valid, Value value) {
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        if (!valid(k)) break;
        const auto number = value(0, k);
        const double difference = number - shift;
        centred += difference;
        squares += difference * difference;
        absolute += fabs(double{number});
        zeros += number == 0;
      }
    }
  };
  template <typename T>
  __device__ Sum begin(int64_t channel) const {
    return {shift_of<T>(x[0], channel)};
  }

  __device__ void add_example(Sums& total, const Sum& sum) const {
    total.values[kCentred] += sum.centred;
    total.values[kSquares] += sum.squares;
    total.values[kAbsolute] += sum.absolute;
    total.values[kZeros] += sum.zeros;
  }
};

// One block. Merges by the pairwise formula of Chan, Golub and LeVeque (1979).
__global__ void __launch_bounds__(kCommitThreads) commit(MomentsArgs args, const Sums* batch) {
  const double added = static_cast<double>(args.x.examples) * args.x.positions;
  const double count = *args.count, total = count + added;
  const bool finite = all_finite(batch, args.x.channels);  // after which the count may change
  for (int64_t c = threadIdx.x; finite && c < args.x.channels; c += blockDim.x) {
    const Sums sums = batch[c];
    const double centred = sums.values[kCentred];
    const double delta = shift_of<Any>(args.x, c) + centred / added - args.mean[c];
    args.centred_squares[c] +=
        sums.values[kSquares] - centred * (centred / added) + delta * delta * (count * added / total);
    args.mean[c] += delta * (added / total);
    args.absolute[c] += sums.values[kAbsolute];
    args.zeros[c] += sums.values[kZeros];
  }
  if (threadIdx.x > 0) return;
  if (finite) {
    *args.count = total;
  } else {
    *args.skipped += 1;
  }
}

Moments moments_of(const MomentsArgs& args) { return {{joined(args.x)}}; }

}  // namespace

int64_t channel_moments_workspace(const MomentsArgs& args) { return sums_workspace(moments_of(args)); }

void channel_moments_update(const MomentsArgs& args, cudaStream_t stream) {
  sum_channels(moments_of(args), args.workspace, stream);
  launch(commit, dim3(1), dim3(kCommitThreads), 0, stream, args, reinterpret_cast<const Sums*>(args.workspace));
}

}  // namespace pcafast::cuda
