// Float32 values as unsigned keys in the same order, and a radix sort of keys. Bound by its scattered writes: 11 bits a
// pass, three passes for float32, fewer where a digit is the same in all keys (bfloat16, float16).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "../math/macros.h"

namespace qk::cpu {

constexpr uint32_t kSignBit = 0x80000000u;

// Keys compare as the floats do; -0 becomes +0. NaN and infinities have keys too, outside the finite ones.
QK_HD uint32_t key_of(float value) {
  const uint32_t bits = math::bits_of(value + 0.0f);
  return bits ^ ((bits & kSignBit) ? ~0u : kSignBit);
}

QK_HD float value_of(uint32_t key) { return math::float_of(key ^ ((key & kSignBit) ? kSignBit : ~0u)); }

// Two buffers of `capacity` keys; nothing is initialised. The sorted keys end in keys().
template <class Key>
class KeySorter {
 public:
  explicit KeySorter(int64_t capacity)
      : keys_(new Key[static_cast<size_t>(capacity)]), spare_(new Key[static_cast<size_t>(capacity)]) {}

  Key* keys() { return keys_.get(); }

  void sort(int64_t count) {
    if (count < kFew) {
      std::sort(keys_.get(), keys_.get() + count);
      return;
    }
    std::fill_n(&counts_[0][0], kDigits * kBins, int64_t{0});
    for (int64_t i = 0; i < count; ++i) {
      const Key key = keys_[i];
      for (int digit = 0; digit < kDigits; ++digit) {
        ++counts_[digit][bin_of(key, digit)];
      }
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      if (counts_[digit][bin_of(keys_[0], digit)] < count) {
        pass(count, digit);
      }
    }
  }

 private:
  static constexpr int kBits = 11;  // 2,048 open runs fit the second-level cache and its address translation
  static constexpr int kBins = 1 << kBits;
  static constexpr int kDigits = (8 * static_cast<int>(sizeof(Key)) + kBits - 1) / kBits;
  static constexpr int64_t kFew = 1024;  // below it clearing the counts costs more than std::sort

  static size_t bin_of(Key key, int digit) { return static_cast<size_t>(key >> (digit * kBits)) & (kBins - 1); }

  void pass(int64_t count, int digit) {
    int64_t* next = counts_[digit];
    int64_t start = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      start += std::exchange(next[bin], start);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Key key = keys_[i];
      spare_[next[bin_of(key, digit)]++] = key;
    }
    keys_.swap(spare_);
  }

  std::unique_ptr<Key[]> keys_;
  std::unique_ptr<Key[]> spare_;
  int64_t counts_[kDigits][kBins];
};

}  // namespace qk::cpu
