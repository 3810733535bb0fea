// A panel in the vectors of the instruction set at hand.
#pragma once

#include <memory>
#include <type_traits>

#include "covariance_panel.h"

namespace pcafast::cpu {

class AnyPanel {
 public:
  virtual ~AnyPanel() = default;
  virtual void pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, const double* shift,
                    double unit) = 0;
  virtual void add_sums(double* sums) const = 0;
  virtual void multiply(int64_t begin, int64_t end, double factor, double* out) const = 0;
};

// All that a panel does is inlined into these functions, which have the instruction set.
#define PCAFAST_PANEL(Name, ...)                                                                                    \
  template <class Vector>                                                                                           \
  class Name final : public AnyPanel {                                                                              \
   public:                                                                                                          \
    explicit Name(int64_t channels) : panel_(channels) {}                                                           \
    __VA_ARGS__ void pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, const double* shift, \
                          double unit) override {                                                                   \
      with_element_type(s.x.dtype, [&](auto element) {                                                              \
        using T = decltype(element);                                                                                \
        if constexpr (std::is_same_v<T, double> == std::is_same_v<typename Panel<Vector>::Work, double>) {          \
          panel_.template pack<T>(s, begin, end, first_channel, shift, unit);                                       \
        }                                                                                                           \
      });                                                                                                           \
    }                                                                                                               \
    __VA_ARGS__ void add_sums(double* sums) const override { panel_.add_sums(sums); }                               \
    __VA_ARGS__ void multiply(int64_t begin, int64_t end, double factor, double* out) const override {              \
      panel_.multiply(begin, end, factor, out);                                                                     \
    }                                                                                                               \
                                                                                                                    \
   private:                                                                                                         \
    Panel<Vector> panel_;                                                                                           \
  };

template <template <class> class Name, class Floats, class Doubles>
std::unique_ptr<AnyPanel> make_panel(Dtype dtype, int64_t channels) {
  if (dtype == Dtype::kFloat64) return std::make_unique<Name<Doubles>>(channels);
  return std::make_unique<Name<Floats>>(channels);
}

PCAFAST_PANEL(Panel128)

#if PCAFAST_INSTRUCTION_SETS
PCAFAST_PANEL(Panel256, PCAFAST_V3)
PCAFAST_PANEL(Panel512, PCAFAST_V4)

inline const auto panel_for = __builtin_cpu_supports("x86-64-v4")   ? make_panel<Panel512, Floats64, Doubles64>
                              : __builtin_cpu_supports("x86-64-v3") ? make_panel<Panel256, Floats32, Doubles32>
                                                                    : make_panel<Panel128, Floats16, Doubles16>;
#else
inline const auto panel_for = make_panel<Panel128, Floats16, Doubles16>;
#endif

#undef PCAFAST_PANEL

}  // namespace pcafast::cpu
