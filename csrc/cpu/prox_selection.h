// CellSelection: argmin_c 1/2 (c - mu)^2 + t sum_i |s_i - c| over the members s_1 <= .. <= s_n of one cell, by
// selection.
//
// v_k = mu + t (n - 2 k), rounded as eager rounds it, never rises with k, so k* = #{k : v_k > s_{k+1}} is where the
// sorted members cross it, and the minimiser is max(v_k*, s_k*). Members are compared by their keys (sorted_keys.h).
// The crossing is narrowed to one of kBuckets runs of keys by counting, then that run is cut again, until it is short
// or a single key. No member is sorted that the crossing could not be at: time is linear whatever repeats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sorted_keys.h"

namespace qk::cpu {

constexpr uint32_t kLastKey = ~0u;  // of a NaN, which no v exceeds: sorted last, as torch does

QK_HD uint32_t member_key(float value) { return value != value ? kLastKey : key_of(value); }

class CellSelection {
 public:
  // Members have keys in [low, high], or above where they are NaN; they will be counted in `buckets` runs of keys.
  void start(uint32_t low, uint32_t high, int64_t buckets) {
    low_ = low;
    high_ = high;
    buckets_ = buckets;
    shift_ = 0;
    while (static_cast<int64_t>((high_ - low_) >> shift_) >= buckets_) {
      ++shift_;
    }
  }

  // From 0 to `buckets`, the last for keys out of range; never beyond, for any key at all.
  int64_t bucket_of(uint32_t key) const {
    const auto bucket = static_cast<int64_t>((key - low_) >> shift_);
    return key > high_ ? buckets_ : std::min(bucket, buckets_);
  }

  // Keeps the only bucket the crossing can be in, given mu, t and how many members each of buckets + 1 holds.
  void narrow(const int64_t* counts, float mu, float strength) {
    mu_ = mu;
    strength_ = strength;
    count_ = 0;
    for (int64_t b = 0; b <= buckets_; ++b) {
      count_ += counts[b];
    }
    cut(counts);
  }

  // The members once more: those of the bucket are kept, of those below only the largest matters.
  void see(uint32_t key) {
    if (key < low_) {
      below_ = std::max(below_, key);
    } else if (key <= high_ && !decided_) {
      kept_.push_back(key);
    }
  }

  // What another part of the row saw, after the same narrow().
  void add(const CellSelection& other) {
    below_ = std::max(below_, other.below_);
    kept_.insert(kept_.end(), other.kept_.begin(), other.kept_.end());
  }

  float minimiser() {
    while (!decided_ && kept_.size() > kShort && low_ < high_) {
      start(low_, high_, kBuckets);
      int64_t counts[kBuckets + 1] = {};
      for (uint32_t key : kept_) {
        ++counts[bucket_of(key)];
      }
      cut(counts);
      std::vector<uint32_t> candidates;
      candidates.swap(kept_);
      for (uint32_t key : candidates) {
        see(key);
      }
    }
    int64_t k = before_;
    if (!decided_) {
      std::sort(kept_.begin(), kept_.end());
      for (auto key = kept_.begin(); key != kept_.end() && exceeds(k, *key); ++key, ++k) {
        below_ = *key;
      }
    }
    const float at_interval = value_at(k);
    return k > 0 && value_of(below_) > at_interval ? value_of(below_) : at_interval;
  }

 private:
  static constexpr int64_t kBuckets = 1024;
  static constexpr size_t kShort = 64;

  float value_at(int64_t k) const { return mu_ + strength_ * static_cast<float>(count_ - 2 * k); }

  bool exceeds(int64_t k, uint32_t key) const { return key_of(value_at(k)) > key; }

  void cut(const int64_t* counts) {
    const uint32_t low = low_, high = high_;
    int64_t rank = before_;
    for (int64_t b = 0; b < buckets_; ++b) {
      if (counts[b] == 0) {
        continue;
      }
      const uint32_t first = low + (static_cast<uint32_t>(b) << shift_);
      const uint32_t last = first + std::min(high - first, (1u << shift_) - 1);
      if (!exceeds(rank + counts[b] - 1, last)) {
        low_ = first;
        high_ = last;
        before_ = rank;
        decided_ = !exceeds(rank, first);  // not even at its first member: only the largest below is needed
        return;
      }
      rank += counts[b];
    }
    low_ = high_ = kLastKey;  // v exceeds every member
    before_ = rank;
    decided_ = true;
  }

  float mu_ = 0.0f, strength_ = 0.0f;
  int64_t count_ = 0;   // members
  int64_t before_ = 0;  // of these, below low_
  uint32_t low_ = 0, high_ = kLastKey;
  uint32_t below_ = 0;  // largest key below low_
  int64_t buckets_ = 1;
  int shift_ = 0;
  bool decided_ = false;  // the crossing is at low_
  std::vector<uint32_t> kept_;
};

}  // namespace qk::cpu
