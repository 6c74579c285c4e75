// lut_mma.h for codes of 4 bits.

#include "lut_mma.h"

namespace qk::cuda {

template Slices lut_mma_slices<4>(int64_t N, int64_t K);
template void lut_mma<4>(const LutCall& call, int64_t slices, cudaStream_t stream);

}  // namespace qk::cuda
