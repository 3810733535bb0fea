// Brings samples chunk by chunk to shared memory, ahead of the products.
#pragma once

#include "elements.h"
#include "matrix.h"
#include "pair_tiling.h"

namespace pcafast::cuda {

// What one block multiplies.
struct Task {
  int64_t begin;  // of the samples of the lattice
  int samples;
  int64_t first[2];  // channel, of the left and of the right samples
  int channels[2];   // from there on, kTile at most
  bool same;         // left and right samples are the same
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

// Walks through the samples with a thread, chunk by chunk: use(load, operand, offset, valid) of every load.
template <class Tiling, int kWidth>
class Walk {
  using Share = Shares<Tiling, kWidth>;

 public:
  // Samples from one use of the cursor to the next.
  static constexpr int kStep = Tiling::kChannelsInside ? Share::kPass : Tiling::kChunk;

  __device__ Walk(const Samples& x, const Lattice& lattice, const Task& task, const Step* step)
      : cursor_(x, lattice, task.begin + Share::sample(0), task.first[0] + Share::channel(0)),
        step_(step),
        left_(task.samples),
        channel_stride_(x.channel_stride),
        same_(task.same) {
#pragma unroll
    for (int o = 0; o < 2; ++o) channels_[o] = task.channels[o];
  }

  template <typename Use>
  __device__ void chunk(Use use) {
    const Step step = *step_;
#pragma unroll
    for (int i = 0; i < Share::kLoads; ++i) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (o == 1 && same_) break;
        const int64_t across = Tiling::kChannelsInside ? 0 : i * Share::kPass * channel_stride_;
        use(i, o, cursor_.offset() + o * step.partner + across,
            Share::sample(i) < left_ && Share::channel(i) < channels_[o]);
      }
      if (Tiling::kChannelsInside) cursor_.advance(step);
    }
    if (!Tiling::kChannelsInside) cursor_.advance(step);
    left_ -= Tiling::kChunk;
  }

 private:
  Cursor cursor_;
  const Step* const step_;
  int left_;  // samples of the task
  const int64_t channel_stride_;
  const bool same_;
  int channels_[2];
};

// Copies that run by themselves: of 16-bit samples as they are.
template <class Tiling, typename T, int kWidth>
class AsyncStaging {
  using Share = Shares<Tiling, kWidth>;
  static constexpr int kStages = Tiling::Kind::kStages;

 public:
  using Staged = typename Tiling::Kind::Staged;

  __device__ AsyncStaging(const Samples& x, const Lattice& lattice, const Task& task, const Step* step, int chunks,
                          Staged* memory)
      : walk_(x, lattice, task, step), data_(static_cast<const T*>(x.data)), memory_(memory), chunks_(chunks) {}

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
      walk_.chunk([&](int i, int o, int64_t offset, bool valid) {
        copy_async<kWidth * sizeof(T)>(to + o * Tiling::kElements + Share::place(i), data_ + (valid ? offset : 0),
                                       valid);
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

// Through registers: takes the shift off, multiplies by weights. Elements whose type is known only now, and weighted
// ones, are not kept in registers during the products.
template <class Tiling, typename T, int kWidth>
class RegisterStaging {
  using Share = Shares<Tiling, kWidth>;
  using Sum = typename Tiling::Kind::Sum;
  static constexpr bool kRaw = std::is_same_v<typename Tiling::Kind::Staged, uint16_t>;
  static constexpr bool kAny = std::is_same_v<T, Any>;
  static constexpr bool kAtOnce = kAny || (std::is_same_v<T, double> && kWidth == 1);
  using Loaded = std::conditional_t<kAny, Neighbours<float, 1>, Neighbours<T, kWidth>>;

 public:
  using Staged = typename Tiling::Kind::Staged;

  __device__ RegisterStaging(const Samples& x, const Lattice& lattice, const Task& task, const Step* step, int chunks,
                             Staged* memory)
      : walk_(x, lattice, task, step),
        data_(x.data),
        dtype_(x.dtype),
        weights_(x.weight == nullptr ? nullptr : x.weight + task.begin),
        memory_(memory),
        chunks_(chunks),
        same_(task.same) {}

  // `offsets` of the channels of both tiles, in shared memory.
  __device__ void begin(const Sum* offsets, Sum unit) {
    offsets_ = offsets;
    unit_ = unit;
    load(0);
    leave(-1);
  }
  __device__ const Staged* arrive(int chunk) {
    __syncthreads();
    load(chunk + 1);
    return tiles(chunk);
  }
  __device__ void leave(int chunk) {
    if constexpr (!kAtOnce) {
      if (chunk + 1 >= chunks_) return;
#pragma unroll
      for (int i = 0; i < Share::kLoads; ++i) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (o == 0 || !same_) store(chunk + 1, i, o, valid_ >> (2 * i + o) & 1, loaded_[i][o]);
        }
      }
    }
  }

 private:
  __device__ Staged* tiles(int chunk) const { return memory_ + chunk % 2 * 2 * Tiling::kElements; }

  __device__ void load(int chunk) {
    if (chunk >= chunks_) return;
    valid_ = 0;
    walk_.chunk([&](int i, int o, int64_t offset, bool valid) {
      Sum weight = 1;
      if constexpr (kAtOnce) {
        if (valid && weights_ != nullptr) weight = weights_[chunk * Tiling::kChunk + Share::sample(i)];
        valid &= weight != 0;
      }
      Loaded loaded = {};
      if (valid) {
        if constexpr (kAny) {
          loaded.values[0] = to_real(element<Any>(data_, dtype_, offset));
        } else {
          loaded = *reinterpret_cast<const Loaded*>(static_cast<const T*>(data_) + offset);
        }
      }
      if constexpr (kAtOnce) {
        store(chunk, i, o, valid, loaded, o == 0 ? weight : 1);
      } else {
        loaded_[i][o] = loaded;
        valid_ |= static_cast<unsigned>(valid) << (2 * i + o);
      }
    });
  }

  __device__ void store(int chunk, int i, int o, bool valid, const Loaded& loaded, Sum weight = 1) {
    Neighbours<Staged, kWidth> staged = {};
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kRaw) {
        staged.values[j] = loaded.values[j].bits;
      } else if (valid) {
        const int channel = Share::channel(i) + (Tiling::kChannelsInside ? j : 0);
        staged.values[j] = fma(to_real(loaded.values[j]), unit_, -offsets_[o * Tiling::kTile + channel]) * weight;
      }
    }
    *reinterpret_cast<Neighbours<Staged, kWidth>*>(tiles(chunk) + o * Tiling::kElements + Share::place(i)) = staged;
  }

  Walk<Tiling, kWidth> walk_;
  const void* const data_;
  const Dtype dtype_;
  const double* const weights_;  // of the samples of the task
  Staged* const memory_;
  const int chunks_;
  const bool same_;
  const Sum* offsets_;
  Sum unit_;
  Loaded loaded_[kAtOnce ? 1 : Share::kLoads][2];
  unsigned valid_;
};

}  // namespace pcafast::cuda
