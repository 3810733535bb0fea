// Co-moments of pairs of samples on the GPU. A batch is read once: products about a shift that is near the mean. Where
// a kernel finds that it was not near enough, or the numbers too large or small for float, a second pass, which else
// returns at once, reads the batch again; so nothing waits for the device.
#include <algorithm>
#include <cstring>

#include "pair_commit.h"
#include "pair_products.h"
#include "pair_sums.h"

namespace pcafast::cuda {
namespace {

bool is_raw(const Samples& x) {
  return (x.dtype == Dtype::kFloat16 || x.dtype == Dtype::kBFloat16) && x.weight == nullptr;
}

int tile_of(const Samples& x) { return is_raw(x) && x.width() > 64 ? 128 : 64; }

// Blocks that are on the device together, about.
int64_t wave(const Samples& x, int tile) {
  const int on_multiprocessor = tile == 128 ? 1 : is_raw(x) ? 4 : 2;
  return int64_t{multiprocessors()} * on_multiprocessor;
}

int64_t samples_of(const Samples& x, const Lattice& lattice) { return x.examples * lattice.rows * lattice.columns; }

// Sizes alone, and first_block and pieces of every lattice.
PairBatch plan(const Samples& x, std::vector<Lattice>& lattices, const PairTables& tables) {
  constexpr int64_t kFewest = 512, kRounding = 64;  // samples to a piece
  PairBatch batch = {};
  batch.x = x;
  batch.slots = tables.slots.size();
  batch.lattice_count = lattices.size();
  batch.tile = tile_of(x);
  batch.tiles = ceil_div(x.width(), batch.tile);
  int64_t work = 0, blocks = 0;
  for (const Lattice& lattice : lattices) {
    const int64_t samples = samples_of(x, lattice), units = samples > 0 ? x.groups * batch.pairs(lattice.symmetric) : 0;
    work += samples * units;
    blocks += units;
  }
  const int64_t waves = blocks == 1 ? 1 : 2;
  batch.piece = std::max(kFewest, ceil_div(ceil_div(work, waves * wave(x, batch.tile)), kRounding) * kRounding);
  for (Lattice& lattice : lattices) {
    lattice.first_block = batch.blocks;
    lattice.pieces = ceil_div(samples_of(x, lattice), batch.piece);
    batch.blocks += lattice.pieces * x.groups * batch.pairs(lattice.symmetric);
  }
  return batch;
}

// Gives all arrays their places from `begin` on; returns the end.
double* place(PairBatch& batch, double* begin) {
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(begin);
    begin += ceil_div(count * sizeof *pointer, sizeof(double));
  };
  const int64_t channels = batch.x.channels;
  take(batch.records, batch.blocks * batch.record_size());
  take(batch.verdicts, 2);
  take(batch.weight, 1);
  take(batch.shift, 2 * channels);
  for (double** array : {&batch.left, &batch.right, &batch.square}) take(*array, batch.slots * channels);
  take(batch.lattices, batch.lattice_count);
  take(batch.slot, batch.slots);
  return begin;
}

// Numbers that come with the launch, so that it can be recorded and played again.
struct Numbers {
  static constexpr int kMost = 480;
  int64_t values[kMost];
};
__global__ void __launch_bounds__(kSumThreads) write_numbers(Numbers numbers, int count, int64_t* out) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = numbers.values[i];
}
template <typename T>
void upload(const std::vector<T>& table, void* out, cudaStream_t stream) {
  static_assert(sizeof(T) % sizeof(int64_t) == 0);
  const int64_t count = table.size() * (sizeof(T) / sizeof(int64_t));
  for (int64_t done = 0; done < count; done += Numbers::kMost) {
    Numbers numbers;
    const int64_t now = std::min<int64_t>(count - done, Numbers::kMost);
    std::memcpy(numbers.values, reinterpret_cast<const char*>(table.data()) + done * sizeof(int64_t),
                now * sizeof(int64_t));
    launch(write_numbers, dim3(1), dim3(kSumThreads), 0, stream, numbers, static_cast<int>(now),
           static_cast<int64_t*>(out) + done);
  }
}

// Whether kWidth elements side by side are aligned wherever they are read.
bool vectors_fit(const Samples& x, const std::vector<Lattice>& lattices, bool channels_inside, int width, int bytes) {
  if (x.weight != nullptr || (channels_inside ? x.channel_stride : x.column_stride) != 1) return false;
  const auto fits = [&](int64_t number) { return number % width == 0; };
  bool fit = reinterpret_cast<uintptr_t>(x.data) % (width * bytes) == 0 && fits(x.example_stride) &&
             fits(x.row_stride) && fits(channels_inside ? x.column_stride : x.channel_stride);
  if (channels_inside) fit &= fits(x.width());
  for (const Lattice& lattice : lattices) {
    if (samples_of(x, lattice) == 0) continue;
    fit &= fits(lattice.first) && fits(lattice.partner) && (channels_inside || fits(lattice.columns));
  }
  return fit;
}

