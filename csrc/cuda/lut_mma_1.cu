// lut_mma.h for codes of 1 bit.

#include "lut_mma.h"

namespace qk::cuda {

template Slices lut_mma_slices<1>(int64_t N, int64_t K);
template void lut_mma<1>(const LutCall& call, int64_t slices, cudaStream_t stream);

}  // namespace qk::cuda
