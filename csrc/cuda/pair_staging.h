// Brings samples chunk by chunk to shared memory, ahead of the products.
#pragma once

#include "elements.h"
#include "matrix.h"
#include "pair_tiling.h"

namespace pcafast::cuda {

// What one block multiplies.
struct Task {
  int64_t begin, end;  // samples of the lattice
  int64_t group, row, column;  // tiles of channels
  bool same;                   // left and right samples are the same
};

// How the threads share the elements of two tiles: each takes kWidth neighbours at a time, kLoads times.
template <class Tiling, int kWidth>
struct Shares {
  static constexpr int kAcross = Tiling::kInside / kWidth, kPass = Tiling::kThreads / kAcross;
  static constexpr int kLoads = Tiling::kOutside / kPass;
  static_assert(kAcross * kPass == Tiling::kThreads && kLoads * kPass == Tiling::kOutside);

  static __device__ int inside() { return threadIdx.x % kAcross * kWidth; }
  static __device__ int outside(int load) { return threadIdx.x / kAcross + load * kPass; }
  static __device__ int channel(int load) { return Tiling::kChannelsInside ? inside() : outside(load); }
  static __device__ int sample(int load) { return Tiling::kChannelsInside ? outside(load) : inside(); }
  static __device__ int place(int load) { return outside(load) * Tiling::kRow + inside(); }
};

// Walks through the samples with a thread: use(load, operand, offset, valid) of every load, chunk by chunk.
template <class Tiling, int kWidth>
class Walk {
  using Share = Shares<Tiling, kWidth>;

 public:
  __device__ Walk(const Samples& x, const Lattice& lattice, const Task& task)
      : cursor_(x, lattice, task.begin + Share::sample(0), Tiling::kChannelsInside ? Share::kPass : Tiling::kChunk),
        sample_(task.begin),
        end_(task.end),
        channel_stride_(x.channel_stride),
        operands_(task.same ? 1 : 2) {
    const int64_t tiles[2] = {task.row, task.column};
    for (int o = 0; o < 2; ++o) {
      left_[o] = static_cast<int>(min(x.width() - tiles[o] * Tiling::kTile, int64_t{Tiling::kTile}));
      base_[o] = (task.group * x.width() + tiles[o] * Tiling::kTile + Share::channel(0)) * channel_stride_ +
                 o * lattice.partner;
    }
  }

  __device__ int64_t end() const { return end_; }

  template <typename Use>
  __device__ void chunk(Use use) {
#pragma unroll
    for (int i = 0; i < Share::kLoads; ++i) {
      const int64_t sample = sample_ + Share::sample(i);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (o == operands_) break;
        const bool valid = sample < end_ && Share::channel(i) < left_[o];
        use(i, o, cursor_.offset() + base_[o] + (Tiling::kChannelsInside ? 0 : i * Share::kPass * channel_stride_), valid,
            sample);
      }
      if (Tiling::kChannelsInside) cursor_.advance();
    }
    if (!Tiling::kChannelsInside) cursor_.advance();
    sample_ += Tiling::kChunk;
  }

 private:
  Cursor cursor_;
  int64_t sample_;
  const int64_t end_, channel_stride_;
  const int operands_;
  int left_[2];  // channels of the tile
  int64_t base_[2];
};

// Copies that run by themselves: of 16-bit samples as they are.
template <class Tiling, typename T, int kWidth>
class AsyncStaging {
  using Share = Shares<Tiling, kWidth>;
  static constexpr int kStages = Tiling::Kind::kStages;

 public:
  using Staged = typename Tiling::Kind::Staged;

  __device__ AsyncStaging(const Samples& x, const Lattice& lattice, const Task& task, int chunks, Staged* memory)
      : walk_(x, lattice, task), data_(static_cast<const T*>(x.data)), memory_(memory), chunks_(chunks) {}