struct Pass {
  const PairBatch& batch;
  int number;
  cudaStream_t stream;

  template <class Tiling, template <class, typename, int> class Staging, typename T, int kWidth>
  void run() const {
    launch(multiply_pairs<Tiling, Staging, T, kWidth>, dim3(batch.blocks), dim3(Tiling::kThreads), Tiling::kBytes,
           stream, batch, number);
  }
  template <class Kind, template <class, typename, int> class Staging, typename T, int kWidth, int kTile>
  void with_layout(bool channels_inside) const {
    if (channels_inside) {
      run<Tiling<Kind, kTile, true>, Staging, T, kWidth>();
    } else {
      run<Tiling<Kind, kTile, false>, Staging, T, kWidth>();
    }
  }
  template <typename T>
  void raw(bool channels_inside, bool wide) const {
    if (batch.tile == 128) {
      wide ? with_layout<Half<T>, AsyncStaging, T, 8, 128>(channels_inside)
           : with_layout<Half<T>, RegisterStaging, T, 1, 128>(channels_inside);
    } else {
      wide ? with_layout<Half<T>, AsyncStaging, T, 8, 64>(channels_inside)
           : with_layout<Half<T>, RegisterStaging, T, 1, 64>(channels_inside);
    }
  }
};

void multiply(const PairBatch& batch, const std::vector<Lattice>& lattices, int number, cudaStream_t stream) {
  const Samples& x = batch.x;
  const Pass pass{batch, number, stream};
  const bool channels_inside = x.channel_stride == 1 || x.column_stride != 1;
  const bool raw = is_raw(x) && number == 0;
  if (x.dtype == Dtype::kFloat64) {
    vectors_fit(x, lattices, channels_inside, 2, 8)
        ? pass.with_layout<Double, RegisterStaging, double, 2, 64>(channels_inside)
        : pass.with_layout<Double, RegisterStaging, double, 1, 64>(channels_inside);
  } else if (raw) {
    const bool wide = vectors_fit(x, lattices, channels_inside, 8, 2);
    x.dtype == Dtype::kFloat16 ? pass.raw<Float16>(channels_inside, wide) : pass.raw<BFloat16>(channels_inside, wide);
  } else if (x.dtype == Dtype::kFloat32 && x.weight == nullptr) {
    vectors_fit(x, lattices, channels_inside, 4, 4)
        ? pass.with_layout<Single, RegisterStaging, float, 4, 64>(channels_inside)
        : pass.with_layout<Single, RegisterStaging, float, 1, 64>(channels_inside);
  } else if (batch.tile == 128) {
    pass.with_layout<Single, RegisterStaging, Any, 1, 128>(channels_inside);
  } else {
    pass.with_layout<Single, RegisterStaging, Any, 1, 64>(channels_inside);
  }
}

int power_of_two(int64_t at_least, int most) {
  int result = 1;
  while (result < at_least && result < most) result *= 2;
  return result;
}

}  // namespace

int64_t pair_workspace(const Samples& x, const PairTables& tables) {
  std::vector<Lattice> lattices = tables.lattices;
  PairBatch batch = plan(x, lattices, tables);
  double* const none = nullptr;
  return place(batch, none) - none + tables.entries.size();
}

void update_pairs(const Samples& x, const PairTables& tables, const PairState& state, double* workspace,
                  cudaStream_t stream) {
  std::vector<Lattice> lattices = tables.lattices;
  PairBatch batch = plan(x, lattices, tables);
  batch.entries = reinterpret_cast<int64_t*>(place(batch, workspace));
  upload(lattices, batch.lattices, stream);
  upload(tables.slots, batch.slot, stream);
  upload(tables.entries, batch.entries, stream);

  const dim3 threads(kSumThreads);
  const unsigned warps = ceil_div(x.channels, kSumThreads / kWarp);
  const unsigned slots = batch.slots;
  const bool raw = is_raw(x);
  if (x.weight != nullptr) launch(add_weights, dim3(1), dim3(1024), 0, stream, batch);
  launch(choose_shift, dim3(warps), threads, 0, stream, batch, raw);
  for (const int pass : {0, 1}) {
    if (batch.blocks > 0) multiply(batch, lattices, pass, stream);
    launch(add_channel_sums, dim3(warps, slots), threads, 0, stream, batch, pass);
    if (pass == 0) launch(judge, dim3(ceil_div(x.channels, kSumThreads)), threads, 0, stream, batch, raw);
  }
  int64_t pieces = 1;
  for (const Lattice& lattice : lattices) pieces = std::max(pieces, lattice.pieces);
  const unsigned strips = ceil_div(x.width(), kWarp) * x.channels;
  launch(commit_products, dim3(strips, slots), dim3(kWarp, power_of_two(pieces, kShares)), 0, stream, batch, state);
  launch(commit_means, dim3(slots), threads, 0, stream, batch, state);
}

}  // namespace pcafast::cuda
