// The optimizer's part of quped_step over a run of elements: the state is written in place, the moved weights into a
// buffer.
#pragma once

#include <type_traits>

#include "../math/step_factors.h"
#include "simd_bits.h"

namespace qk::cpu {

#if defined(_MSC_VER)
#define QK_RESTRICT __restrict
#else
#define QK_RESTRICT __restrict__
#endif

#if defined(__GNUC__)
#define QK_INLINE __attribute__((always_inline))
#else
#define QK_INLINE
#endif

template <bool kValue>
using Flag = std::integral_constant<bool, kValue>;

template <class Body>
void with_flag(bool flag, Body&& body) {
  if (flag) {
    body(Flag<true>{});
  } else {
    body(Flag<false>{});
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;  // too few registers, or no fused multiply-add
#endif

QK_HD void fetch(const float* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from);
#else
  (void)from;
#endif
}

constexpr int kAhead = 512;  // elements: further than instructions in flight reach

// Moved weights as they are made, a vector at a time: the loop that takes them then waits for memory and computes at
// once. move(x, g, first, second) is the optimizer on vectors; second may be null where kSecond is false.
template <bool kSecond, class Move>
struct Streamed {
  static constexpr bool kBuffered = false;
  const float* x;
  const float* g;
  float* first;
  float* second;
  Move move;

  QK_HD Vec whole(int i) const {
    fetch(x + i + kAhead);
    fetch(g + i + kAhead);
    fetch(first + i + kAhead);
    if constexpr (kSecond) {
      fetch(second + i + kAhead);
    }
    Vec a = load(first + i), b = kSecond ? load(second + i) : a;
    const Vec moved = move(load(x + i), load(g + i), a, b);
    store(a, first + i);
    if constexpr (kSecond) {
      store(b, second + i);
    }
    return moved;
  }

  QK_HD Vec some(int i, int count) const {
    Vec a = load_some(first + i, count), b = kSecond ? load_some(second + i, count) : a;
    const Vec moved = move(load_some(x + i, count), load_some(g + i, count), a, b);
    store_some(a, count, first + i);
    if constexpr (kSecond) {
      store_some(b, count, second + i);
    }
    return moved;
  }
};

class Optimizer {
 public:
  explicit Optimizer(const math::StepFactors& factors)
      : adaptive_(factors.adaptive),
        nesterov_(factors.nesterov),
        first_step_(factors.first_step),
        momentum_(factors.momentum),
        decay_(factors.decay),
        from_end_(factors.from_end),
        sgd_(factors.sgd),
        adam_(factors.adam) {}

  bool has_first() const { return adaptive_ || momentum_; }
  bool has_second() const { return adaptive_; }

  // body(source) with the commonest rules as a Streamed source; false where the rule is another.
  template <class Body>
  bool stream(const float* x, const float* g, float* first, float* second, Body&& body) const {
    if constexpr (kStreams) {
      if (adaptive_ && !from_end_) {
        const math::Adam<Vec> a = {splat(decay_ == math::Decay::kNone ? 1.0f : adam_.decay),
                                   splat(adam_.weight),
                                   splat(adam_.beta2),
                                   splat(adam_.share),
                                   splat(adam_.correction),
                                   splat(adam_.eps),
                                   splat(adam_.minus_rate)};
        with_flag(decay_ == math::Decay::kCoupled, [&](auto coupled) {
          constexpr auto kDecay =
              decltype(coupled)::value ? math::Decay::kCoupled : math::Decay::kDecoupled;  // times 1 for none
          const auto move = [a](Vec value, Vec gradient, Vec& mean, Vec& square)
                                QK_INLINE { return math::adam<kDecay, false>(a, value, gradient, mean, square); };
          body(Streamed<true, decltype(move)>{x, g, first, second, move});
        });
        return true;
      }
      if (!adaptive_ && momentum_ && !first_step_ && !nesterov_) {
        const math::Sgd<Vec> s = {splat(sgd_.minus_rate), splat(sgd_.decay), splat(sgd_.momentum), splat(sgd_.weight)};
        with_flag(decay_ != math::Decay::kNone, [&](auto decay) {
          constexpr bool kDecay = decltype(decay)::value;
          const auto move = [s](Vec value, Vec gradient, Vec& buffer, Vec&) QK_INLINE {
            return math::sgd<kDecay, math::Momentum::kRunning, false>(s, value, gradient, buffer);
          };
          body(Streamed<false, decltype(move)>{x, g, first, nullptr, move});
        });
        return true;
      }
    }
    return false;
  }

  // moved[i] = the optimizer's x for i < n; first and second may be null where there is no such state.
  void run(const float* x, const float* g, float* first, float* second, int64_t n, float* moved) const {
    if (adaptive_) {
      run_adam(x, g, first, second, n, moved);
    } else if (!momentum_) {
      with_flag(decay_ != math::Decay::kNone,
                [&](auto decay) { run_sgd<decay.value, math::Momentum::kNone, false>(x, g, nullptr, n, moved); });
    } else {
      with_flag(decay_ != math::Decay::kNone, [&](auto decay) {
        with_flag(nesterov_, [&](auto nesterov) {
          if (first_step_) {
            run_sgd<decay.value, math::Momentum::kFirst, nesterov.value>(x, g, first, n, moved);
          } else {
            run_sgd<decay.value, math::Momentum::kRunning, nesterov.value>(x, g, first, n, moved);
          }
        });
      });
    }
  }

 private:
  template <bool kDecay, math::Momentum kMomentum, bool kNesterov>
  void run_sgd(const float* QK_RESTRICT x, const float* QK_RESTRICT g, float* QK_RESTRICT buffer, int64_t n,
               float* QK_RESTRICT moved) const {
    const math::Sgd<float> s = sgd_;
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (kMomentum == math::Momentum::kNone) {
        float none = 0.0f;
        moved[i] = math::sgd<kDecay, kMomentum, kNesterov>(s, x[i], g[i], none);
      } else {
        float held = kMomentum == math::Momentum::kFirst ? 0.0f : buffer[i];
        moved[i] = math::sgd<kDecay, kMomentum, kNesterov>(s, x[i], g[i], held);
        buffer[i] = held;
      }
    }
  }

  template <math::Decay kDecay, bool kFromEnd>
  void run_adam_as(const float* QK_RESTRICT x, const float* QK_RESTRICT g, float* QK_RESTRICT first,
                   float* QK_RESTRICT second, int64_t n, float* QK_RESTRICT moved) const {
    const math::Adam<float> a = adam_;
    for (int64_t i = 0; i < n; ++i) {
      float mean = first[i], square = second[i];
      moved[i] = math::adam<kDecay, kFromEnd>(a, x[i], g[i], mean, square);
      first[i] = mean;
      second[i] = square;
    }
  }

  void run_adam(const float* x, const float* g, float* first, float* second, int64_t n, float* moved) const {
    with_flag(from_end_, [&](auto from_end) {
      switch (decay_) {
        case math::Decay::kNone:
          return run_adam_as<math::Decay::kNone, from_end.value>(x, g, first, second, n, moved);
        case math::Decay::kCoupled:
          return run_adam_as<math::Decay::kCoupled, from_end.value>(x, g, first, second, n, moved);
        case math::Decay::kDecoupled:
          return run_adam_as<math::Decay::kDecoupled, from_end.value>(x, g, first, second, n, moved);
      }
    });
  }

  bool adaptive_, nesterov_, first_step_, momentum_;
  math::Decay decay_;
  bool from_end_;
  math::Sgd<float> sgd_;
  math::Adam<float> adam_;
};

}  // namespace qk::cpu
