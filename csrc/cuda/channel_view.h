// Views of the same elements with other sizes and strides.
#pragma once

#include "../kernels.h"

namespace pcafast::cuda {

// The stride of a dimension of size one is arbitrary; zero suits every layout.
inline ChannelView normalised(ChannelView x) {
  if (x.examples == 1) x.example_stride = 0;
  if (x.channels == 1) x.channel_stride = 0;
  if (x.positions == 1) x.position_stride = 0;
  return x;
}

// The positions of all examples as those of one example, if they lie at one stride.
inline ChannelView joined(ChannelView x) {
  if (x.positions == 1) x.position_stride = x.example_stride;
  if (x.positions > 1 && x.example_stride != x.positions * x.position_stride) return normalised(x);
  x.positions *= x.examples;
  x.examples = 1;
  return normalised(x);
}

}  // namespace pcafast::cuda
