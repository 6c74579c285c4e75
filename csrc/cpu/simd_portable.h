// simd.h in plain C++: loops over sixteen lanes, which compilers vectorise for whatever they target.
#pragma once

namespace qk::cpu {

struct Vec {
  float lane[16];
};
struct Ints {
  int32_t lane[16];
};
struct Mask {
  int32_t lane[16];  // 0 or -1
};

template <class Result, class Each>
QK_HD Result each_lane(Each&& each) {
  Result result;
  for (int i = 0; i < 16; ++i) {
    result.lane[i] = each(i);
  }
  return result;
}

QK_HD Vec splat(float a) {
  return each_lane<Vec>([&](int) { return a; });
}
QK_HD Ints splat(int32_t a) {
  return each_lane<Ints>([&](int) { return a; });
}

template <class T>
QK_HD Vec load(const T* from) {
  Vec result;
  to_float<16>(from, result.lane);
  return result;
}
template <class T>
QK_HD void store(const Vec& a, T* to) {
  from_float<16>(a.lane, to);
}

QK_HD void stream(const Vec& a, float* to) { store(a, to); }  // no such instruction everywhere
QK_HD void end_stream() {}

QK_HD Vec operator+(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a.lane[i] + b.lane[i]; });
}
QK_HD Vec operator-(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a.lane[i] - b.lane[i]; });
}
QK_HD Vec operator*(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a.lane[i] * b.lane[i]; });
}
QK_HD Vec fma(const Vec& a, const Vec& b, const Vec& c) {  // a b + c
  return each_lane<Vec>([&](int i) { return QK_FMA(a.lane[i], b.lane[i], c.lane[i]); });
}
QK_HD Vec fnma(const Vec& a, const Vec& b, const Vec& c) {  // c - a b
  return each_lane<Vec>([&](int i) { return QK_FMA(-a.lane[i], b.lane[i], c.lane[i]); });
}
QK_HD Vec larger(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
QK_HD Vec smaller(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

QK_HD Vec reciprocal(const Vec& a) {
  return each_lane<Vec>([&](int i) { return 1.0f / a.lane[i]; });
}

QK_HD Ints bits_of(const Vec& a) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(math::bits_of(a.lane[i])); });
}
QK_HD Vec float_of(const Ints& a) {
  return each_lane<Vec>([&](int i) { return math::float_of(static_cast<uint32_t>(a.lane[i])); });
}
// Sums and shifts wrap around, as vector registers do.
QK_HD Ints operator+(const Ints& a, const Ints& b) {
  return each_lane<Ints>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i])); });
}
QK_HD Ints larger(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
QK_HD Ints smaller(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <int Count>
QK_HD Ints shift_left(const Ints& a) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << Count); });
}

QK_HD Mask operator<(const Vec& a, const Vec& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] < b.lane[i] ? -1 : 0; });
}
QK_HD Mask operator!=(const Vec& a, const Vec& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] != b.lane[i] ? -1 : 0; });
}
QK_HD Mask operator|(const Mask& a, const Mask& b) {
  return each_lane<Mask>([&](int i) { return a.lane[i] | b.lane[i]; });
}
QK_HD bool any(const Mask& a) {
  int32_t found = 0;
  for (int i = 0; i < 16; ++i) {
    found |= a.lane[i];
  }
  return found != 0;
}
QK_HD Vec select(const Mask& where, const Vec& yes, const Vec& no) {
  return each_lane<Vec>([&](int i) { return where.lane[i] ? yes.lane[i] : no.lane[i]; });
}

// No lookup by lane: the table has one entry and the polynomial is longer.
constexpr int kTableBits = 0;
struct Table {
  int32_t value;
  explicit Table(const int32_t* values) : value(values[0]) {}
};
QK_HD Ints lookup(const Table& table, const Ints&) { return splat(table.value); }

constexpr int kBins = 0;  // nor among more: never built
struct BinTable {
  explicit BinTable(const void*) {}
};
QK_HD Ints lookup(const BinTable&, const Ints& index) { return index; }

constexpr int kInterleave = 1;

}  // namespace qk::cpu
