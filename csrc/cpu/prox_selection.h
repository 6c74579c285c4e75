// CellSelection: argmin_c 1/2 (c - mu)^2 + t sum_i |s_i - c| over the members s_1 <= .. <= s_n of one cell, by
// selection.
//
// v_k = mu + t (n - 2 k), rounded as eager rounds it, never rises with k, so k* = #{k : v_k > s_{k+1}} is where the
// sorted members cross it, and the minimiser is max(v_k*, s_k*). Members are compared by their keys (sorted_keys.h).
// The crossing is narrowed to one of kBuckets runs of keys by counting, then that run is cut again, until it is short
// or a single key. No member is sorted that the crossing could not be at: time is linear whatever repeats. Members on
// one value, the center of the cell, where the proximal steps of the weights put them, are only counted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sorted_keys.h"

namespace qk::cpu {

constexpr uint32_t kLastKey = ~0u;  // of a NaN, which no v exceeds: sorted last, as torch does

QK_HD uint32_t member_key(float value) { return value != value ? kLastKey : key_of(value); }

// A run of keys, cut into runs of 2^shift.
struct KeyWindow {
  uint32_t low, high, shift;

  // From 0 to `buckets`, the last for keys above the window; never beyond, for any key at all.
  QK_HD uint32_t bucket_of(uint32_t key, uint32_t buckets) const {
    const uint32_t bucket = (key - low) >> shift;
    return key > high || bucket > buckets ? buckets : bucket;
  }
};

class CellSelection {
 public:
  // Members have keys in [low, high], or above where they are NaN; they will be counted in `buckets` runs of keys.
  // pivot: the key that is counted apart.
  void start(uint32_t low, uint32_t high, uint32_t pivot, uint32_t buckets) {
    low_ = low;
    high_ = high;
    pivot_ = pivot;
    buckets_ = buckets;
    shift_ = 0;
    while ((high_ - low_) >> shift_ >= buckets_) {
      ++shift_;
    }
  }

  KeyWindow window() const { return {low_, high_, shift_}; }

  // Keeps the only bucket the crossing can be in, given mu, t and how many members each of buckets + 1 holds and, last,
  // how many have the pivot's key, which are then added to their bucket.
  void narrow(int64_t* counts, float mu, float strength) {
    mu_ = mu;
    strength_ = strength;
    ties_ = counts[buckets_ + 1];
    counts[window().bucket_of(pivot_, buckets_)] += ties_;
    count_ = 0;
    for (uint32_t b = 0; b <= buckets_; ++b) {
      count_ += counts[b];
    }
    cut(counts);
  }

  // Where the crossing is after narrow(); empty where it is known to be at its low end.
  KeyWindow crossing() const { return {low_, decided_ ? 0 : high_, 0}; }

  uint32_t below() const { return below_; }

  // The members once more but for the pivot: those of the bucket are kept, of those below only the largest matters.
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
      start(low_, high_, pivot_, kBuckets);
      const KeyWindow here = window();
      int64_t counts[kBuckets + 1] = {};
      counts[here.bucket_of(pivot_, kBuckets)] += ties_;
      for (uint32_t key : kept_) {
        ++counts[here.bucket_of(key, kBuckets)];
      }
      cut(counts);
      std::vector<uint32_t> candidates;
      candidates.swap(kept_);
      for (uint32_t key : candidates) {
        see(key);
      }
    }
    const int64_t k = decided_ ? before_ : crossing_among_kept();
    const float at_interval = value_at(k);
    return k > 0 && value_of(below_) > at_interval ? value_of(below_) : at_interval;
  }

 private:
  static constexpr uint32_t kBuckets = 1024;
  static constexpr size_t kShort = 64;

  float value_at(int64_t k) const { return mu_ + strength_ * static_cast<float>(count_ - 2 * k); }

  bool exceeds(int64_t k, uint32_t key) const { return key_of(value_at(k)) > key; }

  // k* where the crossing is at one of the kept members or the pivot; below_ becomes s_k*.
  int64_t crossing_among_kept() {
    int64_t k = before_;
    const auto passes = [&](uint32_t key, int64_t members) {  // whether v exceeds all these equal members
      int64_t first = k, end = k + members;
      while (first < end) {
        const int64_t middle = first + (end - first) / 2;
        exceeds(middle, key) ? first = middle + 1 : end = middle;
      }
      below_ = first > k ? key : below_;
      const bool all = first == k + members;
      k = first;
      return all;
    };
    if (low_ == high_) {
      passes(low_, static_cast<int64_t>(kept_.size()) + ties_);
      return k;
    }
    std::sort(kept_.begin(), kept_.end());
    auto key = kept_.cbegin();
    bool all = true;
    for (; all && key != kept_.cend() && (ties_ == 0 || *key < pivot_); ++key) {
      all = passes(*key, 1);
    }
    all = all && passes(pivot_, ties_);
    for (; all && key != kept_.cend(); ++key) {
      all = passes(*key, 1);
    }
    return k;
  }

  void cut(const int64_t* counts) {
    choose(counts);
    if (ties_ > 0 && pivot_ < low_) {
      below_ = std::max(below_, pivot_);
    }
    if (decided_ || pivot_ < low_ || pivot_ > high_) {
      ties_ = 0;
    }
  }

  void choose(const int64_t* counts) {
    const uint32_t low = low_, high = high_;
    int64_t rank = before_;
    for (uint32_t b = 0; b < buckets_; ++b) {
      if (counts[b] == 0) {
        continue;
      }
      const uint32_t first = low + (b << shift_);
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
  int64_t ties_ = 0;    // of these, on the pivot in [low_, high_]
  uint32_t low_ = 0, high_ = kLastKey, pivot_ = 0;
  uint32_t below_ = 0;  // largest key below low_
  uint32_t buckets_ = 1, shift_ = 0;
  bool decided_ = false;  // the crossing is at low_
  std::vector<uint32_t> kept_;
};

}  // namespace qk::cpu
