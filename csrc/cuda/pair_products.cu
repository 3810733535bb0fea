// Co-moments of pairs of samples on the GPU. A batch is read once: products about a shift that is near the mean. Where
// a kernel finds that it was not near enough, or the numbers too large or small for float, a second pass, which else
// returns at once, reads the batch again; so nothing waits for the device.
#include <algorithm>
#include <cstring>
#include <limits>

#include "pair_commit.h"
#include "pair_products.h"
#include "pair_sums.h"

namespace pcafast::cuda {
namespace {

bool is_raw(const Samples& x) {
  return (x.dtype == Dtype::kFloat16 || x.dtype == Dtype::kBFloat16) && x.weight == nullptr;
}

int64_t samples_of(const Samples& x, const Lattice& lattice) { return x.examples * lattice.rows * lattice.columns; }

int64_t whole_chunks(int64_t samples) { return std::max<int64_t>(ceil_div(samples, kWarp), 1) * kWarp; }

// Samples of a piece, such that little of the device is idle while the last wave of blocks runs. A block costs as much
// as kBeside samples more, for its start and its record. With more than kMost, sums in float would lose accuracy.
int64_t piece_size(const PairBatch& batch, const std::vector<Lattice>& lattices, int64_t at_once) {
  constexpr int64_t kBeside = 256, kMost = 1 << 16, kMoreWaves = 4;
  // Several blocks of little work, which come last, go for one.
  const auto blocks = [&](int64_t piece) {
    int64_t whole = 0, rest = 0;
    for (const Lattice& lattice : lattices) {
      const int64_t samples = samples_of(batch.x, lattice), pieces = ceil_div(samples, piece);
      const int64_t pairs = batch.bundles * batch.pairs(lattice.symmetric);
      (2 * samples >= piece ? whole : rest) += pairs * (2 * samples >= piece ? pieces : samples + kBeside);
    }
    return whole + ceil_div(rest, piece + kBeside);
  };
  int64_t longest = 1, work = 0;
  for (const Lattice& lattice : lattices) {
    longest = std::max(longest, samples_of(batch.x, lattice));
    work += samples_of(batch.x, lattice) * batch.bundles * batch.pairs(lattice.symmetric);
  }
  longest = whole_chunks(std::min(longest, kMost));
  const int64_t fewest = std::max<int64_t>(blocks(longest) / at_once, 1);
  int64_t best = longest, least = std::numeric_limits<int64_t>::max() / 32;
  for (int64_t waves = fewest; waves < fewest + kMoreWaves; ++waves) {
    int64_t piece = std::min(whole_chunks(ceil_div(work, waves * at_once)), longest);
    while (piece < longest && blocks(piece) > waves * at_once) piece += whole_chunks(piece / 64);
    piece = std::min(piece, longest);
    const int64_t time = ceil_div(blocks(piece), at_once) * (piece + kBeside);
    if (32 * time < 31 * least) {  // more blocks leave more records
      best = piece;
      least = time;
    }
  }
  return best;
}

// Gives all arrays their places from `begin` on; returns the end.
double* place(PairBatch& batch, int64_t entries, double* begin) {
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
  take(batch.lattices, batch.lattice_count);  // the tables last, one after another
  take(batch.slot, batch.slots);
  take(batch.entries, entries);
  return begin;
}

// All but the first numbers are written by launches of their own; the first are returned.
Numbers write_tables(const PairBatch& batch, const std::vector<Lattice>& lattices, const PairTables& tables,
                     cudaStream_t stream) {
  std::vector<int64_t> all;
  const auto append = [&](const auto& table) {
    static_assert(sizeof table[0] % sizeof(int64_t) == 0);
    const size_t count = table.size() * (sizeof table[0] / sizeof(int64_t)), before = all.size();
    if (count == 0) return;
    all.resize(before + count);
    std::memcpy(all.data() + before, table.data(), count * sizeof(int64_t));
  };
  append(lattices);
  append(tables.slots);
  append(tables.entries);
  const auto part = [&](size_t begin) {
    Numbers numbers;
    numbers.out = reinterpret_cast<int64_t*>(batch.lattices) + begin;
    numbers.count = std::min<size_t>(all.size() - begin, Numbers::kMost);
    std::copy_n(all.data() + begin, numbers.count, numbers.values);
    return numbers;
  };
  for (size_t begin = Numbers::kMost; begin < all.size(); begin += Numbers::kMost) {
    launch(write_numbers, dim3(1), dim3(kSumThreads), 0, stream, part(begin));
  }
  return part(0);
}

// Whether `width` elements side by side are aligned wherever they are read.
bool vectors_fit(const PairBatch& batch, const std::vector<Lattice>& lattices, bool channels_inside, int width,
                 int bytes) {
  const Samples& x = batch.x;
  if (x.weight != nullptr || (channels_inside ? x.channel_stride : x.column_stride) != 1) return false;
  const auto fits = [&](int64_t number) { return number % width == 0; };
  bool fit = reinterpret_cast<uintptr_t>(x.data) % (width * bytes) == 0 && fits(x.example_stride) &&
             fits(x.row_stride) && fits(channels_inside ? x.column_stride : x.channel_stride);
  if (channels_inside) fit &= (fits(x.channels) || x.padded) && (batch.bundles == 1 || fits(batch.bundle));
  for (const Lattice& lattice : lattices) {
    if (samples_of(x, lattice) == 0) continue;
    fit &= fits(lattice.first) && fits(lattice.partner) && (channels_inside || fits(lattice.columns));
  }
  return fit;
}

// Launches the kernel that suits a batch, or says how many of its blocks a multiprocessor holds at once.
struct Pass {
  const PairBatch& batch;
  int number;
  cudaStream_t stream;
  int64_t* resident;

