// lut_mma.h for codes of 2 bits.

#include "lut_mma.h"

namespace qk::cuda {

template Slices lut_mma_slices<2>(int64_t N, int64_t K);
template void lut_mma<2>(const LutCall& call, int64_t slices, cudaStream_t stream);

}  // namespace qk::cuda
