// A panel of centred samples, packed for the products of all pairs of channels.
//
// Channels are in blocks of one vector each: packed(block)[sample] has one sample of kLanes channels. A
// tile of products is then one vector of channels times single elements of others, summed over the samples in
// registers in the input's precision, and over the panels in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../kernels.h"
#include "tile.h"
#include "vectors.h"

namespace pcafast::cpu {

// Samples are numbered example by example, position by position.
struct Samples {
  ChannelView x;
  const double* weight;
  int64_t size() const { return x.examples * x.positions; }
};

// Visits the samples [begin, end) as runs inside one example: use(offset of the first, first sample, length).
template <class Use>
inline void for_each_run(const ChannelView& x, int64_t begin, int64_t end, Use&& use) {
  while (begin < end) {
    const int64_t n = begin / x.positions, p = begin % x.positions;
    const int64_t length = std::min(end - begin, x.positions - p);
    use(n * x.example_stride + p * x.position_stride, begin, length);
    begin += length;
  }
}

// Of a panel. Where the products are too many for the cache it is worth to have more samples before adding to them.
inline int64_t most_samples(int64_t channels) { return std::clamp<int64_t>((channels + 255) / 256 * 256, 256, 1024); }

template <class Vector>
class Panel : Lanes<Vector> {
 public:
  using typename Lanes<Vector>::Work;
  using Lanes<Vector>::kBytes, Lanes<Vector>::kLanes, Lanes<Vector>::kRows, Lanes<Vector>::element, Lanes<Vector>::load;

  explicit Panel(int64_t channels)
      : channels_(channels),
        capacity_(most_samples(channels)),
        blocks_((channels + kLanes - 1) / kLanes),
        packed_(new Vector[blocks_ * capacity_]()),
        centre_(new Work[blocks_ * kLanes]()),
        roots_(new Work[capacity_]) {
    std::fill(roots_.get(), roots_.get() + capacity_, Work(1));
  }

  // Packs the samples [begin, end), at most most_samples(channels), of the channels from `first_channel` on, as (x -
  // shift) * unit. Those of weight zero are left out, others are scaled by the square root of their weight.
  template <class T>
  void pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, const double* shift, double unit) {
    const ChannelView& x = s.x;
    std::copy(shift + first_channel, shift + first_channel + channels_, centre_.get());
    unit_ = static_cast<Work>(unit);
    samples_ = 0;
    for_each_run(x, begin, end, [&](int64_t offset, int64_t first, int64_t length) {
      const T* const data = static_cast<const T*>(x.data) + first_channel * x.channel_stride + offset;
      // The next panel's samples come from memory while this one's are multiplied.
      const int64_t next = std::min(first + end - begin, s.size() - 1);
      ahead_ = next / x.positions * x.example_stride + next % x.positions * x.position_stride - offset;
      if (s.weight == nullptr) {
        pack_run(data, x.channel_stride, x.position_stride, length, unit_);
        return;
      }
      for (int64_t i = 0; i < length; ++i) {
        if (s.weight[first + i] == 0) continue;
        roots_[samples_] = static_cast<Work>(std::sqrt(s.weight[first + i]));
        pack_run(data + i * x.position_stride, x.channel_stride, 1, 1, unit_ * roots_[samples_]);
      }
    });
  }

  // Adds the sum of (x - shift) * unit, each times its weight, to sums[c] for every channel c.
  void add_sums(double* sums) const {
    constexpr int64_t kTogether = 16;  // in the working type: few enough to lose next to nothing
    for (int64_t b = 0; b < blocks_; ++b) {
      double total[kLanes] = {};
      for (int64_t first = 0; first < samples_; first += kTogether) {
        Vector sum{};
        for (int64_t i = first; i < std::min(first + kTogether, samples_); ++i) sum += packed(b)[i] * roots_[i];
        for (int l = 0; l < kLanes; ++l) total[l] += sum[l];
      }
      for (int64_t c = b * kLanes; c < std::min((b + 1) * kLanes, channels_); ++c) sums[c] += total[c - b * kLanes];
    }
  }

