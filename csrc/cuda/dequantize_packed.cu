// dequantize_packed: the bit stream of codes straight to values.
//
// A block takes 4,096 bytes of the stream, 16 a thread, to shared memory; from there each thread turns the codes of 16
// bytes of output at a time, neighbours side by side: reads bits / 8 bytes and writes one value an element, both 16
// bytes at once. Bound by writing. Values are moved, not computed: the halves are two bytes, whichever they are.

#include <type_traits>

#include "../check.h"
#include "../math/pack_codes.h"
#include "cut.h"
#include "kernels.h"

namespace qk::cuda {
namespace {

constexpr const char* kOp = "dequantize_packed";
constexpr int kTileThreads = 256;
constexpr int kTileBytes = 16 * kTileThreads;  // of the stream
constexpr int kGroup = 8;                      // codes: they fill `Bits` bytes

struct PackedStream {
  const uint8_t* packed;
  int64_t bytes;
  int64_t numel;
  int64_t length;  // weights a row of centers
  int levels;
};

// The bytes of a tile; 0 past the end of the stream.
__device__ uint4 sixteen_bytes(const PackedStream& stream, int64_t at) {
  if (at + 16 <= stream.bytes && reinterpret_cast<uintptr_t>(stream.packed) % 16 == 0) {
    return load_streaming(reinterpret_cast<const uint4*>(stream.packed + at));
  }
  uint32_t words[4] = {};
  for (int i = 0; i < 16 && at + i < stream.bytes; ++i) {
    words[i / 4] |= static_cast<uint32_t>(stream.packed[at + i]) << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Value: uint32_t or uint16_t, the bits of a float or of a half.
template <int Bits, class Value>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_packed_kernel(PackedStream stream, const Value* centers, Value* out) {
  constexpr int kGroups = kTileBytes / Bits;   // whole groups in a tile: those of 3, 5, 6, 7 bits leave bytes over
  constexpr int kStored = 16 / sizeof(Value);  // values a store
  QK_SHARED(uint4, tile, kTileThreads);
  QK_SHARED(Value, table, 1 << Bits);
  const int thread = static_cast<int>(threadIdx.x);
  const bool one_table = stream.length == stream.numel;
  const int64_t first_group = int64_t{blockIdx.x} * kGroups;
  tile[thread] = sixteen_bytes(stream, first_group * Bits + 16 * thread);
  if (one_table && thread < 1 << Bits) {
    table[thread] = centers[thread < stream.levels ? thread : stream.levels - 1];
  }
  __syncthreads();
  const auto* bytes = reinterpret_cast<const uint8_t*>(tile);
  for (int part = thread; part < kGroups * (kGroup / kStored); part += kTileThreads) {
    const int group = part / (kGroup / kStored), first = part % (kGroup / kStored) * kStored;
    const int64_t place = (first_group + group) * kGroup + first;
    if (place >= stream.numel) {
      return;
    }
    const uint64_t codes = math::unpack_eight<Bits>(math::load_bytes(bytes + group * Bits, Bits)) >> (8 * first);
    const int64_t left = stream.numel - place;
    int64_t row = one_table ? 0 : place / stream.length;
    int64_t end = one_table ? stream.numel : (row + 1) * stream.length;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kStored; ++i) {
      const int code = static_cast<int>(codes >> (8 * i)) & 0xff;
      Value value;
      if (one_table) {
        value = table[code];
      } else {
        if (place + i >= end && place + i < stream.numel) {
          ++row;
          end += stream.length;
        }
        value = __ldg(centers + row * stream.levels + (code < stream.levels ? code : stream.levels - 1));
      }
      words[i * 4 / kStored] |= static_cast<uint32_t>(value) << (8 * sizeof(Value) * i % 32);
    }
    if (left >= kStored && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
      *reinterpret_cast<uint4*>(out + place) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kStored; ++i) {
        if (i < left) {
          out[place + i] = static_cast<Value>(words[i * 4 / kStored] >> (8 * sizeof(Value) * i % 32));
        }
      }
    }
  }
}

template <class Value, int Bits = 1>
void launch_bits(int bits, const PackedStream& stream, const void* centers, void* out, cudaStream_t handle) {
  if constexpr (Bits <= 8) {
    if (bits != Bits) {
      return launch_bits<Value, Bits + 1>(bits, stream, centers, out, handle);
    }
    const int64_t tile = int64_t{kTileBytes} / Bits * kGroup;
    launch(&dequantize_packed_kernel<Bits, Value>, dim3(static_cast<unsigned>((stream.numel + tile - 1) / tile)),
           dim3(kTileThreads), 0, handle, stream, static_cast<const Value*>(centers), static_cast<Value*>(out));
  }
}

}  // namespace

void dequantize_packed(Stream stream, View packed, View centers, int64_t bits, const std::vector<int64_t>& shape,
                       View out) {
  QK_CHECK(out.sizes == shape, text(kOp, ": out must have shape ", shape_of(shape)), shape_of(out.sizes));
  QK_CHECK(out.dtype == centers.dtype, text(kOp, ": out must be ", name_of(centers.dtype)), name_of(out.dtype));
  QK_CHECK(bits >= 1 && bits <= 8, text(kOp, ": bits must be between 1 and 8"), std::to_string(bits));
  const Rows rows = rows_of(kOp, out, centers);
  QK_CHECK(rows.levels <= 1 << bits, text(kOp, ": ", bits, " bits tell ", 1 << bits, " centers apart"),
           std::to_string(rows.levels));
  const int64_t numel = out.numel(), bytes = numel / 8 * bits + (numel % 8 * bits + 7) / 8;
  QK_CHECK(packed.numel() == bytes, text(kOp, ": packed must have ", bytes, " bytes"), std::to_string(packed.numel()));
  if (numel == 0) {
    return;
  }
  const PackedStream codes{packed.as<uint8_t>(), bytes, numel, rows.length, rows.levels};
  if (out.dtype == Dtype::float32) {
    launch_bits<uint32_t>(static_cast<int>(bits), codes, centers.data, out.data, stream.handle);
  } else {
    launch_bits<uint16_t>(static_cast<int>(bits), codes, centers.data, out.data, stream.handle);
  }
}

}  // namespace qk::cuda
