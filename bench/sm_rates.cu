// What a multiprocessor can do in a clock and in a second: the ceilings below the memory's. Prints one line of JSON a rate.
//
// Every thread runs independent chains of one instruction, written in PTX so that no compiler folds them; one block of 1,024
// threads a multiprocessor and clock() around the loop give operations a clock, events around the launch those a second.
// Build: nvcc -O3 -std=c++17 -arch=sm_90 sm_rates.cu -o sm_rates. Status 0, or 1 with a sentence on stderr.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kThreads = 1024;
constexpr int kChains = 8;    // independent, to cover an instruction's latency
constexpr int kLoops = 4096;  // long enough that launch and clock() do not count
constexpr int kRepeats = 5;

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "sm_rates: %s failed: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

struct Fma {
    static constexpr const char* name = "issue (fused multiply-add)";
    static constexpr int amount = 1;
    static __device__ void run(unsigned& value, unsigned b, unsigned c) {
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(reinterpret_cast<float&>(value)) : "f"(__uint_as_float(b)), "f"(__uint_as_float(c)));
    }
};

struct Logic {
    static constexpr const char* name = "integer (three-input logic)";
    static constexpr int amount = 1;
    static __device__ void run(unsigned& value, unsigned b, unsigned c) {
        asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;" : "+r"(value) : "r"(b), "r"(c));
    }
};

struct Exponential {
    static constexpr const char* name = "special function (2^x)";
    static constexpr int amount = 1;
    static __device__ void run(unsigned& value, unsigned, unsigned) {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(reinterpret_cast<float&>(value)));
    }
};

struct Shuffle {
    static constexpr const char* name = "shuffle";
    static constexpr int amount = 1;
    static __device__ void run(unsigned& value, unsigned, unsigned) {
        asm volatile("shfl.sync.bfly.b32 %0, %0, 1, 0x1f, 0xffffffff;" : "+r"(value));
    }
};

struct SharedLoad {  // follows a pointer that leads back to itself: 16 bytes a thread, no bank twice
    static constexpr const char* name = "shared memory (bytes read)";
    static constexpr int amount = 16;
    static __device__ void run(unsigned& value, unsigned, unsigned) {
        unsigned y, z, w;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%0];" : "+r"(value), "=r"(y), "=r"(z), "=r"(w)::"memory");
    }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads) measure(unsigned b, unsigned c, long long* cycles, unsigned* sink) {
    __shared__ uint4 table[kThreads];
    const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(&table[threadIdx.x]));
    table[threadIdx.x] = make_uint4(own, own, own, own);
    unsigned values[kChains];
    for (int i = 0; i < kChains; ++i) values[i] = Op::amount == 16 ? own : threadIdx.x + i;
    __syncthreads();
    const long long begin = clock64();
    for (int loop = 0; loop < kLoops; ++loop) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) Op::run(values[i], b, c);
    }
    __syncthreads();
    const long long end = clock64();
    unsigned folded = 0;
    for (int i = 0; i < kChains; ++i) folded ^= values[i];
    if (folded == 0x9e3779b9u) *sink = folded;  // never, but the compiler does not know
    if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
}

template <typename Op>
void report(int multiprocessors, long long* cycles, unsigned* sink) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<long long> clocks(multiprocessors);
    double best_clock = 0, best_second = 0;
    for (int repeat = 0; repeat <= kRepeats; ++repeat) {  // the first wakes the clocks
        check(cudaEventRecord(begin), "cudaEventRecord");
        measure<Op><<<multiprocessors, kThreads>>>(0x3f7ffff0u, 0x00000010u, cycles, sink);
        check(cudaGetLastError(), "launch");
        check(cudaEventRecord(end), "cudaEventRecord");
        check(cudaEventSynchronize(end), Op::name);
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
        check(cudaMemcpy(clocks.data(), cycles, sizeof(long long) * clocks.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
        std::nth_element(clocks.begin(), clocks.begin() + clocks.size() / 2, clocks.end());
        const double done = double(kThreads) * kChains * kLoops * Op::amount;
        if (repeat == 0) continue;
        best_clock = std::max(best_clock, done / double(clocks[clocks.size() / 2]));
        best_second = std::max(best_second, done * multiprocessors / (1e-3 * milliseconds));
    }
    std::printf("{\"name\": \"%s\", \"per_clock\": %.2f, \"per_second\": %.5g}\n", Op::name, best_clock, best_second);
    std::fflush(stdout);
    check(cudaEventDestroy(begin), "cudaEventDestroy");
    check(cudaEventDestroy(end), "cudaEventDestroy");
}

}  // namespace

int main() {
    int device = 0, multiprocessors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    long long* cycles = nullptr;
    unsigned* sink = nullptr;
    check(cudaMalloc(&cycles, sizeof(long long) * multiprocessors), "cudaMalloc");
    check(cudaMalloc(&sink, sizeof(unsigned)), "cudaMalloc");
    report<Fma>(multiprocessors, cycles, sink);
    report<Logic>(multiprocessors, cycles, sink);
    report<Exponential>(multiprocessors, cycles, sink);
    report<Shuffle>(multiprocessors, cycles, sink);
    report<SharedLoad>(multiprocessors, cycles, sink);
    check(cudaFree(cycles), "cudaFree");
    check(cudaFree(sink), "cudaFree");
    return 0;
}