  // Adds the products of channels i and j, times `factor`, to out[i * channels + j], for i in [begin, end) and j >= i;
  // what it leaves where j < i has no meaning. `begin` is a multiple of kRows. The vectors are taken in groups that
  // stay in cache.
  void multiply(int64_t begin, int64_t end, double factor, double* out) const {
    const int64_t group = std::max<int64_t>(3, kCachedBytes / (capacity_ * kBytes) / 3 * 3);
    for (int64_t last = std::min(begin / kLanes / group * group + group, blocks_);;
         last = std::min(last + group, blocks_)) {
      for (int64_t row = begin; row < end; row += kRows) {
        int64_t block = std::max(row / kLanes, (last - 1) / group * group);
        for (; block + 3 <= last; block += 3) add_tile<kRows, 3>(row, block, factor, out);
        if (block + 2 == last) add_tile<kRows, 2>(row, block, factor, out);
        if (block + 1 == last) {
          channels_ - row <= kRows / 2 ? add_tile<kRows / 2, 1>(row, block, factor, out)
                                       : add_tile<kRows, 1>(row, block, factor, out);
        }
      }
      if (last == blocks_) return;
    }
  }

 private:
  static constexpr int64_t kCachedBytes = 512 << 10;

  Vector* packed(int64_t block) const { return packed_.get() + block * capacity_; }
  Vector centre(int64_t block) const { return load(centre_.get() + block * kLanes); }

  // `count` samples, as (x - centre) * unit.
  template <class T>
  void pack_run(const T* data, int64_t channel_stride, int64_t position_stride, int64_t count, Work unit) {
    const int64_t whole_blocks = channels_ / kLanes;
    int64_t i = 0;
    if (channel_stride == 1) {
      for (; i < count; ++i) {
        for (int64_t b = 0; b < whole_blocks; ++b) {
          __builtin_prefetch(data + i * position_stride + b * kLanes + ahead_, 0, 2);
          packed(b)[samples_ + i] = (load(data + i * position_stride + b * kLanes) - centre(b)) * unit;
        }
      }
    } else if (position_stride == 1) {
      for (; i + kLanes <= count; i += kLanes) {
        for (int64_t b = 0; b < whole_blocks; ++b)
          pack_tile(data + i, channel_stride, b, unit, packed(b) + samples_ + i);
      }
    }
    pack_elements(data, channel_stride, position_stride, 0, whole_blocks * kLanes, i, count, unit);
    pack_elements(data, channel_stride, position_stride, whole_blocks * kLanes, channels_, 0, count, unit);
    samples_ += count;
  }

  // Channels [first_channel, last_channel) of samples [first, last) of a run. The lanes beyond the last channel have
  // been zero from the beginning.
  template <class T>
  void pack_elements(const T* data, int64_t channel_stride, int64_t position_stride, int64_t first_channel,
                     int64_t last_channel, int64_t first, int64_t last, Work unit) {
    for (int64_t c = first_channel; c < last_channel; ++c) {
      Work* const to = (Work*)(packed(c / kLanes) + samples_) + c % kLanes;
      const T* const from = data + c * channel_stride;
      const Work centre = centre_[c];
      for (int64_t i = first; i < last; ++i) to[i * kLanes] = (element(from[i * position_stride]) - centre) * unit;
    }
  }

  // kLanes channels of kLanes positions that lie side by side.
  template <class T>
  void pack_tile(const T* data, int64_t channel_stride, int64_t block, Work unit, Vector* to) {
    Vector tile[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t c = block * kLanes + l;
      __builtin_prefetch(data + c * channel_stride + ahead_, 0, 2);
      tile[l] = (load(data + c * channel_stride) - centre_[c]) * unit;
    }
    this->transpose(tile);
    std::copy(tile, tile + kLanes, to);
  }

  // Sums a few hundred products at most before it goes on in float64.
  template <int kCount, int kVectors>
  void add_tile(int64_t row, int64_t block, double factor, double* out) const {
    constexpr int64_t kTogether = 256;
    const int64_t column = block * kLanes;
    for (int64_t first = 0; first < samples_; first += kTogether) {
      const Run run = {first, first, std::min(kTogether, samples_ - first)};
      const Work* const rows = (const Work*)packed(row / kLanes) + row % kLanes;
      Tiles<Vector>::template add<Vector, kCount, kVectors>(
          {rows, packed(block), capacity_, &run, &run + 1, 1},
          {out + row * channels_ + column, channels_, channels_ - row, channels_ - column, factor});
    }
  }

  int64_t channels_, capacity_, blocks_, samples_ = 0, ahead_ = 0;
  std::unique_ptr<Vector[]> packed_;
  std::unique_ptr<Work[]> centre_;
  std::unique_ptr<Work[]> roots_;  // of the samples' weights
  Work unit_ = 1;
};

}  // namespace pcafast::cpu
