// What the kernels need of torch's header, on one thread.
#pragma once

#include <cstdint>

namespace at {

inline int get_num_threads() { return 1; }

template <class Range>
inline void parallel_for(int64_t begin, int64_t end, int64_t, const Range& range) {
  if (begin < end) range(begin, end);
}

}  // namespace at