  template <class Tiling, template <class, typename, int> class Staging, typename T, int kWidth>
  void run() const {
    if (resident != nullptr) {
      const int64_t by_shared = shared_bytes_of_multiprocessor() / (Tiling::kBytes + kSharedBytesOfBlock);
      *resident = std::clamp<int64_t>(by_shared, 1, kResident<Tiling, kWidth>);
      return;
    }
    launch(multiply_pairs<Tiling, Staging, T, kWidth>, dim3(batch.blocks), dim3(Tiling::kThreads), Tiling::kBytes,
           stream, batch, number);
  }
  template <class Kind, template <class, typename, int> class Staging, typename T, int kWidth, int kTile,
            int kWarpRows = 32>
  void with_layout(bool channels_inside) const {
    if (channels_inside) {
      run<Tiling<Kind, kTile, true, kWarpRows>, Staging, T, kWidth>();
    } else {
      run<Tiling<Kind, kTile, false, kWarpRows>, Staging, T, kWidth>();
    }
  }
  // 16-bit elements: as they are, or about a shift.
  template <typename T, int kTile>
  void raw(bool channels_inside, int width) const {
    if (width == 8) {
      with_layout<Half<T>, AsyncStaging, T, 8, kTile, 64>(channels_inside);
    } else if (width == 4) {
      with_layout<Half<T>, AsyncStaging, T, 4, kTile>(channels_inside);
    } else {
      with_layout<Half<T>, RegisterStaging, T, 1, kTile>(channels_inside);
    }
  }
  template <typename T, int kTile>
  void shifted(bool channels_inside, int width) const {
    if (width >= 4) {
      with_layout<Single, RegisterStaging, T, 4, kTile>(channels_inside);
    } else {
      with_layout<Single, RegisterStaging, Any, 1, kTile>(channels_inside);
    }
  }
  template <typename T>
  void halves(bool channels_inside, int width) const {
    if (is_raw(batch.x) && number == 0) {
      batch.tile == 128 ? raw<T, 128>(channels_inside, width) : raw<T, 64>(channels_inside, width);
    } else {
      batch.tile == 128 ? shifted<T, 128>(channels_inside, width) : shifted<T, 64>(channels_inside, width);
    }
  }
};

void multiply(const PairBatch& batch, const std::vector<Lattice>& lattices, int number, cudaStream_t stream,
              int64_t* resident = nullptr) {
  const Samples& x = batch.x;
  const Pass pass{batch, number, stream, resident};
  const bool channels_inside = x.channel_stride == 1 || x.column_stride != 1;
  const auto fit = [&](int width, int bytes) { return vectors_fit(batch, lattices, channels_inside, width, bytes); };
  if (x.dtype == Dtype::kFloat64) {
    fit(2, 8) ? pass.with_layout<Double, RegisterStaging, double, 2, 64>(channels_inside)
              : pass.with_layout<Double, RegisterStaging, double, 1, 64>(channels_inside);
  } else if (x.dtype == Dtype::kFloat32) {
    fit(4, 4)             ? pass.with_layout<Single, RegisterStaging, float, 4, 64>(channels_inside)
    : x.weight == nullptr ? pass.with_layout<Single, RegisterStaging, float, 1, 64>(channels_inside)
                          : pass.with_layout<Single, RegisterStaging, Any, 1, 64>(channels_inside);
  } else {
    const int width = fit(8, 2) ? 8 : fit(4, 2) ? 4 : 1;
    x.dtype == Dtype::kFloat16 ? pass.halves<Float16>(channels_inside, width)
                               : pass.halves<BFloat16>(channels_inside, width);
  }
}

// Sizes alone; and how the lattices are cut.
PairBatch plan(const Samples& x, std::vector<Lattice>& lattices, int64_t slots) {
  const int64_t width = x.channels / x.groups;
  PairBatch batch = {};
  batch.x = x;
  batch.slots = slots;
  batch.lattice_count = lattices.size();
  batch.tile = is_raw(x) && width > 64 ? 128 : 64;
  batch.bundle = width * std::clamp<int64_t>(batch.tile / width, 1, x.groups);
  batch.bundles = ceil_div(x.channels, batch.bundle);
  batch.tiles = ceil_div(batch.bundle, batch.tile);
  int64_t resident = 0;
  multiply(batch, lattices, 0, nullptr, &resident);
  const int64_t piece = piece_size(batch, lattices, multiprocessors() * resident);
  for (Lattice& lattice : lattices) {
    const int64_t samples = samples_of(x, lattice);
    lattice.first_block = batch.blocks;
    lattice.pieces = ceil_div(samples, piece);
    if (samples == 0) continue;
    lattice.piece = whole_chunks(ceil_div(samples, lattice.pieces));
    lattice.pieces = ceil_div(samples, lattice.piece);
    lattice.inverse_rows = 1.0 / lattice.rows;
    lattice.inverse_columns = 1.0 / lattice.columns;
    batch.blocks += lattice.pieces * batch.bundles * batch.pairs(lattice.symmetric);
  }
  return batch;
}

}  // namespace

int64_t pair_workspace(const Samples& x, const PairTables& tables) {
  std::vector<Lattice> lattices = tables.lattices;
  PairBatch batch = plan(x, lattices, tables.slots.size());
  double* const none = nullptr;
  return place(batch, tables.entries.size(), none) - none;
}

void update_pairs(const Samples& x, const PairTables& tables, const PairState& state, double* workspace,
                  cudaStream_t stream) {
  std::vector<Lattice> lattices = tables.lattices;
  PairBatch batch = plan(x, lattices, tables.slots.size());
  place(batch, tables.entries.size(), workspace);

  const dim3 threads(kSumThreads);
  const unsigned warps = ceil_div(x.channels, kSumThreads / kWarp), slots = batch.slots;
  const auto fewer = [&](const Lattice& a, const Lattice& b) { return samples_of(x, a) < samples_of(x, b); };
  const Lattice& largest = *std::max_element(lattices.begin(), lattices.end(), fewer);
  const bool raw = is_raw(x);
  launch(choose_shift, dim3(warps), threads, 0, stream, batch, largest, raw || batch.blocks == 0,
         write_tables(batch, lattices, tables, stream));
  if (x.weight != nullptr) launch(add_weights, dim3(1), dim3(1024), 0, stream, batch);
  for (const int pass : {0, 1}) {
    if (batch.blocks > 0) multiply(batch, lattices, pass, stream);
    launch(add_channel_sums, dim3(warps, slots), threads, 0, stream, batch, pass, raw);
    if (pass == 0 && slots > 1) launch(judge, dim3(ceil_div(x.channels, kSumThreads)), threads, 0, stream, batch, raw);
  }
  int64_t pieces = 1;
  for (const Lattice& lattice : lattices) pieces = std::max(pieces, lattice.pieces);
  unsigned shares = 1;
  while (shares < kCommitRows && 8 * shares < pieces) shares *= 2;
  const int64_t width = x.channels / x.groups;
  unsigned rows = 1;
  while (rows < kCommitRows / shares && rows < width) rows *= 2;
  const unsigned lines = x.groups * ceil_div(width, rows);
  launch(commit_products, dim3(lines * ceil_div(width, kWarp), slots), dim3(kWarp, shares * rows), 0, stream, batch,
         state, shares);
  launch(commit_means, dim3(slots), threads, 0, stream, batch, state);
}

}  // namespace pcafast::cuda