  __device__ void begin(const float*, float) {
    for (int k = 0; k < kStages - 1; ++k) copy(k);
  }
  // The tiles of a chunk, left and right.
  __device__ const Staged* arrive(int chunk) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy(chunk + kStages - 1);
    return memory_ + chunk % kStages * 2 * Tiling::kElements;
  }
  __device__ void leave(int) {}

 private:
  __device__ void copy(int chunk) {
    if (chunk < chunks_) {
      Staged* const to = memory_ + chunk % kStages * 2 * Tiling::kElements;
      walk_.chunk([&](int i, int o, int64_t offset, bool valid, int64_t) {
        copy_async(to + o * Tiling::kElements + Share::place(i), data_ + (valid ? offset : 0), valid);
      });
    }
    end_batch_of_copies();
  }

  Walk<Tiling, kWidth> walk_;
  const T* const data_;
  Staged* const memory_;
  const int chunks_;
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Neighbours {
  T values[kWidth];
};

// Through registers: takes the shift off, multiplies by weights.
template <class Tiling, typename T, int kWidth>
class RegisterStaging {
  using Share = Shares<Tiling, kWidth>;
  using Sum = typename Tiling::Kind::Sum;
  static constexpr bool kRaw = std::is_same_v<typename Tiling::Kind::Staged, uint16_t>;
  static constexpr bool kAny = std::is_same_v<T, Any>;
  static constexpr bool kWeighted = kAny || (std::is_same_v<T, double> && kWidth == 1);
  using Loaded = std::conditional_t<kAny, Neighbours<float, 1>, Neighbours<T, kWidth>>;

 public:
  using Staged = typename Tiling::Kind::Staged;

  __device__ RegisterStaging(const Samples& x, const Lattice& lattice, const Task& task, int chunks, Staged* memory)
      : walk_(x, lattice, task),
        data_(x.data),
        dtype_(x.dtype),
        weights_(x.weight),
        memory_(memory),
        chunks_(chunks),
        same_(task.same) {}

  // `offsets` of the channels of both tiles, in shared memory.
  __device__ void begin(const Sum* offsets, Sum unit) {
    offsets_ = offsets;
    unit_ = unit;
    load();
    store(0);
  }
  __device__ const Staged* arrive(int chunk) {
    __syncthreads();
    if (chunk + 1 < chunks_) load();
    return memory_ + chunk % 2 * 2 * Tiling::kElements;
  }
  __device__ void leave(int chunk) {
    if (chunk + 1 < chunks_) store(chunk + 1);
  }

 private:
  __device__ void load() {
    valid_ = 0;
    walk_.chunk([&](int i, int o, int64_t offset, bool valid, int64_t sample) {
      if constexpr (kWeighted) {
        if (o == 0) weight_[i] = weights_ == nullptr ? 1 : sample < walk_.end() ? weights_[sample] : 0;
        valid &= weight_[i] != 0;
      }
      if (!valid) return;
      valid_ |= 1u << (2 * i + o);
      if constexpr (kAny) {
        loaded_[i][o] = {static_cast<float>(to_real(element<Any>(data_, dtype_, offset)))};
      } else {
        loaded_[i][o] = *reinterpret_cast<const Loaded*>(static_cast<const T*>(data_) + offset);
      }
    });
  }

  __device__ void store(int chunk) {
    Staged* const to = memory_ + chunk % 2 * 2 * Tiling::kElements;
#pragma unroll
    for (int i = 0; i < Share::kLoads; ++i) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (o == 1 && same_) break;
        Neighbours<Staged, kWidth> staged = {};
        if (valid_ >> (2 * i + o) & 1) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            if constexpr (kRaw) {
              staged.values[j] = loaded_[i][o].values[j].bits;
            } else {
              const int channel = Share::channel(i) + (Tiling::kChannelsInside ? j : 0);
              Sum value = fma(loaded_[i][o].values[j], unit_, -offsets_[o * Tiling::kTile + channel]);
              if constexpr (kWeighted) value *= o == 0 ? weight_[i] : 1;
              staged.values[j] = value;
            }
          }
        }
        *reinterpret_cast<Neighbours<Staged, kWidth>*>(to + o * Tiling::kElements + Share::place(i)) = staged;
      }
    }
  }

  Walk<Tiling, kWidth> walk_;
  const void* const data_;
  const Dtype dtype_;
  const double* const weights_;
  Staged* const memory_;
  const int chunks_;
  const bool same_;
  const Sum* offsets_;
  Sum unit_;
  Loaded loaded_[Share::kLoads][2];
  Sum weight_[kWeighted ? Share::kLoads : 1];
  unsigned valid_;
};

}  // namespace pcafast::cuda
